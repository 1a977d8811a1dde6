"""What every side of `sampler.py` and `online_rl.py` shares: the prompts of a workload, and how a side answers requests.

A workload is {"prompts": P, "responses": G, "prompt_tokens": S, "new_tokens": n or one n per prompt, "seed": s}: P random
prompts of S tokens, G responses to each, temperature 1, no end token. A request is one line of JSON: {"generate": workload}
is answered with the seconds it took, {"score": ids} with the log-probabilities of the token after `ids`. {"train": run}
trains a fresh policy on the reward `token_share`, a workload of new prompts every step: a run is a workload with "steps" at
most, "until" (the mean reward of a step that ends it), "rate" (of AdamW, constant), "clip" (of the gradient's norm). NumPy
only: the sides run in environments of their own.
"""

from __future__ import annotations

import json
import resource
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

Workload = dict[str, Any]
#: Token ids below this are special in the peers' vocabularies and stay out of the prompts.
FIRST_ID = 4


def make_prompts(workload: Workload, vocab_size: int) -> np.ndarray:
    """The prompts, [P, S] int32: other ones for every seed, so that nothing of an earlier run can be reused."""
    shape = (workload["prompts"], workload["prompt_tokens"])
    return np.random.default_rng(workload["seed"]).integers(FIRST_ID, vocab_size, shape).astype(np.int32)


def token_share(tokens: Sequence[int] | np.ndarray) -> float:
    """The reward of a response: the share of its tokens whose id is 3 modulo 8; 1/8 for tokens at random, 1 at best."""
    return float(np.mean(np.asarray(tokens) % 8 == 3))


def log_softmax(logits_V: np.ndarray) -> np.ndarray:
    """In float64."""
    shifted = np.asarray(logits_V, np.float64) - np.max(logits_V)
    return shifted - np.log(np.exp(shifted).sum())


def answer(fields: dict[str, Any]) -> None:
    """One line that the benchmark reads; whatever else is printed is not for it."""
    peak_mib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print("RESULT " + json.dumps({"peak_mib": peak_mib, **fields}), flush=True)


def serve(
    generate: Callable[[Workload], dict[str, Any] | None],
    score: Callable[[Sequence[int]], np.ndarray],
    **others: Callable[[Any], dict[str, Any]],
) -> None:
    """Answer requests until standard input ends; `others` are what else this side can do, by name."""

    def timed(workload: Workload) -> dict[str, Any]:
        before = time.perf_counter()
        fields = generate(workload) or {}
        return {"seconds": [time.perf_counter() - before], **fields}

    serve_kinds(generate=timed, score=lambda ids: {"logps": log_softmax(score(ids)).tolist()}, **others)


def serve_kinds(**kinds: Callable[[Any], dict[str, Any]]) -> None:
    """Answer requests {kind: argument} until standard input ends."""
    for line in sys.stdin:
        ((kind, argument),) = json.loads(line).items()
        answer(kinds[kind](argument))
