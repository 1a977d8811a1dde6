"""Lossless resume: whatever is killed at whatever moment, the groups trained on and the final weights are the same.

AFM_RL_KILLS says how many kills (default 20; continuous integration takes 3): of the driver, the learner, a sampler, the
reward actor, or all at once, at seeded random moments of one job under Ray, against the uninterrupted job in one process.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np
import pytest

from afm_rl.config import ModelConfig
from afm_rl.huggingface import save_pretrained
from afm_rl.parameters import init_params
from afm_rl.tokenizer import Tokenizer
from tests.processes import LIMIT_S, await_process, descendants
from topologies.journal import read_journal
from topologies.online.ledger import consumed
from topologies.online.rollouts import RolloutFiles

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[3]
KILLS = int(os.environ.get("AFM_RL_KILLS", "20"))
ITERATIONS, PROMPTS = max(12, 2 * KILLS), 4
TARGETS = ("driver", "learner", "sampler", "reward", "all")
TOPOLOGY = """
name: kills
deterministic: true
model: {{huggingface: {folder}}}
checkpoints: {{iterations: 3}}
data:
  world: python
  sizes: {{code_bytes: 0, web_bytes: 0, math_documents: 0, long_context_documents: 0, demonstrations: 0, prompts: 30,
    eval_prompts: 4, preferences: 0, feature_demonstrations: 0, feature_eval_prompts: 0}}
actors:
  learner: {{heartbeat_s: 10, max_restarts: 100}}
  sampler: {{replicas: 2, max_batch: 8, max_restarts: 100}}
stages:
  - rl: {{iterations: {iterations}, prompts: {prompts}, responses: 3, max_tokens: 8, learning_rate: 3e-3, warmup_steps: 1,
      reward: {{model: 0, function: {{path: "tests.topologies.online.rewards:short_words", timeout_s: 120}}}}}}
"""


@dataclass(frozen=True)
class Launch:
    """How the topology is launched in a folder of the test's own."""

    file: Path
    root: Path
    launcher: str
    cache: Path

    def start(self) -> subprocess.Popen:
        """A process that resumes what is there."""
        sets = (f"run_root={self.root}", f"launcher={self.launcher}")
        options = [part for option in sets for part in ("--set", option)]
        command = [sys.executable, "-m", "topologies.cli", "launch", str(self.file), "--resume", *options]
        settings = {"JAX_PLATFORMS": "cpu", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1", "PYTHONPATH": str(ROOT)}
        settings["JAX_COMPILATION_CACHE_DIR"] = str(self.cache)
        with (self.root / f"{self.launcher}.log").open("ab") as log:
            return subprocess.Popen(command, env={**os.environ, **settings}, cwd=self.root, stdout=log, stderr=log)

    def finish(self, process: subprocess.Popen) -> Path:
        """Wait for its end; the run folder."""
        assert process.wait(timeout=LIMIT_S) == 0, (self.root / f"{self.launcher}.log").read_text()[-4000:]
        return self.root / "kills"


def launch(tmp_path: Path, foreign_tokenizer: Path, launcher: str) -> Launch:
    """The topology over a small random model."""
    config = ModelConfig(832, 32, 64, 2, 2, 1, 16, max_positions=512)
    folder = tmp_path / "model"
    if not folder.exists():
        tokenizer = Tokenizer.load(foreign_tokenizer)
        save_pretrained(init_params(config, jax.random.key(0)), folder, config=config, tokenizer=tokenizer)
    file, root = tmp_path / "kills.yaml", tmp_path / launcher
    file.write_text(TOPOLOGY.format(folder=folder, iterations=ITERATIONS, prompts=PROMPTS))
    root.mkdir()
    return Launch(file, root, launcher, tmp_path / "cache")


def trained(run: Path) -> Counter:
    """Every group trained on, with all of its tokens and rewards."""
    files = RolloutFiles(run / "rollouts" / "rl")
    found = consumed(read_journal(run / "journal.msgpack"), "rl")
    assert sorted(found) == list(range(ITERATIONS))
    groups: Counter = Counter()
    for iteration, ids in found.items():
        of = {rollout.scored.group.id: rollout.scored for rollout in files.read(iteration).rollouts.values()}
        for name in ids:
            tokens = tuple(response.tobytes() for response in of[name].group.responses)
            groups[name, tokens, of[name].reward_G.tobytes()] += 1
    return groups


def progress(run: Path) -> int:
    """Iterations that the journal says are consumed."""
    return len(consumed(read_journal(run / "journal.msgpack"), "rl"))


def kill(target: str, process: subprocess.Popen) -> None:
    """SIGKILL."""
    if target in ("learner", "sampler", "reward"):
        os.kill(await_process(f"ray::{target.capitalize()}", process), signal.SIGKILL)
        return
    victims = [process.pid, *(descendants(process.pid) if target == "all" else ())]
    for pid in victims:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue  # it went with another one
    process.wait(timeout=30)


def test_no_kill_loses_or_doubles_a_group(tmp_path: Path, foreign_tokenizer: Path) -> None:
    """Guards the whole chain: journal, rollouts, checkpoints, weights given again, requests asked again, in exact bits."""
    whole = launch(tmp_path, foreign_tokenizer, "inline")
    expected = whole.finish(whole.start())
    groups = trained(expected)
    assert sum(groups.values()) == ITERATIONS * PROMPTS
    assert len({name for name, *_ in groups}) == ITERATIONS * PROMPTS
    killed = launch(tmp_path, foreign_tokenizer, "local")
    rng, process, run = np.random.default_rng(5), killed.start(), killed.root / "kills"
    for number in range(KILLS):
        moment = ITERATIONS * (number + rng.uniform(0.05, 0.9)) / KILLS
        began = time.monotonic()
        while progress(run) < moment:
            assert process.poll() is None, (killed.root / "local.log").read_text()[-4000:]
            assert time.monotonic() - began < LIMIT_S
            time.sleep(0.02)
        time.sleep(float(rng.uniform(0, 0.5)))
        target = TARGETS[(number + int(rng.integers(2))) % len(TARGETS)]
        if process.poll() is None:
            kill(target, process)
        if process.poll() is not None:
            process = killed.start()
    found = killed.finish(process)
    assert trained(found) == groups
    weights = "policies/rl/0/model.safetensors"
    assert (found / weights).read_bytes() == (expected / weights).read_bytes()
    assert (found / weights).read_bytes() != (tmp_path / "model" / "model.safetensors").read_bytes()  # something was learnt
