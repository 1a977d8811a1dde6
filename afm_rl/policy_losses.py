"""From a batch to a scalar: the model's forward pass joined to each objective of `afm_rl/objectives/`.

Every builder returns a `training.LossFn`: loss(params, frozen, batch, key). What is trained need not be the whole model:
`view` turns (trained parameters, frozen trees, batch) into the parameters the model runs with: the identity for full
training, `adapter_view` for LoRA over a frozen base; pruning brings its own (`pretrain/pruning.py`).

Shapes: B batch, T time, D model. Preference batches hold the chosen rows first, then the rejected ones.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax

from afm_rl.compute import DEFAULT_COMPUTE, Compute
from afm_rl.config import ModelConfig
from afm_rl.lora import attach
from afm_rl.model import forward
from afm_rl.objectives.distillation import top1_distillation
from afm_rl.objectives.dpo import dpo_loss
from afm_rl.objectives.ipo import ipo_loss
from afm_rl.objectives.online import online_loss
from afm_rl.objectives.reward import reward_loss
from afm_rl.objectives.sequence import TargetScores, align_to_target, next_tokens, score_next
from afm_rl.objectives.supervised import cross_entropy
from afm_rl.parameters import Params
from afm_rl.reward_model import score
from afm_rl.token_scores import map_logits, response_window, score_against, score_tokens, top1_tokens
from afm_rl.training import Batch, LossFn
from afm_rl.types import GRADINGS

View = Callable[[Any, Any, Batch], Params]


def full_view(params: Any, frozen: Any, batch: Batch) -> Params:  # noqa: ARG001 (the face of every view)
    """Everything is trained."""
    return params


def adapter_view(*, alpha: float, rank: int) -> View:
    """LoRA parameters are trained over frozen["base"]."""
    return lambda params, frozen, _: attach(frozen["base"], params, alpha=alpha, rank=rank)


def hidden_states(
    params: Params,
    batch: Batch,
    *,
    config: ModelConfig,
    compute: Compute = DEFAULT_COMPUTE,
    dropout_rate: float = 0.0,
    key: jax.Array | None = None,
) -> jax.Array:
    """hidden_BTD after the final norm, of a batch packed or padded."""
    return forward(
        params,
        batch["tokens_BT"],
        config=config,
        positions_BT=batch.get("positions_BT"),
        segments_BT=batch.get("segments_BT"),
        compute=compute,
        dropout_rate=dropout_rate,
        key=key,
    )


def target_scores(
    params: Params,
    batch: Batch,
    *,
    config: ModelConfig,
    compute: Compute = DEFAULT_COMPUTE,
    dropout_rate: float = 0.0,
    key: jax.Array | None = None,
) -> TargetScores:
    """What the model says of the batch's tokens."""
    hidden_BTD = hidden_states(params, batch, config=config, compute=compute, dropout_rate=dropout_rate, key=key)
    return score_tokens(params, hidden_BTD, [batch["tokens_BT"]], config=config, compute=compute)[0]


