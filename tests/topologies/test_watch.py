"""`afm-rl watch`: what the folder holds is what is shown, at any width, at any moment of a run's life, and only as text."""

from __future__ import annotations

import io
import json
import os
import pty
import select
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from tests.topologies.online_run import BATCH, STAGE, TASK, journal_of, live_json, write_online_run
from topologies.cli import main
from topologies.run_folder import FINISHED, RunFolder
from topologies.watch import print_once, to_json
from topologies.watch_data import RunReader, View
from topologies.watch_view import frame, plain, sparkline

ROOT = Path(__file__).resolve().parents[2]
ITERATIONS = 20


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    return RunFolder(write_online_run(tmp_path_factory.mktemp("runs"), iterations=ITERATIONS))


def say(run: RunFolder, live: dict[str, Any] | None) -> None:
    path = run.path / "live.json"
    path.unlink(missing_ok=True)
    if live is not None:
        path.write_text(json.dumps(live))


def look(run: RunFolder, live: dict[str, Any] | None) -> View:
    say(run, live)
    return RunReader(run).look()


def drawn(view: View, width: int, **options: Any) -> str:
    console = Console(width=width, record=True, file=io.StringIO(), **options)
    console.print(frame(view, console=console))
    return console.export_text()


@pytest.mark.parametrize("width", [80, 140])
def test_a_frame_fits_its_width_and_says_everything(run: RunFolder, width: int) -> None:
    """Guards narrow terminals: no line is longer, no figure and no actor is missing."""
    text = drawn(look(run, live_json()), width)
    assert max(map(len, text.splitlines())) <= width
    for said in (
        "running", f"{TASK} ({STAGE}): 39 of 200", "KL to reference", "0.36", "in sync", "under way", f"{BATCH} finished",
        f"{BATCH * (ITERATIONS - 1)} consumed", "silent 12.3 s", "restarting", "sampler-0", "weights", "942 MiB",
        "✓ pretrain", "▶ itec", "· serve", "update 0.48",
    ):  # fmt: skip
        assert said in text, said


def test_a_low_terminal_names_fewer_actors_and_those_in_trouble_first(run: RunFolder) -> None:
    """Guards 24 lines: messages are not pushed out, and a hundred samplers do not hide the one that is silent."""
    live = live_json()
    live["actors"] = [{"name": f"sampler-{i}", "state": "idle", "restarts": 0} for i in range(100)] + live["actors"]
    console = Console(width=100, record=True, file=io.StringIO())
    console.print(frame(look(run, live), console=console, height=24))
    lines = console.export_text().splitlines()
    assert len(lines) <= 24
    assert lines[-1].endswith("is given up")
    named = [line.split()[0] for line in lines if line.startswith(("sampler-", "reward-"))]
    assert named[:2] == ["sampler-1", "reward-0"]
    assert f"and {107 - len(named)} more: " in "\n".join(lines)


def test_older_online_jobs_are_a_line_and_work_without_metrics_too(tmp_path: Path) -> None:
    """Guards the view's height in a run of several rounds, and the progress of what logs nothing."""
    run = RunFolder(write_online_run(tmp_path, iterations=3))
    newer = {**job(RunReader(run).look()).rows[-1], "task": "itec-2-mdloo", "time": time.time() + 1}
    with (run.metrics / f"{STAGE}.jsonl").open("a") as file:
        file.write(json.dumps(newer) + "\n")
    bars = [{"name": "annotate", "done": 3, "total": 9}]
    text = drawn(look(run, live_json(bars=bars)), 100)
    assert text.count("KL to reference") == 1
    assert text.index("itec-2-mdloo (itec): iteration 1") < text.index(f"{TASK} (itec): iteration 1")
    assert "annotate: 3 of 9" in text


def test_names_and_messages_are_text_only(run: RunFolder) -> None:
    """Guards the terminal: nothing in a run is taken for markup, and no control code of it gets through."""
    live = live_json()
    live["messages"][-1]["text"] = "[red]gone[/red] \x1b[2J\x07 \u202ereversed"
    live["actors"][0]["name"] = "[blink]learner\x1b[0m"
    text = drawn(look(run, live), 120)
    assert "[red]gone[/red]" in text
    assert "[blink]learner" in text
    assert "\x1b" not in text
    assert "\u202e" not in text
    assert plain("a\n\tb\x00") == "a b�"


def test_a_terminal_without_unicode_gets_other_sparks() -> None:
    """Guards the scale of a sparkline: the lowest and the highest value are the first and the last mark."""
    assert sparkline([0.0, None, 0.5, 1.0], 4) == "▁ ▅█"
    assert sparkline([0.0, 1.0], 4, ascii_only=True) == ".@"
    assert sparkline([1.0] * 100, 7) == "▁" * 7
    assert sparkline([None, None], 4) == ""


@pytest.mark.parametrize(
    ("changes", "state", "said"),
    [
        (None, "unknown", "no launch has said anything here yet"),
        ({"age_s": 3610}, "lost", "no sign of life for 1 h 00 min"),
        ({"state": "failed"}, "failed", "reward-0"),
        ({"state": "ended"}, "ended", "stopped before its end"),
    ],
)
def test_how_the_launch_is(run: RunFolder, changes: dict[str, Any] | None, state: str, said: str) -> None:
    """Guards the difference between a run that goes on, one that went wrong, and one whose process has vanished."""
    view = look(run, None if changes is None else live_json(**changes))
    assert view.state == state
    assert said in drawn(view, 100)


