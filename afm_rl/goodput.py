"""Where a training process's time goes: waiting for data, compiling, stepping, checkpointing, restarting.

Goodput is the share of the time that went into steps (3.3 reports MFU, which only looks at steps). Compiling happens inside
other calls; JAX reports its seconds, which are counted apart and taken off the call they happened in.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import jax

KINDS = ("data_wait", "compile", "step", "checkpoint", "restart")
_COMPILE_EVENTS = "/jax/core/compile/"


class _CompileClock:
    """Seconds that this process has spent tracing, lowering and compiling programs."""

    def __init__(self) -> None:
        self.seconds = 0.0
        jax.monitoring.register_event_duration_secs_listener(self._heard)

    def _heard(self, event: str, duration_secs: float, **_: str | int) -> None:
        if event.startswith(_COMPILE_EVENTS):
            self.seconds += duration_secs


_clock = _CompileClock()


class Goodput:
    """Seconds by kind since construction."""

    def __init__(self) -> None:
        self.seconds = dict.fromkeys(KINDS, 0.0)

    @contextmanager
    def measure(self, kind: str) -> Iterator[None]:
        """Count the block's seconds as `kind`, but for those in which something was compiled."""
        started, compiled = time.perf_counter(), _clock.seconds
        try:
            yield
        finally:
            compile_s = _clock.seconds - compiled
            self.seconds["compile"] += compile_s
            self.seconds[kind] += max(0.0, time.perf_counter() - started - compile_s)

    def add(self, kind: str, seconds: float) -> None:
        """Count seconds that were measured elsewhere."""
        self.seconds[kind] += seconds

    def summary(self) -> dict[str, float]:
        """`KIND_s` of every kind, and `goodput`, the share of steps in their sum (0 before the first)."""
        total = sum(self.seconds.values())
        share = self.seconds["step"] / total if total else 0.0
        return {**{f"{kind}_s": seconds for kind, seconds in self.seconds.items()}, "goodput": share}
