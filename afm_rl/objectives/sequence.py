"""What the objectives share: log-probabilities of given tokens, their sums and means under a mask.

Everything is aligned with the TOKEN, not with the position that predicts it: entry t is about token t given tokens < t,
so entry 0 is never a target. Masks are 1 where a token is a target. Logits at position t predict token t + 1, and are
promoted to float32 at least (float64 stays float64). Values under a zero mask are selected away, whatever they hold.

Shapes: B batch, T time, V vocab.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp


class TargetScores(NamedTuple):
    """What one pass over the logits says of the target tokens; entry 0 of each row is zero (False)."""

    logp_BT: jax.Array  # log p(token t | tokens < t)
    log_normalizer_BT: jax.Array  # log sum exp of the logits that predict token t
    is_top1_BT: jax.Array  # bool: no token had a larger logit


def require_shape(name: str, array: jax.typing.ArrayLike, shape: tuple[int, ...]) -> None:
    """Raise ValueError naming the argument, its shape and the expected one: a loss broadcast by accident is silent."""
    if jnp.shape(array) != shape:
        raise ValueError(f"{name} must have shape {shape}, got {jnp.shape(array)}")


def align_to_target(value_BT: jax.Array) -> jax.Array:
    """Move what position t says of token t + 1 to entry t + 1; entry 0 becomes zero."""
    return jnp.pad(value_BT[:, :-1], ((0, 0), (1, 0)))


def next_tokens(tokens_BT: jax.typing.ArrayLike) -> jax.Array:
    """The token after each position; 0 after the last, which predicts nothing."""
    return jnp.pad(jnp.asarray(tokens_BT)[:, 1:], ((0, 0), (0, 1)))


def score_next(logits_BTV: jax.Array, next_BT: jax.Array, *, temperature: float = 1.0) -> TargetScores:
    """What the logits at each position say of the token after it, not yet aligned with that token.

    Raises ValueError on a shape mismatch or a temperature that is not positive.
    """
    if isinstance(temperature, int | float) and not temperature > 0:
        raise ValueError(f"temperature must be positive to have log-probabilities, got {temperature}")
    require_shape("tokens_BT", next_BT, logits_BTV.shape[:2])
    logits_BTV = logits_BTV.astype(jnp.promote_types(logits_BTV.dtype, jnp.float32)) / temperature
    picked_BT = jnp.take_along_axis(logits_BTV, next_BT[..., None], axis=-1)[..., 0]
    log_normalizer_BT = jax.nn.logsumexp(logits_BTV, axis=-1)
    # Comparing with the maximum is several times cheaper on CPU than an argmax.
    is_top1_BT = picked_BT >= jax.lax.stop_gradient(logits_BTV).max(axis=-1)
    return TargetScores(picked_BT - log_normalizer_BT, log_normalizer_BT, is_top1_BT)


def score_targets(logits_BTV: jax.Array, tokens_BT: jax.Array, *, temperature: float = 1.0) -> TargetScores:
    """Log-probabilities of the tokens under softmax(logits / temperature), with the normalizer and top-1 agreement.

    Raises as `score_next`.
    """
    # Shift the tokens and the results, never the logits: the gradient of a sliced [B, T, V] is another [B, T, V] copy.
    return TargetScores(*map(align_to_target, score_next(logits_BTV, next_tokens(tokens_BT), temperature=temperature)))


def token_logps(logits_BTV: jax.Array, tokens_BT: jax.Array, *, temperature: float = 1.0) -> jax.Array:
    """log p(token t | tokens < t) at the given temperature: [B, T], entry 0 zero, float32 at least."""
    return score_targets(logits_BTV, tokens_BT, temperature=temperature).logp_BT


def masked_sum(value_BT: jax.Array, mask_BT: jax.Array) -> jax.Array:
    """Sum over time of the entries with a positive mask: [B]. The others receive no gradient."""
    require_shape("mask_BT", mask_BT, jnp.shape(value_BT))
    return jnp.where(jnp.asarray(mask_BT) > 0, value_BT, 0).sum(axis=-1)


def sequence_logp(logp_BT: jax.Array, mask_BT: jax.Array) -> jax.Array:
    """log pi(y | x): the SUM of the response's token log-probabilities, [B]. Never a mean (appendix E.2)."""
    return masked_sum(logp_BT, mask_BT)


def token_mean(value_BT: jax.Array, mask_BT: jax.Array) -> jax.Array:
    """Mean over every target of the batch: a scalar, 0 where there is none."""
    num_tokens = (jnp.asarray(mask_BT) > 0).sum()
    return masked_sum(value_BT, mask_BT).sum() / jnp.maximum(num_tokens, 1)


def response_mask(*, prompt_length_B: jax.Array, total_length_B: jax.Array, num_tokens: int) -> jax.Array:
    """Float32 mask [B, num_tokens] of right-padded rows: 1 from the first response token to the last real one."""
    t_T = jnp.arange(num_tokens)
    start_B, stop_B = jnp.maximum(jnp.asarray(prompt_length_B), 1), jnp.asarray(total_length_B)
    return ((t_T >= start_B[:, None]) & (t_T < stop_B[:, None])).astype(jnp.float32)
