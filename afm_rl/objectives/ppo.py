"""PPO's clipped objective (Schulman et al., 2017, Eq. 7) on responses, for comparison with MDLOO (4.3.3).

    L = -(1 / tokens) sum_i sum_t min(r_it A_i, clip(r_it, 1 - eps, 1 + eps) A_i),    r_it = (pi_theta / pi_k)(y_it)

There is no critic: every token of a response has the response's advantage, against the other responses to its prompt. The
ratio is per token and the mean is over all tokens of the batch, as PPO is commonly run on language models; the distance to
the reference is priced inside the reward. Shapes: B sequences, T time.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from afm_rl.objectives.mdloo import weighted
from afm_rl.objectives.sequence import masked_sum, require_shape


def bounded_ratio(d: jax.Array, *, d_max: float = 20.0) -> jax.Array:
    """exp(d), with the exponent cut at `d_max` and the gradient of exp(d) all the same: finite, and not zero far away."""
    stop = jax.lax.stop_gradient
    return stop(jnp.exp(jnp.minimum(d, d_max))) * (1.0 + d - stop(d))


def clipped(ratio: jax.Array, advantage: jax.Array, clip: float) -> jax.Array:
    """min(r A, clip(r, 1 - clip, 1 + clip) A), elementwise: no gain from a ratio further away than the bound."""
    return jnp.minimum(ratio * advantage, jnp.clip(ratio, 1.0 - clip, 1.0 + clip) * advantage)


def is_clipped(ratio: jax.Array, advantage: jax.Array, clip: float) -> jax.Array:
    """Where the bound has taken the gradient away, bool."""
    return ((ratio > 1.0 + clip) & (advantage > 0)) | ((ratio < 1.0 - clip) & (advantage < 0))


def ppo_loss(
    *,
    logp_BT: jax.Array,
    behavior_logp_BT: jax.Array,
    advantage_B: jax.Array,
    mask_BT: jax.Array,
    clip: float,
    num_tokens: int | jax.Array,
    weight_B: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """The loss, and of every sequence the share of its tokens whose gradient the bound has taken [B].

    Args: as of `mdloo_loss`; `num_tokens`: targets of the whole batch, over microbatches and devices.
    """
    require_shape("behavior_logp_BT", behavior_logp_BT, logp_BT.shape)
    require_shape("advantage_B", advantage_B, logp_BT.shape[:1])
    target_BT = jnp.asarray(mask_BT) > 0
    ratio_BT = bounded_ratio(jnp.where(target_BT, logp_BT - behavior_logp_BT, 0))
    advantage_B1 = jnp.asarray(advantage_B, logp_BT.dtype)[:, None]
    gain_B = weighted(masked_sum(clipped(ratio_BT, advantage_B1, clip), mask_BT), weight_B)
    tokens_B = jnp.maximum(target_BT.sum(-1), 1)
    share_B = masked_sum(is_clipped(ratio_BT, advantage_B1, clip) * 1.0, mask_BT) / tokens_B
    return -gain_B.sum() / jnp.maximum(num_tokens, 1), share_B
