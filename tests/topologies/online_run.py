"""A run folder with an online job in it, made with the product's own writers and without a run."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from typing import Any

import numpy as np

from actors.metrics import ENGINE_STAGE, JsonlSink, Metrics
from afm_rl.types import Group, Message, PolicyUpdate, Prompt, ScoredGroup, TrainedGroup
from topologies.journal import Journal
from topologies.online.ledger import Ledger
from topologies.online.rollouts import Rollout, RolloutFiles
from topologies.online.tickets import Ticket, tickets_of
from topologies.run_folder import RunFolder
from topologies.schema import load_topology

SMOKE = Path(__file__).resolve().parents[2] / "topologies" / "smoke.yaml"
HOSTILE = (
    '<script>alert(1)</script><img src=x onerror="alert(2)"> \' " & \x00 \x1b[31m [bold]not markup[/bold] </pre></main>'
)
TASK, STAGE = "itec-1-mdloo", "itec"
PROMPTS = [
    Prompt(f"sum-{i}", (Message("system", "Answer with the sum."), Message("user", f"What is {17 + i}+{25 + 2 * i}?")))
    for i in range(12)
]
BATCH, RESPONSES = 8, 4


def write_online_run(root: Path, *, iterations: int = 40, hostile: bool = True, live: dict[str, Any] | None = None) -> Path:
    """RUN = `root`/smoke: journal, metrics and rollouts of `iterations` iterations, the last one without its update."""
    rng = np.random.default_rng(3)
    run = RunFolder.create_or_open(root, load_topology(SMOKE))
    files, metrics = RolloutFiles(run.rollouts / TASK), Metrics([JsonlSink(run.metrics)])
    with run.open_journal() as journal:
        for stage in ("tokenizer", "pretrain", "prune", "sft", "reward_model"):
            journal.once(f"stage/{stage}", lambda stage=stage: {"name": stage, "seconds": 61.5})
        ledger = Ledger(journal, TASK)
        for iteration in range(iterations):
            _iteration(iteration, ledger, files, metrics, rng, last=iteration == iterations - 1, hostile=hostile)
    if live is not None:
        (run.path / "live.json").write_text(json.dumps(live))
    return run.path


def _iteration(
    iteration: int, ledger: Ledger, files: RolloutFiles, metrics: Metrics, rng: Any, *, last: bool, hostile: bool
) -> None:
    tickets = tickets_of(iteration, PROMPTS, count=BATCH, seed=1)
    ids = [ticket.id for ticket in tickets]
    ledger.published(iteration, f"{iteration:064x}")
    ledger.issued(iteration, tickets, iteration)
    skill = 1 - 0.8 * math.exp(-iteration / 12)
    rollouts = [_rollout(ticket, iteration, skill, rng, hostile=hostile and ticket.number % 5 == 0) for ticket in tickets]
    files.add(iteration, rollouts)
    ledger.finished(iteration, ids)
    if last:
        return
    update = PolicyUpdate({"reward": skill}, tuple(_trained(rollout, rng) for rollout in rollouts))
    files.add_update(iteration, update)
    ledger.consumed(iteration, ids)
    rewards = np.concatenate([rollout.scored.reward_G for rollout in rollouts])
    metrics.log(stage=STAGE, task=TASK, step=iteration, values=online_values(iteration, float(np.nanmean(rewards)), skill))
    for actor in ("sampler-0", "sampler-1"):
        engine = {"tokens_per_s": 812.0, "batch_occupancy": 0.83, "preemptions": 0, "response_tokens": 512}
        metrics.log(stage=ENGINE_STAGE, task=f"{TASK}/{actor}", step=iteration, values=engine)


def online_values(iteration: int, reward: float, skill: float) -> dict[str, float]:
    """A row of the loop's metrics."""
    return {
        "reward": reward, "accuracy": skill * 0.97, "kl_to_reference": 0.02 * iteration, "kl_to_behavior": 0.011,
        "ratio_mean": 1.0, "ratio_max": 1.4, "effective_sample_fraction": 0.94, "logp_mismatch_max": 2e-5,
        "logp_mismatch_mean": 1e-6, "staleness_mean": 0.5, "staleness_max": 1, "generate_s": 0.46, "reward_s": 0.12,
        "update_s": 0.48, "publish_s": 0.03, "learner_wait_s": 0.2, "sampler_wait_s": 0.1, "iteration_s": 0.7,
        "tokens_per_s": 1650.0 + iteration, "queue_depth": 8, "weights_in_sync": 1.0, "valid_fraction": 0.97,
        "policy_version": iteration,
    }  # fmt: skip


