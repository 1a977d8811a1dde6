"""The producer and the ledger: which groups are asked for, with which weights, and what a resumed job does not ask again."""

from __future__ import annotations

import dataclasses
import threading
import time
from collections import Counter
from collections.abc import Generator, Sequence
from pathlib import Path

import numpy as np
import pytest

from actors.host import DeadlineError
from afm_rl.types import Group, ScoredGroup
from tests.topologies.online.fakes import BATCH, PROMPTS, Job, Samplers, rollout, scored, tickets
from topologies.journal import read_journal
from topologies.online.ledger import consumed, counts, lineage
from topologies.online.tickets import Ticket


def ids(*iterations: int) -> list[str]:
    return [ticket.id for iteration in iterations for ticket in tickets(iteration)]


def test_every_epoch_asks_every_prompt_once() -> None:
    """Guards the stream of tickets: an iteration that spans two epochs loses no prompt and doubles none."""
    names = [ticket.prompt.id for iteration in range(6) for ticket in tickets(iteration)]
    for epoch in range(4):
        assert sorted(names[3 * epoch : 3 * epoch + 3]) == [prompt.id for prompt in PROMPTS]
    assert [t.number for i in range(6) for t in tickets(i)] == list(range(12))


def test_a_synchronous_job_samples_from_the_current_weights(tmp_path: Path) -> None:
    """Guards max_staleness 0, and the journal's three states of a group."""
    job = Job(tmp_path, samplers := Samplers())
    job.begin(0)
    for iteration in range(3):
        job.publish(iteration)
        job.producer.produce(iteration)
        assert counts(job.journal.records, "policy") == {"issued": 0, "finished": BATCH, "consumed": BATCH * iteration}
        assert {one.scored.group.version for one in job.train(iteration)} == {iteration}
    assert Counter(samplers.asked) == Counter(ids(0, 1, 2))
    assert consumed(job.journal.records, "policy") == {i: ids(i) for i in range(3)}


@pytest.mark.parametrize("max_staleness", [1, 2])
def test_it_runs_ahead_as_far_as_the_staleness_allows(tmp_path: Path, max_staleness: int) -> None:
    """Guards the bound: iteration i is asked from version i - s on, never earlier, and trained on by ticket."""
    job = Job(tmp_path, Samplers(), max_staleness=max_staleness, capacity=BATCH * (max_staleness + 1))
    job.begin(0)
    with job.producer.running_ahead(range(5), deadline_s=1):
        for iteration in range(5):
            job.publish(iteration)
            batch = job.train(iteration)
            assert [one.ticket for one in batch] == [ticket.number for ticket in tickets(iteration)]
            assert all(iteration - max_staleness <= one.scored.group.version <= iteration for one in batch)
    assert not any(thread.name == "producer" for thread in threading.enumerate())


def test_a_small_buffer_holds_the_producer_back(tmp_path: Path) -> None:
    """Guards capacity against staleness: room for one batch makes an overlapping job a synchronous one, not a deadlock."""
    job = Job(tmp_path, Samplers(), max_staleness=3, capacity=BATCH)
    job.begin(0)
    with job.producer.running_ahead(range(4), deadline_s=1):
        for iteration in range(4):
            job.publish(iteration)
            job.train(iteration)
    assert consumed(job.journal.records, "policy") == {i: ids(i) for i in range(4)}


def test_a_resumed_job_asks_only_for_what_was_not_finished(tmp_path: Path) -> None:
    """Guards lossless resume: groups of the same weights come from the disk, those of a killed moment are asked again."""
    job = Job(tmp_path, Samplers(die_after=3))
    job.begin(0)
    job.publish(0)
    job.producer.produce(0)
    first = job.train(0)
    job.publish(1)
    with pytest.raises(RuntimeError, match="no sampler is left"):
        job.producer.produce(1)
    job.journal.close()

    again = Job(tmp_path, samplers := Samplers())
    again.begin(0)  # no checkpoint was committed
    for iteration in range(2):
        again.publish(iteration)
        again.producer.produce(iteration)
        batch = again.train(iteration)
        if iteration == 0:
            assert [one.scored.group.responses[0].tolist() for one in batch] == [
                one.scored.group.responses[0].tolist() for one in first
            ]
    assert samplers.asked == ids(1)[:1]
    assert consumed(again.journal.records, "policy") == {i: ids(i) for i in range(2)}


def test_groups_of_other_weights_are_sampled_again(tmp_path: Path) -> None:
    """Guards exactness after a resume on a machine that computes other bits: nothing is trained on as if on-policy."""
    job = Job(tmp_path, Samplers())
    job.begin(0)
    job.publish(0)
    job.producer.produce(0)
    job.journal.close()

    again = Job(tmp_path, samplers := Samplers())
    again.begin(0)
    again.publish(0, digest="other bits")
    again.producer.produce(0)
    assert sorted(samplers.asked) == sorted(ids(0))
    assert again.producer.spent(0).discarded == BATCH
    assert {tuple(one.digests.values()) for one in again.train(0)} == {("other bits",)}


