"""Samplers and the committee: actors that generate responses from the weights they last acknowledged.

Consumes `GenerationRequest`s and `Weights`; produces `Group`s stamped with policy and version. Neither generates before it
has loaded weights, and `load` answers with the digest of the bytes it received. A sampler follows one policy; the
committee (4.3.2) holds every member and answers for each.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from afm_rl.config import ModelConfig
from afm_rl.generate import Generator
from afm_rl.types import GenerationRequest, Group, Weights
from afm_rl.weights import digest_of, unflatten


@dataclass(frozen=True)
class PolicySpec:
    """What a generator must know beside the weights: the model's shape and the tokens that end a response."""

    config: ModelConfig
    stop_ids: tuple[int, ...]


@dataclass
class _Holding:
    spec: PolicySpec
    generator: Generator


class Committee:
    """Serves several policies side by side."""

    def __init__(self, *, max_batch: int, compute_dtype: str = "float32") -> None:
        self._max_batch, self._dtype = max_batch, compute_dtype
        self._members: dict[str, _Holding] = {}

    def load(self, weights: Weights, spec: PolicySpec) -> str:
        """Verify and hold these weights under their policy's name; returns the digest of the bytes received."""
        params = unflatten(weights)
        held = self._members.get(weights.policy)
        if held is None or held.spec != spec:
            generator = Generator(spec.config, stop_ids=spec.stop_ids, max_batch=self._max_batch, compute_dtype=self._dtype)
            held = self._members[weights.policy] = _Holding(spec, generator)
        held.generator.load(params, policy=weights.policy, version=weights.version)
        return digest_of(weights.buffers, weights.layout)

    def members(self) -> list[str]:
        """Names of the policies held."""
        return sorted(self._members)

    def keep_only(self, members: Sequence[str]) -> None:
        """Free every other member's weights."""
        for name in set(self._members) - set(members):
            del self._members[name]

    def sample(self, member: str, requests: Sequence[GenerationRequest]) -> list[Group]:
        """The answers of one member, in order. Raises RuntimeError when it holds no such policy."""
        if member not in self._members:
            raise RuntimeError(
                f"asked for policy {member!r}, but no weights of it were delivered here; held: "
                f"{', '.join(self.members()) or 'none'}"
            )
        return self._members[member].generator.generate(requests)


class Sampler(Committee):
    """Follows one policy: loading another replaces it."""

    def load(self, weights: Weights, spec: PolicySpec) -> str:
        digest = super().load(weights, spec)
        self.keep_only([weights.policy])
        return digest

    def generate(self, requests: Sequence[GenerationRequest]) -> list[Group]:
        """The current policy's answers, in order. Raises RuntimeError before the first delivery."""
        held = self.members()
        if not held:
            raise RuntimeError("this sampler holds no weights yet: deliver some before asking it to generate")
        return self.sample(held[0], requests)
