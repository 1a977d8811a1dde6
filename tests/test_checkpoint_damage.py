"""Checkpoints under damage: no failure of disk or process costs more than the newest one, and none goes unnoticed."""

import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from afm_rl.checkpoint import CheckpointError, Checkpoints, latest, restore

NEWEST = "step-000000000002"


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the checkpoints of steps 1 and 2, with arrays large enough for a file of their own."""
    folder = tmp_path_factory.mktemp("two")
    with Checkpoints(folder) as checkpoints:
        for step in (1, 2):
            checkpoints.save(step, {"x": jnp.arange(20_000.0) + step, "n": step}, {"step": step})
    return folder


@pytest.fixture
def folder(two: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(two, tmp_path / "run"))


def damage(path: Path, how: str) -> None:
    size = path.stat().st_size
    if how == "gone":
        path.unlink()
    elif how in ("truncated", "empty"):
        os.truncate(path, size - 1 if how == "truncated" else 0)
    else:
        data = bytearray(path.read_bytes())
        data[{"first": 0, "middle": size // 2, "last": size - 1}[how]] ^= 1
        path.write_bytes(bytes(data))


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("how", ["first", "middle", "last", "truncated", "empty", "gone"])
def test_a_damaged_newest_is_reported_and_the_previous_used(folder, caplog, how):
    """A flipped bit or lost byte in any of its files is noticed, logged with path and file, and survived."""
    paths = [path for path in (folder / NEWEST).rglob("*") if path.is_file() and path.stat().st_size]
    assert {"manifest.json", "metadata.json", "_METADATA", "manifest.ocdbt"} <= {path.name for path in paths}
    for path in paths:
        whole = path.read_bytes()
        damage(path, how)
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            found = latest(folder)
        assert (found.step, found.metadata) == (1, {"step": 1}), path
        assert f"{NEWEST} is damaged and not used: " in caplog.text, path
        assert path.name in caplog.text
        path.write_bytes(whole)
        assert latest(folder).step == 2
    assert restore(found, like={"x": jnp.zeros(20_000), "n": 0})["x"][-1] == 20_000


def test_all_damaged_is_an_error(folder):
    """A run whose every checkpoint is lost must not silently start over."""
    for path in folder.iterdir():
        damage(path / "metadata.json", "last")
    with pytest.raises(CheckpointError, match="none of the 2 checkpoints"):
        latest(folder)


def test_a_damaged_later_step_makes_way(folder, caplog):
    """After a fall back to step 1, the damaged step 2 must not outlive a new step 1, nor block it."""
    damage(folder / NEWEST / "metadata.json", "middle")
    with Checkpoints(folder) as checkpoints:
        checkpoints.save(1, {})
    assert (latest(folder).step, names(folder)) == (1, ["step-000000000001"])
    assert f"{NEWEST} is removed" in caplog.text


def test_what_a_killed_writer_left_is_neither_used_nor_kept(folder):
    """A half-written folder is no checkpoint, however whole it looks; one set aside for its successor is."""
    shutil.copytree(folder / NEWEST, folder / ".writing-step-000000000003")
    assert latest(folder).step == 2
    (folder / NEWEST).rename(folder / f".aside-{NEWEST}")
    assert latest(folder).step == 2
    with Checkpoints(folder, keep=3) as checkpoints:
        checkpoints.save(4, {})
    assert names(folder) == ["step-000000000001", NEWEST, "step-000000000004"]


FULL_DISK = """
mount -t tmpfs -o size=3m none "$1" && exec "$2" -c '
import sys, numpy as np
from pathlib import Path
from afm_rl.checkpoint import CheckpointError, Checkpoints, latest, restore
folder = Path(sys.argv[1]) / "run"
small, large = {"x": np.random.default_rng(0).random(1000)}, {"x": np.random.default_rng(0).random(400_000)}
with Checkpoints(folder) as checkpoints:
    checkpoints.save(1, small)
    checkpoints.wait()
    for _ in range(2):
        checkpoints.save(2, large)
        try:
            checkpoints.wait()
        except CheckpointError as error:
            print(error)
    checkpoints.save(2, small)
