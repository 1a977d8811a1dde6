"""Scores made in passes over the positions against those from whole logits: values, gradients, memory."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from afm_rl.compute import Compute
from afm_rl.config import ModelConfig
from afm_rl.objectives.sequence import score_targets
from afm_rl.token_scores import response_window, score_against, score_tokens, top1_tokens

CONFIG = ModelConfig(31, 8, 16, 1, 2, 1, 4)
B, T = 2, 13
#: Room for the logits of 3 positions of both rows: five passes, the last ones with a position to spare.
IN_PASSES = Compute(logits_per_pass=3 * B * 31)


def case() -> tuple[dict[str, Any], np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    table = rng.normal(size=(31, 8)).astype(np.float32)
    return {"embed": {"weight": table}}, rng.normal(size=(B, T, 8)).astype(np.float32), rng.integers(0, 31, (B, T))


@partial(jax.jit, static_argnames="compute")
def loss(params: Any, hidden: jax.Array, tokens: jax.Array, compute: Compute) -> jax.Array:
    first, second = score_tokens(params, hidden, [tokens, tokens[::-1]], config=CONFIG, compute=compute, temperature=0.7)
    return (first.logp_BT * jnp.arange(T)).sum() + jnp.square(first.log_normalizer_BT).sum() - second.logp_BT.sum()


def test_passes_give_the_scores_of_the_whole() -> None:
    """Guards that every position is scored once and in its place, for several targets at once."""
    params, hidden, tokens = case()
    scores = score_tokens(params, hidden, [tokens], config=CONFIG, compute=IN_PASSES)[0]
    expected = score_targets(jnp.einsum("btd,vd->btv", hidden, params["embed"]["weight"]), tokens)
    for found, whole in zip(scores, expected, strict=True):
        np.testing.assert_allclose(found, whole, rtol=2e-5, atol=1e-5)


def test_passes_give_the_gradients_of_the_whole() -> None:
    """Guards the backward pass of the loop: of the hidden states and of the table, which every pass adds to."""
    params, hidden, tokens = case()
    whole = jax.grad(loss, argnums=(0, 1))(params, hidden, tokens, Compute())
    passes = jax.grad(loss, argnums=(0, 1))(params, hidden, tokens, IN_PASSES)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), passes, whole)


def test_the_teachers_tokens_are_aligned_and_carry_no_gradient() -> None:
    """Guards the shift: entry t replaces token t, and entry 0 is nobody's prediction."""
    params, hidden, _ = case()
    top1 = np.asarray(top1_tokens(params, hidden, config=CONFIG, compute=IN_PASSES))
    np.testing.assert_array_equal(top1[:, 1:], (hidden @ params["embed"]["weight"].T).argmax(-1)[:, :-1])
    assert top1.dtype == np.int32
    assert (top1[:, 0] == 0).all()


@partial(jax.jit, static_argnames="compute")
def kl_and_logp(tables: Any, hidden: Any, tokens: jax.Array, compute: Compute) -> tuple[jax.Array, jax.Array]:
    own, other = ({"embed": {"weight": table}} for table in tables)
    how: dict[str, Any] = {"config": CONFIG, "compute": compute, "temperature": 0.7}
    return score_against(own, hidden[0], other, hidden[1], tokens, **how)


def test_two_policies_are_compared_over_the_whole_vocabulary() -> None:
    """Guards KL(p || q) at every position, its direction, the temperature on both, whole and in passes, in NumPy."""
    (_, first, tokens), rng = case(), np.random.default_rng(1)
    tables, hidden = rng.normal(size=(2, 31, 8)).astype(np.float32), (first, first + rng.normal(size=first.shape) * 0.3)
    logits = [np.einsum("btd,vd->btv", h, table, dtype=np.float64) / 0.7 for h, table in zip(hidden, tables, strict=True)]
    p, q = (x - np.log(np.exp(x).sum(-1, keepdims=True)) for x in logits)
    for compute in (Compute(), IN_PASSES):
        logp, kl = kl_and_logp(tables, hidden, tokens, compute)
        np.testing.assert_allclose(kl, (np.exp(p) * (p - q)).sum(-1), rtol=1e-4)
        np.testing.assert_allclose(logp, np.take_along_axis(p, tokens[..., None], -1)[..., 0], rtol=1e-4, atol=1e-5)


def test_the_gradient_of_the_kl_is_the_policys_alone() -> None:
    """Guards theta_k, which is a constant, and passes against the whole in the backward pass."""
    (_, hidden, tokens), rng = case(), np.random.default_rng(1)
    tables = rng.normal(size=(2, 31, 8)).astype(np.float32)

    def total(tables: Any, hidden: Any, compute: Compute) -> jax.Array:
        logp, kl = kl_and_logp(tables, hidden, tokens, compute)
        return (kl * jnp.arange(T)).sum() + logp.sum()

    slope = jax.jit(jax.grad(total, argnums=(0, 1)), static_argnames="compute")
    whole, passes = (slope(tables, (hidden, hidden[::-1]), compute=c) for c in (Compute(), IN_PASSES))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-3), passes, whole)
    assert np.any(whole[0][0])
    assert np.any(whole[1][0])
    assert not np.any(whole[0][1])
    assert not np.any(whole[1][1])


def test_a_window_begins_at_each_rows_first_target() -> None:
    """Guards the shift by one inside a window, a prompt of one token, and windows that reach past the row's end."""
    _, hidden, tokens = case()
    window, following = response_window(jnp.asarray(hidden), jnp.asarray(tokens), jnp.array([1, 10]), width=5)
    np.testing.assert_array_equal(window[0], hidden[0, :5])
    np.testing.assert_array_equal(following[0], tokens[0, 1:6])
    np.testing.assert_array_equal(window[1, :3], hidden[1, 9:12])
    np.testing.assert_array_equal(following[1, :3], tokens[1, 10:13])


def test_logits_are_never_whole_in_memory() -> None:
    """Guards the point of it: at a vocabulary of 49k, forward and backward stay far below one copy of the logits."""
    config = ModelConfig(49_152, 8, 16, 1, 2, 1, 4)
    shapes = jax.ShapeDtypeStruct((49_152, 8), jnp.float32), jax.ShapeDtypeStruct((4, 256, 8), jnp.float32)

    def nll(table: jax.Array, hidden: jax.Array, compute: Compute) -> jax.Array:
        tokens = jnp.zeros((4, 256), jnp.int32)
        params = {"embed": {"weight": table}}
        return score_tokens(params, hidden, [tokens], config=config, compute=compute)[0].logp_BT.sum()

    whole_bytes = 4 * 256 * 49_152 * 4

    def temporary_bytes(compute: Compute) -> int:
        program = jax.jit(partial(jax.grad(nll, argnums=(0, 1)), compute=compute)).lower(*shapes).compile()
        return program.memory_analysis().temp_size_in_bytes

    assert temporary_bytes(Compute(logits_per_pass=2**21)) < whole_bytes / 4
    assert temporary_bytes(Compute(logits_per_pass=2**30)) > whole_bytes / 2
