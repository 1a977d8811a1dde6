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
    B, T = hidden_BTD.shape[:2]
    mesh = current_mesh()
    budget = compute.logits_per_pass * (mesh.size if mesh is not None else 1)
    passes = min(max(math.ceil(B * T * config.vocab_size / budget), 1), T)
    if passes == 1:
        return fn(logits(params, hidden_BTD, config), *aligned)
    C = math.ceil(T / passes)

    @jax.checkpoint
    def one(inputs: tuple[jax.Array, list[jax.Array]]) -> Any:
        return fn(logits(params, inputs[0], config), *inputs[1])

    def spread(x_BT: jax.Array) -> jax.Array:
        padded = jnp.pad(x_BT, [(0, 0), (0, C * passes - T)] + [(0, 0)] * (x_BT.ndim - 2))
        return jnp.moveaxis(padded.reshape(B, C, passes, *x_BT.shape[2:]), 2, 0)

    outputs = jax.lax.map(one, (spread(hidden_BTD), [spread(a) for a in aligned]))
    return jax.tree.map(lambda out: jnp.moveaxis(out, 0, 2).reshape(B, C * passes)[:, :T], outputs)
