"""Top-1 distillation against cross-entropy with an explicit soft target distribution in float64."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from afm_rl.objectives.distillation import top1_distillation
from afm_rl.objectives.sequence import score_targets
from afm_rl.objectives.supervised import cross_entropy


@partial(jax.jit, static_argnames=("true_weight", "z_loss"))
def distil(
    logits: np.ndarray,
    tokens: np.ndarray,
    taught: np.ndarray,
    mask: np.ndarray,
    true_weight: float = 0.1,
    z_loss: float = 0.0,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The objective from logits."""
    true, scored = score_targets(logits, tokens), score_targets(logits, taught)
    agreement = taught == tokens
    return top1_distillation(true, scored, agreement_BT=agreement, mask_BT=mask, true_weight=true_weight, z_loss=z_loss)


def top1_of(teacher: np.ndarray) -> np.ndarray:
    """What the teacher would have written in place of each token."""
    return np.pad(teacher.argmax(-1)[:, :-1], ((0, 0), (1, 0)))


def make_case() -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    mask = np.array([[0, 1, 1, 1, 0], [0, 0, 1, 1, 1.0]])
    return rng.normal(size=(2, 5, 6)), rng.normal(size=(2, 5, 6)), rng.integers(0, 6, (2, 5)), mask


def test_loss_is_cross_entropy_with_the_mixed_target() -> None:
    """Guards the weights 0.1 true / 0.9 teacher and the alignment of both labels with the student's prediction."""
    student, teacher, tokens, mask = make_case()
    with jax.enable_x64(True):
        loss, metrics = distil(jnp.asarray(student), tokens, top1_of(teacher), mask)
        parts = float(metrics["nll"]) * 0.1 + float(metrics["teacher_nll"]) * 0.9
    logp = student - np.log(np.exp(student).sum(-1, keepdims=True))
    total = 0.0
    for b, t in zip(*np.nonzero(mask), strict=True):
        target = 0.1 * np.eye(6)[tokens[b, t]] + 0.9 * np.eye(6)[teacher[b, t - 1].argmax()]
        total -= target @ logp[b, t - 1]
    np.testing.assert_allclose([loss, parts], total / mask.sum(), rtol=1e-12)


def test_a_true_weight_of_one_is_plain_cross_entropy() -> None:
    """Guards the limit, z-loss included, and refuses a weight that is no share."""
    student, teacher, tokens, mask = make_case()
    top1 = top1_of(teacher)
    loss, _ = distil(jnp.asarray(student), tokens, top1, mask, true_weight=1.0, z_loss=0.2)
    scores = jax.jit(score_targets)(jnp.asarray(student), tokens)
    expected, _ = jax.jit(cross_entropy, static_argnames="z_loss")(scores, mask, z_loss=0.2)
    np.testing.assert_allclose(loss, expected, rtol=1e-6)
    with pytest.raises(ValueError, match="true_weight"):
        distil(jnp.asarray(student), tokens, top1, mask, true_weight=1.1)
