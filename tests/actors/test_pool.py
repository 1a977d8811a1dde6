"""A pool of actors: its answers are those of one actor, whoever dies, freezes or was started anew unnoticed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from actors.failures import ActorsLostError
from actors.host import ActorLostError
from actors.pool import Pool
from actors.streams import InlineStreamingHandle


class Scale:
    """Multiplies by what it was prepared with."""

    events: list[tuple[str, str, Any]] = []  # noqa: RUF012 (shared on purpose: the order over all actors)

    def __init__(self, *, name: str) -> None:
        self._name, self._factor = name, None

    def load(self, factor: int) -> None:
        if factor < 0:
            raise ValueError("a factor below 0")
        self._factor = factor
        self.events.append((self._name, "load", factor))

    def work(self, items: Sequence[int], more: Sequence[int]) -> list[int]:
        self.events.append((self._name, "work", list(items)))
        assert self._factor is not None
        return [self._factor * a + b for a, b in zip(items, more, strict=True)]


class Lost:
    def __init__(self, what: str) -> None:
        self.what = what

    def result(self, timeout_s: float) -> Any:
        raise ActorLostError(f"{self.what}: its process is gone, not {timeout_s:.0f} s late")


class Silent:
    """A call that is never answered."""

    what = "a-0.work"

    def result(self, timeout_s: float) -> Any:
        raise AssertionError(f"read after {timeout_s} s although it is not ready")


class Failing(InlineStreamingHandle):
    """Its process dies (or is silent) over its n-th call of `work`, for each n in `over`."""

    def __init__(self, name: str, over: Sequence[int], how: str = "dies") -> None:
        super().__init__(name, Scale, {"name": name})
        self.calls, self.over, self.how, self.ends = 0, over, how, 0

    def submit_in(self, life: str, method: str, *args: Any) -> Any:
        if method != "work":
            return super().submit_in(life, method, *args)
        self.calls += 1
        if self.calls - 1 not in self.over:
            return super().submit_in(life, method, *args)
        if self.how == "silent":
            return Silent()
        self.end()
        return Lost(f"{self.name}.work")

    def end(self) -> None:
        self.ends += 1
        super().end()


def pool(*handles: InlineStreamingHandle, **options: Any) -> Pool:
    Scale.events = []
    return Pool("scale", handles, **options)


def names(*events: str) -> list[tuple[str, str]]:
    return [(event[0], event[1]) for event in Scale.events if not events or event[1] in events]


def test_work_is_shared_in_order() -> None:
    """Guards the cut: contiguous shares, answers in the order of the items, each actor prepared once."""
    three = pool(*(Failing(f"a-{i}", ()) for i in range(3)))
    three.prepare("load", 10)
    for _ in range(2):
        parts = three.map("work", range(7), range(100, 107))
        assert [x for part in parts for x in part] == [10 * a + 100 + a for a in range(7)]
    assert [event for event in Scale.events if event[1] == "load"] == [(f"a-{i}", "load", 10) for i in range(3)]
    assert three.map("work", [], []) == []


@pytest.mark.parametrize(("count", "expected"), [(7, [3, 3, 1]), (3, [1, 1, 1]), (2, [1, 1]), (4, [2, 2]), (0, [])])
def test_the_cut_depends_on_counts_alone(count: int, expected: list[int]) -> None:
    """Guards reproducibility: contiguous shares in order, every item once, nobody called with nothing."""
    three = pool(*(Failing(f"a-{i}", ()) for i in range(3)))
    three.prepare("load", 1)
    assert [len(part) for part in three.map("work", range(count), range(count))] == expected


def test_a_lost_share_is_done_again_by_a_prepared_actor() -> None:
    """Guards rewards against a death in the middle: same answers, and nobody works before it was prepared anew."""
    two = pool(Failing("a-0", (0,)), Failing("a-1", ()))
    two.prepare("load", 10)
    parts = two.map("work", range(4), range(4))
    assert [x for part in parts for x in part] == [0, 11, 22, 33]
    two.map("work", range(4), range(4))
    for name in ("a-0", "a-1"):
        mine = [event for event in names() if event[0] == name]
        assert mine.index((name, "load")) < mine.index((name, "work"))
    assert names("load").count(("a-0", "load")) == 2


def test_an_actor_started_anew_between_two_calls_is_prepared_first() -> None:
    """Guards against the silent restart: an empty reward actor must not answer (with zeros, say) as if it were prepared."""
    handle = Failing("a-0", ())
    one = pool(handle)
    one.prepare("load", 7)
    handle.end()
    assert one.map("work", [1], [0]) == [[7]]
    assert names() == [("a-0", "load"), ("a-0", "load"), ("a-0", "work")]


def test_the_newest_preparation_counts() -> None:
    """Guards the next round's reward model: all are prepared again, also those that were away."""
    two = pool(Failing("a-0", (0,)), Failing("a-1", ()))
    two.prepare("load", 1)
    two.map("work", range(2), range(2))
    two.prepare("load", 5)
    assert [x for part in two.map("work", range(2), range(2)) for x in part] == [0, 6]


def test_too_many_losses_are_one_error() -> None:
    """Guards against dying for ever: the error says who was lost, and of what."""
    one = pool(Failing("a-0", range(9)), max_losses=2)
    one.prepare("load", 1)
    with pytest.raises(ActorsLostError, match=r"no scale actor is left for work \(a-0: (.*then ){2}a-0.work: its process"):
        one.map("work", [1], [1])


def test_a_late_call_ends_its_actor_and_is_done_again() -> None:
    """Guards against a process that lives and does nothing: it is killed after the deadline, by name."""
    now_s = [0.0]

    def wait(calls: Sequence[Any], timeout_s: float) -> list[Any]:
        done = [call for call in calls if not isinstance(call, Silent)]
        now_s[0] += 0.0 if done else timeout_s
        return done

    silent = Failing("a-0", (0,), how="silent")
    one = pool(silent, deadline_s=30.0, wait=wait, clock=lambda: now_s[0])
    one.prepare("load", 3)
    assert one.map("work", [2], [0]) == [[6]]
    assert (silent.ends, now_s[0]) == (1, 30.0)


def test_what_the_role_raises_is_raised() -> None:
    """Guards diagnosis: a mistake is not a loss, and is not tried again."""
    one = pool(Failing("a-0", ()))
    with pytest.raises(ValueError, match="a factor below 0"):
        one.prepare("load", -1)
    assert Scale.events == []


def test_actors_join_and_leave() -> None:
    """Guards scaling: a new one is prepared before it works, a removed one gets nothing more."""
    some = pool(Failing("a-0", ()))
    some.prepare("load", 2)
    some.add(Failing("a-1", ()))
    assert some.joined("a-1")
    for _ in range(2):
        assert [x for part in some.map("work", range(4), range(4)) for x in part] == [0, 3, 6, 9]
    mine = [event for event in names() if event[0] == "a-1"]
    assert mine[:2] == [("a-1", "load"), ("a-1", "work")]
    some.retire("a-0")
    before = len(Scale.events)
    some.map("work", range(4), range(4))
    assert Scale.events[before:] == [("a-1", "work", [0, 1, 2, 3])]
    assert some.idle("a-0")
    assert some.remove("a-0").name == "a-0"
    some.map("work", range(4), range(4))
    assert names()[-1] == ("a-1", "work")
