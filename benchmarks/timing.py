"""Seconds of work on this machine, for the measurements of our own side."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import jax


def seconds_of(run: Callable[[], Any], *, reps: int) -> float:
    """Median seconds of `reps` runs after one that compiles."""
    jax.block_until_ready(run())
    seconds = []
    for _ in range(reps):
        before = time.perf_counter()
        jax.block_until_ready(run())
        seconds.append(time.perf_counter() - before)
    return statistics.median(seconds)
