"""Sampling options on the host: what is refused, and rows that padding leaves neutral."""

from __future__ import annotations

import math

import numpy as np
import pytest

from afm_rl.generation.sampling import check_options, full_rows
from afm_rl.types import PLAIN, SamplingOptions


@pytest.mark.parametrize(
    ("options", "field", "value"),
    [
        (SamplingOptions(top_k=-1), "top_k", "-1"),
        (SamplingOptions(top_p=0.0), "top_p", "0.0"),
        (SamplingOptions(top_p=1.01), "top_p", "1.01"),
        (SamplingOptions(top_p=math.nan), "top_p", "nan"),
        (SamplingOptions(min_p=1.0), "min_p", "1.0"),
        (SamplingOptions(min_p=-0.1), "min_p", "-0.1"),
        (SamplingOptions(repetition_penalty=0.0), "repetition_penalty", "0.0"),
        (SamplingOptions(repetition_penalty=math.inf), "repetition_penalty", "inf"),
        (SamplingOptions(min_tokens=-1), "min_tokens", "-1"),
        (SamplingOptions(logprobs=21), "logprobs", "21"),
        (SamplingOptions(prompt_logprobs=-1), "prompt_logprobs", "-1"),
        (SamplingOptions(stop=("a", "")), "stop", "('a', '')"),
        (SamplingOptions(stop_ids=tuple(range(17))), "stop_ids", "17"),
        (SamplingOptions(stop_ids=(50,)), "stop_ids", "50"),
        (SamplingOptions(logit_bias={-1: 1.0}), "logit_bias", "-1"),
        (SamplingOptions(logit_bias={50: 1.0}), "logit_bias", "50"),
        (SamplingOptions(logit_bias={1: math.nan}), "logit_bias", "nan"),
        (SamplingOptions(logit_bias={1: -math.inf}), "logit_bias", "-inf"),
    ],
)
def test_a_value_out_of_range_is_refused_by_name(options: SamplingOptions, field: str, value: str) -> None:
    """The message is what a caller over HTTP gets to see: field, value, range."""
    with pytest.raises(ValueError, match=f"^{field} must be .*; got .*") as error:
        check_options(options, vocab_size=50)
    assert value in str(error.value).split("; got ")[1]


def test_too_many_biases_and_a_bad_temperature_are_refused() -> None:
    """Biases have a fixed width on the device."""
    with pytest.raises(ValueError, match="at most 300 biases; got 301"):
        check_options(SamplingOptions(logit_bias=dict.fromkeys(range(301), 1.0)), vocab_size=400)
    for temperature in (-0.5, math.nan, math.inf):
        with pytest.raises(ValueError, match=f"temperature must be finite and at least 0; got {temperature}"):
            check_options(PLAIN, vocab_size=400, temperature=temperature)


def test_what_lies_on_the_border_is_taken() -> None:
    """The ends of every range."""
    ids = tuple(range(16))
    bias = dict.fromkeys(range(300), -100.0)
    check_options(PLAIN, vocab_size=1)
    check_options(SamplingOptions(0, 1.0, 0.0, 1e-3, 0, ("x",), ids, True, bias, 0, 20), vocab_size=300, temperature=0.0)


def test_rows_carry_their_options_and_padding_is_neutral() -> None:
    """Two requests in a batch of four rows."""
    options = [SamplingOptions(5, 0.9, 0.1, 1.2, 3, logit_bias={7: 2.0, 2: -1.0}, logprobs=4), PLAIN]
    rows = full_rows(options, [0.5, 0.0], [(1, 9), (9,)], size=4)
    neutral = full_rows([PLAIN], [1.0], [()])
    np.testing.assert_allclose([row[0] for row in rows[:7]], [0.5, 5, 0.9, 0.1, 1.2, 3, 4], rtol=1e-6)
    assert (rows.bias_ids_RK[0, :2].tolist(), rows.bias_RK[0, :3].tolist()) == ([7, 2], [2.0, -1.0, 0.0])
    assert rows.stop_RE[0, :2].tolist() == [1, 9]
    assert rows.temperature_R.tolist() == [0.5, 0.0, 1.0, 1.0]
    for field, alone in zip(rows[1:], neutral[1:], strict=True):
        for r in (1, 2, 3):
            np.testing.assert_array_equal(field[r], alone[0])
