"""The learner: exact continuation after a kill, order and arithmetic of an MDLOO update, and what each part exports."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from actors.artifacts import load_artifact, save_artifact
from actors.jobs import AdapterSpec, OnlineSettings, TrainingJob
from actors.learner import Learner
from actors.online_batch import responses_batch
from afm_rl.config import ModelConfig
from afm_rl.model import forward, logits
from afm_rl.packing import Batch, Example, pack, pad
from afm_rl.parameters import ParamSpec, param_specs
from afm_rl.recipe import OptimizerSpec
from afm_rl.types import GRADINGS, Group, ScoredGroup
from afm_rl.weights import digest

CONFIG = ModelConfig(13, 8, 16, 1, 2, 1, 4)
ADAMW = OptimizerSpec("adamw", 0.01)
SETTINGS = OnlineSettings(beta=0.1, gamma=0.5, inner_steps=2, temperature=0.8, microbatch=64)


def random_params(seed: int) -> Any:
    rng = np.random.default_rng(seed)

    def draw(spec: ParamSpec) -> np.ndarray:
        values = np.ones(spec.shape) if spec.std is None else spec.std * rng.normal(size=spec.shape)
        return values.astype(np.float32)

    return jax.tree.map(draw, param_specs(CONFIG), is_leaf=lambda x: isinstance(x, ParamSpec))


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Two policies of one shape."""
    root = tmp_path_factory.mktemp("policies")
    for seed, name in enumerate(("start", "reference")):
        save_artifact(root / name, random_params(seed), CONFIG)
    return {name: str(root / name) for name in ("start", "reference")}


def supervised_job(folder: Path, **changes: Any) -> TrainingJob:
    job = TrainingJob(
        "sft", "supervised", ADAMW, str(folder / "checkpoints"), config=CONFIG, options={"dropout": 0.1}, checkpoint_every=2
    )
    return dataclasses.replace(job, **changes)


def text_batch(step: int) -> Batch:
    rng = np.random.default_rng(step)
    return pad([Example(rng.integers(1, 13, size=6).tolist(), first_target=2) for _ in range(2)], pad_id=0, length=8)


def learned(learner: Learner) -> str:
    return learner.publish("p", 0).digest


@pytest.mark.parametrize("killed_at", [pytest.param(4, marks=pytest.mark.slow), 5])
def test_training_continues_exactly(tmp_path: Path, killed_at: int) -> None:
    """Guards 2n = n + kill + restore + n with dropout, bit for bit, and a kill between two checkpoints."""
    whole = Learner()
    assert whole.begin(supervised_job(tmp_path / "whole")) == 0
    expected = whole.train([text_batch(step) for step in range(8)])

    job = supervised_job(tmp_path / "killed")
    first = Learner()
    first.begin(job)
    first.train([text_batch(step) for step in range(killed_at)])
    first.wait_for_checkpoints()
    second = Learner()
    assert second.begin(job) == 4
    for found, whole_step in zip(second.train([text_batch(step) for step in range(4, 8)]), expected[4:], strict=True):
        assert {**found, "tokens_per_s": 0.0} == {**whole_step, "tokens_per_s": 0.0}
    assert learned(second) == learned(whole)
    assert len({metrics["loss"] for metrics in expected}) == 8


def test_a_finished_job_has_nothing_left(tmp_path: Path) -> None:
    """Guards resume after the last step; the same learner goes on to another job from scratch."""
    job = supervised_job(tmp_path)
    learner = Learner()
    learner.begin(job)
    learner.train([text_batch(step) for step in range(4)])
    result = learned(learner)
    learner.wait_for_checkpoints()
    assert Learner().begin(job) == 4
    other = dataclasses.replace(job, task="other", checkpoint_folder=str(tmp_path / "other"))
    assert learner.begin(other) == 0
    assert learned(learner) != result
    assert learner.begin(job) == 4
    assert learned(learner) == result


