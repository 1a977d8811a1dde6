"""Draws against float64 cumulative distributions: right token, right log-probability, no impossible token, rows apart."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from afm_rl.generation.sampling import draw_plain, uniforms

LARGEST_UNIFORM = float(np.float32(1 - 2**-23))


def _softmax64(logits_RV: np.ndarray, temperature_R: np.ndarray) -> np.ndarray:
    z_RV = logits_RV.astype(np.float64) / np.where(temperature_R > 0, temperature_R, 1.0)[:, None]
    p_RV = np.exp(z_RV - z_RV.max(-1, keepdims=True))
    return p_RV / p_RV.sum(-1, keepdims=True)


def test_a_uniform_is_a_function_of_seed_response_and_token() -> None:
    """The stream of a response is fixed by definition: whoever reissues a request gets its tokens again."""
    seeds, responses, indices = [7, 7, 2**32 - 1], [0, 3, 0], [0, 5, 2]
    drawn_R = jax.jit(uniforms)(np.array(seeds, np.uint32), np.array(responses), np.array(indices))
    for got, s, j, t in zip(drawn_R, seeds, responses, indices, strict=True):
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(np.uint32(s)), j), t)
        assert got == jax.random.uniform(key)


def test_salted_uniforms_are_another_independent_stream() -> None:
    """Deciding by one stream and drawing by the other must not be correlated."""
    seeds_R, zeros_R = np.arange(4000, dtype=np.uint32), np.zeros(4000, np.int32)
    streams = np.asarray(jax.jit(lambda s, z: [uniforms(s, z, z, salt=salt) for salt in (0, 1, 2)])(seeds_R, zeros_R))
    correlations = np.corrcoef(streams)
    assert np.abs(correlations - np.eye(3)).max() < 0.06
    assert all(abs(stream.mean() - 0.5) < 0.02 and 0 <= stream.min() < stream.max() < 1 for stream in streams)


@pytest.mark.parametrize("V", [5, 128, 300])
def test_a_draw_inverts_the_cumulative_distribution(V: int) -> None:
    """The token whose interval of the float64 distribution holds the uniform; at temperature 0 the first best one."""
    rng = np.random.default_rng(V)
    R = 512
    logits_RV = rng.normal(size=(R, V)).astype(np.float32) * 3
    logits_RV[:, 1] = logits_RV[:, 2]
    temperature_R = rng.choice([0.0, 0.3, 1.0, 2.0], size=R).astype(np.float32)
    u_R = rng.random(R, np.float32)
    token_R, logp_R = jax.jit(draw_plain)(logits_RV, temperature_R, u_R)
    p_RV = _softmax64(logits_RV, temperature_R)
    rows = np.arange(R)
    np.testing.assert_allclose(logp_R, np.log(p_RV[rows, token_R]), atol=2e-6, rtol=1e-6)
    upper_R = p_RV.cumsum(-1)[rows, token_R]
    lower_R = upper_R - p_RV[rows, token_R]
    drawn = temperature_R > 0
    assert ((lower_R - 1e-6 <= u_R) & (u_R <= upper_R + 1e-6))[drawn].all()
    np.testing.assert_array_equal(token_R[~drawn], logits_RV.argmax(-1)[~drawn])
    assert len(set(np.asarray(token_R)[drawn].tolist())) > min(V - 1, 30)


@pytest.mark.parametrize("V", [5, 128, 129, 300])
def test_an_impossible_token_is_never_drawn(V: int) -> None:
    """Whatever rounding does at the ends of the interval and of the blocks; half of the tokens here have no mass."""
    rng = np.random.default_rng(V)
    R = 512
    logits_RV = rng.normal(size=(R, V)).astype(np.float32) * 2
    logits_RV[rng.random((R, V)) < 0.5] = -np.inf
    logits_RV[rng.random((R, V)) < 0.2] = -150.0
    logits_RV[np.arange(R), rng.integers(V, size=R)] = 1.0
    logits_RV[: R // 2, V // 2 :] = -np.inf
    logits_RV[: R // 2, 0] = 0.5
    u_R = rng.choice(np.array([0.0, 2**-23, 0.5, LARGEST_UNIFORM], np.float32), size=R)
    token_R, logp_R = jax.jit(draw_plain)(logits_RV, np.ones(R, np.float32), u_R)
    assert (np.asarray(token_R) < V).all()
    assert (logits_RV[np.arange(R), token_R] > -100).all()
    assert np.isfinite(logp_R).all()


def test_a_uniform_grid_reaches_tokens_in_proportion() -> None:
    """Equal tokens over several blocks, one draw in the middle of each one's interval: each comes once, in order."""
    V = 384
    logits_RV = np.zeros((V, V), np.float32)
    u_R = ((np.arange(V) + 0.5) / V).astype(np.float32)
    token_R, _ = jax.jit(draw_plain)(logits_RV, np.ones(V, np.float32), u_R)
    np.testing.assert_array_equal(token_R, np.arange(V))


def test_a_row_does_not_see_its_neighbours() -> None:
    """The same row beside other contents gives the same bits."""
    rng = np.random.default_rng(0)
    R, V = 512, 300
    logits_RV = rng.normal(size=(R, V)).astype(np.float32)
    temperature_R, u_R = np.full(R, 0.7, np.float32), rng.random(R, np.float32)
    draw = jax.jit(draw_plain)
    alone = draw(logits_RV, temperature_R, u_R)
    crowded_RV = rng.normal(size=(R, V)).astype(np.float32) * 30
    crowded_RV[::2] = logits_RV[::2]
    crowded = draw(crowded_RV, np.where(np.arange(R) % 2, 0, temperature_R).astype(np.float32), u_R)
    for a, b in zip(alone, crowded, strict=True):
        np.testing.assert_array_equal(a[::2], b[::2])
