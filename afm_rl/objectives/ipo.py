"""Identity preference optimization (Azar et al., 2023, Eq. 17), a member of the committee (4.3.2).

    L = (h - 1 / (2 beta))^2,    h as in `dpo.py`

As in the IPO paper, the log-probabilities are SUMS over the response's tokens; TRL divides each by the length of its
response first, so that its numbers differ from these. Shapes: B pairs.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from afm_rl.objectives.dpo import log_ratio_margin


def ipo_loss(
    *,
    policy_chosen_B: jax.Array,
    policy_rejected_B: jax.Array,
    ref_chosen_B: jax.Array,
    ref_rejected_B: jax.Array,
    beta: float,
) -> jax.Array:
    """Mean over the pairs of (h - 1/(2 beta))^2, a scalar; sequence log-probabilities in nats, beta > 0."""
    if isinstance(beta, int | float) and not beta > 0:
        raise ValueError(f"ipo: beta must be positive (the target margin is 1/(2 beta) nats), got {beta}")
    margin_B = log_ratio_margin(
        policy_chosen_B=policy_chosen_B,
        policy_rejected_B=policy_rejected_B,
        ref_chosen_B=ref_chosen_B,
        ref_rejected_B=ref_rejected_B,
    )
    return jnp.square(margin_B - 1.0 / (2.0 * beta)).mean()
