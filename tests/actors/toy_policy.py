"""A policy of a few hundred parameters as it travels: weights by seed, damaged ones, ones with NaN, and what to ask it."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np

from actors.sampler import PolicySpec
from afm_rl.config import ModelConfig
from afm_rl.generation.options import EngineOptions
from afm_rl.parameters import ParamSpec, param_specs
from afm_rl.types import GenerationRequest, Weights
from afm_rl.weights import flatten, unflatten

CONFIG = ModelConfig(11, 8, 16, 1, 2, 1, 4, max_positions=48)
SPEC = PolicySpec(CONFIG, stop_ids=(3,))
ENGINE = EngineOptions(max_batch=4, page_size=8, kv_cache_bytes=2**16)


def weights(policy: str, version: int, seed: int = 0) -> Weights:
    rng = np.random.default_rng(seed)

    def draw(spec: ParamSpec) -> np.ndarray:
        return np.ones(spec.shape, np.float32) if spec.std is None else rng.normal(size=spec.shape).astype(np.float32)

    params = jax.tree.map(draw, param_specs(CONFIG), is_leaf=lambda x: isinstance(x, ParamSpec))
    return flatten(params, policy=policy, version=version)


def damaged(good: Weights) -> Weights:
    """A bit changed on the way."""
    buffers = {name: buffer.copy() for name, buffer in good.buffers.items()}
    buffers["float32"].view(np.uint8)[0] ^= 1
    return dataclasses.replace(good, buffers=buffers)


def not_finite(policy: str, version: int) -> Weights:
    """Weights of a training run that diverged: whole, and worthless."""
    params = jax.tree.map(np.copy, unflatten(weights(policy, version)))
    jax.tree.leaves(params)[-1][...] = np.nan
    return flatten(params, policy=policy, version=version)


def request(name: str, *prompt: int, responses: int = 1, tokens: int = 16, temperature: float = 0.0) -> GenerationRequest:
    return GenerationRequest(name, np.array(prompt, np.int32), responses, tokens, temperature, seed=sum(map(ord, name)))
