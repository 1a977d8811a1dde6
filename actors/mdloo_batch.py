"""From scored groups to the batch of one MDLOO policy update (4.3.3, E.2), and from its microbatches to its metrics.

R = r - beta * log(pi_theta_k / pi_ref), frozen over the inner steps; leave-one-out inside a prompt's group. Both
log-probabilities come from the learner's own program. Groups with fewer than two valid responses do not count.

Shapes: P prompts, G responses per prompt, B = P x G sequences, T time.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from actors.jobs import MdlooSettings
from afm_rl.objectives.mdloo import leave_one_out, sequence_metrics, shaped_reward, usable_responses
from afm_rl.packing import Batch, Example, length_buckets, pad
from afm_rl.training import OF_UPDATE, to_floats
from afm_rl.types import Group, ScoredGroup

Parts = Sequence[tuple[np.ndarray, int]]
#: (batch, its microbatches, "current" or "reference", temperature) -> log p of every target [B, T].
LogProbs = Callable[[Batch, Parts, str, float], np.ndarray]


@dataclass(frozen=True)
class MdlooBatch:
    """What the inner steps train on: the padded batch, its microbatches (rows, width), and what is known beforehand."""

    batch: Batch
    parts: Parts
    known: Mapping[str, float]

    def metrics(self, measured: Sequence[Mapping[str, Any]], *, gamma: float) -> dict[str, float]:
        """The update's metrics from those of the last inner step's microbatches."""
        order = np.concatenate([rows for rows, _ in self.parts])
        of_sequences = sequence_metrics(
            np.concatenate([of_part["log_ratio_B"] for of_part in measured]),
            self.batch["advantage_B"][order],
            self.batch["mask_BT"][order].any(-1),
            gamma=gamma,
        )
        return {
            **to_floats(of_sequences),
            "loss": sum(float(of_part["loss"]) for of_part in measured),
            **{name: float(measured[0][name]) for name in OF_UPDATE},
            **self.known,
        }


def prepare(groups: Sequence[ScoredGroup], settings: MdlooSettings, log_probs: LogProbs) -> MdlooBatch:
    """Rewards, advantages and theta_k's log-probabilities of n x K responses. Raises ValueError when no group is left."""
    batch, reward_PG, valid_PG = responses_batch(groups)
    length_B = np.array([len(g.group.prompt_T) + len(response) for g in groups for response in g.group.responses])
    parts = length_buckets(length_B, rows=settings.microbatch)
    behavior_logp_BT, ref_logp_BT = (
        log_probs(batch, parts, which, settings.temperature) for which in ("current", "reference")
    )
    mismatch = logp_mismatch([g.group for g in groups], behavior_logp_BT, batch["mask_BT"])
    shape = reward_PG.shape
    behavior_PG, ref_PG = behavior_logp_BT.sum(-1).reshape(shape), ref_logp_BT.sum(-1).reshape(shape)
    total_PG = shaped_reward(reward_PG, behavior_PG, ref_PG, beta=settings.beta)
    usable_PG = usable_responses(total_PG, valid_PG)
    if not usable_PG.any():
        raise ValueError("no group has two valid responses: every reward of this iteration failed")
    advantage_PG = leave_one_out(total_PG, valid_PG)
    counted_B = usable_PG.reshape(-1)
    batch["mask_BT"] = batch["mask_BT"] * counted_B[:, None]
    batch |= {
        "behavior_logp_BT": behavior_logp_BT * counted_B[:, None],
        "advantage_B": advantage_PG.reshape(-1).astype(np.float32),
        "num_sequences": np.asarray(counted_B.sum(), np.float32),
    }
    known = {
        "reward": float(reward_PG[valid_PG].mean()),
        "kl_to_reference": float((behavior_PG - ref_PG)[usable_PG].mean()),
        "advantage_std": float(advantage_PG[usable_PG].std()),
        **mismatch,
        "response_tokens": float(np.mean([len(r) for g in groups for r in g.group.responses])),
        "groups_dropped": float((~usable_PG.any(-1)).sum()),
    }
    return MdlooBatch(batch, parts, known)


def logp_mismatch(groups: Sequence[Group], logp_BT: np.ndarray, mask_BT: np.ndarray) -> dict[str, float]:
    """|log p(sampler) - log p(learner)| of the sampled tokens, the largest and the mean, and the largest of a response.

    `logp_BT` and `mask_BT`: the learner's, and the targets, a row a response. Tokens that other weights than the group's
    made (an update in flight) do not count; {} where none does.
    """
    responses = [(group, j) for group in groups for j in range(len(group.responses))]
    differences = []
    for (group, j), logp_T, mask_T in zip(responses, logp_BT, mask_BT, strict=True):
        counted_T = group.versions[j] == group.version if group.versions else slice(None)
        differences.append((group.logps[j].astype(np.float64) - logp_T[mask_T > 0])[counted_T])
    tokens = np.abs(np.concatenate(differences))
    if not tokens.size:
        return {}
    return {
        "logp_mismatch_max": float(tokens.max()),
        "logp_mismatch_mean": float(tokens.mean()),
        "logp_mismatch_response_max": float(max(abs(of_response.sum()) for of_response in differences)),
    }


def responses_batch(groups: Sequence[ScoredGroup], *, pad_id: int = 0) -> tuple[Batch, np.ndarray, np.ndarray]:
    """Groups of equal size as one right-padded batch of P x G rows, rewards and validity [P, G]."""
    sizes = {len(g.group.responses) for g in groups}
    if len(sizes) != 1:
        raise ValueError(f"groups of different sizes in one batch: {sorted(sizes)}")
    examples = [
        Example(np.concatenate([g.group.prompt_T, response]), first_target=len(g.group.prompt_T))
        for g in groups
        for response in g.group.responses
    ]
    reward_PG = np.stack([np.where(g.valid_G, g.reward_G, 0.0) for g in groups]).astype(np.float64)
    return pad(examples, pad_id=pad_id), reward_PG, np.stack([g.valid_G for g in groups])
