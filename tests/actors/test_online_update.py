"""The learner's online update beyond MDLOO's arithmetic: algorithms, staleness, early stop, what survives a restart."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from actors.artifacts import save_artifact
from actors.jobs import OnlineSettings, TrainingJob
from actors.learner import Learner
from afm_rl.config import ModelConfig
from afm_rl.parameters import ParamSpec, param_specs
from afm_rl.recipe import OptimizerSpec
from afm_rl.types import Group, PolicyUpdate, ScoredGroup

CONFIG = ModelConfig(13, 8, 16, 1, 2, 1, 4)
SETTINGS = OnlineSettings(inner_steps=1, temperature=0.8, microbatch=64)


def policy(folder: Path, seed: int) -> str:
    """A policy folder of random weights."""
    rng = np.random.default_rng(seed)

    def draw(spec: ParamSpec) -> np.ndarray:
        return (np.ones(spec.shape) if spec.std is None else spec.std * rng.normal(size=spec.shape)).astype(np.float32)

    save_artifact(folder, jax.tree.map(draw, param_specs(CONFIG), is_leaf=lambda x: isinstance(x, ParamSpec)), CONFIG)
    return str(folder)


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The policy that every update here begins with."""
    return policy(tmp_path_factory.mktemp("policy") / "start", 0)


def job(folder: Path, start: str, reference: str | None = None) -> TrainingJob:
    checkpoints, frozen = str(folder / "checkpoints"), {"reference": reference or start}
    return TrainingJob(
        "rl", "online", OptimizerSpec("adamw", 0.003), checkpoints, init=start, frozen=frozen, checkpoint_every=1
    )


def groups(*, version: int = 0, sampler_seed: int = 0, changed: bool = False, prompt: int = 40) -> list[ScoredGroup]:
    """Three prompts with three responses each, whose rewards differ; every fourth token is the environment's.

    `changed` has other log-probabilities for the environment's tokens.
    """
    rng, sampler, found = np.random.default_rng(1), np.random.default_rng(sampler_seed), []
    for p in range(3):
        responses = tuple(rng.integers(1, 13, n).astype(np.int32) for n in (5, 8, 6))
        actions = tuple(np.arange(len(r)) % 4 != 3 for r in responses)
        logps = [sampler.normal(-2, 0.3, len(r)).astype(np.float32) for r in responses]
        if changed:
            logps = [np.where(action, logp, -7).astype(np.float32) for action, logp in zip(actions, logps, strict=True)]
        group = Group(
            f"p{p}", rng.integers(1, 13, prompt).astype(np.int32), responses, tuple(logps), (True,) * 3, "rl", version
        )
        group = dataclasses.replace(group, actions=actions)
        found.append(ScoredGroup(group, rng.permutation(np.float32([0.0, 1.0, 3.0])), np.ones(3, bool)))
    return found


def updated(
    folder: Path, start: str, settings: OnlineSettings, of: list[ScoredGroup], reference: str | None = None
) -> tuple[PolicyUpdate, str]:
    """One update from `start`: its report, and the digest of what came out."""
    learner = Learner()
    learner.begin(job(folder, start, reference))
    return learner.update_policy(0, of, settings), learner.publish("rl", 1).digest


@pytest.mark.parametrize(
    "algorithm",
    ["mdloo", *(pytest.param(name, marks=pytest.mark.slow) for name in ("ppo", "rloo", "grpo", "reinforce", "online_dpo"))],
)
def test_every_algorithm_learns_from_rewards(algorithm: str, tmp_path: Path, start: str) -> None:
    """Guards the way of each through the learner, and its sign: good responses become likelier than bad ones."""
    learner, of = Learner(), groups()
    learner.begin(job(tmp_path, start))
    beta = 0.1 if algorithm in ("online_dpo", "grpo") else 0.0
    settings = dataclasses.replace(SETTINGS, algorithm=algorithm, beta=beta)
    before, after = (learner.update_policy(i, of, settings) for i in range(2))
    assert before.metrics["sequences"] == {"online_dpo": 6}.get(algorithm, 9)
    assert before.metrics["inner_steps_done"] == 1
    assert np.isfinite(list(before.metrics.values())).all()
    assert before.metrics["kl_to_behavior"] == 0.0  # at theta_k to the last bit: its own pass gave log pi_k
    for scored, one, two in zip(of, before.groups, after.groups, strict=True):
        best, worst = scored.reward_G.argmax(), scored.reward_G.argmin()
        assert one.advantage_G[best] > one.advantage_G[worst]
        assert (two.logp_G - one.logp_G)[best] > (two.logp_G - one.logp_G)[worst]


