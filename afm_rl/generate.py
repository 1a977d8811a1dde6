"""Generation: an engine with continuous batching over a paged key-value cache; what a sampler, a committee or a server runs.

Requests join and leave the batch at every token; a prompt's responses share its pages; known prefixes are not computed
again; when pages run out the youngest response waits instead of the process running out of memory. Response j of a request
draws one uniform per token from the stream (seed, j) and inverts the cumulative distribution, so that its tokens do not
depend on what else runs (to the bit with `deterministic`, else up to rounding).

Weights may change while requests run: after these (`finish`), with these begun again (`restart`), or between two of their
tokens (`continue`), each token stamped with the version that made it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from afm_rl.config import ModelConfig
from afm_rl.generation.engine_weights import AdapterBank, EngineWeights, prepare
from afm_rl.generation.options import EngineOptions
from afm_rl.generation.pages import PagePool
from afm_rl.generation.programs import Decoded
from afm_rl.generation.runner import MAX_STOP_IDS, Runner
from afm_rl.generation.sampling import check_options
from afm_rl.generation.scheduler import Scheduler, page_need, tokens_to_fill
from afm_rl.generation.sequences import Job, Response
from afm_rl.types import GenerationRequest, Group, TopLogprobs

#: Rows that end before the batch is looked at again, as a share of it: each look costs about a millisecond.
_LEAVING_SHARE = 16


class NoWeightsError(RuntimeError):
    """Asked to generate before any weights were loaded."""


@dataclass(frozen=True)
class GeneratorStats:
    """Counters since construction, and the present state.

    `prompt_tokens` were computed, `cached_prompt_tokens` found in the cache. Every decoding step of a batch adds its size to
    `row_steps` and its working rows to `occupied_row_steps`.
    """

    prompt_tokens: int = 0
    cached_prompt_tokens: int = 0
    response_tokens: int = 0
    steps: int = 0
    row_steps: int = 0
    occupied_row_steps: int = 0
    preemptions: int = 0
    compiled_programs: int = 0
    running: int = 0
    waiting: int = 0
    pages: int = 0
    free_pages: int = 0


@dataclass(frozen=True)
class _Update:
    """Weights ready for the device."""

    base: dict[str, Any]
    policy: str
    version: int


class Generator:
    """One engine. Not thread safe. `stop_ids` end a response; `decode` gives the text of tokens, for stop strings."""

    def __init__(
        self,
        config: ModelConfig,
        *,
        stop_ids: Sequence[int],
        options: EngineOptions | None = None,
        decode: Callable[[list[int]], str] | None = None,
    ) -> None:
        self.config, self.options = config, options or EngineOptions()
        self.stop_ids = tuple(stop_ids)
        self.policy, self.version = "", -1
        self.max_context = min(self.options.max_context or config.max_positions, config.max_positions)
        self._text = decode
        self._runner = Runner(config, self.options, max_context=self.max_context)
        pool = PagePool(self._runner.pages, self.options.page_size)
        self._scheduler = Scheduler(pool, max_rows=self.options.max_batch, prefix_cache=self.options.prefix_cache)
        self._bank: AdapterBank | None = None
        if self.options.max_adapters:
            places, rank = self.options.max_adapters, self.options.max_adapter_rank
            self._bank = AdapterBank(config, places=places, rank=rank, dtype=self.options.compute_dtype)
        self._jobs: dict[int, Job] = {}
        self._arrivals = 0
        self._pending: _Update | None = None
        self._unclaimed: list[Group] = []
        self._adapter_loads = 0
        self._counts = dict.fromkeys(("prompt_tokens", "response_tokens", "steps", "row_steps", "occupied_row_steps"), 0)

    @property
    def stats(self) -> GeneratorStats:
        """What was done so far, and how things stand."""
        scheduler, pool = self._scheduler, self._scheduler.pool
        return GeneratorStats(
            **self._counts,
            cached_prompt_tokens=scheduler.cached_tokens,
            preemptions=scheduler.preemptions,
            compiled_programs=self._runner.compiled_programs,
            running=len(scheduler.rows),
            waiting=scheduler.waiting,
            pages=pool.pages,
            free_pages=pool.available,
        )

    @property
    def planned_programs(self) -> int:
        """More programs than these are never compiled."""
        return self._runner.plan.programs

    @property
    def unfinished(self) -> int:
        """Requests that are not answered yet."""
        return len(self._jobs)

    def load(self, params: Mapping[str, Any], *, policy: str, version: int) -> None:
        """Use these parameters. While requests run, `options.on_update` says when and what becomes of those.

        Raises ValueError when a value is not finite; what was loaded before stays in use.
        """
        base = prepare(params, self.config, jnp.dtype(self.options.compute_dtype))
        if not bool(_all_finite(base)):
            raise ValueError(f"weights of policy {policy!r} version {version} hold values that are not finite")
        self._pending = _Update(base, policy, version)
        self._update()

    def load_adapter(self, name: str, lora: Mapping[str, Any], *, alpha: float, rank: int) -> None:
        """Hold a LoRA adapter for requests that name it.

        Raises ValueError for one that does not fit, is not finite, finds no place or is in use.
        """
        bank = self._adapters_allowed()
        self._refuse_if_used(name)
        bank.put(name, lora, alpha=alpha, rank=rank)
        self._adapter_loads += 1
        self._renew_bank()

    def drop_adapter(self, name: str) -> None:
        """Free an adapter's place. Raises ValueError while requests use it."""
        self._refuse_if_used(name)
        self._adapters_allowed().drop(name)
        self._renew_bank()

    @property
    def adapters(self) -> list[str]:
        """Names of the adapters held."""
        return [name for name in self._bank.names if name] if self._bank else []

    def submit(self, request: GenerationRequest) -> None:
        """Put a request into the queue. Raises ValueError for one that can never run; nothing else is affected."""
        self._submit(request)

    def step(self) -> list[Group]:
        """One step of the engine: the requests that it answered."""
        groups, self._unclaimed = self._unclaimed, []
        return groups + [self._group(job) for job in self._step()]

    def cancel(self, request_id: str) -> None:
        """Give up every request of this id."""
        for job in [job for job in self._jobs.values() if job.request.id == request_id]:
            self._give_up(job)

    def generate(self, requests: Sequence[GenerationRequest]) -> list[Group]:
        """Answer every request, in order. Raises ValueError for one that cannot run, before any is begun."""
        for request in requests:
            self._check(request)
        jobs = [self._submit(request) for request in requests]
        answers: dict[int, Group] = {}
        while len(answers) < len(jobs):
            for job in self._step():
                if job in jobs:
                    answers[job.arrival] = self._group(job)
                else:
                    self._unclaimed.append(self._group(job))
        return [answers[job.arrival] for job in jobs]

    def stream(self, request: GenerationRequest) -> Iterator[int]:
        """The tokens of the first response as they are decoded; the same tokens as `generate` gives."""
        job = self._submit(request)
        [response, *_] = job.responses
        sent = 0
        try:
            while True:
                if len(response.tokens) > sent:
                    sent += 1
                    yield response.tokens[sent - 1]
                elif response.done:
                    return
                else:
                    self._unclaimed += [self._group(other) for other in self._step() if other is not job]
        finally:  # a reader may go away before the end
            if job.arrival in self._jobs:
                self._give_up(job)

    def _check(self, request: GenerationRequest) -> None:
        if self.version < 0 and self._pending is None:
            raise NoWeightsError("no weights loaded: call load() before generate()")
        name, length = f"request {request.id!r}", len(request.prompt_T)
        if length == 0:
            raise ValueError(f"{name} has an empty prompt")
        if request.num_responses < 1 or request.max_tokens < 1 or not 0 <= request.temperature < float("inf"):
            raise ValueError(
                f"{name}: num_responses and max_tokens must be at least 1 and temperature not negative, got "
                f"{request.num_responses}, {request.max_tokens}, {request.temperature}"
            )
        tokens = np.asarray(request.prompt_T)
        if tokens.min() < 0 or tokens.max() >= self.config.vocab_size:
            raise ValueError(f"{name}: the prompt has token ids outside 0..{self.config.vocab_size - 1}")
        if length + request.max_tokens > self.max_context:
            raise ValueError(
                f"{name}: prompt of {length} tokens + {request.max_tokens} new ones exceeds {self.max_context} positions "
                f"(the model has {self.config.max_positions})"
            )
        pool = self._scheduler.pool
        needed = page_need(length, request.max_tokens, pool.page_size)
        if needed > pool.pages:
            mib = needed * self._runner.page_bytes / 2**20
            raise ValueError(
                f"{name}: prompt of {length} tokens + {request.max_tokens} new ones need {needed} pages ({mib:.1f} MiB) of the "
                f"key-value cache, which has {pool.pages}; raise kv_cache or shorten the request"
            )
        if request.adapter and request.adapter not in self.adapters:
            raise ValueError(f"{name}: unknown adapter {request.adapter!r}; held: {', '.join(self.adapters) or 'none'}")
        if request.options.stop and self._text is None:
            raise ValueError(f"{name}: stop strings need a tokenizer, which this engine was not given; use stop_ids")
        try:
            check_options(request.options, vocab_size=self.config.vocab_size)
            self._stop_ids(request)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error

    def _stop_ids(self, request: GenerationRequest) -> tuple[int, ...]:
        own = () if request.options.ignore_stop else self.stop_ids
        ids = tuple(dict.fromkeys((*own, *request.options.stop_ids)))
        if len(ids) > MAX_STOP_IDS:
            raise ValueError(f"{len(ids)} tokens end a response; at most {MAX_STOP_IDS} may")
        return ids

    def _submit(self, request: GenerationRequest) -> Job:
        self._check(request)
        job = Job(request, self._arrivals, self._stop_ids(request))
        if request.adapter:
            assert self._bank is not None
            job.adapter, job.adapter_key = (
                self._bank.names.index(request.adapter),
                f"{request.adapter}/{self._adapter_loads}",
            )
        job.responses = [Response(job, j) for j in range(request.num_responses)]
        self._arrivals += 1
        self._jobs[job.arrival] = job
        self._scheduler.add(job)
        return job

    def _step(self) -> list[Job]:
        """Schedule, compute, and take stock; the jobs that ended."""
        self._update()
        if not self._jobs:
            return []
        options, scheduler = self.options, self._scheduler
        together = options.deterministic
        work = scheduler.schedule(
            budget=self._runner.plan.prefill[-1] if together else options.prefill_chunk,
            steps=1 if together else options.decode_steps,
            policy=self.policy,
            version=self.version,
            together=together,
        )
        self._runner.copy(work.copies)
        if together:
            decoded = self._runner.step_together(work.pieces, work.rows)
        else:
            self._runner.fill(work.pieces)
            leave_at = max(1, len(work.rows) // _LEAVING_SHARE) if scheduler.waiting else max(1, len(work.rows) // 2)
            decoded = self._runner.decode(work.rows, steps=work.steps, leave_at=leave_at) if work.rows else None
        self._counts["steps"] += 1
        self._counts["prompt_tokens"] += tokens_to_fill(work.pieces)
        for piece in work.pieces:
            scheduler.filled(piece, version=self.version)
        if decoded is None:
            return []
        return self._take(work.rows, decoded)

    def _take(self, rows: Sequence[Response], decoded: Decoded) -> list[Job]:
        """Give the rows their tokens; rows that ended leave. The jobs that ended with them."""
        self._counts["row_steps"] += len(decoded.count_R) * int(decoded.count_R.max())
        self._counts["occupied_row_steps"] += int(decoded.count_R.sum())
        for r, row in enumerate(rows):
            count, before = int(decoded.count_R[r]), len(row.tokens)
            row.tokens += decoded.token_RS[r, :count].tolist()
            row.logps += decoded.logp_RS[r, :count].tolist()
            row.versions += [self.version] * count
            if row.request.options.logprobs:
                row.top_ids += list(decoded.top_ids_RSN[r, :count])
                row.top_logps += list(decoded.top_logps_RSN[r, :count])
            row.stopped = bool(decoded.stopped_R[r])
            self._cut_at_stop_string(row, before)
            row.done = row.stopped or row.left == 0
            self._counts["response_tokens"] += len(row.tokens) - before
        for row in [row for row in rows if row.done]:
            self._scheduler.leave(row)
        done = {row.job.arrival: row.job for row in rows if row.job.done}
        for arrival in done:
            del self._jobs[arrival]
        return list(done.values())

    def _cut_at_stop_string(self, row: Response, before: int) -> None:
        """End a response with the token that completes a stop string; `before` tokens have been looked at already."""
        stops = row.request.options.stop
        if not stops or self._text is None or not any(stop in self._text(row.tokens) for stop in stops):
            return
        for count in range(max(before, row.request.options.min_tokens) + 1, len(row.tokens) + 1):
            text = self._text(row.tokens[:count])
            if any(stop in text for stop in stops):
                for kept in (row.tokens, row.logps, row.versions, row.top_ids, row.top_logps):
                    del kept[count:]
                row.stopped = True
                return

    def _update(self) -> None:
        """Change to the pending weights if that is allowed now."""
        if self._pending is None:
            return
        self._scheduler.draining = bool(self._jobs) and self.options.on_update == "finish"
        if self._scheduler.draining and any(job.begun for job in self._jobs.values()):
            return
        self._scheduler.draining = False
        if self._jobs and self.options.on_update == "restart":
            self._scheduler.start_over()
        update, self._pending = self._pending, None
        bank = self._runner.weights.bank if self._runner.weights else self._bank.device() if self._bank else None
        self._runner.weights = EngineWeights(update.base, bank)
        self.policy, self.version = update.policy, update.version

    def _renew_bank(self) -> None:
        if self._runner.weights is not None and self._bank is not None:
            self._runner.weights = self._runner.weights._replace(bank=self._bank.device())

    def _adapters_allowed(self) -> AdapterBank:
        if self._bank is None:
            raise ValueError("this engine holds no adapters: set max_adapters")
        return self._bank

    def _refuse_if_used(self, name: str) -> None:
        users = [job.request.id for job in self._jobs.values() if job.request.adapter == name]
        if users:
            raise ValueError(f"adapter {name!r} is in use by {len(users)} requests ({users[0]!r}, ...): wait or cancel them")

    def _give_up(self, job: Job) -> None:
        self._scheduler.remove(job)
        del self._jobs[job.arrival]

    def _group(self, job: Job) -> Group:
        """What the caller gets of an answered request."""
        request, responses, scores = job.request, job.responses, job.prompt_scores
        mixed = any(version != job.version for r in responses for version in r.versions)
        top = request.options.logprobs
        wanted = request.options.prompt_logprobs
        return Group(
            request.id,
            np.asarray(request.prompt_T, np.int32),
            tuple(np.array(r.tokens, np.int32) for r in responses),
            tuple(np.array(r.logps, np.float32) for r in responses),
            tuple(r.stopped for r in responses),
            self.policy,
            job.version,
            versions=tuple(np.array(r.versions, np.int32) for r in responses) if mixed else (),
            top=tuple(TopLogprobs(np.stack(r.top_ids)[:, :top], np.stack(r.top_logps)[:, :top]) for r in responses)
            if top
            else (),
            prompt_logp_T=scores.logp_T if scores else None,
            prompt_top=TopLogprobs(scores.top_ids_TN[:, :wanted], scores.top_logps_TN[:, :wanted])
            if scores and wanted
            else None,
        )


def request_seed(*parts: object) -> int:
    """A 32-bit seed from anything printable: the same request gets the same stream on every launcher and after a resume."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:4], "little")


@jax.jit
def _all_finite(params: Any) -> jax.Array:
    floats = [leaf for leaf in jax.tree.leaves(params) if jnp.issubdtype(leaf.dtype, jnp.floating)]
    return jnp.stack([jnp.isfinite(leaf).all() for leaf in floats]).all()