def test_log_probabilities_and_held_out_loss(tmp_path: Path, folders: dict[str, str]) -> None:
    """Guards the three log-probabilities in NumPy: current and reference, at a temperature, on targets alone."""
    learner = Learner()
    learner.begin(supervised_job(tmp_path, config=None, init=folders["start"], frozen={"reference": folders["reference"]}))
    batch = text_batch(0)
    for which, seed in (("current", 0), ("reference", 1)):
        expected = np_logps(random_params(seed), batch, 0.8)
        np.testing.assert_allclose(learner.log_probs(batch, which, temperature=0.8), expected, atol=1e-5)
    documents = [Example([1, 2, 3]), Example([4, 5])]
    loss = learner.held_out({"web": pack(documents, length=8, pad_id=0)})["web"].loss
    assert loss == pytest.approx(-np_logps(random_params(0), pad(documents, pad_id=0)).sum() / 3, rel=1e-5)


@jax.jit
def full_logits(params: Any, tokens_BT: jax.Array) -> jax.Array:
    return logits(params, forward(params, tokens_BT, config=CONFIG), CONFIG)


def np_logps(params: Any, batch: Batch, temperature: float = 1.0) -> np.ndarray:
    """Float64 log p of every target, 0 elsewhere; always at one padded shape, for one compiled program."""
    tokens_BT, (rows, length) = np.zeros((9, 32), np.int32), batch["tokens_BT"].shape
    tokens_BT[:rows, :length] = batch["tokens_BT"]
    scores = np.asarray(full_logits(params, tokens_BT), np.float64) / temperature
    logp = scores - np.log(np.exp(scores).sum(-1, keepdims=True))
    found = np.zeros((rows, length))
    for b, t in np.argwhere(batch["mask_BT"]):
        found[b, t] = logp[b, t - 1, tokens_BT[b, t]]
    return found


def mdloo_job(folder: Path, folders: dict[str, str]) -> TrainingJob:
    where: dict[str, Any] = {"init": folders["start"], "frozen": {"reference": folders["reference"]}}
    return TrainingJob("mdloo", "online", ADAMW, str(folder / "checkpoints"), checkpoint_every=1, **where)


VALID = np.array([[1, 1, 1], [1, 0, 0], [1, 1, 0]], bool)


def groups(iteration: int, *, invalid_seed: int = 0, valid: np.ndarray = VALID) -> list[ScoredGroup]:
    """Three prompts with three responses each; `invalid_seed` draws what the invalid ones contain."""
    rng, other = np.random.default_rng(iteration), np.random.default_rng(1000 + invalid_seed)
    found = []
    for p in range(3):
        sources = [rng if ok or not valid.any() else other for ok in VALID[p]]
        lengths = [2 + (p + g) % 3 for g in range(3)]
        responses = tuple(s.integers(1, 13, size=n).astype(np.int32) for s, n in zip(sources, lengths, strict=True))
        rewards = np.where(valid[p], rng.normal(size=3), np.nan).astype(np.float32)
        logps = tuple(np.zeros(n, np.float32) for n in lengths)
        prompt = np.array([5, 1 + p], np.int32)
        group = Group(f"p{p}", prompt, responses, logps, (True,) * 3, "mdloo", iteration)
        found.append(ScoredGroup(group, rewards, valid[p]))
    return found


class Spy(Learner):
    """A learner that remembers what it did, in order."""

    def begin(self, job: TrainingJob) -> int:
        self.events: list[str] = []
        self.batches: list[Batch] = []
        step = super().begin(job)
        inner = self._online._step

        def recorded(state: Any, frozen: Any, parts: Sequence[Batch], proceed: Any) -> Any:
            self.events.append("step")
            self.batches += [{name: np.array(value) for name, value in batch.items()} for batch in parts]
            return inner(state, frozen, parts, proceed)

        self._online._step = recorded  # type: ignore[method-assign]
        return step

    def log_probs(self, batch: Batch, which: str = "current", temperature: float = 1.0) -> np.ndarray:
        assert temperature == SETTINGS.temperature
        self.events.append(which)
        return super().log_probs(batch, which, temperature)


