"""Rules on the form of a response: a pattern, required and forbidden texts, lengths, JSON, tags.

Runs in a worker process (`afm_rl/workers`), because a pattern of the user's may take for ever on some response.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

Rule = Callable[[str], bool]


def make_reward(
    *,
    regex: str | None = None,
    contains: Sequence[str] = (),
    excludes: Sequence[str] = (),
    tags: Sequence[str] = (),
    parses_json: bool = False,
    min_words: int | None = None,
    max_words: int | None = None,
    min_chars: int | None = None,
    max_chars: int | None = None,
) -> Callable[[str, str, Mapping[str, Any]], float]:
    """A reward function: the share (0..1) of the given rules that a response keeps.

    `regex` must be found (a dot matches line ends too); every text of `contains` must, and none of `excludes` may stand in
    the response, each a rule of its own; `tags` [a, b] wants <a>...</a> and then <b>...</b>, each once; spaces part words.
    """
    rules: list[Rule] = []
    if regex is not None:
        pattern = re.compile(regex, re.DOTALL)
        rules.append(lambda text: pattern.search(text) is not None)
    rules += [lambda text, part=part: part in text for part in contains]  # type: ignore[misc]
    rules += [lambda text, part=part: part not in text for part in excludes]  # type: ignore[misc]
    if tags:
        rules.append(lambda text: _has_tags(text, tags))
    if parses_json:
        rules.append(_is_json)
    for low, high, count in ((min_words, max_words, _words), (min_chars, max_chars, len)):
        if low is not None or high is not None:
            rules.append(_bounds(low, high, count))
    if not rules:
        raise ValueError("no rule given")

    def reward(prompt: str, response: str, data: Mapping[str, Any]) -> float:
        del prompt, data
        return sum(rule(response) for rule in rules) / len(rules)

    return reward


def _bounds(low: int | None, high: int | None, count: Callable[[str], int]) -> Rule:
    return lambda text: (low is None or count(text) >= low) and (high is None or count(text) <= high)


def _words(text: str) -> int:
    return len(text.split())


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


def _has_tags(text: str, tags: Sequence[str]) -> bool:
    marks = [mark for tag in tags for mark in (f"<{tag}>", f"</{tag}>")]
    places = [text.find(mark) for mark in marks]
    return all(text.count(mark) == 1 for mark in marks) and places == sorted(places)
