"""Next-token cross-entropy: pre-training (3.2), SFT (4.2), rejection-sampling fine-tuning and adapters all minimise it.

The mean is over target tokens, not over sequences. The z-loss (1e-6 in pre-training; axlearn) keeps the log-normalizer
of the logits near zero. Shapes: B batch, T time.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from afm_rl.objectives.sequence import TargetScores, token_mean


def cross_entropy(
    scores: TargetScores, mask_BT: jax.Array, *, z_loss: float = 0.0
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """-mean log p(token t) + z_loss * mean (log Z)^2 over the targets, in nats per token.

    Args:
      scores: of the tokens, [B, T] each.
      mask_BT: 1 where token t is a target.
      z_loss: weight of the squared log-normalizer.
    Returns: the scalar loss, and metrics: nll (without z-loss), accuracy (top-1), log_z (mean normalizer), tokens.
    """
    nll = -token_mean(scores.logp_BT, mask_BT)
    loss = nll + z_loss * token_mean(jnp.square(scores.log_normalizer_BT), mask_BT)
    return loss, {
        "nll": nll,
        "accuracy": token_mean(scores.is_top1_BT.astype(nll.dtype), mask_BT),
        "log_z": token_mean(scores.log_normalizer_BT, mask_BT),
        "tokens": (jnp.asarray(mask_BT) > 0).sum(),
    }
