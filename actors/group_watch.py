"""The wait for a group's call: every member's answer, and every member's pulse, until all have answered or one is lost.

A member is lost when Ray says that its process is gone, or when a beat has been out for longer than the heartbeat. A beat
ages only while somebody looks: a driver that was busy elsewhere, or asleep, takes nobody for dead. An ordinary exception of
the role on all ranks is the caller's; on some ranks only it is a `Split`: the others may hang in a collective for ever.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from actors.group_member import Process
from actors.host import ActorStats, RayPending

#: Beats sent within one heartbeat.
BEATS = 5
#: Longest look without looking at the clock again.
POLL_S = 0.1


class MemberLost(Exception):  # noqa: N818 (an event, not a mistake)
    """The process behind a call is gone."""


class Loss(Exception):  # noqa: N818
    """A member is dead or frozen, for `silent_s` seconds already."""

    def __init__(self, rank: int, cause: str, silent_s: float = 0.0) -> None:
        super().__init__(f"rank {rank}: {cause}")
        self.rank, self.cause, self.silent_s = rank, cause, silent_s


class Split(Exception):  # noqa: N818
    """Some ranks raised and others did not: the members no longer agree."""

    def __init__(self, rank: int, error: Exception) -> None:
        super().__init__(f"rank {rank} raised {type(error).__name__} where others did not")
        self.rank, self.error = rank, error


class Members(Protocol):
    """The processes of one life of a group. A call is whatever `send`, `beat`, `placed` and `formed` hold."""

    @property
    def placed(self) -> Sequence[Any]:
        """Per member, the call that ends once it has its place."""

    @property
    def formed(self) -> Sequence[Any]:
        """Per member, the call that ends once it has joined the mesh and constructed its role."""

    def send(self, method: str, args: Sequence[Any], kwargs: dict[str, Any]) -> tuple[Any, Sequence[Any]]:
        """Start a method on every member: the call with rank 0's value, and one call per rank that says it has ended."""

    def beat(self, rank: int) -> Any:
        """Ask for a sign of life."""

    def ready(self, calls: Sequence[Any], timeout_s: float) -> Sequence[Any]:
        """Those of the calls that have ended, as soon as one has."""

    def value(self, call: Any) -> Any:
        """The value of a call that has ended, or its exception; MemberLost when its process is gone."""

    def discard(self, call: Any) -> None:
        """Forget the value of a call that has failed."""

    def stats(self) -> list[ActorStats]:
        """What every member did."""

    def pulses(self) -> Mapping[str, RayPending]:
        """Ask every member, by name, what it is doing."""

    def processes(self) -> list[Process]:
        """Where the members run that have been placed."""

    def kill(self) -> None:
        """End every member, stopped ones too, and give their place back; returns when they are gone."""


@dataclass
class _Pulse:
    due_s: float
    call: Any = None
    age_s: float = 0.0


class Watch:
    """The pulses of a group's members, and the looks at its calls. `heartbeat_s` infinite: no pulses."""

    def __init__(
        self, members: Members, *, size: int, heartbeat_s: float, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._members, self.clock = members, clock
        self._every_s = heartbeat_s / BEATS
        # Noticed within the heartbeat: a member may freeze just after a beat, and a look may last a whole poll.
        self._limit_s = heartbeat_s - self._every_s - 2 * POLL_S
        self._pulses = [_Pulse(clock() + self._every_s) for _ in range(size)]
        self._looked_s = clock()

    def look(self, calls: Sequence[Any], timeout_s: float) -> list[Any]:
        """Those of the calls that have ended within a poll (or the timeout). Raises Loss."""
        for rank, pulse in enumerate(self._pulses):
            if pulse.call is None and self.clock() >= pulse.due_s:
                pulse.call, pulse.age_s = self._members.beat(rank), 0.0
        beats = [pulse.call for pulse in self._pulses if pulse.call is not None]
        ended = list(self._members.ready([*calls, *beats], min(POLL_S, max(0.0, timeout_s))))
        seen_s = min(self.clock() - self._looked_s, 2 * POLL_S)
        self._looked_s = self.clock()
        for rank, pulse in enumerate(self._pulses):
            self._age(rank, pulse, ended, seen_s)
        return [call for call in calls if call in ended]

    def _age(self, rank: int, pulse: _Pulse, ended: list[Any], seen_s: float) -> None:
        if pulse.call is None:
            return
        if pulse.call in ended:
            try:
                self._members.value(pulse.call)
            except MemberLost as lost:
                raise Loss(rank, str(lost)) from lost
            pulse.call, pulse.due_s = None, self.clock() + self._every_s
            return
        pulse.age_s += seen_s
        if pulse.age_s > self._limit_s:
            raise Loss(
                rank, f"no sign of life for {pulse.age_s:.1f} s: its process is stopped or its node is gone", pulse.age_s
            )


def collect(watch: Watch, members: Members, calls: Sequence[Any], *, timeout_s: float, grace_s: float) -> None:
    """Wait until every rank's call has ended well.

    Raises the role's exception when all ranks raised one of the same type, Split when only some did (after `grace_s`, in
    which a lost peer shows itself), Loss when a member is lost, TimeoutError naming the ranks that have not answered.
    """
    waiting, failed = dict(enumerate(calls)), dict[int, Exception]()
    end_s = watch.clock() + timeout_s
    while waiting:
        ended = watch.look(list(waiting.values()), end_s - watch.clock())
        for rank in [rank for rank, call in waiting.items() if call in ended]:
            error = _failure(members, rank, waiting.pop(rank))
            if error is not None:
                if not failed:
                    end_s = min(end_s, watch.clock() + grace_s)
                failed[rank] = error
        if waiting and watch.clock() >= end_s:
            if failed:
                break
            raise TimeoutError(f"rank(s) {sorted(waiting)} have not answered")
    if failed:
        rank, first = next(iter(failed.items()))
        if len(failed) == len(calls) and len({type(error) for error in failed.values()}) == 1:
            raise first
        raise Split(rank, first) from first


def _failure(members: Members, rank: int, call: Any) -> Exception | None:
    try:
        members.value(call)
    except MemberLost as lost:
        raise Loss(rank, str(lost)) from lost
    except Exception as error:
        return error
    return None
