"""Several responses to one prompt in one pass that computes the prompt once, for training on them.

A padded batch has each prompt as often as it has responses, and computes it as often: a third of all positions where a
response is twice as long as its prompt. Here the positions of a microbatch lie in one flat row, prompts first; every
layer's attention takes them apart again, and a response sees its own past and its prompt's. The result is that of
`model.forward` on the padded rows up to rounding; gradients of the prompt add up over its responses. Attention over the
responses is dense: `fits` says for which lengths that is worth it.

Shapes: P prompts, S prompt tokens, G responses per prompt, R response tokens, D model, N query heads, K kv heads, H head.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from afm_rl.attention import causal_attention
from afm_rl.compute import DEFAULT_COMPUTE, Compute
from afm_rl.config import ModelConfig
from afm_rl.model import forward_with
from afm_rl.parameters import Params

#: Longest prompt and response together: the scores of longer ones would be larger than everything else of a layer.
MAX_TOKENS = 512


def fits(*, prompt_tokens: int, response_tokens: int, group: int, row_tokens: int) -> bool:
    """Whether to compute prompts of this padded length once for `group` responses, rather than rows of `row_tokens`."""
    shared = prompt_tokens + group * response_tokens
    return prompt_tokens + response_tokens <= MAX_TOKENS and shared < 0.9 * group * row_tokens


def response_states(
    params: Params,
    prompt_PS: jax.Array,
    length_P: jax.Array,
    response_PGR: jax.Array,
    *,
    config: ModelConfig,
    compute: Compute = DEFAULT_COMPUTE,
) -> jax.Array:
    """The hidden states after the final norm that predict each response token -> [P, G, R, D].

    Prompts and responses are padded to the right; `length_P` are the prompts' own lengths, at least 1.
    """
    (P, S), (_, G, R) = prompt_PS.shape, response_PGR.shape
    before_PGR = response_PGR[..., :-1]  # the last token predicts nothing
    tokens = jnp.concatenate([prompt_PS.reshape(-1), before_PGR.reshape(-1)])[None]
    place_PGR = jnp.broadcast_to(length_P[:, None, None] + jnp.arange(R - 1), before_PGR.shape)
    positions = jnp.concatenate([jnp.tile(jnp.arange(S), P), place_PGR.reshape(-1)])[None]
    visible_PS = jnp.arange(S) < length_P[:, None]

    def attend(q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[jax.Array, None]:
        of_prompt = [x[0, : P * S].reshape(P, S, *x.shape[2:]) for x in (q, k, v)]
        of_response = [x[0, P * S :].reshape(P, G, R - 1, *x.shape[2:]) for x in (q, k, v)]
        first = causal_attention(*of_prompt, implementation=compute.attention)
        second = _attend_to_both(of_response, of_prompt, visible_PS)
        return jnp.concatenate([x.reshape(1, -1, *x.shape[-2:]) for x in (first, second)], axis=1), None

    hidden = forward_with(params, tokens, positions, attend, config=config, compute=compute)[0]
    prompt_PSD = hidden[: P * S].reshape(P, S, -1)
    last_P1D = jnp.take_along_axis(prompt_PSD, (length_P - 1)[:, None, None], axis=1)
    first_PG1D = jnp.broadcast_to(last_P1D[:, None], (P, G, 1, config.dim))
    return jnp.concatenate([first_PG1D, hidden[P * S :].reshape(P, G, R - 1, -1)], axis=2)


def _attend_to_both(of_response: Sequence[jax.Array], of_prompt: Sequence[jax.Array], visible_PS: jax.Array) -> jax.Array:
    """softmax over the visible prompt and the response's own past: (q, k, v) [P, G, R, N or K, H], [P, S, ...] -> as q."""
    (q, k, v), (_, prompt_k, prompt_v) = of_response, of_prompt
    P, G, R, N, H = q.shape
    K = k.shape[3]
    q = q.reshape(P, G, R, K, N // K, H)
    wide: dict[str, Any] = {"preferred_element_type": jnp.float32}
    to_prompt = jnp.einsum("pgrkmh,pskh->pgkmrs", q, prompt_k, **wide) / math.sqrt(H)
    to_own = jnp.einsum("pgrkmh,pgtkh->pgkmrt", q, k, **wide) / math.sqrt(H)
    lowest = jnp.finfo(jnp.float32).min
    to_prompt = jnp.where(visible_PS[:, None, None, None, None], to_prompt, lowest)
    to_own = jnp.where(jnp.tril(jnp.ones((R, R), bool)), to_own, lowest)
    share = jax.nn.softmax(jnp.concatenate([to_prompt, to_own], axis=-1), axis=-1).astype(v.dtype)
    S = prompt_k.shape[1]
    mixed = jnp.einsum("pgkmrs,pskh->pgrkmh", share[..., :S], prompt_v, **wide)
    mixed = mixed + jnp.einsum("pgkmrt,pgtkh->pgrkmh", share[..., S:], v, **wide)
    return mixed.reshape(P, G, R, N, H).astype(q.dtype)
