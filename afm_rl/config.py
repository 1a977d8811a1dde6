"""The shapes of the paper's models (section 2, Table 1), and where each value of a preset comes from (`SOURCES`).

Sources: "paper 2, Table 1" and other sections of the paper; "axlearn" = the public 3B configuration of Apple's training
library, which agrees with the paper line by line where both speak; "ours: reason" = a stated choice of this project.
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
    "afm-on-device": ModelConfig(49_152, 3072, 8064, 26, 24, 8, 128),
    "afm-on-device-teacher": ModelConfig(49_152, 3072, 23_552, 26, 24, 8, 128),
    "afm-server": ModelConfig(100_352, 8192, 22_016, 48, 64, 8, 128),
    "tiny": ModelConfig(2048, 128, 512, 3, 4, 2, 32),
}

_TABLE = "paper 2, Table 1"
_ON_DEVICE = {
    "vocab_size": "axlearn",  # the paper says 49k
    "dim": _TABLE,
    "ffn_dim": "axlearn",
    "num_layers": _TABLE,
    "num_heads": _TABLE,
    "num_kv_heads": _TABLE,
    "head_dim": _TABLE,
    "rope_base": "paper 2",
    "norm_eps": "axlearn",
    "tie_embeddings": "paper 2",
    "max_positions": "paper 3.2",  # the sequence length of the core stage
}
_UNPUBLISHED = "ours: unpublished; head dim 128 and 8 kv heads of the paper, width and depth usual at 34B"
_SMALL = "ours: what two CPU cores train in minutes"
#: preset -> field -> where the value comes from; a test holds every field of every preset to it.
SOURCES: dict[str, dict[str, str]] = {
    "afm-on-device": _ON_DEVICE,
    # Only the FFN is pruned (paper 3.2.1), so the model it is pruned from differs in that alone.
    "afm-on-device-teacher": {**_ON_DEVICE, "ffn_dim": "ours: gives the 6.4B of paper 3.2.1, a multiple of 128"},
    "afm-server": {
        **_ON_DEVICE,
        "vocab_size": "ours: the 100k of paper 2, Table 1, as a multiple of 2048",
        "dim": _UNPUBLISHED,
        "ffn_dim": _UNPUBLISHED,
        "num_layers": _UNPUBLISHED,
        "num_heads": _UNPUBLISHED,
    },
    "tiny": {
        **_ON_DEVICE,
        "vocab_size": _SMALL,
        "dim": _SMALL,
        "ffn_dim": _SMALL,
        "num_layers": _SMALL,
        "num_heads": _SMALL,
        "num_kv_heads": _SMALL,
        "head_dim": _SMALL,
    },
}
