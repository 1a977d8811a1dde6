"""What training and generating cost: seconds and bytes, from a model's shape.

Operations are counted by `afm_rl/flops.py`. Seconds follow from the speed of a float32 matrix product measured on this
machine, the share of it that a step of ours reaches, and a fixed cost a step. They are estimates to plan by, within a
factor of about two.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np

from afm_rl.config import ModelConfig
from afm_rl.flops import forward_flops_per_token

#: Share of the measured matrix speed that a training step and a decoding step reach, and their fixed cost.
TRAIN_UTILIZATION, DECODE_UTILIZATION = 0.4, 0.1
STEP_OVERHEAD_S, DECODE_OVERHEAD_S = 5e-3, 1.5e-3
#: Seconds to trace and compile one program (a loss, or a generator's bucket).
COMPILE_S = 3.0
#: A Python process with JAX and Ray, before any array.
PROCESS_BYTES = 400 * 2**20


@dataclass(frozen=True)
class Cost:
    """Work of a stage; costs add. `train_tokens` and `generated_tokens` count positions, padding included."""

    train_tokens: int = 0
    generated_tokens: int = 0
    seconds: float = 0.0

    def __add__(self, other: Cost) -> Cost:
        return Cost(
            self.train_tokens + other.train_tokens,
            self.generated_tokens + other.generated_tokens,
            self.seconds + other.seconds,
        )

    def times(self, n: int) -> Cost:
        return Cost(self.train_tokens * n, self.generated_tokens * n, self.seconds * n)


@dataclass(frozen=True)
class Machine:
    """A measured speed: float32 matrix products, in operations a second, all cores together."""

    flops_per_s: float

    def train(self, config: ModelConfig, *, steps: int, batch: int, length: int) -> Cost:
        """Forward and backward over `steps` batches of [batch, length] tokens, and one compilation."""
        tokens = steps * batch * length
        work = 3 * forward_flops_per_token(config, length) * tokens / (self.flops_per_s * TRAIN_UTILIZATION)
        return Cost(train_tokens=tokens, seconds=work + steps * STEP_OVERHEAD_S + COMPILE_S)

    def score(self, config: ModelConfig, *, sequences: int, length: int) -> Cost:
        """A forward pass over [sequences, length] tokens, and one compilation."""
        work = forward_flops_per_token(config, length) * sequences * length / (self.flops_per_s * TRAIN_UTILIZATION)
        return Cost(seconds=work + COMPILE_S)

    def generate(self, config: ModelConfig, *, responses: int, prompt: int, max_tokens: int, max_batch: int) -> Cost:
        """`responses` responses of `max_tokens` tokens in batches, a decoding step a token, and one compilation."""
        tokens = responses * max_tokens
        batches = -(-responses // max_batch)
        work = forward_flops_per_token(config, prompt + max_tokens) * tokens / (self.flops_per_s * DECODE_UTILIZATION)
        return Cost(generated_tokens=tokens, seconds=work + batches * max_tokens * DECODE_OVERHEAD_S + COMPILE_S)


def measure_machine(size: int = 768) -> Machine:
    """The best of sixteen float32 products of [size, size] matrices: a tenth of a second, more on a busy machine."""
    a = np.ones((size, size), np.float32)
    best = float("inf")
    for _ in range(16):
        start = time.perf_counter()
        a @ a
        best = min(best, time.perf_counter() - start)
    return Machine(2 * size**3 / best)


def params_bytes(config: ModelConfig) -> int:
    """float32 parameters."""
    return 4 * config.num_params


@dataclass(frozen=True)
class Cut:
    """How a training step is cut: parts of the parameters and of the batch's positions, what passes at a time, and whether
    the backward pass computes a layer's intermediates again."""

    params: int = 1
    positions: int = 1
    rematerialised: bool = True
    microbatch_tokens: int | None = None
    logits_per_pass: int | None = None


def training_bytes(config: ModelConfig, *, batch: int, length: int, cut: Cut | None = None) -> int:
    """A device's bytes: parameters, gradients and two moments in float32, activations, logits twice.

    With rematerialisation a layer keeps its input, and what one layer needs while it is differentiated comes on top;
    without, every layer keeps that.
    """
    cut = cut or Cut()
    tokens = min(batch * length, cut.microbatch_tokens or batch * length) // cut.positions
    kept = config.num_layers * config.dim
    layers = 1 if cut.rematerialised else config.num_layers
    one_layer = 6 * config.dim + 3 * config.ffn_dim + 2 * config.num_heads * (config.head_dim + length)
    logits = min(tokens * config.vocab_size, cut.logits_per_pass or tokens * config.vocab_size)
    return 4 * params_bytes(config) // cut.params + 4 * (tokens * (kept + layers * one_layer) + 2 * logits)


def cache_bytes(config: ModelConfig, *, responses: int, length: int) -> int:
    """float32 keys and values of `responses` sequences of `length` tokens, and their logits."""
    keys_and_values = 8 * responses * length * config.num_layers * config.num_kv_heads * config.head_dim
    return keys_and_values + logits_bytes(config, rows=responses)


def logits_bytes(config: ModelConfig, *, rows: int) -> int:
    """float32 logits of a decoding step, twice."""
    return 8 * rows * config.vocab_size
