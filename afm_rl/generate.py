"""Generation: batched sampling with a key-value cache, the prompt's part stored once for the G responses of a prompt.

A `Generator` is what a sampler, a committee member or a server runs. It answers `GenerationRequest`s with `Group`s: tokens,
and the log-probability of each under the sampling distribution (temperature only: 9 of the specification refuses top-k and
top-p while sampling for training). Shapes are bucketed, so that a bounded set of programs is compiled. Response j of a
request draws one uniform per token from the stream (seed, j) and inverts the cumulative distribution.

Shapes: P prompts, G responses per prompt, S prompt bucket, T response bucket, V vocab.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from afm_rl.compute import Compute
from afm_rl.config import ModelConfig
from afm_rl.model import KVCache, decode_step, forward, logits
from afm_rl.parameters import Params
from afm_rl.types import GenerationRequest, Group

PROMPT_BUCKET = 32
RESPONSE_BUCKET = 16


class _State(NamedTuple):
    """What one decoding step hands to the next; `step` tokens of every response are written."""

    step: jax.Array
    tokens_PGT: jax.Array
    logps_PGT: jax.Array
    done_PG: jax.Array
    next_logits_PGV: jax.Array
    cache: KVCache


class _Batch(NamedTuple):
    """Device inputs of one batch of requests that share G."""

    prompt_length_P: jax.Array
    max_tokens_P: jax.Array
    temperature_P: jax.Array
    keys_PG: jax.Array
    stop_ids: jax.Array


class NoWeightsError(RuntimeError):
    """Asked to generate before any weights were loaded."""


@dataclasses.dataclass
class GeneratorStats:
    """Counters since construction."""

    prompt_tokens: int = 0
    response_tokens: int = 0
    batches: int = 0


class Generator:
    """Holds one policy's parameters and generates from them.

    `max_batch` bounds prompts x responses in one batch; more requests run as several batches. `stop_ids` end a response.
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        stop_ids: Sequence[int],
        max_batch: int = 256,
        compute_dtype: str = "float32",
    ) -> None:
        self.config = config
        self.max_batch = max_batch
        self.stop_ids = tuple(stop_ids)
        self.policy, self.version = "", -1
        self.stats = GeneratorStats()
        self._params: Params | None = None
        self._dtype = jnp.dtype(compute_dtype)

    def load(self, params: Mapping[str, Any], *, policy: str, version: int) -> None:
        """Use these parameters from the next call on. Raises ValueError when a value is not finite."""
        loaded = jax.tree.map(jnp.asarray, dict(params))
        if not bool(_all_finite(loaded)):
            raise ValueError(f"weights of policy {policy!r} version {version} hold values that are not finite")
        self._params, self.policy, self.version = loaded, policy, version

    def generate(self, requests: Sequence[GenerationRequest]) -> list[Group]:
        """Answer every request, in order. Raises ValueError for a request that cannot fit the model."""
        for request in requests:
            self._check(request)
        answers: dict[int, Group] = {}
        for indices in self._batches(requests):
            batch = [requests[i] for i in indices]
            answers.update(zip(indices, self._run(batch), strict=True))
        return [answers[i] for i in range(len(requests))]

    def stream(self, request: GenerationRequest, *, chunk: int = 4) -> Iterator[int]:
        """The tokens of one response as they are decoded, `chunk` at a time; the same tokens as `generate` gives."""
        self._check(request)
        request = dataclasses.replace(request, num_responses=1)
        params, batch, state, response_bucket = self._start([request])
        sent = 0
        try:
            while sent < request.max_tokens:
                state = _decode(params, batch, state, min(sent + chunk, response_bucket), self.config)
                tokens_T = np.asarray(state.tokens_PGT[0, 0])
                for token in tokens_T[sent : min(int(state.step), request.max_tokens)].tolist():
                    sent += 1
                    yield token
                    if token in self.stop_ids:
                        return
        finally:  # a stream mostly ends at a stop token, or when its reader goes away
            self._count([request], sent)

    def _check(self, request: GenerationRequest) -> None:
        if self._params is None:
            raise NoWeightsError("no weights loaded: call load() before generate()")
        length = len(request.prompt_T)
        if length == 0:
            raise ValueError(f"request {request.id!r} has an empty prompt")
        if request.num_responses < 1 or request.max_tokens < 1 or request.temperature < 0:
            raise ValueError(
                f"request {request.id!r}: num_responses and max_tokens must be at least 1 and temperature not negative, got "
                f"{request.num_responses}, {request.max_tokens}, {request.temperature}"
            )
        if length + request.max_tokens > self.config.max_positions:
            raise ValueError(
                f"request {request.id!r}: prompt of {length} tokens + {request.max_tokens} new ones exceeds the model's "
                f"{self.config.max_positions} positions"
            )
        if request.num_responses > self.max_batch:
            raise ValueError(f"request {request.id!r}: {request.num_responses} responses exceed max_batch {self.max_batch}")

    def _batches(self, requests: Sequence[GenerationRequest]) -> Iterator[list[int]]:
        """Indices that run together: same shape class, at most max_batch responses, in order of arrival."""
        classes: dict[tuple[int, int, int], list[int]] = {}
        for i, request in enumerate(requests):
            shape = (
                _bucket(len(request.prompt_T), PROMPT_BUCKET),
                request.num_responses,
                _bucket(request.max_tokens, RESPONSE_BUCKET),
            )
            classes.setdefault(shape, []).append(i)
        for (_, responses, _), indices in classes.items():
            size = max(1, self.max_batch // responses)
            for start in range(0, len(indices), size):
                yield indices[start : start + size]

    def _start(self, requests: Sequence[GenerationRequest]) -> tuple[Params, _Batch, _State, int]:
        """Prefill of a batch padded to its buckets; padding rows repeat the first request and are born finished."""
        assert self._params is not None
        G = requests[0].num_responses
        rows = min(_power_of_two(len(requests)), max(1, self.max_batch // G))
        S = _bucket(max(len(r.prompt_T) for r in requests), PROMPT_BUCKET)
        T = _bucket(max(r.max_tokens for r in requests), RESPONSE_BUCKET)
        padded = list(requests) + [requests[0]] * (rows - len(requests))
        prompts_PS = np.zeros((rows, S), np.int32)
        for row, request in enumerate(padded):
            prompts_PS[row, : len(request.prompt_T)] = request.prompt_T
        lengths_P = np.array([len(r.prompt_T) for r in padded], np.int32)
        max_tokens_P = np.array([r.max_tokens for r in requests] + [0] * (rows - len(requests)), np.int32)
        seeds = np.array([[(r.seed, j) for j in range(G)] for r in padded], np.int64).astype(np.uint32)
        batch = _Batch(
            jnp.asarray(lengths_P),
            jnp.asarray(max_tokens_P),
            jnp.asarray(np.array([r.temperature for r in padded], np.float32)),
            _stream_keys(jnp.asarray(seeds)),
            jnp.asarray(self.stop_ids, jnp.int32),
        )
        state = _prefill(self._params, jnp.asarray(prompts_PS), batch, G, T, self.config, self._dtype)
        return self._params, batch, state, T

    def _run(self, requests: Sequence[GenerationRequest]) -> list[Group]:
        params, batch, state, response_bucket = self._start(requests)
        state = _decode(params, batch, state, response_bucket, self.config)
        tokens_PGT, logps_PGT = np.asarray(state.tokens_PGT), np.asarray(state.logps_PGT)
        groups = [self._group(r, tokens_PGT[row], logps_PGT[row]) for row, r in enumerate(requests)]
        self._count(requests, sum(len(tokens) for group in groups for tokens in group.responses))
        return groups

    def _group(self, request: GenerationRequest, tokens_GT: np.ndarray, logps_GT: np.ndarray) -> Group:
        responses, logps, finished = [], [], []
        for tokens_T, logps_T in zip(tokens_GT, logps_GT, strict=True):
            stops = np.flatnonzero(np.isin(tokens_T[: request.max_tokens], self.stop_ids))
            length = int(stops[0]) + 1 if len(stops) else request.max_tokens
            responses.append(tokens_T[:length].copy())
            logps.append(logps_T[:length].copy())
            finished.append(bool(len(stops)))
        return Group(
            request.id,
            np.asarray(request.prompt_T, np.int32),
            tuple(responses),
            tuple(logps),
            tuple(finished),
            self.policy,
            self.version,
        )

    def _count(self, requests: Sequence[GenerationRequest], response_tokens: int) -> None:
        self.stats.batches += 1
        self.stats.prompt_tokens += sum(len(r.prompt_T) for r in requests)
        self.stats.response_tokens += response_tokens


def request_seed(*parts: object) -> int:
    """A 32-bit seed from anything printable: the same request gets the same stream on every launcher and after a resume."""
    import hashlib

    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:4], "little")


@partial(jax.jit, static_argnames=("responses", "response_bucket", "config", "dtype"))
def _prefill(
    params: Params,
    prompts_PS: jax.Array,
    batch: _Batch,
    responses: int,
    response_bucket: int,
    config: ModelConfig,
    dtype: Any,
) -> _State:
    """The prompts' keys and values, and the logits of every response's first token."""
    P = prompts_PS.shape[0]
    hidden, (k_LPSKH, v_LPSKH) = forward(
        params, prompts_PS, config=config, compute=Compute(dtype=str(dtype)), keep_cache=True
    )
    last_PD = jnp.take_along_axis(hidden, (batch.prompt_length_P - 1)[:, None, None], axis=1)[:, 0]
    first_PV = logits(params, last_PD, config)
    empty = jnp.zeros((P, responses, response_bucket, config.num_kv_heads, config.head_dim), dtype)
    cache = KVCache(tuple(k_LPSKH), tuple(v_LPSKH), (empty,) * config.num_layers, (empty,) * config.num_layers)
    return _State(
        step=jnp.int32(0),
        tokens_PGT=jnp.zeros((P, responses, response_bucket), jnp.int32),
        logps_PGT=jnp.zeros((P, responses, response_bucket), jnp.float32),
        done_PG=jnp.broadcast_to(batch.max_tokens_P[:, None] == 0, (P, responses)),
        next_logits_PGV=jnp.broadcast_to(first_PV[:, None], (P, responses, first_PV.shape[-1])),
        cache=cache,
    )


@partial(jax.jit, static_argnames=("config",), donate_argnames=("state",))
def _decode(params: Params, batch: _Batch, state: _State, until: jax.Array, config: ModelConfig) -> _State:
    """Decode until `until` tokens of every response are written, or all are done."""

    def body(state: _State) -> _State:
        token_PG, logp_PG = _sample(state.next_logits_PGV, batch, state.step)
        stopped_PG = (token_PG[..., None] == batch.stop_ids).any(-1)
        done_PG = state.done_PG | stopped_PG | (state.step + 1 >= batch.max_tokens_P[:, None])
        next_logits, cache = decode_step(
            params,
            token_PG,
            state.cache,
            config=config,
            prompt_length_P=batch.prompt_length_P,
            step=state.step,
        )
        return _State(
            state.step + 1,
            jax.lax.dynamic_update_index_in_dim(state.tokens_PGT, token_PG, state.step, axis=2),
            jax.lax.dynamic_update_index_in_dim(state.logps_PGT, logp_PG, state.step, axis=2),
            done_PG,
            next_logits,
            cache,
        )

    return jax.lax.while_loop(lambda s: (s.step < until) & ~s.done_PG.all(), body, state)


def _sample(logits_PGV: jax.Array, batch: _Batch, step: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Inverse-CDF draw at each row's temperature (argmax at 0), and its log-probability (at temperature 1 where greedy)."""
    temperature = batch.temperature_P[:, None, None]
    logp = jax.nn.log_softmax(logits_PGV / jnp.where(temperature > 0, temperature, 1.0), axis=-1)
    uniform_PG = jax.vmap(jax.vmap(lambda key: jax.random.uniform(jax.random.fold_in(key, step))))(batch.keys_PG)
    cumulative = jnp.cumsum(jnp.exp(logp), axis=-1)
    # The total is 1 up to rounding: scaling the uniform by it keeps the last token with probability inside its own mass.
    drawn = (cumulative <= uniform_PG[..., None] * cumulative[..., -1:]).sum(-1)
    drawn = jnp.minimum(drawn, logits_PGV.shape[-1] - 1)
    token = jnp.where(batch.temperature_P[:, None] > 0, drawn, jnp.argmax(logits_PGV, axis=-1)).astype(jnp.int32)
    return token, jnp.take_along_axis(logp, token[..., None], axis=-1)[..., 0]


@jax.jit
def _stream_keys(seeds_PG2: jax.Array) -> jax.Array:
    return jax.vmap(jax.vmap(lambda s: jax.random.fold_in(jax.random.key(s[0]), s[1])))(seeds_PG2)


@jax.jit
def _all_finite(params: Params) -> jax.Array:
    floats = [leaf for leaf in jax.tree.leaves(params) if jnp.issubdtype(leaf.dtype, jnp.floating)]
    return jnp.stack([jnp.isfinite(leaf).all() for leaf in floats]).all()


def _bucket(length: int, size: int) -> int:
    return -(-length // size) * size


def _power_of_two(count: int) -> int:
    return 1 << (count - 1).bit_length()
