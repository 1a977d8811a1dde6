"""The roster: nobody is asked who has not acknowledged what was given, whatever happens on the way."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from actors.failures import ActorsLostError
from actors.host import ActorLostError, InlineHandle, call
from actors.roster import Roster
from actors.sampler import Acknowledged, PolicySpec
from actors.streams import InlineStreamingHandle
from actors.weights import WeightsRefusedError, WeightStore
from afm_rl.config import ModelConfig
from afm_rl.types import Weights
from afm_rl.weights import flatten, unflatten

SPEC = PolicySpec(ModelConfig(11, 8, 16, 1, 2, 1, 4), stop_ids=(3,))
#: (receiver, event, version), over all receivers.
EVENTS: list[tuple[str, str, int]] = []


def weights(version: int) -> Weights:
    return flatten({"x": np.full(4, version, np.float32)}, policy="mdloo", version=version)


class Receiver:
    """Verifies as a sampler does; takes what it was given from the store when it starts."""

    def __init__(self, *, name: str, store: InlineHandle, acknowledges: Acknowledged | None = None) -> None:
        self._name, self._acknowledges, self._held = name, acknowledges, dict[str, Acknowledged]()
        for one, spec in call(store, "assigned", name):
            self.load(one, spec)

    def load(self, weights: Weights, spec: PolicySpec) -> Acknowledged:
        assert spec is SPEC
        if not np.isfinite(unflatten(weights)["x"]).all():
            raise ValueError(f"weights of policy {weights.policy!r} hold values that are not finite")
        EVENTS.append((self._name, "load", weights.version))
        acknowledged = self._acknowledges or Acknowledged(weights.policy, weights.version, weights.digest)
        self._held[weights.policy] = acknowledged
        return acknowledged

    def held(self) -> list[Acknowledged]:
        EVENTS.append((self._name, "held", -1))
        return list(self._held.values())


class Lost:
    what = "the call"

    def result(self, timeout_s: float) -> Any:
        raise ActorLostError(f"{self.what}: its process is gone, not {timeout_s:.0f} s late")


class Faulty(InlineStreamingHandle):
    """Of its deliveries, by number: one bit of some is changed on the way; over others its process dies."""

    damages: Sequence[int] = ()
    dies: Sequence[int] = ()
    loads = 0

    def submit(self, method: str, *args: Any, **kwargs: Any) -> Any:
        if method != "load":
            return super().submit(method, *args, **kwargs)
        self.loads += 1
        if self.loads - 1 in self.dies:
            self.end()
            return Lost()
        weights, spec = args
        if self.loads - 1 in self.damages:
            sent = weights.result(1.0)
            buffers = {name: buffer.copy() for name, buffer in sent.buffers.items()}
            buffers["float32"].view(np.uint8)[5] ^= 1
            weights = dataclasses.replace(sent, buffers=buffers)
        return super().submit(method, weights, spec, **kwargs)


def setting(*faults: dict[str, Any], max_failures: int = 2) -> tuple[InlineHandle, Roster, list[Faulty]]:
    """A store, and a roster with one receiver for each given fault."""
    EVENTS.clear()
    store = InlineHandle("weights", WeightStore, {})
    handles = []
    for number, fault in enumerate(faults):
        told = {"acknowledges": fault.pop("acknowledges", None), "name": f"s-{number}", "store": store}
        handle = Faulty(f"s-{number}", Receiver, told)
        for name, value in fault.items():
            setattr(handle, name, value)
        handles.append(handle)
    return store, Roster(handles, store, max_failures=max_failures), handles


def give(store: InlineHandle, roster: Roster, version: int, sent: Weights | None = None) -> None:
    digest = call(store, "publish", sent or weights(version))
    roster.give("mdloo", version, SPEC, digest=digest)


def asked(roster: Roster) -> list[str]:
    """Those that a dispatch would ask now."""
    return [handle.name for handle in roster.handles() if roster.away(handle) is None]


def join(roster: Roster) -> None:
    """Read, as a dispatch does, what those who are away wait for, until nobody is."""
    for _ in range(9):
        for handle in roster.handles():
            if (pending := roster.away(handle)) is not None:
                roster.returned(handle, pending)


def test_everyone_acknowledges_version_and_digest() -> None:
    """Guards the loop's plain path: one load each, then all are asked, and the gauge says so."""
    store, roster, _ = setting({}, {})
    for version in (4, 5):
        give(store, roster, version)
        assert asked(roster) == ["s-0", "s-1"]
        sync = roster.sync("mdloo")
        assert (sync.in_sync, sync.version, sync.digest) == (True, version, weights(version).digest)
        assert sync.metrics() == {"weights_in_sync": 1.0, "actors_live": 2, "actors_lagging": 0}
    assert [(name, "load", version) for version in (4, 5) for name in ("s-0", "s-1")] == EVENTS
    assert call(store, "versions", "mdloo") == [5]


def test_damaged_weights_are_given_again() -> None:
    """Guards against one flipped bit: it is noticed where it arrives, and that one is not asked before whole ones came."""
    store, roster, [_, damaged] = setting({}, {"damages": (1, 2)})
    for version in (1, 2):
        give(store, roster, version)
    assert damaged.loads == 4
    assert EVENTS[2:] == [("s-0", "load", 2), ("s-1", "load", 2)]
    assert roster.sync("mdloo").in_sync


