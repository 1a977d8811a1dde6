"""RUN/live.json: every actor's state without waiting for one, the launch's own, and never a harm to the run."""

from __future__ import annotations

import logging
import math
import os
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from rich.console import Console

from actors.host import ActorLostError
from actors.signs import Signs
from tests.topologies.online_run import SMOKE
from topologies.live import SILENT_AFTER_S, Actors, LiveState
from topologies.live_file import read_live
from topologies.progress import ProgressView
from topologies.run_folder import RunFolder
from topologies.schema import load_topology
from topologies.system import System, start

PULSE = Signs(
    name="a", role="Role", life="1", host="h", pid=1, working=1, busy_s=10.0, calls=3, mib=100.0, peak_mib=120.0, engine=None
)


@dataclass
class Call:
    """A call that has ended, with a value or an exception."""

    outcome: Any
    what: str = "a.pulse"

    def result(self, timeout_s: float) -> Any:  # noqa: ARG002
        if isinstance(self.outcome, Exception):
            raise self.outcome
        return self.outcome


@dataclass
class Actor:
    """A handle whose next pulses are `outcomes`; none left: it was suspended."""

    outcomes: list[Any]
    name: str = "a"
    asked: int = field(default=0)

    def pulses(self) -> dict[str, Any]:
        self.asked += 1
        return {self.name: Call(self.outcomes.pop(0))} if self.outcomes else {}


class Clock:
    now_s = 0.0

    def __call__(self) -> float:
        self.now_s += 1.0
        return self.now_s


def rows(actor: Any, looks: int) -> list[dict[str, Any]]:
    actors = Actors(lambda: [actor], Clock())
    return [actors.look()[0] for _ in range(looks)]


def test_an_actor_is_starting_then_working_then_idle() -> None:
    """Guards the plain states, and that a restart is a new life, not an answer that failed."""
    actor = Actor([None, PULSE, replace(PULSE, working=0), replace(PULSE, working=0, life="2")])
    seen = rows(actor, 4)
    assert [row["state"] for row in seen] == ["starting", "working", "idle", "idle"]
    assert [row["restarts"] for row in seen] == [0, 0, 0, 1]
    assert seen[1]["mib"] == 100.0


def test_busy_is_a_share_of_the_time_between_looks() -> None:
    """Guards the share: what was done before the first look does not count, a new life starts at nothing."""
    actor = Actor([replace(PULSE, busy_s=busy_s) for busy_s in (50.0, 50.5, 51.5)] + [replace(PULSE, life="2", busy_s=0.5)])
    clock = Clock()
    actors = Actors(lambda: [actor], clock)
    shares = []
    for _ in range(4):
        clock.now_s = math.ceil(clock.now_s)
        shares.append(actors.look()[0]["busy_share"])
    assert shares[0] is None
    assert 0 < shares[1] <= 0.5
    assert shares[3] is None


def test_a_lost_actor_is_dead_with_its_cause_and_a_suspended_one_away() -> None:
    """Guards against an alarm for a learner that has lent its place, and against silence about a death."""
    dead, away = rows(Actor([PULSE, ActorLostError("a.pulse: out of memory")]), 2)[1], rows(Actor([]), 1)[0]
    assert (dead["state"], dead["cause"]) == ("dead", "ActorLostError: a.pulse: out of memory")
    assert away["state"] == "away"


def test_one_that_cannot_be_asked_does_not_hide_the_others() -> None:
    """Guards the list: whatever asking one actor ends in, the next one is asked, and this one again."""

    class Broken(Actor):
        def pulses(self) -> dict[str, Any]:
            self.outcomes.pop()
            raise KeyError("no such thing")

    broken = Broken([PULSE, PULSE], name="b")
    other = Actor([PULSE, PULSE])
    actors = Actors(lambda: [broken, other], Clock())
    for _ in range(2):
        first, second = actors.look()
        assert (first["state"], second["state"]) == ("unknown", "working")
        assert "no such thing" in first["cause"]
    assert not broken.outcomes


def system_and_run(tmp_path: Path, launcher: str) -> tuple[Any, RunFolder]:
    topology = load_topology(SMOKE, [f"launcher={launcher}", "actors.sampler.heartbeat_s=300"])
    return start(topology), RunFolder.create_or_open(tmp_path, topology)


