"""The group buffer between samplers and learner: versioned, ordered by ticket, with reserve and commit.

    produce: wait for `room` -> offer        train: reserve(iteration) -> commit

A batch is whole: iteration i's groups, whoever finished first. Room is promised before a group is asked for, so that what
is being sampled always has a place; a buffer that cannot hold one batch is refused at once, not found out in a deadlock.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence

from actors.host import DeadlineError
from topologies.online.rollouts import Rollout


class GroupBuffer:
    """For one producing and one training thread. `capacity` counts groups asked for and not yet committed.

    Raises ValueError where a batch does not fit.
    """

    def __init__(self, *, capacity: int, batch: int) -> None:
        if capacity < batch:
            raise ValueError(f"a buffer of {capacity} groups cannot hold a batch of {batch}: it would never be trained on")
        self._capacity, self._batch = capacity, batch
        self._changed = threading.Condition()
        self._groups: dict[int, dict[int, Rollout]] = {}
        self._promised: dict[int, int] = {}
        self._reserved: set[int] = set()
        self._progress = 0
        self._failure: BaseException | None = None
        self._closed = False

    def room(self, iteration: int) -> bool:
        """Wait until a batch for `iteration` has its place; False once the buffer is closed."""
        with self._changed:
            self._changed.wait_for(lambda: self._closed or sum(self._promised.values()) + self._batch <= self._capacity)
            if not self._closed:
                self._promised[iteration] = self._batch
            return not self._closed

    def offer(self, iteration: int, rollouts: Sequence[Rollout]) -> None:
        """Groups of a batch that `room` promised a place."""
        with self._changed:
            if iteration not in self._promised:
                raise ValueError(f"no room was asked for iteration {iteration}")
            self._groups.setdefault(iteration, {}).update((rollout.ticket, rollout) for rollout in rollouts)
            self._progress += 1
            self._changed.notify_all()

    def heard(self) -> None:
        """The producer goes on, though no group is finished yet: whoever waits for groups has patience again."""
        with self._changed:
            self._progress += 1
            self._changed.notify_all()

    def fail(self, error: BaseException) -> None:
        """The producer has ended with an error: whoever waits for groups gets it."""
        with self._changed:
            self._failure = error
            self._changed.notify_all()

    def reserve(self, iteration: int, *, deadline_s: float) -> list[Rollout]:
        """The whole batch of an iteration, by ticket. Raises what the producer ended with, or DeadlineError naming what is
        missing once the producer was not heard of for `deadline_s`."""
        with self._changed:
            seen, since_s = self._progress, time.monotonic()
            while len(here := self._groups.get(iteration, {})) < self._batch:
                if self._failure is not None:
                    raise self._failure
                left_s = since_s + deadline_s - time.monotonic()
                if left_s <= 0:
                    raise DeadlineError(
                        f"waited {deadline_s:g} s for groups of iteration {iteration}: {len(here)} of {self._batch} are "
                        f"here, {self.depth} groups in the buffer"
                    )
                self._changed.wait(left_s)
                if self._progress != seen:
                    seen, since_s = self._progress, time.monotonic()
            self._reserved.add(iteration)
            return [here[ticket] for ticket in sorted(here)]

    def commit(self, iteration: int) -> None:
        """The batch has been trained on: its place is free."""
        with self._changed:
            self._reserved.remove(iteration)
            del self._groups[iteration], self._promised[iteration]
            self._changed.notify_all()

    def close(self) -> None:
        """Nobody will train any more: whoever waits for room goes home."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    @property
    def depth(self) -> int:
        """Groups that wait for the learner."""
        with self._changed:
            return sum(len(groups) for iteration, groups in self._groups.items() if iteration not in self._reserved)
