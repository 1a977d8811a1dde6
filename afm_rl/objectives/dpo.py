"""Direct preference optimization (Rafailov et al., 2023), a member of the committee (4.3.2).

    L = -log s(beta h),    h = log[pi(y_c)/pi_ref(y_c)] - log[pi(y_r)/pi_ref(y_r)]

Log-probabilities are sums over the response's tokens. Shapes: B pairs.
"""

from __future__ import annotations

import jax

from afm_rl.objectives.sequence import require_shape


def log_ratio_margin(
    *, policy_chosen_B: jax.Array, policy_rejected_B: jax.Array, ref_chosen_B: jax.Array, ref_rejected_B: jax.Array
) -> jax.Array:
    """h of every pair [B]: how far, in nats, the policy moved from the reference towards the chosen response."""
    shape = policy_chosen_B.shape
    require_shape("policy_rejected_B", policy_rejected_B, shape)
    require_shape("ref_chosen_B", ref_chosen_B, shape)
    require_shape("ref_rejected_B", ref_rejected_B, shape)
    return (policy_chosen_B - ref_chosen_B) - (policy_rejected_B - ref_rejected_B)


def dpo_loss(
    *,
    policy_chosen_B: jax.Array,
    policy_rejected_B: jax.Array,
    ref_chosen_B: jax.Array,
    ref_rejected_B: jax.Array,
    beta: float,
) -> jax.Array:
    """Mean over the pairs of -log sigmoid(beta h), a scalar; sequence log-probabilities in nats, beta > 0."""
    if isinstance(beta, int | float) and not beta > 0:
        raise ValueError(f"dpo: beta must be positive (it prices the distance to the reference), got {beta}")
    margin_B = log_ratio_margin(
        policy_chosen_B=policy_chosen_B,
        policy_rejected_B=policy_rejected_B,
        ref_chosen_B=ref_chosen_B,
        ref_rejected_B=ref_rejected_B,
    )
    return -jax.nn.log_sigmoid(beta * margin_B).mean()
