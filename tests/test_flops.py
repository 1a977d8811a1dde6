"""Operation counts by hand, attention counted pair by pair."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from afm_rl.config import PRESETS, ModelConfig
from afm_rl.flops import forward_flops_per_token, matrix_params, peak_flops_per_s, train_flops_per_token


def test_operations_of_a_small_model_by_hand() -> None:
    """Guards the formula: every product of a sequence of 5 counted one by one, attention over the visible pairs alone."""
    V, D, F, L, N, K, H, T = 7, 4, 6, 2, 2, 1, 6, 5
    projections = D * N * H + 2 * D * K * H + N * H * D + 3 * D * F
    pairs = sum(t + 1 for t in range(T))  # token t sees itself and the t before it
    attention = 2 * (2 * pairs * N * H)
    whole = T * L * 2 * projections + L * attention + T * 2 * V * D
    config = ModelConfig(V, D, F, L, N, K, H)
    assert forward_flops_per_token(config, T) * T == whole
    assert train_flops_per_token(config, T) == 3 * forward_flops_per_token(config, T)


def test_peaks_are_those_of_the_device() -> None:
    """Guards the table's order: a v5p is not taken for a v5e, and a CPU has no published peak."""
    peaks = [peak_flops_per_s(SimpleNamespace(device_kind=kind)) for kind in ("TPU v5 lite", "TPU v5p", "TPU v5", "cpu")]
    assert peaks == [197e12, 459e12, 459e12, None]


def test_six_flops_a_parameter_for_the_papers_model() -> None:
    """Guards the count against Table 1: 6 operations a non-embedding parameter and training token, and the logits."""
    config = PRESETS["afm-on-device"]
    logits = 2 * config.vocab_size * config.dim
    assert 3 * (forward_flops_per_token(config, 1) - logits) / matrix_params(config) == pytest.approx(6, rel=1e-3)
    assert matrix_params(config) == pytest.approx(2.58e9, rel=0.01)  # Table 1
