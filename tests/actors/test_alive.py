"""Processes under Ray that die or freeze while something is given to them or asked of them: the others go on, they return.

One Ray for all; samplers have a model of a few hundred parameters.
"""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest

from actors.host import DeadlineError, Host, RayHandle, call, gather
from actors.pool import Pool
from actors.pulse import Pulse
from actors.roster import Roster
from actors.sampler import Sampler
from actors.streams import CONCURRENCY_GROUPS, RayStreamingHandle
from actors.weights import WeightStore
from afm_rl.types import Weights
from tests.actors.toy_policy import ENGINE, SPEC, request, weights
from tests.processes import running
from topologies.actor_options import Generating
from topologies.generators import Generators
from topologies.starting import await_placement

pytestmark = pytest.mark.slow

#: Of the pulses here: frozen processes are ended after so many seconds, and some that Ray takes.
HEARTBEAT_S = 8.0
RAY_KILLS_S = 8.0


class Pid:
    """Can say where it runs."""

    def pid(self) -> int:
        return os.getpid()


class Learner(Pid):
    def publish(self, version: int) -> Weights:
        return weights("mdloo", version, seed=version)


class WatchedStore(WeightStore, Pid):
    pass


class WatchedSampler(Sampler, Pid):
    pass


class Adder(Pid):
    """Stands for a reward actor: useless before it was prepared, and slow enough to be met in the middle."""

    def __init__(self) -> None:
        self._add: int | None = None

    def load(self, add: int) -> None:
        self._add = add

    def score(self, items: Sequence[int]) -> list[int]:
        time.sleep(1.5)
        assert self._add is not None
        return [item + self._add for item in items]


class Slow(Pid):
    """Takes long to start."""

    def __init__(self) -> None:
        time.sleep(4)


@pytest.fixture(scope="module", autouse=True)
def ray_here() -> Iterator[None]:
    import ray

    ray.init(
        address="local",
        include_dashboard=False,
        log_to_driver=False,
        logging_level=logging.ERROR,
        num_cpus=2,
        object_store_memory=2**28,
        runtime_env={"env_vars": {"JAX_PLATFORMS": "cpu"}},
    )
    yield
    ray.shutdown()


def start(name: str, role: type, kwargs: dict[str, Any] | None = None, *, returns: bool = True) -> Any:
    import ray

    remote: Any = ray.remote
    if not returns:
        return RayHandle(name, remote(Host).options(name=name, num_cpus=0).remote(name, role, kwargs or {}))
    actor = remote(max_concurrency=1, concurrency_groups=CONCURRENCY_GROUPS)(Host)
    options = {"name": name, "num_cpus": 0, "max_restarts": -1}
    return RayStreamingHandle(name, actor.options(**options).remote(name, role, kwargs or {}))


@pytest.fixture(scope="module")
def topology() -> Iterator[tuple[RayHandle, list[RayStreamingHandle], Pulse]]:
    """A store, two samplers, and their pulse."""
    store = start("weights", WatchedStore, returns=False)
    names = ["sampler-0", "sampler-1"]
    samplers = [start(name, WatchedSampler, {"engine": ENGINE, "name": name, "store": store}) for name in names]
    pulse = Pulse()
    gather([sampler.ping() for sampler in samplers], deadline_s=120)
    for sampler in samplers:
        pulse.watch(sampler, heartbeat_s=HEARTBEAT_S)
    yield store, samplers, pulse
    pulse.close()


def give(generators: Generators, store: RayHandle, version: int) -> None:
    digest = call(store, "publish", weights("mdloo", version, seed=version))
    generators.give("mdloo", version, SPEC, digest=digest)


def of(topology: tuple[RayHandle, list[RayStreamingHandle], Pulse]) -> Generators:
    store, samplers, _ = topology
    return Generators(samplers, store, Generating(max_batch=4))


def batch(count: int, tokens: int = 16) -> list[Any]:
    return [request(f"r{i}", 5, i % 3, tokens=tokens) for i in range(count)]


Topology = tuple[RayHandle, list[RayStreamingHandle], Pulse]


def test_a_learner_killed_after_it_published_takes_nothing_with_it(topology: Topology) -> None:
    """Guards who owns weights under way: killed between publishing and fetching, its bytes still arrive, from where they lie
    and from the store."""
    store, _, _ = topology
    learner, generators = start("learner", Learner, returns=False), of(topology)
    first, second = learner.submit("publish", 1), learner.submit("publish", 2)
    digest = call(store, "publish", first)
    gather([second])
    pid = call(learner, "pid")
    os.kill(pid, signal.SIGKILL)
    while running(pid):
        time.sleep(0.01)
    generators.give("mdloo", 1, SPEC, digest=digest, made_by=first)
    assert generators.sync("mdloo").in_sync
    digest = call(store, "publish", second)
    del first, second
    generators.give("mdloo", 2, SPEC, digest=digest)
    assert (generators.sync("mdloo").version, generators.sync("mdloo").in_sync) == (2, True)


