"""Soft-Top-K against bisection, the optimality conditions and finite differences, all in float64."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pretrain.soft_topk import soft_topk

solve = jax.jit(soft_topk)


def bisected(scores: np.ndarray, k: float, eps: float) -> np.ndarray:
    """l = min(1, exp(s / eps - t)), the threshold t found by bisection."""
    x = scores.astype(np.float64) / eps
    low, high = x.min() - 1.0, x.max() + np.log(len(x)) + 1.0
    for _ in range(300):
        middle = (low + high) / 2
        low, high = (middle, high) if np.exp(np.minimum(x - middle, 0)).sum() > k else (low, middle)
    return np.exp(np.minimum(x - (low + high) / 2, 0))


def fixed_point(scores: np.ndarray, k: float, eps: float, rounds: int = 20) -> np.ndarray:
    """The usual iteration: c <- c * k / sum min(1, c e^x)."""
    x = scores / eps
    log_c = np.log(k) - np.log(np.exp(x - x.max()).sum()) - x.max()
    for _ in range(rounds):
        log_c += np.log(k / np.exp(np.minimum(x + log_c, 0)).sum())
    return np.exp(np.minimum(x + log_c, 0))


@pytest.mark.parametrize("spread", [1e-3, 0.1, 1.0, 30.0, 1000.0])
@pytest.mark.parametrize("k", [1, 2.5, 50, 199, 200])
def test_solution_matches_bisection(spread: float, k: float) -> None:
    """Guards the number of saturated entries at every spread of scores, whole and fractional k, k = 1 and k = n."""
    scores = spread * np.random.default_rng(0).normal(size=200)
    with jax.enable_x64(True):
        mask = np.asarray(solve(jnp.asarray(scores), k=k, eps=0.5))
    np.testing.assert_allclose(mask, bisected(scores, k, 0.5), atol=1e-9)


def test_sum_is_k_in_float32_where_the_fixed_point_misses() -> None:
    """Guards sum l = k to 1e-5 for spread scores, in float32 and for each layer of a batch at once."""
    scores = np.random.default_rng(1).standard_t(2, size=(3, 400)) * np.array([[0.1], [5.0], [100.0]])
    mask = np.asarray(solve(jnp.asarray(scores, jnp.float32), k=120, eps=0.3), np.float64)
    np.testing.assert_allclose(mask.sum(axis=-1), 120, rtol=1e-5)
    assert mask.min() >= 0
    assert mask.max() <= 1
    for row in range(3):
        np.testing.assert_allclose(mask[row], bisected(np.float32(scores[row]), 120, np.float32(0.3)), atol=2e-4)
    assert max(abs(fixed_point(row, 120, 0.3).sum() - 120) for row in scores) > 1


def test_ties_equal_scores_and_duplicates() -> None:
    """Guards scores that are all equal (l = k / n) and a saturated pair of equal ones."""
    np.testing.assert_allclose(solve(jnp.zeros(8), k=3, eps=0.1), np.full(8, 3 / 8), rtol=1e-6)
    mask = solve(jnp.array([5.0, 5.0, 0.0, 0.0, -1e30]), k=3, eps=0.1)
    np.testing.assert_allclose(mask, [1, 1, 0.5, 0.5, 0], atol=1e-6)
    np.testing.assert_array_equal(solve(jnp.array([3.0, -2.0]), k=2, eps=0.01), [1, 1])


def test_small_eps_is_the_hard_top_k() -> None:
    """Guards the limit that pruning ends in, with scores a thousand eps apart."""
    scores = np.random.default_rng(2).permutation(64).astype(np.float32)
    mask = np.asarray(solve(jnp.asarray(scores), k=10, eps=1e-3))
    np.testing.assert_array_equal(mask, scores >= 54)


@pytest.mark.parametrize("eps", [0.05, 0.4, 3.0])
def test_gradient_is_exact(eps: float) -> None:
    """Guards the closed-form derivative (in scores, eps and k) against central differences of the bisected solution."""
    rng = np.random.default_rng(3)
    scores, cotangent, k, h = rng.normal(size=12), rng.normal(size=12), 4.0, 1e-5
    with jax.enable_x64(True):
        value = lambda s, k, eps: jnp.vdot(cotangent, soft_topk(s, k, eps))
        grads = jax.jit(jax.grad(value, argnums=(0, 1, 2)))(jnp.asarray(scores), k, eps)
        d_scores, d_k, d_eps = (np.asarray(g) for g in grads)
    along = lambda s, k, eps: cotangent @ bisected(s, k, eps)
    for i, unit in enumerate(np.eye(12)):
        expected = (along(scores + h * unit, k, eps) - along(scores - h * unit, k, eps)) / (2 * h)
        assert abs(d_scores[i] - expected) < 1e-6, i
    assert abs(d_k - (along(scores, k + h, eps) - along(scores, k - h, eps)) / (2 * h)) < 1e-6
    assert abs(d_eps - (along(scores, k, eps + h) - along(scores, k, eps - h)) / (2 * h)) < 1e-5


def test_gradient_conserves_k_and_skips_saturated() -> None:
    """Guards d(sum l) = 0, zero gradient of entries held at 1, and finiteness at extreme spreads."""
    scores = jnp.array([9.0, 8.0, 0.3, 0.1, -0.2, -5.0])
    gradient = jax.jit(jax.grad(lambda s: soft_topk(s, 3, 0.5)[3]))(scores)
    spread_gradient = jax.jit(jax.grad(lambda s, spread: soft_topk(s * spread, 3, 0.5).dot(jnp.arange(6.0))))
    assert abs(float(gradient.sum())) < 1e-6
    np.testing.assert_array_equal(gradient[:2], [0, 0])
    assert float(gradient[3]) > 0
    for spread in (1e-20, 1e4, 1e20):
        assert np.isfinite(spread_gradient(scores, spread)).all()


def test_solution_maximises_the_objective() -> None:
    """Guards the equation itself: no feasible exchange of mass raises s . l + eps * H(l)."""
    rng = np.random.default_rng(4)
    scores, k, eps = rng.normal(size=20), 6.0, 0.7
    with jax.enable_x64(True):
        mask = np.asarray(solve(jnp.asarray(scores), k, eps))

    def objective(l: np.ndarray) -> float:  # noqa: E741
        return float(scores @ l - eps * np.sum(l * np.log(np.maximum(l, 1e-300))))

    best = objective(mask)
    for _ in range(500):
        i, j = rng.choice(20, 2, replace=False)
        amount = min(1e-3, 1 - mask[i], mask[j])
        other = mask.copy()
        other[i] += amount
        other[j] -= amount
        assert objective(other) <= best + 1e-12


def test_k_out_of_range_is_refused() -> None:
    """Guards the two impossible requests."""
    for k in (0, 9):
        with pytest.raises(ValueError, match=f"number of scores, 8; got {k}"):
            partial(soft_topk, k=k, eps=1.0)(jnp.zeros(8))
