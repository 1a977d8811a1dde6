"""GRPO (DeepSeekMath, Shao et al., 2024, Eq. 3 and 4), for comparison with MDLOO (4.3.3).

    L = -(1/N) sum_i 1/|y_i| sum_t { min(r_it A_i, clip(r_it, 1 - eps, 1 + eps) A_i) - beta k3_it }
    A_i = (R_i - mean R) / (std R + 1e-4),    k3 = pi_ref/pi_theta - log(pi_ref/pi_theta) - 1

As published: the mean over a response's tokens, then over responses; the distance to the reference in the loss, not in
the reward. The standard deviation is that of a sample (over G - 1) and 1e-4 is added to it, as in TRL.
Shapes: B sequences, T time, P prompts, G responses per prompt.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from afm_rl.objectives.mdloo import usable_responses, weighted
from afm_rl.objectives.ppo import bounded_ratio, clipped, is_clipped
from afm_rl.objectives.sequence import masked_sum, require_shape


def group_standardized(reward_PG: np.ndarray, valid_PG: np.ndarray | None = None) -> np.ndarray:
    """Rewards less their group's mean, over its standard deviation + 1e-4; zero where `usable_responses` is False."""
    usable_PG = usable_responses(reward_PG, valid_PG)
    num_P1 = np.maximum(usable_PG.sum(axis=1, keepdims=True), 2)
    known_PG = np.where(usable_PG, reward_PG, 0)
    centered_PG = np.where(usable_PG, known_PG - known_PG.sum(axis=1, keepdims=True) / num_P1, 0)
    std_P1 = np.sqrt(np.square(centered_PG).sum(axis=1, keepdims=True) / (num_P1 - 1))
    return centered_PG / (std_P1 + 1e-4)


def grpo_loss(
    *,
    logp_BT: jax.Array,
    behavior_logp_BT: jax.Array,
    advantage_B: jax.Array,
    mask_BT: jax.Array,
    clip: float,
    num_sequences: int | jax.Array,
    beta: float = 0.0,
    ref_logp_BT: jax.Array | None = None,
    weight_B: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """The loss, and of every sequence the share of its tokens whose gradient the bound has taken [B].

    Args: as of `mdloo_loss`; `ref_logp_BT` (log pi_ref of the same tokens) is needed where `beta` is not 0.
    """
    require_shape("behavior_logp_BT", behavior_logp_BT, logp_BT.shape)
    require_shape("advantage_B", advantage_B, logp_BT.shape[:1])
    target_BT = jnp.asarray(mask_BT) > 0
    ratio_BT = bounded_ratio(jnp.where(target_BT, logp_BT - behavior_logp_BT, 0))
    advantage_B1 = jnp.asarray(advantage_B, logp_BT.dtype)[:, None]
    gain_BT = clipped(ratio_BT, advantage_B1, clip)
    if beta:
        if ref_logp_BT is None:
            raise ValueError(f"grpo: beta {beta} prices the distance to a reference, whose log-probabilities are missing")
        to_ref_BT = jnp.where(target_BT, ref_logp_BT - logp_BT, 0)
        gain_BT = gain_BT - beta * (bounded_ratio(to_ref_BT) - to_ref_BT - 1.0)
    tokens_B = jnp.maximum(target_BT.sum(-1), 1)
    gain_B = weighted(masked_sum(gain_BT, mask_BT) / tokens_B, weight_B)
    share_B = masked_sum(is_clipped(ratio_BT, advantage_B1, clip) * 1.0, mask_BT) / tokens_B
    return -gain_B.sum() / jnp.maximum(num_sequences, 1), share_B
