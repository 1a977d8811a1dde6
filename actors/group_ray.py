"""One life of a learner group on Ray: its placement group, its actors, their calls, and their certain end.

`ray.kill` of a stopped process takes Ray 5 s (measured, 2.60); here its pid is killed at once, on its own node, so that it
can never wake up and write. What Ray reports as a dead actor becomes `MemberLost`; the role's exceptions pass unchanged.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Mapping, Sequence
from typing import Any

import ray
from ray.exceptions import (
    GetTimeoutError,
    NodeDiedError,
    OutOfMemoryError,
    RayActorError,
    RayError,
    RayTaskError,
    WorkerCrashedError,
)
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from actors.group_member import HEARTBEAT_GROUP, GroupMember, Process, end_process
from actors.group_placement import GroupSpec, actor_options, reserve
from actors.group_watch import Loss, MemberLost
from actors.host import ActorStats, RayPending, ray_value

log = logging.getLogger(__name__)

#: Seconds to wait for a killed member to be gone; longer for one on a node that may be gone itself.
END_DEADLINE_S = 10.0
#: Seconds a busy machine may take to answer for its members' counters.
STATS_DEADLINE_S = 30.0


class RayMembers:
    """The actors of a group (`group_watch.Members`). Everything is started at once and nothing waited for, except `kill`."""

    def __init__(self, name: str, role: type, kwargs: dict[str, Any], spec: GroupSpec) -> None:
        self._name, self._spec = name, spec
        self._reservation = reserve(spec, name)
        # Ray names an actor's class after the Python class: the dashboard shall say "Learner", not "GroupMember".
        cls = type(role.__name__, (GroupMember,), {"__module__": GroupMember.__module__})
        remote: Any = ray.remote
        actor = remote(max_concurrency=1, concurrency_groups={HEARTBEAT_GROUP: 1})(cls)
        self._names = names = [name] if spec.processes == 1 else [f"{name}-{rank}" for rank in range(spec.processes)]
        self._actors = [
            actor.options(name=own, **actor_options(spec, self._reservation.group, rank)).remote(own, rank, spec)
            for rank, own in enumerate(names)
        ]
        self.placed = [self._aside(actor.identity).remote() for actor in self._actors]
        coordinator = self._actors[0].coordinator.remote() if spec.processes > 1 else None
        # The role is unpickled only after its process has joined: its module may use JAX.
        self.formed = [actor.construct.remote(role, kwargs, actor.join.remote(coordinator)) for actor in self._actors]

    def send(self, method: str, args: Sequence[Any], kwargs: dict[str, Any]) -> tuple[Any, Sequence[Any]]:
        shared = [self._once(argument) for argument in args]
        shared_kwargs = self._once(kwargs) if kwargs else {}
        what, (first, *others) = f"{self._name}.{method}", self._actors
        value, ended = first.run.options(name=what, num_returns=2).remote(method, shared_kwargs, *shared)
        return value, [ended, *(o.run.options(name=what).remote(method, shared_kwargs, *shared) for o in others)]

    def beat(self, rank: int) -> Any:
        return self._aside(self._actors[rank].beat).remote()

    def ready(self, calls: Sequence[Any], timeout_s: float) -> Sequence[Any]:
        if not calls:
            return []
        ray.wait(list(calls), num_returns=1, timeout=timeout_s, fetch_local=False)
        return ray.wait(list(calls), num_returns=len(calls), timeout=0, fetch_local=False)[0]

    def value(self, call: Any) -> Any:
        try:
            return ray_value(call, STATS_DEADLINE_S)
        except RayTaskError:
            raise
        except (RayActorError, WorkerCrashedError, NodeDiedError, OutOfMemoryError) as error:
            raise MemberLost(_one_line(error)) from error

    def discard(self, call: Any) -> None:
        # Ray prints an exception that nobody has asked for; this one has been raised already, by the call's other half.
        with contextlib.suppress(Exception):
            ray.get(call, timeout=END_DEADLINE_S)

    def stats(self) -> list[ActorStats]:
        found = []
        for rank, call in enumerate([self._aside(actor.stats).remote() for actor in self._actors]):
            try:
                found.append(ray.get(call, timeout=STATS_DEADLINE_S))
            except (RayActorError, WorkerCrashedError, NodeDiedError, OutOfMemoryError, GetTimeoutError) as error:
                raise Loss(rank, _one_line(error)) from error
        return found

    def pulses(self) -> Mapping[str, RayPending]:
        calls = [self._aside(actor.pulse).remote() for actor in self._actors]
        return {name: RayPending(f"{name}.pulse", call) for name, call in zip(self._names, calls, strict=True)}

    def processes(self) -> list[Process]:
        """Where the members that have been placed run."""
        placed = []
        for call in ray.wait(self.placed, num_returns=len(self.placed), timeout=0)[0]:
            try:
                placed.append(ray.get(call, timeout=STATS_DEADLINE_S))
            except RayError:
                log.info("%s: a member ended before it was placed", self._name)
        return placed

    def kill(self) -> None:
        end_processes(self.processes())
        for actor in self._actors:
            ray.kill(actor, no_restart=True)
        self._reservation.remove()

    def _once(self, argument: Any) -> Any:
        if isinstance(argument, RayPending):
            return argument.ref
        if self._spec.processes == 1 or argument is None or isinstance(argument, str | int | float | bool):
            return argument
        return ray.put(argument)

    @staticmethod
    def _aside(method: Any) -> Any:
        return method.options(concurrency_group=HEARTBEAT_GROUP)


def end_processes(processes: Sequence[Process]) -> None:
    """SIGKILL processes on their own nodes and wait until they are gone; logs those whose node does not answer."""
    here = ray.get_runtime_context().get_node_id()
    end: Any = ray.remote(num_cpus=0, max_retries=0)(end_process)
    elsewhere = {
        end.options(scheduling_strategy=NodeAffinitySchedulingStrategy(process.node_id, soft=False)).remote(process): process
        for process in processes
        if process.node_id != here
    }
    unfinished = [process for process in processes if process.node_id == here and not end_process(process)]
    done, late = ray.wait(list(elsewhere), num_returns=len(elsewhere), timeout=END_DEADLINE_S) if elsewhere else ([], [])
    unfinished += [elsewhere[call] for call in late]
    for call in done:
        try:
            if not ray.get(call):
                unfinished.append(elsewhere[call])
        except RayError as error:
            node = elsewhere[call].node_id
            log.warning("node %s does not answer (%s): its processes are taken to have gone with it", node, error)
    for process in unfinished:
        log.warning("process %d on node %s was killed but is not gone yet", process.pid, process.node_id)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]