def test_a_process_of_this_machine_that_is_gone_is_noticed_at_once(run: RunFolder) -> None:
    """Guards the reader against waiting for a launch that was killed a second ago."""
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    view = look(run, live_json(pid=child.pid, host=os.uname().nodename))
    assert view.state == "lost"
    assert f"process {child.pid} is gone" in view.why
    assert look(run, live_json(pid=os.getpid(), host=os.uname().nodename)).state == "running"


def test_a_clock_of_another_machine_does_not_matter_once_the_file_changes(run: RunFolder) -> None:
    """Guards shared storage: a launch whose clock is an hour behind lives, as long as its file goes on changing."""
    clock, states = {"now_s": 0.0}, []
    reader = RunReader(run, passed=lambda: clock["now_s"])
    for now_s, age_s in ((0.0, 3600.0), (1.0, 3599.0), (2.0, 3598.0), (60.0, 3598.0)):
        clock["now_s"] = now_s
        say(run, live_json() | {"written": 1e9 - age_s})
        states.append(reader.look().state)
    assert states == ["lost", "running", "running", "lost"]


def test_a_reader_takes_what_is_new_and_a_resumed_job_back(tmp_path: Path) -> None:
    """Guards the tails: rows and records once each, a half-written line or record when it is whole, repeated steps once."""
    run = RunFolder(write_online_run(tmp_path, iterations=4))
    reader = RunReader(run)
    assert [row["step"] for row in job(reader.look()).rows] == [0, 1, 2]
    row = {**job(reader.look()).rows[-1], "step": 1, "reward": 7.0}
    metrics, line = run.metrics / f"{STAGE}.jsonl", json.dumps(row).encode() + b"\n"
    with metrics.open("ab") as file:
        file.write(line[:30])
    assert [row["step"] for row in job(reader.look()).rows] == [0, 1, 2]
    with metrics.open("ab") as file:
        file.write(line[30:])
    assert [row["reward"] for row in job(reader.look()).rows][1:] == [7.0]
    before = run.journal_file.stat().st_size
    with journal_of(run.path) as journal:
        journal.append({"kind": "online", "task": TASK, "event": "issued", "iteration": 9, "groups": ["x@99"], "version": 9})
        journal.append(FINISHED)
    whole = run.journal_file.read_bytes()
    run.journal_file.write_bytes(whole[: before + 20])
    assert job(reader.look()).groups == {"issued": 0, "finished": BATCH, "consumed": 3 * BATCH}
    run.journal_file.write_bytes(whole)
    view = reader.look()
    assert job(view).groups == {"issued": 1, "finished": BATCH, "consumed": 3 * BATCH}
    assert view.state == "finished"
    assert job(RunReader(run).look()).groups == job(view).groups


def job(view: View) -> Any:
    return next(job for job in view.jobs if job.task == TASK)


def test_json_says_the_same(run: RunFolder, capsys: pytest.CaptureFixture[str]) -> None:
    """Guards scripts: the newest values, the groups, the actors, under stable names."""
    say(run, live_json(age_s=-60))  # a moment ago, however long the command takes to start
    assert main(["watch", str(run.path), "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["state"] == "running"
    assert [stage["name"] for stage in said["stages"] if stage["state"] == "current"] == [STAGE]
    assert said["jobs"][0]["last"]["policy_version"] == ITERATIONS - 2
    assert said["jobs"][0]["groups"]["consumed"] == BATCH * (ITERATIONS - 1)
    assert [row["state"] for row in said["actors"]][:4] == ["working", "working", "restarting", "silent"]
    assert to_json(look(run, None))["actors"] is None


def test_output_to_a_file_has_no_codes(run: RunFolder, capsys: pytest.CaptureFixture[str]) -> None:
    """Guards `watch --once > file`, and that watching without a terminal ends."""
    say(run, live_json())
    for options in (["--once"], []):
        assert main(["watch", str(run.path), *options]) == 0
        text = capsys.readouterr().out
        assert "KL to reference" in text
        assert "\x1b" not in text
    print_once(run, console=Console(width=80))


@pytest.mark.parametrize("how", ["q", *(pytest.param(how, marks=pytest.mark.slow) for how in ("interrupt", "the end"))])
def test_the_live_view_leaves_in_order(tmp_path: Path, how: str) -> None:
    """Guards the way out of the live view: no traceback, the terminal as it was, the last frame left behind."""
    run = RunFolder(write_online_run(tmp_path, iterations=3, live=live_json()))
    terminal, slave = pty.openpty()
    command = [sys.executable, "-m", "topologies.cli", "watch", str(run.path)]
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "100", "LINES": "40", "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(command, stdin=slave, stdout=slave, stderr=slave, env=environment, start_new_session=True)
    try:
        seen = read_until(terminal, b"KL to reference", b"")
        if how == "q":
            os.write(terminal, b"q")
        elif how == "interrupt":
            process.send_signal(signal.SIGINT)
        else:
            with journal_of(run.path) as journal:
                journal.append(FINISHED)
        seen = read_until(terminal, b"\x1b[?1049l", seen)
        seen = read_until(terminal, b"KL to reference", seen[seen.rindex(b"\x1b[?1049l") :])
        assert process.wait(60) == 0
    finally:
        process.kill()
        os.close(slave)
        os.close(terminal)
    assert b"Traceback" not in seen


def read_until(terminal: int, wanted: bytes, seen: bytes) -> bytes:
    end_s = time.monotonic() + 120
    while wanted not in seen:
        assert time.monotonic() < end_s, seen
        if select.select([terminal], [], [], 0.1)[0]:
            seen += os.read(terminal, 65536)
    return seen
