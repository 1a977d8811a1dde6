"""Samplers without a model on a clock of their own: they take time, die, freeze, refuse, and note what happens."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from actors.host import END, ActorLostError
from afm_rl.types import Answered, GenerationRequest, Group, Refused

#: Seconds until a lost sampler answers again.
RETURN_S = 3.0


def request(number: int, responses: int = 1) -> GenerationRequest:
    return GenerationRequest(f"r{number}", np.array([number], np.int32), num_responses=responses, seed=1000 + number)


def answer_to(asked: GenerationRequest, policy: str = "p") -> Group:
    """A group whose tokens are the request's seed."""
    tokens = tuple(np.array([asked.seed, j], np.int32) for j in range(asked.num_responses))
    logps = tuple(np.zeros(2, np.float32) for _ in tokens)
    return Group(asked.id, asked.prompt_T, tokens, logps, (True,) * len(tokens), policy, 0)


@dataclass
class World:
    """The clock, and what happened: (seconds, sampler, event)."""

    now_s: float = 0.0
    events: list[tuple[float, str, str]] = field(default_factory=list)

    def clock(self) -> float:
        return self.now_s

    def note(self, who: str, event: str) -> None:
        self.events.append((round(self.now_s, 3), who, event))

    def wait(self, calls: Sequence[Any], timeout_s: float) -> list[Any]:
        """As `actors.streams.ready`: time passes until a call can be read."""
        first_s = min((call.ready_s() for call in calls), default=math.inf)
        self.now_s = max(self.now_s, min(first_s, self.now_s + timeout_s))
        return [call for call in calls if call.ready_s() <= self.now_s]

    def of(self, who: str) -> list[str]:
        """The events of one sampler."""
        return [event for _, name, event in self.events if name == who]


@dataclass
class FakeSampler:
    """Answers one request after the other, each in `seconds`; `lives`: after how many answers each life ends.

    A life "frozen" answers nothing and does not end. After the last life there is none.
    """

    name: str
    world: World
    seconds: float = 1.0
    lives: Sequence[float | str] = (math.inf,)
    refuses: frozenset[str] = frozenset()
    returns: bool = True
    breaks: str | None = None
    life: int = 0
    answered: int = 0
    free_s: float = 0.0
    outstanding: int = 0
    most: int = 0
    open: list[FakeStream] = field(default_factory=list)

    def stream(self, method: str, policy: str, requests: Sequence[GenerationRequest]) -> FakeStream:
        assert method == "answer"
        self.world.note(self.name, f"asked {' '.join(one.id for one in requests)}")
        self.outstanding += sum(one.num_responses for one in requests)
        self.most = max(self.most, self.outstanding)
        stream = FakeStream(self, self.life, policy, requests)
        self.open.append(stream)
        return stream

    def end(self) -> None:
        self.world.note(self.name, "killed")
        self.lose()

    def lose(self) -> None:
        self.life, self.answered, self.outstanding, self.open = self.life + 1, 0, 0, []
        self.free_s = self.world.now_s + RETURN_S

    def revive(self) -> FakeReturn:
        return FakeReturn(self, self.free_s if self.returns else math.inf)

    @property
    def frozen(self) -> bool:
        return self.lives[self.life] == "frozen"


class FakeStream:
    def __init__(self, sampler: FakeSampler, life: int, policy: str, requests: Sequence[GenerationRequest]) -> None:
        self.what = f"{sampler.name}.answer"
        self._sampler, self._life, self._policy = sampler, life, policy
        self.left = list(enumerate(requests))
        if sampler.life < len(sampler.lives) and not sampler.frozen:
            begin_s = max(sampler.world.now_s, sampler.free_s)
            self._finish_s = [begin_s + (i + 1) * sampler.seconds for i in range(len(requests))]
            sampler.free_s = self._finish_s[-1]
        else:
            self._finish_s = [math.inf] * len(requests)

    def ready_s(self) -> float:
        lost = self._sampler.life != self._life
        return -math.inf if lost or not self.left else self._finish_s[0]

    def next(self, timeout_s: float) -> Any:
        assert timeout_s > 0
        sampler = self._sampler
        if sampler.life != self._life:
            raise ActorLostError(f"{self.what}: its process is gone")
        if not self.left:
            return END
        if sampler.breaks is not None:
            raise RuntimeError(sampler.breaks)
        if sampler.answered == sampler.lives[sampler.life]:
            sampler.world.note(sampler.name, "died")
            sampler.lose()
            raise ActorLostError(f"{self.what}: its process is gone")
        index, asked = self.left.pop(0)
        self._finish_s.pop(0)
        sampler.answered += 1
        sampler.outstanding -= asked.num_responses
        if asked.id in sampler.refuses:
            return Answered(index, Refused(asked.id, f"request {asked.id!r} has an empty prompt"))
        return Answered(index, answer_to(asked, self._policy))

    def close(self) -> None:
        if self.left and self._sampler.life == self._life:
            self._sampler.world.note(self._sampler.name, "given up")


@dataclass
class FakeReturn:
    sampler: FakeSampler
    at_s: float
    what: str = "the return"

    def ready_s(self) -> float:
        return self.at_s

    def result(self, timeout_s: float) -> None:  # noqa: ARG002 (the face of Pending)
        if self.sampler.life >= len(self.sampler.lives):
            raise ActorLostError(f"{self.sampler.name}: it will not come back")
        self.sampler.world.note(self.sampler.name, "returned")


@dataclass
class Everyone:
    """A list of samplers, of whom each may be asked as soon as its process is back."""

    present: Sequence[FakeSampler]
    look_s: float = math.inf
    returns: dict[str, FakeReturn] = field(default_factory=dict)

    def handles(self) -> Sequence[FakeSampler]:
        return self.present

    def away(self, handle: FakeSampler) -> FakeReturn | None:
        return self.returns.get(handle.name)

    def lost(self, handle: FakeSampler, cause: str) -> None:  # noqa: ARG002 (the face of Members)
        self.returns[handle.name] = handle.revive()

    def returned(self, handle: FakeSampler, pending: FakeReturn) -> None:
        del self.returns[handle.name]
        pending.result(RETURN_S)

    def answered(self, handle: FakeSampler) -> None:
        """Nobody counts."""

    def streaming(self, handle: FakeSampler, change: int) -> None:
        """Nobody counts."""

    def causes(self) -> str:
        return ""
