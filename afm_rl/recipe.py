"""How a job is optimised, as plain data: what a topology writes, a learner receives, and a checkpoint is compared with.

`OptimizerSpec` names the optimizer and its schedule; `build` makes the optax chain of `afm_rl/optimizer.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import optax

from afm_rl.optimizer import adamw, afm_optimizer
from afm_rl.schedules import Schedule, constant, warmup_cosine


@dataclass(frozen=True)
class OptimizerSpec:
    """`total_steps` None: constant after the warm-up (SFT, 4.2), else a cosine down to `end_fraction` of the peak."""

    kind: Literal["afm", "adamw"]
    peak_lr: float
    warmup_steps: int = 0
    total_steps: int | None = None
    end_fraction: float = 0.0
    weight_decay: float = 0.0
    clip_norm: float = 1.0

    @property
    def schedule(self) -> Schedule:
        if self.total_steps is None:
            return constant(self.warmup_steps)
        return warmup_cosine(min(self.warmup_steps, self.total_steps - 1), self.total_steps, end_fraction=self.end_fraction)

    def build(self, *, width: int) -> optax.GradientTransformation:
        """The chain. muParam (simple) scales the pre-training optimizer only: `width` is the model's dimension."""
        if self.kind == "afm":
            return afm_optimizer(
                peak_lr=self.peak_lr,
                schedule=self.schedule,
                weight_decay=self.weight_decay,
                width=width,
                clip_norm=self.clip_norm,
            )
        return adamw(peak_lr=self.peak_lr, schedule=self.schedule, weight_decay=self.weight_decay, clip_norm=self.clip_norm)
