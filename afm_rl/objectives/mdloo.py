"""MDLOO (4.3.3, appendix E.2): mirror-descent policy optimization with the leave-one-out advantage estimator.

    R(x, y)    = r(x, y) - beta log[pi_theta_k(y|x) / pi_ref(y|x)]         frozen when the data are collected
    A(x, y_i)  = R(x, y_i) - mean of R over the other K - 1 responses      Eq. 7
    grad Psi   = E_pi_k[rho A grad log pi_theta] - gamma grad KL(pi_theta || pi_k),  rho = pi_theta / pi_k      Eq. 9

A whole response is one action: the ratio and the KL are per SEQUENCE, sums over tokens, without clipping of the
objective or length normalisation. Eq. 9 is authoritative; Eq. 8's first expectation has to be over pi_theta for Eq. 9
to be its gradient. Since E_pi_k[rho d grad log pi_theta] = grad KL with d = log rho, the surrogate

    -(1/N) sum_i stop_grad[rho_i (A_i - gamma d_i)] log pi_theta(y_i)

has exactly minus Eq. 9's gradient. So has, with less variance, the KL computed over the whole vocabulary at each position,
weighted by the ratio of the tokens before it and differentiated through both factors:

    KL(pi_theta || pi_k) = E_pi_k[sum_t prod_{s<t} (pi_theta / pi_k)(y_s) KL_t]
    KL_t                 = sum_v pi_theta(v) log[pi_theta(v) / pi_k(v)]

At theta = theta_k neither depends on gamma: take at least two inner steps.

Shapes: B sequences, T time, P prompts, G responses per prompt.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from afm_rl.objectives.sequence import masked_sum, require_shape, sequence_logp


def shaped_reward(reward: Any, logp: Any, ref_logp: Any, *, beta: float) -> Any:
    """R = r - beta (log pi(y|x) - log pi_ref(y|x)), all of one shape; the log-probabilities are sequence sums (nats).

    `logp` is that of the policy which collected the data: R stays frozen for all inner steps, so compute it once.
    """
    require_shape("logp", logp, np.shape(reward))
    require_shape("ref_logp", ref_logp, np.shape(reward))
    return reward - beta * (logp - ref_logp)


def usable_responses(reward_PG: Any, valid_PG: Any = None) -> Any:
    """Which responses have a leave-one-out advantage: finite, valid, and not the only such one of their prompt.

    bool [P, G], NumPy or JAX as `reward_PG`. Give the others no mask in `mdloo_loss`: they are not part of N either.
    """
    usable_PG = (jnp if isinstance(reward_PG, jax.Array) else np).isfinite(reward_PG)
    if valid_PG is not None:
        require_shape("valid_PG", valid_PG, usable_PG.shape)
        usable_PG = usable_PG & (valid_PG > 0)
    return usable_PG & (usable_PG.sum(axis=1, keepdims=True) >= 2)


def leave_one_out(reward_PG: Any, valid_PG: Any = None) -> Any:
    """Each reward minus the mean of its prompt's other valid rewards (Eq. 7); a prompt's advantages sum to 0.

    Args:
      reward_PG: rewards, NumPy or JAX (the kind of array and the floating dtype are kept).
      valid_PG: False where a reward could not be computed. One that is not finite is invalid anyway.
    Returns: advantages [P, G], zero where `usable_responses` is False (invalid, or fewer than two valid in the prompt).
    """
    xp: Any = jnp if isinstance(reward_PG, jax.Array) else np
    reward_PG = xp.asarray(reward_PG)
    if reward_PG.ndim != 2 or not xp.issubdtype(reward_PG.dtype, xp.floating):
        raise ValueError(f"reward_PG must be floats [prompts, responses], got {reward_PG.dtype} {reward_PG.shape}")
    valid_PG = usable_responses(reward_PG, valid_PG)
    # Measured from the smallest reward: a constant group gives exactly zero, and a large offset costs no digits.
    lowest_P1 = xp.where(valid_PG, reward_PG, xp.inf).min(axis=1, keepdims=True)
    above_PG = xp.where(valid_PG, reward_PG - xp.where(valid_PG.any(axis=1, keepdims=True), lowest_P1, 0), 0)
    num_others_P1 = xp.maximum(valid_PG.sum(axis=1, keepdims=True) - 1, 1).astype(reward_PG.dtype)
    others_PG = (above_PG.sum(axis=1, keepdims=True) - above_PG) / num_others_P1
    return xp.where(valid_PG, above_PG - others_PG, 0).astype(reward_PG.dtype)


def mdloo_loss(
    *,
    logp_BT: jax.Array,
    behavior_logp_BT: jax.Array,
    advantage_B: jax.Array,
    mask_BT: jax.Array,
    gamma: float,
    num_sequences: int | jax.Array | None = None,
    weight_B: jax.Array | None = None,
    kl_BT: jax.Array | None = None,
    d_max: float = 20.0,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The surrogate whose gradient is minus Eq. 9's estimate; its value means nothing, watch the metrics.

    Args:
      logp_BT: log pi_theta of each token at the sampling temperature; float32 or float64, kept.
      behavior_logp_BT: log pi_theta_k of the same tokens, computed by the learner's own program.
      advantage_B: leave-one-out advantages.
      mask_BT: 1 on response tokens, the end of sequence included. A row without any is absent (padding, invalid).
      gamma: trust region, in reward per nat of sequence KL.
      num_sequences: N, all valid sequences over microbatches and devices (default: the rows present here).
      weight_B: of a response sampled by older weights, min(pi_k / pi_mu, cap); None: 1.
      kl_BT: KL_t of the distribution that each token was drawn from, differentiable (`token_scores.score_against`); None:
        the KL is estimated from the sampled tokens alone.
      d_max: guards exp(d) against overflow inside the stopped weights only; hits are counted.
    Returns: the scalar loss, and metrics over the rows present: kl_to_behavior (KL(pi_theta || pi_k), nats a sequence),
      psi (estimate of Eq. 8), ratio_mean, ratio_max, effective_sample_fraction (1 at theta_k), d_max_hits, sequences.
    """
    require_shape("behavior_logp_BT", behavior_logp_BT, logp_BT.shape)
    require_shape("advantage_B", advantage_B, logp_BT.shape[:1])
    if jnp.finfo(logp_BT.dtype).bits < 32:
        raise TypeError(f"logp_BT is {logp_BT.dtype}: sequence log-probabilities need float32; use sequence.token_logps")
    present_B = (jnp.asarray(mask_BT) > 0).any(axis=1)
    advantage_B = jnp.where(present_B, jnp.asarray(advantage_B, logp_BT.dtype), 0)
    d_B = masked_sum(logp_BT - jnp.asarray(behavior_logp_BT, logp_BT.dtype), mask_BT)
    ratio_B = jnp.where(present_B, jnp.exp(jnp.minimum(d_B, d_max)), 0)
    value_B = advantage_B if kl_BT is not None else advantage_B - gamma * d_B
    terms_B = jax.lax.stop_gradient(ratio_B * value_B) * sequence_logp(logp_BT, mask_BT)
    if kl_BT is not None:
        difference_BT = logp_BT - jnp.asarray(behavior_logp_BT, logp_BT.dtype)
        terms_B = terms_B - gamma * prefix_weighted_kl(kl_BT, difference_BT, mask_BT, d_max=d_max)
    total = present_B.sum() if num_sequences is None else num_sequences
    loss = -weighted(terms_B, weight_B).sum() / jnp.maximum(jnp.asarray(total, logp_BT.dtype), 1)
    return loss, sequence_metrics(d_B, advantage_B, present_B, gamma=gamma, d_max=d_max)


