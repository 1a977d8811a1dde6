"""What a model's passes cost in floating-point operations, and the share of a device's peak that they reach (MFU, 3.3).

A product of m parameters costs 2 m operations a token; forward and backward together cost three times the forward pass.
Attention is causal: a token looks at (T + 1) / 2 others on average, at 4 N H operations each (scores and mixture). The
output head counts, the embedding lookup does not, and neither does what is computed twice to save memory.

Shapes: T tokens of a sequence, V vocab, D model, F ffn, N query heads, K kv heads, H head dim, L layers.
"""

from __future__ import annotations

from typing import Any

from afm_rl.config import ModelConfig

#: Dense bfloat16 peak of one device in FLOP/s, by the beginning of its name in JAX; published by the makers.
PEAK_FLOPS_PER_S = {
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5p": 459e12,
    "TPU v5": 459e12,
    "TPU v6": 918e12,
    "NVIDIA A100": 312e12,
    "NVIDIA H100": 989e12,
    "NVIDIA H200": 989e12,
    "NVIDIA B200": 2250e12,
}


def matrix_params(config: ModelConfig) -> int:
    """Parameters of the linear projections of all layers."""
    attention = config.dim * config.head_dim * (2 * config.num_heads + 2 * config.num_kv_heads)
    return config.num_layers * (attention + 3 * config.dim * config.ffn_dim)


def forward_flops_per_token(config: ModelConfig, sequence_length: int) -> float:
    """Operations of a forward pass a token, in sequences of `sequence_length` tokens, logits included."""
    attention = 2 * config.num_layers * config.num_heads * config.head_dim * (sequence_length + 1)
    return 2.0 * (matrix_params(config) + config.vocab_size * config.dim) + attention


def train_flops_per_token(config: ModelConfig, sequence_length: int) -> float:
    """Operations of a forward and a backward pass a token."""
    return 3.0 * forward_flops_per_token(config, sequence_length)


def peak_flops_per_s(device: Any) -> float | None:
    """The published bfloat16 peak of a JAX device; None for a kind that is not listed, such as a CPU."""
    return next((peak for kind, peak in PEAK_FLOPS_PER_S.items() if device.device_kind.startswith(kind)), None)
