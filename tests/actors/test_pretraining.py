"""The pre-training worker: phases in order, each from the last one's model, and a restart that changes nothing."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest

import actors.pretraining as pretraining_module
from actors.artifacts import load_artifact
from actors.jobs import LearnerSetup, TrainingJob
from actors.learner import Learner
from actors.metrics import GOODPUT_STAGE, JsonlSink, Metrics, read_metrics
from actors.pretraining import PhasePlan, PhaseResult, PretrainPlan, held_out_rows, run_pretraining
from afm_rl.config import ModelConfig
from afm_rl.recipe import OptimizerSpec
from afm_rl.weights import digest
from pretrain.token_corpus import read_corpus, write_corpus

CONFIG = ModelConfig(16, 8, 16, 1, 2, 1, 4)


class Letters:
    """A tokenizer of a few letters."""

    vocab_size = 16
    eos_id = 1
    fingerprint = "letters"

    def encode(self, text: str) -> list[int]:
        return [2 + ord(c) % 14 for c in text]


@pytest.fixture(scope="module")
def corpora(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three domains and their held-out sides; long_context has documents of 20 tokens."""
    folder = tmp_path_factory.mktemp("corpora")
    for name, text in (("web", "abcabc"), ("code", "hijhij"), ("long_context", "mnop" * 5)):
        write_corpus(folder / name, [text] * 12, Letters())
        write_corpus(folder / f"heldout-{name}", [text] * 3, Letters())
    return folder


def make_plan(corpora: Path, folder: Path) -> PretrainPlan:
    """Five steps without long_context, then four with it; one shape, so that one program serves both phases."""
    settings = (("core", 5, {"web": 0.5, "code": 0.5}), ("long", 4, {"web": 0.5, "long_context": 0.5}))
    phases: list[PhasePlan] = []
    for name, steps, mixture in settings:
        job = TrainingJob(
            f"pretrain-{name}",
            "supervised",
            OptimizerSpec("afm", 0.02, warmup_steps=1, total_steps=5, end_fraction=0.5),
            str(folder / "checkpoints" / name),
            config=CONFIG,
            init=phases[-1].export if phases else None,
            options={"z_loss": 1e-6},
            checkpoint_every=2,
        )
        phases.append(PhasePlan(name, job, steps, 4, 24, mixture, 0, str(folder / "policies" / name)))
    return PretrainPlan(
        phases=tuple(phases),
        corpora=str(corpora),
        domains=("web", "code", "long_context"),
        heldout_domains=("web", "code", "long_context"),
        fingerprint="letters",
        tokenizer_folder="",
        stage="pretrain",
        learner=LearnerSetup(),
    )


class Kill:
    """A metrics sink that stops the run at one task's step, once, and remembers what else was measured."""

    def __init__(self, task: str, step: int) -> None:
        self._at: tuple[str, int] | None = (task, step)
        self.rows: list[tuple[str, int]] = []

    def log(self, *, stage: str, task: str, step: int, values: Mapping[str, float]) -> None:
        del stage, values
        if (task, step) == self._at:
            self._at = None
            raise KeyboardInterrupt
        self.rows.append((task, step))

    def close(self) -> None: ...


@dataclasses.dataclass
class Run:
    """An uninterrupted run: its folder, results, and what was reported while it ran."""

    plan: PretrainPlan
    folder: Path
    results: list[PhaseResult]
    reported: list[PhaseResult]


