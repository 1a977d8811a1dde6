"""How an actor of the topology is started: in this process, or as a named Ray actor that comes back when it is lost.

Under Ray every actor but the learner's group and the weight store is started anew whenever its process is lost, and has a
pulse (`actors/pulse.py`); how often is too often is known to those who give it work.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from actors.group import GroupHandle, GroupRestartedError
from actors.host import DeadlineError, Handle, Host, InlineHandle, RayHandle, gather
from actors.metrics import RaySink
from actors.pulse import Pulse
from actors.sampler import Committee
from actors.streams import CONCURRENCY_GROUPS, InlineStreamingHandle, RayStreamingHandle
from actors.weights import WeightStore
from afm_rl.errors import UserError

log = logging.getLogger(__name__)

#: Seconds a cluster may take to place an actor before the launch fails.
PLACEMENT_DEADLINE_S = 120.0


@dataclass(frozen=True)
class ActorDeclaration:
    """One actor as the topology draws it; it is ended when it gives no sign of life for `heartbeat_s`."""

    name: str
    role: type
    num_cpus: float
    num_gpus: float
    heartbeat_s: float
    kwargs: dict[str, Any]

    @property
    def generates(self) -> bool:
        """Whether it answers item by item, and takes its weights from the store when it is started anew."""
        return issubclass(self.role, Committee)

    @property
    def returns(self) -> bool:
        """Whether it is started anew when its process is lost. The store is not: nobody could give it its weights again."""
        return self.role is not WeightStore


@dataclass(frozen=True)
class Starter:
    """Starts actors as they are declared, in this process or under Ray, and has those that come back watched."""

    declarations: Mapping[str, Sequence[ActorDeclaration]]
    pulse: Pulse
    inline: bool

    def start_all(self, declarations: Mapping[str, Sequence[ActorDeclaration]]) -> dict[str, list[Any]]:
        """A handle for every declaration; the weight store first, which those that generate are told of."""
        [weights] = declarations["weights"]
        store = self.start(weights, None)
        others = {role: [self.start(d, store) for d in ds] for role, ds in declarations.items() if role != "weights"}
        return others | {"weights": [store]}

    def start(self, declaration: ActorDeclaration, store: Handle | None) -> Any:
        """One actor; not waited for."""
        told = {"name": declaration.name, "store": store} if declaration.generates else {}
        handle = _inline(declaration, told) if self.inline else _ray_actor(declaration, told)
        if isinstance(handle, RayStreamingHandle):
            self.pulse.watch(handle, heartbeat_s=declaration.heartbeat_s)
        return handle


def _inline(declaration: ActorDeclaration, told: dict[str, Any]) -> InlineHandle:
    handle = InlineStreamingHandle if declaration.returns else InlineHandle
    return handle(declaration.name, declaration.role, declaration.kwargs | told)


def _ray_actor(declaration: ActorDeclaration, told: dict[str, Any]) -> RayHandle:
    import ray

    # Ray names an actor's class after the Python class: a subclass per role makes the dashboard say "Learner", not "Host".
    host = type(declaration.role.__name__, (Host,), {"__module__": Host.__module__})
    remote: Any = ray.remote
    threads = {"concurrency_groups": CONCURRENCY_GROUPS} if declaration.returns else {}
    lives = {"max_restarts": -1} if declaration.returns else {}
    kwargs = declaration.kwargs | told | ({"sinks": (RaySink(),)} if declaration.generates else {})
    actor: Any = (
        remote(max_concurrency=1, **threads)(host)
        .options(name=declaration.name, num_cpus=declaration.num_cpus, num_gpus=declaration.num_gpus, **lives)
        .remote(declaration.name, declaration.role, kwargs)
    )
    return (RayStreamingHandle if declaration.returns else RayHandle)(declaration.name, actor)


def await_placement(handles: Sequence[Handle]) -> None:
    """Every actor answers, also one whose process was lost meanwhile and came back.

    Raises UserError with the name of one that cannot be placed, ActorLostError for one that is lost for good.
    """
    for handle in handles:
        try:
            if isinstance(handle, GroupHandle):
                _await_group(handle)
            else:
                placed = handle.revive() if isinstance(handle, RayStreamingHandle) else handle.ping()
                gather([placed], deadline_s=PLACEMENT_DEADLINE_S)
        except DeadlineError as error:
            raise UserError(
                f"actor {handle.name} could not be placed within {PLACEMENT_DEADLINE_S:.0f} s: the cluster lacks the CPUs, "
                "GPUs or nodes it asks for; compare `afm-rl plan FILE` with `ray status`"
            ) from error


def _await_group(group: GroupHandle) -> None:
    """The group works. It has a deadline and messages of its own, and may lose a process already while it starts."""
    while True:
        try:
            gather([group.ping()], deadline_s=math.inf)
            return
        except GroupRestartedError as error:
            log.warning("%s", error)
