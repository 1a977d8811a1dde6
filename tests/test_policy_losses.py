"""Every objective on a small model: known values, gradients where they belong, batches read as documented."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from afm_rl.config import ModelConfig
from afm_rl.lora import projection_shapes
from afm_rl.model import logits
from afm_rl.parameters import Params, ParamSpec, param_specs
from afm_rl.policy_losses import adapter_view, build, hidden_states, response_logps
from afm_rl.reward_model import score
from afm_rl.types import GRADINGS

CONFIG = ModelConfig(13, 8, 16, 1, 2, 1, 4)
KEY = jax.random.key(0)


def random_params(seed: int) -> Params:
    rng = np.random.default_rng(seed)

    def draw(spec: ParamSpec) -> np.ndarray:
        values = np.ones(spec.shape) if spec.std is None else spec.std * rng.normal(size=spec.shape)
        return values.astype(np.float32)

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
    return logits(params, hidden_states(params, BATCH, config=CONFIG), CONFIG)


@jax.jit
def own_logps(params: Params, temperature: float) -> jax.Array:
    return response_logps(params, BATCH, config=CONFIG, temperature=temperature)


def logps_of(params: Params, temperature: float = 1.0) -> np.ndarray:
    """Float64 log p of every target of BATCH [B, T], 0 elsewhere."""
    scores = np.asarray(logits_of(params), np.float64) / temperature
    logp = scores - np.log(np.exp(scores).sum(-1, keepdims=True))
    found = np.zeros(BATCH["tokens_BT"].shape)
    for b, t in np.argwhere(BATCH["mask_BT"]):
        found[b, t] = logp[b, t - 1, BATCH["tokens_BT"][b, t]]
    return found


def evaluate(loss: Any, params: Any, batch: Any, frozen: Any = None) -> tuple[float, dict[str, Any]]:
    value, metrics = jax.jit(loss)(params, frozen or {}, batch, KEY)
    return float(value), metrics


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_response_log_probabilities(temperature: float) -> None:
    """Guards the shift by one, the mask and the temperature of the learner's program."""
    np.testing.assert_allclose(own_logps(PARAMS, temperature), logps_of(PARAMS, temperature), atol=1e-5)


def test_supervised_is_the_mean_over_target_tokens() -> None:
    """Guards SFT: tokens of all rows weigh the same, prompts and padding nothing."""
    value, metrics = evaluate(build("supervised", CONFIG, {}), PARAMS, BATCH)
    assert value == pytest.approx(-logps_of(PARAMS).sum() / BATCH["mask_BT"].sum(), rel=1e-5)
    assert int(metrics["tokens"]) == BATCH["mask_BT"].sum()


def test_distillation_mixes_the_true_and_the_teachers_token() -> None:
    """Guards 3.2.1: 0.1 of the true label, 0.9 of the teacher's top-1 token."""
    scores = np.asarray(logits_of(PARAMS), np.float64)
    logp = scores - np.log(np.exp(scores).sum(-1, keepdims=True))
    taught = np.asarray(logits_of(OTHER)).argmax(-1)
    rows = np.argwhere(BATCH["mask_BT"])
    terms = [0.1 * logp[b, t - 1, BATCH["tokens_BT"][b, t]] + 0.9 * logp[b, t - 1, taught[b, t - 1]] for b, t in rows]
    value, _ = evaluate(build("distillation", CONFIG, {"teacher_config": CONFIG}), PARAMS, BATCH, {"teacher": OTHER})
    assert value == pytest.approx(-np.mean(terms), rel=1e-5)


def preference_batch(reference: Params) -> dict[str, np.ndarray]:
    return {**BATCH, "ref_logp_B": logps_of(reference).sum(-1).astype(np.float32)}


@jax.jit
def dpo(params: Params, batch: Any) -> Any:
    loss = build("dpo", CONFIG, {"beta": 0.25})
    return jax.value_and_grad(loss, has_aux=True)(params, {}, batch, KEY)


@jax.jit
def ipo(params: Params, batch: Any) -> Any:
    return build("ipo", CONFIG, {"beta": 0.25})(params, {}, batch, KEY)


def test_preference_losses_at_the_start() -> None:
    """Guards the reference: at the policy itself DPO is log 2 and IPO the square of its target margin, 2 nats."""
    batch = preference_batch(PARAMS)
    (value, metrics), _ = dpo(PARAMS, batch)
    assert float(value) == pytest.approx(np.log(2), rel=1e-4)
    assert abs(float(metrics["margin"])) < 1e-4
    assert float(ipo(PARAMS, batch)[0]) == pytest.approx(4.0, rel=1e-4)


