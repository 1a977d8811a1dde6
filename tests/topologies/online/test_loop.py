"""The online loop in one process, on a small random model: overlap, environments, rewards that fail, prompts too long."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import yaml

from actors.group import GroupRestartedError
from afm_rl.config import ModelConfig
from afm_rl.errors import UserError
from afm_rl.huggingface import save_pretrained
from afm_rl.parameters import init_params
from afm_rl.tokenizer import Tokenizer
from topologies.generators import Generators
from topologies.journal import read_journal
from topologies.launch import launch
from topologies.online.ledger import Ledger, consumed, lineage
from topologies.online.rollouts import RolloutFiles
from topologies.run_folder import RunFolder
from topologies.schema import parse_topology
from topologies.stages.context import Context

pytestmark = pytest.mark.slow

REWARDS = "tests.topologies.online.rewards"
TOPOLOGY = """
name: {name}
launcher: inline
run_root: {root}
model: {{huggingface: {folder}}}
checkpoints: {{iterations: 2}}
data:
  world: python
  sizes: {{code_bytes: 0, web_bytes: 0, math_documents: 0, long_context_documents: 0, demonstrations: 0, prompts: 30,
    eval_prompts: 2, preferences: 0, feature_demonstrations: 0, feature_eval_prompts: 0}}
actors: {{sampler: {{max_batch: 8}}, committee: {{max_batch: 8}}}}
stages:
  - rl: {options}
"""
STAGE = {"prompts": 2, "responses": 2, "max_tokens": 6, "learning_rate": 1e-3, "warmup_steps": 1}

Run = Callable[..., RunFolder]


@pytest.fixture(scope="module")
def run(foreign_tokenizer: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Launches the topology with options of the stage, under a name."""
    root = tmp_path_factory.mktemp("runs")
    config, folder = ModelConfig(832, 32, 64, 2, 2, 1, 16, max_positions=512), root / "model"
    tokenizer = Tokenizer.load(foreign_tokenizer)
    save_pretrained(init_params(config, jax.random.key(0)), folder, config=config, tokenizer=tokenizer)

    def start(name: str, options: str) -> RunFolder:
        stage = json.dumps(STAGE | yaml.safe_load(f"{{{options}}}"))
        text = TOPOLOGY.format(name=name, root=root, folder=folder, options=stage)
        return launch(parse_topology(text))

    return start


def rows(run: RunFolder) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run.metrics / "rl.jsonl").read_text().splitlines()]


def test_an_overlapping_loop_stays_within_its_staleness(run: Run) -> None:
    """Guards max_staleness through the whole system: every ticket once, by token versions no older than allowed."""
    done = run("overlap", f"iterations: 6, max_staleness: 2, reward: {{function: {REWARDS}:short_words}}")
    found = consumed(read_journal(done.journal_file), "rl")
    ids = [name for iteration in sorted(found) for name in found[iteration]]
    assert [int(name.rpartition("@")[2]) for name in ids] == list(range(12))
    files = RolloutFiles(done.rollouts / "rl")
    for iteration in range(6):
        versions = {version for one in files.read(iteration).rollouts.values() for version in one.digests}
        assert all(max(0, iteration - 2) <= version <= iteration for version in versions)
    measured = rows(done)
    assert max(row["staleness_max"] for row in measured) in (1, 2)
    assert all(row["valid_fraction"] == 1 and row["groups_discarded"] == 0 for row in measured)