@pytest.fixture(scope="module")
def update(tmp_path_factory: pytest.TempPathFactory, folders: dict[str, str]) -> tuple[Spy, dict[str, float]]:
    """One MDLOO update, watched."""
    learner = Spy()
    learner.begin(mdloo_job(tmp_path_factory.mktemp("update"), folders))
    return learner, dict(learner.update_policy(0, groups(0), SETTINGS).metrics)


def test_behavior_log_probabilities_come_before_any_step(update: tuple[Spy, dict[str, float]]) -> None:
    """Guards theta_k: both log-probabilities first, by the learner's own program, then the steps on one frozen batch."""
    learner, metrics = update
    assert learner.events == ["current", "reference", "step", "step"]
    first, second = learner.batches
    assert all(np.array_equal(first[name], second[name]) for name in first)
    own = first["behavior_logp_BT"] * first["mask_BT"]
    np.testing.assert_allclose(own, np_logps(random_params(0), first, 0.8), atol=1e-5)
    assert metrics["kl_to_behavior"] > 1e-4


def test_advantages_hold_the_kl_to_the_reference(update: tuple[Spy, dict[str, float]]) -> None:
    """Guards R = r - beta log(pi_k / pi_ref) inside the leave-one-out baseline, response by response."""
    learner, metrics = update
    scored = groups(0)
    batch, reward_PG, _ = responses_batch(scored)
    own, reference = (np_logps(random_params(seed), batch, 0.8).sum(-1) for seed in (0, 1))
    log_ratio = own - reference
    total = reward_PG - SETTINGS.beta * log_ratio.reshape(3, 3)
    expected = np.zeros((3, 3))
    for p, counted in enumerate(([0, 1, 2], [], [0, 1])):
        for g in counted:
            expected[p, g] = total[p, g] - np.mean([total[p, other] for other in counted if other != g])
    np.testing.assert_allclose(learner.batches[0]["advantage_B"], expected.reshape(-1), atol=1e-4)
    counted_B = np.array([1, 1, 1, 0, 0, 0, 1, 1, 0], bool)
    assert metrics["kl_to_reference"] == pytest.approx(log_ratio[counted_B].mean(), abs=1e-4)
    assert np.abs(SETTINGS.beta * log_ratio).max() > 0.05


def test_groups_with_one_valid_response_are_dropped(update: tuple[Spy, dict[str, float]]) -> None:
    """Guards partial groups: what has no comparison has no mask and is not part of N; it is counted and reported."""
    learner, metrics = update
    batch = learner.batches[0]
    assert batch["num_sequences"] == 5
    np.testing.assert_array_equal(batch["mask_BT"].any(1), [1, 1, 1, 0, 0, 0, 1, 1, 0])
    assert metrics["groups_dropped"] == 1
    assert metrics["sequences"] == 5
    assert metrics["reward"] == pytest.approx(np.nanmean([g.reward_G for g in groups(0)]), rel=1e-5)


def test_invalid_responses_change_nothing(
    update: tuple[Spy, dict[str, float]], tmp_path: Path, folders: dict[str, str]
) -> None:
    """Guards the update, bit for bit, against the content of responses without a reward."""
    learner = Learner()
    learner.begin(mdloo_job(tmp_path, folders))
    learner.update_policy(0, groups(0, invalid_seed=1), SETTINGS)
    assert learned(learner) == learned(update[0])


def test_the_first_inner_step_is_on_policy(tmp_path: Path, folders: dict[str, str]) -> None:
    """Guards the ratio: at theta_k it is 1 for every sequence, and the KL zero."""
    learner = Learner()
    learner.begin(mdloo_job(tmp_path, folders))
    metrics = learner.update_policy(0, groups(0), dataclasses.replace(SETTINGS, inner_steps=1)).metrics
    assert metrics["ratio_mean"] == pytest.approx(1, abs=1e-5)
    assert metrics["effective_sample_fraction"] == pytest.approx(1, abs=1e-5)
    assert metrics["kl_to_behavior"] == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("microbatch", [1, 4])
