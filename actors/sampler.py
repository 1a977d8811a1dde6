"""Samplers and the committee: actors that generate responses from the weights they last acknowledged.

Consumes `GenerationRequest`s and `Weights`; produces `Group`s stamped with policy and version, each as it is finished.
Neither generates before it has loaded weights, and `load` answers with the digest of the bytes it verified. A sampler
follows one policy; the committee (4.3.2) holds every member and answers for each. One that is started anew takes what it was
last given from the weight store itself, before it answers anybody.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from actors.engine_use import EngineUse, LiveGauges
from actors.failures import InfrastructureError
from actors.host import Handle, call, return_freed_memory
from actors.metrics import MetricsSink
from actors.shared_engine import SharedEngine
from afm_rl.config import ModelConfig
from afm_rl.generate import Generator
from afm_rl.generation.options import EngineOptions
from afm_rl.huggingface import load_params
from afm_rl.tokenizer import Tokenizer
from afm_rl.types import Answered, GenerationRequest, Weights
from afm_rl.weights import unflatten

log = logging.getLogger(__name__)


class UnacknowledgedError(InfrastructureError):
    """An actor was started anew and nobody knows yet what it holds: ask it (`held`) before it is asked to generate."""


@dataclass(frozen=True)
class Acknowledged:
    """What an actor holds of a policy: the digest is that of the bytes it received and verified."""

    policy: str
    version: int
    digest: str


@dataclass(frozen=True)
class PolicySpec:
    """What a generator must know beside the weights: the model's shape and the tokens that end a response.

    `tokenizer_folder` is for requests with stop strings; without it they are refused.
    """

    config: ModelConfig
    stop_ids: tuple[int, ...]
    tokenizer_folder: str | None = None


@dataclass
class _Holding:
    spec: PolicySpec
    engine: SharedEngine
    acknowledged: Acknowledged


class Committee:
    """Serves several policies side by side, each from an engine of its own.

    `store` None: nobody to ask for weights after a restart. `sinks` take the live gauges.
    """

    def __init__(
        self,
        *,
        engine: EngineOptions,
        name: str = "committee",
        store: Handle | None = None,
        sinks: Sequence[MetricsSink] = (),
    ) -> None:
        self._options = engine
        self._members: dict[str, _Holding] = {}
        self._retired = EngineUse()
        self._gauges = LiveGauges(name, sinks)
        assigned = call(store, "assigned", name) if store is not None else []
        for weights, spec in assigned:
            try:
                self.load(weights, spec)
            except ValueError:  # whoever asks what is held learns that it is not, and may give it again
                log.exception("%s does not hold policy %r, which it was given before", name, weights.policy)
        self._unacknowledged = bool(assigned)

    def load(self, weights: Weights, spec: PolicySpec) -> Acknowledged:
        """Verify and hold these weights under their policy's name, between two steps of what is generating.

        Acknowledges the version and the digest of the bytes received. Raises DigestMismatchError or ValueError (values that
        are not finite, a version below 0); the weights held before go on serving.
        """
        if weights.version < 0:
            raise ValueError(f"weights of policy {weights.policy!r} have version {weights.version}; versions start at 0")
        params = unflatten(weights)  # views into the message, which the engine uses where it lies or copies once
        held = self._predecessor(weights.policy)
        same = held is not None and held[1].spec == spec
        engine = held[1].engine if held is not None and same else self._new_engine(spec)
        engine.load(params, policy=weights.policy, version=weights.version)
        return_freed_memory()  # the weights before these, where they were copies, and what checking these took
        if held is not None and not same:
            self._retired += held[1].engine.use().retired()
        # Replaced as a whole: other threads look a policy up meanwhile.
        others = {name: member for name, member in self._members.items() if held is None or name != held[0]}
        acknowledged = Acknowledged(weights.policy, weights.version, weights.digest)
        self._members = {**others, weights.policy: _Holding(spec, engine, acknowledged)}
        return acknowledged

    def members(self) -> list[str]:
        """Names of the policies held."""
        return sorted(self._members)

    def held(self) -> list[Acknowledged]:
        """Acknowledges everything that it holds: what it took from the store itself when it was started anew."""
        self._unacknowledged = False
        return [member.acknowledged for member in self._members.values()]

    def keep_only(self, members: Sequence[str]) -> None:
        """Free every other member's weights."""
        freed = [held for name, held in self._members.items() if name not in members]
        self._retired = sum((held.engine.use().retired() for held in freed), self._retired)
        self._members = {name: held for name, held in self._members.items() if name in members}

    def answer(self, policy: str, requests: Sequence[GenerationRequest]) -> Iterator[Answered]:
        """The answers of a policy as they are finished. Raises RuntimeError when it is not held, UnacknowledgedError when
        nobody has asked a life of this actor that began by itself what it holds."""
        members = self._members
        if self._unacknowledged:
            raise UnacknowledgedError(f"asked for policy {policy!r} by someone who does not know that this actor was lost")
        if policy not in members:
            raise RuntimeError(
                f"asked for policy {policy!r}, but no weights of it were delivered here; held: "
                f"{', '.join(sorted(members)) or 'none'}"
            )
        for name, held in members.items():
            if name != policy:
                held.engine.rest()
        return members[policy].engine.stream(requests)

    def use(self) -> EngineUse:
        """What the engines did since this actor was started, and their state."""
        return sum((held.engine.use() for held in self._members.values()), self._retired)

    def _predecessor(self, policy: str) -> tuple[str, _Holding] | None:
        """The name and holding whose place weights of this policy take."""
        held = self._members.get(policy)
        return (policy, held) if held is not None else None

    def _new_engine(self, spec: PolicySpec) -> SharedEngine:
        generator = Generator(spec.config, stop_ids=spec.stop_ids, options=self._options, decode=_decoder(spec))
        speculation = self._options.speculative
        if speculation is not None and speculation.draft is not None:
            draft_config, draft = load_params(Path(speculation.draft))
            generator.load_draft(draft, draft_config)
        return SharedEngine(generator, after_step=lambda busy: self._gauges.update(self.use, busy=busy))


class Sampler(Committee):
    """Follows one policy: loading another replaces it, in the same engine where the model's shape is the same."""

    def _predecessor(self, policy: str) -> tuple[str, _Holding] | None:  # noqa: ARG002 (whichever is held)
        return next(iter(self._members.items()), None)


def _decoder(spec: PolicySpec) -> Callable[[list[int]], str] | None:
    return Tokenizer.load(Path(spec.tokenizer_folder)).decode if spec.tokenizer_folder is not None else None
