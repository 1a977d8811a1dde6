"""Rollouts on disk: every scored group of an online job, and what the learner found of it, one file per iteration.

    RUN/rollouts/TASK/000012.msgpack      framed records (`framed_file.py`), the newest of a ticket counts

A group is written as soon as it has its rewards, so that a kill loses none that was finished; the report's browser and
`afm-rl watch` read the same files. Damage costs the groups it hits, which are then sampled again: the truth about what was
trained on is the checkpoint's. Shapes: G responses, T tokens.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from afm_rl.types import Group, Message, PolicyUpdate, ScoredGroup, TrainedGroup
from topologies.framed_file import frame, pack, scan

_MAGIC = b"AFMROL01"
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Rollout:
    """One scored group, its prompt and responses as text too. `digests`: of the weights that made it, by version."""

    ticket: int
    scored: ScoredGroup
    digests: Mapping[int, str]
    messages: tuple[Message, ...]
    texts: tuple[str, ...]


@dataclass(frozen=True)
class Iteration:
    """What is on disk of one iteration: rollouts by ticket, and the learner's report, empty before the update."""

    rollouts: Mapping[int, Rollout] = field(default_factory=dict)
    trained: Mapping[str, TrainedGroup] = field(default_factory=dict)
    metrics: Mapping[str, float] = field(default_factory=dict)


class RolloutFiles:
    """The files of one job. One writer; `read` may be called by anybody, while the job runs too."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._mended: set[int] = set()

    def add(self, iteration: int, rollouts: Sequence[Rollout]) -> None:
        """Append groups; they survive the end of this process at once, that of the machine a little later."""
        self._append(iteration, [_group_record(rollout) for rollout in rollouts])

    def add_update(self, iteration: int, update: PolicyUpdate) -> None:
        """Append the learner's report of an iteration."""
        self._append(iteration, [_update_record(update)])

    def read(self, iteration: int) -> Iteration:
        """What is there of an iteration; the newest of each ticket. A damaged tail is left out, with a warning."""
        path = self._path(iteration)
        records = _records(path.read_bytes(), path)[0] if path.exists() else []
        rollouts, trained, metrics = dict[int, Rollout](), dict[str, TrainedGroup](), dict[str, float]()
        for record in records:
            if record["kind"] == "group":
                rollouts[record["ticket"]] = _rollout(record)
            else:
                trained, metrics = {g["id"]: _trained(g) for g in record["groups"]}, record["metrics"]
        return Iteration(rollouts, trained, metrics)

    def iterations(self) -> list[int]:
        """Those that have a file, in order."""
        return sorted(int(path.stem) for path in self.folder.glob("*.msgpack") if path.stem.isdecimal())

    def drop_before(self, iteration: int) -> None:
        """Remove the files of earlier iterations."""
        for old in self.iterations():
            if old < iteration:
                self._path(old).unlink()

    def _path(self, iteration: int) -> Path:
        return self.folder / f"{iteration:06d}.msgpack"

    def _append(self, iteration: int, records: Sequence[Any]) -> None:
        path = self._path(iteration)
        if iteration not in self._mended:  # what an earlier process left torn would hide what follows it
            path.parent.mkdir(parents=True, exist_ok=True)
            content = path.read_bytes() if path.exists() else b""
            end = _records(content, path)[1]
            with path.open("r+b" if content else "wb") as file:
                file.truncate(end)
                if end == 0:
                    file.write(_MAGIC)
            self._mended.add(iteration)
        with path.open("ab") as file:
            file.write(b"".join(frame(pack(record)) for record in records))


def _records(content: bytes, path: Path) -> tuple[list[Any], int]:
    """The whole records of a file, and where they end."""
    if not content.startswith(_MAGIC):
        if content:
            _log.warning("%s: not a rollout file of this version; its groups are sampled again", path)
        return [], 0
    found = scan(content, len(_MAGIC))
    if found.torn:
        _log.warning("%s: damaged at offset %d; the groups behind it are sampled again", path, found.end)
    return found.records, found.end


def _group_record(rollout: Rollout) -> dict[str, Any]:
    scored, group = rollout.scored, rollout.scored.group
    return {
        "kind": "group",
        "ticket": rollout.ticket,
        "digests": dict(rollout.digests),
        "messages": [[m.role, m.content] for m in rollout.messages],
        "texts": list(rollout.texts),
        "id": group.id,
        "policy": group.policy,
        "version": group.version,
        "prompt": _ids(group.prompt_T),
        "responses": [_ids(tokens) for tokens in group.responses],
        "logps": [_floats(logps) for logps in group.logps],
        "finished": list(group.finished),
        "versions": [_ids(versions) for versions in group.versions],
        "actions": [np.asarray(actions, np.uint8).tobytes() for actions in group.actions],
        "reward": _floats(scored.reward_G),
        "valid": [bool(valid) for valid in scored.valid_G],
        "components": {name: _floats(values) for name, values in scored.components.items()},
        "problems": list(scored.problems),
    }


def _rollout(record: Mapping[str, Any]) -> Rollout:
    group = Group(
        id=record["id"],
        prompt_T=_as_ids(record["prompt"]),
        responses=tuple(map(_as_ids, record["responses"])),
        logps=tuple(map(_as_floats, record["logps"])),
        finished=tuple(record["finished"]),
        policy=record["policy"],
        version=record["version"],
        versions=tuple(map(_as_ids, record["versions"])),
        actions=tuple(np.frombuffer(actions, np.uint8).astype(bool) for actions in record["actions"]),
    )
    scored = ScoredGroup(
        group,
        reward_G=_as_floats(record["reward"]),
        valid_G=np.asarray(record["valid"], bool),
        components={name: _as_floats(values) for name, values in record["components"].items()},
        problems=tuple(record["problems"]),
    )
    messages = tuple(Message(role, content) for role, content in record["messages"])
    return Rollout(record["ticket"], scored, record["digests"], messages, tuple(record["texts"]))


def _update_record(update: PolicyUpdate) -> dict[str, Any]:
    groups = [
        {
            "id": group.id,
            "advantage": _floats(group.advantage_G),
            "counted": [bool(counted) for counted in group.counted_G],
            "logp": _floats(group.logp_G),
            "ref_logp": _floats(group.ref_logp_G),
            "mismatch": _floats(group.mismatch_G),
        }
        for group in update.groups
    ]
    return {"kind": "update", "groups": groups, "metrics": {name: float(value) for name, value in update.metrics.items()}}


def _trained(record: Mapping[str, Any]) -> TrainedGroup:
    floats = {name: _as_floats(record[name]) for name in ("advantage", "logp", "ref_logp", "mismatch")}
    counted_G = np.asarray(record["counted"], bool)
    return TrainedGroup(record["id"], counted_G=counted_G, **{f"{name}_G": values for name, values in floats.items()})


def _ids(tokens: np.ndarray) -> bytes:
    return np.asarray(tokens, "<i4").tobytes()


def _floats(values: np.ndarray) -> bytes:
    return np.asarray(values, "<f4").tobytes()


def _as_ids(data: bytes) -> np.ndarray:
    return np.frombuffer(data, "<i4").astype(np.int32)


def _as_floats(data: bytes) -> np.ndarray:
    return np.frombuffer(data, "<f4").astype(np.float32)
