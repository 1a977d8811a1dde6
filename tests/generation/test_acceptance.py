"""Speculation leaves the output as it is: token for token where guesses must equal, in distribution where they are sampled.

The toy target and the toy draft model over three tokens see the last two tokens; all 81 sequences of four are enumerated in
float64 and compared by chi-square with what tens of thousands of seeds give.
"""

from __future__ import annotations

import itertools
import time
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import chisquare

from afm_rl.generation.acceptance import (
    GUESS,
    Guesses,
    Kept,
    Stream,
    distribution_full,
    distribution_plain,
    draw,
    keep_equal_full,
    keep_equal_plain,
    keep_sampled,
    propose_ngram,
    target_full,
)
from afm_rl.generation.sampling import FullRows, draw_full, draw_plain, full_rows, uniforms
from afm_rl.types import PLAIN, SamplingOptions

V, K, LENGTH, SEEDS = 3, 2, 4, 40_000
_RNG = np.random.default_rng(5)
TARGET = _RNG.normal(size=(V, V, V)).astype(np.float32) * 1.3  # logits by the last two tokens
DRAFT = TARGET + _RNG.normal(size=(V, V, V)).astype(np.float32) * 1.0
CUT = SamplingOptions(top_k=2, repetition_penalty=1.8, min_tokens=2, logit_bias={1: 0.4})
ENDS = (2,)


def _next(table: np.ndarray, text_RT: jax.Array, length_R: jax.Array) -> jax.Array:
    """Logits of the token at place `length` of each text; texts begin with two tokens 0."""
    row_R = jnp.arange(text_RT.shape[0])
    return jnp.asarray(table)[text_RT[row_R, length_R - 2], text_RT[row_R, length_R - 1]]


def _seen(text_RT: jax.Array, length_R: jax.Array) -> jax.Array:
    known_RT = jnp.arange(text_RT.shape[1]) < length_R[:, None]
    return ((text_RT[..., None] == jnp.arange(V)) & known_RT[..., None]).any(1)


def _speculate(options: SamplingOptions, temperature: float, seeds: int = SEEDS) -> np.ndarray:
    """LENGTH tokens of every seed by steps of K sampled guesses, [seeds, LENGTH]."""
    one = full_rows([options], [temperature], [ENDS])
    return np.asarray(_speculated(one, np.arange(seeds, dtype=np.uint32), plain=options is PLAIN))


