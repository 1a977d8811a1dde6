"""Structural pruning of the feed-forward hidden dimension (3.2.1): learn masks by Soft-Top-K, then keep the best units.

Only the FFN hidden dimension is pruned. While masks are learnt, every hidden unit h_f is multiplied by its mask entry; the
model's parameters and one score per unit are trained together on the core mixture. `prune` then cuts the model down to the
kept units, which initialise the smaller model.

Shapes: L layers, F hidden units, k kept units per layer.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from afm_rl.config import ModelConfig
from afm_rl.model import Params
from afm_rl.training import Batch
from pretrain.soft_topk import soft_top_k

#: Temperature of the masks at the first and at the last step: soft enough to move, then nearly hard.
EPS_START, EPS_END = 1.0, 0.05


def init_scores(config: ModelConfig) -> jax.Array:
    """Scores [L, F] that start equal: every unit kept to the same degree."""
    return jnp.zeros((config.num_layers, config.ffn_dim), jnp.float32)


def eps_at(step: int, *, steps: int) -> float:
    """Geometric path from EPS_START to EPS_END over the run."""
    progress = min(1.0, step / max(1, steps - 1))
    return EPS_START * (EPS_END / EPS_START) ** progress


def masked_params(params: Params, scores_LF: jax.Array, *, k: int, eps: float | jax.Array) -> Params:
    """The model with its FFN masks: `afm_rl.model.block` multiplies the hidden units by `ffn_mask`."""
    mask_LF = soft_top_k(scores_LF, k=k, eps=eps)
    return {**params, "layers": {**params["layers"], "ffn_mask": mask_LF}}


def mask_view(*, k: int) -> Callable[[Any, Any, Batch], Params]:
    """What is trained is {"model": parameters, "scores": [L, F]}; the batch brings the step's temperature as "eps"."""
    return lambda params, frozen, batch: masked_params(params["model"], params["scores"], k=k, eps=batch["eps"])


def kept_units(scores_LF: Any, *, k: int) -> np.ndarray:
    """Indices [L, k] of the k best units of every layer, in their original order; ties go to the lower index."""
    scores = np.asarray(scores_LF)
    if not 1 <= k <= scores.shape[1]:
        raise ValueError(f"cannot keep {k} of {scores.shape[1]} hidden units")
    return np.sort(np.argsort(-scores, axis=1, kind="stable")[:, :k], axis=1)


def prune(params: Params, scores_LF: Any, *, k: int, eps: float = EPS_END) -> Params:
    """The smaller model: the kept units' rows of gate and up and columns of down, scaled by their masks.

    With a hard mask it computes what the masked model computes. NumPy arrays; every other parameter is shared.
    """
    keep_Lk = kept_units(scores_LF, k=k)
    mask_LF = np.asarray(soft_top_k(jnp.asarray(scores_LF), k=k, eps=eps))
    layers = {name: np.asarray(leaf) for name, leaf in params["layers"].items() if name != "ffn_mask"}
    layers["gate"] = np.take_along_axis(layers["gate"], keep_Lk[:, :, None], axis=1)
    layers["up"] = np.take_along_axis(layers["up"], keep_Lk[:, :, None], axis=1)
    kept_mask = np.take_along_axis(mask_LF, keep_Lk, axis=1)
    layers["down"] = np.take_along_axis(layers["down"], keep_Lk[:, None, :], axis=2) * kept_mask[:, None, :]
    return {**jax.tree.map(np.asarray, {n: v for n, v in params.items() if n != "layers"}), "layers": layers}
