"""Sampling options as arrays: what `draw_full` reads of a batch's rows, made on the host at every step of the engine.

Shapes: R rows, K biased tokens, E tokens that end a response.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from afm_rl.types import PLAIN, SamplingOptions

#: Alternatives of a token, biased tokens of a request (both OpenAI's limits), tokens that end a response.
MAX_TOP = 20
MAX_BIASES = 300
MAX_STOP_IDS = 32
#: Fills up rows of token ids; no vocabulary holds it, and what is scattered there is dropped.
NO_TOKEN = np.iinfo(np.int32).max


class FullRows(NamedTuple):
    """`SamplingOptions` of R rows; the fields are arrays, of NumPy or on a device."""

    temperature_R: Any  # float32, 0: greedy
    top_k_R: Any  # int32, 0: all
    top_p_R: Any  # float32
    min_p_R: Any  # float32
    penalty_R: Any  # float32, of repetition
    min_tokens_R: Any  # int32
    top_R: Any  # int32, alternatives asked for
    bias_ids_RK: Any  # int32
    bias_RK: Any  # float32
    stop_RE: Any  # int32


def full_rows(
    options: Sequence[SamplingOptions],
    temperatures: Sequence[float],
    stop_ids: Sequence[Sequence[int]],
    *,
    size: int | None = None,
) -> FullRows:
    """The rows' options as NumPy arrays of `size` rows, the last of which are neutral; at most 32 `stop_ids` a row."""
    size = len(options) if size is None else size
    missing = size - len(options)
    all_options = [*options, *[PLAIN] * missing]
    cuts_RF = np.array([(o.top_p, o.min_p, o.repetition_penalty) for o in all_options], np.float32)
    counts_RI = np.array([(o.top_k, o.min_tokens, o.logprobs or 0) for o in all_options], np.int32)
    bias_ids_RK = np.full((size, MAX_BIASES), NO_TOKEN, np.int32)
    bias_RK = np.zeros((size, MAX_BIASES), np.float32)
    stop_RE = np.full((size, MAX_STOP_IDS), NO_TOKEN, np.int32)
    for r, (o, ids) in enumerate(zip(options, stop_ids, strict=True)):
        if o.logit_bias:
            bias_ids, bias = _biases(_Same(o))
            bias_ids_RK[r, : len(bias)], bias_RK[r, : len(bias)] = bias_ids, bias
        if o.min_tokens:
            stop_RE[r, : len(ids)] = ids
    temperature_R = np.array([*temperatures] + [1.0] * missing, np.float32)
    top_p_R, min_p_R, penalty_R = cuts_RF.T
    top_k_R, min_tokens_R, top_R = counts_RI.T
    return FullRows(temperature_R, top_k_R, top_p_R, min_p_R, penalty_R, min_tokens_R, top_R, bias_ids_RK, bias_RK, stop_RE)


def check_options(options: SamplingOptions, *, vocab_size: int, temperature: float = 1.0) -> None:
    """Raises ValueError naming the first field that is out of its range, its value and the range."""
    o = options
    tops = {"logprobs": o.logprobs, "prompt_logprobs": o.prompt_logprobs}
    _check("temperature", temperature, 0 <= temperature < math.inf, "finite and at least 0")
    _check("top_k", o.top_k, o.top_k >= 0, "at least 0 (0: all tokens)")
    _check("top_p", o.top_p, 0 < o.top_p <= 1, "in (0, 1]")
    _check("min_p", o.min_p, 0 <= o.min_p < 1, "in [0, 1)")
    _check("repetition_penalty", o.repetition_penalty, 0 < o.repetition_penalty < math.inf, "finite and above 0")
    _check("min_tokens", o.min_tokens, o.min_tokens >= 0, "at least 0")
    for name, top in tops.items():
        _check(name, top, top is None or 0 <= top <= MAX_TOP, f"in 0..{MAX_TOP}, or None")
    _check("stop", o.stop, all(o.stop), "strings that are not empty")
    _check("stop_ids", f"{len(o.stop_ids)} ids", len(o.stop_ids) <= MAX_STOP_IDS // 2, f"at most {MAX_STOP_IDS // 2} ids")
    _check("logit_bias", f"{len(o.logit_bias)} biases", len(o.logit_bias) <= MAX_BIASES, f"at most {MAX_BIASES} biases")
    for name, ids in (("stop_ids", o.stop_ids), ("logit_bias", o.logit_bias)):
        for token in ids:
            _check(name, f"token id {token}", 0 <= token < vocab_size, f"token ids in 0..{vocab_size - 1}")
    for token, bias in o.logit_bias.items():
        _check("logit_bias", f"{bias} for token id {token}", abs(bias) < 1e38, "finite in float32")


def _check(name: str, value: object, fits: bool, wanted: str) -> None:
    if not fits:
        raise ValueError(f"{name} must be {wanted}; got {value}")


class _Same:
    """Options as a key that is equal to itself only: they hold a mapping, and hashing one costs more than it saves."""

    def __init__(self, options: SamplingOptions) -> None:
        self.options = options

    def __hash__(self) -> int:
        return id(self.options)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and other.options is self.options


@lru_cache(maxsize=4096)
def _biases(key: _Same) -> tuple[np.ndarray, np.ndarray]:
    bias = key.options.logit_bias
    return np.fromiter(bias.keys(), np.int32, len(bias)), np.fromiter(bias.values(), np.float32, len(bias))
