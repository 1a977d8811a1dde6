"""Pre-training's group: Ray Train's JaxTrainer with a real mesh on CPU, and workers that are killed or freeze."""

from __future__ import annotations

import json
import logging
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from actors.group import GroupSpec

SPEC = GroupSpec(processes=2, devices_per_process=2, num_cpus=0.1, heartbeat_s=4.0, max_restarts=2, start_deadline_s=60)
STEPS = 12


def work(config: dict[str, Any]) -> None:
    """Add up 1 on every device in every step. `losses`: a step, after which a rank sends itself a signal, once."""
    import jax
    import jax.numpy as jnp
    import ray.train
    from jax.experimental import multihost_utils
    from jax.sharding import NamedSharding, PartitionSpec

    folder, rank = Path(config["folder"]), jax.process_index()
    mesh = jax.make_mesh((jax.device_count(),), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    ones = jax.device_put(jnp.ones(jax.device_count()), NamedSharding(mesh, PartitionSpec("data")))
    add = jax.jit(lambda total, ones_D: total + ones_D.sum())
    saved = max((int(p.stem) for p in folder.glob("*.step")), default=0)
    total = float((folder / f"{saved:03d}.step").read_text()) if saved else 0.0
    with (folder / f"rank-{rank}.lives").open("a") as lives:
        lives.write(json.dumps({"at": time.time(), "resumed": saved, "devices": jax.device_count()}) + "\n")
    for step in range(saved, STEPS):
        total = float(add(total, ones))
        if rank == 0 and step % 3 == 2:
            (folder / f"{step + 1:03d}.step").write_text(str(total))
        lost_rank, number = config["losses"].get(step, (-1, 0))
        if rank == lost_rank and not (folder / f"{step}.lost").exists():
            (folder / f"{step}.lost").write_text(str(time.time()))
            os.kill(os.getpid(), number)
        multihost_utils.sync_global_devices(f"step {step}")
    (folder / f"rank-{rank}.total").write_text(str(total))
    ray.train.report({"total": total})


@pytest.fixture(scope="module")
def ray() -> Iterator[None]:
    import ray

    ray.init(address="local", include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR, num_cpus=2)
    yield
    ray.shutdown()


@pytest.mark.slow
def test_lost_workers_are_replaced_and_the_run_completes(ray: None, tmp_path: Path) -> None:  # noqa: ARG001
    """Guards pre-training: one mesh of four devices; rank 0 is killed, then rank 1 freezes; no step is lost."""
    from actors.jax_train import fit

    losses = {4: (0, int(signal.SIGKILL)), 7: (1, int(signal.SIGSTOP))}
    fit(work, {"folder": str(tmp_path), "losses": losses}, spec=SPEC, name="run", storage_path=str(tmp_path / "ray_train"))
    lives = [[json.loads(line) for line in (tmp_path / f"rank-{r}.lives").read_text().splitlines()] for r in range(2)]
    assert [[life["resumed"] for life in of_rank] for of_rank in lives] == [[0, 3, 6]] * 2
    assert {life["devices"] for of_rank in lives for life in of_rank} == {4}
    assert [(tmp_path / f"rank-{r}.total").read_text() for r in range(2)] == [str(STEPS * 4.0)] * 2
    for life, (step, (rank, number)) in enumerate(losses.items(), start=1):
        took_s = max(of_rank[life]["at"] for of_rank in lives) - float((tmp_path / f"{step}.lost").read_text())
        print(f"\n{signal.Signals(number).name} of worker {rank}: a working group after {took_s:.1f} s")
        assert took_s < SPEC.heartbeat_s + 60  # twice what it may take: machines that test are busy


def test_the_health_checks_fit_into_the_heartbeat() -> None:
    """Guards the notice: two intervals and the limit of a hanging check stay within the heartbeat; the names are Ray's."""
    from ray.train.v2._internal import constants

    from actors.jax_train import health_checks

    settings = health_checks(SPEC)
    interval_s = float(settings[constants.HEALTH_CHECK_INTERVAL_S_ENV_VAR])
    limit_s = float(settings[constants.WORKER_HEALTH_CHECK_TIMEOUT_S_ENV_VAR])
    assert interval_s * 3 + limit_s <= SPEC.heartbeat_s
    assert settings.keys() <= constants.ENV_VARS_TO_PROPAGATE
