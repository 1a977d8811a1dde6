"""MDLOO against the exact gradient of Psi: every sequence of a toy policy is enumerated in float64.

The policy writes up to three tokens of {0 = end, 1, 2}; its 15 sequences are the whole sample space, so that
expectations are sums. Psi and its gradient (central differences) are plain NumPy and share no code with what is tested.
Both forms of the KL are compared. The wrong estimators that look right (token-level ratios, k3, GSPO's ratio, length
averaging) are shown to miss.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from afm_rl.objectives.mdloo import leave_one_out, mdloo_loss

PREFIXES = [(), *itertools.product((1, 2)), *itertools.product((1, 2), repeat=2)]
SEQUENCES = [(0,), *((a, 0) for a in (1, 2)), *itertools.product((1, 2), (1, 2), (0, 1, 2))]
NUM = len(SEQUENCES)
MIXING = np.random.default_rng(0).normal(size=(len(PREFIXES), 3, 6))
THETA_K = np.random.default_rng(1).normal(size=6)
DIRECTION = np.random.default_rng(2).normal(size=6)
REWARD = np.random.default_rng(3).normal(size=NUM)
TOKENS = np.array([[0, *y] + [0] * (3 - len(y)) for y in SEQUENCES])
STATES = np.array([[0] + [PREFIXES.index(y[:t]) for t in range(len(y))] + [0] * (3 - len(y)) for y in SEQUENCES])
MASK = np.array([[0.0] + [1.0] * len(y) + [0.0] * (3 - len(y)) for y in SEQUENCES])


def probabilities(theta: np.ndarray) -> np.ndarray:
    """pi(y) of every sequence, in NumPy."""
    logits = 2.0 * np.tanh(MIXING @ theta)
    token = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    rows = {prefix: token[i] for i, prefix in enumerate(PREFIXES)}
    return np.array([np.prod([rows[y[:t]][y[t]] for t in range(len(y))]) for y in SEQUENCES])


def psi(theta: np.ndarray, gamma: float) -> float:
    """Eq. 8 with its first expectation over pi_theta, whose gradient Eq. 9 is; A = R - E_k R."""
    p, k = probabilities(theta), probabilities(THETA_K)
    return float(p @ (REWARD - k @ REWARD) - gamma * (p @ np.log(p / k)))


def exact_gradient(theta: np.ndarray, gamma: float) -> np.ndarray:
    steps = 1e-5 * np.eye(6)
    return np.array([(psi(theta + h, gamma) - psi(theta - h, gamma)) / 2e-5 for h in steps])


def token_logps(theta: jax.Array) -> jax.Array:
    """[NUM, 4]: column 0 stands for the prompt; what the mask leaves out is arbitrary."""
    return jax.nn.log_softmax(2.0 * jnp.tanh(MIXING @ theta))[STATES, TOKENS]


Slope = Callable[[jax.Array, jax.Array, np.ndarray, np.ndarray, float], jax.Array]


def ours(logp: jax.Array, behavior: jax.Array, advantage: np.ndarray, mask: np.ndarray, gamma: float) -> jax.Array:
    """N x d loss / d logp of `mdloo_loss`: what each sequence adds to minus the gradient."""

    def loss(logp: jax.Array) -> jax.Array:
        return mdloo_loss(logp_BT=logp, behavior_logp_BT=behavior, advantage_B=advantage, mask_BT=mask, gamma=gamma)[0]

    return len(logp) * jax.grad(loss)(logp)


def token_ratio(logp: jax.Array, behavior: jax.Array, advantage: np.ndarray, mask: np.ndarray, gamma: float) -> jax.Array:
    d = (logp - behavior) * mask
    return -jnp.exp(d) * (advantage - gamma * d.sum(1))[:, None] * mask


def k3(logp: jax.Array, behavior: jax.Array, advantage: np.ndarray, mask: np.ndarray, gamma: float) -> jax.Array:
    d = (logp - behavior) * mask
    return (-jnp.exp(d.sum(1)) * advantage)[:, None] * mask + gamma * (1 - jnp.exp(-d)) * mask


def gspo(logp: jax.Array, behavior: jax.Array, advantage: np.ndarray, mask: np.ndarray, gamma: float) -> jax.Array:
    d = ((logp - behavior) * mask).sum(1)
    return (-jnp.exp(d / mask.sum(1)) * (advantage - gamma * d))[:, None] * mask


def length_average(logp: jax.Array, behavior: jax.Array, advantage: np.ndarray, mask: np.ndarray, gamma: float) -> jax.Array:
    return ours(logp, behavior, advantage, mask, gamma) * (mask.sum(1).mean() / mask.sum(1))[:, None]


def token_kls(theta: jax.Array) -> jax.Array:
    """[NUM, 4]: KL(pi_theta || pi_k) of the distribution that each token is drawn from; arbitrary outside the mask."""
    logp, behavior = (jax.nn.log_softmax(2.0 * jnp.tanh(MIXING @ x)) for x in (theta, THETA_K))
    return (jnp.exp(logp) * (logp - behavior)).sum(-1)[STATES] + 7.0 * (MASK == 0)


@partial(jax.jit, static_argnames="slope")
def expected_slope(slope: Slope, theta: jax.Array, k: jax.Array, gamma: float) -> jax.Array:
    logp, pull_back = jax.vjp(token_logps, theta)
    per_sequence = slope(logp, token_logps(jnp.asarray(THETA_K)), REWARD - k @ REWARD, MASK, gamma)
    return pull_back(k[:, None] * per_sequence)[0]


@jax.jit
def full_slope(theta: jax.Array, k: jax.Array, gamma: float) -> jax.Array:
    def loss(theta: jax.Array) -> jax.Array:
        of_all = {"logp_BT": token_logps(theta), "kl_BT": token_kls(theta), "mask_BT": MASK, "weight_B": NUM * k}
        behavior = token_logps(jnp.asarray(THETA_K))
        return mdloo_loss(**of_all, behavior_logp_BT=behavior, advantage_B=REWARD - k @ REWARD, gamma=gamma)[0]

    return jax.grad(loss)(theta)


def expected_gradient(slope: Slope | None, theta: np.ndarray, gamma: float) -> np.ndarray:
    """The estimator's expectation over y ~ pi_k, with the exact advantage: every sequence, weighted by pi_k.

    `slope` None: the full-vocabulary form.
    """
    with jax.enable_x64(True):
        k = probabilities(THETA_K)
        return -np.asarray(full_slope(theta, k, gamma) if slope is None else expected_slope(slope, theta, k, gamma))


def relative_error(got: np.ndarray, expected: np.ndarray) -> float:
    return float(np.linalg.norm(got - expected) / np.linalg.norm(expected))


FORMS = pytest.mark.parametrize("form", [ours, None], ids=["sampled", "full"])


@FORMS
@pytest.mark.parametrize(
    ("distance", "gamma"), [(0.0, 1.0), (0.1, 0.0), (0.1, 1.0), (0.3, 0.1), (0.3, 1.0), (1.0, 0.5), (-1.0, 0.5)]
)
def test_gradient_is_exactly_eq_9(form: Slope | None, distance: float, gamma: float) -> None:
    """Guards the objective itself, in both forms: at theta_k, near it and so far that a ratio exceeds e^3."""
    theta = THETA_K + distance * DIRECTION
    assert relative_error(expected_gradient(form, theta, gamma), exact_gradient(theta, gamma)) < 1e-6
    assert distance >= 0 or (probabilities(theta) / probabilities(THETA_K)).max() > np.exp(3)


@pytest.mark.parametrize("distance", [0.3, 1.0, -1.0])
@pytest.mark.parametrize("wrong", [token_ratio, k3, gspo, length_average])
def test_the_usual_wrong_estimators_are_biased(wrong: Slope, distance: float) -> None:
    """Guards the test above: each of these misses the exact gradient by many times its tolerance."""
    theta = THETA_K + distance * DIRECTION
    assert relative_error(expected_gradient(wrong, theta, 1.0), exact_gradient(theta, 1.0)) > 0.05


def test_the_full_form_varies_less() -> None:
    """Guards its reason to be: over samples of pi_k the gradient of the KL alone has a fraction of the variance."""
    theta = THETA_K + 0.3 * DIRECTION

    def of_one(theta: jax.Array, row: jax.Array, form: str) -> jax.Array:
        logp, kl, behavior = token_logps(theta)[row][None], token_kls(theta)[row][None], token_logps(jnp.asarray(THETA_K))
        known = {
            "behavior_logp_BT": behavior[row][None],
            "advantage_B": jnp.zeros(1),
            "mask_BT": jnp.asarray(MASK)[row][None],
        }
        return mdloo_loss(logp_BT=logp, gamma=1.0, kl_BT=kl if form == "full" else None, **known)[0]

    k = probabilities(THETA_K)
    variance = {}
    for form in ("sampled", "full"):
        with jax.enable_x64(True):
            slopes = np.asarray(
                jax.jit(jax.vmap(jax.grad(partial(of_one, form=form)), in_axes=(None, 0)))(theta, np.arange(NUM))
            )
        variance[form] = (k @ np.square(slopes) - np.square(k @ slopes)).sum()
    assert variance["full"] < 0.5 * variance["sampled"]


def test_leave_one_out_estimator_is_unbiased() -> None:
    """Guards Eq. 7 inside Eq. 9: over all pairs of responses (K = 2), the expectation is the exact gradient."""
    theta, gamma = THETA_K + 0.3 * DIRECTION, 0.5
    k = probabilities(THETA_K)
    first, second = np.divmod(np.arange(NUM * NUM), NUM)
    advantage = leave_one_out(np.stack([REWARD[first], REWARD[second]], axis=1))
    rows = np.stack([first, second], axis=1).reshape(-1)
    weight = np.repeat(k[first] * k[second], 2) / 2

    def gradient(theta: jax.Array) -> jax.Array:
        logp, pull_back = jax.vjp(lambda x: token_logps(x)[rows], theta)
        behavior = token_logps(jnp.asarray(THETA_K))[rows]
        return -pull_back(weight[:, None] * ours(logp, behavior, advantage.reshape(-1), MASK[rows], gamma))[0]

    with jax.enable_x64(True):
        got = np.asarray(jax.jit(gradient)(theta))
    assert relative_error(got, exact_gradient(theta, gamma)) < 1e-6


def test_gamma_does_nothing_at_theta_k() -> None:
    """Guards the reason for at least two inner steps: at theta_k the KL's gradient is exactly zero, per sample."""
    with jax.enable_x64(True):
        logp = token_logps(jnp.asarray(THETA_K))
        slopes = [jax.jit(ours)(logp, logp, REWARD, MASK, gamma) for gamma in (0.0, 1.0, 100.0)]
    np.testing.assert_array_equal(slopes[0], slopes[1])
    np.testing.assert_array_equal(slopes[0], slopes[2])
    np.testing.assert_allclose(slopes[0], -REWARD[:, None] * MASK, rtol=1e-12)


