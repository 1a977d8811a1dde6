"""Sampling options against an independent float64 reference that sorts, as vLLM and transformers define each of them."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import pytest

from afm_rl.generation.sampling import MAX_TOP, draw_full, draw_plain, full_rows, scores
from afm_rl.types import PLAIN, SamplingOptions

R, V = 192, 300
ENDS = (3, 7)
ONE_EACH = [
    SamplingOptions(top_k=1),
    SamplingOptions(top_k=17),
    SamplingOptions(top_k=10 * V),
    SamplingOptions(top_p=0.4),
    SamplingOptions(top_p=0.95),
    SamplingOptions(top_p=1e-6),
    SamplingOptions(min_p=0.2),
    SamplingOptions(repetition_penalty=1.7),
    SamplingOptions(repetition_penalty=0.6),
    SamplingOptions(min_tokens=3),
    SamplingOptions(logit_bias={0: 9.0, 5: -100.0, V - 1: 8.0}),
    SamplingOptions(top_k=40, top_p=0.8, min_p=0.02, repetition_penalty=1.2, min_tokens=2, logit_bias={7: 12.0}),
    PLAIN,
]


@dataclasses.dataclass
class Batch:
    """R rows that take the options of ONE_EACH in turn."""

    logits_RV: np.ndarray
    options: list[SamplingOptions]
    temperature_R: np.ndarray
    u_R: np.ndarray
    seen_RV: np.ndarray
    index_R: np.ndarray

    def draw(self) -> tuple[np.ndarray, ...]:
        rows = full_rows(self.options, self.temperature_R.tolist(), [ENDS] * len(self.options))
        return tuple(np.asarray(x) for x in _DRAW(self.logits_RV, rows, self.u_R, self.seen_RV, self.index_R))


_DRAW = jax.jit(draw_full)


def _batch(seed: int) -> Batch:
    rng = np.random.default_rng(seed)
    logits_RV = (rng.normal(size=(R, V)) * 2).astype(np.float32)
    logits_RV[:, list(ENDS)] += 3  # likely, so that forbidding them shows
    return Batch(
        logits_RV,
        [ONE_EACH[r % len(ONE_EACH)] for r in range(R)],
        rng.choice([0.0, 0.5, 1.0, 1.5], size=R).astype(np.float32),
        rng.random(R, np.float32),
        rng.random((R, V)) < 0.3,
        rng.integers(5, size=R).astype(np.int32),
    )


def _reference(logits_V: np.ndarray, o: SamplingOptions, temperature: float, seen_V: np.ndarray, index: int) -> np.ndarray:
    """The distribution of one row, float64 [V]; by sorting, unlike the code under test."""
    x_V = logits_V.astype(np.float64)
    for token, bias in o.logit_bias.items():
        x_V[token] += bias
    x_V[seen_V] = np.where(x_V[seen_V] > 0, x_V[seen_V] / o.repetition_penalty, x_V[seen_V] * o.repetition_penalty)
    if index < o.min_tokens:
        x_V[list(ENDS)] = -np.inf
    if temperature == 0:
        return np.eye(V)[x_V.argmax()]
    p_V = _softmax(x_V / temperature)
    if o.top_k:
        p_V = np.where(p_V >= np.sort(p_V)[-min(o.top_k, V)], p_V, 0)
    order_V = np.argsort(-p_V, kind="stable")
    sorted_V = p_V[order_V] / p_V.sum()
    better_V = np.concatenate([[0.0], sorted_V.cumsum()[:-1]])
    least = p_V[order_V[better_V < o.top_p]].min()
    p_V = np.where(p_V >= least, p_V, 0)
    p_V = np.where(p_V >= o.min_p * p_V.max(), p_V, 0)
    return p_V / p_V.sum()


def _softmax(x_V: np.ndarray) -> np.ndarray:
    p_V = np.exp(x_V - x_V.max())
    return p_V / p_V.sum()


@pytest.mark.parametrize("seed", range(4))
def test_every_option_cuts_as_the_sorting_reference_does(seed: int) -> None:
    """The token drawn is the one whose interval of the reference's distribution holds the uniform."""
    batch = _batch(seed)
    token_R = batch.draw()[0]
    inputs = zip(batch.logits_RV, batch.options, batch.temperature_R, batch.seen_RV, batch.index_R, strict=True)
    for r, row in enumerate(inputs):
        p_V = _reference(*row)
        token, u = token_R[r], batch.u_R[r]
        upper = p_V.cumsum()[token]
        assert p_V[token] > 0, f"row {r}, {row[1]}: token {token} is cut"
        assert upper - p_V[token] - 1e-5 <= u <= upper + 1e-5, f"row {r}, {row[1]}: token {token} at {u}"


def test_reported_log_probabilities_are_of_the_temperature_alone() -> None:
    """A learner's ratio is meaningful: penalties, biases and cuts change the token, never what is reported of it."""
    batch = _batch(9)
    token_R, logp_R, _, _ = batch.draw()
    for r in range(R):
        p_V = _softmax(batch.logits_RV[r].astype(np.float64) / (batch.temperature_R[r] or 1.0))
        np.testing.assert_allclose(logp_R[r], np.log(p_V[token_R[r]]), atol=2e-6, rtol=1e-6)


