"""The multi-head reward model of E.1: a decoder, one linear reward head and four MLP grading heads on the last token.

The heads read the last-layer embedding (after the final norm) of the last non-padding token. Parameters: {"trunk": a
Transformer's, "heads": {"reward": [1, D], GRADING: {"up": [D, D], "down": [3, D]}}}.

Shapes: B batch, T time, D model; gradings in the order of `types.GRADINGS`, 3 classes each.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from afm_rl.compute import DEFAULT_COMPUTE, Compute
from afm_rl.config import ModelConfig
from afm_rl.dense import dense
from afm_rl.model import forward
from afm_rl.parameters import Params
from afm_rl.types import GRADINGS

CLASSES = 3


class Scores(NamedTuple):
    """reward_B and grade logits per grading [B, 3]."""

    reward_B: jax.Array
    grade_logits: dict[str, jax.Array]


def init_heads(config: ModelConfig, key: jax.Array) -> Params:
    """Heads for a trunk of this shape; the reward head starts at zero, so that every response starts equal."""
    D = config.dim
    heads: Params = {"reward": jnp.zeros((1, D), jnp.float32)}
    for name, head_key in zip(GRADINGS, jax.random.split(key, len(GRADINGS)), strict=True):
        up_key, down_key = jax.random.split(head_key)
        heads[name] = {
            "up": D**-0.5 * jax.random.normal(up_key, (D, D), jnp.float32),
            "down": D**-0.5 * jax.random.normal(down_key, (CLASSES, D), jnp.float32),
        }
    return heads


def score(
    params: Params,
    tokens_BT: jax.Array,
    length_B: jax.Array,
    *,
    config: ModelConfig,
    compute: Compute = DEFAULT_COMPUTE,
    dropout_rate: float = 0.0,
    key: jax.Array | None = None,
) -> Scores:
    """r(x, y) and the grade logits of right-padded sequences whose real lengths are `length_B` (at least 1)."""
    hidden_BTD = forward(params["trunk"], tokens_BT, config=config, compute=compute, dropout_rate=dropout_rate, key=key)
    last_BD = jnp.take_along_axis(hidden_BTD, (length_B - 1)[:, None, None], axis=1)[:, 0].astype(jnp.float32)
    heads = params["heads"]
    grades = {name: dense(jax.nn.gelu(dense(last_BD, heads[name]["up"])), heads[name]["down"]) for name in GRADINGS}
    return Scores(dense(last_BD, heads["reward"])[:, 0], grades)
