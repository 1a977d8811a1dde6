"""What a learner group asks of a cluster, and how it is placed: a placement group, or whole TPU slices.

`GroupSpec` is the request. On CPU a process may have several virtual devices; on GPU a process gets `num_gpus` of one node
(all of a node's: one process per node; one: one process per device); on TPU the group reserves whole slices through Ray's
own utility, one process per host. The paper does not describe its placement.

Not run, for want of the hardware: GPU groups of several processes, and TPU slices. Tested without it: what is asked of Ray,
against Ray's own tables of TPU topologies and on a Ray with a slice's resources and labels but no chips.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from afm_rl.errors import UserError
from afm_rl.malloc import ACTOR_TUNABLES, LEARNER_TUNABLES

Accelerator = Literal["cpu", "gpu", "tpu"]
#: JAX's name for each kind of accelerator.
PLATFORMS = {"cpu": "cpu", "gpu": "cuda", "tpu": "tpu"}
DEVICE_COUNT_FLAG = "--xla_force_host_platform_device_count"
#: Ray refuses a bundle without resources; this is the smallest share that it counts.
LEAST_CPUS = 0.001


@dataclass(frozen=True)
class GroupSpec:
    """N processes that form one mesh. Times in seconds.

    `devices_per_process` counts: virtual devices on CPU, chips on TPU where no slice is asked for; a GPU process has
    `num_gpus`. `spread` "pack" fills nodes, "one_per_node" gives every process a node of its own. A member that gives no
    sign of life for `heartbeat_s` is lost; the group is built anew at most `max_restarts` times without progress in between;
    `start_deadline_s` bounds placing and forming it. `tpu_topology` and `tpu_version` ("4x4", "v6e") ask for `tpu_slices`
    whole slices. Raises UserError when the numbers do not fit together.
    """

    processes: int = 1
    devices_per_process: int = 1
    num_cpus: float = 0.5
    num_gpus: float = 0.0
    heartbeat_s: float = 10.0
    max_restarts: int = 3
    start_deadline_s: float = 120.0
    accelerator: Accelerator = "cpu"
    spread: Literal["pack", "one_per_node"] = "pack"
    tpu_topology: str | None = None
    tpu_version: str | None = None
    tpu_slices: int = 1

    def __post_init__(self) -> None:
        if self.processes < 1 or self.devices_per_process < 1 or self.tpu_slices < 1:
            raise UserError("a learner group needs at least 1 process, 1 device per process and 1 slice")
        if self.heartbeat_s < 1 or self.start_deadline_s <= 0 or self.max_restarts < 0:
            raise UserError("a learner group needs heartbeat_s >= 1, start_deadline_s > 0 and max_restarts >= 0")
        if self.accelerator == "gpu" and self.num_gpus <= 0:
            raise UserError(
                "a learner group on GPUs needs num_gpus > 0: 1 for a process per device, all of a node's for one"
            )
        if (self.tpu_topology is None) != (self.tpu_version is None):
            raise UserError('a TPU slice is named by both tpu_topology ("4x4") and tpu_version ("v6e")')
        if self.tpu_topology is not None and self.accelerator != "tpu":
            raise UserError(f"tpu_topology is for accelerator tpu, not {self.accelerator}")
        if self.tpu_topology is not None:
            self._check_slice()

    def _slice_hosts(self) -> tuple[int, float]:
        """Hosts of all slices, and the chips of one, from Ray's tables."""
        from ray.util.tpu import get_tpu_worker_resources

        hosts, resources = get_tpu_worker_resources(
            str(self.tpu_topology), str(self.tpu_version), num_slices=self.tpu_slices
        )
        return hosts, resources["TPU"]

    def _check_slice(self) -> None:
        try:
            hosts, _ = self._slice_hosts()
        except ValueError as error:
            raise UserError(f"no TPU slice {self.tpu_version} {self.tpu_topology}: {error}") from error
        if hosts != self.processes:
            raise UserError(
                f"{self.tpu_slices} slice(s) {self.tpu_version} {self.tpu_topology} have {hosts} hosts, and every host runs "
                f"one process: set processes to {hosts}, not {self.processes}"
            )

    @property
    def resources(self) -> dict[str, float]:
        """What one process asks of its node, in Ray's names."""
        asked = {"CPU": max(self.num_cpus, LEAST_CPUS)}
        if self.num_gpus > 0:
            asked["GPU"] = self.num_gpus
        if self.tpu_topology is not None:
            asked["TPU"] = self._slice_hosts()[1]
        elif self.accelerator == "tpu":
            asked["TPU"] = self.devices_per_process
        return asked

    @property
    def strategy(self) -> str:
        """Ray's placement strategy."""
        return "STRICT_SPREAD" if self.spread == "one_per_node" else "PACK"

    @property
    def asks(self) -> str:
        """The request in words, for errors."""
        each = ", ".join(f"{amount:g} {what}" for what, amount in self.resources.items())
        where = " on nodes of their own" if self.spread == "one_per_node" else ""
        slices = f" as {self.tpu_slices} slice(s) {self.tpu_version} {self.tpu_topology}" if self.tpu_topology else ""
        return f"{self.processes} process(es) with {each} each{where}{slices}"


