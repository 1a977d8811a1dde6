"""What generates behind the server (paper 5.1): a base model, and LoRA adapters loaded, cached and swapped at run time.

The base is a palettized package or a policy in Hugging Face's layout; adapters are folders below its `adapters/`, in
PEFT's layout, and one that appears or changes there is served from the next request on. Every resident adapter has a
`Generator` of its own over the same base arrays, so that a running stream keeps its weights whatever is loaded or
evicted meanwhile. One piece of work runs at a time, a whole request or one chunk of a stream: a slow reader holds
nobody up. Requests do not share batches in this version.
"""

from __future__ import annotations

import os
import threading
from collections import OrderedDict, abc
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from actors.server_objects import TokenScores
from afm_rl.compute import Compute
from afm_rl.config import ModelConfig
from afm_rl.generate import Generator
from afm_rl.generation.options import EngineOptions
from afm_rl.huggingface import load_params
from afm_rl.lora import attach
from afm_rl.model import forward, logits
from afm_rl.parameters import Params
from afm_rl.tokenizer import Tokenizer
from afm_rl.types import GenerationRequest, Group
from quant.adapter import WEIGHTS_FILE, read_adapter
from quant.package import is_package, read_package

BASE = "base"
#: Of each resident policy.
KV_CACHE_BYTES = 2**27
#: Sequences are scored at a multiple of this length, so many rows of logits at a time.
SCORE_BUCKET = 64
#: How many alternatives the scoring programs rank: each is one compiled program.
_TOP_SIZES = (1, 5, 20)


@dataclass(frozen=True)
class _Resident:
    """A policy in memory; `stamp` tells whether its file has changed since."""

    params: Params
    generator: Generator
    stamp: tuple[int, int]


