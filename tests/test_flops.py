"""The FLOPs formula against numbers counted by hand."""

from __future__ import annotations

import pytest

from afm_rl.config import ModelConfig
from afm_rl.flops import forward_flops_per_token, matmul_params, train_flops_per_token


@pytest.mark.parametrize("tied", [True, False])
def test_hand_counted(tied: bool) -> None:
    """One layer, D 4, F 5, 2 heads and 1 kv head of 2, vocabulary 7, 3 tokens: the head counts once, tied or not."""
    config = ModelConfig(7, 4, 5, 1, 2, 1, 2, tie_embeddings=tied)
    # q 4x4, k 2x4, v 2x4, o 4x4; gate, up, down 3 x 4x5; head 7x4.
    assert matmul_params(config) == 16 + 8 + 8 + 16 + 60 + 28
    # Visible pairs 1 + 2 + 3 = 6; each costs 2 heads x 2 wide x 2 products x 2 operations = 16: 96 for 3 tokens.
    assert forward_flops_per_token(config, 3) == 2 * 136 + 96 / 3
    assert train_flops_per_token(config, 3) == 3 * 304
