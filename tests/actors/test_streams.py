"""Calls that answer item by item: inline and under Ray, with deadlines, ends, errors, deaths and returns."""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

from actors.host import END, ActorLostError, DeadlineError, Host, call, gather
from actors.streams import (
    CONCURRENCY_GROUPS,
    InlineStreamingHandle,
    RayStreamingHandle,
    StreamingHandle,
    items,
    ready,
)


class Counter:
    """An actor that counts, item by item."""

    def __init__(self, *, start: int = 0) -> None:
        self.next, self.ended = start, 0

    def count(self, times: int, *, every_s: float = 0.0, fails_at: int = -1) -> Iterator[int]:
        try:
            for i in range(times):
                time.sleep(every_s)
                if i == fails_at:
                    raise ValueError("no such number")
                self.next += 1
                yield self.next
        finally:
            self.ended += 1

    def set(self, value: int) -> int:
        self.next = value
        return value

    def endings(self) -> int:
        return self.ended

    def pid(self) -> int:
        return os.getpid()


def returning(handle: RayStreamingHandle, method: str, *args: Any) -> Any:
    """A call that waits for an actor that is on its way back."""
    return gather([handle.submit_returning(method, *args)], deadline_s=120)[0]


def test_inline_an_item_is_computed_when_it_is_asked_for() -> None:
    """Guards the inline launcher: lazy, interleaved with calls, counted as busy only while it computes."""
    handle = InlineStreamingHandle("counter", Counter, {"start": 10})
    stream = handle.stream("count", 3, every_s=0.01)
    assert ready([stream], 0.0) == [stream]
    assert stream.next(1.0) == 11
    call(handle, "set", 20)
    time.sleep(0.2)
    assert [stream.next(1.0), stream.next(1.0), stream.next(1.0)] == [21, 22, END]
    stats = handle.stats()
    assert stats.calls == 2
    assert 0.03 <= stats.busy_s < 0.15


def test_streams_at_a_time_are_busy_once() -> None:
    """Guards the report's busy seconds: an actor with two streams under way is not twice as busy."""
    host = Host("counter", Counter, {})
    streams = [host.stream(number, "count", {"every_s": 0.1}, 3) for number in range(2)]
    threads = [threading.Thread(target=list, args=(stream,)) for stream in streams]
    began_s = time.monotonic()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=30)
    assert 0.3 <= host.stats().busy_s <= time.monotonic() - began_s + 0.01  # it is rounded
    assert host.stats().calls == 2


def test_a_stream_that_is_closed_ends_its_method() -> None:
    """Guards what a method holds while it streams; also when the reader fails in between."""
    handle = InlineStreamingHandle("counter", Counter, {})
    for _ in items(handle.stream("count", 3)):
        break
    assert call(handle, "endings") == 1
    with pytest.raises(ValueError, match="no such number"):
        list(items(handle.stream("count", 3, fails_at=1)))
    assert call(handle, "endings") == 2


class Late:
    """A stream with one item, and no second."""

    what = "sampler-0.answer"

    def __init__(self) -> None:
        self.closed, self._left = False, ["first"]

    def next(self, timeout_s: float) -> Any:
        if not self._left:
            time.sleep(timeout_s)
            raise TimeoutError("the transport's own words")
        return self._left.pop()

    def close(self) -> None:
        self.closed = True


def test_the_deadline_is_between_items_and_says_what_was_late() -> None:
    """Guards every wait: which item of which stream; and the stream is closed."""
    late, found = Late(), []
    with pytest.raises(DeadlineError, match=r"waited 0 s for item 1 of sampler-0\.answer"):
        found.extend(items(late, deadline_s=0.05))
    assert late.closed


def test_an_inline_actor_that_is_ended_starts_anew() -> None:
    """Guards the face of `end`: what the actor was doing and holding is gone."""
    handle = InlineStreamingHandle("counter", Counter, {"start": 5})
    list(items(handle.stream("count", 2)))
    handle.end()
    [life] = gather([handle.revive()])
    assert gather([handle.submit_in(life, "set", 2)]) == [2]
    assert call(handle, "set", 1) == 1
    assert handle.stats().calls == 2


@pytest.fixture(scope="module")
def counter() -> Iterator[StreamingHandle]:
    """A Ray actor with threads for streams, that Ray starts anew."""
    import ray

    ray.init(address="local", include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR, num_cpus=1)
    try:
        remote: Any = ray.remote
        actor = remote(max_concurrency=1, concurrency_groups=CONCURRENCY_GROUPS)(Host)
        yield RayStreamingHandle(
            "counter", actor.options(num_cpus=0, max_restarts=-1).remote("counter", Counter, {"start": 10})
        )
    finally:
        ray.shutdown()


@pytest.mark.slow
def test_a_ray_actor_streams_and_takes_calls_meanwhile(counter: StreamingHandle) -> None:
    """Guards the local launcher: items one by one, calls and liveness in between, errors of their own type, busy seconds."""
    gather([counter.ping()], deadline_s=120)
    stream, other = counter.stream("count", 5, every_s=0.6), counter.stream("count", 1, every_s=0.9)
    began_s = time.monotonic()
    assert stream.next(30.0) == 11
    assert call(counter, "set", 50, deadline_s=5) == 50
    counter.ping().result(1.0)
    assert time.monotonic() - began_s < 2.5
    assert ready([other], 5.0) == [other]
    assert other.next(1.0) in (51, 52)
    rest = [stream.next(5.0) for _ in range(5)]
    assert rest[-1] is END
    assert rest[-2] == 55
    assert other.next(5.0) is END
    with pytest.raises(ValueError, match="no such number"):
        list(items(counter.stream("count", 3, fails_at=1), deadline_s=10))
    stats = counter.stats()
    assert stats.calls == 4
    assert stats.busy_s >= 3.0
    late = counter.stream("count", 1, every_s=1.0)
    with pytest.raises(DeadlineError, match=r"item 0 of counter\.count"):
        list(items(late, deadline_s=0.2))


@pytest.mark.slow
def test_a_ray_stream_nobody_reads_ends_early(counter: StreamingHandle) -> None:
    """Guards the actor's time: it stops with the item that it is at."""
    before = returning(counter, "endings")
    stream = counter.stream("count", 1000, every_s=0.02)
    stream.next(30.0)
    stream.close()
    end_s = time.monotonic() + 10
    while call(counter, "endings") == before:
        assert time.monotonic() < end_s
        time.sleep(0.05)


@pytest.mark.slow
def test_a_killed_ray_actor_is_lost_and_returns(counter: StreamingHandle) -> None:
    """Guards the dispatch: what was finished can be read, the rest is a loss with a name, and the next life answers; also
    when the process was stopped and has to be killed."""
    pid = returning(counter, "pid")
    stream = counter.stream("count", 100, every_s=0.1)
    assert stream.next(30.0) > 0
    time.sleep(0.35)
    os.kill(pid, signal.SIGKILL)
    read = []
    with pytest.raises(ActorLostError, match=r"counter\.count: .*unavailable|counter\.count: .*died"):
        read.extend(items(stream, deadline_s=30))
    gather([counter.revive()], deadline_s=60)
    again = call(counter, "pid")
    assert again != pid
    os.kill(again, signal.SIGKILL)
    assert returning(counter, "set", 3) == 3
    frozen = call(counter, "pid")
    os.kill(frozen, signal.SIGSTOP)
    counter.end()
    gather([counter.revive()], deadline_s=60)
    assert call(counter, "pid") != frozen
