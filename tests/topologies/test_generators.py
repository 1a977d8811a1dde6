"""The samplers as stages use them: what they hold, answers of other weights, and what is logged of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence

import pytest

from actors.host import InlineHandle, call
from actors.metrics import Metrics
from actors.sampler import Acknowledged, PolicySpec, Sampler
from actors.streams import InlineStreamingHandle
from actors.weights import WeightsOutOfSyncError, WeightStore
from afm_rl.types import Answered, GenerationRequest, Group, Weights
from tests.actors.toy_policy import ENGINE, SPEC, request, weights
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
