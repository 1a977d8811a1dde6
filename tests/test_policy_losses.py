"""Every objective on a small model: known values at the start, gradients where they belong, batches read as documented."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from afm_rl.config import ModelConfig
from afm_rl.lora import init_lora
from afm_rl.model import Params, ParamSpec, param_specs
from afm_rl.policy_losses import adapter_view, build, response_logps, sequence_logits
from afm_rl.reward_model import init_heads
from afm_rl.types import GRADINGS

CONFIG = ModelConfig(13, 8, 16, 1, 2, 1, 4)
KEY = jax.random.key(0)


def random_params(seed: int) -> Params:
    rng = np.random.default_rng(seed)

    def draw(spec: ParamSpec) -> jax.Array:
        values = np.ones(spec.shape) if spec.std is None else spec.std * rng.normal(size=spec.shape)
        return jnp.asarray(values, jnp.float32)

    return jax.tree.map(draw, param_specs(CONFIG), is_leaf=lambda x: isinstance(x, ParamSpec))


PARAMS, OTHER = random_params(0), random_params(1)


def make_batch() -> dict[str, np.ndarray]:
    """Four right-padded rows of prompt and response: two pairs, chosen first."""
    rng = np.random.default_rng(0)
    length, prompt, t = np.array([7, 5, 6, 4]), np.array([2, 3, 2, 3]), np.arange(7)
    return {
        "tokens_BT": (rng.integers(1, 13, size=(4, 7)) * (t < length[:, None])).astype(np.int32),
        "mask_BT": ((t >= prompt[:, None]) & (t < length[:, None])).astype(np.float32),
        "length_B": length,
    }


BATCH = make_batch()


@jax.jit
def logits_of(params: Params) -> jax.Array:
    return sequence_logits(params, BATCH, config=CONFIG)


def logps_of(params: Params, temperature: float = 1.0) -> np.ndarray:
    """Float64 log p of every target of BATCH [B, T], 0 elsewhere."""
    scores = np.asarray(logits_of(params), np.float64) / temperature
    logp = scores - np.log(np.exp(scores).sum(-1, keepdims=True))
    found = np.zeros(BATCH["tokens_BT"].shape)
    for b, t in np.argwhere(BATCH["mask_BT"]):
        found[b, t] = logp[b, t - 1, BATCH["tokens_BT"][b, t]]
    return found


def value_and_grad(loss: Any, params: Any, frozen: Any, batch: Any) -> tuple[float, dict[str, Any], Any]:
    (value, metrics), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(params, frozen, batch, KEY)
    return float(value), metrics, grads


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_response_log_probabilities(temperature: float) -> None:
    """Guards the shift by one, the mask and the temperature of the learner's program."""
    found = jax.jit(lambda p: response_logps(p, BATCH, config=CONFIG, temperature=temperature))(PARAMS)
    np.testing.assert_allclose(found, logps_of(PARAMS, temperature), atol=1e-5)


def test_supervised_is_the_mean_over_target_tokens() -> None:
    """Guards SFT: tokens of all rows weigh the same, prompts and padding nothing."""
    value, metrics, _ = value_and_grad(build("supervised", CONFIG, {}), PARAMS, {}, BATCH)
    assert value == pytest.approx(-logps_of(PARAMS).sum() / BATCH["mask_BT"].sum(), rel=1e-5)
    assert int(metrics["tokens"]) == BATCH["mask_BT"].sum()


def test_distillation_mixes_the_true_and_the_teachers_token() -> None:
    """Guards 3.2.1: 0.1 of the true label, 0.9 of the teacher's top-1; the teacher gets no gradient."""
    loss = build("distillation", CONFIG, {"teacher_config": CONFIG})
    scores = np.asarray(logits_of(PARAMS), np.float64)
    logp = scores - np.log(np.exp(scores).sum(-1, keepdims=True))
    taught = np.asarray(logits_of(OTHER)).argmax(-1)
    rows = np.argwhere(BATCH["mask_BT"])
    terms = [0.1 * logp[b, t - 1, BATCH["tokens_BT"][b, t]] + 0.9 * logp[b, t - 1, taught[b, t - 1]] for b, t in rows]
    run = jax.jit(jax.value_and_grad(lambda p, teacher: loss(p, {"teacher": teacher}, BATCH, KEY)[0], argnums=(0, 1)))
    value, (grads, teacher_grads) = run(PARAMS, OTHER)
    assert float(value) == pytest.approx(-np.mean(terms), rel=1e-5)
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(teacher_grads))
    assert np.any(grads["final_norm"])


def preference_batch(reference: Params) -> dict[str, np.ndarray]:
    return {**BATCH, "ref_logp_B": logps_of(reference).sum(-1).astype(np.float32)}


@pytest.mark.parametrize(("name", "start"), [("dpo", np.log(2)), ("ipo", 1 / (2 * 0.25) ** 2)])
def test_preference_losses_at_the_start(name: str, start: float) -> None:
    """Guards the reference: at the policy itself DPO is log 2 and IPO the square of its target margin."""
    loss = build(name, CONFIG, {"beta": 0.25})
    value, metrics, grads = value_and_grad(loss, PARAMS, {}, preference_batch(PARAMS))
    assert value == pytest.approx(start, rel=1e-4)
    assert abs(float(metrics["margin"])) < 1e-4
    assert np.any(grads["final_norm"])


