"""The weight store: an actor that owns what is current, and knows who is given what.

The store outlives learners and samplers, so weights survive the death of whoever made them. `actors/roster.py` notes here
what a receiver is given before it is given, and that it was acknowledged or refused; a receiver that is started anew asks
for what it was last given, and gets those very weights, not newer ones. What nobody is given any more is freed, so memory
is bounded by what is in use: bytes of a policy in training; a folder's policy is read again when somebody asks.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

from actors.failures import DataError, InfrastructureError
from actors.host import Handle, call
from actors.sampler import PolicySpec
from afm_rl.huggingface import load_params
from afm_rl.types import Weights
from afm_rl.weights import DigestMismatchError, flatten


class WeightsOutOfSyncError(InfrastructureError):
    """A receiver acknowledged, or used, other weights than those published."""


class WeightsRefusedError(DataError):
    """Receivers would not take the weights they were given, and go on with those they had."""


@dataclass
class _Published:
    """Weights, or the folder that they can be read from again."""

    version: int
    digest: str
    weights: Weights | None
    folder: str | None = None


@dataclass(frozen=True)
class _Given:
    digest: str
    spec: PolicySpec


Given = dict[str, _Given]


class WeightStore:
    """Keeps the newest published version of every policy that somebody is given, and who was given which."""

    def __init__(self) -> None:
        self._published: dict[str, dict[str, _Published]] = {}  # by policy and digest, the newest last
        self._given: dict[str, Given] = {}
        self._before: dict[str, Given] = {}  # what a receiver had acknowledged before what it has not yet

    def publish(self, weights: Weights) -> str:
        """Own these weights; returns their digest. An older version than the newest held is refused."""
        held = self._newest(weights.policy)
        if held is not None and held.folder is None and held.version > weights.version:
            raise ValueError(
                f"policy {weights.policy!r}: version {weights.version} is older than the published {held.version}"
            )
        self._hold(weights.policy, _Published(weights.version, weights.digest, weights))
        return weights.digest

    def publish_folder(self, policy: str, version: int, folder: str) -> str:
        """Publish a policy folder (Hugging Face layout) unless this version of it is held; returns the digest."""
        held = self._newest(policy)
        if held is None or (held.version, held.folder) != (version, folder):
            weights = _read(policy, version, folder)
            held = _Published(version, weights.digest, weights, folder)
            self._hold(policy, held)
        return held.digest

    def fetch(self, policy: str, digest: str | None = None) -> Weights:
        """The weights of a policy with that digest, by default the newest.

        Raises KeyError naming what is held, DigestMismatchError for a folder that was changed.
        """
        held = self._newest(policy) if digest is None else self._published.get(policy, {}).get(digest)
        if held is None:
            what = f"policy {policy!r}" + (f" with digest {digest[:12]}" if digest is not None else "")
            raise KeyError(f"no weights of {what}; published: {', '.join(sorted(self._published)) or 'none'}")
        if held.folder is None:
            assert held.weights is not None
            return held.weights
        weights, held.weights = held.weights or _read(policy, held.version, held.folder), None
        if weights.digest != held.digest:
            raise DigestMismatchError(
                f"{held.folder} no longer holds what was published of policy {policy!r}; export it again"
            )
        return weights

    def assign(
        self, receivers: Sequence[str], policy: str, spec: PolicySpec, *, digest: str, beside: Sequence[str] = ()
    ) -> None:
        """Note that these receivers are about to hold `policy`, and of what they held only what `beside` names.

        Raises WeightsOutOfSyncError when the store does not hold such weights.
        """
        if digest not in self._published.get(policy, {}):
            held = self._newest(policy)
            found = f"digest {held.digest[:12]} of version {held.version}" if held is not None else "none"
            raise WeightsOutOfSyncError(f"policy {policy!r}: the weight store holds {found}, not digest {digest[:12]}")
        for receiver in receivers:
            before = self._given.get(receiver, {})
            self._before.setdefault(receiver, before)
            kept = {name: held for name, held in before.items() if name in beside}
            self._hand(receiver, {**kept, policy: _Given(digest, spec)})

    def settle(self, receivers: Sequence[str]) -> None:
        """Note that these receivers acknowledged what they were last given."""
        self._sweep([policy for receiver in receivers for policy in self._before.pop(receiver, {})])

    def withdraw(self, receivers: Sequence[str]) -> None:
        """Note that these receivers refused what they were last given, and hold what they had acknowledged before."""
        for receiver in receivers:
            self._hand(receiver, self._before.pop(receiver, {}))

    def assigned(self, receiver: str) -> list[tuple[Weights, PolicySpec]]:
        """What a receiver was last given, for one that was started anew."""
        return [(self.fetch(policy, given.digest), given.spec) for policy, given in self._given.get(receiver, {}).items()]

    def release(self, receivers: Sequence[str]) -> None:
        """Note that these receivers hold nothing any more."""
        for receiver in receivers:
            before = self._before.pop(receiver, {})
            self._hand(receiver, {})
            self._sweep(before)

    def forget(self, policy: str) -> None:
        """Free a policy's weights, whoever was given them: an older version may be published again."""
        self._published.pop(policy, None)
        for held in (*self._given.values(), *self._before.values()):
            held.pop(policy, None)

    def policies(self) -> list[str]:
        """The policies published and not freed."""
        return sorted(self._published)

    def versions(self, policy: str) -> list[int]:
        """The versions of a policy that are held, the newest last."""
        return [held.version for held in self._published.get(policy, {}).values()]

    def _newest(self, policy: str) -> _Published | None:
        return next(reversed(self._published.get(policy, {}).values()), None)

    def _hold(self, policy: str, published: _Published) -> None:
        others = {digest: held for digest, held in self._published.get(policy, {}).items() if digest != published.digest}
        self._published[policy] = {**others, published.digest: published}
        in_use = self._in_use()
        self._free(policy, in_use)

    def _hand(self, receiver: str, given: Given) -> None:
        before, self._given[receiver] = self._given.get(receiver, {}), given
        self._sweep(before)

    def _sweep(self, policies: Collection[str]) -> None:
        """Free what nobody is given of these policies; of one that is in use the newest stays."""
        in_use = self._in_use()
        for policy in set(policies):
            if any(name == policy for name, _ in in_use):
                self._free(policy, in_use)
            else:
                self._published.pop(policy, None)

    def _free(self, policy: str, in_use: set[tuple[str, str]]) -> None:
        held, newest = self._published.get(policy, {}), self._newest(policy)
        self._published[policy] = {d: one for d, one in held.items() if (policy, d) in in_use or one is newest}

    def _in_use(self) -> set[tuple[str, str]]:
        receivers = (*self._given.values(), *self._before.values())
        return {(policy, given.digest) for held in receivers for policy, given in held.items()}


def publish_folder(store: Handle, policy: str, version: int, folder: Path) -> str:
    """Publish a policy folder through the store; returns its digest."""
    return str(call(store, "publish_folder", policy, version, str(folder)))


def _read(policy: str, version: int, folder: str) -> Weights:
    return flatten(load_params(Path(folder))[1], policy=policy, version=version)
