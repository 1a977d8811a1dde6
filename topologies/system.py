"""One graph of actors, three launchers: in this process (inline), on a Ray of this machine (local), on a cluster.

`start` turns the topology's `actors` section into handles. Under Ray every actor is named as the YAML draws it (learner,
sampler-0, reward-0, ...) in a namespace of the run's name, so that the dashboard and `ray list actors` show the topology.
What cannot be placed is an error at once, not a wait. Samplers and the committee that die come back by themselves
(`actors/dispatch.py` says how often); the learner's group has a supervisor of its own.
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from typing import Any

from actors.annotator import Annotator
from actors.group import GroupHandle, GroupRestartedError, GroupSpec, start_group
from actors.host import ActorStats, DeadlineError, Handle, Host, InlineHandle, RayHandle, gather
from actors.jobs import LearnerSetup
from actors.learner import Learner
from actors.metrics import RaySink
from actors.quantizer import Quantizer
from actors.reward import Reward
from actors.sampler import Committee, Sampler
from actors.streams import CONCURRENCY_GROUPS, InlineStreamingHandle, RayStreamingHandle, StreamingHandle
from actors.weights import WeightStore
from afm_rl.compute import Compute
from afm_rl.errors import UserError
from afm_rl.generation.options import EngineOptions
from afm_rl.malloc import ACTOR_TUNABLES
from afm_rl.sharding import MeshShape
from topologies.actor_options import Generating
from topologies.schema import Topology

log = logging.getLogger(__name__)

#: Bytes of the local object store: weights of small models pass through it, not data sets.
OBJECT_STORE_BYTES = 512 * 2**20
#: Rows that share a lookup table (5.2), where no stage says otherwise.
PAPER_GROUP_SIZE = 16
#: Seconds a cluster may take to place an actor before the launch fails.
PLACEMENT_DEADLINE_S = 120.0


@dataclass(frozen=True)
class System:
    """Handles to the running topology. `dashboard` is its address, or None under the inline launcher."""

    learner: Handle
    samplers: list[StreamingHandle]
    rewards: list[StreamingHandle]
    committee: list[StreamingHandle]
    annotator: StreamingHandle
    quantizers: list[StreamingHandle]
    store: Handle
    dashboard: str | None
    launcher: str

    @property
    def handles(self) -> list[Handle]:
        return [
            self.learner,
            *self.samplers,
            *self.rewards,
            *self.committee,
            self.annotator,
            *self.quantizers,
            self.store,
        ]

    def stats(self) -> list[ActorStats]:
        """Busy time, calls and memory of every actor."""
        learner = self.learner.member_stats() if isinstance(self.learner, GroupHandle) else [self.learner.stats()]
        return [*learner, *(handle.stats() for handle in self.handles if handle is not self.learner)]


@dataclass(frozen=True)
class ActorDeclaration:
    """One actor as the topology draws it."""

    name: str
    role: type
    num_cpus: float
    num_gpus: float
    kwargs: dict[str, Any]

    @property
    def generates(self) -> bool:
        """Whether it answers item by item, and takes its weights from the store when it is started anew."""
        return issubclass(self.role, Committee)

    @property
    def returns(self) -> bool:
        """Whether it is started anew when its process is lost. The store is not: nobody could give it its weights again."""
        return self.role is not WeightStore


def declare(topology: Topology) -> dict[str, list[ActorDeclaration]]:
    """Every actor of the topology by role, in the order they start."""
    actors, dtype = topology.actors, topology.compute.dtype
    options: dict[str, tuple[type, int, Any, dict[str, Any]]] = {
        "weights": (WeightStore, 1, None, {}),
        "learner": (Learner, 1, actors.learner, {"setup": learner_setup(topology)}),
        "sampler": (
            Sampler,
            actors.sampler.replicas,
            actors.sampler,
            {"engine": engine_options(topology, actors.sampler)},
        ),
        "reward": (Reward, actors.reward.replicas, actors.reward, {"compute_dtype": dtype}),
        "committee": (
            Committee,
            actors.committee.replicas,
            actors.committee,
            {"engine": engine_options(topology, actors.committee)},
        ),
        "annotator": (
            Annotator,
            1,
            actors.annotator,
            {"kind": actors.annotator.kind, "seed": topology.seed, "flip_rate": actors.annotator.flip_rate},
        ),
        "quantizer": (Quantizer, actors.quantizer.replicas, actors.quantizer, {"group_size": _group_size(topology)}),
    }
    single = {"weights", "learner", "annotator"}
    return {
        role: [
            ActorDeclaration(
                role if role in single else f"{role}-{i}",
                cls,
                getattr(section, "num_cpus", 0.05),
                getattr(section, "num_gpus", 0.0),
                kwargs,
            )
            for i in range(count)
        ]
        for role, (cls, count, section, kwargs) in options.items()
    }


def engine_options(topology: Topology, role: Generating) -> EngineOptions:
    """How the engines of a role are built."""
    return role.engine.options(
        max_batch=role.max_batch, compute_dtype=topology.compute.dtype, deterministic=topology.deterministic
    )


def learner_setup(topology: Topology) -> LearnerSetup:
    """How the learner computes, from the topology's `compute` and the learner's mesh."""
    compute = topology.compute
    return LearnerSetup(
        compute=Compute(compute.dtype, compute.remat, compute.attention, compute.logits_per_pass),
        mesh=MeshShape(**topology.actors.learner.mesh.model_dump()),
        microbatch_tokens=compute.microbatch_tokens,
        keep=topology.checkpoints.keep,
        keep_every=topology.checkpoints.keep_every,
    )


def group_spec(topology: Topology) -> GroupSpec:
    """The processes of the learner, as Ray is asked for them."""
    learner = topology.actors.learner
    tpu = learner.tpu
    return GroupSpec(
        processes=learner.processes,
        devices_per_process=learner.devices_per_process,
        num_cpus=learner.num_cpus,
        num_gpus=learner.num_gpus,
        heartbeat_s=learner.heartbeat_s,
        max_restarts=learner.max_restarts,
        start_deadline_s=learner.start_deadline_s,
        accelerator=learner.accelerator,
        spread=learner.spread,
        tpu_topology=tpu.topology if tpu else None,
        tpu_version=tpu.version if tpu else None,
        tpu_slices=tpu.count if tpu else 1,
    )


def _group_size(topology: Topology) -> int:
    return topology.stage("quantize").group_size if "quantize" in topology.stage_names else PAPER_GROUP_SIZE


@contextmanager
def start(topology: Topology) -> Iterator[System]:
    """The running topology; everything it started is ended when the block is left."""
    declarations = declare(topology)
    if topology.launcher == "inline":
        yield _system(_started(declarations, _inline), None, "inline")
        return
    import ray

    dashboard = _connect(topology)
    try:
        [learner] = declarations.pop("learner")
        with closing(start_group(learner.name, learner.role, learner.kwargs, group_spec(topology))) as group:
            handles = _started(declarations, _ray_actor) | {"learner": [group]}
            _await_placement([h for hs in handles.values() for h in hs])
            yield _system(handles, dashboard, topology.launcher)
    finally:
        ray.shutdown()


def _system(handles: dict[str, list[Any]], dashboard: str | None, launcher: str) -> System:
    return System(
        learner=handles["learner"][0],
        samplers=handles["sampler"],
        rewards=handles["reward"],
        committee=handles["committee"],
        annotator=handles["annotator"][0],
        quantizers=handles["quantizer"],
        store=handles["weights"][0],
        dashboard=dashboard,
        launcher=launcher,
    )


def _started(
    declarations: dict[str, list[ActorDeclaration]], start_one: Callable[[ActorDeclaration, dict[str, Any]], Handle]
) -> dict[str, list[Any]]:
    """A handle for every declaration; the weight store first, which those that generate are told of."""
    [store_declaration] = declarations["weights"]
    store = start_one(store_declaration, {})
    handles: dict[str, list[Any]] = {
        role: [start_one(d, {"name": d.name, "store": store} if d.generates else {}) for d in ds]
        for role, ds in declarations.items()
        if role != "weights"
    }
    return handles | {"weights": [store]}


def _inline(declaration: ActorDeclaration, told: dict[str, Any]) -> InlineHandle:
    handle = InlineStreamingHandle if declaration.returns else InlineHandle
    return handle(declaration.name, declaration.role, declaration.kwargs | told)


def _ray_actor(declaration: ActorDeclaration, told: dict[str, Any]) -> RayHandle:
    import ray

    # Ray names an actor's class after the Python class: a subclass per role makes the dashboard say "Learner", not "Host".
    host = type(declaration.role.__name__, (Host,), {"__module__": Host.__module__})
    remote: Any = ray.remote
    threads, kwargs = {}, declaration.kwargs | told
    lives = {"max_restarts": -1} if declaration.returns else {}  # how often is too often: dispatch and pool know
    if declaration.returns:
        threads = {"concurrency_groups": CONCURRENCY_GROUPS}
    if declaration.generates:
        kwargs |= {"sinks": (RaySink(),)}
    actor: Any = (
        remote(max_concurrency=1, **threads)(host)
        .options(name=declaration.name, num_cpus=declaration.num_cpus, num_gpus=declaration.num_gpus, **lives)
        .remote(declaration.name, declaration.role, kwargs)
    )
    return (RayStreamingHandle if declaration.returns else RayHandle)(declaration.name, actor)


def _connect(topology: Topology) -> str | None:
    import ray

    # Ray's uv hook would build a second environment for every worker when launched through `uv run`.
    os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
    address = "local" if topology.launcher == "local" else topology.address or "auto"
    if address == "local":
        os.environ.setdefault("GLIBC_TUNABLES", ACTOR_TUNABLES)  # the processes that Ray starts here inherit it
    local_only: dict[str, Any] = (
        {"include_dashboard": True, "object_store_memory": OBJECT_STORE_BYTES} if address == "local" else {}
    )
    try:
        context = ray.init(
            address=address, namespace=topology.name, log_to_driver=False, logging_level=logging.ERROR, **local_only
        )
    except ConnectionError as error:
        raise UserError(
            f"no Ray cluster answers at address {address!r}: {error}. Start one with `ray start --head`, set `address`, or "
            "use launcher: local"
        ) from error
    return f"http://{context.dashboard_url}" if context.dashboard_url else None


def _await_placement(handles: list[Handle]) -> None:
    """Every actor answers, or the launch fails with the names of those that cannot be placed."""
    for handle in handles:
        try:
            if isinstance(handle, GroupHandle):
                _await_group(handle)
            else:
                gather([handle.ping()], deadline_s=PLACEMENT_DEADLINE_S)
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
