"""A small online job without a system: tickets of three prompts, answers that say which weights made them."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from pathlib import Path

import numpy as np

from afm_rl.types import Group, Message, Prompt, ScoredGroup
from topologies.journal import Journal
from topologies.online.buffer import GroupBuffer
from topologies.online.ledger import Ledger
from topologies.online.producer import Producer, Sources
from topologies.online.rollouts import Rollout, RolloutFiles
from topologies.online.tickets import Ticket, tickets_of

PROMPTS = [Prompt(f"p{i}", (Message("user", f"question {i}"),)) for i in range(3)]
BATCH = 2


def tickets(iteration: int) -> list[Ticket]:
    """Two a batch, of three prompts."""
    return tickets_of(iteration, PROMPTS, count=BATCH, seed=7)


def group(ticket: Ticket, version: int, *, responses: int = 2) -> Group:
    """Tokens that depend on the ticket and the version."""
    tokens = tuple(np.array([ticket.number, version, j], np.int32) for j in range(responses))
    logps = tuple(np.full(3, -0.5 * (j + 1), np.float32) for j in range(responses))
    return Group(ticket.id, np.array([1, 2], np.int32), tokens, logps, (True,) * responses, "policy", version)


def scored(of: Group) -> ScoredGroup:
    """Reward 0, 1, ... by response."""
    rewards = np.arange(len(of.responses), dtype=np.float32)
    return ScoredGroup(of, rewards, np.ones(len(rewards), bool), {"verifier": rewards}, ("",) * len(rewards))


def rollout(ticket: Ticket, version: int, digest: str = "") -> Rollout:
    """As the producer makes them."""
    texts = tuple(f"answer {j}" for j in range(2))
    return Rollout(
        ticket.number, scored(group(ticket, version)), {version: digest or f"d{version}"}, PROMPTS[0].messages, texts
    )


class Samplers:
    """Answers with the version of the moment; `asked` lists every request; `die_after` groups it raises."""

    def __init__(self, *, die_after: int | None = None) -> None:
        self.version, self.asked = -1, list[str]()
        self.die_after = die_after

    def sample(self, tickets: Sequence[Ticket]) -> Generator[Group | ScoredGroup, None, None]:
        """One after the other, the last first."""
        for ticket in reversed(tickets):
            if self.die_after is not None and len(self.asked) >= self.die_after:
                raise RuntimeError("no sampler is left")
            self.asked.append(ticket.id)
            yield group(ticket, self.version)


class Job:
    """Everything of one life of a job: a second one on the same folder is a resumed launch."""

    def __init__(self, folder: Path, samplers: Samplers, *, max_staleness: int = 0, capacity: int = BATCH) -> None:
        self.samplers = samplers
        self.journal = Journal(folder / "journal.msgpack")
        self.ledger = Ledger(self.journal, "policy")
        self.files = RolloutFiles(folder / "rollouts")
        self.buffer = GroupBuffer(capacity=capacity, batch=BATCH)
        sources = Sources(
            tickets=tickets,
            sample=samplers.sample,
            score=lambda groups, _: [scored(one) for one in groups if isinstance(one, Group)],
            text=lambda tokens: " ".join(map(str, tokens.tolist())),
        )
        self.producer = Producer(sources, self.buffer, self.files, self.ledger, batch=BATCH, max_staleness=max_staleness)

    def begin(self, iteration: int) -> None:
        """The learner's newest checkpoint is of this iteration."""
        self.ledger.rewind(iteration, lambda i: [ticket.id for ticket in tickets(i)])

    def publish(self, version: int, digest: str = "") -> None:
        """Every sampler has these weights."""
        self.samplers.version = version
        self.ledger.published(version, digest or f"d{version}")
        self.producer.version_published(version)

    def train(self, iteration: int, *, deadline_s: float = 5.0) -> list[Rollout]:
        """What the learner is given for an iteration."""
        batch = self.buffer.reserve(iteration, deadline_s=deadline_s)
        self.ledger.consumed(iteration, [one.scored.group.id for one in batch])
        self.buffer.commit(iteration)
        return batch