def make_batch() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(4)
    logp = rng.normal(-1.0, 0.5, (4, 6)).astype(np.float32)
    mask = (np.arange(6) >= 2) & (np.arange(6) < np.array([[6], [4], [5], [3]]))
    behavior = logp + rng.normal(0.0, 0.2, (4, 6)).astype(np.float32)
    return {"logp_BT": logp, "behavior_logp_BT": behavior, "advantage_B": rng.normal(size=4), "mask_BT": mask * 1.0}


def value_and_slope(batch: dict[str, np.ndarray], **options: float) -> tuple[dict[str, float], np.ndarray]:
    def loss(logp: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        return mdloo_loss(**{**batch, "logp_BT": logp, "gamma": 0.3, **options})

    (value, metrics), slope = jax.jit(jax.value_and_grad(loss, has_aux=True))(jnp.asarray(batch["logp_BT"]))
    return {"loss": float(value), **{name: float(x) for name, x in metrics.items()}}, np.asarray(slope)


def test_padding_changes_nothing() -> None:
    """Guards rows and columns without a mask, whatever they hold: N, the loss, its gradient and the metrics."""
    batch = make_batch()
    padded = {name: np.pad(x, ((0, 3), (0, 2)), constant_values=np.nan) for name, x in batch.items() if x.ndim == 2}
    padded["mask_BT"] = np.nan_to_num(padded["mask_BT"])
    padded["advantage_B"] = np.pad(batch["advantage_B"], (0, 3), constant_values=np.nan)
    (values, slope), (padded_values, padded_slope) = value_and_slope(batch), value_and_slope(padded)
    assert padded_values == pytest.approx(values, rel=1e-6)
    np.testing.assert_allclose(padded_slope[:4, :6], slope, rtol=1e-6)
    assert not padded_slope[4:].any()
    assert not padded_slope[:, 6:].any()
    assert values["sequences"] == 4


def test_microbatches_add_up_to_the_whole_batch() -> None:
    """Guards N: fixed over microbatches, it makes their gradients sum to the whole one's."""
    batch = make_batch()
    halves = [{name: x[part] for name, x in batch.items()} for part in (slice(0, 1), slice(1, 4))]
    slopes = [value_and_slope(half, num_sequences=4)[1] for half in halves]
    np.testing.assert_allclose(np.concatenate(slopes), value_and_slope(batch)[1], rtol=1e-6)


@pytest.mark.parametrize(("d", "hits"), [(200.0, 1), (-200.0, 0)])
def test_finite_far_from_theta_k(d: float, hits: int) -> None:
    """Guards exp(d) in float32; at +200 a gradient must remain to pull the policy back, and the hit is counted."""
    batch = {
        "logp_BT": np.array([[0.0, -1.0], [0.0, -1.0]], np.float32),
        "behavior_logp_BT": np.array([[0.0, -1.0], [0.0, -1.0 - d]], np.float32),
        "advantage_B": np.array([1.0, -1.0], np.float32),
        "mask_BT": np.array([[0.0, 1], [0, 1]], np.float32),
    }
    values, slope = value_and_slope(batch)
    assert np.isfinite(slope).all()
    assert np.isfinite(list(values.values())).all()
    assert values["d_max_hits"] == hits
    # minus exp(20) * (A - gamma * d) / N: the cap is on the ratio alone
    np.testing.assert_allclose(slope[1, 1], np.exp(20.0) * (1 + 0.3 * 200) / 2 if d > 0 else 0.0, rtol=1e-5)


@pytest.mark.parametrize("d", [200.0, -200.0])
def test_the_full_form_is_finite_far_from_theta_k(d: float) -> None:
    """Guards the prefix ratio in float32, and at +200 a pull back through both of its factors."""
    token, other = jnp.array([[0, 1, 0]]), jnp.array([[[0.0, 0, 0], [0, -d, 0], [0, 0, -40]]], jnp.float32)
    behavior = jax.nn.log_softmax(other)

    def loss(logits: jax.Array) -> jax.Array:
        logp = jax.nn.log_softmax(logits)
        kl = (jnp.exp(logp) * (logp - behavior)).sum(-1)
        picked, old = (jnp.take_along_axis(of, token[..., None], axis=-1)[..., 0] for of in (logp, behavior))
        mask, advantage = jnp.array([[0.0, 1, 1]]), jnp.zeros(1)
        return mdloo_loss(logp_BT=picked, behavior_logp_BT=old, advantage_B=advantage, mask_BT=mask, gamma=1.0, kl_BT=kl)[0]

    slope = np.asarray(jax.jit(jax.grad(loss))(jnp.zeros((1, 3, 3), jnp.float32)))
    assert np.isfinite(slope).all()
    assert not slope[0, 0].any()
    assert d < 0 or slope[0, 1, 1] > 1e6  # through the ratio before token 2, cut at e^20
    assert d < 0 or slope[0, 2, 2] > 1e6  # through the KL at token 2
    assert slope[0, 1].any()


def test_metrics_by_hand() -> None:
    """Guards what a run is steered by: two sequences with ratios 1 and 2."""
    zero = np.zeros((2, 2), np.float32)
    batch = {
        "logp_BT": zero,
        "behavior_logp_BT": np.array([[9.0, 0.0], [9.0, -np.log(2.0)]], np.float32),
        "advantage_B": np.array([1.0, 3.0], np.float32),
        "mask_BT": np.array([[0.0, 1], [0, 1]], np.float32),
    }
    values, _ = value_and_slope(batch)
    kl = (2 * np.log(2.0) - 1) / 2
    expected = {"kl_to_behavior": kl, "psi": 3.5 - 0.3 * kl, "ratio_mean": 1.5, "ratio_max": 2.0}
    assert {name: values[name] for name in expected} == pytest.approx(expected, rel=1e-6)
    assert values["effective_sample_fraction"] == pytest.approx(9 / 10)


def test_kl_metric_is_the_exact_kl_in_expectation() -> None:
    """Guards its direction: KL(pi_theta || pi_k), not the reverse."""
    theta = THETA_K + 0.3 * DIRECTION
    p, k = probabilities(theta), probabilities(THETA_K)

    def kl_of_one(logp_T: jax.Array, behavior_T: jax.Array, mask_T: jax.Array) -> jax.Array:
        row = {"logp_BT": logp_T[None], "behavior_logp_BT": behavior_T[None], "mask_BT": mask_T[None]}
        return mdloo_loss(**row, advantage_B=jnp.zeros(1), gamma=0.0)[1]["kl_to_behavior"]

    with jax.enable_x64(True):
        logp, behavior = token_logps(jnp.asarray(theta)), token_logps(jnp.asarray(THETA_K))
        one = np.asarray(jax.jit(jax.vmap(kl_of_one))(logp, behavior, MASK))
    np.testing.assert_allclose(k @ one, p @ np.log(p / k), rtol=1e-10)
    assert abs(k @ np.log(k / p) / (p @ np.log(p / k)) - 1) > 0.01


def test_dtypes_are_kept_and_half_precision_refused() -> None:
    """Guards float64 references and against sequence sums in bfloat16."""
    batch, jitted = make_batch(), jax.jit(mdloo_loss)
    assert jitted(**batch, gamma=0.1)[0].dtype == jnp.float32
    with jax.enable_x64(True):
        loss, metrics = jitted(**{**batch, "logp_BT": jnp.asarray(batch["logp_BT"], jnp.float64)}, gamma=0.1)
    assert loss.dtype == metrics["kl_to_behavior"].dtype == jnp.float64
    with pytest.raises(TypeError, match="bfloat16"):
        mdloo_loss(**{**batch, "logp_BT": jnp.asarray(batch["logp_BT"], jnp.bfloat16)}, gamma=0.1)
    with pytest.raises(ValueError, match="advantage_B must have shape"):
        mdloo_loss(**{**batch, "advantage_B": batch["advantage_B"][:, None]}, gamma=0.1)
