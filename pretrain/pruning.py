"""Structural pruning (section 3.2.1): which hidden units of the feed-forward layers to keep is learned; the rest goes.

As in the paper, only the FFN hidden dimension is pruned, with Soft-Top-K masks, on core pre-training's data mixture.
The weights are trained along with the scores, as in Xia et al. 2023, which the paper follows. The temperature eps falls
geometrically, so that the masks end at 0 or 1; the paper gives no values, ours suit scores that the AFM optimizer moves
by about 0.003 a step for a hundred steps.

Shapes: L layers, F hidden units before pruning, k after, D model.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from afm_rl.config import ModelConfig
from afm_rl.parameters import Params
from afm_rl.policy_losses import View
from afm_rl.training import Batch
from pretrain.soft_topk import soft_topk

#: The masks' temperature at the first and at the last step (ours).
EPS_START, EPS_END = 0.1, 0.002


def eps_at(step: int, *, steps: int, start: float = EPS_START, end: float = EPS_END) -> float:
    """The temperature of the masks at `step` of 0..steps-1: geometric from `start` to `end`."""
    return start * (end / start) ** min(step / max(steps - 1, 1), 1.0)


def init_scores(config: ModelConfig) -> jax.Array:
    """Scores [L, F] that prefer no unit: every mask entry starts at k / F."""
    return jnp.zeros((config.num_layers, config.ffn_dim), jnp.float32)


def masked_params(params: Params, scores_LF: jax.Array, k: int, eps: float | jax.Array) -> Params:
    """`params` with the Soft-Top-K mask of every layer as layers["ffn_mask"] [L, F], which the model multiplies in."""
    return {**params, "layers": {**params["layers"], "ffn_mask": soft_topk(scores_LF, k, eps)}}


def mask_view(*, k: int) -> View:
    """Mask learning trains {"model": parameters, "scores": [L, F]}; the model runs with the masks multiplied in.

    The temperature is the batch's "eps" (a scalar: a batch is a function of its step); EPS_END for a batch without one.
    """

    def view(params: Any, frozen: Any, batch: Batch) -> Params:
        del frozen
        return masked_params(params["model"], params["scores"], k, batch.get("eps", EPS_END))

    return view


def kept_units(scores_LF: jax.Array, k: int) -> jax.Array:
    """Indices [L, k] of the k best-scored units of every layer, ascending; of equal scores the first ones are kept."""
    return jnp.sort(jnp.argsort(-scores_LF, axis=-1, stable=True)[:, :k], axis=-1)


def prune(params: Params, scores_LF: jax.Array, k: int) -> Params:
    """The smaller model, initialised from the kept units in their order: gate and up [L, k, D], down [L, D, k].

    The masks are dropped with the scores: those of the kept units end at 1. Raises ValueError when the scores are not
    [L, F] or k is not within 1..F.
    """
    layers = {name: leaf for name, leaf in params["layers"].items() if name != "ffn_mask"}
    shape = tuple(layers["gate"].shape[:2])
    if tuple(scores_LF.shape) != shape or not 1 <= k <= shape[1]:
        raise ValueError(f"cannot keep {k} units of {shape} (layers, units) by scores {tuple(scores_LF.shape)}")
    kept_Lk = kept_units(jnp.asarray(scores_LF), k)
    layers["gate"] = jnp.take_along_axis(layers["gate"], kept_Lk[:, :, None], axis=1)
    layers["up"] = jnp.take_along_axis(layers["up"], kept_Lk[:, :, None], axis=1)
    layers["down"] = jnp.take_along_axis(layers["down"], kept_Lk[:, None, :], axis=2)
    return {**params, "layers": layers}