def test_a_learner_lost_while_samplers_run_ahead(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards overlap over a restart of the learner: no ticket is lost or doubled, and no second producer is left."""
    ask, losses = Context.learner, [("update_policy", 3), ("update_policy", 2), ("update_policy", 6)]

    def learner(context: Context, method: str, *args: Any) -> Any:
        if losses and (method, args[0] if args else None) == losses[0]:
            losses.pop(0)
            raise GroupRestartedError("learner", restarts=1, rank=0, cause="killed")
        return ask(context, method, *args)

    monkeypatch.setattr(Context, "learner", learner)
    done = run("restarts", f"iterations: 8, max_staleness: 2, reward: {{function: {REWARDS}:short_words}}")
    assert not losses
    found = consumed(read_journal(done.journal_file), "rl")
    assert [int(name.rpartition("@")[2]) for i in sorted(found) for name in found[i]] == list(range(16))
    digests = lineage(read_journal(done.journal_file), "rl")
    for iteration in range(8):
        for one in RolloutFiles(done.rollouts / "rl").read(iteration).rollouts.values():
            assert all(max(0, iteration - 2) <= version <= iteration for version in one.digests)
            assert {version: digests[version] for version in one.digests} == one.digests
    assert not any(thread.name == "producer" for thread in threading.enumerate())


def test_weights_are_known_before_anybody_has_them(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards overlap: a group of new weights may be finished while others still load them, and needs their digest."""
    events, publish, give = list[tuple[str, int]](), Ledger.published, Generators.give

    def published(ledger: Ledger, version: int, digest: str) -> None:
        events.append(("known", version))
        publish(ledger, version, digest)

    def given(generators: Generators, policy: str, version: int, *args: Any, **kwargs: Any) -> None:
        if policy == "rl":
            events.append(("given", version))
        give(generators, policy, version, *args, **kwargs)

    monkeypatch.setattr(Ledger, "published", published)
    monkeypatch.setattr(Generators, "give", given)
    run("known", f"iterations: 2, reward: {{function: {REWARDS}:short_words}}")
    assert events[:4] == [("known", 0), ("given", 0), ("known", 1), ("given", 1)]


def test_an_environment_plays_in_the_loop(run: Run) -> None:
    """Guards episodes of several turns: they are paid for, and what the environment wrote is not trained on."""
    environment = f"environment: {{path: '{REWARDS}:Talkative', max_turns: 2, turn_tokens: 40}}"
    options = f"iterations: 2, responses: 8, max_tokens: 120, {environment}"
    done, turns = run("episodes", f"{options}, reward: {{environment: 1.0, function: {REWARDS}:short_words}}"), 0
    for iteration in range(2):
        seen = RolloutFiles(done.rollouts / "rl").read(iteration)
        for one in seen.rollouts.values():
            assert set(one.scored.components) == {"environment", "short_words"}
            group = one.scored.group
            for actions, logps in zip(group.actions, group.logps if group.actions else (), strict=True):
                turns += not actions.all()
                assert np.all(logps[~actions] == 0)
                assert np.all(logps[actions] < 0)
        assert all(group.counted_G.all() for group in seen.trained.values())
    assert turns  # a random model ends a turn of 40 tokens now and then


def test_a_reward_that_always_fails_ends_the_job_with_its_cause(run: Run) -> None:
    """Guards the budget of data failures: iterations without a reward are counted, and not trained on without end."""
    options = f"iterations: 9, data_failures: 2, reward: {{function: {REWARDS}:broken}}"
    with pytest.raises(UserError, match=r"3 data failures without progress, 2 allowed.*no such column"):
        run("broken", options)


def test_a_reward_that_fails_now_and_then_costs_its_responses(run: Run) -> None:
    """Guards the loop: a response without a reward is left out, the others of its prompt count."""
    done = run("sometimes", f"iterations: 3, responses: 4, reward: {{function: {REWARDS}:sometimes}}")
    measured = rows(done)
    assert len(measured) == 3
    assert 0 < np.mean([row["valid_fraction"] for row in measured]) < 1


def test_prompts_too_long_are_an_error_or_dropped(run: Run) -> None:
    """Guards the context: which prompts do not fit is said before anything is sampled."""
    options = f"iterations: 1, max_tokens: 480, reward: {{function: {REWARDS}:short_words}}"
    with pytest.raises(UserError, match=r"prompts are longer than 32 tokens.*long_prompts: drop"):
        run("long", options)
    done = run("dropped", f"{options}, long_prompts: drop")
    assert all(len(one.scored.group.prompt_T) <= 32 for one in RolloutFiles(done.rollouts / "rl").read(0).rollouts.values())
