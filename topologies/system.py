"""One graph of actors, three launchers: in this process (inline), on a Ray of this machine (local), on a cluster.

`start` turns the topology's `actors` section into handles. Under Ray every actor is named as the YAML draws it (learner,
sampler-0, reward-0, ...) in a namespace of the run's name, so that the dashboard and `ray list actors` show the topology.
What cannot be placed is an error at once, not a wait. Samplers and the committee that die come back by themselves
(`actors/dispatch.py` says how often); the learner's group has a supervisor of its own.
"""

from __future__ import annotations

import itertools
import logging
import os
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from typing import Any

from actors.annotator import Annotator
from actors.group import GroupHandle, GroupSpec, start_group
from actors.host import ActorStats, Handle
from actors.jobs import LearnerSetup
from actors.learner import Learner
from actors.pulse import Pulse
from actors.quantizer import Quantizer
from actors.reward import Reward
from actors.sampler import Committee, Sampler
from actors.streams import StreamingHandle
from actors.weights import WeightStore
from afm_rl.compute import Compute
from afm_rl.errors import UserError
from afm_rl.generation.options import EngineOptions
from afm_rl.malloc import ACTOR_TUNABLES
from afm_rl.sharding import MeshShape
from topologies.actor_options import HEARTBEAT_S, Generating
from topologies.schema import Topology
from topologies.starting import ActorDeclaration, Starter, await_placement

log = logging.getLogger(__name__)

#: Bytes of the local object store: weights of small models pass through it, not data sets.
OBJECT_STORE_BYTES = 512 * 2**20
#: Roles of which there may be more or fewer while the run goes on.
SCALABLE = ("sampler", "committee", "reward")
#: Rows that share a lookup table (5.2), where no stage says otherwise.
PAPER_GROUP_SIZE = 16


@dataclass
class System:
    """Handles to the running topology. `dashboard` is its address, or None under the inline launcher.

    `add` and `remove` change how many there are of SCALABLE roles, while the others work.
    """

    learner: Handle
    samplers: list[StreamingHandle]
    rewards: list[StreamingHandle]
    committee: list[StreamingHandle]
    annotator: StreamingHandle
    quantizers: list[StreamingHandle]
    store: Handle
    dashboard: str | None
    launcher: str
    starter: Starter

    def add(self, role: str, count: int) -> list[StreamingHandle]:
        """Start so many more actors of a role; they are not waited for. Raises UserError when they cannot be placed."""
        present, [like, *_] = self.of(role), self.starter.declarations[role]
        self._require_room(like, count)
        taken = {handle.name for handle in present}
        names = (name for i in itertools.count() if (name := f"{role}-{i}") not in taken)
        started = [self.starter.start(replace(like, name=name), self.store) for name in itertools.islice(names, count)]
        present += started
        return started

    def remove(self, handle: StreamingHandle) -> None:
        """End an actor for good; its name and its place are free afterwards."""
        for role in SCALABLE:
            if handle in self.of(role):
                self.of(role).remove(handle)
        self.starter.pulse.unwatch(handle.name)
        handle.close()

    def of(self, role: str) -> list[StreamingHandle]:
        """The actors of a role that can be scaled."""
        return {"sampler": self.samplers, "committee": self.committee, "reward": self.rewards}[role]

    def _require_room(self, like: ActorDeclaration, count: int) -> None:
        if self.launcher == "inline":
            return
        import ray

        free = ray.available_resources()
        for what, each in (("CPU", like.num_cpus), ("GPU", like.num_gpus)):
            if each * count > free.get(what, 0.0) + 1e-6:
                raise UserError(
                    f"{count} more of {like.role.__name__} ask for {each * count:g} {what}, and {free.get(what, 0.0):g} are "
                    "free: give the role a smaller share in the topology, ask for fewer, or add a node"
                )

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
                getattr(section, "heartbeat_s", HEARTBEAT_S),
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
    declarations, pulse = declare(topology), Pulse()
    if topology.launcher == "inline":
        starter = Starter(declarations, pulse, inline=True)
        yield _system(starter, starter.start_all(declarations), None, "inline")
        return
    import ray

    dashboard, starter = _connect(topology), Starter(declarations, pulse, inline=False)
    try:
        [learner] = declarations["learner"]
        others = {role: some for role, some in declarations.items() if role != "learner"}
        with (
            closing(start_group(learner.name, learner.role, learner.kwargs, group_spec(topology))) as group,
            closing(pulse),
        ):
            handles = starter.start_all(others) | {"learner": [group]}
            await_placement([h for hs in handles.values() for h in hs])
            yield _system(starter, handles, dashboard, topology.launcher)
    finally:
        ray.shutdown()


def _system(starter: Starter, handles: dict[str, list[Any]], dashboard: str | None, launcher: str) -> System:
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
        starter=starter,
    )


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