def test_preference_losses_away_from_the_start() -> None:
    """Guards which rows are chosen: sums over the responses, first half against second half."""
    batch = preference_batch(OTHER)
    ratio = logps_of(PARAMS).sum(-1) - logps_of(OTHER).sum(-1)
    margin = ratio[:2] - ratio[2:]
    dpo, metrics, _ = value_and_grad(build("dpo", CONFIG, {"beta": 0.25}), PARAMS, {}, batch)
    assert dpo == pytest.approx(np.log1p(np.exp(-0.25 * margin)).mean(), rel=1e-4)
    assert float(metrics["margin"]) == pytest.approx(margin.mean(), rel=1e-4)
    assert float(metrics["accuracy"]) == (margin > 0).mean()
    ipo, _, _ = value_and_grad(build("ipo", CONFIG, {"beta": 0.25}), PARAMS, {}, batch)
    assert ipo == pytest.approx(((margin - 2.0) ** 2).mean(), rel=1e-4)


def test_one_step_prefers_the_chosen() -> None:
    """Guards the sign: down the gradient of DPO the margin grows."""
    batch = preference_batch(PARAMS)
    loss = build("dpo", CONFIG, {"beta": 0.25})
    _, _, grads = value_and_grad(loss, PARAMS, {}, batch)
    moved = jax.tree.map(lambda p, g: p - 0.01 * g, PARAMS, grads)
    _, metrics = loss(moved, {}, batch, KEY)
    assert float(metrics["margin"]) > 0.01


def reward_batch() -> dict[str, np.ndarray]:
    grades = np.array([[0, 1, 2, -1], [2, 2, 0, 1], [1, 0, -1, 2], [0, 0, 1, 1]])
    return {**BATCH, "level_B": np.array([3, 0]), "grades": grades}


def test_reward_loss_reads_pairs_and_grades() -> None:
    """Guards E.1 end to end in NumPy: soft labels by level, four gradings in order, ungraded ones left out."""
    from afm_rl.reward_model import score

    rng = np.random.default_rng(2)
    heads = jax.jit(init_heads, static_argnums=0)(CONFIG, KEY)
    params = {"trunk": PARAMS, "heads": {**heads, "reward": rng.normal(size=(1, 8)).astype(np.float32)}}
    batch = reward_batch()
    scores = jax.jit(lambda p: score(p, batch["tokens_BT"], batch["length_B"], config=CONFIG))(params)
    reward = np.asarray(scores.reward_B, np.float64)
    margin, p = reward[:2] - reward[2:], np.array([0.95, 0.65])
    ranking = (p * np.log1p(np.exp(-margin)) + (1 - p) * np.log1p(np.exp(margin))).mean()
    grading = 0.0
    for head, name in enumerate(GRADINGS):
        logits = np.asarray(scores.grade_logits[name], np.float64)
        logp = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        grading -= sum(logp[row, c] for row, c in enumerate(batch["grades"][:, head]) if c >= 0) / 2
    value, metrics, grads = value_and_grad(build("reward", CONFIG, {"grading_weight": 0.3}), params, {}, batch)
    assert value == pytest.approx(ranking + 0.3 * grading, rel=1e-4)
    assert float(metrics["margin"]) == pytest.approx(margin.mean(), rel=1e-4)
    assert np.any(grads["trunk"]["final_norm"])
    assert np.any(grads["heads"]["reward"])


def test_an_adapter_starts_at_its_base_and_alone_learns() -> None:
    """Guards 5.1: equal loss with b = 0, gradients into b only at first, and a base that is not touched."""
    lora = jax.tree.map(jnp.asarray, jax.jit(init_lora, static_argnums=(0, 1))(CONFIG, 2, KEY))
    plain = build("supervised", CONFIG, {})(PARAMS, {}, BATCH, KEY)[0]
    loss = build("supervised", CONFIG, {}, view=adapter_view(alpha=4.0, rank=2))
    value, _, grads = value_and_grad(loss, lora, {"base": PARAMS}, BATCH)
    assert value == pytest.approx(float(plain), rel=1e-6)
    for name, factors in grads["layers"].items():
        assert not np.any(factors["a"]), name
        assert np.any(factors["b"]), name


def test_mdloo_at_theta_k_is_the_leave_one_out_policy_gradient() -> None:
    """Guards Eq. 9's batch: -(1/N) sum A grad log pi over sequences, whatever gamma; N is given, not counted."""
    advantage = np.array([1.5, -0.5, 0.25, -1.25], np.float32)
    batch = {**BATCH, "behavior_logp_BT": logps_of(PARAMS, 0.9).astype(np.float32), "advantage_B": advantage}

    def plain(params: Params) -> jax.Array:
        logp_B = response_logps(params, BATCH, config=CONFIG, temperature=0.9).sum(-1)
        return -(advantage * logp_B).sum() / 8

    expected = jax.jit(jax.grad(plain))(PARAMS)
    run = jax.jit(
        jax.grad(
            lambda params, gamma: build("mdloo", CONFIG, {"gamma": gamma, "temperature": 0.9})(
                params, {}, {**batch, "num_sequences": 8.0}, KEY
            )[0]
        )
    )
    for gamma in (0.0, 5.0):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), run(PARAMS, gamma), expected)


def test_an_unknown_objective_is_refused() -> None:
    """Guards topologies: the message lists what there is."""
    with pytest.raises(ValueError, match="'ppo'; known: supervised, distillation, reward, dpo, ipo, mdloo"):
        build("ppo", CONFIG, {})
