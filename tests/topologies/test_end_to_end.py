"""The whole system on smoke.yaml: every stage, resumed after SIGKILL, on the user's own files, under two launchers."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import yaml

from afm_rl.worlds.python_world import build_world
from tests.processes import await_process
from topologies.run_folder import RunFolder
from topologies.schema import load_topology
from topologies.watch_data import RunReader

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
SMOKE = ROOT / "topologies" / "smoke.yaml"
#: Seconds that no launch of smoke.yaml may take, however loaded the machine.
LIMIT_S = 900


def command(run_root: Path, *options: str) -> list[str]:
    """A launch of smoke.yaml in a folder of the test's own."""
    sets = [f"run_root={run_root}", "deterministic=true", *options]
    arguments = [part for option in sets for part in ("--set", option)]
    return [sys.executable, "-m", "topologies.cli", "launch", str(SMOKE), "--resume", *arguments]


def environment(cache: Path) -> dict[str, str]:
    """Programs compiled once for all launches, and not optimized: these models are too small to gain by it."""
    settings = {"JAX_COMPILATION_CACHE_DIR": str(cache), "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    return {**os.environ, "JAX_PLATFORMS": "cpu", **settings}


def numbers(run: Path) -> dict[str, object]:
    """Every figure and table of a run's report but the ones that are times."""
    report = json.loads((run / "report.json").read_text())
    return {s["name"]: [s["figures"], s["tables"]] for s in report["stages"]}


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> Path:
    """Compiled programs, shared by the launches of this module."""
    return tmp_path_factory.mktemp("jax-cache")


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory, cache) -> Path:
    """The run folder of smoke.yaml, inline, never interrupted."""
    root = tmp_path_factory.mktemp("whole")
    subprocess.run(command(root, "launcher=inline"), check=True, timeout=LIMIT_S, env=environment(cache), cwd=root)
    return root / "smoke"


def test_every_stage_leaves_a_figure_and_a_page(uninterrupted):
    """Guards the report: each stage of the topology is in it, with figures, and the page stands alone."""
    stages = numbers(uninterrupted)
    assert list(stages) == load_topology(SMOKE).stage_names
    assert all(figures for figures, _ in stages.values())
    page = (uninterrupted / "report.html").read_text()
    assert "http://" not in page.replace("http://www.w3.org/", "").replace("http://127.0.0.1", "")


def test_watch_shows_a_launch_that_has_ended(uninterrupted):
    """Guards the hook of a launch: every stage is done, every actor was heard of, and the run is finished, not lost."""
    view = RunReader(RunFolder(uninterrupted)).look()
    assert (view.state, view.live["state"]) == ("finished", "ended")
    assert {stage.state for stage in view.stages} == {"done"}
    assert {row["state"] for row in view.live["actors"]} <= {"idle", "working"}
    assert any(job.online for job in view.jobs)


def test_killed_three_times_it_ends_with_the_same_numbers(uninterrupted, cache, tmp_path):
    """Guards the resume: SIGKILL at three random moments, then --resume, gives what an uninterrupted run gives."""
    rng = np.random.default_rng(20)
    launch, journal = command(tmp_path, "launcher=inline"), tmp_path / "smoke" / "journal.msgpack"
    whole = (uninterrupted / "journal.msgpack").stat().st_size
    # By the journal's length rather than by the clock: random moments of the run, one in each third of it.
    for third in range(3):
        until = int(whole * (third + rng.uniform(0.05, 0.95)) / 3)
        process = subprocess.Popen(launch, env=environment(cache), cwd=tmp_path, stdout=subprocess.DEVNULL)
        before = time.monotonic()
        while process.poll() is None and not (journal.exists() and journal.stat().st_size > until):
            assert time.monotonic() - before < LIMIT_S
            time.sleep(0.02)
        time.sleep(float(rng.uniform(0, 1.0)))
        process.send_signal(signal.SIGKILL)
        assert process.wait(timeout=30) == -signal.SIGKILL
    subprocess.run(launch, check=True, timeout=LIMIT_S, env=environment(cache), cwd=tmp_path)
    assert numbers(tmp_path / "smoke") == numbers(uninterrupted)