def until(run: RunFolder, holds: Any, *, within_s: float) -> dict[str, Any]:
    """live.json once it satisfies `holds`."""
    end_s = time.monotonic() + within_s
    while True:
        live = read_live(run.path)
        if live is not None and live["actors"] and holds(live):
            return live
        assert time.monotonic() < end_s, live
        time.sleep(0.1)


def state_of(live: dict[str, Any], name: str) -> str:
    return next(row["state"] for row in live["actors"] if row["name"] == name)


def test_the_file_follows_an_inline_launch_and_says_how_it_ended(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Guards the file's content, and that a warning is still printed where nobody configured logging."""
    starting, run = system_and_run(tmp_path, "inline")
    root, handlers = logging.getLogger(), logging.getLogger().handlers[:]
    progress = ProgressView(Console(file=(tmp_path / "out").open("w")))
    seen: dict[str, Any] = {}

    def launch(system: System) -> None:
        with LiveState(run, system, progress) as live, progress.task("sft", total=20) as bar:
            live.enter("sft")
            logging.getLogger("actors.dispatch").warning("sampler-%d was lost\nagain", 1)
            bar.advance(7)
            seen.update(until(run, lambda live: live["bars"] and live["stage"], within_s=60))
            raise ZeroDivisionError("no division")

    with starting as system:
        try:
            root.handlers = []
            with pytest.raises(ZeroDivisionError):
                launch(system)
        finally:
            root.handlers = handlers
    assert {row["name"] for row in seen["actors"]} == {handle.name for handle in system.handles}
    assert seen["bars"] == [{"name": "sft", "done": 7, "total": 20}]
    assert (seen["state"], seen["pid"], seen["stage"]["name"]) == ("running", os.getpid(), "sft")
    assert seen["messages"][-1]["text"] == "sampler-1 was lost again"
    assert "sampler-1 was lost" in capsys.readouterr().err
    ended = read_live(run.path)
    assert ended is not None
    assert (ended["state"], ended["messages"][-1]["text"]) == ("failed", "no division")


def test_a_file_that_cannot_be_written_is_said_once_and_harms_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards the run from its own description."""
    monkeypatch.setattr("topologies.live.EVERY_S", 0.01)
    run = RunFolder(tmp_path)
    (run.path / "live.json").mkdir()  # in its place, so that no file can go there
    system = SimpleNamespace(handles=[], launcher="inline", dashboard=None)
    with LiveState(run, cast(System, system), ProgressView()):
        end_s = time.monotonic() + 60
        while "is not kept up to date" not in caplog.text and time.monotonic() < end_s:
            time.sleep(0.01)
        time.sleep(0.1)  # for some more of its seconds
    assert caplog.text.count("is not kept up to date") == 1


@pytest.fixture
def on_ray(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[System, RunFolder]]:
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    starting, run = system_and_run(tmp_path, "local")
    with starting as system, LiveState(run, system, ProgressView(Console(file=(tmp_path / "out").open("w")))):
        yield system, run


@pytest.mark.slow
def test_under_ray_a_stopped_actor_is_silent_and_a_killed_one_restarts(on_ray: tuple[System, RunFolder]) -> None:
    """Guards what the view is for: the frozen and the dead show, while all others go on being heard."""
    system, run = on_ray
    whole = until(run, lambda live: {row["state"] for row in live["actors"]} == {"idle"}, within_s=60)
    assert {row["name"] for row in whole["actors"]} == {handle.name for handle in system.handles}
    pids = {row["name"]: row["pid"] for row in whole["actors"]}
    os.kill(pids["sampler-0"], signal.SIGSTOP)
    try:
        silent = until(run, lambda live: state_of(live, "sampler-0") == "silent", within_s=30)
        written = silent["written"]
        later = until(run, lambda live: live["written"] > written + 3, within_s=60)
        assert state_of(later, "sampler-0") == "silent"
        assert state_of(later, "sampler-1") == "idle"
        assert next(row for row in later["actors"] if row["name"] == "sampler-0")["silent_s"] >= SILENT_AFTER_S
    finally:
        os.kill(pids["sampler-0"], signal.SIGCONT)
    until(run, lambda live: state_of(live, "sampler-0") == "idle", within_s=30)
    os.kill(pids["sampler-1"], signal.SIGKILL)
    until(run, lambda live: state_of(live, "sampler-1") in ("restarting", "dead"), within_s=30)
    back = until(run, lambda live: state_of(live, "sampler-1") == "idle", within_s=90)
    assert next(row["restarts"] for row in back["actors"] if row["name"] == "sampler-1") == 1
