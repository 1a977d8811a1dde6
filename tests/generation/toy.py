"""A small model with decided opinions, its full forward pass, and requests: what the tests of the engine share."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import jax
import numpy as np

from afm_rl.compute import Compute
from afm_rl.config import ModelConfig
from afm_rl.generate import Generator
from afm_rl.generation.options import EngineOptions
from afm_rl.model import forward, logits
from afm_rl.parameters import Params, ParamSpec, param_specs
from afm_rl.types import GenerationRequest, Group

CONFIG = ModelConfig(97, 16, 32, 2, 4, 2, 8, max_positions=256)
PAGE = 8


def random_params(seed: int = 0, config: ModelConfig = CONFIG, scale: float = 3.0) -> Params:
    """Weights larger than at the start of training, so that greedy decoding is not decided by rounding."""
    rng = np.random.default_rng(seed)

    def draw(spec: ParamSpec) -> np.ndarray:
        values = np.ones(spec.shape) if spec.std is None else scale * spec.std * rng.normal(size=spec.shape)
        return values.astype(np.float32)

    return jax.tree.map(draw, param_specs(config), is_leaf=lambda x: isinstance(x, ParamSpec))


PARAMS = random_params()


def make(stop_ids: Sequence[int] = (), *, params: Params = PARAMS, version: int = 1, **options: object) -> Generator:
    """An engine with weights; small pages, so that every test crosses borders."""
    generator = Generator(CONFIG, stop_ids=stop_ids, options=EngineOptions(**{"page_size": PAGE, "max_batch": 8} | options))
    generator.load(params, policy="p", version=version)
    return generator


def cache_of(pages: int) -> int:
    """Bytes of a cache of so many usable pages, the padding's not counted."""
    return pages * 2 * CONFIG.num_layers * CONFIG.num_kv_heads * CONFIG.head_dim * PAGE * 4


def ask(prompt: Sequence[int] | np.ndarray, name: str = "r", **options: object) -> GenerationRequest:
    return GenerationRequest(name, np.asarray(prompt, np.int32), **options)  # type: ignore[arg-type]


def prompt_of(length: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, CONFIG.vocab_size, length).astype(np.int32)


@partial(jax.jit, static_argnames="dtype")
def _logits(params: Params, tokens_1T: jax.Array, dtype: str) -> jax.Array:
    hidden = forward(params, tokens_1T, config=CONFIG, compute=Compute(dtype=dtype))
    return logits(params, hidden, CONFIG)


def learner_logps(
    prompt_T: np.ndarray,
    response_T: np.ndarray,
    *,
    params: Params = PARAMS,
    temperature: float = 1.0,
    dtype: str = "float32",
) -> np.ndarray:
    """log p [T, V] of what follows each position from the prompt's last on, by the learner's program, in float64."""
    tokens = np.concatenate([prompt_T, response_T])
    padded = np.zeros((1, CONFIG.max_positions), np.int32)
    padded[0, : len(tokens)] = tokens
    rows = np.asarray(_logits(params, padded, dtype), np.float64)[0, len(prompt_T) - 1 : len(tokens) - 1] / temperature
    rows -= rows.max(-1, keepdims=True)
    return rows - np.log(np.exp(rows).sum(-1, keepdims=True))


def own_logps(group: Group, response: int, **options: object) -> np.ndarray:
    """log p [T] of a response's tokens, by the learner's program."""
    tokens_T = group.responses[response]
    table = learner_logps(group.prompt_T, tokens_T, **options)  # type: ignore[arg-type]
    return table[np.arange(len(tokens_T)), tokens_T]
