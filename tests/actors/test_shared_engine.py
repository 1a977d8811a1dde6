"""One engine for several readers and for weights: who steps it, in which order, and what each of them gets."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import numpy as np
import pytest

from actors.shared_engine import SharedEngine, Turns
from afm_rl.generate import GeneratorStats
from afm_rl.types import Answered, GenerationRequest, Group
from tests.actors.toy_policy import request


class FakeGenerator:
    """Answers the oldest request a step, in `step_s` seconds; sees who calls it at the same time as somebody else."""

    def __init__(self, step_s: float = 0.0) -> None:
        self.step_s = step_s
        self.events: list[str] = []
        self.version = -1
        self.fails: str | None = None
        self._waiting: list[GenerationRequest] = []
        self._busy = threading.Lock()

    def _alone(self) -> None:
        assert self._busy.acquire(blocking=False), "two threads at a time"
        self._busy.release()

    @property
    def stats(self) -> GeneratorStats:
        self._alone()
        steps = sum(event.startswith("step") for event in self.events)
        return GeneratorStats(steps=steps, waiting=len(self._waiting))

    @property
    def unfinished(self) -> int:
        return len(self._waiting)

    def load(self, params: object, *, policy: str, version: int) -> None:  # noqa: ARG002 (the face of Generator)
        self._alone()
        self.events.append(f"load {policy} {version}")
        self.version = version

    def submit(self, asked: GenerationRequest) -> None:
        self._alone()
        assert asked.id not in [one.id for one in self._waiting]
        self._waiting.append(asked)

    def step(self) -> list[Group]:
        with self._busy:
            time.sleep(self.step_s)
            if self.fails:
                raise RuntimeError(self.fails)
            asked = self._waiting.pop(0)
            self.events.append(f"step {asked.id}")
            tokens = (np.array([asked.seed], np.int32),)
            return [Group(asked.id, asked.prompt_T, tokens, tokens, (True,), "p", self.version)]

    def cancel(self, name: str) -> None:
        self._alone()
        self.events.append(f"cancel {name}")
        self._waiting = [one for one in self._waiting if one.id != name]


def shared(generator: FakeGenerator) -> SharedEngine:
    return SharedEngine(generator, after_step=lambda _: None)  # type: ignore[arg-type]


def seeds(answers: Iterator[Answered]) -> dict[int, int]:
    return {one.index: int(one.result.responses[0][0]) for one in answers}


def test_turns_come_in_the_order_of_asking() -> None:
    """Guards fairness: somebody who asks again at once comes after those who have been waiting."""
    turns, order = Turns(), []
    asked: list[threading.Thread] = []

    def take(name: str) -> None:
        with turns:
            order.append(name)

    with turns:
        for name in "abc":
            asked.append(threading.Thread(target=take, args=(name,)))
            asked[-1].start()
            time.sleep(0.02)
    take("again")
    for thread in asked:
        thread.join(timeout=10)
    assert order == ["a", "b", "c", "again"]


def test_weights_come_between_two_steps_of_a_busy_engine() -> None:
    """Guards updates in flight: a stream that steps without a pause keeps weights waiting for a step at most."""
    generator = FakeGenerator(step_s=0.005)
    engine = shared(generator)
    engine.load({}, policy="p", version=1)
    reader = threading.Thread(target=lambda: seeds(engine.stream([request(f"r{i}", 1) for i in range(100)])))
    reader.start()
    while engine.use().steps < 5:
        time.sleep(0.001)
    before = engine.use().steps
    engine.load({}, policy="p", version=2)
    assert engine.use().steps <= before + 3
    reader.join(timeout=30)
    assert generator.events.index("load p 2") < len(generator.events) - 50
    assert engine.use().version == 2


def test_every_reader_gets_its_own_answers_from_many_threads() -> None:
    """Guards the routing: eight streams at a time with the same ids, each answered once and with its own."""
    engine = shared(FakeGenerator())
    engine.load({}, policy="p", version=1)
    asked = {name: [GenerationRequest(f"r{i}", np.array([1], np.int32), seed=100 * n + i) for i in range(40)]
             for n, name in enumerate("abcdefgh")}  # fmt: skip
    found: dict[str, dict[int, int]] = {}
    threads = [
        threading.Thread(target=lambda name=name: found.update({name: seeds(engine.stream(asked[name]))})) for name in asked
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert found == {name: {i: one.seed for i, one in enumerate(requests)} for name, requests in asked.items()}


def test_requests_of_a_reader_that_goes_away_are_cancelled() -> None:
    """Guards the engine against work for nobody, and other readers against that: their requests run on."""
    generator = FakeGenerator()
    engine = shared(generator)
    leaving, staying = engine.stream([request(n, 1) for n in "abc"]), engine.stream([request(n, 1) for n in "cd"])
    assert next(leaving).result.id == "a"
    assert next(staying).result.id == "c"  # through b and c of the other, which its reader has not asked for yet
    leaving.close()
    assert generator.unfinished == 1
    assert [one.result.id for one in staying] == ["d"]
    assert generator.events == ["step a", "step b", "step c", "step c#1", "step d"]


def test_an_engine_that_fails_lets_its_reader_know() -> None:
    """Guards against a wait for ever: what a step raises is the reader's, and its requests are given up."""
    generator = FakeGenerator()
    engine = shared(generator)
    generator.fails = "out of memory"
    with pytest.raises(RuntimeError, match="out of memory"):
        next(engine.stream([request("a", 1), request("b", 1)]))
    assert generator.events == ["cancel a", "cancel b"]


def test_a_failed_step_is_known_to_every_reader_of_the_engine() -> None:
    """Guards readers against stepping for ever an engine that has given their requests up; later ones are answered."""
    generator = FakeGenerator()
    engine = shared(generator)
    one, other = engine.stream([request(n, 1) for n in "ab"]), engine.stream([request(n, 1) for n in "xy"])
    assert next(one).result.id == "a"
    generator.fails = "out of memory"
    with pytest.raises(RuntimeError, match="out of memory"):
        next(other)
    generator.fails = None
    with pytest.raises(RuntimeError, match="another stream") as raised:
        next(one)
    assert "out of memory" in str(raised.value.__cause__)
    assert [answer.result.id for answer in engine.stream([request("z", 1)])] == ["z"]
