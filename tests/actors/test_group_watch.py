"""The life of a group with small fakes: who is taken for lost, after how long, and in which order things then happen."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest

from actors.group import GroupFailedError, GroupHandle, GroupRestartedError, GroupSpec
from actors.group_watch import MemberLost
from actors.host import DeadlineError, call, gather
from afm_rl.errors import UserError

HEARTBEAT_S = 10.0
SPEC = GroupSpec(processes=2, heartbeat_s=HEARTBEAT_S, max_restarts=2, start_deadline_s=60)


@dataclass
class Clock:
    now_s: float = 0.0

    def __call__(self) -> float:
        return self.now_s


@dataclass(eq=False)
class Call:
    """A call that ends at a time, with a value or an exception."""

    ends_s: float
    outcome: Any = None


@dataclass
class Fake:
    """One life of two members. `answers`: per rank, seconds until a call ends and how; `frozen` ranks answer no beat."""

    clock: Clock
    log: list[str]
    answers: Sequence[tuple[float, Any]] = ((1.0, "zero"), (1.0, "one"))
    frozen: Sequence[int] = ()
    placed_s: float = 0.0
    formed: list[Call] = field(default_factory=list)
    sleeps_s: float = 0.0

    def __post_init__(self) -> None:
        self.log.append("build")
        self.placed = [Call(self.clock() + self.placed_s) for _ in range(2)]
        self.formed = self.formed or [Call(self.clock() + self.placed_s) for _ in range(2)]

    def send(self, method: str, args: Sequence[Any], kwargs: dict[str, Any]) -> tuple[Call, list[Call]]:  # noqa: ARG002
        self.log.append(method)
        calls = [Call(self.clock() + seconds, outcome) for seconds, outcome in self.answers]
        return calls[0], calls

    def beat(self, rank: int) -> Call:
        return Call(math.inf if rank in self.frozen else self.clock() + 0.3 + self.sleeps_s)

    def ready(self, calls: Sequence[Call], timeout_s: float) -> list[Call]:
        first = min((c.ends_s for c in calls), default=math.inf)
        self.clock.now_s = max(self.clock.now_s, min(first, self.clock.now_s + max(timeout_s, 1e-3)))
        self.clock.now_s += self.sleeps_s  # the driver itself was stopped during this look
        return [c for c in calls if c.ends_s <= self.clock.now_s]

    def value(self, call: Call) -> Any:
        if isinstance(call.outcome, Exception):
            raise call.outcome
        return call.outcome

    def discard(self, call: Call) -> None:
        assert call.ends_s <= self.clock.now_s

    def kill(self) -> None:
        self.log.append("kill")


def group(*lives: dict[str, Any]) -> tuple[GroupHandle, Clock, list[str]]:
    """A group that lives these lives, the last one for ever."""
    clock, log = Clock(), []
    coming = iter(lives)
    return GroupHandle("learner", SPEC, lambda: Fake(clock, log, **next(coming, lives[-1])), clock), clock, log


def test_a_frozen_member_is_noticed_within_the_heartbeat_and_takes_the_group_with_it() -> None:
    """Guards the order: everything is killed before anything is built, and the caller learns who was lost."""
    handle, clock, log = group({"answers": ((math.inf, None),) * 2, "frozen": [1]}, {})
    with pytest.raises(GroupRestartedError, match=r"lost rank 1 \(no sign of life for") as caught:
        call(handle, "train")
    assert 0.5 * HEARTBEAT_S < clock() <= HEARTBEAT_S
    assert (caught.value.rank, caught.value.restarts, handle.restarts) == (1, 1, 1)
    assert log == ["build", "train", "kill", "build"]
    assert 0.5 * HEARTBEAT_S < handle.restart_seconds <= HEARTBEAT_S
    assert call(handle, "train") == "zero"


def test_a_member_that_answers_beats_may_work_for_minutes() -> None:
    """Guards whoever compiles."""
    handle, clock, log = group({"answers": ((300.0, "done"), (300.0, None))})
    assert call(handle, "train") == "done"
    assert clock() >= 300
    assert log == ["build", "train"]


def test_a_driver_that_slept_takes_nobody_for_dead() -> None:
    """Guards against the driver's own pause: beats that were under way meanwhile do not count it."""
    handle, _, log = group({"answers": ((1000.0, "done"), (1000.0, None)), "sleeps_s": 60.0})
    assert call(handle, "train", deadline_s=5000) == "done"
    assert log == ["build", "train"]


def test_a_dead_member_explains_its_peers_exception() -> None:
    """Guards the cause: the survivor's broken connection comes first, the death that broke it a moment later."""
    died = (1.5, MemberLost("SIGKILL"))
    handle, clock, log = group({"answers": ((1.0, RuntimeError("connection closed by peer")), died)}, {})
    with pytest.raises(GroupRestartedError, match=r"lost rank 1 \(SIGKILL\)"):
        call(handle, "train")
    assert clock() < 2
    assert log == ["build", "train", "kill", "build"]