def test_preference_losses_away_from_the_start() -> None:
    """Guards which rows are chosen: sums over the responses, first half against second half."""
    batch = preference_batch(OTHER)
    ratio = logps_of(PARAMS).sum(-1) - logps_of(OTHER).sum(-1)
    margin = ratio[:2] - ratio[2:]
    (value, metrics), _ = dpo(PARAMS, batch)
    assert float(value) == pytest.approx(np.log1p(np.exp(-0.25 * margin)).mean(), rel=1e-4)
    assert float(metrics["margin"]) == pytest.approx(margin.mean(), rel=1e-4)
    assert float(metrics["accuracy"]) == (margin > 0).mean()
    assert float(ipo(PARAMS, batch)[0]) == pytest.approx(((margin - 2.0) ** 2).mean(), rel=1e-4)


def test_one_step_prefers_the_chosen() -> None:
    """Guards the sign: down the gradient of DPO the margin grows."""
    batch = preference_batch(PARAMS)
    _, grads = dpo(PARAMS, batch)
    (_, metrics), _ = dpo(jax.tree.map(lambda p, g: np.asarray(p) - 0.01 * np.asarray(g), PARAMS, grads), batch)
    assert float(metrics["margin"]) > 0.01


def reward_batch() -> dict[str, np.ndarray]:
    grades = np.array([[0, 1, 2, -1], [2, 2, 0, 1], [1, 0, -1, 2], [0, 0, 1, 1]])
    return {**BATCH, "level_B": np.array([3, 0]), "grades": grades}


def test_reward_loss_reads_pairs_and_grades() -> None:
    """Guards E.1 end to end in NumPy: soft labels by level, four gradings in order, ungraded ones left out."""
    rng = np.random.default_rng(2)
    heads = {
        name: {n: rng.normal(size=(out, 8)).astype(np.float32) for n, out in (("up", 8), ("down", 3))} for name in GRADINGS
    }
    params = {"trunk": PARAMS, "heads": {**heads, "reward": rng.normal(size=(1, 8)).astype(np.float32)}}
    batch = reward_batch()
    scores = jax.jit(score, static_argnames="config")(params, batch["tokens_BT"], batch["length_B"], config=CONFIG)
    reward = np.asarray(scores.reward_B, np.float64)
    margin, p = reward[:2] - reward[2:], np.array([0.95, 0.65])
    ranking = (p * np.log1p(np.exp(-margin)) + (1 - p) * np.log1p(np.exp(margin))).mean()
    grading = 0.0
    for head, name in enumerate(GRADINGS):
        logits = np.asarray(scores.grade_logits[name], np.float64)
        logp = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        grading -= sum(logp[row, c] for row, c in enumerate(batch["grades"][:, head]) if c >= 0) / 2
    value, metrics = evaluate(build("reward", CONFIG, {"grading_weight": 0.3}), params, batch)
    assert value == pytest.approx(ranking + 0.3 * grading, rel=1e-4)
    assert float(metrics["margin"]) == pytest.approx(margin.mean(), rel=1e-4)


def test_an_adapter_starts_at_its_base_and_alone_learns() -> None:
    """Guards 5.1: equal loss with b = 0, gradients into b only at first, and a base that is not touched."""
    rng = np.random.default_rng(3)
    lora = {
        name: {"a": rng.normal(size=(1, 2, fan_in)).astype(np.float32), "b": np.zeros((1, out, 2), np.float32)}
        for name, (out, fan_in) in projection_shapes(CONFIG).items()
    }
    loss = build("supervised", CONFIG, {}, view=adapter_view(alpha=4.0, rank=2))
    run = jax.jit(jax.value_and_grad(loss, has_aux=True))
    (value, _), grads = run({"layers": lora}, {"base": PARAMS}, BATCH, KEY)
    assert float(value) == pytest.approx(-logps_of(PARAMS).sum() / BATCH["mask_BT"].sum(), rel=1e-5)
    for name, factors in grads["layers"].items():
        assert not np.any(factors["a"]), name
        assert np.any(factors["b"]), name


ONLINE = {"algorithm": "mdloo", "temperature": 0.9, "beta": 0.0, "clip": 0.2, "staleness_cap": 2.0}
FRESH = {"sampler_logp_BT": np.zeros((4, 7), np.float32), "stale_B": np.zeros(4, bool)}


