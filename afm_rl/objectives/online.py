"""The algorithms of online learning by name, behind one face: advantages from rewards, a loss from log-probabilities.

MDLOO is the paper's (4.3.3, E.2); the others are there to compare with. Three log-probabilities are kept apart: the
current policy's, pi_k's (the learner's own, when the iteration began) and pi_mu's (the sampler's). Where pi_mu is an older
policy, a response counts by stop_grad(min(pi_k / pi_mu, cap)); where it is pi_k itself the weight is exactly 1, so that
the sampler's rounding stays out of an exact gradient. Online DPO needs no such weight: its loss asks for pairs, not samples.

Shapes: B sequences, T time, P prompts, G responses per prompt.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from afm_rl.algorithms import ALGORITHMS
from afm_rl.objectives.grpo import group_standardized, grpo_loss
from afm_rl.objectives.mdloo import leave_one_out, mdloo_loss, usable_responses
from afm_rl.objectives.online_dpo import online_dpo_loss
from afm_rl.objectives.ppo import ppo_loss
from afm_rl.objectives.reinforce import running_average
from afm_rl.objectives.rloo import rloo_loss
from afm_rl.objectives.sequence import masked_sum


@dataclass(frozen=True)
class Advantages:
    """What an update's responses are worth: 0 where `usable_PG` is False; `average` is the running one afterwards."""

    advantage_PG: np.ndarray
    usable_PG: np.ndarray
    average: float | None


def advantages(
    baseline: str, reward_PG: np.ndarray, valid_PG: np.ndarray, *, average: float | None = None, decay: float = 0.9
) -> Advantages:
    """Rewards against a baseline, by its name. `average` and `decay` are those of the running average.

    A group counts with two valid responses; with the running average, or with no baseline, one is enough.
    """
    usable_PG = usable_responses(reward_PG, valid_PG)
    if baseline == "leave_one_out":
        return Advantages(leave_one_out(reward_PG, valid_PG), usable_PG, average)
    if baseline == "group_standardized":
        return Advantages(group_standardized(reward_PG, valid_PG), usable_PG, average)
    if baseline == "group_mean":
        count_P1 = np.maximum(usable_PG.sum(axis=1, keepdims=True), 1)
        return Advantages(leave_one_out(reward_PG, valid_PG) * (count_P1 - 1) / count_P1, usable_PG, average)
    alone_PG = np.asarray(valid_PG, bool) & np.isfinite(reward_PG)
    if baseline == "running_average":
        advantage_PG, average = running_average(reward_PG, valid_PG, average, decay=decay)
        return Advantages(advantage_PG, alone_PG, average)
    if baseline == "none":
        return Advantages(np.where(alone_PG, reward_PG, 0), alone_PG, average)
    raise ValueError(f"unknown baseline {baseline!r}")


def staleness_weight(behavior_logp_BT: Any, sampler_logp_BT: Any, mask_BT: Any, stale_B: Any, *, cap: float) -> jax.Array:
    """min(pi_k / pi_mu, cap) of every response [B]; exactly 1 where `stale_B` is False."""
    ratio_B = masked_sum(jnp.asarray(behavior_logp_BT) - sampler_logp_BT, mask_BT)
    return jnp.where(stale_B, jnp.exp(jnp.minimum(ratio_B, math.log(cap))), 1.0)


def online_loss(
    algorithm: str,
    batch: Mapping[str, Any],
    logp_BT: jax.Array,
    *,
    gamma: float,
    clip: float,
    beta: float,
    staleness_cap: float,
    kl_BT: jax.Array | None = None,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The scalar loss of a microbatch, and of each sequence what the update's metrics are made of.

    Args:
      batch: mask_BT, advantage_B, num_sequences and num_tokens (of the whole batch), sampler_logp_BT, stale_B;
        behavior_logp_BT (left out at theta_k itself, where it is `logp_BT`); ref_logp_BT where the loss holds the reference.
      logp_BT: log pi_theta of each token at the sampling temperature; what the mask leaves out is arbitrary.
      kl_BT: for MDLOO's `full` form, see `mdloo_loss`.
    Returns: the loss; log_ratio_B (log pi_theta / pi_k), and clipped_B (share of a response's tokens) or margin_B (nats).
    """
    mask_BT, stop = batch["mask_BT"], jax.lax.stop_gradient
    behavior_logp_BT = batch["behavior_logp_BT"] if "behavior_logp_BT" in batch else stop(logp_BT)
    of_sequence = {"log_ratio_B": stop(masked_sum(logp_BT - behavior_logp_BT, mask_BT))}
    num_sequences = batch["num_sequences"]
    if algorithm == "online_dpo":
        ref_logp_BT = batch["ref_logp_BT"]
        loss, margin_B = online_dpo_loss(
            logp_BT=logp_BT, ref_logp_BT=ref_logp_BT, mask_BT=mask_BT, beta=beta, num_sequences=num_sequences
        )
        return loss, {**of_sequence, "margin_B": margin_B}
    common: dict[str, Any] = {
        "logp_BT": logp_BT,
        "behavior_logp_BT": behavior_logp_BT,
        "advantage_B": batch["advantage_B"],
        "mask_BT": mask_BT,
        "weight_B": staleness_weight(
            behavior_logp_BT, batch["sampler_logp_BT"], mask_BT, batch["stale_B"], cap=staleness_cap
        ),
    }
    if algorithm in ("mdloo", "reinforce"):
        gamma = gamma if algorithm == "mdloo" else 0.0
        return mdloo_loss(**common, num_sequences=num_sequences, gamma=gamma, kl_BT=kl_BT)[0], of_sequence
    if algorithm == "ppo":
        loss, clipped_B = ppo_loss(**common, clip=clip, num_tokens=batch["num_tokens"])
    elif algorithm == "rloo":
        loss, clipped_B = rloo_loss(**common, clip=clip, num_sequences=num_sequences)
    elif algorithm == "grpo":
        reference = {"beta": beta, "ref_logp_BT": batch["ref_logp_BT"]} if beta else {}
        loss, clipped_B = grpo_loss(**common, clip=clip, num_sequences=num_sequences, **reference)
    else:
        raise ValueError(f"unknown algorithm {algorithm!r}; there are {', '.join(ALGORITHMS)}")
    return loss, {**of_sequence, "clipped_B": stop(clipped_B)}
