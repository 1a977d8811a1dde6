"""What a policy update says of the responses that it trained on: metrics, and one record for every group.

Sampler and learner are compared token by token, where the same weights made both log-probabilities. A response is as stale
as its oldest token. Where a log-probability was not needed, and so not computed, what depends on it is left out of the
metrics, and NaN in a record.

Shapes: P prompts, G responses per prompt, B = P x G responses, T time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from afm_rl.objectives.online import staleness_weight
from afm_rl.types import Group, ScoredGroup, TrainedGroup


@dataclass(frozen=True)
class Responses:
    """All responses of an iteration after its update. [B, T] arrays are 0 where `targets_BT` is.

    `fresh_BT`: tokens that theta_k itself sampled; `age_B`: versions since the oldest token; `rows_B`: the rows that passed
    through the model (all of them, or the pairs of online DPO).
    """

    groups: Sequence[ScoredGroup]
    targets_BT: np.ndarray
    sampler_logp_BT: np.ndarray
    fresh_BT: np.ndarray
    age_B: np.ndarray
    rows_B: np.ndarray
    advantage_B: np.ndarray
    counted_B: np.ndarray
    logp_BT: np.ndarray | None
    ref_logp_BT: np.ndarray | None


def staleness(group: Group, version: int) -> list[int]:
    """How many versions before the learner's `version` the oldest token of each response was sampled."""
    if not group.versions:
        return [abs(version - group.version)] * len(group.responses)
    return [max((abs(version - int(v)) for v in of_token), default=0) for of_token in group.versions]


def fresh_tokens(groups: Sequence[Group], targets_BT: np.ndarray, version: int) -> np.ndarray:
    """Which targets the learner's `version` sampled, bool [B, T]."""
    fresh_BT, row = targets_BT > 0, 0
    for group in groups:
        for j, response in enumerate(group.responses):
            first = len(group.prompt_T)
            by_T = group.versions[j] if group.versions else np.full(len(response), group.version)
            fresh_BT[row, first : first + len(response)] &= by_T == version
            row += 1
    return fresh_BT


def logp_mismatch(sampler_logp_BT: np.ndarray, logp_BT: np.ndarray, counted_BT: np.ndarray) -> dict[str, float]:
    """|log p(sampler) - log p(learner)|: the largest and the mean of a token, and the largest of a response's sums.

    Both are of the same weights where `counted_BT` is True, and only those tokens are compared; {} where there are none.
    """
    if not counted_BT.any():
        return {}
    difference_BT = np.where(counted_BT, np.float64(sampler_logp_BT) - logp_BT, 0)
    tokens = np.abs(difference_BT[counted_BT])
    return {
        "logp_mismatch_max": float(tokens.max()),
        "logp_mismatch_mean": float(tokens.mean()),
        "logp_mismatch_response_max": float(np.abs(difference_BT.sum(-1)).max()),
    }


def known_metrics(of: Responses, *, valid_PG: np.ndarray, staleness_cap: float | None) -> dict[str, float]:
    """The metrics that do not depend on the inner steps. `staleness_cap` None: the algorithm has no staleness weights."""
    usable_PG = of.counted_B.reshape(valid_PG.shape)
    rewards = np.concatenate([g.reward_G for g in of.groups])[valid_PG.reshape(-1)]
    ages = of.age_B[of.counted_B] if of.counted_B.any() else of.age_B
    found = {
        "response_tokens": float(np.mean([len(r) for g in of.groups for r in g.group.responses])),
        "groups_dropped": float((~usable_PG.any(-1)).sum()),
        "staleness_mean": float(ages.mean()),
        "staleness_max": float(ages.max()),
    }
    if rewards.size:
        found["reward"] = float(rewards.mean(dtype=np.float64))
    if of.counted_B.any():
        found["advantage_std"] = float(of.advantage_B[of.counted_B].std())
    if of.logp_BT is not None:
        found |= _of_log_probabilities(of, of.logp_BT, staleness_cap)
    return found


def _of_log_probabilities(of: Responses, logp_BT: np.ndarray, staleness_cap: float | None) -> dict[str, float]:
    counted_B = of.counted_B
    passed_B = np.isin(np.arange(len(counted_B)), of.rows_B)
    found = logp_mismatch(of.sampler_logp_BT, logp_BT, of.fresh_BT & passed_B[:, None])
    if not counted_B.any():
        return found
    if of.ref_logp_BT is not None:
        found["kl_to_reference"] = float((logp_BT - of.ref_logp_BT)[counted_B].sum(-1, dtype=np.float64).mean())
    if staleness_cap is not None:
        inputs = (a[counted_B] for a in (logp_BT, of.sampler_logp_BT, of.targets_BT, of.age_B != 0))
        weight_B = np.asarray(staleness_weight(*inputs, cap=staleness_cap), np.float64)
        found["importance_weight_mean"] = float(weight_B.mean())
        found["importance_weight_min"] = float(weight_B.min())
        found["importance_effective_fraction"] = float(weight_B.sum() ** 2 / (len(weight_B) * np.square(weight_B).sum()))
    return found


def trained_groups(of: Responses) -> tuple[TrainedGroup, ...]:
    """The record of every group; NaN for what was not computed."""
    B = len(of.counted_B)
    passed_B = np.isin(np.arange(B), of.rows_B)

    def summed(logp_BT: np.ndarray | None) -> np.ndarray:
        if logp_BT is None:
            return np.full(B, np.nan, np.float32)
        return np.where(passed_B, logp_BT.sum(-1, dtype=np.float64), np.nan).astype(np.float32)

    logp_B, ref_logp_B, mismatch_B = summed(of.logp_BT), summed(of.ref_logp_BT), np.full(B, np.nan, np.float32)
    if of.logp_BT is not None:
        compared_B = of.fresh_BT.any(-1) & passed_B
        largest_B = np.where(of.fresh_BT, np.abs(of.sampler_logp_BT - of.logp_BT), 0).max(-1)
        mismatch_B = np.where(compared_B, largest_B, np.nan).astype(np.float32)
    G, found = B // len(of.groups), []
    for p, scored in enumerate(of.groups):
        of_p = slice(p * G, (p + 1) * G)
        found.append(
            TrainedGroup(
                id=scored.group.id,
                advantage_G=of.advantage_B[of_p].astype(np.float32),
                counted_G=of.counted_B[of_p].copy(),
                logp_G=logp_B[of_p],
                ref_logp_G=ref_logp_B[of_p],
                mismatch_G=mismatch_B[of_p],
            )
        )
    return tuple(found)