def test_mdloo_at_theta_k_is_the_leave_one_out_policy_gradient() -> None:
    """Guards Eq. 9's batch: -(1/N) sum A grad log pi over sequences, whatever gamma; N is given."""
    advantage = np.array([1.5, -0.5, 0.25, -1.25], np.float32)
    logps = logps_of(PARAMS, 0.9).astype(np.float32)
    batch = {**BATCH, "behavior_logp_BT": logps, "advantage_B": advantage, **FRESH}

    def plain(params: Params) -> jax.Array:
        logp_B = response_logps(params, BATCH, config=CONFIG, temperature=0.9).sum(-1)
        return -(advantage * logp_B).sum() / 8

    def surrogate(params: Params, gamma: float) -> jax.Array:
        loss = build("online", CONFIG, {**ONLINE, "gamma": gamma})
        return loss(params, {}, {**batch, "num_sequences": 8.0}, KEY)[0]

    run = jax.jit(lambda params, gamma: (jax.grad(plain)(params), jax.grad(surrogate)(params, gamma)))
    for gamma in (0.0, 5.0):
        expected, found = run(PARAMS, gamma)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), found, expected)


def test_the_full_kl_is_differentiated_through_both_factors() -> None:
    """Guards the full form from the model to the gradient: prefix ratio times KL, by plain differentiation of both."""
    behavior, advantage = logps_of(OTHER, 0.9).astype(np.float32), np.array([1.5, -0.5, 0.25, -1.25], np.float32)
    mask, gamma = BATCH["mask_BT"], 0.7

    def direct(params: Params) -> jax.Array:
        scores = [logits(p, hidden_states(p, BATCH, config=CONFIG), CONFIG) / 0.9 for p in (params, OTHER)]
        own, old = (jnp.pad(jax.nn.log_softmax(s)[:, :-1], ((0, 0), (1, 0), (0, 0))) for s in scores)
        kl = (jnp.exp(own) * (own - old)).sum(-1)
        d = (jnp.take_along_axis(own, BATCH["tokens_BT"][..., None], -1)[..., 0] - behavior) * mask
        prefix = jnp.exp(jnp.cumsum(d, -1) - d)
        return (-jnp.exp(d.sum(-1)) * advantage + gamma * (prefix * kl * mask).sum(-1)).sum() / 4

    loss = build("online", CONFIG, {**ONLINE, "gamma": gamma, "kl": "full"})
    batch = {**BATCH, "behavior_logp_BT": behavior, "advantage_B": advantage, "num_sequences": 4.0, **FRESH}
    near = jax.tree.map(lambda a, b: 0.9 * b + 0.1 * a, PARAMS, OTHER)
    expected, found = jax.jit(
        lambda params: (jax.grad(direct)(params), jax.grad(lambda p: loss(p, {"behavior": OTHER}, batch, KEY)[0])(params))
    )(near)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4), found, expected)


@pytest.mark.parametrize("kl", ["sampled", "full"])
def test_windows_of_responses_change_nothing(kl: str) -> None:
    """Guards the loss and its gradient where only the responses' positions are scored, each row from its own first one."""
    first = BATCH["mask_BT"].argmax(-1).astype(np.int32)
    whole = {**BATCH, "behavior_logp_BT": logps_of(OTHER, 0.9).astype(np.float32), **FRESH}
    index = np.minimum(first[:, None] + np.arange(5), 7)
    window = {n: np.take_along_axis(np.pad(v, ((0, 0), (0, 1))), index, 1) for n, v in whole.items() if n.endswith("_BT")}
    shared = {"advantage_B": np.float32([1.5, -0.5, 0.25, -1.25]), "num_sequences": 4.0, "stale_B": FRESH["stale_B"]}
    loss = build("online", CONFIG, {**ONLINE, "gamma": 0.7, "kl": kl})
    run = jax.jit(jax.value_and_grad(lambda params, batch: loss(params, {"behavior": OTHER}, batch, KEY)[0]))
    expected, slope = run(PARAMS, {**whole, **shared})
    found, same = run(PARAMS, {**window, "tokens_BT": BATCH["tokens_BT"], "first_B": first, **shared})
    assert float(found) == pytest.approx(float(expected), rel=1e-4)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-3), same, slope)


def test_an_unknown_objective_is_refused() -> None:
    """Guards topologies: the message lists what there is."""
    with pytest.raises(ValueError, match="'mdloo'; known: supervised, distillation, reward, dpo, ipo, online"):
        build("mdloo", CONFIG, {})
