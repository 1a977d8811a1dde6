"""The group buffer: whole batches by ticket, room promised before groups are asked for, no wait without an end."""

from __future__ import annotations

import threading

import pytest

from actors.host import DeadlineError
from tests.topologies.online.fakes import BATCH, rollout, tickets
from topologies.online.buffer import GroupBuffer


def filled(buffer: GroupBuffer, iteration: int) -> None:
    assert buffer.room(iteration)
    for ticket in reversed(tickets(iteration)):
        buffer.offer(iteration, [rollout(ticket, 0)])


def test_a_batch_is_whole_and_in_the_order_of_tickets() -> None:
    """Guards the bits of an update: who finished first decides nothing, and half a batch is not handed out."""
    buffer = GroupBuffer(capacity=BATCH, batch=BATCH)
    filled(buffer, 0)
    assert buffer.depth == BATCH
    assert [one.ticket for one in buffer.reserve(0, deadline_s=1)] == [0, 1]
    assert buffer.depth == 0


def test_a_buffer_too_small_for_a_batch_is_an_error() -> None:
    """Guards against the deadlock that it would be."""
    with pytest.raises(ValueError, match="a buffer of 1 groups cannot hold a batch of 2"):
        GroupBuffer(capacity=1, batch=2)


def test_room_is_there_once_a_batch_is_committed() -> None:
    """Guards the bound: no more groups are asked for than have a place, whether they have come or not."""
    buffer, passed = GroupBuffer(capacity=BATCH, batch=BATCH), threading.Event()
    filled(buffer, 0)
    waiting = threading.Thread(target=lambda: (buffer.room(1), passed.set()), daemon=True)
    waiting.start()
    assert not passed.wait(0.1)
    buffer.reserve(0, deadline_s=1)
    assert not passed.wait(0.1)
    buffer.commit(0)
    assert passed.wait(5)


def test_a_wait_without_groups_ends_and_says_what_is_missing() -> None:
    """Guards against a hang: the deadline counts from the last group that came."""
    buffer = GroupBuffer(capacity=BATCH, batch=BATCH)
    buffer.room(3)
    buffer.offer(3, [rollout(tickets(3)[0], 3)])
    with pytest.raises(DeadlineError, match=r"groups of iteration 3: 1 of 2 are here"):
        buffer.reserve(3, deadline_s=0.05)


def test_what_ended_the_producer_is_raised_where_groups_are_waited_for() -> None:
    """Guards the cause of a failure: not a deadline later, but at once."""
    buffer = GroupBuffer(capacity=BATCH, batch=BATCH)
    buffer.fail(RuntimeError("no sampler is left"))
    with pytest.raises(RuntimeError, match="no sampler is left"):
        buffer.reserve(0, deadline_s=60)


def test_a_closed_buffer_sends_the_producer_home() -> None:
    """Guards the end of a job: a producer that waits for room does not outlive it."""
    buffer = GroupBuffer(capacity=BATCH, batch=BATCH)
    filled(buffer, 0)
    buffer.close()
    assert not buffer.room(1)
