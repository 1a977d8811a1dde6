"""Learning-rate schedules and the pre-training recipe table of sections 3.2.1-3.2.3.

A schedule has peak 1.0 and is a function of t, the number of the update: the first update is t = 1, and t = 0 is where
the linear warm-up starts from. The optimizers in `afm_rl/optimizer.py` multiply it by the peak learning rate, at
t = finished updates + 1, so that no update is spent on a factor of zero. The decay ends at `total_steps` and holds.

Sources of the table's values: "paper" = the section named, "axlearn" = Apple's public 3B configuration.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import jax
import jax.numpy as jnp

#: Update number (1 for the first) -> factor of the peak learning rate, in 0..1.
Schedule = Callable[[jax.typing.ArrayLike], jax.Array]

#: Tokens of one batch of the on-device model (axlearn); the server's is 4096 sequences of 4096 (paper 3.2.1).
ON_DEVICE_BATCH_TOKENS = 8 * 2**20


def warmup_cosine(warmup_steps: int, total_steps: int, *, end_fraction: float) -> Schedule:
    """Linear from 0 to 1 over `warmup_steps`, then half a cosine down to `end_fraction` at `total_steps` (3.2.1).

    Raises ValueError unless 0 <= warmup_steps < total_steps and 0 <= end_fraction <= 1.
    """
    if not 0 <= warmup_steps < total_steps:
        raise ValueError(
            f"warmup_cosine: warmup_steps ({warmup_steps}) must be at least 0 and below total_steps ({total_steps}); "
            "lower warmup_steps or train for longer"
        )
    if not 0.0 <= end_fraction <= 1.0:
        raise ValueError(f"warmup_cosine: end_fraction must be between 0 and 1 (a fraction of the peak), got {end_fraction}")

    def schedule(t: jax.typing.ArrayLike) -> jax.Array:
        t = jnp.asarray(t)
        progress = jnp.clip((t - warmup_steps) / (total_steps - warmup_steps), 0.0, 1.0)
        decayed = end_fraction + (1.0 - end_fraction) * 0.5 * (1.0 + jnp.cos(jnp.pi * progress))
        return jnp.where(t < warmup_steps, t / max(warmup_steps, 1), decayed)

    return schedule


def constant(warmup_steps: int = 0) -> Schedule:
    """Linear from 0 to 1 over `warmup_steps`, then 1 (SFT's constant learning rate, 4.2)."""
    if warmup_steps < 0:
        raise ValueError(f"constant: warmup_steps must be at least 0, got {warmup_steps}")

    def schedule(t: jax.typing.ArrayLike) -> jax.Array:
        t = jnp.asarray(t)
        return jnp.where(t < warmup_steps, t / max(warmup_steps, 1), 1.0)

    return schedule


def rescaled_rope_base(base: float = 500_000.0, *, trained_length: int = 8192, target_length: int = 32_768) -> float:
    """The RoPE base for a longer context (3.2.3, the scaling law of Liu et al., 2024), rounded to a whole number.

        base ** (ln(target_length / 2 pi) / ln(trained_length / 2 pi))

    The defaults give the paper's 6315089. Lengths in tokens. Raises ValueError where the law says nothing: a trained
    length of 6 tokens or fewer (no full turn of the fastest frequency), or a target shorter than what was trained.
    """
    if trained_length <= 2.0 * math.pi or target_length < trained_length:
        raise ValueError(
            f"rescaled_rope_base: needs 7 <= trained_length <= target_length, got trained_length={trained_length}, "
            f"target_length={target_length}"
        )
    exponent = math.log(target_length / (2.0 * math.pi)) / math.log(trained_length / (2.0 * math.pi))
    return float(round(base**exponent))


@dataclass(frozen=True)
class StageRecipe:
    """One pre-training stage. `sources` maps every field to where its value comes from."""

    sequence_length: int
    tokens: float
    batch_sequences: int
    peak_lr: float
    warmup_steps: int
    end_fraction: float
    weight_decay: float
    rope_base: float
    distill_on_device: bool
    z_loss: float
    sources: Mapping[str, str] = field(repr=False)

    @property
    def total_steps(self) -> int:
        """Updates that consume `tokens` at this batch and sequence length."""
        return int(self.tokens // (self.batch_sequences * self.sequence_length))

    def schedule(self, total_steps: int | None = None) -> Schedule:
        """The stage's schedule over `total_steps` updates (default: the paper's token budget)."""
        steps = self.total_steps if total_steps is None else total_steps
        return warmup_cosine(self.warmup_steps, steps, end_fraction=self.end_fraction)


_SHARED_SOURCES = {"z_loss": "axlearn"}
_CONTINUED_SOURCES = {
    **_SHARED_SOURCES,
    "sequence_length": "paper 3.2.2",
    "tokens": "paper 3.2.2",
    "batch_sequences": "paper 3.2.2 (carried over from core)",
    "peak_lr": "paper 3.2.2",
    "warmup_steps": "paper 3.2.2",
    "end_fraction": "paper 3.2.2",
    "weight_decay": "paper 3.2.2",
    "rope_base": "paper 2 (Table 1)",
    "distill_on_device": "paper 3.2.2",
}

#: The three stages of section 3.2, in order. Batches are the server's; see ON_DEVICE_BATCH_TOKENS.
PRETRAINING: Mapping[str, StageRecipe] = {
    "core": StageRecipe(
        sequence_length=4096,
        tokens=6.3e12,
        batch_sequences=4096,
        peak_lr=0.01,
        warmup_steps=5000,
        end_fraction=0.005,
        weight_decay=3.16e-4,
        rope_base=500_000.0,
        distill_on_device=True,
        z_loss=1e-6,
        sources={
            **_SHARED_SOURCES,
            "sequence_length": "paper 3.2.1",
            "tokens": "paper 3.2.1",
            "batch_sequences": "paper 3.2.1",
            "peak_lr": "paper 3.2.1",
            "warmup_steps": "paper 3.2.1",
            "end_fraction": "paper 3.2.1",
            "weight_decay": "paper 3.2.1",
            "rope_base": "paper 2 (Table 1)",
            "distill_on_device": "paper 3.2.1",
        },
    ),
    "continued": StageRecipe(
        sequence_length=8192,
        tokens=1e12,
        batch_sequences=4096,
        peak_lr=3e-4,
        warmup_steps=1000,
        end_fraction=0.001,
        weight_decay=1e-5,
        rope_base=500_000.0,
        distill_on_device=False,
        z_loss=1e-6,
        sources=_CONTINUED_SOURCES,
    ),
    "context_lengthening": StageRecipe(
        sequence_length=32_768,
        tokens=1e11,
        batch_sequences=4096,
        peak_lr=3e-4,
        warmup_steps=1000,
        end_fraction=0.001,
        weight_decay=1e-5,
        rope_base=rescaled_rope_base(),
        distill_on_device=False,
        z_loss=1e-6,
        # 3.2.3: "similar to that used for continued pre-training"; what it does not restate is carried over.
        sources={
            **{name: f"{source} (3.2.3: recipe similar to continued)" for name, source in _CONTINUED_SOURCES.items()},
            "sequence_length": "paper 3.2.3",
            "tokens": "paper 3.2.3",
            "rope_base": "paper 3.2.3",
            "z_loss": "axlearn",
        },
    ),
}
