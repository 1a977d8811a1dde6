"""Palettization against an exact dynamic programme, and at the edges of what weights can be."""

from __future__ import annotations

import numpy as np
import pytest

from quant.kmeans import kmeans_1d
from quant.palettize import palettize, quantize_embedding, storage_bits


def exact_error(x: np.ndarray, k: int, w: np.ndarray | None = None) -> float:
    """Least weighted squared error of k intervals: O(n^2 k) dynamic programming over Welford's exact interval errors."""
    order, n = np.argsort(x), len(x)
    x, w = x[order].astype(np.float64), np.ones(n) if w is None else w[order]
    cost = np.full((n + 1, n + 1), np.inf)  # cost[i, j]: x[i:j] as one cluster
    np.fill_diagonal(cost, 0.0)
    weight, mean, error = np.zeros(n), np.zeros(n), np.zeros(n)
    for j in range(n):
        started = slice(0, j + 1)
        weight[started] += w[j]
        off = x[j] - mean[started]
        mean[started] += off * w[j] / weight[started]
        error[started] += w[j] * off * (x[j] - mean[started])
        cost[started, j + 1] = error[started]
    best = cost[0]
    for _ in range(k - 1):
        best = (best[:, None] + cost).min(axis=0)
    return float(best[-1])


def error_of(x: np.ndarray, centres: np.ndarray, w: np.ndarray | None = None) -> float:
    squares = np.square(x[:, None].astype(np.float64) - centres).min(axis=1)
    return float((squares if w is None else squares * w).sum())


def lloyd(x: np.ndarray, k: int) -> np.ndarray:
    """Lloyd's algorithm from quantiles, to convergence."""
    centres = np.quantile(x, (np.arange(k) + 0.5) / k)
    for _ in range(300):
        label = np.abs(x[:, None] - centres).argmin(axis=1)
        centres = np.array([x[label == j].mean() if (label == j).any() else centres[j] for j in range(k)])
    return centres


def draw(name: str, n: int, rng: np.random.Generator) -> np.ndarray:
    normal = rng.normal(size=n)
    return {
        "normal": normal,
        "heavy": rng.standard_t(2, size=n),
        "uniform": rng.random(n),
        "outliers": np.concatenate([1e-3 * normal[5:], 1e3 * normal[:5]]),
        "far outliers": np.concatenate([1e-3 * normal[3:], [-1e6, -1.1e6, 2e6]]),
        "far from zero": 1 + 1e-3 * normal,
        "tiny": 1e-30 * normal,
        "coarse": np.round(16 * normal) / 16,
        "modes": rng.choice(rng.normal(size=24), n) + 1e-3 * normal,
    }[name]


@pytest.mark.parametrize("k", [4, 16])
@pytest.mark.parametrize(
    "name", ["normal", "heavy", "uniform", "outliers", "far outliers", "far from zero", "tiny", "coarse", "modes"]
)
def test_kmeans_is_near_the_exact_optimum(name: str, k: int) -> None:
    """Guards the coarse-to-fine search on every kind of weights: within 1 % of the optimum, no worse than Lloyd."""
    rng = np.random.default_rng(0)
    groups = np.stack([draw(name, 300, rng) for _ in range(4)])
    for x, centres in zip(groups, kmeans_1d(groups, k), strict=True):
        error = error_of(x, centres)
        assert error <= 1.01 * exact_error(x, k) + 1e-300
        assert error <= error_of(x, lloyd(x, k)) * (1 + 1e-9)
        assert (np.diff(centres) >= 0).all()


def test_kmeans_weighs_by_importance() -> None:
    """Guards weighted means and boundaries, with weights over six decades and with a few clumps of heavy values."""
    rng = np.random.default_rng(1)
    x = np.sort(rng.normal(size=(2, 400)), axis=1)
    w = np.stack([np.exp(3 * rng.normal(size=400)), np.where(np.arange(400) % 100 < 6, 1e4, 1.0)])
    for row, centres in enumerate(kmeans_1d(x, 16, w)):
        best = exact_error(x[row], 16, w[row])
        assert error_of(x[row], centres, w[row]) <= 1.01 * best
        assert error_of(x[row], kmeans_1d(x, 16)[row], w[row]) > 1.5 * best


def test_large_groups_agree_with_small_ones() -> None:
    """Guards the fine windows and the chunks of groups: 5,000 values, each repeated, cost as the distinct ones do."""
    x = np.random.default_rng(2).normal(size=(3, 500))
    repeated = kmeans_1d(np.repeat(x, 10, axis=1), 16)
    for row in range(3):
        assert 10 * error_of(x[row], repeated[row]) <= 1.01 * 10 * exact_error(x[row], 16)


def test_four_bits_by_hand() -> None:
    """Guards group, table and index on a matrix with at most 4 values in each pair of rows, exactly representable."""
    weight = np.array([[1, 2, 2, 8], [8, -4, 1, 2], [0, 0, 0.5, 0.5], [0.5, 0, 0, 0]], np.float32)
    result = palettize(weight, bits=2, group_size=2)
    np.testing.assert_array_equal(result.lut[0], [-4, 1, 2, 8])
    np.testing.assert_array_equal(result.indices[:2], [[1, 2, 2, 3], [3, 0, 1, 2]])
    np.testing.assert_array_equal(result.dequantize(), weight)
    assert result.lut.dtype == np.float16
    assert result.bits_per_weight == (16 * 2 + 2 * 4 * 16) / 16


