"""The weight store: an actor that owns what was published, and the delivery to samplers that must acknowledge the digest.

The store outlives learners and samplers, so weights survive the death of whoever made them. A sampler that has not
acknowledged the digest of a version does not generate: `deliver` is the only way weights reach one, and it raises unless
every digest came back.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from actors.host import Handle, call, gather
from actors.sampler import PolicySpec
from afm_rl.huggingface import load_params
from afm_rl.types import Weights
from afm_rl.weights import flatten


class WeightsOutOfSyncError(RuntimeError):
    """A receiver acknowledged another digest than the one published."""


class WeightStore:
    """Keeps the newest published version of every policy."""

    def __init__(self) -> None:
        self._published: dict[str, Weights] = {}

    def publish(self, weights: Weights) -> str:
        """Own these weights; returns their digest. An older version than the one held is refused."""
        held = self._published.get(weights.policy)
        if held is not None and held.version > weights.version:
            raise ValueError(
                f"policy {weights.policy!r}: version {weights.version} is older than the published {held.version}"
            )
        self._published[weights.policy] = weights
        return weights.digest

    def publish_folder(self, policy: str, version: int, folder: str) -> str:
        """Publish a policy folder (Hugging Face layout) unless this version is held already; returns the digest."""
        held = self._published.get(policy)
        if held is None or held.version != version:
            _, params = load_params(Path(folder))
            self._published[policy] = flatten(params, policy=policy, version=version)
        return self._published[policy].digest

    def fetch(self, policy: str) -> Weights:
        """The newest version of a policy. Raises KeyError naming what is held."""
        if policy not in self._published:
            raise KeyError(f"no weights of policy {policy!r}; published: {', '.join(sorted(self._published)) or 'none'}")
        return self._published[policy]

    def forget(self, policy: str) -> None:
        """Free a policy's weights."""
        self._published.pop(policy, None)


def deliver(
    store: Handle, receivers: Sequence[Handle], policy: str, spec: PolicySpec, *, digest: str, deadline_s: float = 120.0
) -> None:
    """Bring the store's version of `policy` to every receiver. Raises WeightsOutOfSyncError naming who disagrees."""
    weights = store.submit("fetch", policy)
    acknowledged = gather([r.submit("load", weights, spec) for r in receivers], deadline_s=deadline_s)
    late = [r.name for r, found in zip(receivers, acknowledged, strict=True) if found != digest]
    if late:
        raise WeightsOutOfSyncError(f"policy {policy!r}: {', '.join(late)} did not acknowledge digest {digest[:12]}")


def publish_folder(store: Handle, policy: str, version: int, folder: Path) -> str:
    """Publish a policy folder through the store; returns its digest."""
    return str(call(store, "publish_folder", policy, version, str(folder)))