assert (restore(latest(folder), like=small)["x"] == small["x"]).all()
print([path.name for path in sorted(folder.iterdir())])
' "$1"
"""


@pytest.mark.slow
def test_a_full_disk_keeps_the_previous(tmp_path):
    """On a real full disk: a clear error, the previous checkpoint whole, nothing temporary left, saving works again."""
    isolated = ["unshare", "--mount", "--user", "--map-root-user"]
    if subprocess.run([*isolated, "mount", "-t", "tmpfs", "none", tmp_path], capture_output=True, check=False).returncode:
        pytest.skip("no small disk to fill: mounting in a user namespace is not allowed here")
    command = [*isolated, "sh", "-c", FULL_DISK, "sh", str(tmp_path), sys.executable]
    printed = subprocess.run(command, check=True, timeout=120, capture_output=True, text=True).stdout.splitlines()
    assert len(printed) == 3
    for line in printed[:2]:
        assert "no space left on the disk" in line
        assert "step 2" in line
        assert "step-000000000001 is untouched. Free some space, then resume the run" in line
    assert printed[2] == "['step-000000000001', 'step-000000000002']"


#: Forks children that save (importing once) and that die at the n-th call of a function, or by SIGKILL at some moment.
KILLED = """
import os, pathlib, random, shutil, signal, sys, time
import numpy as np, orbax.checkpoint
from afm_rl import checkpoint, checkpoint_folder

def dying(real, die_at):
    calls = 0
    def call(*args, **kwargs):
        nonlocal calls
        calls += 1
        if calls == die_at:
            os._exit(9)
        return real(*args, **kwargs)
    return call

def tree(value):
    return {"x": np.full(20_000, value), "n": value}

def dies_in(owner, moment, die_at, folder):
    with checkpoint.Checkpoints(folder, keep=1) as checkpoints:
        checkpoints.save(1, tree(1.0))
        checkpoints.wait()
        setattr(owner, moment, dying(getattr(owner, moment), die_at))
        checkpoints.save(1, tree(2.0))
        checkpoints.save(2, tree(3.0))
    os._exit(0)

def is_killed(folder, ready):
    with checkpoint.Checkpoints(folder, keep=2) as checkpoints:
        for step in range(1, 1000):
            checkpoints.save(step, tree(float(step)))
            if step == 2:
                os.write(ready, b"x")

def code_of(child):
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

if sys.argv[2] == "calls":
    for moment in ("write_text", "seal", "publish", "_sync_folder", "_remove", "rename", "rmtree", "unlink"):
        owner = {"rename": pathlib.Path, "rmtree": shutil, "unlink": os}.get(moment, checkpoint_folder)
        for die_at in (1, 2, 4):
            if not (child := os.fork()):
                dies_in(owner, moment, die_at, f"{sys.argv[1]}/{moment}-{die_at}")
            print(moment, die_at, code_of(child), flush=True)
else:
    draw = random.Random(0)
    for number in range(int(sys.argv[3])):
        read, ready = os.pipe()
        if not (child := os.fork()):
            is_killed(f"{sys.argv[1]}/{number}", ready)
        os.read(read, 1)
        time.sleep(draw.uniform(0.0, 0.3))
        os.kill(child, signal.SIGKILL)
        print("sigkill", number, code_of(child), flush=True)
"""


def killed(folder: Path, *arguments: str) -> list[list[str]]:
    command = [sys.executable, "-c", KILLED, str(folder), *arguments]
    printed = subprocess.run(command, check=True, timeout=150, capture_output=True, text=True).stdout
    return [line.split() for line in printed.splitlines()]


@pytest.mark.slow
def test_a_death_at_any_call_leaves_a_whole_checkpoint(tmp_path):
    """A process dies at the nth call of each kind while it replaces step 1 and moves on: one is there, entire."""
    exits = killed(tmp_path, "calls")
    assert {code for _, _, code in exits} == {"0", "9"}
    assert {moment for moment, _, code in exits if code == "9"} == {moment for moment, _, _ in exits}
    for folder in tmp_path.iterdir():
        check_and_go_on(folder)


@pytest.mark.slow
def test_sigkill_at_random_moments_leaves_a_whole_checkpoint(tmp_path):
    """A process that saves as fast as it can is killed: the newest whole one is used, and the run goes on from it."""
    exits = killed(tmp_path, "random", "10")
    assert [code for _, _, code in exits] == ["-9"] * 10
    half_written = [folder.name for folder in tmp_path.iterdir() if any(folder.glob(".writing-*"))]
    assert half_written, "no kill met a save: the test would show nothing"
    for folder in tmp_path.iterdir():
        check_and_go_on(folder)


def check_and_go_on(folder: Path) -> None:
    """The newest checkpoint is whole and of one piece; the next step is saved, and nothing else stays."""
    found = latest(folder)
    assert found is not None
    value = restore(found, like={"x": np.zeros(20_000), "n": 0.0})
    assert (value["x"] == value["n"]).all(), folder
    assert value["n"] in {1: (1, 2), 2: (3, 2)}.get(found.step, (found.step,)), folder
    with Checkpoints(folder, keep=1) as checkpoints:
        checkpoints.save(found.step + 1, {})
    assert names(folder) == [f"step-{found.step + 1:012d}"]
