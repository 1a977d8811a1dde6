"""The reward actor: scores groups with the learned reward model, the programmatic checks, or a weighted sum of both.

Consumes `Group`s and the prompts they answer; produces `ScoredGroup`s with every component kept apart, and reranks
responses prompt by prompt (4.3.2). A response whose reward cannot be computed is marked invalid and counted.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from actors.artifacts import load_artifact
from afm_rl.compute import Compute
from afm_rl.config import ModelConfig
from afm_rl.data.checks import is_checkable, passes
from afm_rl.packing import Example, pad
from afm_rl.reward_model import Scores, score
from afm_rl.tokenizer import Tokenizer
from afm_rl.types import GRADINGS, Group, Prompt, ScoredGroup

log = logging.getLogger(__name__)

#: Sequences per forward pass; with lengths padded to 32, it bounds the number of compiled programs.
ROWS = 128


@dataclass(frozen=True)
class RewardSpec:
    """Where the reward model and the tokenizer are, and how much each component counts."""

    tokenizer_folder: str
    model_folder: str | None
    weights: Mapping[str, float]  # "model", "verifier"


@dataclass(frozen=True)
class SequenceScores:
    """Reward [B] and most likely grade classes [B, 4] of B sequences."""

    reward_B: np.ndarray
    grades_B4: np.ndarray


class Reward:
    """One replica."""

    def __init__(self, *, compute_dtype: str = "float32") -> None:
        self._dtype = compute_dtype
        self._tokenizer: Tokenizer | None = None
        self._weights: dict[str, float] = {}
        self._params: Any = None
        self._config: ModelConfig | None = None
        self._invalid = 0

    def load(self, spec: RewardSpec) -> None:
        """Use this reward model and these component weights from the next call on."""
        if unknown := set(spec.weights) - {"model", "verifier"}:
            raise ValueError(f"unknown reward component {sorted(unknown)[0]!r}; known: model, verifier")
        self._tokenizer = Tokenizer.load(Path(spec.tokenizer_folder))
        self._weights = {name: weight for name, weight in spec.weights.items() if weight}
        if spec.model_folder is not None:
            artifact = load_artifact(spec.model_folder)
            if "heads" not in artifact.params:
                raise ValueError(f"{spec.model_folder} is a policy, not a reward model: it has no heads")
            self._params = jax.tree.map(jnp.asarray, artifact.params)
            self._config = artifact.config
        elif "model" in self._weights:
            raise ValueError("the reward gives the model a weight, but there is no reward model yet")

    def score(self, groups: Sequence[Group], prompts: Sequence[Prompt]) -> list[ScoredGroup]:
        """Rewards of every response, in order; prompts[i] is what groups[i] answers."""
        components: dict[str, list[np.ndarray]] = {}
        if "model" in self._weights:
            flat = self.sequence_scores([np.concatenate([g.prompt_T, r]) for g in groups for r in g.responses]).reward_B
            ends = np.cumsum([len(g.responses) for g in groups])
            components["model"] = np.split(flat, ends[:-1])
        if "verifier" in self._weights:
            components["verifier"] = [self._verify(g, p) for g, p in zip(groups, prompts, strict=True)]
        scored = []
        for i, group in enumerate(groups):
            parts = {name: values[i] for name, values in components.items()}
            total = sum((self._weights[name] * values for name, values in parts.items()), np.zeros(len(group.responses)))
            valid = np.isfinite(total)
            self._invalid += int((~valid).sum())
            scored.append(ScoredGroup(group, total.astype(np.float32), valid, parts))
        return scored

    def sequence_scores(self, sequences: Sequence[np.ndarray]) -> SequenceScores:
        """Score whole token sequences (prompt and response) with the learned model."""
        if self._params is None or self._config is None:
            raise RuntimeError("this reward actor holds no reward model: load one first")
        order = np.argsort([len(s) for s in sequences], kind="stable")
        rewards, grades = np.empty(len(sequences), np.float32), np.empty((len(sequences), len(GRADINGS)), np.int32)
        for start in range(0, len(order), ROWS):
            rows = order[start : start + ROWS]
            padded = [sequences[i] for i in rows] + [sequences[rows[0]]] * (ROWS - len(rows))
            batch = pad([Example(s) for s in padded], pad_id=0)
            length_B = jnp.asarray([len(s) for s in padded])
            out = _score(self._params, jnp.asarray(batch["tokens_BT"]), length_B, config=self._config, dtype=self._dtype)
            rewards[rows] = np.asarray(out.reward_B)[: len(rows)]
            classes = np.stack([np.asarray(out.grade_logits[name]).argmax(-1) for name in GRADINGS], axis=-1)
            grades[rows] = classes[: len(rows)]
        return SequenceScores(rewards, grades)

    def rerank(self, prompts: Sequence[Prompt], responses: Sequence[Sequence[str]]) -> list[int]:
        """Per prompt, the index of the response with the highest reward (4.3.2), by the components of the last `load`.

        The first one where no response of a prompt has a reward.
        """
        scored = self.score([self._as_group(p, texts) for p, texts in zip(prompts, responses, strict=True)], prompts)
        return [int(np.where(s.valid_G, s.reward_G, -np.inf).argmax()) for s in scored]

    def invalid_responses(self) -> int:
        """How many responses got no reward since the start."""
        return self._invalid

    def _as_group(self, prompt: Prompt, texts: Sequence[str]) -> Group:
        """Texts as a group: nobody's log-probabilities, which no reward looks at."""
        assert self._tokenizer is not None
        tokens = tuple(np.asarray(self._tokenizer.encode_response(text), np.int32) for text in texts)
        prompt_T = np.asarray(self._tokenizer.encode_chat(prompt.messages), np.int32)
        no_logps = tuple(np.zeros(len(t), np.float32) for t in tokens)
        return Group(prompt.id, prompt_T, tokens, no_logps, (True,) * len(tokens), policy="", version=0)

    def _verify(self, group: Group, prompt: Prompt) -> np.ndarray:
        """1 where the checks pass, 0 where not or without checks, NaN (invalid) where a check failed to run."""
        assert self._tokenizer is not None
        if not is_checkable(prompt):
            return np.zeros(len(group.responses), np.float32)
        values = np.empty(len(group.responses), np.float32)
        for i, response in enumerate(group.responses):
            try:
                values[i] = float(passes(prompt, self._tokenizer.decode(response.tolist())))
            except Exception:  # one response must not stop a run
                log.exception("the checks of prompt %s failed on response %d; it is left out", prompt.id, i)
                values[i] = np.nan
        return values


@partial(jax.jit, static_argnames=("config", "dtype"))
def _score(params: Any, tokens_BT: jax.Array, length_B: jax.Array, *, config: ModelConfig, dtype: str) -> Scores:
    return score(params, tokens_BT, length_B, config=config, compute=Compute(dtype=dtype))