def prefix_weighted_kl(kl_BT: jax.Array, difference_BT: jax.Array, mask_BT: jax.Array, *, d_max: float) -> jax.Array:
    """What has the gradient of sum_t exp(sum_{s<t} d_s) KL_t in every sequence, [B]; its value means nothing.

    `difference_BT` is d = log pi_theta - log pi_k of the tokens. The exponent is cut at `d_max` in the stopped weight alone,
    so that far from theta_k the gradient stays finite and does not vanish.
    """
    require_shape("kl_BT", kl_BT, mask_BT.shape)
    stop = jax.lax.stop_gradient
    d_BT = jnp.where(jnp.asarray(mask_BT) > 0, difference_BT, 0)
    before_BT = jnp.cumsum(d_BT, axis=-1) - d_BT
    prefix_BT = stop(jnp.exp(jnp.minimum(before_BT, d_max)))
    return masked_sum(prefix_BT * (kl_BT + stop(kl_BT) * before_BT), mask_BT)


def weighted(value_B: jax.Array, weight_B: jax.Array | None) -> jax.Array:
    """Each sequence's term times the stopped weight of its staleness; None: as it is."""
    return value_B if weight_B is None else jax.lax.stop_gradient(weight_B) * value_B


def sequence_metrics(
    log_ratio_B: Any, advantage_B: Any, present_B: Any, *, gamma: float, d_max: float = 20.0
) -> dict[str, jax.Array]:
    """The metrics of `mdloo_loss` from each sequence's log(pi_theta / pi_k), those of several microbatches together."""
    d_B, advantage_B = jnp.asarray(log_ratio_B), jnp.asarray(advantage_B)
    ratio_B = jnp.where(present_B, jnp.exp(jnp.minimum(d_B, d_max)), 0)
    count = jnp.maximum(present_B.sum(), 1).astype(ratio_B.dtype)
    # rho d - rho + 1: KL(pi_theta || pi_k) under samples of pi_k, unbiased since E[rho] = 1, and never negative.
    kl = jnp.where(present_B, ratio_B * (d_B - 1.0) + 1.0, 0).sum() / count
    tiny = jnp.finfo(ratio_B.dtype).tiny
    return {
        "kl_to_behavior": kl,
        "psi": (ratio_B * advantage_B).sum() / count - gamma * kl,
        "ratio_mean": ratio_B.sum() / count,
        "ratio_max": ratio_B.max(),
        "effective_sample_fraction": jnp.square(ratio_B.sum()) / jnp.maximum(count * jnp.square(ratio_B).sum(), tiny),
        "sequences": present_B.sum(),
        "d_max_hits": (present_B & (d_B > d_max)).sum(),
    }
