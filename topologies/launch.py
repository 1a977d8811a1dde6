"""Launch a topology: start its actors, run its stages in order, and write the report as they finish.

Every stage runs once: its result is journalled, and `--resume` takes up where the journal and the newest checkpoints are.
"""

from __future__ import annotations

import logging
import os
import platform
import time
from collections.abc import Callable
from dataclasses import asdict
from datetime import datetime
from typing import Any

from actors.metrics import JsonlSink, Metrics, MetricsSink, RaySink, TensorBoardSink
from topologies.datasets import load_dataset
from topologies.live import LiveState
from topologies.plan import plan
from topologies.progress import ProgressView
from topologies.report import write_report
from topologies.report_data import ActorUse, Figure, Report, Sample, StageResult
from topologies.run_folder import RunFolder
from topologies.schema import Topology
from topologies.stages import (
    adapters,
    distill_committee,
    evaluate,
    itec,
    pretrain,
    prune,
    quantize,
    recover,
    reward_model,
    rl,
    serve,
    sft,
    tokenizer,
)
from topologies.stages.context import Context
from topologies.system import System, start

log = logging.getLogger(__name__)

Stage = Callable[[Context, Any], StageResult]

#: What runs for each name in a topology's `stages`.
STAGES: dict[str, Stage] = {
    "tokenizer": tokenizer.run,
    "pretrain": pretrain.run,
    "prune": prune.run,
    "sft": sft.run,
    "reward_model": reward_model.run,
    "rl": rl.run,
    "itec": itec.run,
    "distill_committee": distill_committee.run,
    "quantize": quantize.run,
    "recover": recover.run,
    "adapters": adapters.run,
    "evaluate": evaluate.run,
    "serve": serve.run,
}
#: Figures that the report's first lines repeat: (stage, label).
HEADLINE = (
    ("reward_model", "held-out pair accuracy"),
    ("rl", "greedy accuracy"),
    ("itec", "SFT greedy accuracy"),
    ("itec", "MDLOO greedy accuracy"),
    ("itec", "MDLOO gain on held-out operands"),
    ("distill_committee", "distilled, greedy accuracy"),
    ("quantize", "bits per weight"),
)


def launch(topology: Topology, *, resume: bool = False) -> RunFolder:
    """Run every stage of the topology; returns its run folder, whose report is `report.html`.

    Raises UserError for what the user can put right (a folder of another topology, actors that do not fit, bad data).
    """
    plan(topology)  # raises when the actors do not fit this machine, before anything starts
    run = RunFolder.create_or_open(topology.run_root, topology, resume=resume)
    _share_compiled_programs(run)
    with run.open_journal() as journal, ProgressView() as progress:
        progress.say(f"run folder {run.path}")
        if run.finished:
            progress.say(f"every stage is done: see {run.report_html}")
            return run
        data = load_dataset(topology)
        progress.say(f"data: {data.source}")
        with start(topology) as system:
            progress.say(_where(system))
            with Metrics(_sinks(run, system)) as metrics, LiveState(run, system, progress) as live:
                context = Context(topology, run, journal, system, metrics, progress, data)
                _run_stages(context, live)
        run.mark_finished(journal)
        progress.say(f"report: {run.report_html}")
    return run


def _share_compiled_programs(run: RunFolder) -> None:
    """One cache of compiled programs for all processes: a job of known shapes, or a resumed run, compiles nothing."""
    import jax

    folder, seconds = str(run.path.parent / ".jax-cache"), "0.2"
    # The variables are for the actors, which inherit them; this process has imported JAX already.
    folder = os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", folder)
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", seconds)
    jax.config.update("jax_compilation_cache_dir", folder)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", float(seconds))


def _run_stages(context: Context, live: LiveState) -> None:
    began = time.perf_counter()
    results: list[StageResult] = []
    for options in context.topology.stages:
        stage_began = time.perf_counter()
        done = context.journal.done(f"stage/{options.name}")
        context.progress.heading(f"{options.name}{' (already done)' if done else ''}")
        live.enter(options.name)

        def work(options: Any = options, stage_began: float = stage_began) -> dict[str, Any]:
            with context.engines_logged(options.name):
                result = STAGES[options.name](context, options)
            return result.model_copy(update={"seconds": time.perf_counter() - stage_began}).model_dump(mode="json")

        results.append(StageResult.model_validate(context.once(f"stage/{options.name}", work)))
        for figure in results[-1].figures if not done else ():
            context.progress.say(f"  {figure.label}: {figure.value} {figure.unit} {figure.note}".rstrip())
        _write_report(context, results, total_s=time.perf_counter() - began)


def _write_report(context: Context, results: list[StageResult], *, total_s: float) -> None:
    """report.json and report.html as of now, so that an unfinished run has a report too."""
    topology = context.topology
    declared = {role: getattr(topology.actors, role, None) for role in type(topology.actors).model_fields}
    report = Report(
        name=topology.name,
        created=datetime.now().astimezone().isoformat(timespec="seconds"),
        total_s=max(total_s, sum(r.seconds for r in results)),
        environment=_environment(),
        topology=topology.resolved(),
        dashboard=context.system.dashboard,
        headline=_headline(results),
        actors=[
            ActorUse(
                **asdict(stats) | {"role": stats.name.split("-")[0]},
                num_cpus=getattr(declared.get(stats.name.split("-")[0]), "num_cpus", None),
            )
            for stats in context.system.stats()
        ],
        stages=results,
        samples=_samples(context, results),
    )
    temporary = context.run.report_json.with_suffix(".tmp")
    temporary.write_text(report.model_dump_json(indent=1), encoding="utf-8")
    temporary.replace(context.run.report_json)
    write_report(context.run.path)


def _headline(results: list[StageResult]) -> list[Figure]:
    found = {(r.name, figure.label): figure for r in results for figure in r.figures}
    return [found[key] for key in HEADLINE if key in found]


def _samples(context: Context, results: list[StageResult]) -> list[Sample]:
    if not any(r.name == "evaluate" for r in results):
        return []
    return evaluate.samples(context, context.topology.stage("evaluate"))


def _where(system: System) -> str:
    if system.launcher == "inline":
        return f"{len(system.handles)} actors in this process"
    return f"{len(system.handles)} actors on Ray; dashboard {system.dashboard}"


def _sinks(run: RunFolder, system: System) -> list[MetricsSink]:
    sinks: list[MetricsSink] = [JsonlSink(run.metrics), TensorBoardSink(run.metrics / "tensorboard")]
    return [*sinks, RaySink()] if system.launcher != "inline" else sinks


def _environment() -> dict[str, Any]:
    import jax

    return {
        "python": platform.python_version(),
        "jax": jax.__version__,
        "platform": platform.platform(),
        "cpus": os.cpu_count(),
    }
