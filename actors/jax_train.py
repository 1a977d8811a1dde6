"""Ray Train's JaxTrainer with a real mesh: the same group, formed and watched, for a run that Ray Train owns (pre-training).

Ray 2.60's `JaxConfig` forms no mesh on CPU, and says nothing; it names the same GPU to every worker of a node. This one
joins on both with our heartbeat, and leaves TPU slices to Ray's own. A worker that freezes is noticed through Ray Train's
health check within `heartbeat_s` and ended at once; the whole worker group restarts, and the run resumes from its own
checkpoints.

Private to Ray 2.60 (the pin in pyproject.toml): `ray.train.v2.jax.config._JaxBackend` and the `worker_group` passed to a
backend's hooks. Not run: GPU and TPU.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.train import Result
from ray.train.v2.api.config import FailureConfig, RunConfig, ScalingConfig
from ray.train.v2.jax import JaxConfig, JaxTrainer
from ray.train.v2.jax.config import _JaxBackend

from actors.group_member import GroupMember, Process, identity
from actors.group_placement import GroupSpec, environment
from actors.group_ray import end_processes

#: Health checks of Ray Train within one heartbeat.
CHECKS = 5
#: Seconds a healthy worker may take to show that it is alive when the group ends.
ANSWER_S = 1.0
#: The member of this worker's process, between picking the mesh's address and joining.
_member: list[GroupMember] = []


@dataclass
class GroupJaxConfig(JaxConfig):
    """How Ray Train's workers form their mesh."""

    spec: GroupSpec = field(default_factory=GroupSpec)

    @property
    def backend_cls(self) -> type:
        return GroupBackend


class GroupBackend(_JaxBackend):
    """Joins the workers of a Ray Train run into one mesh, and leaves no frozen one behind. Lives in the run's controller."""

    def __init__(self) -> None:
        self._processes: list[Process] = []

    def on_start(self, worker_group: Any, backend_config: Any) -> None:
        """Runs before the training function. Raises when the mesh is not there within the start deadline."""
        if backend_config.use_tpu:
            super().on_start(worker_group, backend_config)
            return
        spec, ranks = backend_config.spec, range(len(worker_group))
        self._processes = ray.get(worker_group.execute_async(identity), timeout=spec.start_deadline_s)
        coordinator = worker_group.execute_single(0, _coordinator, spec) if len(ranks) > 1 else None
        joins = [worker_group.execute_single_async(rank, _join, coordinator, rank, spec) for rank in ranks]
        ray.get(joins, timeout=spec.start_deadline_s)

    def on_shutdown(self, worker_group: Any, backend_config: Any) -> None:
        """End the workers that do not answer. The mesh ends with its processes: nobody waits for anybody to leave it."""
        if backend_config.use_tpu:
            super().on_shutdown(worker_group, backend_config)
            return
        answers = worker_group.execute_async(identity)
        answered = ray.wait(answers, num_returns=len(answers), timeout=ANSWER_S)[0]
        silent = zip(self._processes, answers, strict=False)
        end_processes([process for process, answer in silent if answer not in answered])


def _coordinator(spec: GroupSpec) -> str:
    _member[:] = [GroupMember("worker-0", 0, spec)]
    return _member[0].coordinator()


def _join(coordinator: str | None, rank: int, spec: GroupSpec) -> None:
    member = _member.pop() if _member else GroupMember(f"worker-{rank}", rank, spec)
    member.join(coordinator)


def fit(
    worker: Callable[[dict[str, Any]], None], config: dict[str, Any], *, spec: GroupSpec, name: str, storage_path: str
) -> Result:
    """Run `worker(config)` on every process of the group under Ray Train, restarted as a whole `spec.max_restarts` times.

    `worker` must resume from its own checkpoints. Raises Ray Train's TrainingFailedError when the restarts are used up.
    """
    trainer = JaxTrainer(
        worker,
        train_loop_config=config,
        jax_config=GroupJaxConfig(use_tpu=spec.accelerator == "tpu", use_gpu=spec.accelerator == "gpu", spec=spec),
        scaling_config=scaling(spec),
        run_config=RunConfig(
            name=name,
            storage_path=storage_path,
            failure_config=FailureConfig(max_failures=spec.max_restarts, controller_failure_limit=0),
            worker_runtime_env={"env_vars": environment(spec)},
        ),
    )
    with _environment(health_checks(spec)):
        try:
            return trainer.fit()
        except SystemExit as end:  # Ray Train's own answer to Ctrl-C
            raise KeyboardInterrupt from end


def scaling(spec: GroupSpec) -> ScalingConfig:
    """The group in Ray Train's words."""
    return ScalingConfig(
        num_workers=spec.processes,
        use_gpu=spec.accelerator == "gpu",
        use_tpu=spec.accelerator == "tpu",
        topology=spec.tpu_topology,
        accelerator_type=f"TPU-{spec.tpu_version.upper()}" if spec.tpu_version else None,
        resources_per_worker=dict(spec.resources),
        placement_strategy="SPREAD" if spec.tpu_topology else spec.strategy,
    )


def health_checks(spec: GroupSpec) -> dict[str, str]:
    """Ray Train's settings that notice a frozen worker within the heartbeat.

    Its controller starts a check every interval and looks at a hanging one as often. They are read from its environment,
    which Ray Train copies from the driver's.
    """
    interval_s = spec.heartbeat_s / CHECKS
    return {
        "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": f"{interval_s:g}",
        "RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S": f"{spec.heartbeat_s - 3 * interval_s:g}",
        "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": f"{spec.start_deadline_s:g}",
    }


@contextlib.contextmanager
def _environment(variables: dict[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
