"""What a model says of given tokens, without ever holding the logits of a long batch whole.

At a vocabulary of 49k or 100k the [tokens, vocabulary] logits of one batch are gigabytes. Here they are made, used and
dropped in passes over the positions; the backward pass makes each pass's logits again. A pass takes positions spread over
the whole sequence, so that a sequence cut over the mesh stays cut.

Shapes: B batch, T time, D model, V vocab.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from afm_rl.compute import DEFAULT_COMPUTE, Compute
from afm_rl.config import ModelConfig
from afm_rl.model import logits
from afm_rl.objectives.sequence import TargetScores, align_to_target, next_tokens, score_next
from afm_rl.parameters import Params
from afm_rl.sharding import current_mesh


def score_tokens(
    params: Params,
    hidden_BTD: jax.Array,
    targets: Sequence[jax.Array],
    *,
    config: ModelConfig,
    compute: Compute = DEFAULT_COMPUTE,
    temperature: float = 1.0,
) -> list[TargetScores]:
    """`TargetScores` of each [B, T] array of tokens, from one look at the logits of the hidden states."""

    def score(logits_BCV: jax.Array, *next_BC: jax.Array) -> list[TargetScores]:
        return [score_next(logits_BCV, of, temperature=temperature) for of in next_BC]

    scores = map_logits(score, params, hidden_BTD, [next_tokens(t) for t in targets], config=config, compute=compute)
    return jax.tree.map(align_to_target, scores)


def top1_tokens(
    params: Params, hidden_BTD: jax.Array, *, config: ModelConfig, compute: Compute = DEFAULT_COMPUTE
) -> jax.Array:
    """What the model would have written in place of each token: int32 [B, T], entry 0 zero. It carries no gradient."""

    def top1(logits_BCV: jax.Array) -> jax.Array:
        return logits_BCV.argmax(axis=-1).astype(jnp.int32)

    return align_to_target(map_logits(top1, params, jax.lax.stop_gradient(hidden_BTD), [], config=config, compute=compute))


def score_against(
    params: Params,
    hidden_BTD: jax.Array,
    other: Params,
    other_BTD: jax.Array,
    next_BT: jax.Array,
    *,
    config: ModelConfig,
    compute: Compute = DEFAULT_COMPUTE,
    temperature: float = 1.0,
) -> tuple[jax.Array, jax.Array]:
    """log p of each position's next token, and KL(p || q) in nats of the two whole distributions there: [B, T] each.

    p is the policy's, q that of the parameters `other` with their own hidden states, which receive no gradient; both at
    the temperature. Neither result is aligned with its token yet, as in `score_next`.
    """
    other, other_BTD = jax.lax.stop_gradient((other, other_BTD))

    def score(logits_BCV: jax.Array, other_BCV: jax.Array, next_BC: jax.Array) -> tuple[jax.Array, jax.Array]:
        logp_BCV = jax.nn.log_softmax(_scaled(logits_BCV, temperature), axis=-1)
        difference_BCV = logp_BCV - jax.nn.log_softmax(_scaled(other_BCV, temperature), axis=-1)
        picked_BC = jnp.take_along_axis(logp_BCV, next_BC[..., None], axis=-1)[..., 0]
        return picked_BC, (jnp.exp(logp_BCV) * difference_BCV).sum(axis=-1)

    return _in_passes(score, [(params, hidden_BTD), (other, other_BTD)], [next_BT], config=config, compute=compute)


def response_window(
    hidden_BTD: jax.Array, tokens_BT: jax.Array, first_B: jax.Array, *, width: int
) -> tuple[jax.Array, jax.Array]:
    """The positions that predict tokens first .. first + width - 1 of each row, and those tokens: [B, width, D], [B, width].

    Prompts need no logits, which are most of what a small model costs. Past the end of a row the last position stands in:
    mask it out.
    """
    index_BT = jnp.clip(first_B[:, None] - 1 + jnp.arange(width), 0, tokens_BT.shape[1] - 2)
    window_BTD = jnp.take_along_axis(hidden_BTD, index_BT[..., None], axis=1)
    return window_BTD, jnp.take_along_axis(jnp.asarray(tokens_BT), index_BT + 1, axis=1)


def _scaled(logits_BCV: jax.Array, temperature: float) -> jax.Array:
    return logits_BCV.astype(jnp.promote_types(logits_BCV.dtype, jnp.float32)) / temperature


def map_logits(
    fn: Callable[..., Any],
    params: Params,
    hidden_BTD: jax.Array,
    aligned: Sequence[jax.Array],
    *,
    config: ModelConfig,
    compute: Compute,
) -> Any:
    """fn(logits [B, C, V], *aligned [B, C]) over all positions, C at a time: its [B, C] results joined to [B, T]."""
    return _in_passes(fn, [(params, hidden_BTD)], aligned, config=config, compute=compute)


def _in_passes(
    fn: Callable[..., Any],
    sources: Sequence[tuple[Params, jax.Array]],
    aligned: Sequence[jax.Array],
    *,
    config: ModelConfig,
    compute: Compute,
) -> Any:
    """`map_logits` with the logits of several (parameters, hidden states) side by side."""
    B, T = sources[0][1].shape[:2]
    mesh = current_mesh()
    budget = compute.logits_per_pass * (mesh.size if mesh is not None else 1)
    passes = min(max(math.ceil(B * T * config.vocab_size * len(sources) / budget), 1), T)
    tables = [params for params, _ in sources]

    def apply(hidden: Sequence[jax.Array], *others: jax.Array) -> Any:
        return fn(*(logits(table, h_BCD, config) for table, h_BCD in zip(tables, hidden, strict=True)), *others)

    if passes == 1:
        return apply([hidden_BTD for _, hidden_BTD in sources], *aligned)
    C = math.ceil(T / passes)

    @jax.checkpoint
    def one(inputs: tuple[list[jax.Array], list[jax.Array]]) -> Any:
        return apply(inputs[0], *inputs[1])

    def spread(x_BT: jax.Array) -> jax.Array:
        padded = jnp.pad(x_BT, [(0, 0), (0, C * passes - T)] + [(0, 0)] * (x_BT.ndim - 2))
        return jnp.moveaxis(padded.reshape(B, C, passes, *x_BT.shape[2:]), 2, 0)

    outputs = jax.lax.map(one, ([spread(hidden_BTD) for _, hidden_BTD in sources], [spread(a) for a in aligned]))
    return jax.tree.map(lambda out: jnp.moveaxis(out, 0, 2).reshape(B, C * passes)[:, :T], outputs)