@pytest.mark.slow
def test_the_sampler_matters_only_where_it_was_older(tmp_path: Path, start: str) -> None:
    """Guards a weight of exactly 1 for fresh responses, bit for bit, and tokens of the environment in the stale ones."""
    runs = {
        name: updated(tmp_path / name, start, SETTINGS, of)[1]
        for name, of in {
            "fresh": groups(),
            "fresh, other sampler": groups(sampler_seed=1),
            "stale": groups(version=-1),
            "stale, other environment": groups(version=-1, changed=True),
        }.items()
    }
    assert runs["fresh"] == runs["fresh, other sampler"]
    assert runs["fresh"] != runs["stale"] == runs["stale, other environment"]


@pytest.mark.slow
def test_inner_steps_end_early(tmp_path: Path, start: str) -> None:
    """Guards `max_kl`: a pass that measures more makes no update; below it all steps are made."""
    settings = dataclasses.replace(SETTINGS, inner_steps=3, microbatch=4)
    one, first = updated(tmp_path / "one", start, dataclasses.replace(settings, inner_steps=1), groups())
    update, stopped = updated(tmp_path / "stopped", start, dataclasses.replace(settings, max_kl=1e-6), groups())
    assert update.metrics["inner_steps_done"] == 1
    assert update.metrics["kl_to_behavior"] > 1e-6
    assert update.metrics["grad_norm"] == one.metrics["grad_norm"]
    assert stopped == first
    update, digest = updated(tmp_path / "all", start, dataclasses.replace(settings, max_kl=100.0), groups())
    assert update.metrics["inner_steps_done"] == 3
    assert digest == updated(tmp_path / "free", start, settings, groups())[1]


@pytest.mark.slow
def test_the_full_form_starts_like_the_sampled_one(tmp_path: Path, start: str) -> None:
    """Guards the copy of theta_k, which is no reference: equal first steps, whose KL has no gradient, another second one."""
    settings = dataclasses.replace(SETTINGS, gamma=2.0)
    metrics, digests = {}, {}
    for kl in ("sampled", "full"):
        for inner_steps in (1, 2):
            chosen = dataclasses.replace(settings, kl=kl, inner_steps=inner_steps)
            update, digests[kl, inner_steps] = updated(tmp_path / f"{kl}{inner_steps}", start, chosen, groups())
            metrics[kl, inner_steps] = update.metrics
    assert digests["full", 1] == digests["sampled", 1]
    assert digests["full", 2] != digests["sampled", 2]
    assert metrics["full", 2]["kl_to_behavior"] == pytest.approx(metrics["sampled", 2]["kl_to_behavior"], rel=1e-4)
    assert metrics["full", 2]["grad_norm"] != pytest.approx(metrics["sampled", 2]["grad_norm"], rel=1e-4)
    other = policy(tmp_path / "other", 1)
    settings = dataclasses.replace(settings, kl="full", inner_steps=2)
    assert updated(tmp_path / "of other", start, settings, groups(), other)[1] == digests["full", 2]


@pytest.mark.slow
def test_what_an_iteration_leaves_survives_a_restart(tmp_path: Path, start: str) -> None:
    """Guards the running average and what was consumed: both come back with the weights they belong to."""
    settings = dataclasses.replace(SETTINGS, algorithm="reinforce")

    def better(i: int) -> list[ScoredGroup]:
        return [dataclasses.replace(g, reward_G=g.reward_G + np.float32(i)) for g in groups(version=i)]

    def consumed(i: int) -> dict[str, Any]:
        return {"groups": [f"{i}/{p}" for p in range(3)]}

    whole = Learner()
    assert whole.begin(job(tmp_path / "whole", start)) == 0
    assert whole.resumed_from() == {}
    expected = [whole.update_policy(i, better(i), settings, consumed(i)) for i in range(3)]
    first = Learner()
    first.begin(job(tmp_path / "killed", start))
    for i in range(2):
        first.update_policy(i, better(i), settings, consumed(i))
    first.wait_for_checkpoints()
    second = Learner()
    assert second.begin(job(tmp_path / "killed", start)) == 2
    assert second.resumed_from()["consumed"] == consumed(1)
    again = second.update_policy(2, better(2), settings)
    assert again.metrics == expected[2].metrics
    np.testing.assert_array_equal(again.groups[0].advantage_G, expected[2].groups[0].advantage_G)
    assert second.publish("rl", 3).digest == whole.publish("rl", 3).digest
    average = 0.9 * 4 / 3 + 0.1 * 7 / 3  # of iterations 0 and 1
    np.testing.assert_allclose(again.groups[0].advantage_G, better(2)[0].reward_G - average, rtol=1e-6)
    for learner in (second, whole):
        learner.wait_for_checkpoints()