@partial(jax.jit, static_argnames=("plain",))
def _speculated(one: FullRows, seed_R: jax.Array, *, plain: bool) -> jax.Array:
    R = seed_R.shape[0]
    row_R = jnp.arange(R)
    rows = jax.tree.map(lambda x: jnp.broadcast_to(x, (R, *x.shape[1:])), one)

    def guess(text_RT: jax.Array, length_R: jax.Array) -> tuple[jax.Array, jax.Array]:
        logits_RV, index_R = _next(DRAFT, text_RT, length_R), length_R - 2
        if plain:
            q_RV = distribution_plain(logits_RV, rows.temperature_R)
        else:
            q_RV = distribution_full(logits_RV, rows, seen_RV=_seen(text_RT, length_R), index_R=index_R)
        token_R = draw(q_RV, uniforms(seed_R, seed_R * 0, index_R, salt=GUESS))
        return text_RT.at[row_R, length_R].set(token_R), q_RV

    def step(state: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        text_RT, start_R = state
        text_RT, q_KRV = jax.lax.scan(guess, text_RT, start_R + jnp.arange(K)[:, None])
        place_RJ = start_R[:, None] + jnp.arange(K + 1)
        token_RK = text_RT[row_R[:, None], place_RJ[:, :K]]
        guesses = Guesses(token_RK, 1 + seed_R.astype(jnp.int32) % K)  # some rows guess less than K
        stream = Stream(seed_R, seed_R * 0, start_R - 2)
        logits_JRV = jnp.stack([_next(TARGET, text_RT, place_R) for place_R in place_RJ.T])
        if plain:
            p_JRV = jax.vmap(distribution_plain, (0, None))(logits_JRV, rows.temperature_R)
            p_RJV = jnp.swapaxes(p_JRV, 0, 1)
        else:
            p_RJV = target_full(jnp.swapaxes(logits_JRV, 0, 1), guesses, stream, rows, _seen(text_RT, start_R))
        kept = keep_sampled(p_RJV, jnp.swapaxes(q_KRV, 0, 1), guesses, stream)
        text_RT = text_RT.at[row_R[:, None], place_RJ].set(kept.token_RJ)
        return text_RT, jnp.minimum(start_R + kept.count_R + 1, 2 + LENGTH)

    state = jnp.zeros((R, 2 + LENGTH + K + 1), jnp.int32), jnp.full(R, 2)
    return jax.lax.while_loop(lambda s: (s[1] < 2 + LENGTH).any(), step, state)[0][:, 2 : 2 + LENGTH]


def _exact(options: SamplingOptions, temperature: float) -> np.ndarray:
    """The probability of each of the V ** LENGTH sequences, by definition, float64."""
    masses = []
    for sequence in itertools.product(range(V), repeat=LENGTH):
        mass, text = 1.0, [0, 0]
        for index, token in enumerate(sequence):
            mass *= _step(TARGET[text[-2], text[-1]].astype(np.float64), options, temperature, text, index)[token]
            text.append(token)
        masses.append(mass)
    return np.array(masses)


def _step(x_V: np.ndarray, options: SamplingOptions, temperature: float, text: list[int], index: int) -> np.ndarray:
    for token, bias in options.logit_bias.items():
        x_V[token] += bias
    for token in set(text):
        x_V[token] *= options.repetition_penalty if x_V[token] < 0 else 1 / options.repetition_penalty
    if index < options.min_tokens:
        x_V[list(ENDS)] = -np.inf
    p_V = np.exp((x_V - x_V.max()) / temperature)
    if options.top_k:
        p_V[np.argsort(p_V)[: -options.top_k]] = 0
    return p_V / p_V.sum()


def _agree(sequences_RT: np.ndarray, exact: np.ndarray) -> float:
    """The p-value of the sequences' counts; 0 where an impossible one came."""
    counts = np.bincount(sequences_RT @ V ** np.arange(LENGTH)[::-1], minlength=V**LENGTH)
    possible = exact > 0
    if counts[~possible].any():
        return 0.0
    return float(chisquare(counts[possible], exact[possible] * len(sequences_RT)).pvalue)


@pytest.mark.parametrize(
    ("options", "temperature", "seeds"), [(PLAIN, 1.0, SEEDS), (PLAIN, 0.6, SEEDS), (CUT, 0.8, SEEDS // 4)]
)
def test_sampled_guesses_leave_the_distribution_unchanged(options: SamplingOptions, temperature: float, seeds: int) -> None:
    """All sequences come as often as the target alone would give them; a chi-square with 80 degrees of freedom."""
    assert _agree(_speculate(options, temperature, seeds), _exact(options, temperature)) > 1e-3


def test_the_chi_square_notices_a_small_error() -> None:
    """Against a target of slightly other temperature the same counts are refused: the test above has the power to fail."""
    sequences_RT = _speculate(PLAIN, 1.0)
    assert _agree(sequences_RT, _exact(PLAIN, 1.08)) < 1e-9


def test_greedy_speculation_is_greedy() -> None:
    """At temperature 0 both distributions are one token each."""
    sequences_RT = _speculate(PLAIN, 0.0)
    text = [0, 0]
    for _ in range(LENGTH):
        text.append(int(TARGET[text[-2], text[-1]].argmax()))
    np.testing.assert_array_equal(sequences_RT, np.broadcast_to(text[2:], (SEEDS, LENGTH)))


def test_a_draft_equal_to_the_target_is_always_kept() -> None:
    """p / q = 1: every guess is kept; and one of disjoint support never is."""
    rng = np.random.default_rng(0)
    R, keep = 500, jax.jit(keep_sampled)
    p_RJV = rng.dirichlet(np.ones(V), size=(R, K + 1)).astype(np.float32)
    stream = Stream(np.arange(R, dtype=np.uint32), np.zeros(R, np.int32), np.zeros(R, np.int32))
    guesses = Guesses(rng.integers(V, size=(R, K)).astype(np.int32), np.full(R, K, np.int32))
    assert (np.asarray(keep(p_RJV, p_RJV[:, :K], guesses, stream).count_R) == K).all()
    p_RJV[..., 0] = 0.0
    only_RKV = np.broadcast_to(np.eye(V, dtype=np.float32)[0], (R, K, V))
    kept = keep(p_RJV, only_RKV, guesses._replace(token_RK=np.zeros((R, K), np.int32)), stream)
    assert (np.asarray(kept.count_R) == 0).all()
    assert (np.asarray(kept.token_RJ)[:, 0] > 0).all()


def _plainly(options: SamplingOptions, temperature_R: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """LENGTH tokens and log-probabilities of each row by one draw after the other."""
    R = len(temperature_R)
    rows = full_rows([options] * R, temperature_R.tolist(), [ENDS] * R)
    return tuple(np.asarray(x) for x in _decoded(rows, temperature_R, plain=options is PLAIN))


@partial(jax.jit, static_argnames=("plain",))
def _decoded(rows: FullRows, temperature_R: jax.Array, *, plain: bool) -> tuple[jax.Array, jax.Array]:
    R = len(temperature_R)
    seed_R = jnp.arange(R, dtype=jnp.uint32)

    def step(text_RT: jax.Array, t: jax.Array) -> tuple[jax.Array, jax.Array]:
        at_R, index_R = jnp.full(R, 2 + t), jnp.full(R, t)
        logits_RV, u_R = _next(TARGET, text_RT, at_R), uniforms(seed_R, seed_R * 0, index_R)
        if plain:
            token_R, logp_R = draw_plain(logits_RV, temperature_R, u_R)
        else:
            token_R, logp_R, _, _ = draw_full(logits_RV, rows, u_R, _seen(text_RT, at_R), index_R)
        return text_RT.at[:, 2 + t].set(token_R), logp_R

    text_RT, logp_TR = jax.lax.scan(step, jnp.zeros((R, 2 + LENGTH), jnp.int32), jnp.arange(LENGTH))
    return text_RT, logp_TR.T


@pytest.mark.parametrize("options", [PLAIN, CUT])
def test_guesses_that_must_equal_give_the_tokens_of_plain_decoding(options: SamplingOptions) -> None:
    """Right, wrong and missing guesses: those right from the start are kept, and the next token is the target's own."""
    R = 300
    rng = np.random.default_rng(1)
    temperature_R = rng.choice([0.0, 0.7, 1.0], size=R).astype(np.float32)
    text_RT, logp_RT = _plainly(options, temperature_R)
    right_RK = text_RT[:, 2 : 1 + LENGTH]
    wrong_RK = rng.random(right_RK.shape) < 0.3
    guess_RK = np.where(wrong_RK, (right_RK + 1) % V, right_RK)
    count_R = rng.integers(LENGTH, size=R)
    guesses = Guesses(guess_RK.astype(np.int32), count_R.astype(np.int32))
    guessed_RT = np.concatenate([np.zeros((R, 2), int), guess_RK], 1)
    logits_RJV = TARGET[guessed_RT[:, :-1], guessed_RT[:, 1:]]
    stream = Stream(np.arange(R, dtype=np.uint32), np.zeros(R, np.int32), np.zeros(R, np.int32))
    if options is PLAIN:
        drawn = jax.jit(keep_equal_plain)(logits_RJV, guesses, stream, temperature_R)
    else:
        rows = full_rows([options] * R, temperature_R.tolist(), [ENDS] * R)
        drawn = jax.jit(keep_equal_full)(logits_RJV, guesses, stream, rows, np.tile(np.arange(V) == 0, (R, 1)))
    kept, logp_RJ = Kept(*map(np.asarray, drawn.kept)), np.asarray(drawn.logp_RJ)
    for r in range(R):
        expected = next((k for k in range(count_R[r]) if wrong_RK[r, k]), count_R[r])
        assert kept.count_R[r] == expected
        np.testing.assert_array_equal(kept.token_RJ[r, : expected + 1], text_RT[r, 2 : 3 + expected])
        np.testing.assert_allclose(logp_RJ[r, : expected + 1], logp_RT[r, : expected + 1], atol=1e-6)
    assert len(set(kept.count_R.tolist())) == LENGTH


@pytest.mark.parametrize(
    ("tokens", "k", "expected"),
    [
        ([1, 2, 3, 4, 9, 1, 2, 3], 2, [4, 9]),  # the longest suffix
        ([7, 3, 5, 8, 2, 3, 6, 4, 3], 2, [6, 4]),  # the latest of its occurrences
        ([1, 2, 3, 5, 9, 3, 6, 1, 2, 3], 2, [5, 9]),  # a longer one before a later one
        ([5, 5, 5], 4, [5, 5, 5, 5]),  # read on into the guesses
        ([4, 1, 2, 1, 2], 3, [1, 2, 1]),
        ([1, 2, 3], 4, []),
        ([1], 4, []),
        ([1, 1], 0, []),
    ],
)
def test_guesses_follow_the_latest_occurrence_of_the_longest_suffix(tokens: list[int], k: int, expected: list[int]) -> None:
    """Prompt look-up, by hand."""
    assert propose_ngram(tokens, k=k) == expected


def test_a_suffix_shorter_than_asked_for_proposes_nothing() -> None:
    """`min_ngram` and `max_ngram` bound what counts as an occurrence."""
    tokens = [1, 2, 3, 9, 8, 3]
    assert propose_ngram(tokens, k=2, min_ngram=2) == []
    assert propose_ngram([1, 2, 3, 4, 7, 2, 3, 5, 1, 2, 3], k=1, max_ngram=2) == [5]
    assert propose_ngram([1, 2, 3, 4, 7, 2, 3, 5, 1, 2, 3], k=1, max_ngram=3) == [4]


def test_long_texts_are_looked_through_quickly() -> None:
    """Between two decoding steps of a batch there is no time for more."""
    tokens_T = np.random.default_rng(0).integers(50, size=30_000)
    times_s = []
    for _ in range(20):
        start_s = time.perf_counter()
        propose_ngram(tokens_T, k=4)
        times_s.append(time.perf_counter() - start_s)
    assert min(times_s) < 0.001