class AdapterBackend:
    """Serves `folder`: model "base", and one model per adapter. Thread safe.

    At most `max_adapters` adapters stay in memory, the least recently used one is dropped first. `max_batch` bounds the
    responses of one request. Raises ValueError or FileNotFoundError, naming the file, for a folder that cannot be
    loaded.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        *,
        max_adapters: int = 4,
        max_batch: int = 64,
        compute_dtype: str = "float32",
    ) -> None:
        if max_adapters < 1:
            raise ValueError(f"max_adapters must be at least 1, got {max_adapters}")
        self._folder = Path(folder)
        self._max_adapters, self._max_batch, self._dtype = max_adapters, max_batch, compute_dtype
        self.tokenizer = Tokenizer.load(self._folder)
        self.config, params = _load_base(self._folder)
        self._lock = threading.Lock()
        self._base = self._resident(BASE, params, stamp=(0, 0))
        self._adapters: OrderedDict[str, _Resident] = OrderedDict()

    @property
    def max_positions(self) -> int:
        return self.config.max_positions

    def models(self) -> list[str]:
        """The base, then every adapter there is now, in alphabetical order."""
        return [BASE, *sorted(path.parent.name for path in self._folder.glob(f"adapters/*/{WEIGHTS_FILE}"))]

    @property
    def resident(self) -> list[str]:
        """The adapters in memory, least recently used first."""
        return list(self._adapters)

    def generate(self, model: str, request: GenerationRequest) -> Group:
        """All responses of one request."""
        with self._lock:
            return self._policy(model).generator.generate([request])[0]

    def stream(self, model: str, request: GenerationRequest) -> abc.Generator[int, None, None]:
        """The tokens of one response as they are decoded; others' work may run between two of them."""
        with self._lock:
            tokens = self._policy(model).generator.stream(request)
        try:
            while True:
                with self._lock:
                    token = next(tokens, None)
                if token is None:
                    return
                yield token
        finally:
            with self._lock:  # what the reader leaves is given up between two steps of others
                tokens.close()

    def score(self, model: str, tokens_T: np.ndarray, *, top: int) -> TokenScores:
        """Log-probabilities at temperature 1 of every token given those before it, and the `top` best alternatives."""
        T = len(tokens_T)
        padded = np.zeros(-(-T // SCORE_BUCKET) * SCORE_BUCKET, np.int32)
        padded[:T] = tokens_T
        ranked = min(next((size for size in _TOP_SIZES if size >= top), top), self.config.vocab_size)
        with self._lock:
            params = self._policy(model).params
            scored = _score(params, jnp.asarray(padded), config=self.config, dtype=self._dtype, top=ranked)
            logp, top_logp, top_ids = (np.asarray(array)[: T - 1] for array in scored)
        first = np.full((1,), np.nan, np.float32)
        return TokenScores(
            logp_T=np.concatenate([first, logp]),
            top_ids_TK=np.concatenate([np.zeros((1, ranked), np.int32), top_ids])[:, :top],
            top_logp_TK=np.concatenate([np.full((1, ranked), np.nan, np.float32), top_logp])[:, :top],
        )

    def _policy(self, model: str) -> _Resident:
        """The model, loaded if need be. Called with the lock held. Raises KeyError for an unknown name."""
        if model == BASE:
            return self._base
        if model not in self.models():
            raise KeyError(f"no model {model!r} in {self._folder}; available: {', '.join(self.models())}")
        path = self._folder / "adapters" / model
        stat = (path / WEIGHTS_FILE).stat()
        stamp = (stat.st_mtime_ns, stat.st_size)
        held = self._adapters.get(model)
        if held is None or held.stamp != stamp:
            params = _attach_adapter(self._base.params, path)
            held = self._adapters[model] = self._resident(model, params, stamp)
        self._adapters.move_to_end(model)
        while len(self._adapters) > self._max_adapters:
            self._adapters.popitem(last=False)
        return held

    def _resident(self, name: str, params: Params, stamp: tuple[int, int]) -> _Resident:
        params = jax.tree.map(jnp.asarray, params)  # the base's arrays are there already, and are shared
        stop_ids = self.tokenizer.stop_ids
        options = EngineOptions(max_batch=self._max_batch, kv_cache_bytes=KV_CACHE_BYTES, compute_dtype=self._dtype)
        generator = Generator(self.config, stop_ids=stop_ids, options=options)
        generator.load(params, policy=name, version=0)
        return _Resident(params, generator, stamp)


@partial(jax.jit, static_argnames=("config", "dtype", "top"))
def _score(
    params: Params, tokens_T: jax.Array, *, config: ModelConfig, dtype: str, top: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(logp_T of the NEXT token, top_logp_TK, top_ids_TK), one block of rows of logits in memory at a time."""
    hidden_1TD = forward(params, tokens_T[None], config=config, compute=Compute(dtype=dtype))
    next_T = jnp.roll(tokens_T, -1)

    def rows(block: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array, jax.Array]:
        hidden_RD, next_R = block
        logp_RV = jax.nn.log_softmax(logits(params, hidden_RD, config), axis=-1)
        best_RK, ids_RK = jax.lax.top_k(logp_RV, top)
        return jnp.take_along_axis(logp_RV, next_R[:, None], axis=-1)[:, 0], best_RK, ids_RK

    blocks = (hidden_1TD[0].reshape(-1, SCORE_BUCKET, config.dim), next_T.reshape(-1, SCORE_BUCKET))
    own, best, ids = jax.lax.map(rows, blocks)
    return own.reshape(-1), best.reshape(-1, top), ids.reshape(-1, top)


def _load_base(folder: Path) -> tuple[ModelConfig, Params]:
    if not is_package(folder):
        return load_params(folder)
    package = read_package(folder)
    return package.config, package.params


def _attach_adapter(base: Params, folder: Path) -> Params:
    adapter = read_adapter(folder)
    try:
        return attach(base, adapter.params, alpha=adapter.alpha, rank=adapter.rank)
    except ValueError as error:
        raise ValueError(f"{folder} was made for another model: {error}") from error
