"""The samplers as stages use them: what they hold, answers of other weights, and what is logged of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pytest

from actors.host import InlineHandle, call
from actors.metrics import Metrics
from actors.sampler import Acknowledged, PolicySpec, Sampler
from actors.streams import InlineStreamingHandle
from actors.weights import WeightsOutOfSyncError, WeightStore
from afm_rl.types import Answered, GenerationRequest, Group, Weights
from tests.actors.toy_policy import ENGINE, SPEC, damaged, request, weights
from topologies.actor_options import Generating
from topologies.generators import Generators


def generators(role: type = Sampler) -> tuple[InlineHandle, Generators]:
    """A weight store and two samplers."""
    store = InlineHandle("weights", WeightStore, {})
    names = [f"sampler-{i}" for i in range(2)]
    handles = [InlineStreamingHandle(name, role, {"engine": ENGINE, "name": name, "store": store}) for name in names]
    return store, Generators(handles, store, Generating(max_batch=4))


def publish(store: InlineHandle, policy: str, version: int, seed: int = 0) -> str:
    return str(call(store, "publish", weights(policy, version, seed=seed)))


def test_what_was_given_is_known_and_answers_in_order() -> None:
    """Guards against a second delivery of what is held, and the order of the answers over both samplers."""
    store, samplers = generators()
    digest = publish(store, "sft", 0)
    assert not samplers.hold("sft", digest)
    samplers.give("sft", 0, SPEC, digest=digest)
    assert samplers.hold("sft", digest)
    requests = [request(f"r{i}", 5, i % 3) for i in range(20)]
    groups = samplers.answer("sft", requests)
    assert [group.id for group in groups] == [one.id for one in requests]
    other = publish(store, "dpo", 0, seed=1)
    samplers.give("dpo", 0, SPEC, digest=other)
    assert samplers.hold("dpo", other)
    assert not samplers.hold("sft", digest)
    samplers.free()
    assert not samplers.hold("dpo", other)
    assert call(store, "policies") == []


class Stale(Sampler):
    """Acknowledges new weights and answers with the old ones."""

    def load(self, weights: Weights, spec: PolicySpec) -> Acknowledged:
        if weights.version == 0:
            super().load(weights, spec)
        return Acknowledged(weights.policy, weights.version, weights.digest)

    def answer(self, policy: str, requests: Sequence[GenerationRequest]) -> Iterator[Answered]:
        for one in super().answer(policy, requests):
            assert isinstance(one.result, Group)
            yield dataclasses.replace(one, result=dataclasses.replace(one.result, policy=policy))


def test_an_answer_of_other_weights_is_an_error() -> None:
    """Guards training on what another policy said, however it came about."""
    store, samplers = generators(Stale)
    for version in (0, 1):
        samplers.give("mdloo", version, SPEC, digest=publish(store, "mdloo", version, seed=version))
    with pytest.raises(WeightsOutOfSyncError, match="'r' was answered by 'mdloo' version 0 instead of 'mdloo' version 1"):
        samplers.answer("mdloo", [request("r", 5)])


class Mixed(Sampler):
    """Its answers hold a token of weights that nobody was given."""

    def answer(self, policy: str, requests: Sequence[GenerationRequest]) -> Iterator[Answered]:
        for one in super().answer(policy, requests):
            assert isinstance(one.result, Group)
            versions = tuple(np.full(len(response), one.result.version, np.int32) for response in one.result.responses)
            versions[0][-1] = 7
            yield dataclasses.replace(one, result=dataclasses.replace(one.result, versions=versions))


def test_every_token_is_of_weights_that_were_given() -> None:
    """Guards responses that went on over an update: it is the versions of the tokens that count, not of the beginning."""
    store, samplers = generators(Mixed)
    samplers.give("mdloo", 6, SPEC, digest=publish(store, "mdloo", 6))
    with pytest.raises(WeightsOutOfSyncError, match="'r' was answered by 'mdloo' version 6, 7 instead of 'mdloo' version 6"):
        samplers.answer("mdloo", [request("r", 5)])


def test_answers_may_be_of_weights_given_since_the_call_began() -> None:
    """Guards overlapped iterations: what was begun on the older version and what follows on the newer are both taken, in the
    same call; a later call takes the newer alone."""
    store, samplers = generators()
    samplers.give("mdloo", 1, SPEC, digest=publish(store, "mdloo", 1, seed=1))
    answers = samplers.answers("mdloo", [request(f"r{i}", 5, i % 3) for i in range(24)])
    versions = [next(answers).version for _ in range(3)]
    samplers.give("mdloo", 2, SPEC, digest=publish(store, "mdloo", 2, seed=2))
    versions += [group.version for group in answers]
    assert len(versions) == 24
    assert set(versions) == {1, 2}
    assert {group.version for group in samplers.answers("mdloo", [request("r", 5), request("r", 6)])} == {2}


class Interrupted(InlineStreamingHandle):
    """Before its next delivery it is asked for something, as by another thread."""

    ask: Callable[[], None] | None = None

    def submit(self, method: str, *args: Any, **kwargs: Any) -> Any:
        if method == "load" and self.ask is not None:
            ask, self.ask = self.ask, None
            ask()
        return super().submit(method, *args, **kwargs)


def test_a_call_that_begins_during_a_delivery_takes_what_was_given_before() -> None:
    """Guards a producer that runs ahead: it asks while newer weights are on their way, and some still hold the older."""
    store, names = InlineHandle("weights", WeightStore, {}), ["sampler-0", "sampler-1"]
    handles = [Interrupted(name, Sampler, {"engine": ENGINE, "name": name, "store": store}) for name in names]
    samplers, found = Generators(handles, store, Generating(max_batch=4)), list[int]()
    samplers.give("mdloo", 1, SPEC, digest=publish(store, "mdloo", 1, seed=1))
    requests = [request(f"r{i}", 5) for i in range(8)]
    handles[1].ask = lambda: found.extend(group.version for group in samplers.answers("mdloo", requests))
    samplers.give("mdloo", 2, SPEC, digest=publish(store, "mdloo", 2, seed=2))
    assert set(found) == {1, 2}
    assert {group.version for group in samplers.answers("mdloo", requests)} == {2}


class Damaging(InlineStreamingHandle):
    """One bit of its next delivery is changed on the way."""

    due = False

    def submit(self, method: str, *args: Any, **kwargs: Any) -> Any:
        if method == "load" and self.due:
            self.due = False
            return super().submit(method, damaged(args[0].result(1.0)), *args[1:], **kwargs)
        return super().submit(method, *args, **kwargs)


@pytest.mark.parametrize("budget", [1, 0])
def test_nobody_generates_from_damaged_weights(budget: int) -> None:
    """Guards against a flipped bit: that sampler is given the weights again or, without a budget for it, asked no more."""
    store, names = InlineHandle("weights", WeightStore, {}), ["sampler-0", "sampler-1"]
    handles = [Damaging(name, Sampler, {"engine": ENGINE, "name": name, "store": store}) for name in names]
    samplers = Generators(handles, store, Generating(max_batch=4, max_restarts=budget))
    samplers.give("mdloo", 1, SPEC, digest=publish(store, "mdloo", 1, seed=1))
    handles[1].due = True
    samplers.give("mdloo", 2, SPEC, digest=publish(store, "mdloo", 2, seed=2))
    before = samplers.look()
    groups = samplers.answer("mdloo", [request(f"r{i}", 5, i % 3) for i in range(12)])
    assert {group.version for group in groups} == {2}
    now = {handle.name: call(handle, "use") for handle in handles}
    assert now["sampler-0"].steps > before["sampler-0"].steps
    assert (now["sampler-1"].steps > 0) == (budget == 1)
    assert samplers.sync("mdloo").actors == 1 + budget


class Sink:
    def __init__(self) -> None:
        self.rows: dict[tuple[str, str, int], Mapping[str, float]] = {}

    def log(self, *, stage: str, task: str, step: int, values: Mapping[str, float]) -> None:
        self.rows[stage, task, step] = values

    def close(self) -> None:
        """Nothing to close."""


def test_a_span_is_logged_for_each_sampler_and_summed() -> None:
    """Guards the metrics of an iteration: those who worked in it have a row, and what they did together."""
    store, samplers = generators()
    samplers.give("sft", 3, SPEC, digest=publish(store, "sft", 3))
    before, sink = samplers.look(), Sink()
    metrics = Metrics([sink])
    groups = samplers.answer("sft", [request(f"r{i}", 5, i % 3) for i in range(6)])
    together = samplers.log(metrics, before, task="mdloo", step=9)
    assert set(sink.rows) == {("engine", "mdloo/sampler-0", 9), ("engine", "mdloo/sampler-1", 9)}
    assert together["response_tokens"] == sum(len(group.responses[0]) for group in groups)
    assert together["response_tokens"] == sum(row["response_tokens"] for row in sink.rows.values())
    assert together["weights_version"] == 3
    assert 0 < together["batch_occupancy"] <= 1
    assert samplers.log(metrics, samplers.look(), task="idle", step=0) == {}