@pytest.mark.parametrize("axis", [0, 1])
def test_groups_share_tables_along_the_axis(axis: int) -> None:
    """Guards the axis, a short last group, and the storage formula that the allocation relies on."""
    weight = np.random.default_rng(3).normal(size=(20, 28)).astype(np.float32)
    result = palettize(weight, bits=3, group_size=16, axis=axis)
    assert result.lut.shape == (2, 8)
    assert result.storage_bits == storage_bits((20, 28), bits=3, group_size=16, axis=axis) == 20 * 28 * 3 + 2 * 8 * 16
    for group in range(2):
        block = slice(16 * group, 16 * group + 16)
        values = weight[block] if axis == 0 else weight[:, block]
        found = result.dequantize()[block] if axis == 0 else result.dequantize()[:, block]
        assert np.square(found - values).sum() <= 1.01 * exact_error(values.ravel(), 8) + 1e-4
        nearest = np.abs(values[..., None] - result.lut[group].astype(np.float32)).min(axis=-1)
        np.testing.assert_allclose(np.abs(found - values), nearest, atol=1e-7)


def test_importance_protects_what_matters() -> None:
    """Guards the importance's path through the groups: marked weights come out closer; a group may have none at all."""
    weight = np.random.default_rng(4).normal(size=(32, 64)).astype(np.float32)
    importance = np.where(np.abs(weight - 1) < 0.3, 1.0, 0.0)
    importance[16:] = 0.0
    marked = importance > 0
    squared = np.square(palettize(weight, bits=2, importance=importance).dequantize() - weight)
    plain = np.square(palettize(weight, bits=2).dequantize() - weight)
    assert squared[marked].sum() < 0.1 * plain[marked].sum()
    np.testing.assert_allclose(squared[16:].sum(), plain[16:].sum(), rtol=1e-2)


def test_degenerate_matrices() -> None:
    """Guards constants, zeros, fewer values than table entries, a single weight, signed zeros, and other dtypes."""
    rng = np.random.default_rng(5)
    for weight in (np.zeros((16, 8)), np.full((16, 8), 0.25), np.array([[1.0]]), rng.normal(size=(1, 7)).astype("f2")):
        np.testing.assert_array_equal(palettize(weight, bits=4).dequantize(), weight)
    np.testing.assert_array_equal(palettize(np.array([[-0.0, 0.0, 1.0, -1.0]]), bits=2).dequantize(), [[0, 0, 1, -1]])
    tiny = 1e-30 * rng.normal(size=(16, 32)).astype(np.float32)
    error = np.square(palettize(tiny, bits=4, lut_dtype="float32").dequantize() / 1e-30 - tiny / 1e-30).mean()
    assert error < 0.01
    assert np.abs(palettize(tiny, bits=4).dequantize()).max() == 0  # below what float16 resolves


def test_damaged_weights_and_bad_options_are_refused() -> None:
    """Guards against a silent NaN: first position named; overflow of the table; options out of range."""
    weight = np.random.default_rng(6).normal(size=(16, 8))
    damaged = weight.copy()
    damaged[3, 5] = np.nan
    with pytest.raises(ValueError, match=r"1 weights are NaN or infinite, the first at \(3, 5\)"):
        palettize(damaged, bits=4)
    with pytest.raises(ValueError, match="overflow a float16 table"):
        palettize(1e6 * weight, bits=4)
    assert np.isfinite(palettize(1e6 * weight, bits=4, lut_dtype="float32").lut).all()
    for options, message in [
        ({"bits": 9}, "bits must be 1 to 8"),
        ({"bits": 4, "group_size": 0}, "group_size"),
        ({"bits": 4, "axis": 2}, "axis"),
        ({"bits": 4, "importance": -np.ones((16, 8))}, "not negative"),
        ({"bits": 4, "importance": np.ones((8, 16))}, "weight's shape"),
    ]:
        with pytest.raises(ValueError, match=message):
            palettize(weight, **options)
    with pytest.raises(ValueError, match=r"matrix \[out, in\]"):
        palettize(weight[None], bits=4)


def test_int8_embedding() -> None:
    """Guards the scale per row: error at most half a step of that row, however large the others; rows of zeros."""
    weight = (
        np.random.default_rng(7).normal(size=(6, 32)).astype(np.float32)
        * np.array([1, 1e-3, 1e3, 0, 5, 1e-20], np.float32)[:, None]
    )
    result = quantize_embedding(weight)
    assert result.values.dtype == np.int8
    assert (np.abs(result.values).max(axis=1)[[0, 1, 2, 4]] == 127).all()
    error = np.abs(result.dequantize() - weight)
    assert (error <= 0.501 * np.abs(weight).max(axis=1, keepdims=True) / 127).all()
    with pytest.raises(ValueError, match="NaN"):
        quantize_embedding(np.full((2, 2), np.inf))