def test_microbatches_change_nothing(
    microbatch: int, update: tuple[Spy, dict[str, float]], tmp_path: Path, folders: dict[str, str]
) -> None:
    """Guards the sum of gradients over microbatches of other widths and another order, and the metrics over all of them."""
    whole, expected = update
    learner = Spy()
    learner.begin(mdloo_job(tmp_path, folders))
    metrics = learner.update_policy(0, groups(0), dataclasses.replace(SETTINGS, microbatch=microbatch)).metrics
    assert len(learner.batches) == 2 * -(-9 // microbatch)
    assert metrics == pytest.approx(expected, rel=1e-4, abs=1e-6)
    trees = (jax.tree.leaves(of._require_state().params) for of in (learner, whole))
    for ours, theirs in zip(*trees, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=2e-6)


@pytest.mark.slow
def test_mdloo_continues_exactly(tmp_path: Path, folders: dict[str, str]) -> None:
    """Guards the online loop's checkpoint: whole iterations, whatever the number of inner steps, bit for bit."""
    whole = Learner()
    whole.begin(mdloo_job(tmp_path / "whole", folders))
    expected = [whole.update_policy(i, groups(i), SETTINGS).metrics for i in range(4)]

    job = mdloo_job(tmp_path / "killed", folders)
    first = Learner()
    first.begin(job)
    for i in range(2):
        first.update_policy(i, groups(i), SETTINGS)
    first.wait_for_checkpoints()
    second = Learner()
    assert second.begin(job) == 2
    assert [second.update_policy(i, groups(i), SETTINGS).metrics for i in (2, 3)] == expected[2:]
    assert learned(second) == learned(whole)


def test_an_iteration_without_rewards_updates_nothing(tmp_path: Path, folders: dict[str, str]) -> None:
    """Guards a run against rewards that all fail: the parameters stay, the iteration counts, the metrics say so."""
    learner = Learner()
    learner.begin(mdloo_job(tmp_path, folders))
    update = learner.update_policy(0, groups(0, valid=np.zeros((3, 3), bool)), SETTINGS, {"issued": [1, 2]})
    assert update.metrics["sequences"] == update.metrics["inner_steps_done"] == 0
    assert update.metrics["groups_dropped"] == 3
    assert all(np.isfinite(value) for value in update.metrics.values())
    assert not any(group.counted_G.any() for group in update.groups)
    assert learned(learner) == digest(random_params(0))
    learner.wait_for_checkpoints()
    second = Learner()
    assert second.begin(mdloo_job(tmp_path, folders)) == 1
    assert second.resumed_from()["consumed"] == {"issued": [1, 2]}


def test_what_is_published_and_exported_is_what_was_trained(tmp_path: Path, folders: dict[str, str]) -> None:
    """Guards the two ways out of a learner: flat weights and a policy folder, the same parameters."""
    learner = Learner()
    learner.begin(supervised_job(tmp_path, init=folders["start"]))
    assert learned(learner) == digest(random_params(0))
    learner.train([text_batch(0)])
    learner.export(str(tmp_path / "out"))
    artifact = load_artifact(tmp_path / "out")
    assert digest(artifact.params) == learned(learner) != digest(random_params(0))
    assert artifact.config == CONFIG
    weights = learner.publish("sft", 3)
    assert (weights.policy, weights.version) == ("sft", 3)


def test_a_reward_model_grows_heads_and_keeps_them(tmp_path: Path, folders: dict[str, str]) -> None:
    """Guards E.1 across rounds: heads are added to a policy, and those of a reward model are trained on."""
    learner = Learner()
    job = TrainingJob(
        "rm-1",
        "reward",
        ADAMW,
        str(tmp_path / "rm-1"),
        init=folders["start"],
        options={"grading_weight": 0.1},
        part="reward",
    )
    learner.begin(job)
    learner.export(str(tmp_path / "reward-model"))
    exported = load_artifact(tmp_path / "reward-model").params
    assert set(exported["heads"]) == {"reward", *GRADINGS}
    assert digest(exported["trunk"]) == digest(random_params(0))
    learner.begin(
        dataclasses.replace(
            job, task="rm-2", checkpoint_folder=str(tmp_path / "rm-2"), init=str(tmp_path / "reward-model"), seed=1
        )
    )
    assert learned(learner) == digest(exported)


def test_an_adapter_starts_over_a_frozen_base(tmp_path: Path, folders: dict[str, str]) -> None:
    """Guards 5.1: it starts as the base, is exported alone, and the next job may start from it, at its own rank."""
    learner = Learner()
    job = supervised_job(
        tmp_path / "a", config=None, init=folders["start"], options={}, part="adapter", adapter=AdapterSpec(2, 4.0)
    )
    learner.begin(job)
    base = learner.log_probs(text_batch(0))
    np.testing.assert_allclose(base, np_logps(random_params(0), text_batch(0)), atol=1e-5)
    learner.export(str(tmp_path / "adapter"))
    exported = load_artifact(tmp_path / "adapter")
    assert set(exported.params) == {"layers"}
    assert exported.adapter is not None
    assert (exported.adapter.rank, exported.adapter.alpha) == (2, 4.0)
    again = AdapterSpec(2, 4.0, init=str(tmp_path / "adapter"))
    learner.begin(dataclasses.replace(job, checkpoint_folder=str(tmp_path / "b"), adapter=again, seed=1))
    assert learned(learner) == digest(exported.params)
    wrong = dataclasses.replace(job, checkpoint_folder=str(tmp_path / "c"), adapter=dataclasses.replace(again, rank=3))
    with pytest.raises(ValueError, match="not an adapter of rank 3"):
        learner.begin(wrong)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"config": None}, "'sft' has neither a policy to start from nor a model configuration"),
        ({"config": CONFIG.replace(ffn_dim=24), "init": "start"}, "'sft': .*start has another shape"),
        ({"part": "adapter"}, "'sft' trains adapter but does not say the adapter's rank"),
        ({"part": "masks"}, "'sft' trains masks but does not say how many units to keep"),
        ({"objective": "ppo"}, "unknown objective 'ppo'"),
    ],
)
def test_impossible_jobs_are_refused(tmp_path: Path, folders: dict[str, str], changes: Any, message: str) -> None:
    """Guards jobs: the message names the task."""
    changes = changes | ({"init": folders[changes["init"]]} if "init" in changes else {})
    with pytest.raises(ValueError, match=message):
        Learner().begin(supervised_job(tmp_path, options={}, **changes))


def test_the_rope_base_may_change(tmp_path: Path, folders: dict[str, str]) -> None:
    """Guards 3.2.3: context lengthening starts from the same shape under another base."""
    learner = Learner()
    learner.begin(supervised_job(tmp_path, config=CONFIG.replace(rope_base=6_315_089.0), init=folders["start"]))
    learner.export(str(tmp_path / "out"))
    found = load_artifact(tmp_path / "out").config
    assert found is not None
    assert found.rope_base == 6_315_089.0


def test_a_checkpoint_of_another_task_is_refused(tmp_path: Path) -> None:
    """Guards a folder used twice."""
    learner = Learner()
    job = supervised_job(tmp_path)
    learner.begin(job)
    learner.save(0)
    with pytest.raises(ValueError, match="a checkpoint of task 'sft', not 'dpo'"):
        learner.begin(dataclasses.replace(job, task="dpo"))


def test_a_learner_without_a_job_says_so() -> None:
    """Guards the order of calls."""
    with pytest.raises(RuntimeError, match="call begin\\(\\) first"):
        Learner().train([text_batch(0)])
