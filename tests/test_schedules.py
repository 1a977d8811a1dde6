"""Schedules at the points where they are known by hand, and the paper's table of pre-training recipes."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest

from afm_rl.schedules import PRETRAINING, StageRecipe, constant, rescaled_rope_base, warmup_cosine


def test_warmup_cosine_passes_through_its_known_points() -> None:
    """Guards the warm-up, the peak of exactly 1, the middle of the cosine, the end fraction and the hold after it."""
    schedule = warmup_cosine(10, 110, end_fraction=0.2)
    for t, expected in [(0, 0.0), (1, 0.1), (5, 0.5), (10, 1.0), (60, 0.6), (35, 0.2 + 0.4 * (1 + math.sqrt(0.5)))]:
        np.testing.assert_allclose(schedule(t), expected, rtol=1e-6, err_msg=f"t={t}")
    for t in (110, 111, 10_000):
        np.testing.assert_allclose(schedule(t), 0.2, rtol=1e-6)


def test_no_warmup_starts_at_the_peak() -> None:
    """Guards the division by a warm-up of zero steps."""
    assert float(warmup_cosine(0, 10, end_fraction=0.0)(0)) == 1.0
    assert float(constant()(0)) == 1.0


def test_constant_warms_up_and_stays() -> None:
    """Guards SFT's schedule."""
    schedule = constant(4)
    np.testing.assert_allclose([schedule(t) for t in (0, 1, 2, 4, 5, 1000)], [0, 0.25, 0.5, 1, 1, 1])


@pytest.mark.parametrize(("warmup", "total", "end"), [(10, 10, 0.1), (-1, 10, 0.1), (0, 10, 1.5), (0, 10, -0.1)])
def test_impossible_schedules_are_refused(warmup: int, total: int, end: float) -> None:
    """Guards against a warm-up that never reaches its peak, and an end fraction that is a learning rate by mistake."""
    with pytest.raises(ValueError, match="warmup_cosine"):
        warmup_cosine(warmup, total, end_fraction=end)


def test_rope_base_is_the_papers_constant() -> None:
    """Guards the scaling law: the paper's 6315089 has to come out of 500k, 8192 and 32768."""
    assert rescaled_rope_base(500_000.0, trained_length=8192, target_length=32_768) == 6_315_089.0
    assert rescaled_rope_base(500_000.0, trained_length=128, target_length=128) == 500_000.0
    with pytest.raises(ValueError, match="trained_length=6"):
        rescaled_rope_base(trained_length=6, target_length=32)


def test_the_table_holds_the_papers_numbers() -> None:
    """Guards the presets of 3.2.1-3.2.3, each with a source for every field."""
    core, continued, longer = (PRETRAINING[name] for name in ("core", "continued", "context_lengthening"))
    assert (core.peak_lr, core.warmup_steps, core.end_fraction, core.weight_decay) == (0.01, 5000, 0.005, 3.16e-4)
    assert (continued.peak_lr, continued.warmup_steps, continued.end_fraction) == (3e-4, 1000, 0.001)
    assert (continued.weight_decay, longer.weight_decay) == (1e-5, 1e-5)
    assert [r.sequence_length for r in (core, continued, longer)] == [4096, 8192, 32_768]
    assert [r.tokens for r in (core, continued, longer)] == [6.3e12, 1e12, 1e11]
    assert [r.rope_base for r in (core, continued, longer)] == [500_000.0, 500_000.0, 6_315_089.0]
    assert [r.distill_on_device for r in (core, continued, longer)] == [True, False, False]
    fields = {f.name for f in dataclasses.fields(StageRecipe)} - {"sources"}
    for name, recipe in PRETRAINING.items():
        assert set(recipe.sources) == fields, name


def test_a_stage_knows_its_steps_and_schedule() -> None:
    """Guards the step count (tokens / batch tokens) and that the schedule ends with it."""
    core = PRETRAINING["core"]
    assert core.total_steps == 375_509
    np.testing.assert_allclose(core.schedule()(core.total_steps), 0.005, rtol=1e-5)
    np.testing.assert_allclose(core.schedule(total_steps=6000)(6000), 0.005, rtol=1e-5)
