"""Floating-point operations of the model by one formula: what MFU (model FLOPs utilisation) is measured against.

A multiply-add is two operations. Counted are the matrix products: every projection, the output head once, and attention
over the visible past only (causal: query t of T sees t + 1 keys, T(T + 1) / 2 pairs a sequence). The backward pass is twice
the forward pass; what rematerialisation computes again is not counted, nor are norms, softmax, the embedding's lookup and
the optimizer.
"""

from __future__ import annotations

from afm_rl.config import ModelConfig


def matmul_params(config: ModelConfig) -> int:
    """Parameters that multiply every token: all projections and the output head, tied or not."""
    attention = config.dim * config.head_dim * (2 * config.num_heads + 2 * config.num_kv_heads)
    return config.num_layers * (attention + 3 * config.dim * config.ffn_dim) + config.vocab_size * config.dim


def forward_flops_per_token(config: ModelConfig, sequence_length: int) -> float:
    """2 * matmul_params + 2 * L * N * H * (T + 1): QK^T and PV are 2 N H each a visible pair, (T + 1) / 2 pairs a token."""
    attention = 2 * config.num_layers * config.num_heads * config.head_dim * (sequence_length + 1)
    return float(2 * matmul_params(config) + attention)


def train_flops_per_token(config: ModelConfig, sequence_length: int) -> float:
    """Forward and backward: three times the forward pass, 6 * matmul_params + 6 * L * N * H * (T + 1)."""
    return 3.0 * forward_flops_per_token(config, sequence_length)
