"""What a topology will do, need and take, before anything starts: `afm-rl plan FILE`.

Per actor its resources and memory, per stage its tokens and estimated seconds (`costs`). What this machine cannot hold
is one error naming every shortage. Neither Ray nor JAX is imported here, unless the model is a Hugging Face folder.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from afm_rl.config import ModelConfig
from afm_rl.errors import UserError
from afm_rl.flops import matrix_params
from topologies import costs
from topologies.actor_options import Generating
from topologies.costs import Cost, Machine
from topologies.schema import Topology
from topologies.stage_options import SENSITIVITY_BATCH

#: Tokens of a prompt, where no option bounds them.
PROMPT_TOKENS = 48
#: CPUs of the actor that owns published weights, which the topology does not list.
WEIGHTS_CPUS = 0.05
#: NumPy k-means, seconds a weight and table width; a server's start; seconds of tokenizer training.
PALETTIZE_S_PER_WEIGHT, SERVE_START_S, TOKENIZER_S = 1e-6, 12.0, 8.0


@dataclass(frozen=True)
class ActorPlan:
    """One role: `num_cpus`, `num_gpus` and `memory_bytes` are of one replica."""

    role: str
    replicas: int
    num_cpus: float
    num_gpus: float
    memory_bytes: int


@dataclass(frozen=True)
class StagePlan:
    """One stage: positions trained on and generated, and the estimated duration."""

    name: str
    train_tokens: int
    generated_tokens: int
    seconds: float


@dataclass(frozen=True)
class Plan:
    """The whole topology. `num_params` counts the embedding once where it is tied."""

    name: str
    launcher: str
    num_params: int
    machine_cpus: int
    machine_bytes: int
    matmul_flops_per_s: float
    actors: tuple[ActorPlan, ...]
    stages: tuple[StagePlan, ...]

    @property
    def num_cpus(self) -> float:
        return sum(actor.replicas * actor.num_cpus for actor in self.actors)

    @property
    def memory_bytes(self) -> int:
        return sum(actor.replicas * actor.memory_bytes for actor in self.actors)

    @property
    def seconds(self) -> float:
        return sum(stage.seconds for stage in self.stages)

    def to_json(self) -> dict[str, Any]:
        """Plain data: the fields, and the totals."""
        totals = {"num_cpus": self.num_cpus, "memory_bytes": self.memory_bytes, "seconds": self.seconds}
        return {**asdict(self), "totals": totals}


def plan(topology: Topology, *, machine: Machine | None = None) -> Plan:
    """The plan of a topology; `machine` is measured if not given.

    Errors: `UserError`, one line, if the local launcher cannot place the actors on this machine.
    """
    machine = machine or costs.measure_machine()
    config = topology.model.config()
    result = Plan(
        name=topology.name,
        launcher=topology.launcher,
        num_params=config.num_params,
        machine_cpus=machine_cpus(),
        machine_bytes=machine_bytes(),
        matmul_flops_per_s=machine.flops_per_s,
        actors=_actors(topology, config),
        stages=tuple(_stage(stage, topology, config, machine) for stage in topology.stages),
    )
    check_resources(result)
    return result


def check_resources(result: Plan) -> None:
    """Errors: `UserError` naming what is short and which roles ask for it, under the launchers of one machine."""
    if result.launcher == "cluster":
        return
    short = []
    if result.launcher == "local" and result.num_cpus > result.machine_cpus + 1e-9:
        asked = ", ".join(f"{a.role} {a.replicas} x {a.num_cpus:g}" for a in result.actors if a.num_cpus)
        short.append(f"{result.num_cpus:g} CPUs are asked for ({asked}) and this machine has {result.machine_cpus}")
    if result.memory_bytes > result.machine_bytes:
        largest = max(result.actors, key=lambda a: a.replicas * a.memory_bytes)
        need, have = result.memory_bytes / 2**30, result.machine_bytes / 2**30
        short.append(f"about {need:.1f} GiB of memory are needed, most by {largest.role}, and this machine has {have:.1f}")
    if short:
        raise UserError(
            f"the topology '{result.name}' does not fit: {'; '.join(short)}; lower replicas, num_cpus or the model, "
            "or use launcher: cluster"
        )


def machine_cpus() -> int:
    """CPUs this process may use: its affinity, cut by a container's quota."""
    cpus = len(os.sched_getaffinity(0))
    quota_file = Path("/sys/fs/cgroup/cpu.max")
    if quota_file.exists():
        quota, period = quota_file.read_text().split()
        if quota != "max":
            cpus = min(cpus, max(1, int(quota) // int(period)))
    return cpus


def machine_bytes() -> int:
    """Memory of this machine, cut by a container's limit."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit_file = Path("/sys/fs/cgroup/memory.max")
    limit = limit_file.read_text().strip() if limit_file.exists() else "max"
    return total if limit == "max" else min(total, int(limit))


def _actors(topology: Topology, config: ModelConfig) -> tuple[ActorPlan, ...]:
    actors = topology.actors
    weights = costs.params_bytes(config)
    length = PROMPT_TOKENS + max((getattr(stage, "max_tokens", 0) for stage in topology.stages), default=0)
    members = len(topology.stage("itec").members) if "itec" in topology.stage_names else 1
    answering = {
        role: 2 * weights + _engine_bytes(at, config)
        for role, at in (("sampler", actors.sampler), ("committee", actors.committee))
    }
    scoring = 2 * weights + costs.cache_bytes(config, responses=32, length=length)
    bytes_of = {
        "learner": _learner_bytes(topology, config),
        "sampler": answering["sampler"],
        "reward": scoring,
        "committee": answering["committee"] + (members - 1) * weights,
        "annotator": 0,
        "quantizer": 3 * weights,
        "server": 2 * weights + costs.cache_bytes(config, responses=1, length=config.max_positions),
    }
    used = {role: section for role, section in actors if role != "server" or "serve" in topology.stage_names}
    # Inline, every role lives in the one process that launched it.
    process = 0 if topology.launcher == "inline" else costs.PROCESS_BYTES
    listed = [
        ActorPlan(role, getattr(at, "replicas", 1), at.num_cpus, getattr(at, "num_gpus", 0.0), bytes_of[role] + process)
        for role, at in used.items()
    ]
    listed.insert(0, ActorPlan("weights", 1, WEIGHTS_CPUS, 0.0, 2 * weights + process))
    if topology.launcher != "inline" and "pretrain" in topology.stage_names and actors.learner.accelerator == "cpu":
        # Ray Train's own workers, alive beside the learner while the three phases run; on accelerators they take its place.
        at = actors.learner
        listed.append(ActorPlan("pretrain", at.processes, at.num_cpus, at.num_gpus, bytes_of["learner"] + process))
    return tuple(listed)


def _engine_bytes(role: Generating, config: ModelConfig) -> int:
    """A cache, logits, and where a small model guesses, its weights and as many pages of its own."""
    cache, draft = role.engine.kv_cache, role.engine.speculative.draft
    small = 0
    if draft is not None:
        from afm_rl.huggingface import load_config  # imports JAX, which other plans do not need

        guesser = load_config(draft)
        of_a_token = costs.cache_bytes(config, responses=1, length=1) - costs.logits_bytes(config, rows=1)
        of_a_guess = costs.cache_bytes(guesser, responses=1, length=1) - costs.logits_bytes(guesser, rows=1)
        small = costs.params_bytes(guesser) + cache * of_a_guess // of_a_token
    return cache + small + costs.logits_bytes(config, rows=role.max_batch)


def _learner_bytes(topology: Topology, config: ModelConfig) -> int:
    """Of one process: the largest batch of any stage, with the frozen reference of the online loop."""
    learner, compute = topology.actors.learner, topology.compute
    mesh = learner.mesh
    cut = costs.Cut(
        params=mesh.fsdp * mesh.tensor,
        positions=mesh.data * mesh.fsdp * mesh.seq,
        rematerialised=compute.remat != "none",
        microbatch_tokens=compute.microbatch_tokens,
        logits_per_pass=compute.logits_per_pass,
    )
    batches = [(stage.batch, stage.sequence_length) for stage in _trainings(topology)]
    need = max((costs.training_bytes(config, batch=batch, length=length, cut=cut) for batch, length in batches), default=0)
    weights = costs.params_bytes(config) // cut.params
    return learner.devices_per_process * (max(need, weights) + weights)


def _trainings(topology: Topology) -> list[Any]:
    """Every set of options with a batch and a sequence length, wherever it stands in a stage."""
    options = [part for stage in topology.stages for part in (stage, *(value for _, value in stage))]
    return [part for part in options if hasattr(part, "batch") and hasattr(part, "sequence_length")]


def _stage(stage: Any, topology: Topology, config: ModelConfig, machine: Machine) -> StagePlan:
    cost = _COSTS[stage.name](stage, topology, config, machine)
    return StagePlan(stage.name, cost.train_tokens, cost.generated_tokens, cost.seconds)


def _fit(options: Any, config: ModelConfig, machine: Machine, *, sequences: int = 1) -> Cost:
    """Training with these options; `sequences` of each example (2 for pairs)."""
    batch = options.batch * sequences
    return machine.train(config, steps=options.steps, batch=batch, length=options.sequence_length)


def _answers(stage: Any, responses: int, topology: Topology, config: ModelConfig, machine: Machine) -> Cost:
    return machine.generate(
        config,
        responses=responses,
        prompt=PROMPT_TOKENS,
        max_tokens=stage.max_tokens,
        max_batch=topology.actors.sampler.max_batch,
    )


def _tokenizer(*_: Any) -> Cost:
    return Cost(seconds=TOKENIZER_S)


def _pretrain(stage: Any, _: Topology, config: ModelConfig, machine: Machine) -> Cost:
    return sum((_fit(phase, config, machine) for _, phase in stage.phases), Cost())


def _prune(stage: Any, topology: Topology, config: ModelConfig, machine: Machine) -> Cost:
    small, length = config.replace(ffn_dim=topology.small_model.ffn_dim), stage.sequence_length
    masks = machine.train(config, steps=stage.mask_steps, batch=stage.batch, length=length)
    teacher = machine.score(config, sequences=stage.steps * stage.batch, length=length) if stage.distill else Cost()
    phases = topology.stage("pretrain").phases if "pretrain" in topology.stage_names else []
    later = sum((_fit(phase, small, machine) for name, phase in phases if name != "core"), Cost())
    return masks + teacher + _fit(stage, small, machine).times(2 if stage.scratch else 1) + later


def _sft(stage: Any, _: Topology, config: ModelConfig, machine: Machine) -> Cost:
    return _fit(stage, config, machine)


def _reward_model(stage: Any, _: Topology, config: ModelConfig, machine: Machine) -> Cost:
    return _fit(stage, config, machine, sequences=2)


def _itec(stage: Any, topology: Topology, config: ModelConfig, machine: Machine) -> Cost:
    responses = stage.prompts_per_round * stage.responses_per_prompt
    cost = _answers(stage, responses, topology, config, machine) + _fit(stage.reward, config, machine, sequences=2)
    for member in stage.members:
        if member == "mdloo":
            cost += _online(stage.mdloo, topology, config, machine)
        else:
            cost += _fit(getattr(stage, member), config, machine, sequences=2 if member in ("dpo", "ipo") else 1)
    reranked = stage.rerank_prompts * stage.responses_per_member * len(stage.members)
    return cost.times(stage.rounds) + _answers(stage, reranked, topology, config, machine)


def _online(options: Any, topology: Topology, config: ModelConfig, machine: Machine) -> Cost:
    """An iteration samples, scores (by the reward model; theta_k and reference, with beta) and takes the inner steps."""
    responses, length = options.prompts * options.responses, PROMPT_TOKENS + options.max_tokens
    sampled = _answers(options, options.iterations * responses, topology, config, machine)
    passes = (1 if options.reward.model else 0) + (2 if options.beta else 0)
    scored = machine.score(config, sequences=passes * options.iterations * responses, length=length)
    steps = options.iterations * options.inner_steps
    return sampled + scored + machine.train(config, steps=steps, batch=responses, length=length)


def _distill_committee(stage: Any, topology: Topology, config: ModelConfig, machine: Machine) -> Cost:
    members = len(topology.stage("itec").members)
    responses = stage.prompts * stage.responses_per_member * members
    scored = machine.score(config, sequences=responses, length=stage.sequence_length)
    students = _fit(stage, _small(topology, config), machine).times(2)  # the distilled model, and its twin by SFT
    return _answers(stage, responses, topology, config, machine) + scored + students


def _small(topology: Topology, config: ModelConfig) -> ModelConfig:
    """The small model where the topology prunes one."""
    return config.replace(ffn_dim=topology.small_model.ffn_dim) if "prune" in topology.stage_names else config


def _quantize(stage: Any, topology: Topology, config: ModelConfig, machine: Machine) -> Cost:
    workers = min(topology.actors.quantizer.replicas, machine_cpus())
    tables = 2 * matrix_params(config) * PALETTIZE_S_PER_WEIGHT / workers
    length = topology.stage("sft").sequence_length
    gradients = machine.train(config, steps=stage.sensitivity_batches, batch=SENSITIVITY_BATCH, length=length)
    return Cost(gradients.train_tokens, seconds=tables + gradients.seconds)


def _recover(stage: Any, topology: Topology, config: ModelConfig, machine: Machine) -> Cost:
    """One adapter for every rank at every bit width."""
    adapters = len(stage.ranks) * len(topology.stage("quantize").bits_per_weight)
    steps = stage.steps_pretrain + stage.steps_posttrain
    small = _small(topology, config)
    return machine.train(small, steps=steps, batch=stage.batch, length=stage.sequence_length).times(adapters)


def _adapters(stage: Any, topology: Topology, config: ModelConfig, machine: Machine) -> Cost:
    """From the recovery adapter, and from zero."""
    return _fit(stage, _small(topology, config), machine).times(2)


def _evaluate(stage: Any, topology: Topology, config: ModelConfig, machine: Machine) -> Cost:
    """Every policy so far, greedy and sampled."""
    earlier = topology.stages[: topology.stages.index(stage)]
    policies = sum(len(getattr(s, "members", [s])) for s in earlier if s.makes and s.name not in ("tokenizer", "prune"))
    return _answers(stage, 2 * stage.prompts, topology, config, machine).times(max(1, policies))


def _serve(stage: Any, topology: Topology, config: ModelConfig, machine: Machine) -> Cost:
    return Cost(seconds=SERVE_START_S) + _answers(stage, len(stage.questions), topology, config, machine)


_COSTS: dict[str, Callable[[Any, Topology, ModelConfig, Machine], Cost]] = {
    "tokenizer": _tokenizer,
    "pretrain": _pretrain,
    "prune": _prune,
    "sft": _sft,
    "reward_model": _reward_model,
    "rl": _online,
    "itec": _itec,
    "distill_committee": _distill_committee,
    "quantize": _quantize,
    "recover": _recover,
    "adapters": _adapters,
    "evaluate": _evaluate,
    "serve": _serve,
}
