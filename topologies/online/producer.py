"""The producing side of the online loop: groups of responses with their rewards, iteration after iteration, into the buffer.

    tickets -> (rollouts on disk, if made by these very weights) | samplers -> rewards -> disk, journal -> buffer

Tickets of iteration i are asked from version i - max_staleness on. With max_staleness 0 the loop calls `produce` between two
updates; else a thread runs ahead of the learner as far as that and the buffer's room allow.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from actors.host import DeadlineError
from afm_rl.types import Group, Prompt, ScoredGroup
from topologies.online.buffer import GroupBuffer
from topologies.online.ledger import Ledger
from topologies.online.rollouts import Rollout, RolloutFiles
from topologies.online.tickets import Ticket

#: Rewards are asked for whenever this share of an iteration's groups waits for them.
SCORED_AT_ONCE = 0.5
#: Seconds that the thread may take to come home once the loop has ended, beside the longest of its own waits.
MARGIN_S = 60.0


@dataclass(frozen=True)
class Sources:
    """Where groups come from: the verbs that the producer needs of the system, so that tests can bring their own."""

    tickets: Callable[[int], Sequence[Ticket]]
    sample: Callable[[Sequence[Ticket]], Generator[Group | ScoredGroup, None, None]]  # scored: by an environment
    score: Callable[[Sequence[Group | ScoredGroup], Sequence[Prompt]], Sequence[ScoredGroup]]
    text: Callable[[np.ndarray], str]


@dataclass(frozen=True)
class Spent:
    """Seconds the producer spent on an iteration: sampling, on rewards, and waiting for weights and room; groups that were
    on disk already, and those there that are made again: other weights had made them, or no response had a reward."""

    generate_s: float = 0.0
    reward_s: float = 0.0
    wait_s: float = 0.0
    replayed: int = 0
    discarded: int = 0
    tokens: int = 0


class Producer:
    """`version_published` after each delivery; `spent` says what an iteration took."""

    def __init__(
        self,
        sources: Sources,
        buffer: GroupBuffer,
        files: RolloutFiles,
        ledger: Ledger,
        *,
        batch: int,
        max_staleness: int,
    ) -> None:
        self._sources, self._buffer, self._files, self._ledger = sources, buffer, files, ledger
        self._max_staleness, self._chunk = max_staleness, max(1, round(SCORED_AT_ONCE * batch))
        self._news = threading.Condition()
        self._version, self._stopped = -1, False
        self._spent: dict[int, Spent] = {}

    def version_published(self, version: int) -> None:
        """Every sampler has acknowledged this version."""
        with self._news:
            self._version = version
            self._news.notify_all()

    def produce(self, iteration: int) -> bool:
        """Bring an iteration's groups into the buffer; False where the loop ended meanwhile."""
        began_s, spent = time.perf_counter(), Spent()
        stored = self._files.read(iteration).rollouts
        newest = max([iteration - self._max_staleness, *(max(rollout.digests) for rollout in stored.values())])
        wanted = min(max(newest, 0), iteration)  # there is no later version before this iteration is trained on
        if not (self._await_version(wanted) and self._buffer.room(iteration)):
            return False
        spent = replace(spent, wait_s=time.perf_counter() - began_s)
        kept = [rollout for rollout in stored.values() if self._made_by_these_weights(rollout) and _has_rewards(rollout)]
        here = {rollout.ticket for rollout in kept}
        missing = [ticket for ticket in self._sources.tickets(iteration) if ticket.number not in here]
        self._spent[iteration] = replace(spent, replayed=len(kept), discarded=len(stored) - len(kept))
        self._buffer.offer(iteration, kept)
        return not missing or self._make(iteration, missing)

    def spent(self, iteration: int) -> Spent:
        """Of an iteration whose groups are all in the buffer."""
        return self._spent.pop(iteration)

    @contextlib.contextmanager
    def running_ahead(self, iterations: Iterable[int], *, deadline_s: float) -> Iterator[None]:
        """Produce these iterations in a thread while the block trains. What ends the thread is raised by `reserve`."""

        def run() -> None:
            try:
                for iteration in iterations:
                    if not self.produce(iteration):
                        return
            except BaseException as error:  # it is the training thread's to raise
                self._buffer.fail(error)

        thread = threading.Thread(target=run, name="producer", daemon=True)
        thread.start()
        try:
            yield
        finally:
            self._stop()
            thread.join(deadline_s + MARGIN_S)
            if thread.is_alive():  # whatever ended the block: nothing may be tried again beside a thread that still works
                raise DeadlineError(f"waited {deadline_s + MARGIN_S:g} s for the producer of groups to end")

    def _stop(self) -> None:
        with self._news:
            self._stopped = True
            self._news.notify_all()
        self._buffer.close()

    def _await_version(self, version: int) -> bool:
        """Wait until this version is published; False once stopped. The learner's deadlines bound the wait."""
        with self._news:
            self._news.wait_for(lambda: self._stopped or self._version >= version)
            return not self._stopped

    def _made_by_these_weights(self, rollout: Rollout) -> bool:
        """Whether the weights that the job had at those versions are the ones that made it."""
        return all(self._ledger.digests.get(version) == digest for version, digest in rollout.digests.items())

    def _make(self, iteration: int, tickets: Sequence[Ticket]) -> bool:
        self._ledger.issued(iteration, tickets, self._version)
        by_id = {ticket.id: ticket for ticket in tickets}
        groups, waiting = self._sources.sample(tickets), list[Group | ScoredGroup]()
        left, since_s = len(tickets), time.perf_counter()
        with contextlib.closing(groups):
            for group in groups:
                waiting.append(group)
                left -= 1
                self._buffer.heard()
                if left == 0 or len(waiting) >= self._chunk:
                    self._add(iteration, generate_s=time.perf_counter() - since_s)
                    self._finish(iteration, waiting, by_id)
                    waiting, since_s = [], time.perf_counter()
                if self._stopped:
                    return False
        return True

    def _finish(self, iteration: int, groups: Sequence[Group | ScoredGroup], by_id: dict[str, Ticket]) -> None:
        """Rewards for groups, and the groups to the disk and into the buffer."""
        began_s = time.perf_counter()
        prompts = [by_id[(one.group if isinstance(one, ScoredGroup) else one).id].prompt for one in groups]
        scored = self._sources.score(groups, prompts)
        rollouts = [self._rollout(by_id[one.group.id], one) for one in scored]
        self._files.add(iteration, rollouts)
        self._ledger.finished(iteration, [one.group.id for one in scored])
        tokens = sum(len(response) for one in scored for response in one.group.responses)
        self._add(iteration, reward_s=time.perf_counter() - began_s, tokens=tokens)
        self._buffer.offer(iteration, rollouts)

    def _rollout(self, ticket: Ticket, scored: ScoredGroup) -> Rollout:
        group = scored.group
        versions = {group.version, *(int(version) for of in group.versions for version in np.unique(of))}
        digests = {version: self._ledger.digests[version] for version in sorted(versions)}
        texts = tuple(self._sources.text(response) for response in group.responses)
        return Rollout(ticket.number, scored, digests, ticket.prompt.messages, texts)

    def _add(self, iteration: int, *, generate_s: float = 0.0, reward_s: float = 0.0, tokens: int = 0) -> None:
        spent = self._spent[iteration]
        self._spent[iteration] = replace(
            spent,
            generate_s=spent.generate_s + generate_s,
            reward_s=spent.reward_s + reward_s,
            tokens=spent.tokens + tokens,
        )


def _has_rewards(rollout: Rollout) -> bool:
    """Where no response has one the reward may have been mended since: such a group is not taken from the disk."""
    return bool(rollout.scored.valid_G.any())
