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
from collections.abc import Callable, Mapping, Sequence
from collections.abc import Generator as Iteration
from dataclasses import dataclass
from typing import Any

from afm_rl.config import ModelConfig
from afm_rl.generation.admission import Limits, check_request
from afm_rl.generation.engine_weights import AdapterBank, EngineWeights, prepare_finite
from afm_rl.generation.options import EngineOptions
from afm_rl.generation.pages import PagePool
from afm_rl.generation.programs import Decoded
from afm_rl.generation.results import group_of, take_tokens
from afm_rl.generation.runner import Runner
from afm_rl.generation.scheduler import Scheduler, Work, tokens_to_fill
from afm_rl.generation.sequences import Job, PromptScores, Response
from afm_rl.generation.speculation import Speculator
from afm_rl.types import GenerationRequest, Group

#: Rows that end before the batch is looked at again, as a share of it: each look costs about a millisecond.
_LEAVING_SHARE = 16
#: What is counted.
_COUNTS = (
    "prompt_tokens",
    "response_tokens",
    "steps",
    "row_steps",
    "occupied_row_steps",
    "guessed_tokens",
    "kept_tokens",
    "verified_rows",
)


class NoWeightsError(RuntimeError):
    """Asked to generate before any weights were loaded."""


@dataclass(frozen=True)
class GeneratorStats:
    """Counters since construction, and the present state.

    `prompt_tokens` were computed, `cached_prompt_tokens` found in the cache. Every decoding step of a batch adds its size to
    `row_steps` and its working rows to `occupied_row_steps`. `kept_tokens` of `guessed_tokens` were kept (speculation), over
    `verified_rows` passes of a row, each of which also gives one token of the target's own.
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
    guessed_tokens: int = 0
    kept_tokens: int = 0
    verified_rows: int = 0


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
        self._runner = runner = Runner(config, self.options, max_context=self.max_context)
        pool = self._empty_pool()
        self._limits = Limits(
            config.vocab_size, self.max_context, config.max_positions, pool.pages, pool.page_size, runner.page_bytes
        )
        self._scheduler = Scheduler(pool, max_rows=self.options.max_batch, prefix_cache=self.options.prefix_cache)
        self._bank: AdapterBank | None = None
        if self.options.max_adapters:
            places, rank = self.options.max_adapters, self.options.max_adapter_rank
            self._bank = AdapterBank(config, places=places, rank=rank, dtype=self.options.compute_dtype)
        self._jobs: dict[int, Job] = {}
        self._arrivals = 0
        self._pending: _Update | None = None
        self._unclaimed: list[Group] = []
        self._loads, self._adapter_loads = 0, 0
        self._counts = dict.fromkeys(_COUNTS, 0)
        self._draft: Runner | None = None
        self._speculator: Speculator | None = None
        if self.options.speculative is not None and self.options.speculative.kind == "ngram":
            self._speculator = Speculator(self.options.speculative, runner, None)

    @property
    def stats(self) -> GeneratorStats:
        """What was done so far, and how things stand."""
        scheduler, pool = self._scheduler, self._scheduler.pool
        return GeneratorStats(
            **self._counts,
            cached_prompt_tokens=scheduler.cached_tokens,
            preemptions=scheduler.preemptions,
            compiled_programs=sum({runner.static: runner.compiled_programs for runner in self._runners}.values()),
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

        Raises ValueError when a value is not finite or a shape is wrong; what was loaded before stays in use.
        """
        base = prepare_finite(
            params, self.config, self.options.compute_dtype, what=f"weights of policy {policy!r} version {version}"
        )
        self._pending = _Update(base, policy, version)
        self._update()

    def load_draft(self, params: Mapping[str, Any], config: ModelConfig) -> None:
        """The model that guesses, for `speculative: draft`. Raises ValueError for one with another vocabulary."""
        options = self.options.speculative
        if options is None or options.kind != "draft":
            raise ValueError("this engine does not speculate with a draft model: set speculative to kind draft")
        if config.vocab_size != self.config.vocab_size:
            sizes = f"{config.vocab_size} tokens, the policy {self.config.vocab_size}"
            raise ValueError(f"the draft model knows {sizes}: it must have the policy's tokenizer")
        if self._jobs:
            raise ValueError(f"a draft model is loaded while nothing runs; {len(self._jobs)} requests are unfinished")
        base = prepare_finite(params, config, self.options.compute_dtype, what="the draft model's weights")
        self._scheduler.pool = self._empty_pool()  # the draft has no known prefixes yet
        self._draft = Runner(config, self.options, max_context=self.max_context, pages=self._runner.pages)
        self._draft.weights = EngineWeights(base)
        self._speculator = Speculator(options, self._runner, self._draft)

    @property
    def _runners(self) -> list[Runner]:
        return [self._runner, *([self._draft] if self._draft is not None else [])]

    def load_adapter(self, name: str, lora: Mapping[str, Any], *, alpha: float, rank: int) -> None:
        """Hold a LoRA adapter by name. Raises ValueError: it does not fit, is not finite, finds no place, is used."""
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

    def rest(self) -> None:
        """Give the cache's memory, and the prefixes in it, back until the next request. Only while nothing runs."""
        if self._jobs:
            raise RuntimeError(f"an engine cannot rest: {len(self._jobs)} requests are unfinished")
        for runner in self._runners:
            runner.rest()
        self._scheduler.pool = self._empty_pool()

    def submit(self, request: GenerationRequest) -> None:
        """Put a request into the queue. Raises ValueError for one that can never run; nothing else is affected."""
        self._enqueue(self._checked(request))

    def step(self) -> list[Group]:
        """One step of the engine: the requests that it answered. Where it raises, every unfinished request is given up."""
        groups, self._unclaimed = self._unclaimed, []
        return groups + [group_of(job, policy=self.policy) for job in self._step()]

    def cancel(self, request_id: str) -> None:
        """Give up every request of this id."""
        for job in [job for job in self._jobs.values() if job.request.id == request_id]:
            self._give_up(job)

    def generate(self, requests: Sequence[GenerationRequest]) -> list[Group]:
        """Answer every request, in order. Raises ValueError for one that cannot run, before any is begun."""
        jobs = [self._checked(request) for request in requests]
        for job in jobs:
            self._enqueue(job)
        awaited, answers = {job.arrival for job in jobs}, dict[int, Group]()
        while len(answers) < len(jobs):
            for job in self._step():
                group = group_of(job, policy=self.policy)
                if job.arrival in awaited:
                    answers[job.arrival] = group
                else:
                    self._unclaimed.append(group)
        return [answers[job.arrival] for job in jobs]

    def stream(self, request: GenerationRequest) -> Iteration[int, None, None]:
        """The tokens of the first response as they are decoded; the same tokens as `generate` gives."""
        job = self._checked(request)
        job.streamed = True
        self._enqueue(job)
        [response, *_] = job.responses
        sent = 0
        try:
            while True:
                if len(response.tokens) > sent:
                    sent += 1
                    yield response.tokens[sent - 1]
                elif response.done or job.arrival not in self._jobs:
                    return
                else:
                    self._unclaimed += [group_of(other, policy=self.policy) for other in self._step()]
        finally:  # a reader may go away before the end
            if job.arrival in self._jobs:
                self._give_up(job)

    def _empty_pool(self) -> PagePool:
        """Every page of the cache, free."""
        return PagePool(self._runner.pages, self.options.page_size)

    def _checked(self, request: GenerationRequest) -> Job:
        """The job of a request that can run, not yet in the queue."""
        if self.version < 0 and self._pending is None:
            raise NoWeightsError("no weights loaded: call load() before generate()")
        if self.options.speculative is not None and self._speculator is None:
            raise NoWeightsError("no draft model loaded: call load_draft() before generate()")
        own = () if request.options.ignore_stop else self.stop_ids
        ids = tuple(dict.fromkeys((*own, *request.options.stop_ids)))
        check_request(request, self._limits, stop_ids=ids, adapters=self.adapters, has_text=self._text is not None)
        job = Job(request, ids)
        if request.adapter:
            assert self._bank is not None
            job.adapter = self._bank.names.index(request.adapter)
            job.adapter_key = f"{request.adapter}/{self._adapter_loads}"
        if (wanted := request.options.prompt_logprobs) is not None:
            job.prompt_scores = PromptScores.unknown(len(request.prompt_T), wanted)
        job.responses = [Response(job, j) for j in range(request.num_responses)]
        return job

    def _enqueue(self, job: Job) -> None:
        job.arrival = self._arrivals
        self._arrivals += 1
        self._jobs[job.arrival] = job
        self._scheduler.add(job)

    def _step(self) -> list[Job]:
        """One step; the jobs that ended, but those whose tokens a stream has taken. A failure gives up every request."""
        self._update()
        if not self._jobs:
            return []
        try:
            return [job for job in self._advance() if not job.streamed]
        except BaseException:
            self._give_up_all()
            raise

    def _advance(self) -> list[Job]:
        """Schedule, compute, and take stock; the jobs that ended."""
        for runner in self._runners:
            runner.wake()
        options, scheduler, together = self.options, self._scheduler, self.options.deterministic
        work = scheduler.schedule(
            budget=self._runner.plan.prefill[-1] if together else options.prefill_chunk,
            steps=1 if together else options.speculative.tokens + 1 if options.speculative else options.decode_steps,
            weights=f"{self.policy}/{self.version}/{self._loads}",
            version=self.version,
            together=together,
        )
        for runner in self._runners:
            runner.copy(work.copies)
        if together:
            decoded = self._runner.step_together(work.pieces, work.rows)
        else:
            self._runner.fill(work.pieces)
            if self._draft is not None:
                self._draft.fill(work.pieces, scores=False)
            decoded = self._decode(work) if work.rows else None
        self._counts["steps"] += 1
        self._counts["prompt_tokens"] += tokens_to_fill(work.pieces)
        for piece in work.pieces:
            scheduler.filled(piece, version=self.version)
        for job in work.answered:
            del self._jobs[job.arrival]
        return work.answered + (self._take(work.rows, decoded) if decoded is not None else [])

    def _decode(self, work: Work) -> Decoded:
        """The rows' next tokens, by guesses and their verification where there is any guess."""
        if self._speculator is not None and (verified := self._speculator.step(work.rows, steps=work.steps)) is not None:
            self._counts["guessed_tokens"] += verified.guessed
            self._counts["kept_tokens"] += verified.kept
            self._counts["verified_rows"] += len(work.rows)
            return verified.decoded
        rows = len(work.rows)
        leave_at = max(1, rows // _LEAVING_SHARE if self._scheduler.waiting else rows // 2)
        steps = min(work.steps, self.options.decode_steps)
        return self._runner.decode(work.rows, steps=steps, leave_at=leave_at)

    def _take(self, rows: Sequence[Response], decoded: Decoded) -> list[Job]:
        """Give the rows their tokens; rows that ended leave. The jobs that ended with them."""
        self._counts["row_steps"] += len(decoded.count_R) * int(decoded.count_R.max())
        self._counts["occupied_row_steps"] += int(decoded.count_R.sum())
        self._counts["response_tokens"] += take_tokens(rows, decoded, version=self.version, text=self._text)
        for row in [row for row in rows if row.done]:
            self._scheduler.leave(row)
        done = {row.job.arrival: row.job for row in rows if row.job.done}
        for arrival in done:
            del self._jobs[arrival]
        return list(done.values())

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
        self._loads += 1

    def _renew_bank(self) -> None:
        if self._runner.weights is not None and self._bank is not None:
            self._runner.weights = self._runner.weights._replace(bank=self._bank.device())

    def _adapters_allowed(self) -> AdapterBank:
        if self._bank is None:
            raise ValueError("this engine holds no adapters: set max_adapters")
        return self._bank

    def _refuse_if_used(self, name: str) -> None:
        if users := [job.request.id for job in self._jobs.values() if job.request.adapter == name]:
            raise ValueError(f"adapter {name!r} is in use by {len(users)} requests ({users[0]!r}, ...): wait or cancel them")

    def _give_up(self, job: Job) -> None:
        self._scheduler.remove(job)
        del self._jobs[job.arrival]

    def _give_up_all(self) -> None:
        """After a failure, when programs may have consumed the cache, and rows may hold a part of their tokens."""
        for kept in (self._jobs, self._scheduler.rows, self._scheduler.stems):
            kept.clear()
        self.rest()


def request_seed(*parts: object) -> int:
    """A 32-bit seed from anything printable: the same request gets the same stream on every launcher and after a resume."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:4], "little")