def test_groups_of_weights_that_cannot_be_yet_are_not_waited_for(tmp_path: Path) -> None:
    """Guards against a hang over a foreign or damaged file: version 9 is not published before iteration 0 is trained on."""
    job = Job(tmp_path, samplers := Samplers())
    job.files.add(0, [rollout(tickets(0)[0], 9)])
    job.begin(0)
    job.publish(0)
    producing = threading.Thread(target=job.producer.produce, args=(0,), daemon=True)
    producing.start()
    producing.join(5)
    assert not producing.is_alive()
    assert sorted(samplers.asked) == sorted(ids(0))


def test_groups_without_any_reward_are_made_again(tmp_path: Path) -> None:
    """Guards a mended reward: a resumed job does not take the failures of the broken one from the disk."""

    def broken(groups: Sequence[Group | ScoredGroup], _: object) -> list[ScoredGroup]:
        found = [scored(one) for one in groups if isinstance(one, Group)]
        return [dataclasses.replace(one, valid_G=np.zeros(len(one.valid_G), bool)) for one in found]

    job = Job(tmp_path, Samplers())
    job.producer._sources = dataclasses.replace(job.producer._sources, score=broken)
    job.begin(0)
    job.publish(0)
    job.producer.produce(0)
    job.journal.close()

    again = Job(tmp_path, samplers := Samplers())
    again.begin(0)
    again.publish(0)
    again.producer.produce(0)
    assert sorted(samplers.asked) == sorted(ids(0))
    assert all(one.scored.valid_G.all() for one in again.train(0))


def test_going_back_voids_what_came_after_the_checkpoint(tmp_path: Path) -> None:
    """Guards the one truth: consumed is what a committed checkpoint lists, whatever the journal said later or not yet."""
    job = Job(tmp_path, Samplers())
    job.begin(0)
    for iteration in range(3):
        job.publish(iteration)
        job.producer.produce(iteration)
        job.train(iteration)
    job.begin(1)
    assert consumed(job.journal.records, "policy") == {0: ids(0)}
    assert lineage(job.journal.records, "policy") == {0: "d0"}
    job.begin(2)  # a checkpoint whose record the kill came before
    assert consumed(job.journal.records, "policy") == {0: ids(0), 1: ids(1)}
    job.journal.close()
    assert consumed(read_journal(tmp_path / "journal.msgpack"), "policy") == {0: ids(0), 1: ids(1)}


def test_a_producer_that_fails_says_so_where_groups_are_waited_for(tmp_path: Path) -> None:
    """Guards the thread: its error is the loop's, at once."""
    job = Job(tmp_path, Samplers(die_after=1), max_staleness=1, capacity=2 * BATCH)
    job.begin(0)
    with job.producer.running_ahead(range(2), deadline_s=1):
        job.publish(0)
        with pytest.raises(RuntimeError, match="no sampler is left"):
            job.train(0)


def test_a_thread_that_does_not_end_ends_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards a learner that is lost: its loop is not begun again beside a producer that still writes to the same files."""
    monkeypatch.setattr("topologies.online.producer.MARGIN_S", 0.05)
    job, free = Job(tmp_path, Samplers(), max_staleness=1, capacity=2 * BATCH), threading.Event()
    begun = threading.Event()

    def stuck(_: Sequence[Ticket]) -> Generator[Group | ScoredGroup, None, None]:
        begun.set()
        free.wait(10)
        yield from ()

    job.producer._sources = dataclasses.replace(job.producer._sources, sample=stuck)
    job.begin(0)

    def train() -> None:
        with job.producer.running_ahead(range(2), deadline_s=0.05):
            job.publish(0)
            assert begun.wait(5)
            raise RuntimeError("the learner was lost")

    with pytest.raises(DeadlineError, match="for the producer of groups to end"):
        train()
    free.set()


def test_patience_begins_anew_with_every_group(tmp_path: Path) -> None:
    """Guards slow samplers: groups that wait for their rewards together are signs of life too."""
    job = Job(tmp_path, Samplers(), max_staleness=1, capacity=2 * BATCH)
    with pytest.raises(DeadlineError, match=r"waited 0\.1 s for groups of iteration 0: 0 of 2"):
        job.buffer.reserve(0, deadline_s=0.1)
    timers = [threading.Timer(0.15 * i, job.buffer.heard) for i in range(1, 5)]
    for timer in timers:
        timer.start()
    began_s = time.monotonic()
    with pytest.raises(DeadlineError):
        job.buffer.reserve(0, deadline_s=0.3)
    assert time.monotonic() - began_s > 0.8
