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
    """Add up 1 on every device in every step; in its first life, worker `rank` sends itself a signal after step 7."""
    import jax
    import jax.numpy as jnp
    import ray.train
    from jax.experimental import multihost_utils
    from jax.sharding import NamedSharding, PartitionSpec

    began_s, folder, rank = time.time(), Path(config["folder"]), jax.process_index()
    mesh = jax.make_mesh((jax.device_count(),), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    ones = jax.device_put(jnp.ones(jax.device_count()), NamedSharding(mesh, PartitionSpec("data")))
    add = jax.jit(lambda total, ones_D: total + ones_D.sum())
    saved = max((int(p.stem) for p in folder.glob("*.step")), default=0)
    total = float((folder / f"{saved:03d}.step").read_text()) if saved else 0.0
    for step in range(saved, STEPS):
        total = float(add(total, ones))
        if rank == 0 and step % 3 == 2:
            (folder / f"{step + 1:03d}.step").write_text(str(total))
        marker = folder / "signalled"
        if rank == config["rank"] and step == 7 and not marker.exists():
            marker.write_text(str(time.time()))
            os.kill(os.getpid(), config["signal"])
        multihost_utils.sync_global_devices(f"step {step}")
    lived = {"total": total, "resumed": saved, "began": began_s, "at": time.time(), "devices": jax.device_count()}
    (folder / f"rank-{rank}.json").write_text(json.dumps(lived))
    ray.train.report({"total": total})


@pytest.fixture(scope="module")
def ray() -> Iterator[None]:
    import ray

    ray.init(address="local", include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR, num_cpus=2)
    yield
    ray.shutdown()


@pytest.mark.slow
@pytest.mark.parametrize(("number", "rank"), [(signal.SIGKILL, 0), (signal.SIGSTOP, 1)])
def test_a_worker_is_lost_once(ray: None, tmp_path: Path, number: signal.Signals, rank: int) -> None:  # noqa: ARG001
    """Guards pre-training: one mesh of four devices; the run ends with the total of an uninterrupted one."""
    from actors.jax_train import fit

    config = {"folder": str(tmp_path), "signal": int(number), "rank": rank}
    fit(work, config, spec=SPEC, name="run", storage_path=str(tmp_path / "ray_train"))
    ends = [json.loads((tmp_path / f"rank-{rank}.json").read_text()) for rank in range(2)]
    assert [(end["total"], end["resumed"], end["devices"]) for end in ends] == [(STEPS * 4.0, 6, 4)] * 2
    took_s, all_s = (max(end[of] for end in ends) - float((tmp_path / "signalled").read_text()) for of in ("began", "at"))
    print(f"\n{number.name} of worker {rank}: a working group after {took_s:.1f} s, the run complete after {all_s:.1f} s")
    assert took_s < SPEC.heartbeat_s + 30


def test_the_health_checks_fit_into_the_heartbeat() -> None:
    """Guards the notice: two intervals and the limit of a hanging check stay within the heartbeat; the names are Ray's."""
    from ray.train.v2._internal import constants

    from actors.jax_train import health_checks

    settings = health_checks(SPEC)
    interval_s = float(settings[constants.HEALTH_CHECK_INTERVAL_S_ENV_VAR])
    limit_s = float(settings[constants.WORKER_HEALTH_CHECK_TIMEOUT_S_ENV_VAR])
    assert interval_s * 3 + limit_s <= SPEC.heartbeat_s
    assert settings.keys() <= constants.ENV_VARS_TO_PROPAGATE
