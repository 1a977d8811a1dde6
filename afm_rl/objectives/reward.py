"""The reward model's loss (appendix E.1): soft-label ranking, with the single-sided gradings as a regularizer.

    L_ranking = -p_l log s(r_c - r_r) - (1 - p_l) log s(r_r - r_c)                       Eq. 3, s the sigmoid
    L_regu    = sum over the four gradings of CE(u(x, y_c), z_c) + CE(u(x, y_r), z_r)    Eq. 4
    L         = L_ranking + lambda L_regu                                                Eq. 5, averaged over the pairs

Shapes: B pairs, C = 3 classes of a grading.
"""

from __future__ import annotations

from collections.abc import Mapping

import jax
import jax.numpy as jnp

from afm_rl.objectives.sequence import require_shape

#: Target probability that the chosen response wins, by preference level in the order of `types.LEVELS` (E.1).
P_LEVEL = (0.65, 0.75, 0.85, 0.95)

#: One value (logits or labels) for the chosen and one for the rejected response of every pair.
Sides = tuple[jax.Array, jax.Array]


def soft_label_loss(
    *, chosen_B: jax.Array, rejected_B: jax.Array, level_B: jax.Array, p_level: tuple[float, ...] = P_LEVEL
) -> jax.Array:
    """Eq. 3, mean over the pairs. Rewards of the two responses; `level_B` indexes `p_level` (NaN beyond its end)."""
    require_shape("rejected_B", rejected_B, jnp.shape(chosen_B))
    require_shape("level_B", level_B, jnp.shape(chosen_B))
    margin_B = chosen_B - rejected_B
    p_B = jnp.asarray(p_level, margin_B.dtype).at[level_B].get(mode="fill", fill_value=jnp.nan)
    return -(p_B * jax.nn.log_sigmoid(margin_B) + (1.0 - p_B) * jax.nn.log_sigmoid(-margin_B)).mean()


def grading_loss(*, grade_logits: Mapping[str, Sides], grades: Mapping[str, Sides]) -> jax.Array:
    """Eq. 4, mean over the pairs: summed over gradings and over both responses of a pair.

    Args:
      grade_logits: grading -> (chosen, rejected) logits, each [B, C].
      grades: grading -> (chosen, rejected) classes, each [B] of 0..C-1; -1, "not graded", contributes nothing.
    Raises ValueError when the two do not name the same gradings.
    """
    if set(grade_logits) != set(grades):
        raise ValueError(f"gradings differ: logits for {sorted(grade_logits)}, labels for {sorted(grades)}")
    sides = [pair for name in grades for pair in zip(grade_logits[name], grades[name], strict=True)]
    return sum((_cross_entropy(logits_BC, class_B) for logits_BC, class_B in sides), start=jnp.zeros(()))


def reward_loss(
    *,
    chosen_B: jax.Array,
    rejected_B: jax.Array,
    level_B: jax.Array,
    grade_logits: Mapping[str, Sides],
    grades: Mapping[str, Sides],
    lam: float,
    p_level: tuple[float, ...] = P_LEVEL,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Eq. 5 with lambda = `lam`. Arguments as in the two parts.

    Returns: the scalar loss, and metrics: ranking_loss, grading_loss, accuracy (chosen ranked above rejected), margin
      (r_c - r_r), grading_accuracy (over what was graded).
    """
    ranking = soft_label_loss(chosen_B=chosen_B, rejected_B=rejected_B, level_B=level_B, p_level=p_level)
    grading = grading_loss(grade_logits=grade_logits, grades=grades)
    margin_B = chosen_B - rejected_B
    return ranking + lam * grading, {
        "ranking_loss": ranking,
        "grading_loss": grading,
        "accuracy": (margin_B > 0).mean(),
        "margin": margin_B.mean(),
        "grading_accuracy": _grading_accuracy(grade_logits, grades),
    }


def _cross_entropy(logits_BC: jax.Array, class_B: jax.Array) -> jax.Array:
    require_shape("class_B", class_B, logits_BC.shape[:1])
    # one_hot of -1 is a zero row: an ungraded response adds nothing.
    target_BC = jax.nn.one_hot(class_B, logits_BC.shape[1], dtype=logits_BC.dtype)
    return -(target_BC * jax.nn.log_softmax(logits_BC)).sum(axis=-1).mean()


def _grading_accuracy(grade_logits: Mapping[str, Sides], grades: Mapping[str, Sides]) -> jax.Array:
    sides = [pair for name in grades for pair in zip(grade_logits[name], grades[name], strict=True)]
    right = sum(((logits_BC.argmax(axis=-1) == class_B).sum() for logits_BC, class_B in sides), start=jnp.int32(0))
    graded = sum(((jnp.asarray(class_B) >= 0).sum() for _, class_B in sides), start=jnp.int32(0))
    return right / jnp.maximum(graded, 1)
