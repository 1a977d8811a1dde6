"""What a learner is told, as plain data: how it computes, what a training job is, the constants of an online iteration."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from afm_rl.algorithms import ALGORITHMS, check_choice
from afm_rl.compute import DEFAULT_COMPUTE, Compute
from afm_rl.config import ModelConfig
from afm_rl.recipe import OptimizerSpec
from afm_rl.sharding import ONE_DEVICE, MeshShape


@dataclass(frozen=True)
class LearnerSetup:
    """How every job of a learner is computed: arithmetic, mesh, and how much of a batch passes through the model at once.

    Of a job's checkpoints the `keep` newest stay, and every one whose number `keep_every` divides.

    A batch of more than `microbatch_tokens` positions is cut into microbatches whose gradients are summed; None: never.
    """

    compute: Compute = DEFAULT_COMPUTE
    mesh: MeshShape = ONE_DEVICE
    microbatch_tokens: int | None = None
    keep: int = 2
    keep_every: int | None = None


@dataclass(frozen=True)
class AdapterSpec:
    """Train LoRA adapters of this rank over the frozen base, from `init` (an adapter folder) or from zero."""

    rank: int
    alpha: float
    init: str | None = None


@dataclass(frozen=True)
class TrainingJob:
    """One training task. Folders are policy folders (Hugging Face layout), reward models or packages.

    `init` None starts from random weights of `config`; `frozen` maps a role (reference, teacher, base) to a folder.
    `part` picks what is trained: "policy", "reward" (the trunk with fresh heads unless `init` is a reward model), "adapter"
    (LoRA over `init`, which may be a package), or "masks" (3.2.1: exports the model pruned to `keep_units`). `config` beside
    `init` may change the RoPE base only.
    """

    task: str
    objective: str
    optimizer: OptimizerSpec
    checkpoint_folder: str
    config: ModelConfig | None = None
    init: str | None = None
    frozen: Mapping[str, str] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)
    part: str = "policy"
    adapter: AdapterSpec | None = None
    keep_units: int | None = None
    checkpoint_every: int = 100
    seed: int = 0


@dataclass(frozen=True)
class HeldOut:
    """Mean negative log-likelihood (nats) and top-1 accuracy (0..1) per target token of documents not trained on."""

    loss: float
    accuracy: float


@dataclass(frozen=True)
class OnlineSettings:
    """How one iteration of online learning updates the policy: an algorithm of `afm_rl/algorithms.py` and its constants.

    `beta` weighs the distance to the reference (per nat), wherever the algorithm has it; `gamma` (mdloo) is reward per nat
    of sequence KL to theta_k, in the form that `kl` names; `clip` bounds the ratio of ppo, rloo and grpo. `baseline` is
    subtracted from the rewards ("own": the algorithm's), a running average by `baseline_decay` an iteration. Inner steps
    end early once the measured KL to theta_k exceeds `max_kl` nats a sequence (None: never). Responses of older weights
    count by min(pi_k / pi_mu, `staleness_cap`). `microbatch` responses share a forward pass.
    """

    inner_steps: int
    temperature: float
    microbatch: int
    algorithm: str = "mdloo"
    kl: str = "sampled"
    beta: float = 0.0
    gamma: float = 1.0
    clip: float = 0.2
    baseline: str = "own"
    baseline_decay: float = 0.9
    max_kl: float | None = None
    staleness_cap: float = 2.0

    def __post_init__(self) -> None:
        check_choice(self.algorithm, kl=self.kl, baseline=self.baseline, beta=self.beta)
        if self.inner_steps < 1 or self.microbatch < 1:
            raise ValueError(f"at least one inner step and microbatch row, got {self.inner_steps} and {self.microbatch}")

    @classmethod
    def of(cls, options: Any) -> OnlineSettings:
        """The settings in a stage's options, which have the same names among others."""
        return cls(**{field.name: getattr(options, field.name) for field in fields(cls)})

    @property
    def baseline_name(self) -> str:
        """The baseline by name, also where it is the algorithm's own."""
        return ALGORITHMS[self.algorithm].baselines[0] if self.baseline == "own" else self.baseline
