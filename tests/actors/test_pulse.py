"""The pulse: who gives no sign of life is ended, in time and once; who computes, dies or starts is not."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from actors.host import ActorLostError
from actors.pulse import Pulse


@dataclass
class Beat:
    at_s: float
    now: list[float]
    lost: bool = False
    what: str = "a-0.ping"

    @property
    def ready(self) -> bool:
        return self.now[0] >= self.at_s

    def result(self, timeout_s: float) -> str:
        if self.lost:
            raise ActorLostError(f"{self.what}: gone, not {timeout_s:.0f} s late")
        return "life"


@dataclass
class Actor:
    """Answers at once, unless it is frozen or dead; takes 100 s to come back."""

    now: list[float]
    name: str = "a-0"
    state: str = "well"
    events: list[tuple[float, str]] = field(default_factory=list)

    def ping(self) -> Beat:
        return Beat(math.inf if self.state == "frozen" else self.now[0], self.now, lost=self.state == "dead")

    def revive(self) -> Beat:
        self.events.append((self.now[0], "revive"))
        return Beat(self.now[0] + 100, self.now, lost=self.state == "gone")

    def end(self) -> None:
        self.events.append((self.now[0], "end"))
        self.state = "well"


class Unhurried(Pulse):
    """Looks only when the test does."""

    def _run(self) -> None:
        """Nothing by itself."""


def ready(calls: Sequence[Any], timeout_s: float) -> list[Any]:
    assert timeout_s == 0
    return [call for call in calls if call.ready]


def watched() -> tuple[Pulse, Actor, list[float]]:
    now = [0.0]
    pulse, actor = Unhurried(wait=ready, clock=lambda: now[0]), Actor(now)
    pulse.watch(actor, heartbeat_s=10.0)  # type: ignore[arg-type]
    return pulse, actor, now


def live(pulse: Pulse, now: list[float], until_s: float) -> None:
    while now[0] < until_s:
        now[0] += 2.5
        pulse.look()


def test_a_frozen_actor_is_ended_in_time_and_has_time_to_return() -> None:
    """Guards the bound: a process is ended one heartbeat after its last sign of life, once, and not while it starts."""
    pulse, actor, now = watched()
    live(pulse, now, 300.0)
    assert actor.events == [(0.0, "revive")]
    actor.state = "frozen"
    live(pulse, now, 600.0)
    assert [event for _, event in actor.events] == ["revive", "end", "revive"]
    assert 310.0 < actor.events[1][0] <= 315.0
    assert pulse.ends == {"a-0": 1}


def test_a_dead_actor_is_left_to_return() -> None:
    """Guards a restart: Ray starts it anew, and the pulse waits for that; one that never returns is let go."""
    pulse, actor, now = watched()
    live(pulse, now, 150.0)
    actor.state = "dead"
    live(pulse, now, 160.0)
    actor.state = "well"
    live(pulse, now, 400.0)
    actor.state = "dead"
    live(pulse, now, 405.0)
    actor.state = "frozen"
    pulse.unwatch("a-0")
    live(pulse, now, 900.0)
    assert "end" not in [event for _, event in actor.events]
