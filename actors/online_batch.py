"""From scored groups to what one policy update trains on, and from its microbatches to its report (4.3.3, E.2).

R = r - beta log(pi_theta_k / pi_ref), frozen over the inner steps, then the algorithm's baseline; every log-probability in
it comes from the learner's own program. What the environment wrote (`Group.actions` False), and responses without an
advantage, have no mask and are no part of N. How rows become microbatches is in `online_parts.py`. Passes that nothing asks
for are not made: none of the reference without beta, none of theta_k where the first inner step yields its own.

Shapes: P prompts, G responses per prompt, B = P x G sequences, T time (of a microbatch's response arrays: from its first_B).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from actors.jobs import OnlineSettings
from actors.online_parts import cut_into_parts
from actors.online_report import Responses, fresh_tokens, known_metrics, staleness, trained_groups
from afm_rl.objectives.mdloo import sequence_metrics, shaped_reward
from afm_rl.objectives.online import ALGORITHMS, Advantages, advantages
from afm_rl.objectives.online_dpo import best_and_worst
from afm_rl.packing import Batch, Example, pad
from afm_rl.training import to_floats
from afm_rl.types import PolicyUpdate, ScoredGroup

#: (a microbatch, "current" or "reference", temperature) -> log p of every target, in the microbatch's layout.
LogProbs = Callable[[Batch, str, float], np.ndarray]


def responses_batch(groups: Sequence[ScoredGroup], *, pad_id: int = 0) -> tuple[Batch, np.ndarray, np.ndarray]:
    """Groups of equal size as one right-padded batch of P x G rows, rewards and validity [P, G].

    The targets are the tokens that the policy chose. `sampler_logp_BT` is log pi_mu, what the sampler said of them.
    """
    sizes = {len(g.group.responses) for g in groups}
    if len(sizes) != 1:
        raise ValueError(f"groups of different sizes in one batch: {sorted(sizes)}")
    responses = [(g.group, j) for g in groups for j in range(len(g.group.responses))]
    examples = [
        Example(np.concatenate([group.prompt_T, group.responses[j]]), first_target=len(group.prompt_T))
        for group, j in responses
    ]
    batch = pad(examples, pad_id=pad_id)
    batch["sampler_logp_BT"] = np.zeros_like(batch["mask_BT"])
    for row, (group, j) in enumerate(responses):
        first, last = len(group.prompt_T), len(group.prompt_T) + len(group.responses[j])
        batch["sampler_logp_BT"][row, first:last] = group.logps[j]
        if group.actions:
            batch["mask_BT"][row, first:last] *= group.actions[j]
    batch["sampler_logp_BT"] *= batch["mask_BT"]
    reward_PG = np.stack([np.where(g.valid_G, g.reward_G, 0.0) for g in groups]).astype(np.float64)
    return batch, reward_PG, np.stack([g.valid_G for g in groups])


class OnlineBatch:
    """One iteration's responses on their way through the update: `score` first, then `parts_of` every inner step.

    `version` is that of the learner's parameters, theta_k; `average` the running baseline before this iteration.
    """

    def __init__(
        self,
        groups: Sequence[ScoredGroup],
        settings: OnlineSettings,
        *,
        version: int,
        average: float | None = None,
        whole_rows: bool = False,
        share_prompts: bool = True,
    ) -> None:
        self._groups, self._settings, self._version = groups, settings, version
        self._batch, self._reward_PG, valid_PG = responses_batch(groups)
        has_targets_B = self._batch["mask_BT"].any(-1)
        self._valid_PG = valid_PG & has_targets_B.reshape(valid_PG.shape)
        self._target_BT = self._batch["mask_BT"]
        self._first_B = np.array([len(g.group.prompt_T) for g in groups for _ in g.group.responses])
        self._age_B = np.array([age for g in groups for age in staleness(g.group, version)])
        self._rows_B = np.arange(len(self._age_B))
        self._logps: dict[str, np.ndarray] = {}
        self.average = average
        self._algorithm = ALGORITHMS[settings.algorithm]
        if self._algorithm.pairs:
            self._rows_B = self._choose_pairs()
        self._parts = cut_into_parts(
            self._rows_B.reshape(-1, 2) if self._algorithm.pairs else self._rows_B[:, None],
            first_B=self._first_B,
            end_B=np.array([len(g.group.prompt_T) + len(r) for g in groups for r in g.group.responses]),
            rows=settings.microbatch,
            group=1 if self._algorithm.pairs else self._reward_PG.shape[1],
            whole_rows=whole_rows,
            share=share_prompts,
        )

    def score(self, log_probs: LogProbs) -> int:
        """Make the log-probabilities that the rewards or the loss need, then the advantages; how many responses count."""
        settings, in_reward = self._settings, self._algorithm.reference == "reward"
        total_PG = self._reward_PG
        if settings.beta and self._valid_PG.any():
            for which in ("current", "reference") if in_reward else ("reference",):
                self._logps[which] = self._in_parts(log_probs, which)
            if in_reward:
                own_PG, ref_PG = (self._sums(which).reshape(total_PG.shape) for which in ("current", "reference"))
                total_PG = shaped_reward(total_PG, own_PG, ref_PG, beta=settings.beta)
        found = self._advantages(total_PG)
        self._advantage_PG, self._usable_PG, self.average = found.advantage_PG, found.usable_PG, found.average
        counted_B = found.usable_PG.reshape(-1)
        mask_BT = self._target_BT * counted_B[:, None]
        self._batch |= {
            "mask_BT": mask_BT,
            "advantage_B": found.advantage_PG.reshape(-1).astype(np.float32),
            "stale_B": self._age_B != 0,
            "num_sequences": np.asarray(counted_B.sum(), np.float32),
            "num_tokens": np.asarray(mask_BT.sum(), np.float32),
        }
        if "reference" in self._logps and not in_reward:
            self._batch["ref_logp_BT"] = self._logps["reference"]
        return int(counted_B.sum())

    def parts_of(self, inner_step: int) -> list[Batch]:
        """The microbatches of an inner step. The first is at theta_k, whose log-probabilities `learned` may bring later."""
        at_start = inner_step == 0 and (self._settings.kl == "full" or "current" not in self._logps)
        batch = self._batch if at_start else {**self._batch, "behavior_logp_BT": self._logps["current"]}
        return [part.cut(batch, self._first_B) for part in self._parts]

    def learned(self, inner_step: int, measured: Sequence[Mapping[str, Any]]) -> None:
        """Take log pi_theta_k from the first inner step's own pass, unless it is known."""
        if inner_step == 0 and "current" not in self._logps:
            self._logps["current"] = self._gather([of_part["logp_BT"] for of_part in measured])

    def kl(self, measured: Sequence[Mapping[str, Any]]) -> float:
        """The measured KL(pi_theta || pi_k) of a pass over the microbatches, nats a sequence."""
        return float(self._ratio_metrics(measured)["kl_to_behavior"])

    def report(self, measured: Sequence[Mapping[str, Any]], of_update: Mapping[str, float]) -> PolicyUpdate:
        """The update as metrics and by group, from the microbatches of the last inner step that was computed, if any was."""
        seen = Responses(
            groups=self._groups,
            targets_BT=self._target_BT,
            sampler_logp_BT=self._batch["sampler_logp_BT"],
            fresh_BT=fresh_tokens([g.group for g in self._groups], self._target_BT, self._version),
            age_B=self._age_B,
            rows_B=self._rows_B,
            advantage_B=self._advantage_PG.reshape(-1),
            counted_B=self._usable_PG.reshape(-1),
            logp_BT=self._logps.get("current"),
            ref_logp_BT=self._logps.get("reference"),
        )
        cap = None if self._algorithm.pairs else self._settings.staleness_cap
        metrics = {**known_metrics(seen, valid_PG=self._valid_PG, staleness_cap=cap), **of_update, "sequences": 0.0}
        if measured:
            metrics |= {**to_floats(self._ratio_metrics(measured)), "loss": sum(float(m["loss"]) for m in measured)}
            counted_B = self._usable_PG.reshape(-1)[self._order()]
            for name, of_response in (("clip_fraction", "clipped_B"), ("margin", "margin_B")):
                if of_response in measured[0]:
                    metrics[name] = float(np.concatenate([m[of_response] for m in measured])[counted_B].mean())
        return PolicyUpdate(metrics, trained_groups(seen))

    def _advantages(self, total_PG: np.ndarray) -> Advantages:
        settings = self._settings
        if self._algorithm.pairs:
            counted_PG = np.zeros(self._reward_PG.shape, bool)
            signs_PG = np.zeros(self._reward_PG.shape)
            for p in np.flatnonzero(self._differ_P):
                counted_PG[p, self._pairs_P2[p]], signs_PG[p, self._pairs_P2[p]] = True, (1.0, -1.0)
            return Advantages(signs_PG, counted_PG, self.average)
        average, decay = self.average, settings.baseline_decay
        return advantages(settings.baseline_name, total_PG, self._valid_PG, average=average, decay=decay)

    def _choose_pairs(self) -> np.ndarray:
        """The rows that a pairwise algorithm trains on: chosen and rejected of a group, one after the other."""
        self._pairs_P2, self._differ_P = best_and_worst(self._reward_PG, self._valid_PG)
        return (self._pairs_P2 + self._reward_PG.shape[1] * np.arange(len(self._pairs_P2))[:, None]).reshape(-1)

    def _in_parts(self, log_probs: LogProbs, which: str) -> np.ndarray:
        seen = {name: self._batch[name] for name in ("tokens_BT", "mask_BT")}
        temperature = self._settings.temperature
        return self._gather([log_probs(part.cut(seen, self._first_B), which, temperature) for part in self._parts])

    def _gather(self, of_parts: Sequence[np.ndarray]) -> np.ndarray:
        """Microbatches' results as one [B, T] array, 0 where there is no target."""
        whole_BT = np.zeros_like(self._target_BT)
        for part, value_BT in zip(self._parts, of_parts, strict=True):
            part.put_back(whole_BT, value_BT, self._first_B)
        return whole_BT * self._target_BT

    def _sums(self, which: str) -> np.ndarray:
        """log pi(y | x) of every response, in float64 [B]."""
        return self._logps[which].sum(-1, dtype=np.float64)

    def _order(self) -> np.ndarray:
        return np.concatenate([part.rows for part in self._parts])

    def _ratio_metrics(self, measured: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
        order = self._order()
        log_ratio_B = np.concatenate([of_part["log_ratio_B"] for of_part in measured])
        counted_B = self._usable_PG.reshape(-1)[order]
        gamma = self._settings.gamma if self._settings.algorithm == "mdloo" else 0.0
        return sequence_metrics(log_ratio_B, self._batch["advantage_B"][order], counted_B, gamma=gamma)
