"""The weight store: an actor that owns what is current, and the delivery to samplers that must acknowledge the digest.

The store outlives learners and samplers, so weights survive the death of whoever made them. `deliver` notes there what each
receiver is given before it is given, and raises unless every digest came back; a receiver that is started anew asks the
store for what it was last given. What no receiver is given any more is freed, so that memory is bounded by what is in use:
bytes of a policy in training; a folder's policy is read again when somebody asks.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from actors.failures import DataError, InfrastructureError
from actors.host import ActorLostError, Handle, Pending, call, gather
from actors.sampler import PolicySpec
from actors.streams import REVIVAL_DEADLINE_S, StreamingHandle
from afm_rl.huggingface import load_params
from afm_rl.types import Weights
from afm_rl.weights import DigestMismatchError, flatten


class WeightsOutOfSyncError(InfrastructureError):
    """A receiver acknowledged, or used, other weights than those published."""


class WeightsRefusedError(DataError):
    """A receiver would not take the weights it was given, and goes on with those it had."""


@dataclass
class _Published:
    """Weights, or the folder that they can be read from again."""

    version: int
    digest: str
    weights: Weights | None
    folder: str | None = None


class WeightStore:
    """Keeps the newest published version of every policy that somebody is given, and who was given which."""

    def __init__(self) -> None:
        self._published: dict[str, _Published] = {}
        self._given: dict[str, dict[str, PolicySpec]] = {}

    def publish(self, weights: Weights) -> str:
        """Own these weights; returns their digest. An older version than the one held is refused."""
        held = self._published.get(weights.policy)
        if held is not None and held.folder is None and held.version > weights.version:
            raise ValueError(
                f"policy {weights.policy!r}: version {weights.version} is older than the published {held.version}"
            )
        self._published[weights.policy] = _Published(weights.version, weights.digest, weights)
        return weights.digest

    def publish_folder(self, policy: str, version: int, folder: str) -> str:
        """Publish a policy folder (Hugging Face layout) unless this version of it is held; returns the digest."""
        held = self._published.get(policy)
        if held is None or (held.version, held.folder) != (version, folder):
            weights = _read(policy, version, folder)
            self._published[policy] = held = _Published(version, weights.digest, weights, folder)
        return held.digest

    def fetch(self, policy: str) -> Weights:
        """The newest version of a policy. Raises KeyError naming what is held, DigestMismatchError for a changed folder."""
        held = self._published.get(policy)
        if held is None:
            raise KeyError(f"no weights of policy {policy!r}; published: {', '.join(sorted(self._published)) or 'none'}")
        if held.folder is None:
            assert held.weights is not None
            return held.weights
        weights, held.weights = held.weights or _read(policy, held.version, held.folder), None
        if weights.digest != held.digest:
            raise DigestMismatchError(
                f"{held.folder} no longer holds what was published of policy {policy!r}; export it again"
            )
        return weights

    def assign(self, receivers: Sequence[str], policy: str, spec: PolicySpec, beside: Sequence[str] = ()) -> None:
        """Note that these receivers hold `policy` from now on, and of what they held only what `beside` names."""
        for receiver in receivers:
            kept = {name: held for name, held in self._given.get(receiver, {}).items() if name in beside}
            self._hand(receiver, {**kept, policy: spec})

    def assigned(self, receiver: str) -> list[tuple[Weights, PolicySpec]]:
        """What a receiver was last given, for one that was started anew."""
        return [(self.fetch(policy), spec) for policy, spec in self._given.get(receiver, {}).items()]

    def release(self, receivers: Sequence[str]) -> None:
        """Note that these receivers hold nothing any more."""
        for receiver in receivers:
            self._hand(receiver, {})

    def forget(self, policy: str) -> None:
        """Free a policy's weights, whoever was given them: an older version may be published again."""
        self._published.pop(policy, None)
        for given in self._given.values():
            given.pop(policy, None)

    def policies(self) -> list[str]:
        """The policies published and not freed."""
        return sorted(self._published)

    def _hand(self, receiver: str, given: dict[str, PolicySpec]) -> None:
        before, self._given[receiver] = self._given.get(receiver, {}), given
        in_use = {policy for held in self._given.values() for policy in held}
        for policy in set(before) - in_use:
            self._published.pop(policy, None)


def deliver(
    store: Handle,
    receivers: Sequence[StreamingHandle],
    policy: str,
    spec: PolicySpec,
    *,
    digest: str,
    beside: Sequence[str] = (),
    made_by: Pending | None = None,
    deadline_s: float = REVIVAL_DEADLINE_S,
) -> None:
    """Bring the store's version of `policy` to every receiver, instead of all that it held but `beside`.

    `made_by` is the call whose value was published: under Ray its value then travels from where it lies, not as a copy.
    Raises WeightsOutOfSyncError naming who disagrees about the digest, WeightsRefusedError naming who would not take them.
    """
    call(store, "assign", [r.name for r in receivers], policy, spec, beside, deadline_s=deadline_s)
    weights = made_by or store.submit("fetch", policy)
    loading = []
    for receiver in receivers:
        with _refusal_named(receiver):
            loading.append(receiver.submit("load", weights, spec))
    late = []
    for receiver, pending in zip(receivers, loading, strict=True):
        with _refusal_named(receiver):
            if _acknowledged(receiver, pending, policy, deadline_s) != digest:
                late.append(receiver.name)
    if late:
        raise WeightsOutOfSyncError(f"policy {policy!r}: {', '.join(late)} did not acknowledge digest {digest[:12]}")


def _acknowledged(receiver: StreamingHandle, loading: Pending, policy: str, deadline_s: float) -> str | None:
    """The digest that a receiver has verified; one that died over it has taken the weights from the store on its return."""
    try:
        found: str | None = gather([loading], deadline_s=deadline_s)[0]
    except ActorLostError:
        gather([receiver.revive()], deadline_s=deadline_s)
        found = call(receiver, "digest", policy, deadline_s=deadline_s)
    return found


@contextmanager
def _refusal_named(receiver: StreamingHandle) -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        cause = getattr(error, "cause", error)  # Ray wraps what an actor raised
        raise WeightsRefusedError(f"{receiver.name} goes on without the new weights: {cause}") from error


def publish_folder(store: Handle, policy: str, version: int, folder: Path) -> str:
    """Publish a policy folder through the store; returns its digest."""
    return str(call(store, "publish_folder", policy, version, str(folder)))


def _read(policy: str, version: int, folder: str) -> Weights:
    return flatten(load_params(Path(folder))[1], policy=policy, version=version)
