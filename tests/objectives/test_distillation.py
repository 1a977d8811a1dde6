"""Top-1 distillation against cross-entropy with an explicit soft target distribution in float64."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from afm_rl.objectives import distillation
from afm_rl.objectives.distillation import teacher_top1
from afm_rl.objectives.supervised import cross_entropy

top1_distillation = jax.jit(distillation.top1_distillation, static_argnames=("true_weight", "z_loss"))


def make_case() -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    mask = np.array([[0, 1, 1, 1, 0], [0, 0, 1, 1, 1.0]])
    return rng.normal(size=(2, 5, 6)), rng.normal(size=(2, 5, 6)), rng.integers(0, 6, (2, 5)), mask


def test_loss_is_cross_entropy_with_the_mixed_target() -> None:
    """Guards the weights 0.1 true / 0.9 teacher and the alignment of both labels with the student's prediction."""
    student, teacher, tokens, mask = make_case()
    with jax.enable_x64(True):
        top1 = teacher_top1(jnp.asarray(teacher))
        loss, metrics = top1_distillation(jnp.asarray(student), tokens, top1, mask)
        parts = float(metrics["nll"]) * 0.1 + float(metrics["teacher_nll"]) * 0.9
    logp = student - np.log(np.exp(student).sum(-1, keepdims=True))
    total = 0.0
    for b, t in zip(*np.nonzero(mask), strict=True):
        target = 0.1 * np.eye(6)[tokens[b, t]] + 0.9 * np.eye(6)[teacher[b, t - 1].argmax()]
        total -= target @ logp[b, t - 1]
    np.testing.assert_allclose([loss, parts], total / mask.sum(), rtol=1e-12)


def test_the_teachers_tokens_are_aligned_and_carry_no_gradient() -> None:
    """Guards the shift: entry t replaces token t, and entry 0 is nobody's prediction."""
    _, teacher, _, _ = make_case()
    top1 = np.asarray(teacher_top1(jnp.asarray(teacher)))
    np.testing.assert_array_equal(top1[:, 1:], teacher.argmax(-1)[:, :-1])
    assert top1.dtype == np.int32
    assert (top1[:, 0] == 0).all()


def test_a_true_weight_of_one_is_plain_cross_entropy() -> None:
    """Guards the limit, z-loss included, and refuses a weight that is no share."""
    student, teacher, tokens, mask = make_case()
    top1 = teacher_top1(jnp.asarray(teacher))
    loss, _ = top1_distillation(jnp.asarray(student), tokens, top1, mask, true_weight=1.0, z_loss=0.2)
    expected, _ = jax.jit(cross_entropy, static_argnames="z_loss")(jnp.asarray(student), tokens, mask, z_loss=0.2)
    np.testing.assert_allclose(loss, expected, rtol=1e-6)
    with pytest.raises(ValueError, match="true_weight"):
        top1_distillation(jnp.asarray(student), tokens, top1, mask, true_weight=1.1)
