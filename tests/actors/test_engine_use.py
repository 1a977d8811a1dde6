"""Metrics of engines: by hand, over restarts, and as live gauges."""

from __future__ import annotations

from collections.abc import Mapping

import pytest

from actors.engine_use import LIVE_EVERY_S, EngineUse, LiveGauges
from actors.metrics import ENGINE_STAGE

BEFORE = EngineUse(
    steps=10, busy_s=1.0, prompt_tokens=100, cached_prompt_tokens=0, response_tokens=50, row_steps=80, occupied_row_steps=8
)
AFTER = EngineUse(
    steps=14,
    busy_s=3.0,
    prompt_tokens=130,
    cached_prompt_tokens=90,
    response_tokens=250,
    row_steps=112,
    guessed_tokens=21,
    kept_tokens=7,
    verified_rows=5,
    occupied_row_steps=32,
    queued_steps=6,
    preemptions=2,
    compiled_programs=5,
    running=3,
    pages=9,
    version=7,
)


def test_metrics_by_hand() -> None:
    """Guards their meaning: shares and speeds of the span alone, programs and version as they are now."""
    metrics = AFTER.since(BEFORE).metrics()
    assert metrics == {
        "tokens_per_s": 100.0,  # 200 in 2 s
        "batch_occupancy": 0.75,  # 24 of 32 rows
        "cache_hit_rate": 0.75,  # 90 of 120 prompt tokens
        "queue_depth": 1.5,  # 6 requests waited over 4 steps
        "accepted_per_step": 1.4,  # 7 tokens over 5 passes of a row
        "preemptions": 2,
        "response_tokens": 200,
        "engine_steps": 4,
        "compiled_programs": 5,
        "weights_version": 7,
    }
    nothing = AFTER.since(AFTER).metrics()
    assert nothing == {
        **dict.fromkeys(("preemptions", "response_tokens", "engine_steps"), 0),
        "compiled_programs": 5,
        "weights_version": 7,
    }


def test_a_restart_in_between_counts_from_its_start() -> None:
    """Guards against negative speeds: counters that went back are those of a new life."""
    assert BEFORE.since(AFTER) == BEFORE


def test_engines_add_up_and_a_retired_one_holds_nothing() -> None:
    """Guards an actor with several engines: work adds up, the state of one that is gone does not count."""
    both = AFTER + BEFORE.retired()
    assert (both.steps, both.response_tokens, both.version) == (24, 300, 7)
    twice = AFTER.retired() + AFTER
    assert (twice.pages, twice.compiled_programs, twice.preemptions) == (AFTER.pages, AFTER.compiled_programs, 4)


class Sink:
    def __init__(self) -> None:
        self.rows: list[tuple[str, str, int, Mapping[str, float]]] = []

    def log(self, *, stage: str, task: str, step: int, values: Mapping[str, float]) -> None:
        self.rows.append((stage, task, step, values))

    def close(self) -> None:
        """Nothing to close."""


def test_live_gauges_are_set_every_few_seconds_and_when_all_is_done() -> None:
    """Guards the dashboard: no row a step, the first at once, and the last one shows an idle engine."""
    now_s, sink = [0.0], Sink()
    gauges = LiveGauges("sampler-0", [sink], clock=lambda: now_s[0])
    gauges.update(lambda: BEFORE, busy=True)
    for _ in range(9):
        now_s[0] += LIVE_EVERY_S / 10
        gauges.update(lambda: pytest.fail("too early"), busy=True)
    now_s[0] += LIVE_EVERY_S / 10
    gauges.update(lambda: AFTER, busy=True)
    gauges.update(lambda: AFTER, busy=False)
    assert [(stage, task, step) for stage, task, step, _ in sink.rows] == [
        (ENGINE_STAGE, "sampler-0", n) for n in (10, 14, 14)
    ]
    assert sink.rows[1][3]["tokens_per_s"] == 100.0
    assert (sink.rows[1][3]["running"], sink.rows[1][3]["free_page_share"]) == (3, 0.0)
