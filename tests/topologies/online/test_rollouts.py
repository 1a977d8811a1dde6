"""Rollouts on disk: what is written comes back, a torn tail costs its own group only, the newest of a ticket counts."""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path

import numpy as np
import pytest

from afm_rl.types import PolicyUpdate, TrainedGroup
from tests.topologies.online.fakes import rollout, tickets
from topologies.online.rollouts import Rollout, RolloutFiles


def equal(a: object, b: object) -> bool:
    """Field by field, arrays by value and dtype."""
    if isinstance(a, np.ndarray):
        return isinstance(b, np.ndarray) and a.dtype == b.dtype and np.array_equal(a, b)
    if dataclasses.is_dataclass(a):
        return type(a) is type(b) and all(equal(getattr(a, f.name), getattr(b, f.name)) for f in dataclasses.fields(a))
    if isinstance(a, tuple | list):
        return len(a) == len(b) and all(map(equal, a, b))  # type: ignore[arg-type]
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    return a == b


def in_many_turns() -> Rollout:
    """With all that a group may have: several versions, tokens of an environment, a response without a reward."""
    one = rollout(tickets(0)[1], 3)
    group = dataclasses.replace(
        one.scored.group,
        versions=(np.array([3, 3, 4], np.int32),) * 2,
        actions=(np.array([True, False, True]),) * 2,
    )
    scored = dataclasses.replace(
        one.scored,
        group=group,
        reward_G=np.array([0.5, np.nan], np.float32),
        valid_G=np.array([True, False]),
        problems=("", "took too long"),
    )
    texts = ("answer é\n", "")
    return dataclasses.replace(one, scored=dataclasses.replace(scored), digests={3: "d3", 4: "d4"}, texts=texts)


def test_what_is_written_comes_back(tmp_path: Path) -> None:
    """Guards replay: bits of tokens, log-probabilities and rewards, and everything that says where they come from."""
    files, written = RolloutFiles(tmp_path), [rollout(tickets(0)[0], 0), in_many_turns()]
    files.add(0, written)
    found = files.read(0).rollouts
    assert list(found) == [0, 1]
    assert np.isnan(found[1].scored.reward_G[1])
    for one in (*written, found[1]):
        one.scored.reward_G[np.isnan(one.scored.reward_G)] = -1
    assert all(equal(found[one.ticket], one) for one in written)


def test_the_learners_report_comes_back(tmp_path: Path) -> None:
    """Guards the browser of rollouts: advantages and mismatches belong to their group."""
    floats = {name: np.array([0.25, -0.25], np.float32) for name in ("advantage_G", "logp_G", "ref_logp_G", "mismatch_G")}
    group = TrainedGroup("p0@0", counted_G=np.array([True, False]), **floats)
    files = RolloutFiles(tmp_path)
    files.add_update(4, PolicyUpdate({"reward": 1.5}, (group,)))
    found = RolloutFiles(tmp_path).read(4)
    assert found.metrics == {"reward": 1.5}
    assert equal(found.trained["p0@0"], group)


def test_the_newest_of_a_ticket_counts(tmp_path: Path) -> None:
    """Guards a group that was sampled again."""
    ticket, files = tickets(0)[0], RolloutFiles(tmp_path)
    files.add(0, [rollout(ticket, 0), rollout(ticket, 1)])
    assert files.read(0).rollouts[0].digests == {1: "d1"}


def test_a_torn_tail_costs_its_own_group(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Guards a kill in the middle of a write, at every byte: what stands before is read, and what follows is written."""
    first, second = tickets(0)
    files = RolloutFiles(tmp_path)
    files.add(0, [rollout(first, 0)])
    path = tmp_path / "000000.msgpack"
    one = path.stat().st_size
    files.add(0, [rollout(second, 0)])
    whole = path.read_bytes()
    for length in range(one, len(whole), 37):
        path.write_bytes(whole[:length])
        again = RolloutFiles(tmp_path)
        assert list(again.read(0).rollouts) == [0]
        again.add(0, [rollout(second, 1)])
        assert again.read(0).rollouts[1].digests == {1: "d1"}
    with caplog.at_level(logging.WARNING):
        path.write_bytes(b"something else")
        assert RolloutFiles(tmp_path).read(0).rollouts == {}
    assert "not a rollout file" in caplog.text


def test_old_files_are_dropped(tmp_path: Path) -> None:
    """Guards the disk of a long run."""
    files = RolloutFiles(tmp_path)
    for iteration in range(4):
        files.add(iteration, [rollout(tickets(iteration)[0], iteration)])
    files.drop_before(2)
    assert files.iterations() == [2, 3]
