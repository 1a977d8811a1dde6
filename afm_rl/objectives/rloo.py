"""RLOO (Ahmadian et al., 2024) as TRL's RLOOTrainer has it, for comparison with MDLOO (4.3.3).

    L = -(1/N) sum_i min(r_i A_i, clip(r_i, 1 - eps, 1 + eps) A_i),    r_i = pi_theta(y_i) / pi_k(y_i)

A whole response is one action, with the same leave-one-out advantage as MDLOO's; what keeps the policy near theta_k is the
clip, which is biased away from it, not a KL. At theta_k the two gradients are equal. Shapes: B sequences, T time.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from afm_rl.objectives.mdloo import weighted
from afm_rl.objectives.ppo import bounded_ratio, clipped, is_clipped
from afm_rl.objectives.sequence import masked_sum, require_shape


def rloo_loss(
    *,
    logp_BT: jax.Array,
    behavior_logp_BT: jax.Array,
    advantage_B: jax.Array,
    mask_BT: jax.Array,
    clip: float,
    num_sequences: int | jax.Array,
    weight_B: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """The loss, and 1.0 for every sequence whose gradient the bound has taken [B]. Args: as of `mdloo_loss`."""
    require_shape("behavior_logp_BT", behavior_logp_BT, logp_BT.shape)
    require_shape("advantage_B", advantage_B, logp_BT.shape[:1])
    ratio_B = bounded_ratio(masked_sum(logp_BT - behavior_logp_BT, mask_BT))
    advantage_B = jnp.asarray(advantage_B, logp_BT.dtype)
    present_B = (jnp.asarray(mask_BT) > 0).any(-1)
    gain_B = jnp.where(present_B, clipped(ratio_B, advantage_B, clip), 0)
    return -weighted(gain_B, weight_B).sum() / jnp.maximum(num_sequences, 1), is_clipped(ratio_B, advantage_B, clip) * 1.0
