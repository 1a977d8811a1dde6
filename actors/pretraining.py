"""Pre-training as one worker runs it: the phases of 3.2 in order, each from the last one's model, on a `Learner`.

The same function runs inside a Ray Train worker and directly (launcher: inline). Everything is a function of the plan: a
worker that is restarted skips the phases whose result is on disk and resumes the current one from its newest checkpoint.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import jax

from actors.jobs import LearnerSetup, TrainingJob
from actors.learner import Learner
from actors.metrics import GOODPUT_STAGE, Metrics
from afm_rl.packing import PackedRows
from pretrain.mixture import mixture_batches, pack_corpus
from pretrain.token_corpus import TokenCorpus, read_corpus

#: Optimizer steps between two looks at the metrics.
STEPS_PER_CALL = 10
#: At most this many tokens of a domain are used for its held-out loss.
HELD_OUT_TOKENS = 16_384


@dataclass(frozen=True)
class PhasePlan:
    """One phase: what the learner does, on which mixture, and where the model goes."""

    name: str
    job: TrainingJob
    steps: int
    batch: int
    sequence_length: int
    mixture: Mapping[str, float]
    seed: int
    export: str


@dataclass(frozen=True)
class PretrainPlan:
    """All phases, and where the tokenised corpora (DOMAIN, heldout-DOMAIN) are."""

    phases: tuple[PhasePlan, ...]
    corpora: str
    domains: tuple[str, ...]
    heldout_domains: tuple[str, ...]
    fingerprint: str
    tokenizer_folder: str
    stage: str
    learner: LearnerSetup


@dataclass(frozen=True)
class PhaseResult:
    """Held-out loss per domain in nats per token after a phase, and the tokens it trained on."""

    name: str
    losses: dict[str, float]
    tokens: int


def run_pretraining(
    plan: PretrainPlan, metrics: Metrics, *, report: Callable[[PhaseResult], None] | None = None
) -> list[PhaseResult]:
    """Run every phase; `report` hears of each one that ends. Of several processes the first keeps the records."""
    learner = Learner(plan.learner)
    corpora = {name: _open(plan, name) for name in plan.domains}
    held_out = held_out_rows(
        {name: _open(plan, f"heldout-{name}") for name in plan.heldout_domains},
        short=plan.phases[0].sequence_length,
        long=max(phase.sequence_length for phase in plan.phases),
    )
    results = []
    for phase in plan.phases:
        done = Path(phase.job.checkpoint_folder).parent / f"{phase.job.task}.done.json"
        if done.exists():
            result = PhaseResult(**json.loads(done.read_text()))
        else:
            result = _run_phase(plan, phase, learner, corpora, held_out, metrics)
            if jax.process_index() == 0:
                temporary = done.with_suffix(".tmp")
                temporary.parent.mkdir(parents=True, exist_ok=True)
                temporary.write_text(json.dumps(asdict(result)))
                temporary.replace(done)
        results.append(result)
        if report is not None:
            report(result)
    return results


def held_out_rows(corpora: Mapping[str, TokenCorpus], *, short: int, long: int) -> dict[str, PackedRows]:
    """Rows to measure each domain on: long_context at the long length, where it differs from the others, all else short."""
    rows = {}
    for name, corpus in corpora.items():
        length = long if name == "long_context" else short
        packed = pack_corpus(corpus, length=length, pad_id=0)
        if len(packed):
            keep = slice(0, max(1, HELD_OUT_TOKENS // length))
            rows[name] = PackedRows(packed.tokens[keep], packed.segments[keep], packed.positions[keep], packed.mask[keep])
    return rows


def _open(plan: PretrainPlan, name: str) -> TokenCorpus:
    return read_corpus(Path(plan.corpora) / name, fingerprint=plan.fingerprint)


def _run_phase(
    plan: PretrainPlan,
    phase: PhasePlan,
    learner: Learner,
    corpora: Mapping[str, TokenCorpus],
    held_out: Mapping[str, PackedRows],
    metrics: Metrics,
) -> PhaseResult:
    rows = {name: pack_corpus(corpora[name], length=phase.sequence_length, pad_id=0) for name in phase.mixture}
    batches = mixture_batches(rows, phase.mixture, batch=phase.batch, seed=phase.seed)
    start = learner.begin(phase.job)
    try:
        for first in range(start, phase.steps, STEPS_PER_CALL):
            steps = range(first, min(first + STEPS_PER_CALL, phase.steps))
            measured = learner.train([batches(step) for step in steps])
            for step, values in zip(steps, measured, strict=True) if jax.process_index() == 0 else ():
                metrics.log(stage=plan.stage, task=phase.job.task, step=step, values=values)
    finally:
        learner.wait_for_checkpoints()  # a run that is interrupted in order keeps what it began to write
    learner.export(phase.export, plan.tokenizer_folder)
    if jax.process_index() == 0:
        metrics.log(stage=GOODPUT_STAGE, task=phase.job.task, step=phase.steps, values=learner.goodput())
    tokens = phase.steps * phase.batch * phase.sequence_length
    return PhaseResult(phase.name, {name: of.loss for name, of in learner.held_out(held_out).items()}, tokens)
