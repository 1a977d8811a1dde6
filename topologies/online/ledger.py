"""What the journal knows of an online job: each group as issued, finished, consumed, and each version's digest.

Issued and finished save work; what counts as consumed is what a committed checkpoint's metadata lists (`consumed`), so a
job that goes back to a checkpoint writes "rewound", which voids what was consumed and published after it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from topologies.journal import Journal
from topologies.online.tickets import Ticket

KIND = "online"


def consumed_below(iteration: int, *, count: int) -> dict[str, Any]:
    """For a checkpoint's metadata: after `iteration` iterations of `count` groups, all tickets below this are consumed."""
    return {"tickets_below": iteration * count}


class Ledger:
    """The journal's records of one job. `digests` are those of the versions on the way to the present weights."""

    def __init__(self, journal: Journal, task: str) -> None:
        self._journal, self._task = journal, task
        self.digests: dict[int, str] = lineage(journal.records, task)

    def rewind(self, iteration: int, ids: Callable[[int], Sequence[str]]) -> None:
        """The job goes on from a checkpoint of this iteration: later digests and consumptions are void, earlier ones stand.

        `ids(iteration)` names an iteration's groups: a kill between the checkpoint and the record leaves the record out.
        """
        known = consumed(self._journal.records, self._task)
        if any(version > iteration for version in self.digests) or any(i >= iteration for i in known):
            self._write("rewound", iteration=iteration)
        for missing in (i for i in range(iteration) if i not in known):
            self.consumed(missing, ids(missing))
        self.digests = {version: digest for version, digest in self.digests.items() if version < iteration}

    def published(self, version: int, digest: str) -> None:
        """The weights of a version exist."""
        self.digests[version] = digest
        self._write("published", version=version, digest=digest)

    def issued(self, iteration: int, tickets: Sequence[Ticket], version: int) -> None:
        """These groups are asked for."""
        self._write("issued", iteration=iteration, groups=[ticket.id for ticket in tickets], version=version)

    def finished(self, iteration: int, ids: Sequence[str]) -> None:
        """These groups have their rewards and are among the rollouts."""
        self._write("finished", iteration=iteration, groups=list(ids))

    def consumed(self, iteration: int, ids: Sequence[str]) -> None:
        """The learner has trained on these groups."""
        self._write("consumed", durable=True, iteration=iteration, groups=list(ids))

    def _write(self, event: str, *, durable: bool = False, **values: Any) -> None:
        self._journal.append({"kind": KIND, "task": self._task, "event": event, **values}, durable=durable)


def lineage(records: Iterable[Any], task: str) -> dict[int, str]:
    """Version -> digest on the way to the newest weights, from a journal's records."""
    digests: dict[int, str] = {}
    for record in _of(records, task):
        if record["event"] == "published":
            digests[record["version"]] = record["digest"]
        elif record["event"] == "rewound":
            digests = {version: digest for version, digest in digests.items() if version < record["iteration"]}
    return digests


def consumed(records: Iterable[Any], task: str) -> dict[int, list[str]]:
    """Iteration -> ids of the groups trained on, what was voided left out."""
    found: dict[int, list[str]] = {}
    for record in _of(records, task):
        if record["event"] == "consumed":
            found[record["iteration"]] = record["groups"]
        elif record["event"] == "rewound":
            found = {iteration: groups for iteration, groups in found.items() if iteration < record["iteration"]}
    return found


def counts(records: Iterable[Any], task: str) -> dict[str, int]:
    """How many groups are issued (and not finished), finished (and not consumed), consumed."""
    stage_of: dict[str, str] = {}
    for record in _of(records, task):
        if "groups" in record:
            stage_of.update(dict.fromkeys(record["groups"], record["event"]))
    states = list(stage_of.values())
    return {event: states.count(event) for event in ("issued", "finished", "consumed")}


def _of(records: Iterable[Any], task: str) -> Iterable[Mapping[str, Any]]:
    return (r for r in records if isinstance(r, dict) and r.get("kind") == KIND and r.get("task") == task)