def _rollout(ticket: Ticket, version: int, skill: float, rng: Any, *, hostile: bool) -> Rollout:
    right = rng.random(RESPONSES) < skill
    valid = np.ones(RESPONSES, bool)
    valid[3] = ticket.number % 7 != 0
    lengths = rng.integers(6, 24, RESPONSES)
    responses = tuple(np.arange(length, dtype=np.int32) for length in lengths)
    logps = tuple(np.full(length, -0.4, np.float32) for length in lengths)
    group = Group(
        ticket.id, np.arange(9, dtype=np.int32), responses, logps, tuple(bool(n < 22) for n in lengths), TASK, version
    )
    verifier = np.where(right, 1.0, 0.0).astype(np.float32)
    model = rng.normal(0.2, 0.1, RESPONSES).astype(np.float32)
    reward = np.where(valid, verifier + 0.5 * model, np.nan).astype(np.float32)
    problems = tuple("" if ok else "verifier: TimeoutError after 2 s" for ok in valid)
    scored = ScoredGroup(group, reward, valid, {"verifier": verifier, "model": model}, problems)
    texts = [f"7+5=12 3+2+1=6 answer {62 if ok else 52}" for ok in right]
    if hostile:
        texts[1] = HOSTILE
    return Rollout(ticket.number, scored, {version: f"{version:064x}"}, ticket.prompt.messages, tuple(texts))


def _trained(rollout: Rollout, rng: Any) -> TrainedGroup:
    scored = rollout.scored
    counted = scored.valid_G.copy()
    mean = np.nanmean(scored.reward_G)
    advantage = np.where(counted, scored.reward_G - mean, 0).astype(np.float32)
    logp = np.array([logps.sum() for logps in scored.group.logps], np.float32)
    drift = rng.normal(0.3, 0.1, RESPONSES).astype(np.float32)
    mismatch = rng.uniform(1e-7, 2e-5, RESPONSES).astype(np.float32)
    return TrainedGroup(scored.group.id, advantage, counted, logp, logp - drift, mismatch)


def live_json(*, age_s: float = 0.4, state: str = "running", **changes: Any) -> dict[str, Any]:
    """What a launch on two samplers, one of them restarted and one silent reward actor, would have written."""
    now = time.time()

    def actor(name: str, role: str, state: str, **more: Any) -> dict[str, Any]:
        values = {"restarts": 0, "host": "node-1", "pid": 4242, "life": "a" * 32, "working": int(state == "working")}
        return {"name": name, "role": role, "state": state, **values, "busy_s": 31.2, "calls": 71, "mib": 412.5,
                "peak_mib": 530.0, "busy_share": 0.62, "engine": None, **more}  # fmt: skip

    engine = {"version": 39, "running": 24, "waiting": 8, "tokens": 61000}
    return {
        "name": "smoke", "pid": 999999, "host": "node-1", "started": now - 754, "written": now - age_s, "state": state,
        "launcher": "local", "dashboard": "http://127.0.0.1:8265", "stage": {"name": STAGE, "since": now - 125},
        "bars": [{"name": TASK, "done": 39, "total": 200}],
        "actors": [
            actor("learner", "Learner", "working", busy_share=0.71, mib=942.0, peak_mib=1810.0),
            actor("sampler-0", "Sampler", "working", engine=engine),
            actor("sampler-1", "Sampler", "restarting", restarts=2, cause="the actor died unexpectedly", engine=engine),
            actor("reward-0", "Reward", "silent", silent_s=12.3),
            actor("committee-0", "Committee", "idle", busy_share=0.0, engine={**engine, "version": -1, "running": 0}),
            {"name": "quantizer-0", "state": "starting", "restarts": 0},
            actor("weights", "WeightStore", "idle", busy_share=0.01, mib=88.0, peak_mib=90.0),
        ],
        "messages": [
            {"time": now - 95, "level": "WARNING", "source": "actors.dispatch",
             "text": "sampler-1 was lost (the actor died before finishing this task); 12 requests go to others"},
            {"time": now - 9, "level": "ERROR", "source": "actors.roster", "text": "[red]reward-0[/red] is given up"},
        ],
        **changes,
    }  # fmt: skip


def journal_of(run: Path) -> Journal:
    """The run's journal, for a test that writes on."""
    return RunFolder(run).open_journal()
