"""The shapes of the paper's models (section 2, Table 1), each preset value tagged with its source.

Sources: "paper 2" = Table 1; "axlearn" = the public 3B configuration of Apple's training library, which agrees with the
paper line by line where both speak; "ours" = a stated choice of this project.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass


@dataclass(frozen=True)
class ModelConfig:
    """A dense decoder-only Transformer (the architecture Hugging Face calls Qwen3ForCausalLM)."""

    vocab_size: int
    dim: int
    ffn_dim: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rope_base: float = 500_000.0  # paper 2
    norm_eps: float = 1e-5  # axlearn
    tie_embeddings: bool = True  # paper 2
    max_positions: int = 4096

    def __post_init__(self) -> None:
        for name in ("vocab_size", "dim", "ffn_dim", "num_layers", "num_heads", "num_kv_heads", "head_dim"):
            if getattr(self, name) < 1:
                raise ValueError(f"model.{name} must be at least 1, got {getattr(self, name)}")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"model.num_heads ({self.num_heads}) must be a multiple of model.num_kv_heads ({self.num_kv_heads})"
            )
        if self.head_dim % 2:
            raise ValueError(f"model.head_dim must be even for RoPE, got {self.head_dim}")

    def replace(self, **changes: object) -> ModelConfig:
        return dataclasses.replace(self, **changes)  # type: ignore[arg-type]

    @property
    def num_params(self) -> int:
        """All parameters, embedding included (counted once when tied)."""
        attention = self.dim * self.head_dim * (2 * self.num_heads + 2 * self.num_kv_heads) + 2 * self.head_dim
        layer = attention + 3 * self.dim * self.ffn_dim + 2 * self.dim
        embeddings = self.vocab_size * self.dim * (1 if self.tie_embeddings else 2)
        return self.num_layers * layer + self.dim + embeddings


PRESETS: dict[str, ModelConfig] = {
    # paper 2 (Table 1) for every dimension; ffn_dim and vocabulary 49,152 from axlearn (paper: "49k").
    "afm-on-device": ModelConfig(49_152, 3072, 8064, 26, 24, 8, 128),
    # The 6.4B model it is pruned from (paper 3.2.1): same shape, wider FFN; 23,552 is ours (gives 6.4B, a multiple of 128).
    "afm-on-device-teacher": ModelConfig(49_152, 3072, 23_552, 26, 24, 8, 128),
    # Vocabulary 100k, head dim 128 and 8 KV heads from the paper; the other dimensions are not published and are ours.
    "afm-server": ModelConfig(100_352, 8192, 22_016, 48, 64, 8, 128),
    # Ours: what two CPU cores train in minutes.
    "tiny": ModelConfig(2048, 128, 512, 3, 4, 2, 32),
}
