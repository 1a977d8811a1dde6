"""A plan as tables for a person at a terminal."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from topologies.plan import Plan


def print_plan(plan: Plan, console: Console) -> None:
    """Headline, actors and stages of a plan."""
    console.print(
        f"[bold]{plan.name}[/bold]  launcher {plan.launcher}, model {amount(plan.num_params)} parameters, "
        f"{plan.matmul_flops_per_s / 1e9:.0f} GFLOP/s measured, {plan.machine_cpus} CPUs, {size(plan.machine_bytes)}"
    )
    console.print(_actors(plan))
    console.print(_stages(plan))


def _actors(plan: Plan) -> Table:
    table = Table(title="Actors", title_justify="left", show_footer=True)
    table.add_column("role", "together")
    table.add_column("replicas", str(sum(a.replicas for a in plan.actors)), justify="right")
    table.add_column("CPUs each", f"{plan.num_cpus:.2f}", justify="right")
    table.add_column("GPUs each", f"{sum(a.replicas * a.num_gpus for a in plan.actors):g}", justify="right")
    table.add_column("memory each", size(plan.memory_bytes), justify="right")
    for actor in plan.actors:
        cpus, gpus = f"{actor.num_cpus:.2f}", f"{actor.num_gpus:g}"
        table.add_row(actor.role, str(actor.replicas), cpus, gpus, size(actor.memory_bytes))
    return table


def _stages(plan: Plan) -> Table:
    trained, generated = sum(s.train_tokens for s in plan.stages), sum(s.generated_tokens for s in plan.stages)
    table = Table(title="Stages (durations are estimates)", title_justify="left", show_footer=True)
    table.add_column("stage", "together")
    table.add_column("tokens trained on", amount(trained), justify="right")
    table.add_column("tokens generated", amount(generated), justify="right")
    table.add_column("duration", duration(plan.seconds), justify="right")
    for stage in plan.stages:
        tokens = (amount(stage.train_tokens), amount(stage.generated_tokens))
        table.add_row(stage.name, *tokens, duration(stage.seconds))
    return table


def amount(n: int) -> str:
    """1234567 -> '1.2M'; 0 -> '-'."""
    for limit, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if n >= limit:
            return f"{n / limit:.1f}{unit}"
    return str(n) if n else "-"


def size(n_bytes: int) -> str:
    """Bytes as MiB, or GiB from one on."""
    return f"{n_bytes / 2**30:.1f} GiB" if n_bytes >= 2**30 else f"{n_bytes / 2**20:.0f} MiB"


def duration(seconds: float) -> str:
    """Seconds as s, min, h or days, whichever reads best."""
    for limit, unit in ((86400.0, "days"), (3600.0, "h"), (60.0, "min")):
        if seconds >= 2 * limit:
            return f"{seconds / limit:.1f} {unit}"
    return f"{seconds:.0f} s"