def test_a_finished_run_is_left_alone(uninterrupted, cache):
    """Guards `make run` being repeatable: a second launch says so and changes nothing."""
    before = (uninterrupted / "report.json").stat().st_mtime_ns
    done = subprocess.run(
        command(uninterrupted.parent, "launcher=inline"),
        check=True,
        timeout=LIMIT_S,
        env=environment(cache),
        cwd=uninterrupted.parent,
        capture_output=True,
        text=True,
    )
    assert "every stage is done" in done.stdout
    assert (uninterrupted / "report.json").stat().st_mtime_ns == before


def test_under_ray_the_numbers_are_the_same(uninterrupted, cache, tmp_path):
    """Guards launchers and losses: inline and local Ray give the same figures, although the launch is killed in
    pre-training, and the resumed one loses its learner in SFT and in MDLOO, and a sampler before and in MDLOO."""
    launch, run = command(tmp_path, "launcher=local", "actors.learner.heartbeat_s=5"), tmp_path / "smoke"
    process = subprocess.Popen(launch, env=environment(cache), cwd=tmp_path, stdout=subprocess.DEVNULL)
    await_path(run / "checkpoints" / "pretrain-core.done.json", process)
    process.send_signal(signal.SIGKILL)
    assert process.wait(timeout=30) == -signal.SIGKILL
    process = subprocess.Popen(launch, env=environment(cache), cwd=tmp_path, stdout=subprocess.PIPE, text=True)
    for job in ("sft", "itec-1-mdloo"):
        await_path(run / "checkpoints" / job, process)
        os.kill(await_process("ray::Learner", process), signal.SIGKILL)
        os.kill(await_process("ray::Sampler", process), signal.SIGKILL)
    printed, _ = process.communicate(timeout=LIMIT_S)
    assert process.returncode == 0, printed
    assert "dashboard http" in printed
    assert printed.count("begin the job again") == 2
    assert numbers(run) == numbers(uninterrupted)


def await_path(path: Path, process: subprocess.Popen) -> None:
    """Wait until a launch has made a file or folder."""
    before = time.monotonic()
    while not path.exists():
        assert process.poll() is None
        assert time.monotonic() - before < LIMIT_S
        time.sleep(0.02)


def test_a_mesh_of_two_processes_runs_a_topology(cache, tmp_path):
    """Guards `actors.learner` in the YAML: pre-training under Ray Train and fine-tuning after it, on two processes."""
    topology = yaml.safe_load(SMOKE.read_text())
    topology["actors"] = {"learner": {"processes": 2, "num_cpus": 0.2, "mesh": {"fsdp": 2, "tensor": 2}}}
    core = {"stages": ["core"], "core": {"steps": 4, "batch": 4, "sequence_length": 64, "warmup_steps": 1}}
    topology["stages"] = ["tokenizer", {"pretrain": core}, {"sft": {"steps": 4, "batch": 8}}]
    (tmp_path / "mesh.yaml").write_text(yaml.safe_dump(topology))
    launch = [sys.executable, "-m", "topologies.cli", "launch", "mesh.yaml", "--set", f"run_root={tmp_path}"]
    subprocess.run(launch, check=True, timeout=LIMIT_S, env=environment(cache), cwd=tmp_path)
    report = json.loads((tmp_path / "smoke" / "report.json").read_text())
    assert [actor["name"] for actor in report["actors"]][:2] == ["learner-0", "learner-1"]
    assert [stage["name"] for stage in report["stages"]] == ["tokenizer", "pretrain", "sft"]


def test_the_users_own_files_run_the_same_stages(cache, tmp_path):
    """Guards `data.files`: JSONL and text files go through every stage that the embedded world goes through."""
    sizes = load_topology(SMOKE).data.sizes.model_dump()
    paths = build_world(seed=1, **sizes).write_files(tmp_path / "data")
    paths.pop("heldout_documents")
    paths["documents"].pop("code")  # a user need not have every domain: the mixtures go on with what there is
    launch = command(tmp_path, "launcher=inline", "name=mine", f"data={json.dumps({'files': paths})}")
    subprocess.run(launch, check=True, timeout=LIMIT_S, env=environment(cache), cwd=tmp_path)
    assert list(numbers(tmp_path / "mine")) == load_topology(SMOKE).stage_names
