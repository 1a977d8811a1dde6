"""What a learner is told, as plain data: how it computes, what a training job is, the constants of an MDLOO iteration."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

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
class MdlooSettings:
    """The constants of one MDLOO iteration (4.3.3, E.2); `microbatch` is how many responses share a forward pass."""

    beta: float
    inner_steps: int
    temperature: float
    microbatch: int
