"""Worker processes: a limit that holds against C code, processes that die, and what a wrong path is answered."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from afm_rl.workers.pool import Outcome, Task, WorkerPool, WorkerStartError

MODULE = """
import ctypes, os, subprocess, sys, time
import numpy as np

def act(kind, *rest):
    print("a word that must not stand between the frames")
    if kind == "power":
        return 9 ** 9 ** 9
    if kind == "sleep":
        time.sleep(1000)
    if kind == "exit":
        os._exit(3)
    if kind == "crash":
        ctypes.string_at(0)
    if kind == "memory":
        return len(bytearray(4 << 30))
    if kind == "raise":
        raise KeyError("no such thing")
    if kind == "leave":
        sys.exit(1)
    if kind == "numpy":
        return np.float32(0.5)
    if kind == "set":
        return {1, 2}
    if kind == "child":
        child = subprocess.Popen(["sleep", "1000"])
        open(rest[0], "w").write(str(child.pid))
        time.sleep(1000)
    return [os.getpid(), *rest]

def make(factor):
    if factor < 0:
        raise ValueError("a negative factor")
    return lambda x: factor * x

number = 3
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("user")
    (path / "acting.py").write_text(MODULE)
    (path / "broken.py").write_text("import does_not_exist_anywhere")
    return str(path)


@pytest.fixture
def pool(folder: str) -> Iterator[WorkerPool]:
    pool = WorkerPool(Task("acting:act", search_path=(folder,)), workers=2)
    pool.start()
    yield pool
    pool.close()


def run(pool: WorkerPool, *kinds: str, limit_s: float = 5.0) -> list[Outcome]:
    return pool.run([[kind] for kind in kinds], limits_s=[limit_s] * len(kinds))


def test_what_goes_wrong_costs_its_own_call(pool: WorkerPool) -> None:
    """Guards the loop: each call has its own outcome in order, whatever its process did, and the processes are replaced."""
    kinds = ("exit", "ok", "crash", "memory", "raise", "leave", "set", "numpy", "ok")
    found = dict(zip(kinds, run(pool, *kinds), strict=True))
    assert (found["exit"].cause, found["exit"].problem) == ("died", "its worker process exited with 3")
    assert (found["crash"].cause, found["crash"].problem) == ("died", "its worker process ended by signal 11")
    assert (found["memory"].cause, found["memory"].problem) == ("raised", "MemoryError")
    assert (found["raise"].cause, found["raise"].problem) == ("raised", "KeyError: 'no such thing'")
    assert (found["leave"].cause, found["leave"].problem) == ("raised", "SystemExit: 1")
    assert found["set"].problem.startswith("TypeError: a set is not plain data")
    assert found["numpy"] == Outcome(0.5)
    assert found["ok"].cause is None


def test_no_call_outlasts_its_limit(pool: WorkerPool) -> None:
    """Guards against attacks on the reward: C code that holds the interpreter's lock, and a sleep; then work goes on."""
    before = {outcome.value[0] for outcome in run(pool, "ok", "ok", "ok", "ok")}
    start = time.monotonic()
    late = run(pool, "power", "sleep", limit_s=0.5)
    assert 0.5 <= time.monotonic() - start < 4.0
    assert [(of.cause, of.problem) for of in late] == [("timeout", "took longer than 0.5 s")] * 2
    assert not before & {outcome.value[0] for outcome in run(pool, "ok", "ok")}


def test_a_killed_process_takes_its_children_along(pool: WorkerPool, tmp_path: Path) -> None:
    """Guards the machine: what a late function started does not go on without it."""
    note = tmp_path / "pid"
    pool.run([["child", str(note)]], limits_s=[1.0])
    child = int(note.read_text())
    end_s = time.monotonic() + 10.0
    while Path(f"/proc/{child}").exists() and "Z (" not in _state(child):
        assert time.monotonic() < end_s, "the child of a killed worker is still running"
        time.sleep(0.02)


def _state(pid: int) -> str:
    try:
        return next(line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("State"))
    except (FileNotFoundError, ProcessLookupError):
        return "Z ("


def test_many_calls_share_a_process_and_large_ones_pass(pool: WorkerPool) -> None:
    """Guards cost and the protocol: two processes for hundreds of calls, arguments and values larger than a pipe holds."""
    found = run(pool, *["ok"] * 300)
    assert len({of.value[0] for of in found}) <= 2
    (large,) = pool.run([["ok", "x" * 1_000_000]], limits_s=[20.0])
    assert len(large.value[1]) == 1_000_000


def test_a_budget_ends_the_whole_call(pool: WorkerPool) -> None:
    """Guards the reward actor's own deadline: a thousand late responses do not take a thousand limits."""
    found = pool.run([["sleep"]] * 6, limits_s=[0.3] * 6, budget_s=0.4)
    causes = [of.cause for of in found]
    assert causes[:2] == ["timeout", "timeout"]
    assert causes[4:] == ["budget", "budget"]
    began_s = time.monotonic()
    assert [of.cause for of in pool.run([["sleep"]], limits_s=[60.0], budget_s=0.3)] == ["timeout"]  # under way, too
    assert time.monotonic() - began_s < 30.0


def test_an_orphan_ends_by_itself(folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards a killed actor: the kernel ends a worker that nobody waits for any more, even inside C code."""
    monkeypatch.setenv("PYTHONUNBUFFERED", "1")
    pool = WorkerPool(Task("acting:act", search_path=(folder,)))
    pool.start()
    (worker,) = pool._workers
    (answer,) = run(pool, "ok")
    # Ask without ever looking at the answer: what a parent does that was killed.
    assert worker.ask(0, ["power"], limit_s=-4.5) is None
    assert worker._process is not None
    assert worker._process.wait(10.0) == -14
    assert answer.value[0] == worker._process.pid != os.getpid()
    pool.close()


def test_options_make_the_function(folder: str) -> None:
    """Guards factories: they are called once with the options, and refuse them in their own words."""
    pool = WorkerPool(Task("acting:make", {"factor": 3}, search_path=(folder,)))
    pool.start()
    assert pool.run([[2], [5]], limits_s=[5.0, 5.0]) == [Outcome(6), Outcome(15)]
    pool.close()
    with pytest.raises(WorkerStartError, match=r"refuses its options .* ValueError: a negative factor"):
        WorkerPool(Task("acting:make", {"factor": -1}, search_path=(folder,))).start()


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("acting", "'acting' is not an import path; write package.module:function"),
        ("actng:act", "there is no module 'actng'; install its package, or start the command in the folder that holds it"),
        ("acting:acts", "'acting' has no 'acts'; it has act, make"),
        ("acting:number", "'acting:number' is a int, not a function"),
        ("broken:x", "module 'broken' cannot be imported: No module named 'does_not_exist_anywhere'"),
    ],
)
def test_a_wrong_path_is_one_clear_error(folder: str, path: str, message: str) -> None:
    """Guards the user: the part of the path that is wrong, and what to do."""
    with pytest.raises(WorkerStartError, match=re.escape(message)):
        WorkerPool(Task(path, search_path=(folder,))).start()