@pytest.fixture(scope="module")
def whole(corpora: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("whole")
    plan = make_plan(corpora, folder)
    reported: list[PhaseResult] = []
    with Metrics([JsonlSink(folder / "metrics")]) as metrics:
        results = run_pretraining(plan, metrics, report=reported.append)
    return Run(plan, folder, results, reported)


@pytest.mark.slow
def test_phases_run_in_order(whole: Run) -> None:
    """Guards 3.2: every phase is reported with its tokens and the held-out loss of every domain, and learns."""
    assert [r.name for r in whole.results] == ["core", "long"]
    assert whole.reported == whole.results
    assert [r.tokens for r in whole.results] == [5 * 4 * 24, 4 * 4 * 24]
    core, long = whole.results
    assert set(core.losses) == set(long.losses) == {"web", "code", "long_context"}
    assert core.losses["web"] < np.log(16)
    assert long.losses["long_context"] < core.losses["long_context"]


@pytest.mark.slow
def test_every_step_is_measured(whole: Run) -> None:
    """Guards the curves: one row a step and task, whatever the number of steps a call."""
    written = read_metrics(whole.folder / "metrics")
    rows = [row for row in written if row["stage"] != GOODPUT_STAGE]
    assert [(row["task"], row["step"]) for row in rows] == [
        *(("pretrain-core", step) for step in range(5)),
        *(("pretrain-long", step) for step in range(4)),
    ]
    assert all({"nll", "loss", "grad_norm", "skipped_steps", "tokens_per_s"} <= set(row) for row in rows)
    goodput = {row["task"]: row for row in written if row["stage"] == GOODPUT_STAGE}
    assert list(goodput) == ["pretrain-core", "pretrain-long"]
    for row in goodput.values():
        assert 0 < row["goodput"] < 1
        assert row["step_s"] > 0 < row["compile_s"]


@pytest.mark.slow
def test_the_second_phase_starts_from_the_first(whole: Run) -> None:
    """Guards the chain of models: a learner that begins the second phase holds the first one's export."""
    core, long = (digest(load_artifact(phase.export).params) for phase in whole.plan.phases)
    learner = Learner()
    learner.begin(dataclasses.replace(whole.plan.phases[1].job, checkpoint_folder=str(whole.folder / "fresh")))
    assert learner.publish("p", 0).digest == core != long


@pytest.mark.slow
def test_a_second_run_only_reads_results(whole: Run) -> None:
    """Guards a restarted worker: finished phases are reported again, without a step."""
    reported: list[PhaseResult] = []
    sink = Kill("", 0)
    assert run_pretraining(whole.plan, Metrics([sink]), report=reported.append) == whole.results
    assert reported == whole.results
    assert sink.rows == []


@pytest.mark.slow
@pytest.mark.parametrize(("task", "step"), [("pretrain-core", 3), ("pretrain-long", 2)])
def test_a_kill_changes_nothing(
    whole: Run, corpora: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, task: str, step: int
) -> None:
    """Guards exact resume inside either phase: equal losses and equal models, bit for bit."""
    monkeypatch.setattr(pretraining_module, "STEPS_PER_CALL", 2)
    plan, kill = make_plan(corpora, tmp_path), Metrics([Kill(task, step)])
    with pytest.raises(KeyboardInterrupt):
        run_pretraining(plan, kill)
    assert run_pretraining(plan, kill) == whole.results
    for mine, theirs in zip(plan.phases, whole.plan.phases, strict=True):
        assert digest(load_artifact(mine.export).params) == digest(load_artifact(theirs.export).params)


def test_long_documents_are_held_out_whole(corpora: Path) -> None:
    """Guards the measure of context lengthening: long_context in rows of the longest phase, other domains of the first."""
    held = {name: read_corpus(corpora / f"heldout-{name}", fingerprint="letters") for name in ("web", "long_context")}
    rows = held_out_rows(held, short=8, long=24)
    assert rows["web"].tokens.shape == (3, 8)
    assert rows["long_context"].tokens.shape == (3, 24)
    assert rows["long_context"].segments[0].tolist() == [1] * 21 + [0] * 3


def test_held_out_rows_are_bounded(corpora: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards the cost of measuring a large corpus, with one row at least; an empty domain has none."""
    monkeypatch.setattr(pretraining_module, "HELD_OUT_TOKENS", 16)
    held = {name: read_corpus(corpora / f"heldout-{name}", fingerprint="letters") for name in ("web", "long_context")}
    write_corpus(corpora / "heldout-math", [], Letters())
    held["math"] = read_corpus(corpora / "heldout-math", fingerprint="letters")
    rows = held_out_rows(held, short=8, long=24)
    assert {name: len(packed) for name, packed in rows.items()} == {"web": 2, "long_context": 1}
