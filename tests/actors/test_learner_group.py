"""The real learner as a group: two processes with two devices each compute what one device does, and survive a loss."""

from __future__ import annotations

import logging
import math
import os
import signal
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from actors.artifacts import load_artifact, save_artifact
from actors.group import GroupHandle, GroupRestartedError, GroupSpec, start_group
from actors.host import call
from actors.jobs import LearnerSetup, OnlineSettings, TrainingJob
from actors.learner import Learner
from afm_rl.config import ModelConfig
from afm_rl.packing import Batch, Example, PackedRows, pack
from afm_rl.parameters import init_params
from afm_rl.recipe import OptimizerSpec
from afm_rl.sharding import MeshShape
from afm_rl.types import Group, ScoredGroup
from afm_rl.weights import leaves
from tests import processes

pytestmark = pytest.mark.slow

CONFIG = ModelConfig(32, 16, 32, 2, 4, 2, 4)
SETUP = LearnerSetup(mesh=MeshShape(fsdp=2, tensor=2), microbatch_tokens=32)
SPEC = GroupSpec(processes=2, devices_per_process=2, num_cpus=0.1, heartbeat_s=5, start_deadline_s=120)
STEPS = 6


@pytest.fixture(scope="module")
def group() -> Iterator[GroupHandle]:
    import ray

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")  # for the group: its programs are compiled after every loss
        ray.init(address="local", include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR, num_cpus=2)
    handle = start_group("learner", Learner, {"setup": SETUP}, SPEC)
    handle.ping().result(math.inf)
    yield handle
    handle.close()
    ray.shutdown()


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A policy folder to start from."""
    folder = tmp_path_factory.mktemp("policies") / "start"
    params = jax.tree.map(np.asarray, init_params(CONFIG, jax.random.key(0)))
    save_artifact(folder, params, CONFIG)
    return str(folder)


def job(folder: Path, start: str, objective: str = "supervised", **options: Any) -> TrainingJob:
    optimizer = OptimizerSpec("adamw", 0.01)
    checkpoints = str(folder / "checkpoints")
    return TrainingJob(
        objective,
        objective,
        optimizer,
        checkpoints,
        init=start,
        frozen={"reference": start},
        options=options,
        checkpoint_every=2,
    )


def packed() -> PackedRows:
    rng = np.random.default_rng(0)
    return pack((Example(rng.integers(1, 32, n)) for n in rng.integers(3, 12, 90)), length=16, pad_id=0)


def batch(step: int) -> Batch:
    rows = packed()
    return rows.take((np.arange(4) + 4 * step) % len(rows))


def scored_groups() -> list[ScoredGroup]:
    """Four prompts with two responses each."""
    rng = np.random.default_rng(1)
    found = []
    for p in range(4):
        responses = tuple(rng.integers(1, 32, size=n).astype(np.int32) for n in (3, 5))
        logps = tuple(np.zeros(len(r), np.float32) for r in responses)
        prompt = np.array([5, 1 + p], np.int32)
        of_prompt = Group(f"p{p}", prompt, responses, logps, (True,) * 2, "mdloo", 0)
        found.append(ScoredGroup(of_prompt, rng.normal(size=2).astype(np.float32), np.ones(2, bool)))
    return found


def test_two_processes_train_what_one_device_does(group: GroupHandle, start: str, tmp_path: Path) -> None:
    """Guards the whole face of the learner over processes: steps, log-probabilities, held-out loss, weights, folders."""
    alone = Learner()
    expected = job(tmp_path / "one", start, z_loss=1e-3)
    alone.begin(expected)
    measured = alone.train([batch(step) for step in range(STEPS)])
    assert call(group, "begin", job(tmp_path / "two", start, z_loss=1e-3)) == 0
    found = call(group, "train", [batch(step) for step in range(STEPS)])
    for one, two in zip(measured, found, strict=True):
        assert two["loss"] == pytest.approx(one["loss"], rel=1e-5)
        assert two["tokens"] == one["tokens"]
    for which in ("current", "reference"):
        np.testing.assert_allclose(call(group, "log_probs", batch(9), which), alone.log_probs(batch(9), which), atol=1e-4)
    rows = {"web": packed()}
    assert call(group, "held_out", rows)["web"].loss == pytest.approx(alone.held_out(rows)["web"].loss, rel=1e-5)
    fisher = call(group, "fisher", [batch(0)])
    for name, value in alone.fisher([batch(0)]).items():
        np.testing.assert_allclose(fisher[name], value, rtol=1e-2, atol=1e-6)
    alone.export(str(tmp_path / "one" / "policy"))
    call(group, "export", str(tmp_path / "two" / "policy"))
    one, two = (dict(leaves(load_artifact(tmp_path / name / "policy").params)) for name in ("one", "two"))
    for name in one:
        np.testing.assert_allclose(two[name], one[name], atol=1e-4, err_msg=name)
    weights = call(group, "publish", "p", 3)
    assert weights.digest != alone.publish("p", 3).digest  # other orders of summation
    assert {row[0] for row in weights.layout} == set(one)


def test_an_mdloo_update_over_processes(group: GroupHandle, start: str, tmp_path: Path) -> None:
    """Guards the three log-probabilities and the ratio's metrics, which are gathered from every process."""
    settings = OnlineSettings(beta=0.1, gamma=0.5, inner_steps=2, temperature=0.9, microbatch=4)
    alone = Learner()
    alone.begin(job(tmp_path / "one", start, "online"))
    expected = alone.update_policy(0, scored_groups(), settings).metrics
    call(group, "begin", job(tmp_path / "two", start, "online"))
    found = call(group, "update_policy", 0, scored_groups(), settings).metrics
    assert set(found) == set(expected)
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, rel=1e-3, abs=1e-4), name


