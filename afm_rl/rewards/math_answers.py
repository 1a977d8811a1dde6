"""Whether a response gives the right mathematical answer, by `math-verify`: equal as mathematics, not as text.

Runs in a worker process (`afm_rl/workers`), whose time and memory limits replace the library's own: those need the main
thread and its alarm does not stop `9**9**9`. The truth is the prompt's check {"type": "answer", "value": ...}.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Mapping
from typing import Any

from math_verify import parse, verify

logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns that its own limits are off, which is meant


def reward(prompt: str, response: str, data: Mapping[str, Any]) -> float:
    """1.0 where the answer found in `response` equals every "answer" check of the prompt, else 0.0; 0.0 without one.

    Raises ValueError for a truth that cannot be read.
    """
    del prompt
    truths = [_truth(check["value"]) for check in data["checks"] if check["type"] == "answer"]
    found = parse(response, parsing_timeout=None, raise_on_error=True) if truths else []
    return float(bool(found) and all(verify(truth, found, timeout_seconds=None, raise_on_error=True) for truth in truths))


@functools.lru_cache(maxsize=4096)
def _truth(value: str) -> list[Any]:
    found = parse(f"\\boxed{{{value}}}", parsing_timeout=None, raise_on_error=True)
    if all(isinstance(form, str) for form in found):
        raise ValueError(f"the prompt's answer {value!r} cannot be read as mathematics")
    return found
