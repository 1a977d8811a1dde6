"""Which operations are pushed to fewer bits (5.2.1, mixed precision): the smallest error within an average bit budget.

A multiple-choice knapsack: each operation takes one of its bit widths, the sum of the errors is to be least, and the
average, lookup tables included, must stay at or below the target (3.7 in production, 3.5 the limit). Solved by dynamic
programming over the budget; where sizes have no large common divisor the budget is counted in slightly coarse units,
and what rounding left over is spent afterwards. The paper chooses with an interactive tool (Talaria); this is the
automatic part.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

#: The budget is counted in at most this many units.
_MAX_UNITS = 50_000


@dataclass(frozen=True)
class Allocation:
    """Bits of every operation, the average they come to (tables included) and the sum of the errors."""

    bits: dict[str, int]
    bits_per_weight: float
    error: float


def allocate(
    error: Mapping[str, Mapping[int, float]],
    storage_bits: Mapping[str, Mapping[int, int]],
    *,
    num_weights: int,
    target_bits_per_weight: float,
) -> Allocation:
    """Choose bits per operation: least total error with total storage <= target_bits_per_weight * num_weights.

    Args:
      error: operation -> bits -> error (`quant/sensitivity.py`), finite.
      storage_bits: operation -> bits -> what it takes, tables included (`quant/palettize.py`).
      num_weights: weights of all the operations together.
      target_bits_per_weight: the ceiling.
    Raises ValueError when even the fewest bits exceed the target, naming the least that is possible.
    """
    names = list(error)
    if not names or any(not error[n] or set(error[n]) - set(storage_bits[n]) for n in names):
        raise ValueError("allocate needs at least one operation, and storage for every bit width that has an error")
    if not all(math.isfinite(e) for n in names for e in error[n].values()):
        raise ValueError("errors must be finite")
    budget = math.floor(target_bits_per_weight * num_weights)
    least = sum(min(storage_bits[n][b] for b in error[n]) for n in names)
    if least > budget:
        raise ValueError(
            f"{target_bits_per_weight:g} bits per weight cannot be reached: the fewest bits of every operation come to "
            f"{least / num_weights:.4g}, lookup tables included; raise the target or the group size"
        )
    bits = _knapsack(names, error, storage_bits, budget)
    _spend_rest(bits, error, storage_bits, budget)
    return Allocation(
        bits=bits,
        bits_per_weight=sum(storage_bits[n][bits[n]] for n in names) / num_weights,
        error=sum(error[n][bits[n]] for n in names),
    )


def _knapsack(
    names: list[str],
    error: Mapping[str, Mapping[int, float]],
    storage_bits: Mapping[str, Mapping[int, int]],
    budget: int,
) -> dict[str, int]:
    """The optimum with every choice's extra storage over its operation's least counted in whole units, rounded up."""
    least = {n: min(storage_bits[n][b] for b in error[n]) for n in names}
    spare = budget - sum(least.values())
    extra = {n: {b: storage_bits[n][b] - least[n] for b in error[n]} for n in names}
    common = math.gcd(*(e for by_bits in extra.values() for e in by_bits.values())) or 1
    unit = common * -(-(spare // common + 1) // _MAX_UNITS)
    units = spare // unit + 1
    best = np.zeros(units)  # best[u]: least error with at most u units spent
    choices = []
    for name in names:
        options = sorted(error[name])
        totals = np.full((len(options), units), np.inf)
        for row, bits in enumerate(options):
            cost = -(-extra[name][bits] // unit)
            if cost < units:
                totals[row, cost:] = best[: units - cost] + error[name][bits]
        choice = totals.argmin(axis=0).astype(np.uint8)
        best = np.take_along_axis(totals, choice[None].astype(np.int64), axis=0)[0]
        choices.append(choice)
    chosen, left = {}, units - 1
    for name, choice in zip(reversed(names), reversed(choices), strict=True):
        chosen[name] = sorted(error[name])[choice[left]]
        left -= -(-extra[name][chosen[name]] // unit)
    return {name: chosen[name] for name in names}


def _spend_rest(
    bits: dict[str, int],
    error: Mapping[str, Mapping[int, float]],
    storage_bits: Mapping[str, Mapping[int, int]],
    budget: int,
) -> None:
    """Take the best improvement that still fits, until none does."""
    while True:
        rest = budget - sum(storage_bits[n][b] for n, b in bits.items())
        gains = [
            (error[n][bits[n]] - e, n, b)
            for n, by_bits in error.items()
            for b, e in by_bits.items()
            if e < error[n][bits[n]] and storage_bits[n][b] - storage_bits[n][bits[n]] <= rest
        ]
        if not gains:
            return
        _, name, chosen = max(gains)
        bits[name] = chosen