def test_the_same_exception_on_all_ranks_is_the_callers() -> None:
    """Guards the users' mistakes: no restart, and the group goes on."""
    mistake = UserError("no such file")
    handle, _, log = group({"answers": ((1.0, mistake), (2.0, UserError("no such file")))})
    with pytest.raises(UserError) as caught:
        call(handle, "train")
    assert caught.value is mistake
    assert (log, handle.restarts) == (["build", "train"], 0)


@pytest.mark.parametrize("other", [(math.inf, None), (1.5, "well"), (1.5, KeyError("other"))])
def test_an_exception_of_one_rank_ends_the_wait_and_the_group(other: tuple[float, Any]) -> None:
    """Guards against waiting for ranks in a collective, and against members that no longer agree."""
    handle, clock, log = group({"answers": ((1.0, ValueError("bad batch")), other)}, {})
    with pytest.raises(ValueError, match="bad batch"):
        call(handle, "train")
    assert clock() <= 1.0 + HEARTBEAT_S + 0.2
    assert (log, handle.restarts) == (["build", "train", "kill", "build"], 1)


def test_calls_of_an_earlier_life_do_not_restart_the_next_one() -> None:
    """Guards calls in flight: one loss is one restart, whoever hears of it."""
    handle, _, log = group({"answers": ((math.inf, None), (1.0, MemberLost("oom")))}, {})
    first, second = handle.submit("train"), handle.submit("publish")
    for pending in (first, second):
        with pytest.raises(GroupRestartedError, match="restart 1"):
            gather([pending])
    assert log == ["build", "train", "publish", "kill", "build"]


def test_the_budget_counts_losses_without_progress() -> None:
    """Guards against rebuilding for ever: two losses may be, the third is the end, unless work was made safe in between."""
    dies = {"answers": ((1.0, MemberLost("oom")), (1.0, MemberLost("oom")))}
    handle, _, log = group(dies)
    for _ in range(2):
        for _ in range(2):
            with pytest.raises(GroupRestartedError):
                call(handle, "train")
        handle.progressed()
    for _ in range(2):
        with pytest.raises(GroupRestartedError):
            call(handle, "train")
    with pytest.raises(GroupFailedError, match="lost 3 times without progress: rank 0: oom; rank 0: oom; rank 0: oom"):
        call(handle, "train")
    assert handle.restarts == 6
    assert log[-1] == "kill"
    with pytest.raises(GroupFailedError, match="has ended"):
        handle.ping()


def test_a_loss_while_the_group_forms_counts_too() -> None:
    """Guards the rebuild itself: a member that dies while joining is a loss like any other."""
    dies = [Call(5.0, MemberLost("oom")), Call(5.0)]
    handle, _, log = group({"answers": ((1.0, MemberLost("oom")), (1.0, None))}, {"formed": dies}, {})
    with pytest.raises(GroupRestartedError, match="restart 2"):
        call(handle, "train")
    assert log == ["build", "train", "kill", "build", "kill", "build"]


def test_a_wait_that_lasts_too_long_names_the_call() -> None:
    """Guards every wait: members that are alive and never answer are the caller's deadline to notice."""
    handle, clock, log = group({"answers": ((1.0, None), (math.inf, None))})
    with pytest.raises(DeadlineError, match=r"waited 30 s for learner\.train") as caught:
        call(handle, "train", deadline_s=30)
    assert "rank(s) [1] have not answered" in str(caught.value.__cause__)
    assert clock() == pytest.approx(30, abs=0.2)
    assert log == ["build", "train"]


def test_a_group_that_cannot_be_placed_or_formed_says_so() -> None:
    """Guards the start: which of the two it was, what was asked for, and that nothing is left waiting."""
    handle, clock, log = group({"placed_s": math.inf})
    with pytest.raises(
        UserError, match=r"learner could not be placed within 60 s: it asks for 2 process\(es\) with 0.5 CPU each"
    ):
        handle.ping().result(math.inf)
    assert (clock(), log) == (pytest.approx(60, abs=0.2), ["build", "kill"])
    handle, _, _ = group({"formed": [Call(math.inf), Call(math.inf)]})
    with pytest.raises(UserError, match="did not form a mesh within 60 s"):
        handle.ping().result(math.inf)


def test_the_roles_own_construction_error_comes_through() -> None:
    """Guards diagnosis at the start: the role's exception, once, and no rebuild of what cannot be built."""
    mistake = ValueError("no such preset")
    handle, _, log = group({"formed": [Call(1.0, mistake), Call(1.0, ValueError("no such preset"))]})
    with pytest.raises(ValueError) as caught:
        call(handle, "train")
    assert caught.value is mistake
    assert log == ["build", "train", "kill"]
