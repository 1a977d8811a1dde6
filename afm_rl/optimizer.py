"""The optimizer of section 3.2.4 (RMSProp with momentum, block-clipped updates) and AdamW, as optax chains.

    g     <- g clipped to a global norm of 1.0
    v     <- EMA of (g^2 + 1e-30), beta2 = 0.95;      u = g / sqrt(v / (1 - beta2^t))
    u     <- u / max(1, RMS(block of u) / 1.0)
    m     <- EMA of u, beta1 = 0.95, not bias-corrected
    delta  = -s_t (lr * muP * m + weight_decay * p)

The paper says "maximum norm of 1.0 per parameter block"; as in axlearn, that norm is the block's RMS. Layers are
stacked on axis 0 of every leaf under a "layers" key, and each layer is a block of its own. Weight decay covers every
parameter and is scaled by the schedule s_t only. Any nested dict of arrays can be trained: a model, LoRA adapters,
reward heads.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from afm_rl.schedules import Schedule

#: Width of the proxy model on which the learning rate was swept (paper 3.2.1): muParam (simple) is 1 there.
PROXY_WIDTH = 768

_STACKED = "layers"
#: Matrices that are not linear layers. An untied output embedding keeps the tied one's rate (ours); FFN mask scores are
#: not weights at all.
_NOT_LINEAR = frozenset({"embed", "lm_head", "scores"})


class RmsState(NamedTuple):
    """Updates so far, and the running mean of the squared gradients."""

    updates: jax.Array
    nu: Any


class SkipState(NamedTuple):
    """How many steps were skipped, and the state of the optimizer inside."""

    skipped: jax.Array
    inner: Any


def _names(path: tuple[Any, ...]) -> list[str]:
    return jax.tree_util.keystr(path, simple=True, separator="/").split("/")


def _is_stacked(path: tuple[Any, ...]) -> bool:
    return _STACKED in _names(path)


def linear_scale_tree(params: Any, width: int) -> Any:
    """muParam (simple) (3.2): 768 / width for linear layers, 1.0 for embeddings, norms, biases and mask scores.

    Args:
      params: nested dict of arrays; below a "layers" key, axis 0 is the layer and does not make a vector a matrix.
      width: the model's dimension (D), whatever the layer's own fan-in.
    Returns: a tree of floats like `params`.
    """
    if width < 1:
        raise ValueError(f"linear_scale_tree: width must be the model's dimension, at least 1, got {width}")

    def scale(path: tuple[Any, ...], leaf: Any) -> float:
        matrix = leaf.ndim - _is_stacked(path) >= 2
        return PROXY_WIDTH / width if matrix and _NOT_LINEAR.isdisjoint(_names(path)) else 1.0

    return jax.tree_util.tree_map_with_path(scale, params)


def scale_by_corrected_rms(b2: float = 0.95, eps: float = 1e-30) -> optax.GradientTransformation:
    """g / sqrt(v), v the bias-corrected EMA of g^2 + eps (3.2.4: eps is added to the square, before smoothing)."""

    def init(params: Any) -> RmsState:
        return RmsState(jnp.zeros((), jnp.int32), jax.tree.map(jnp.zeros_like, params))

    def update(updates: Any, state: RmsState, params: Any = None) -> tuple[Any, RmsState]:
        del params
        count = optax.safe_increment(state.updates)
        correction = 1.0 - b2**count
        nu = jax.tree.map(lambda g, v: b2 * v + (1.0 - b2) * (jnp.square(g) + eps), updates, state.nu)
        updates = jax.tree.map(lambda g, v: g / jnp.sqrt(v / correction.astype(v.dtype)), updates, nu)
        return updates, RmsState(count, nu)

    return optax.GradientTransformation(init, update)


def clip_by_block_rms(max_rms: float = 1.0) -> optax.GradientTransformation:
    """Scale every parameter block down to an RMS of at most `max_rms`; below "layers" each layer is a block (3.2.4)."""

    def clip(path: tuple[Any, ...], u: jax.Array) -> jax.Array:
        axes = tuple(range(int(_is_stacked(path)), u.ndim))
        rms = jnp.sqrt(jnp.mean(jnp.square(u), axis=axes, keepdims=True))
        return u / jnp.maximum(1.0, rms / max_rms)

    return optax.stateless(lambda updates, _: jax.tree_util.tree_map_with_path(clip, updates))


def skip_bad_steps(inner: optax.GradientTransformation, max_norm: float = 100.0) -> optax.GradientTransformation:
    """Skip steps whose global gradient norm is >= `max_norm` or not finite: no update, the state of `inner` untouched.

    They are counted: `skipped_steps`. `max_norm=math.inf` skips non-finite gradients only. Source: axlearn.
    """

    def init(params: Any) -> SkipState:
        return SkipState(jnp.zeros((), jnp.int32), inner.init(params))

    def update(updates: Any, state: SkipState, params: Any = None) -> tuple[Any, SkipState]:
        norm = optax.global_norm(updates)
        ok = jnp.isfinite(norm) & (norm < max_norm)
        new_updates, new_inner = inner.update(updates, state.inner, params)
        new_updates = jax.tree.map(lambda u: jnp.where(ok, u, jnp.zeros_like(u)), new_updates)
        new_inner = jax.tree.map(lambda new, old: jnp.where(ok, new, old), new_inner, state.inner)
        return new_updates, SkipState(state.skipped + (1 - ok.astype(jnp.int32)), new_inner)

    return optax.GradientTransformation(init, update)


def skipped_steps(opt_state: SkipState) -> jax.Array:
    """Steps skipped so far (int32 scalar) by an optimizer of this module."""
    return opt_state.skipped


def _scale_by_rate(peak_lr: float, width: int | None) -> optax.GradientTransformation:
    """Multiply by lr and, given a width, by muParam (simple)."""
    if width is None:
        return optax.scale(peak_lr)

    def scale(updates: Any, params: Any) -> Any:
        del params
        return jax.tree.map(lambda u, mup: (peak_lr * mup) * u, updates, linear_scale_tree(updates, width))

    return optax.stateless(scale)


def _descend(schedule: Schedule) -> optax.GradientTransformation:
    """Multiply by -s_t; optax counts finished updates from 0, the schedule numbers them from 1."""
    return optax.scale_by_schedule(lambda count: -schedule(count + 1))


def afm_optimizer(
    *,
    peak_lr: float,
    schedule: Schedule,
    weight_decay: float = 3.16e-4,
    width: int | None = None,
    clip_norm: float = 1.0,
    b1: float = 0.95,
    b2: float = 0.95,
    eps: float = 1e-30,
    block_rms: float = 1.0,
    skip_norm: float = 100.0,
) -> optax.GradientTransformation:
    """The paper's pre-training optimizer (3.2.4), by the equations of the module's docstring. Defaults are the paper's.

    Args:
      peak_lr: learning rate at a schedule of 1.
      schedule: factor of update t, peak 1.0 (`afm_rl/schedules.py`).
      weight_decay: of every parameter; NOT multiplied by the learning rate.
      width: the model's dimension, for muParam (simple) (`linear_scale_tree`); None trains everything at `peak_lr`.
      clip_norm: maximum global gradient norm.
      block_rms: maximum RMS of one block's update, before momentum.
      skip_norm: gradients of at least this global norm, or not finite, are skipped and counted (`skipped_steps`).
    """
    chain = optax.chain(
        optax.clip_by_global_norm(clip_norm),
        scale_by_corrected_rms(b2, eps),
        clip_by_block_rms(block_rms),
        optax.ema(b1, debias=False),
        _scale_by_rate(peak_lr, width),
        optax.add_decayed_weights(weight_decay),
        _descend(schedule),
    )
    return skip_bad_steps(chain, skip_norm)


def adamw(
    *,
    peak_lr: float,
    schedule: Schedule,
    weight_decay: float = 1e-4,
    width: int | None = None,
    clip_norm: float = 1.0,
    b1: float = 0.9,
    b2: float = 0.95,
    eps: float = 1e-15,
    skip_norm: float = math.inf,
) -> optax.GradientTransformation:
    """AdamW with global-norm clipping: delta = -s_t lr (muP * m / (sqrt(v) + eps) + weight_decay * p).

    Defaults are appendix A's baseline. As in torch, weight decay IS multiplied by the learning rate. Only non-finite
    gradients are skipped by default: objectives that sum over tokens (DPO, MDLOO) have large gradients by nature.
    """
    chain = optax.chain(
        optax.clip_by_global_norm(clip_norm),
        optax.scale_by_adam(b1=b1, b2=b2, eps=eps),
        _scale_by_rate(peak_lr, width),
        optax.add_decayed_weights(peak_lr * weight_decay),
        _descend(schedule),
    )
    return skip_bad_steps(chain, skip_norm)