def test_a_dead_sampler_does_not_keep_a_delivery_waiting(topology: Topology) -> None:
    """Guards the loop's pace: one is killed at the moment of the delivery; `give` goes on with the other, answers come, and
    it joins with the new weights."""
    store, samplers, _ = topology
    generators = of(topology)
    give(generators, store, 3)
    expected = {group.id: group.responses[0].tolist() for group in generators.answer("mdloo", batch(6))}
    pid = call(samplers[1], "pid")
    os.kill(pid, signal.SIGKILL)
    began = time.monotonic()
    give(generators, store, 4)
    assert generators.sync("mdloo").lagging == ("sampler-1",)  # which takes seconds to start anew
    groups: dict[str, int] = {}
    while not generators.sync("mdloo").in_sync and time.monotonic() - began < 60:
        groups |= {group.id: group.version for group in generators.answers("mdloo", batch(6))}
    assert set(groups.values()) == {4}
    assert generators.sync("mdloo").in_sync
    assert call(samplers[1], "pid") != pid
    give(generators, store, 5)
    assert len(expected) == len(generators.answer("mdloo", batch(6)))


def test_weights_are_given_while_another_thread_generates(topology: Topology) -> None:
    """Guards overlapped iterations: an answering thread and a giving one; every token is of acknowledged weights, of the
    versions given since the call began; a sampler that is killed meanwhile changes nothing of that."""
    store, samplers, _ = topology
    generators = of(topology)
    give(generators, store, 10)
    failed: list[BaseException] = []

    def update() -> None:
        try:
            for version in (11, 12, 13):
                time.sleep(0.3)
                give(generators, store, version)
                if version == 12:
                    os.kill(call(samplers[0], "pid"), signal.SIGKILL)
        except BaseException as error:
            failed.append(error)

    updates = threading.Thread(target=update)
    updates.start()
    versions = set()
    for _ in range(40):
        first = generators.sync("mdloo").version
        groups = list(generators.answers("mdloo", batch(24, tokens=40)))
        assert len({group.id for group in groups}) == 24
        for group in groups:
            used = {group.version, *(int(v) for one in group.versions for v in np.unique(one))}
            assert min(used) >= first
            versions |= used
        if not updates.is_alive() and versions == {10, 11, 12, 13}:
            break
    updates.join(60.0)
    assert failed == []
    assert max(versions) == 13


def test_a_frozen_sampler_is_replaced(topology: Topology) -> None:
    """Guards against a stopped process, in the middle of answering: it is ended in time, and its requests are answered."""
    store, samplers, pulse = topology
    generators = of(topology)
    give(generators, store, 20)
    pid = gather([samplers[0].submit_returning("pid")], deadline_s=60)[0]
    while not generators.sync("mdloo").in_sync:  # it was killed by the test before
        list(generators.answers("mdloo", batch(6)))
    stopped = 0.0
    for number, group in enumerate(generators.answers("mdloo", batch(60, tokens=40))):
        assert group.version == 20
        if number == 2:
            os.kill(pid, signal.SIGSTOP)
            stopped = time.monotonic()
    took_s = time.monotonic() - stopped
    assert not running(pid)
    assert pulse.ends == {"sampler-0": 1}
    assert took_s < HEARTBEAT_S * 1.5 + RAY_KILLS_S + 20
    print(f"a batch in which a sampler froze ended {took_s:.1f} s after it had, heartbeat {HEARTBEAT_S} s")


def test_work_survives_the_death_and_the_freezing_of_who_does_it() -> None:
    """Guards rewards: one actor is killed in the middle of its share, the other is stopped; every score is right, once."""
    handles = [start(f"reward-{i}", Adder) for i in range(2)]
    pool, pulse = Pool("reward", handles), Pulse()
    pool.prepare("load", 100)
    for handle in handles:
        pulse.watch(handle, heartbeat_s=HEARTBEAT_S)
    pids = [call(handle, "pid") for handle in handles]

    def harm() -> None:
        time.sleep(0.5)
        os.kill(pids[0], signal.SIGKILL)
        os.kill(pids[1], signal.SIGSTOP)

    harming = threading.Thread(target=harm)
    harming.start()
    parts = pool.map("score", range(10))
    harming.join()
    assert [score for part in parts for score in part] == list(range(100, 110))
    now = gather([handle.submit_returning("pid") for handle in handles], deadline_s=60)
    assert not set(pids) & set(now)
    os.kill(now[0], signal.SIGKILL)  # between two calls, when nobody looks
    gather([handles[0].revive()], deadline_s=60)
    assert [score for part in pool.map("score", range(4)) for score in part] == [100, 101, 102, 103]
    pulse.close()


def test_an_actor_lost_during_a_launch_is_waited_for() -> None:
    """Guards the launch: a process killed while others are placed comes back, and the launch goes on."""
    handle = start("slow", Slow)
    pid = call(handle, "pid")
    os.kill(pid, signal.SIGKILL)
    time.sleep(1)  # Ray has seen it; the next life is not there yet
    await_placement([handle])
    assert call(handle, "pid") != pid


def test_a_frozen_store_is_named(topology: Topology) -> None:
    """Guards the last wait: nobody can replace the store, so the error says that it was waited for."""
    store, samplers, _ = topology
    roster = Roster(samplers, store, deadline_s=1.0)
    digest = call(store, "publish", weights("mdloo", 30))
    pid = call(store, "pid")
    os.kill(pid, signal.SIGSTOP)
    try:
        with pytest.raises(DeadlineError, match=r"waited 1 s for weights\.assign, which has not answered"):
            roster.give("mdloo", 30, SPEC, digest=digest)
    finally:
        os.kill(pid, signal.SIGCONT)
