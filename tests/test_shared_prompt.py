"""Prompts computed once for their responses against padded rows: hidden states and gradients."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from afm_rl.config import ModelConfig
from afm_rl.model import forward
from afm_rl.parameters import init_params
from afm_rl.shared_prompt import fits, response_states

CONFIG = ModelConfig(31, 16, 32, 2, 4, 2, 4)
P, G, S, R = 3, 4, 7, 5


def case() -> tuple[Any, np.ndarray, np.ndarray, np.ndarray]:
    rng, length_P = np.random.default_rng(0), np.array([7, 1, 4], np.int32)
    params = jax.tree.map(lambda x: 2.0 * x, init_params(CONFIG, jax.random.key(0)))
    return params, rng.integers(1, 31, (P, S)), length_P, rng.integers(1, 31, (P, G, R))


def by_rows(params: Any, prompt: np.ndarray, length: np.ndarray, response: np.ndarray) -> jax.Array:
    """The same states from one row a response, by the plain forward pass."""
    rows = np.zeros((P * G, S + R), np.int32)
    for p in range(P):
        for g in range(G):
            rows[p * G + g, : length[p] + R] = np.concatenate([prompt[p, : length[p]], response[p, g]])
    hidden = forward(params, jnp.asarray(rows), config=CONFIG)
    index = (np.repeat(length, G) - 1)[:, None] + np.arange(R)
    return jnp.take_along_axis(hidden, index[..., None], axis=1).reshape(P, G, R, -1)


def test_states_and_gradients_are_those_of_padded_rows() -> None:
    """Guards positions, what each token sees, prompts of other lengths, and a prompt's gradient over its responses."""
    params, prompt, length, response = case()
    upstream = np.random.default_rng(1).normal(size=(P, G, R, CONFIG.dim)).astype(np.float32)

    def total(params: Any, prompt: Any, shared: bool) -> tuple[jax.Array, jax.Array]:
        found = (
            response_states(params, prompt, length, jnp.asarray(response), config=CONFIG)
            if shared
            else by_rows(params, prompt, length, response)
        )
        return (found * upstream).sum(), found

    run = jax.jit(lambda params: [jax.grad(total, has_aux=True)(params, prompt, shared) for shared in (True, False)])
    (slope, states), (expected_slope, expected) = run(params)
    np.testing.assert_allclose(states, expected, rtol=1e-4, atol=1e-4)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=2e-3), slope, expected_slope)


def test_what_stands_beyond_a_prompts_end_changes_nothing() -> None:
    """Guards padding inside the flat row, bit for bit."""
    params, prompt, length, response = case()
    other = np.where(np.arange(S) < length[:, None], prompt, 9)
    run = jax.jit(lambda prompt: response_states(params, prompt, length, jnp.asarray(response), config=CONFIG))
    np.testing.assert_array_equal(run(prompt), run(other))


def test_sharing_is_for_prompts_that_weigh_something() -> None:
    """Guards the choice by hand: 8 responses of 64 to a prompt of 32 tokens; a short prompt; a long response."""
    assert fits(prompt_tokens=32, response_tokens=64, group=8, row_tokens=96)
    assert not fits(prompt_tokens=16, response_tokens=160, group=8, row_tokens=176)
    assert not fits(prompt_tokens=256, response_tokens=512, group=8, row_tokens=768)