@pytest.mark.parametrize(("number", "rank"), [(signal.SIGKILL, 1), (signal.SIGSTOP, 0)])
def test_a_lost_process_changes_no_weight(
    group: GroupHandle, start: str, tmp_path: Path, number: signal.Signals, rank: int
) -> None:
    """Guards exactness through a loss: the exported bytes are those of the run that lost nobody."""

    def run(folder: Path) -> bytes:
        while True:
            try:
                for step in range(call(group, "begin", job(folder, start, dropout=0.1)), STEPS):
                    call(group, "train", [batch(step)])
                    time.sleep(0.2)
                call(group, "export", str(folder / "policy"))
                return (folder / "policy" / "model.safetensors").read_bytes()
            except GroupRestartedError:
                group.progressed()

    expected, restarts = run(tmp_path / "whole"), group.restarts
    victim = group.processes()[rank].pid
    threading.Thread(target=_signal_after_checkpoint, args=(tmp_path / "lost" / "checkpoints", victim, number)).start()
    assert run(tmp_path / "lost") == expected
    assert group.restarts == restarts + 1


def test_a_process_lost_while_idle_is_replaced(group: GroupHandle) -> None:
    """Guards the report between stages: asking a group for its figures builds it anew when a member has died unnoticed."""
    restarts, [first, _] = group.restarts, group.processes()
    os.kill(first.pid, signal.SIGKILL)
    assert [stats.name for stats in group.member_stats()] == ["learner-0", "learner-1"]
    assert group.restarts == restarts + 1


def test_a_suspended_group_has_no_processes(group: GroupHandle, start: str, tmp_path: Path) -> None:
    """Guards the learner's place while Ray Train has it: given up for the block, taken again afterwards."""
    before, restarts = group.processes(), group.restarts
    with group.suspended():
        assert not any(_is_member(process.pid) for process in before)
    assert [stats.calls for stats in group.member_stats()] == [0, 0]  # waits until the roles are there
    assert call(group, "begin", job(tmp_path, start)) == 0
    assert group.restarts == restarts


def test_it_resumes_on_another_mesh(group: GroupHandle, start: str, tmp_path: Path) -> None:
    """Guards restore onto another process count: four devices save, one goes on, and computes the same next loss."""
    task = job(tmp_path, start)
    call(group, "begin", task)
    call(group, "train", [batch(step) for step in range(4)])
    call(group, "wait_for_checkpoints")
    expected = call(group, "train", [batch(4)])
    alone = Learner()
    assert alone.begin(replace(task)) == 4
    assert alone.train([batch(4)])[0]["loss"] == pytest.approx(expected[0]["loss"], rel=1e-5)


def _is_member(pid: int) -> bool:
    return "ray::Learner" in (processes.read(pid, "cmdline") or "")


def _signal_after_checkpoint(folder: Path, pid: int, number: signal.Signals) -> None:
    end_s = time.monotonic() + 120
    while time.monotonic() < end_s and not any(folder.glob("step-*")):
        time.sleep(0.02)
    os.kill(pid, number)