def environment(spec: GroupSpec, present: Mapping[str, str] = os.environ) -> dict[str, str]:
    """Environment of a member: its platform; on CPU its count of virtual devices beside the flags already present, and an
    allocator that keeps a step's memory for the next one, unless the user has set the allocator himself."""
    variables = {"JAX_PLATFORMS": PLATFORMS[spec.accelerator]}
    if spec.accelerator == "cpu":
        kept = [flag for flag in present.get("XLA_FLAGS", "").split() if not flag.startswith(DEVICE_COUNT_FLAG)]
        variables["XLA_FLAGS"] = " ".join([*kept, f"{DEVICE_COUNT_FLAG}={spec.devices_per_process}"])
        if present.get("GLIBC_TUNABLES", ACTOR_TUNABLES) == ACTOR_TUNABLES:
            variables["GLIBC_TUNABLES"] = LEARNER_TUNABLES
    return variables


def actor_options(spec: GroupSpec, group: Any, rank: int) -> dict[str, Any]:
    """Ray options that put member `rank` into its bundle of the placement group."""
    from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

    asked = dict(spec.resources)
    options: dict[str, Any] = {"num_cpus": asked.pop("CPU"), "num_gpus": asked.pop("GPU", 0)}
    if asked:
        options["resources"] = asked
    return options | {
        "runtime_env": {"env_vars": environment(spec)},
        "scheduling_strategy": PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=rank),
    }


@dataclass(frozen=True)
class Reservation:
    """A placement group with one bundle per process, in the order of the ranks, and how to give it back."""

    group: Any
    remove: Callable[[], None]


def reserve(spec: GroupSpec, name: str) -> Reservation:
    """Ask Ray for the group's place. Returns at once, except on TPU, where a slice's head is waited for.

    Raises UserError naming what was asked for when no slice is free within the start deadline.
    """
    from ray.util.placement_group import placement_group, remove_placement_group

    if spec.tpu_topology is not None:
        return _reserve_slices(spec, name)
    group = placement_group([dict(spec.resources) for _ in range(spec.processes)], strategy=spec.strategy, name=name)
    return Reservation(group, lambda: remove_placement_group(group))


def _reserve_slices(spec: GroupSpec, name: str) -> Reservation:
    from ray.util.tpu import slice_placement_group

    try:
        slices = slice_placement_group(
            spec.tpu_topology,
            spec.tpu_version,
            resources_per_bundle=dict(spec.resources),
            num_slices=spec.tpu_slices,
            strategy="SPREAD",
            name=name,
            head_reservation_timeout_s=spec.start_deadline_s,
        )
    except TimeoutError as error:
        raise UserError(f"{name}: {spec.asks}: no such slice was free within {spec.start_deadline_s:.0f} s") from error
    return Reservation(slices.placement_group, slices.shutdown)


def slice_environment(spec: GroupSpec, coordinator: str, rank: int) -> dict[str, str]:
    """What libtpu of member `rank` must know where the group spans several slices; {} otherwise."""
    if spec.tpu_topology is None or spec.tpu_slices == 1:
        return {}
    from ray.util.tpu import get_tpu_coordinator_env_vars

    hosts_per_slice = spec.processes // spec.tpu_slices
    address = coordinator.rsplit(":", 1)[0]
    return get_tpu_coordinator_env_vars(address, spec.tpu_slices, rank // hosts_per_slice)
