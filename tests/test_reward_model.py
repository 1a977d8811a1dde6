"""The reward model of E.1: where its heads read, what they compute, and where they start."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from afm_rl.config import ModelConfig
from afm_rl.model import forward
from afm_rl.parameters import Params, init_params
from afm_rl.reward_model import CLASSES, Scores, init_heads, score
from afm_rl.types import GRADINGS

CONFIG = ModelConfig(13, 8, 16, 1, 2, 1, 4)
KEY = jax.random.key(0)
LENGTHS = np.array([3, 6, 1])
TOKENS = np.random.default_rng(0).integers(1, 13, size=(3, 6)).astype(np.int32) * (np.arange(6) < LENGTHS[:, None])


@pytest.fixture(scope="module")
def params() -> Params:
    """Heads away from their start, so that every one of them says something."""
    rng = np.random.default_rng(1)
    start = jax.eval_shape(lambda key: {"trunk": init_params(CONFIG, key), "heads": init_heads(CONFIG, key)}, KEY)
    return jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype(np.float32), start)


@jax.jit
def run(params: Params, tokens: jax.Array, lengths: jax.Array) -> Scores:
    return score(params, tokens, lengths, config=CONFIG)


def gelu(x: np.ndarray) -> np.ndarray:
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def test_heads_read_the_last_real_token(params: Params) -> None:
    """Guards E.1 in NumPy: the state after the final norm of token length - 1, one linear head and four small MLPs."""
    hidden = np.asarray(jax.jit(lambda p: forward(p, jnp.asarray(TOKENS), config=CONFIG))(params["trunk"]))
    last = np.stack([hidden[row, length - 1] for row, length in enumerate(LENGTHS)])
    found = run(params, TOKENS, LENGTHS)
    np.testing.assert_allclose(found.reward_B, last @ params["heads"]["reward"][0], rtol=1e-4)
    assert np.abs(np.asarray(found.reward_B) - hidden[:, -1] @ params["heads"]["reward"][0])[[0, 2]].min() > 0.01
    assert set(found.grade_logits) == set(GRADINGS)
    for name, logits in found.grade_logits.items():
        head = params["heads"][name]
        np.testing.assert_allclose(logits, gelu(last @ head["up"].T) @ head["down"].T, rtol=1e-4)
        assert logits.shape == (3, CLASSES)


def test_padding_changes_nothing(params: Params) -> None:
    """Guards scores against what stands after a response, bit for bit."""
    other = np.where(np.arange(6) < LENGTHS[:, None], TOKENS, 9).astype(np.int32)
    for a, b in zip(
        jax.tree.leaves(run(params, TOKENS, LENGTHS)), jax.tree.leaves(run(params, other, LENGTHS)), strict=True
    ):
        np.testing.assert_array_equal(a, b)


def test_a_fresh_reward_head_prefers_nothing() -> None:
    """Guards the start: every reward is zero, the gradings differ from each other, and all shapes fit."""
    heads = jax.jit(init_heads, static_argnums=0)(CONFIG, KEY)
    assert not np.any(heads["reward"])
    assert set(heads) == {"reward", *GRADINGS}
    assert not np.array_equal(heads["verbosity"]["up"], heads["truthfulness"]["up"])
    np.testing.assert_allclose(np.std(heads["verbosity"]["up"]), 8**-0.5, rtol=0.3)
