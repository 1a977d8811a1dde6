"""The pulse of actors that come back: a thread that asks each for a sign of life, and ends the process that gives none.

A process that was stopped, or hangs, keeps every call to it waiting; one that has been killed fails them at once, and who
waits knows what to do (`actors/dispatch.py`, `actors/pool.py`, `actors/roster.py`). So a frozen actor is made a dead one,
within about `heartbeat_s`, and 6 s more that Ray takes to kill a process that is stopped (measured, 2.60). Signs of life
have a thread of their own in the actor: one that computes or compiles still gives them.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from actors.host import ActorLostError, Pending
from actors.streams import StreamingHandle, Wait, ready

log = logging.getLogger(__name__)

#: Signs of life that are asked for in the time after which one is missed.
BEATS = 4


@dataclass
class _Watched:
    """`beat`: the sign of life waited for; `returning`: its process is on its way, and has no pulse yet."""

    handle: StreamingHandle
    heartbeat_s: float
    beat: Pending
    since_s: float
    returning: bool = True


class Pulse:
    """Watches actors from `watch` until `unwatch` or `close`. `ends` counts, by actor, the processes that it ended.

    `wait` and `clock` are for tests.
    """

    def __init__(self, *, wait: Wait = ready, clock: Callable[[], float] = time.monotonic) -> None:
        self._wait, self._clock = wait, clock
        self._lock = threading.Lock()
        self._watched: dict[str, _Watched] = {}
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self.ends: dict[str, int] = {}

    def watch(self, handle: StreamingHandle, *, heartbeat_s: float) -> None:
        """From its first answer on, this actor is ended when it gives no sign of life for `heartbeat_s`."""
        with self._lock:
            self._watched[handle.name] = _Watched(handle, heartbeat_s, handle.revive(), self._clock())
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="pulse", daemon=True)
                self._thread.start()

    def unwatch(self, name: str) -> None:
        """This one may end."""
        with self._lock:
            self._watched.pop(name, None)

    def close(self) -> None:
        """Watch nobody any more."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join(timeout=5.0)

    def _run(self) -> None:
        while not self._stop.wait(self._pause_s()):
            try:
                self.look()
            except Exception:  # the run goes on without a pulse rather than not at all; its waits have deadlines
                log.exception("a look at the actors' pulse failed")

    def _pause_s(self) -> float:
        with self._lock:
            return min((one.heartbeat_s for one in self._watched.values()), default=1.0) / BEATS

    def look(self) -> None:
        """Read the signs of life that have come, miss those that have not, and ask for the next."""
        with self._lock:
            watched = list(self._watched.values())
        for one in watched:
            if self._wait([one.beat], 0.0):
                self._heard(one)
            elif not one.returning and self._clock() - one.since_s > one.heartbeat_s:
                self._missed(one)

    def _heard(self, one: _Watched) -> None:
        try:
            one.beat.result(one.heartbeat_s)
        except ActorLostError as error:
            if one.returning:
                log.warning("%s will not come back: %s", one.handle.name, error)
                self.unwatch(one.handle.name)
                return
            self._ask(one, one.handle.revive(), returning=True)
            return
        self._ask(one, one.handle.ping(), returning=False)

    def _missed(self, one: _Watched) -> None:
        name = one.handle.name
        log.warning("%s gave no sign of life for %.0f s: its process is ended", name, self._clock() - one.since_s)
        self.ends[name] = self.ends.get(name, 0) + 1
        one.handle.end()
        self._ask(one, one.handle.revive(), returning=True)

    def _ask(self, one: _Watched, beat: Pending, *, returning: bool) -> None:
        one.beat, one.since_s, one.returning = beat, self._clock(), returning