def test_one_whose_weights_always_arrive_damaged_is_never_asked() -> None:
    """Guards the bound: so many times, then the others go on without it; if there is no other, that is an error."""
    store, roster, [_, damaged] = setting({}, {"damages": range(1, 99)})
    give(store, roster, 1)
    give(store, roster, 2)
    assert damaged.loads == 1 + 3
    assert asked(roster) == ["s-0"]
    assert roster.sync("mdloo").actors == 1
    store, roster, _ = setting({"damages": range(99)})
    with pytest.raises(ActorsLostError, match=r"take policy 'mdloo' \(s-0: s-0: 3 infra.* allowed: its weights: DigestMism"):
        give(store, roster, 1)


@pytest.mark.parametrize("other", [Acknowledged("mdloo", 3, weights(4).digest), Acknowledged("mdloo", 4, "0badc0ffee")])
def test_another_version_or_digest_is_no_acknowledgement(other: Acknowledged) -> None:
    """Guards against a receiver that took something else: it is given up, and the error names what it said."""
    store, roster, _ = setting({"acknowledges": other})
    with pytest.raises(
        ActorsLostError, match=f"s-0 acknowledged Acknowledged.*version={other.version}, digest='{other.digest}"
    ):
        give(store, roster, 4)
    assert asked(roster) == []


def test_one_that_dies_over_its_weights_joins_later_with_them() -> None:
    """Guards the loop's pace and the order: `give` goes on with the others; what is given is noted before it is given."""
    store, roster, _ = setting({}, {"dies": (1,)})
    give(store, roster, 1)
    give(store, roster, 2)
    assert asked(roster) == ["s-0"]
    assert roster.sync("mdloo").lagging == ("s-1",)
    assert roster.sync("mdloo").metrics()["weights_in_sync"] == 0.0
    join(roster)
    assert asked(roster) == ["s-0", "s-1"]
    assert EVENTS[-2:] == [("s-1", "load", 2), ("s-1", "held", -1)]
    assert call(store, "versions", "mdloo") == [2]


def test_one_that_was_away_joins_with_the_newest() -> None:
    """Guards staleness: what it took when it returned has been replaced meanwhile, so it is given the newer ones first."""
    store, roster, _ = setting({}, {"dies": (1,)})
    for version in (1, 2, 3):
        give(store, roster, version)
    [one] = [handle for handle in roster.handles() if handle.name == "s-1"]
    pending = roster.away(one)
    assert pending is not None
    assert pending.result(1.0) == [Acknowledged("mdloo", 2, weights(2).digest)]
    roster.returned(one, pending)
    assert asked(roster) == ["s-0"]
    join(roster)
    assert asked(roster) == ["s-0", "s-1"]
    assert EVENTS[-1] == ("s-1", "load", 3)
    assert roster.sync("mdloo").in_sync


def test_a_death_of_all_is_waited_for() -> None:
    """Guards a loop whose samplers die together: the delivery ends when one has returned with the weights."""
    store, roster, _ = setting({"dies": (0,)}, {"dies": (0,)})
    give(store, roster, 1)
    assert asked(roster)
    join(roster)
    assert asked(roster) == ["s-0", "s-1"]


def test_refused_weights_leave_everything_as_it_was() -> None:
    """Guards a run that diverged: one error that says why; what was held is still held, asked, and taken after a restart."""
    store, roster, handles = setting({}, {})
    give(store, roster, 1)
    nan = flatten({"x": np.full(4, np.nan, np.float32)}, policy="mdloo", version=2)
    with pytest.raises(WeightsRefusedError, match="s-0, s-1 goes on without the new weights: weights of policy"):
        give(store, roster, 2, nan)
    assert roster.given("mdloo").version == 1
    assert roster.sync("mdloo").in_sync
    assert roster.accepted("mdloo", since=0) == {1}
    handles[1].end()
    assert call(handles[1], "held") == [Acknowledged("mdloo", 1, weights(1).digest)]


def test_one_that_works_is_forgiven() -> None:
    """Guards a long run: failures with answers in between do not add up; without answers they do."""
    store, roster, [handle] = setting({"dies": (1, 2, 3, 4, 5, 6)}, max_failures=2)
    give(store, roster, 0)
    for version in (1, 2, 3):
        give(store, roster, version)
        roster.answered(handle)
    give(store, roster, 4)
    give(store, roster, 5)
    with pytest.raises(ActorsLostError, match="3 infrastructure failures without progress, 2 allowed"):
        give(store, roster, 6)


def test_actors_join_and_leave() -> None:
    """Guards scaling: a new one is asked once it has acknowledged, one that leaves gets no more and is then gone."""
    store, roster, _ = setting({})
    give(store, roster, 7)
    roster.add(Faulty("s-1", Receiver, {"name": "s-1", "store": store}))
    assert asked(roster) == ["s-0"]
    assert not roster.sync("mdloo").in_sync
    assert roster.joined("s-1")
    assert asked(roster) == ["s-0", "s-1"]
    assert roster.sync("mdloo").in_sync
    [first, _] = roster.handles()
    roster.streaming(first, 1)
    roster.retire("s-0")
    assert asked(roster) == ["s-1"]
    assert not roster.idle("s-0")
    roster.streaming(first, -1)
    assert roster.idle("s-0")
    assert roster.remove("s-0") is first
    assert call(store, "assigned", "s-0") == []
    give(store, roster, 8)
    assert EVENTS[-1] == ("s-1", "load", 8)
