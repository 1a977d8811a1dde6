"""Bit allocation against brute force, and the sensitivity it is given against a hand-computed Fisher."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from quant.allocate import allocate
from quant.operations import operation_names, operations
from quant.palettize import palettize, storage_bits
from quant.sensitivity import error_table, fisher_diagonal, sensitivity


def brute_force(error: dict, storage: dict, budget: float) -> float:
    """Least error of every combination within the budget."""
    names = list(error)
    best = np.inf
    for combination in itertools.product(*(error[n] for n in names)):
        if sum(storage[n][b] for n, b in zip(names, combination, strict=True)) <= budget:
            best = min(best, sum(error[n][b] for n, b in zip(names, combination, strict=True)))
    return best


@pytest.mark.parametrize("target", [2.1, 2.5, 3.3, 3.5, 3.7, 4.0, 9.0])
def test_allocation_is_optimal(target: float) -> None:
    """Guards the knapsack (not a greedy one) over operations of very different sizes with 2, 3 or 4 bits."""
    rng = np.random.default_rng(int(10 * target))
    shapes = {f"op{i}": (16 * int(rng.integers(1, 9)), 16 * int(rng.integers(1, 9))) for i in range(8)}
    error = {n: {b: float(rng.gamma(0.5)) * 4.0**-b for b in (2, 3, 4)} for n in shapes}
    storage = {n: {b: storage_bits(s, bits=b, group_size=128) for b in (2, 3, 4)} for n, s in shapes.items()}
    weights = sum(a * b for a, b in shapes.values())
    result = allocate(error, storage, num_weights=weights, target_bits_per_weight=target)
    np.testing.assert_allclose(result.error, brute_force(error, storage, target * weights), rtol=1e-12)
    assert result.bits_per_weight <= target
    assert result.bits_per_weight == sum(storage[n][b] for n, b in result.bits.items()) / weights


def test_target_is_a_ceiling_used_up_to_one_operation() -> None:
    """Guards incommensurable sizes (the budget is rounded to units): never above, less than one operation unspent."""
    rng = np.random.default_rng(0)
    sizes = {f"op{i}": int(10 ** rng.uniform(4, 7)) for i in range(200)}
    error = {n: {2: float(e), 4: float(e) / 16} for n, e in zip(sizes, rng.gamma(0.3, size=200), strict=True)}
    storage = {n: {2: 2 * size + 977, 4: 4 * size + 3917} for n, size in sizes.items()}
    for target in (2.6, 3.5, 3.7):
        result = allocate(error, storage, num_weights=sum(sizes.values()), target_bits_per_weight=target)
        unspent = (target - result.bits_per_weight) * sum(sizes.values())
        waiting = [storage[n][4] - storage[n][2] for n, b in result.bits.items() if b == 2]
        assert 0 <= unspent < min(waiting)


def test_sensitive_operations_keep_four_bits() -> None:
    """Guards the direction: at equal sizes the least sensitive ones are pushed to 2 bits; generous targets push none."""
    error = {f"op{i}": {2: 10.0**i, 4: 0.0} for i in range(4)}
    storage = {n: {2: 2000, 4: 4000} for n in error}
    result = allocate(error, storage, num_weights=4000, target_bits_per_weight=3.0)
    assert result.bits == {"op0": 2, "op1": 2, "op2": 4, "op3": 4}
    assert result.bits_per_weight == 3.0
    assert set(allocate(error, storage, num_weights=4000, target_bits_per_weight=4.0).bits.values()) == {4}


def test_impossible_targets_and_bad_tables_are_refused() -> None:
    """Guards the message: what is the least that can be had, tables included."""
    with pytest.raises(ValueError, match=r"2 bits per weight cannot be reached.* come to 2\.5"):
        allocate({"op": {2: 1.0, 4: 0.0}}, {"op": {2: 250, 4: 450}}, num_weights=100, target_bits_per_weight=2)
    with pytest.raises(ValueError, match="finite"):
        allocate({"op": {2: np.nan}}, {"op": {2: 250}}, num_weights=100, target_bits_per_weight=4)
    with pytest.raises(ValueError, match="at least one operation"):
        allocate({}, {}, num_weights=1, target_bits_per_weight=4)


def test_sensitivity_by_hand() -> None:
    """Guards the mean of SQUARED gradients (not the square of the mean) and the half in front."""
    shapes = {"q": (2, 3), "k": (2, 3), "v": (2, 3), "o": (3, 2), "gate": (4, 3), "up": (4, 3), "down": (3, 4)}
    gradients = [{"layers": {n: np.full((2, *s), g) for n, s in shapes.items()}} for g in (1.0, -3.0)]
    fisher = fisher_diagonal(gradients)
    assert list(fisher) == operation_names(2)
    np.testing.assert_array_equal(fisher["layers.1.down"], np.full((3, 4), 5.0))
    weight = np.array([[0.0, 1.0, 2.0], [0.0, 0.0, 0.0]])
    coarse = palettize(weight, bits=1, group_size=2)  # {0} and {1, 2} -> 0 and 1.5
    assert sensitivity(weight, coarse, fisher["layers.0.q"]) == 0.5 * 5.0 * (0.25 + 0.25)
    table = error_table({"layers.0.q": weight}, {"layers.0.q": {1: coarse}}, fisher)
    assert table == {"layers.0.q": {1: 1.25}}


def test_sensitivity_refuses_what_it_cannot_measure() -> None:
    """Guards no batch at all and a gradient that is not finite (named)."""
    with pytest.raises(ValueError, match="at least one batch"):
        fisher_diagonal([])
    tree = {"layers": {n: np.zeros((1, 2, 2)) for n in ("q", "k", "v", "o", "gate", "up", "down")}}
    tree["layers"]["up"][0, 0, 0] = np.inf
    with pytest.raises(ValueError, match=r"gradient 1 of layers\.0\.up is not finite"):
        fisher_diagonal([tree])


def test_operations_run_layer_by_layer() -> None:
    """Guards the names, and that each is the matrix of its own layer."""
    tree = {"layers": {n: np.arange(2.0).reshape(2, 1, 1) for n in ("q", "k", "v", "o", "gate", "up", "down")}}
    found = operations(tree)
    assert list(found)[:8] == [*(f"layers.0.{n}" for n in ("q", "k", "v", "o", "gate", "up", "down")), "layers.1.q"]
    assert found["layers.1.up"].item() == 1.0
