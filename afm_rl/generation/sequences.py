"""What the engine keeps of a request while it runs: the job, its responses, and the stems that responses grow from.

A stem is a run of tokens whose keys and values are filled once: a request's prompt, for all its responses, or the prompt and
the tokens so far of one response that had to give up its pages. It is filled but for its last token, which is the first
that each of its responses decodes.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from afm_rl.types import GenerationRequest


@dataclass(eq=False)
class Response:
    """One response of a job. While it decodes, `pages` hold the positions before `position`, and room for some after."""

    job: Job
    index: int
    tokens: list[int] = field(default_factory=list)
    logps: list[float] = field(default_factory=list)
    versions: list[int] = field(default_factory=list)
    top_ids: list[np.ndarray] = field(default_factory=list)  # each [n]
    top_logps: list[np.ndarray] = field(default_factory=list)
    pages: list[int] = field(default_factory=list)
    stopped: bool = False
    done: bool = False

    @property
    def request(self) -> GenerationRequest:
        return self.job.request

    @property
    def position(self) -> int:
        """Where the token that is decoded next lies: the last one known."""
        return len(self.request.prompt_T) + len(self.tokens) - 1

    @property
    def last_token(self) -> int:
        return self.tokens[-1] if self.tokens else int(self.request.prompt_T[-1])

    @property
    def left(self) -> int:
        """Tokens that it may still get."""
        return self.request.max_tokens - len(self.tokens)

    @property
    def age(self) -> tuple[int, int]:
        """Order of arrival."""
        return self.job.arrival, self.index

    def cut(self, count: int) -> None:
        """Drop every token but the first `count`."""
        for kept in (self.tokens, self.logps, self.versions, self.top_ids, self.top_logps):
            del kept[count:]


class PromptScores(NamedTuple):
    """Log-probabilities of a prompt's tokens (the first NaN) and the n best alternatives at each position."""

    logp_T: np.ndarray
    top_ids_TN: np.ndarray
    top_logps_TN: np.ndarray

    @classmethod
    def unknown(cls, length: int, top: int) -> PromptScores:
        """What nothing is known of yet."""
        logps_TN = np.full((length, top), np.nan, np.float32)
        return cls(np.full(length, np.nan, np.float32), np.zeros((length, top), np.int32), logps_TN)


@dataclass(eq=False)
class Job:
    """A request under way. `version` is that of the weights that began to fill its prompt.

    `arrival` is its number in the queue (-1: not in it yet). `adapter` is the slot of its adapter (-1: none), `adapter_key`
    names what was loaded there. Tokens of one that is `streamed` are read while they are made: nobody waits for its group.
    """

    request: GenerationRequest
    stop_ids: tuple[int, ...]
    arrival: int = -1
    adapter: int = -1
    adapter_key: str = ""
    version: int = -1
    responses: list[Response] = field(default_factory=list)
    prompt_scores: PromptScores | None = None
    prompt_scored: bool = False
    streamed: bool = False

    @property
    def begun(self) -> bool:
        """Whether it has had pages."""
        return self.version >= 0

    @property
    def done(self) -> bool:
        return all(response.done for response in self.responses)


@dataclass(eq=False)
class Stem:
    """Tokens to fill, and who waits for them. `computed` positions are in `pages`; `version`: the weights' at its start."""

    job: Job
    tokens_T: np.ndarray  # [T] int32, the last of which is not filled
    waiting: deque[Response]
    version: int = -1
    started: bool = False
    computed: int = 0
    pages: list[int] = field(default_factory=list)
    keys: list[bytes] = field(default_factory=list)  # of its full pages, under `root`
    root: str = ""
    remembered: int = 0  # how many of these the cache knows

    @property
    def target(self) -> int:
        """Positions to fill."""
        return len(self.tokens_T) - 1

    @property
    def filled(self) -> bool:
        return self.started and self.computed == self.target

    @property
    def scored(self) -> bool:
        """Whether the prompt's own log-probabilities are asked for and still to be computed; its first token has none."""
        request = self.job.request
        return request.options.prompt_logprobs is not None and len(request.prompt_T) > 1 and not self.job.prompt_scored
