"""What a sampler's engine did, as counters, and the metrics that two looks at them give: speed, occupancy, cache hits.

Counters only grow within one life of an actor, so a metric of any span is the difference of two looks; a look with less than
the one before is that of a new life. The same metrics are set as live gauges while an actor generates.
"""

from __future__ import annotations

import dataclasses
import math
import threading
import time
from collections.abc import Callable, Sequence

from actors.metrics import ENGINE_STAGE, Metrics, MetricsSink

#: Seconds between two settings of the live gauges.
LIVE_EVERY_S = 5.0
#: What only grows.
COUNTERS = (
    "prompt_tokens",
    "cached_prompt_tokens",
    "response_tokens",
    "steps",
    "preemptions",
    "occupied_row_steps",
    "row_steps",
    "guessed_tokens",
    "kept_tokens",
    "verified_rows",
    "busy_s",
    "queued_steps",
)
#: What does not add up over engines.
LARGER = ("compiled_programs", "version")


@dataclasses.dataclass(frozen=True, kw_only=True)
class EngineUse:
    """Counters since the start, summed over an actor's engines; then its state, compiled programs included.

    `prompt_tokens` were computed, `cached_prompt_tokens` found; `queued_steps` adds up the responses waiting at every step;
    `occupied_row_steps` of `row_steps` rows had a response in them; `kept_tokens` of `guessed_tokens` were accepted over
    `verified_rows` passes of a row (speculation); `busy_s` is time spent in steps.
    """

    prompt_tokens: int = 0
    cached_prompt_tokens: int = 0
    response_tokens: int = 0
    steps: int = 0
    preemptions: int = 0
    occupied_row_steps: int = 0
    row_steps: int = 0
    guessed_tokens: int = 0
    kept_tokens: int = 0
    verified_rows: int = 0
    busy_s: float = 0.0
    queued_steps: int = 0
    compiled_programs: int = 0
    running: int = 0
    waiting: int = 0
    free_pages: int = 0
    pages: int = 0
    version: int = -1

    @staticmethod
    def of_generator() -> list[str]:
        """The fields that a generator counts itself."""
        return [f.name for f in dataclasses.fields(EngineUse) if f.name not in ("busy_s", "queued_steps", "version")]

    def __add__(self, other: EngineUse) -> EngineUse:
        """Of two engines together: the newer version, and the larger number of programs, which like engines share."""
        mine, its = dataclasses.asdict(self), dataclasses.asdict(other)
        return EngineUse(**{name: (max if name in LARGER else sum)((mine[name], its[name])) for name in mine})

    def since(self, before: EngineUse) -> EngineUse:
        """What was done after an earlier look, the state being that of now."""
        if self.steps < before.steps or self.busy_s < before.busy_s:
            return self  # the actor was started anew in between
        done = {name: getattr(self, name) - getattr(before, name) for name in COUNTERS}
        return dataclasses.replace(self, **done)

    def retired(self) -> EngineUse:
        """Of an engine that is gone: what it did counts, what it held does not."""
        return dataclasses.replace(self, running=0, waiting=0, free_pages=0, pages=0)

    def metrics(self) -> dict[str, float]:
        """The metrics of a span of time, without those of what was not done in it. Tokens a second: of time in steps."""
        shares = {
            "tokens_per_s": (self.response_tokens, self.busy_s),
            "batch_occupancy": (self.occupied_row_steps, self.row_steps),
            "cache_hit_rate": (self.cached_prompt_tokens, self.cached_prompt_tokens + self.prompt_tokens),
            "queue_depth": (self.queued_steps, self.steps),
            "accepted_per_step": (self.kept_tokens, self.verified_rows),
        }
        return {
            **{name: part / whole for name, (part, whole) in shares.items() if whole > 0},
            "preemptions": self.preemptions,
            "response_tokens": self.response_tokens,
            "engine_steps": self.steps,
            "compiled_programs": self.compiled_programs,
            "weights_version": self.version,
        }


class LiveGauges:
    """Sets an actor's metrics where it runs, every few seconds while it generates. For any thread."""

    def __init__(self, name: str, sinks: Sequence[MetricsSink], clock: Callable[[], float] = time.monotonic) -> None:
        self._name, self._metrics, self._clock = name, Metrics(sinks), clock
        self._lock = threading.Lock()
        self._seen, self._due_s = EngineUse(), -math.inf

    def update(self, look: Callable[[], EngineUse], *, busy: bool) -> None:
        """Set the gauges if they are due, or if there is nothing left to do."""
        with self._lock:
            if not self._metrics.sinks or (busy and self._clock() < self._due_s):
                return
            before, self._seen, self._due_s = self._seen, look(), self._clock() + LIVE_EVERY_S
            now = self._seen
            state = {"running": now.running, "waiting": now.waiting, "free_page_share": now.free_pages / max(1, now.pages)}
            values = {**now.since(before).metrics(), **state}
            self._metrics.log(stage=ENGINE_STAGE, task=self._name, step=now.steps, values=values)
