"""Online DPO (Guo et al., 2024): the best against the worst response of a group, by reward, under DPO's loss.

    L = -(1/pairs) sum log sigmoid(beta h),    h = log[pi(y_best)/pi_ref(y_best)] - log[pi(y_worst)/pi_ref(y_worst)]

Guo et al. let a judge choose between two responses; here the reward does, between the extremes of G. A group whose rewards
are all equal expresses no preference and is left out. Shapes: P prompts, G responses per prompt, B rows, chosen ones first.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from afm_rl.objectives.dpo import log_ratio_margin
from afm_rl.objectives.mdloo import usable_responses
from afm_rl.objectives.sequence import masked_sum


def best_and_worst(reward_PG: np.ndarray, valid_PG: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Columns of the best and the worst valid response of every group [P, 2], and whether the two differ [P].

    Among equals the first one is taken.
    """
    usable_PG = usable_responses(reward_PG, valid_PG)
    best_P = np.where(usable_PG, reward_PG, -np.inf).argmax(axis=1)
    worst_P = np.where(usable_PG, reward_PG, np.inf).argmin(axis=1)
    rows_P = np.arange(len(reward_PG))
    differ_P = usable_PG.any(axis=1) & (reward_PG[rows_P, best_P] != reward_PG[rows_P, worst_P])
    other_P = np.where(best_P == 0, 1, 0)  # of a group without a preference: any other one, so that no row is its own pair
    return np.stack([best_P, np.where(differ_P, worst_P, other_P)], axis=1), differ_P


def online_dpo_loss(
    *, logp_BT: jax.Array, ref_logp_BT: jax.Array, mask_BT: jax.Array, beta: float, num_sequences: int | jax.Array
) -> tuple[jax.Array, jax.Array]:
    """The loss, and h of each pair in nats, for both of its rows [B]. Rows without a mask are absent, in pairs.

    `num_sequences` counts the rows of the whole batch: twice the pairs.
    """
    logp_B, ref_B = masked_sum(logp_BT, mask_BT), masked_sum(ref_logp_BT, mask_BT)
    pairs = len(logp_B) // 2
    margin_B = log_ratio_margin(
        policy_chosen_B=logp_B[:pairs],
        policy_rejected_B=logp_B[pairs:],
        ref_chosen_B=ref_B[:pairs],
        ref_rejected_B=ref_B[pairs:],
    )
    present_B = (jnp.asarray(mask_BT) > 0).any(-1)[:pairs]
    losses_B = jnp.where(present_B, -jax.nn.log_sigmoid(beta * margin_B), 0)
    return losses_B.sum() / jnp.maximum(num_sequences / 2, 1), jnp.concatenate([margin_B, margin_B])
