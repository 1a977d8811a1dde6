"""Structural pruning (section 3.2.1): which hidden units of the feed-forward layers to keep is learned, the rest dropped.

As in the paper only the FFN hidden dimension is pruned, with Soft-Top-K masks, on the data mixture of core pre-training.
Weights and scores are trained together, as in Xia et al. 2023, which the paper follows; eps falls geometrically, so that
the masks end close to 0 or 1. The paper gives no eps: the values here are ours, in units of the scores, which the AFM
optimizer moves by at most its learning rate a step.

Shapes: L layers, F hidden units before pruning, D model, k hidden units kept.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from afm_rl.config import ModelConfig
from afm_rl.model import Params
from afm_rl.objectives.supervised import cross_entropy
from afm_rl.policy_losses import sequence_logits
from afm_rl.training import Batch, LossFn
from pretrain.soft_topk import soft_topk

EPS_START, EPS_END = 0.5, 0.01


def epsilon(step: int, total_steps: int, *, start: float = EPS_START, end: float = EPS_END) -> float:
    """The temperature of the masks at `step`: geometric from `start` at step 0 to `end` at the last step."""
    progress = min(step / max(total_steps - 1, 1), 1.0)
    return start * (end / start) ** progress


def with_scores(params: Params) -> Params:
    """What mask learning trains: {"params": the model's, "scores": zeros [L, F]} (every mask entry starts at k / F)."""
    layers, hidden, _ = params["layers"]["gate"].shape
    return {"params": params, "scores": jnp.zeros((layers, hidden), jnp.float32)}


def masked_params(params: Params, scores_LF: jax.Array, k: int, eps: float | jax.Array) -> Params:
    """`params` with the Soft-Top-K mask of every layer as layers["ffn_mask"] [L, F], which the model multiplies in."""
    return {**params, "layers": {**params["layers"], "ffn_mask": soft_topk(scores_LF, k, eps)}}


def mask_loss(config: ModelConfig, *, k: int, compute_dtype: Any = jnp.float32, z_loss: float = 0.0) -> LossFn:
    """The objective of mask learning: next-token cross-entropy of the masked model, over the tree of `with_scores`.

    The batch carries its step's `epsilon` (a scalar) beside tokens_BT and mask_BT, so that it is a function of the step.
    """

    def loss(params: Any, frozen: Any, batch: Batch, key: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        del frozen, key
        masked = masked_params(params["params"], params["scores"], k, batch["epsilon"])
        logits_BTV = sequence_logits(masked, batch, config=config, compute_dtype=compute_dtype)
        value, metrics = cross_entropy(logits_BTV, batch["tokens_BT"], batch["mask_BT"], z_loss=z_loss)
        mask_LF = masked["layers"]["ffn_mask"]
        undecided = jnp.mean((mask_LF > 0.05) & (mask_LF < 0.95))
        return value, {**metrics, "mask_undecided": undecided, "epsilon": jnp.asarray(batch["epsilon"], jnp.float32)}

    return loss


def kept_units(scores_LF: jax.Array, k: int) -> jax.Array:
    """Indices [L, k] of the k best-scored hidden units of every layer, ascending; of equal scores the first is kept."""
    order = jnp.argsort(-scores_LF, axis=-1, stable=True)[:, :k]
    return jnp.sort(order, axis=-1)


def prune(params: Params, scores_LF: jax.Array, k: int) -> Params:
    """The smaller model, initialised from the kept units in their order: gate and up [L, k, D], down [L, D, k].

    The masks themselves are dropped: the kept ones are 1 when learning is over. Raises ValueError when the scores do not
    fit or there are not k units.
    """
    layers = dict(params["layers"])
    if tuple(scores_LF.shape) != tuple(layers["gate"].shape[:2]) or not 1 <= k <= scores_LF.shape[1]:
        raise ValueError(
            f"cannot keep {k} units: gate {tuple(layers['gate'].shape)} needs scores [L, F] with F >= k, "
            f"got {tuple(scores_LF.shape)}"
        )
    kept_Lk = kept_units(scores_LF, k)
    layers.pop("ffn_mask", None)
    layers["gate"] = jnp.take_along_axis(layers["gate"], kept_Lk[:, :, None], axis=1)
    layers["up"] = jnp.take_along_axis(layers["up"], kept_Lk[:, :, None], axis=1)
    layers["down"] = jnp.take_along_axis(layers["down"], kept_Lk[:, None, :], axis=2)
    return {**params, "layers": layers}
