"""The actors of a topology: how many of each role, what they may use of the machine, and their own options.

The options of a sampler's engine are in `engine_options.py`.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from topologies.engine_options import Engine
from topologies.strict import Count, CountOrZero, Fraction, Positive, PositiveOrZero, Strict, problem

#: Seconds without a sign of life after which an actor's process is ended, and started anew.
HEARTBEAT_S = 30.0


class Mesh(Strict):
    """The learner's device mesh (3.3)."""

    data: Count = 1
    fsdp: Count = 1
    seq: Count = 1
    tensor: Count = 1

    @property
    def devices(self) -> int:
        """Devices of the mesh."""
        return self.data * self.fsdp * self.seq * self.tensor


class Role(Strict):
    """Resources of one role; fractions of a CPU let all roles share two cores."""

    replicas: Count = 1
    num_cpus: PositiveOrZero = 0.1
    num_gpus: PositiveOrZero = 0.0


class Working(Role):
    """Actors that share work, each call cut over those that live."""

    heartbeat_s: Annotated[float, Field(ge=1)] = HEARTBEAT_S  # one that gives no sign of life for so long is started anew
    call_deadline_s: Positive = 600.0  # of one share of the work; a process that lives but hangs ends here
    max_restarts: CountOrZero = 3  # of one, in one call


class TpuSlices(Strict):
    """Whole TPU slices, as Ray names them: topology "4x4" of version "v6e", `count` of them."""

    topology: str
    version: str
    count: Count = 1


class Learner(Strict):
    """The learner: one group of processes on one mesh, that live and die together."""

    processes: Count = 1  # GPU: one per node or per device, by num_gpus; TPU: one per host of the slices
    mesh: Mesh = Mesh()
    num_cpus: PositiveOrZero = 0.5
    num_gpus: PositiveOrZero = 0.0
    tpu: TpuSlices | None = None
    spread: Literal["pack", "one_per_node"] = "pack"
    heartbeat_s: Annotated[float, Field(ge=1)] = 10.0  # a process that gives no sign of life for so long is lost
    max_restarts: CountOrZero = 3  # of the group, without a new checkpoint in between
    start_deadline_s: Positive = 120.0
    call_deadline_s: Positive = 3600.0  # of one call: ten steps, an update, an export; processes that live but hang end here

    @model_validator(mode="after")
    def _check(self) -> Learner:
        if self.mesh.devices % self.processes:
            message = f"the mesh has {self.mesh.devices} devices, which {self.processes} processes cannot share equally"
            raise problem(f"{message}; make processes a divisor of them", at=("processes",))
        return self

    @property
    def replicas(self) -> int:
        return self.processes

    @property
    def accelerator(self) -> Literal["cpu", "gpu", "tpu"]:
        """What it runs on, by what it asks for."""
        return "tpu" if self.tpu is not None else "gpu" if self.num_gpus > 0 else "cpu"

    @property
    def devices_per_process(self) -> int:
        """Devices that each process brings to the mesh."""
        return self.mesh.devices // self.processes


class Generating(Role):
    """Actors that generate; `max_batch` bounds the responses that one decodes at a time."""

    max_batch: Count = 256
    engine: Engine = Engine()
    heartbeat_s: Annotated[float, Field(ge=1)] = HEARTBEAT_S  # one that gives no sign of life for so long is started anew
    group_deadline_s: Positive = 600.0  # one that finishes no group for so long, its first compilation included, is killed
    max_restarts: CountOrZero = 3  # of one, while the same requests are answered, or without an answer in between


class Sampler(Generating):
    """Samplers: what a policy in training, or one that is measured, answers."""

    replicas: Count = 2
    num_cpus: PositiveOrZero = 0.2


def _available_kind(kind: Any) -> Any:
    if kind in ("judge", "human"):
        raise problem(f"the annotator kind '{kind}' is not available in this version; valid: simulated")
    return kind


class Committee(Generating):
    """Actors that answer with every member's policy; only members that are answering have a cache in memory."""


class Annotator(Strict):
    """Who labels preference pairs; `flip_rate` is the share of labels the simulated one turns round."""

    num_cpus: PositiveOrZero = 0.05
    kind: Annotated[Literal["simulated"], BeforeValidator(_available_kind)] = "simulated"
    flip_rate: Fraction = 0.0


class Server(Role):
    """The OpenAI-compatible server. Loopback only, unless `host` says otherwise."""

    host: str = "127.0.0.1"
    port: Annotated[int, Field(ge=0, le=65535)] = 8000


class Actors(Strict):
    """The roles of the running system."""

    learner: Learner = Learner()
    sampler: Sampler = Sampler()
    reward: Working = Working()
    committee: Committee = Committee()
    annotator: Annotator = Annotator()
    quantizer: Working = Working(replicas=2)
    server: Server = Server()
