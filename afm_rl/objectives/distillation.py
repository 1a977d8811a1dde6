"""Top-1 distillation (3.2.1): the target is 0.1 x the true label + 0.9 x the teacher's most likely token.

The teacher sends one token id per position, not a distribution. Its choices are aligned with the tokens like everything
else here (`token_scores.top1_tokens`): entry t is what the teacher would have written in place of token t.

Shapes: B batch, T time.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from afm_rl.objectives.sequence import TargetScores, token_mean


def top1_distillation(
    true: TargetScores,
    taught: TargetScores,
    *,
    agreement_BT: jax.Array,
    mask_BT: jax.Array,
    true_weight: float = 0.1,
    z_loss: float = 0.0,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """-mean [w log p(true token) + (1 - w) log p(teacher's token)] + z_loss * mean (log Z)^2, over the target tokens.

    Args:
      true, taught: the student's scores of the true tokens and of the teacher's, [B, T] each.
      agreement_BT: whether the teacher's token is the true one.
      mask_BT: 1 where token t is a target.
      true_weight: w, the weight of the true label.
    Returns: the scalar loss (nats per token), and metrics: nll (true labels), teacher_nll, accuracy (student's top-1
      against the true token), teacher_agreement (the teacher's), log_z, tokens.
    """
    if not 0.0 <= true_weight <= 1.0:
        raise ValueError(f"true_weight is a share between 0 and 1, got {true_weight}")
    nll, teacher_nll = -token_mean(true.logp_BT, mask_BT), -token_mean(taught.logp_BT, mask_BT)
    loss = true_weight * nll + (1.0 - true_weight) * teacher_nll
    loss = loss + z_loss * token_mean(jnp.square(true.log_normalizer_BT), mask_BT)
    return loss, {
        "nll": nll,
        "teacher_nll": teacher_nll,
        "accuracy": token_mean(true.is_top1_BT.astype(nll.dtype), mask_BT),
        "teacher_agreement": token_mean(jnp.asarray(agreement_BT).astype(nll.dtype), mask_BT),
        "log_z": token_mean(true.log_normalizer_BT, mask_BT),
        "tokens": (jnp.asarray(mask_BT) > 0).sum(),
    }
