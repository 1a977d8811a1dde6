"""Handles and waits: what a call costs, who is waited for, and that no wait lasts longer than it may."""

from __future__ import annotations

import logging
import platform
import resource
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from actors.host import DeadlineError, InlineHandle, RayHandle, call, gather, return_freed_memory


class Counter:
    """An actor that counts."""

    def __init__(self, *, start: int) -> None:
        self.total = start

    def add(self, *amounts: int, times: int = 1) -> int:
        self.total += sum(amounts) * times
        return self.total

    def fail(self) -> None:
        raise ValueError("no such prompt")

    def sleep(self, seconds: float) -> float:
        time.sleep(seconds)
        return seconds


@dataclass
class Fake:
    """A call that takes `seconds`; remembers how long it was waited for."""

    what: str
    seconds: float = 0.0
    waited_s: float = -1.0

    def result(self, timeout_s: float) -> Any:
        self.waited_s = timeout_s
        time.sleep(min(self.seconds, timeout_s))
        if self.seconds > timeout_s:
            raise TimeoutError("the transport's own words")
        return self.what


def test_an_inline_actor_answers_and_is_counted() -> None:
    """Guards the inline launcher: arguments, keywords, state between calls, and what the report shows."""
    handle = InlineHandle("learner-0", Counter, {"start": 10})
    assert call(handle, "add", 1, 2, times=3) == 19
    assert gather([handle.submit("add", 1), handle.submit("add", 1)]) == [20, 21]
    assert handle.ping().result(1.0) == handle.ping().result(1.0)
    stats = handle.stats()
    assert (stats.name, stats.role, stats.calls) == ("learner-0", "Counter", 3)
    assert stats.busy_s >= 0
    assert stats.peak_mib > 1


def resident_mib() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 2**20


@pytest.mark.skipif(
    "glibc" not in platform.libc_ver(), reason="only glibc keeps freed memory mapped and can be asked for it"
)
def test_freed_memory_goes_back_to_the_machine() -> None:
    """Guards the memory of idle actors: blocks freed below ones still in use stay mapped until asked for."""
    blocks = [bytearray(60_000) for _ in range(2000)]  # 114 MiB, too small each to be mapped on their own
    kept = blocks[::40]
    del blocks
    before = resident_mib()
    return_freed_memory()
    assert before - resident_mib() > 60
    assert len(kept) == 50


def test_a_call_may_be_an_argument() -> None:
    """Guards delivery: the store's pending answer goes straight to a sampler."""
    store, sampler = InlineHandle("store", Counter, {"start": 5}), InlineHandle("sampler", Counter, {"start": 0})
    assert call(sampler, "add", store.submit("add", 2), 1) == 8


def test_an_actors_error_is_its_own_and_is_counted() -> None:
    """Guards diagnosis: the exception comes through unchanged, and the time it took is not lost."""
    handle = InlineHandle("sampler-0", Counter, {"start": 0})
    with pytest.raises(ValueError, match="no such prompt"):
        call(handle, "fail")
    assert handle.stats().calls == 1


def test_the_deadline_names_who_was_late() -> None:
    """Guards every wait: which call, and for how long; not the transport's own message."""
    quick, slow = Fake("sampler-0.generate"), Fake("sampler-1.generate", seconds=9.0)
    began = time.monotonic()
    with pytest.raises(DeadlineError, match=r"waited 0 s for sampler-1\.generate, which has not answered") as caught:
        gather([quick, slow], deadline_s=0.05)
    assert time.monotonic() - began < 2
    assert isinstance(caught.value.__cause__, TimeoutError)


def test_one_deadline_covers_all_calls() -> None:
    """Guards against n times the deadline for n calls: each gets what the earlier ones left, and never less than 0."""
    calls = [Fake("a", seconds=0.06), Fake("b"), Fake("c", seconds=9.0)]
    with pytest.raises(DeadlineError, match="for c,"):
        gather(calls, deadline_s=0.1)
    assert calls[0].waited_s == pytest.approx(0.1, abs=0.03)
    assert 0 <= calls[2].waited_s <= calls[1].waited_s <= 0.05


@pytest.mark.slow
def test_a_ray_actor_has_the_same_face() -> None:
    """Guards the local launcher: answers, pending arguments, errors of their own type, deadlines, counts."""
    import ray

    from actors.host import Host

    assert not ray.is_initialized()
    ray.init(address="local", include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR, num_cpus=1)
    try:
        actor = ray.remote(Host).options(num_cpus=0)
        store, sampler = (
            RayHandle(name, actor.remote(name, Counter, {"start": start})) for name, start in (("store", 5), ("sampler", 0))
        )
        assert len(set(gather([store.ping(), sampler.ping()], deadline_s=120))) == 2
        assert call(sampler, "add", store.submit("add", 2), 1, times=2) == 16
        with pytest.raises(ValueError, match="no such prompt"):
            call(store, "fail")
        with pytest.raises(DeadlineError, match=r"store\.sleep"):
            call(store, "sleep", 1.0, deadline_s=0.1)
        assert (store.stats().role, store.stats().calls, sampler.stats().calls) == ("Counter", 3, 1)
    finally:
        ray.shutdown()