def supervised(
    config: ModelConfig,
    *,
    view: View = full_view,
    compute: Compute = DEFAULT_COMPUTE,
    dropout: float = 0.0,
    z_loss: float = 0.0,
) -> LossFn:
    """Token-mean cross-entropy with z-loss: pre-training, SFT, rejection sampling, distillation on text, adapters."""

    def loss(params: Any, frozen: Any, batch: Batch, key: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        seen = view(params, frozen, batch)
        scores = target_scores(seen, batch, config=config, compute=compute, dropout_rate=dropout, key=key)
        return cross_entropy(scores, batch["mask_BT"], z_loss=z_loss)

    return loss


def distillation(
    config: ModelConfig,
    teacher_config: ModelConfig,
    *,
    view: View = full_view,
    compute: Compute = DEFAULT_COMPUTE,
    true_weight: float = 0.1,
) -> LossFn:
    """0.1 x the true label + 0.9 x the top-1 label of frozen["teacher"] (3.2.1)."""

    def loss(params: Any, frozen: Any, batch: Batch, key: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        del key
        teacher_BTD = hidden_states(frozen["teacher"], batch, config=teacher_config, compute=compute)
        taught_BT = top1_tokens(frozen["teacher"], teacher_BTD, config=teacher_config, compute=compute)
        seen = view(params, frozen, batch)
        hidden_BTD = hidden_states(seen, batch, config=config, compute=compute)
        true, taught = score_tokens(seen, hidden_BTD, [batch["tokens_BT"], taught_BT], config=config, compute=compute)
        agreement_BT = taught_BT == batch["tokens_BT"]
        return top1_distillation(true, taught, agreement_BT=agreement_BT, mask_BT=batch["mask_BT"], true_weight=true_weight)

    return loss


def reward(
    config: ModelConfig, *, grading_weight: float, compute: Compute = DEFAULT_COMPUTE, dropout: float = 0.0
) -> LossFn:
    """Soft-label ranking plus lambda x the four gradings (E.1). Batch: tokens_BT, length_B, level_B, grades [B, 4]."""

    def loss(params: Any, frozen: Any, batch: Batch, key: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        del frozen
        scores = score(
            params,
            batch["tokens_BT"],
            batch["length_B"],
            config=config,
            compute=compute,
            dropout_rate=dropout,
            key=key,
        )
        pairs = scores.reward_B.shape[0] // 2
        chosen_B, rejected_B = scores.reward_B[:pairs], scores.reward_B[pairs:]
        grade_logits = {name: (out[:pairs], out[pairs:]) for name, out in scores.grade_logits.items()}
        labels = {name: (batch["grades"][:pairs, i], batch["grades"][pairs:, i]) for i, name in enumerate(GRADINGS)}
        return reward_loss(
            chosen_B=chosen_B,
            rejected_B=rejected_B,
            level_B=batch["level_B"],
            grade_logits=grade_logits,
            grades=labels,
            lam=grading_weight,
        )

    return loss


def response_logps(
    params: Params,
    batch: Batch,
    *,
    config: ModelConfig,
    compute: Compute = DEFAULT_COMPUTE,
    temperature: float = 1.0,
) -> jax.Array:
    """log p of every target token, 0 elsewhere -> [B, T] float32. The learner's program for all three log-probabilities.

    Where the batch says which token of a row comes first (`first_B`), mask_BT and the result begin there and the logits of
    the prompt are not made.
    """
    hidden_BTD, next_BT = _predictions(params, batch, config=config, compute=compute)
    how: dict[str, Any] = {"config": config, "compute": compute}
    logp_BT = map_logits(partial(_next_logp, temperature=temperature), params, hidden_BTD, [next_BT], **how)
    return _aligned(logp_BT, batch) * batch["mask_BT"]


def _next_logp(logits_BCV: jax.Array, next_BC: jax.Array, *, temperature: float) -> jax.Array:
    return score_next(logits_BCV, next_BC, temperature=temperature).logp_BT


def _predictions(params: Params, batch: Batch, *, config: ModelConfig, compute: Compute) -> tuple[jax.Array, jax.Array]:
    """The hidden states that predict the batch's tokens, and those tokens: of the rows, or of their responses alone."""
    hidden_BTD = hidden_states(params, batch, config=config, compute=compute)
    if "first_B" not in batch:
        return hidden_BTD, next_tokens(batch["tokens_BT"])
    return response_window(hidden_BTD, batch["tokens_BT"], batch["first_B"], width=batch["mask_BT"].shape[1])


def _aligned(value_BT: jax.Array, batch: Batch) -> jax.Array:
    return value_BT if "first_B" in batch else align_to_target(value_BT)


def preference(
    name: str, config: ModelConfig, *, beta: float, compute: Compute = DEFAULT_COMPUTE, view: View = full_view
) -> LossFn:
    """DPO or IPO over summed response log-probabilities. Batch: tokens_BT, mask_BT, ref_logp_B (chosen, then rejected)."""
    objective = {"dpo": dpo_loss, "ipo": ipo_loss}[name]

    def loss(params: Any, frozen: Any, batch: Batch, key: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        del key
        logp_B = response_logps(view(params, frozen, batch), batch, config=config, compute=compute).sum(-1)
        pairs = logp_B.shape[0] // 2
        margin_B = (logp_B - batch["ref_logp_B"])[:pairs] - (logp_B - batch["ref_logp_B"])[pairs:]
        value = objective(
            policy_chosen_B=logp_B[:pairs],
            policy_rejected_B=logp_B[pairs:],
            ref_chosen_B=batch["ref_logp_B"][:pairs],
            ref_rejected_B=batch["ref_logp_B"][pairs:],
            beta=beta,
        )
        return value, {"accuracy": (margin_B > 0).mean(), "margin": margin_B.mean()}

    return loss


def online(
    config: ModelConfig,
    *,
    algorithm: str,
    temperature: float,
    beta: float,
    gamma: float,
    clip: float,
    staleness_cap: float,
    kl: str = "sampled",
    view: View = full_view,
    compute: Compute = DEFAULT_COMPUTE,
) -> LossFn:
    """An algorithm of `objectives/online.py`. Batch: tokens_BT, what `online_loss` lists, first_B (see `response_logps`).

    The `full` form of MDLOO's KL compares with frozen["behavior"], theta_k; at theta_k itself (no behavior_logp_BT in the
    batch) its gradient is zero, and nothing is computed. It reports what `online_loss` does, and logp_BT of every position.
    """
    how: dict[str, Any] = {"config": config, "compute": compute}

    def loss(params: Any, frozen: Any, batch: Batch, key: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        del key
        seen = view(params, frozen, batch)
        hidden_BTD, next_BT = _predictions(seen, batch, **how)
        kl_BT = None
        if kl == "full" and "behavior_logp_BT" in batch:
            behind = view(frozen["behavior"], frozen, batch)
            behind_BTD, _ = _predictions(behind, batch, **how)
            scored = score_against(seen, hidden_BTD, behind, behind_BTD, next_BT, temperature=temperature, **how)
            logp_BT, kl_BT = (_aligned(value_BT, batch) for value_BT in scored)
        else:
            logp_BT = map_logits(partial(_next_logp, temperature=temperature), seen, hidden_BTD, [next_BT], **how)
            logp_BT = _aligned(logp_BT, batch)
        constants: dict[str, Any] = {"gamma": gamma, "clip": clip, "beta": beta, "staleness_cap": staleness_cap}
        value, of_sequence = online_loss(algorithm, batch, logp_BT, kl_BT=kl_BT, **constants)
        return value, {**of_sequence, "logp_BT": jax.lax.stop_gradient(logp_BT)}

    return loss


def build(objective: str, config: ModelConfig, options: Mapping[str, Any], *, view: View = full_view) -> LossFn:
    """The loss of a training job by name. Raises ValueError naming the known objectives."""
    if objective == "supervised":
        return supervised(config, view=view, **options)
    if objective == "distillation":
        return distillation(config, view=view, **options)
    if objective == "reward":
        return reward(config, **options)
    if objective in ("dpo", "ipo"):
        return preference(objective, config, view=view, **options)
    if objective == "online":
        return online(config, view=view, **options)
    raise ValueError(f"unknown objective {objective!r}; known: supervised, distillation, reward, dpo, ipo, online")