def test_neutral_rows_draw_what_the_plain_draw_draws() -> None:
    """Bit for bit, beside rows that ask for everything, down to a token whose mass is lost in the sum of the others."""
    batch = _batch(10)
    batch.logits_RV[:, 0], batch.u_R[::2] = -18.0, 0.0
    token_R, logp_R, ids_RN, _ = batch.draw()
    plain_R, plain_logp_R = jax.jit(draw_plain)(batch.logits_RV, batch.temperature_R, batch.u_R)
    neutral = np.array([o is PLAIN for o in batch.options])
    np.testing.assert_array_equal(token_R[neutral], np.asarray(plain_R)[neutral])
    np.testing.assert_array_equal(logp_R[neutral], np.asarray(plain_logp_R)[neutral])
    assert (token_R != np.asarray(plain_R)).sum() > R / 4
    assert (ids_RN == -1).all()


def test_a_row_does_not_see_what_its_neighbours_ask_for() -> None:
    """Stages run when any row asks; to the others they change no bit, even among alternatives."""
    batch = _batch(11)
    batch.options = [dataclasses.replace(o, logprobs=2) for o in batch.options]
    together = batch.draw()
    alone = dataclasses.replace(batch, options=[o if r % 13 == 3 else PLAIN for r, o in enumerate(batch.options)]).draw()
    for a, b in zip(together, alone, strict=True):
        np.testing.assert_array_equal(a[3::13], b[3::13])


def test_the_best_alternatives_in_order() -> None:
    """As many as each row asks for, of the distribution at its temperature; equal ones by token id."""
    batch = _batch(12)
    batch.logits_RV = np.round(batch.logits_RV, 1)  # plenty of ties
    wanted_R = [r % (MAX_TOP + 1) for r in range(R)]
    batch.options = [dataclasses.replace(o, logprobs=n) for o, n in zip(batch.options, wanted_R, strict=True)]
    _, _, ids_RN, logps_RN = batch.draw()
    assert ids_RN.shape == logps_RN.shape == (R, MAX_TOP)
    for r, n in enumerate(wanted_R):
        p_V = _softmax(batch.logits_RV[r].astype(np.float64) / (batch.temperature_R[r] or 1.0))
        best_N = np.argsort(-batch.logits_RV[r], kind="stable")[:n]
        np.testing.assert_array_equal(ids_RN[r, :n], best_N)
        np.testing.assert_allclose(logps_RN[r, :n], np.log(p_V[best_N]), atol=2e-6, rtol=1e-6)
        assert (ids_RN[r, n:] == -1).all()
        assert np.isneginf(logps_RN[r, n:]).all()


def test_a_vocabulary_smaller_than_the_alternatives() -> None:
    """Every token once, and then nothing."""
    logits_RV = np.array([[0.0, 2.0, 1.0]], np.float32)
    _, ids_RN, _ = jax.jit(scores)(logits_RV, np.ones(1, np.float32), np.zeros(1, int), top_R=np.array([20]))
    assert ids_RN[0].tolist() == [1, 2, 0] + [-1] * 17


def _few(logits_RX: np.ndarray, options: list[SamplingOptions], u_R: np.ndarray) -> np.ndarray:
    """Tokens drawn from few logits, put in the shape of the other tests."""
    rows = len(logits_RX)
    logits_RV = np.full((R, V), -np.inf, np.float32)
    logits_RV[:, 0] = 0.0
    logits_RV[:rows, : logits_RX.shape[1]] = logits_RX
    batch = Batch(
        logits_RV,
        options + [PLAIN] * (R - rows),
        np.ones(R, np.float32),
        np.resize(u_R, R).astype(np.float32),
        np.zeros((R, V), bool),
        np.zeros(R, np.int32),
    )
    return batch.draw()[0][:rows]


def test_ties_with_the_last_token_kept_stay_in() -> None:
    """Five equal tokens, two asked for, or half of their mass: all five can come, and the sixth cannot."""
    logits_RX = np.tile(np.array([1.0, 5.0, 5.0, 5.0, 5.0, 5.0], np.float32), (100, 1))
    for options in (SamplingOptions(top_k=2), SamplingOptions(top_p=0.5)):
        token_R = _few(logits_RX, [options] * 100, (np.arange(100) + 0.5) / 100)
        assert np.bincount(token_R, minlength=6).tolist() == [0, 20, 20, 20, 20, 20]


def test_a_cut_is_exact_to_the_last_bit() -> None:
    """Thresholds are found among all floats: of two neighbouring ones the smaller is cut, at every rank."""
    z_X = -np.geomspace(1e-3, 8, 40).astype(np.float32).repeat(2)
    z_X[1::2] = np.nextafter(z_X[::2], np.float32(-9))
    logits_RX = np.tile(np.concatenate([np.float32([0.0]), z_X]), (81, 1))
    token_R = _few(logits_RX, [SamplingOptions(top_k=k) for k in range(1, 82)], np.full(81, 1 - 2**-23))
    np.testing.assert_array_equal(token_R, np.arange(81))
