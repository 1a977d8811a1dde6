"""One process of a learner group: joins the mesh, then owns the role, and answers heartbeats from a thread of its own.

The order is fixed: `coordinator` (rank 0 picks the address), `join` (`jax.distributed.initialize`, before anything touches a
device), `construct` (the role). The role lives in the thread that runs its calls, because JAX keeps its current mesh per
thread. `beat`, `identity`, `stats` and `pulse` run in the concurrency group "heartbeat", so a member that computes or
compiles for minutes still answers, and one that was stopped does not.
"""

from __future__ import annotations

import contextlib
import math
import os
import signal
import socket
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from actors.group_placement import GroupSpec, slice_environment
from actors.host import ActorStats, Host
from actors.signs import Signs

#: The concurrency group, of one thread, that answers while the role works.
HEARTBEAT_GROUP = "heartbeat"
#: JAX's own heartbeat is this many of ours: the driver then names the frozen member before the healthy ones abort.
JAX_HEARTBEATS = 2
#: Seconds to wait for a killed process to be gone; the kernel needs milliseconds.
KILL_WAIT_S = 5.0


@dataclass(frozen=True)
class Process:
    """A process of the cluster. `started` is its birth in clock ticks since boot: a later process may get the same pid."""

    node_id: str
    pid: int
    started: int


class GroupMember:
    """One member. Under Ray this class is what becomes the actor."""

    def __init__(self, name: str, rank: int, spec: GroupSpec) -> None:
        self._name, self._rank, self._spec = name, rank, spec
        self._reserved: socket.socket | None = None
        self._host: Host | None = None

    def coordinator(self) -> str:
        """HOST:PORT for the mesh's coordinator on this node; the port stays reserved until `join` takes it."""
        import ray

        address = ray.util.get_node_ip_address()
        self._reserved = socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET)
        self._reserved.bind((address, 0))
        return f"{address}:{self._reserved.getsockname()[1]}"

    def join(self, coordinator: str | None) -> None:
        """Become part of the mesh (nothing to do in a group of one), and check that every device is there."""
        import jax

        if coordinator is not None:
            os.environ.update(slice_environment(self._spec, coordinator, self._rank))
            if self._reserved is not None:
                self._reserved.close()
            join_mesh(
                coordinator,
                rank=self._rank,
                processes=self._spec.processes,
                heartbeat_s=self._spec.heartbeat_s,
                deadline_s=self._spec.start_deadline_s,
            )
        expected = self._spec.processes * self._spec.devices_per_process
        if self._spec.accelerator == "cpu" and jax.device_count() != expected:
            raise RuntimeError(
                f"{self._name} sees {jax.device_count()} devices, not {self._spec.processes} processes x "
                f"{self._spec.devices_per_process}: something in this process used JAX before it joined the group"
            )

    def construct(self, role: type, kwargs: dict[str, Any], joined: None) -> None:  # noqa: ARG002 (Ray waits for `joined`)
        """Construct the role."""
        self._host = Host(self._name, role, kwargs)

    def run(self, method: str, kwargs: dict[str, Any], *args: Any) -> tuple[Any, None] | None:
        """Run one method of the role. Rank 0 gives its value and an empty sign that it has ended, the others only that."""
        value = self._require_host().run(method, kwargs, *args)
        return (value, None) if self._rank == 0 else None

    def beat(self) -> None:
        """A sign of life."""

    def identity(self) -> Process:
        """Where this process runs."""
        return identity()

    def stats(self) -> ActorStats:
        """What the role did since it was constructed."""
        return self._require_host().stats()

    def pulse(self) -> Signs | None:
        """What the role is doing; None while there is none yet."""
        return self._host.pulse() if self._host is not None else None

    def _require_host(self) -> Host:
        if self._host is None:
            raise RuntimeError(f"{self._name} has no role yet: its construction failed or was not waited for")
        return self._host


def identity() -> Process:
    """This process."""
    import ray

    return identity_of(ray.get_runtime_context().get_node_id(), os.getpid())


def identity_of(node_id: str, pid: int) -> Process:
    """A living process of this node. Raises ProcessLookupError when there is none."""
    started = _started(pid)
    if started is None:
        raise ProcessLookupError(f"no process {pid} on this node")
    return Process(node_id, pid, started)


def join_mesh(coordinator: str, *, rank: int, processes: int, heartbeat_s: float, deadline_s: float) -> None:
    """`jax.distributed.initialize` with our deadlines, on the node's own address only, with gloo between CPUs.

    On CPU one program runs at a time: two in flight may meet their collectives in another order in every process, and wait
    for each other for ever.
    """
    import jax

    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.config.update("jax_cpu_enable_async_dispatch", False)
    jax.distributed.initialize(
        coordinator,
        processes,
        rank,
        cluster_detection_method="deactivate",
        initialization_timeout=math.ceil(deadline_s),
        heartbeat_timeout_seconds=math.ceil(JAX_HEARTBEATS * heartbeat_s),
        coordinator_bind_address=coordinator,
    )


def end_process(process: Process) -> bool:
    """SIGKILL a process of this node, stopped or not; whether it is gone. Leaves a later process of the same pid alone."""
    if _started(process.pid) != process.started:
        return True
    with contextlib.suppress(ProcessLookupError):  # it may end between our look and our signal
        os.kill(process.pid, signal.SIGKILL)
    end = time.monotonic() + KILL_WAIT_S
    while _started(process.pid) == process.started:
        if time.monotonic() > end:
            return False
        time.sleep(0.01)
    return True


def _started(pid: int) -> int | None:
    """Birth of a living process in clock ticks since boot (proc(5), field 22); None when there is none, or it has ended."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return None if fields[0] in "ZX" else int(fields[19])
