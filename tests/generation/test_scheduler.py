"""The scheduler against a machine of Python lists that notices every wrong page: what a row reads must be its own tokens."""

from __future__ import annotations

from collections import deque

import numpy as np
import pytest

from afm_rl.generation.admission import page_need
from afm_rl.generation.pages import PagePool, prefix_keys
from afm_rl.generation.scheduler import Scheduler, Work
from afm_rl.generation.sequences import Job, Response
from afm_rl.types import GenerationRequest

PAGE = 4


class Machine:
    """Pages that hold the (version, token) that was written at each position, and a scheduler to keep busy."""

    def __init__(self, pages: int, *, max_rows: int = 4, budget: int = 8, prefix_cache: bool = True) -> None:
        self.pool = PagePool(pages + 1, PAGE)
        self.scheduler = Scheduler(self.pool, max_rows=max_rows, prefix_cache=prefix_cache)
        self.memory: dict[tuple[int, int], int] = {}
        self.budget, self.filled, self.arrivals = budget, 0, 0
        self.answers: dict[str, list[list[int]]] = {}
        self.jobs: list[Job] = []

    def ask(self, name: str, prompt: list[int], *, responses: int = 1, max_tokens: int = 4) -> Job:
        assert page_need(len(prompt), max_tokens, PAGE) <= self.pool.pages
        job = Job(GenerationRequest(name, np.array(prompt, np.int32), responses, max_tokens), (), self.arrivals)
        job.responses = [Response(job, j) for j in range(responses)]
        self.arrivals += 1
        self.jobs.append(job)
        self.scheduler.add(job)
        return job

    def step(self, *, steps: int = 3, version: int = 0, together: bool = False) -> Work:
        work = self.scheduler.schedule(
            budget=self.budget, steps=steps, weights=f"p/{version}", version=version, together=together
        )
        assert sum(p.stop - p.start for p in work.pieces) + (len(work.rows) if together else 0) <= self.budget
        assert len(work.rows) <= self.scheduler.max_rows
        for source, target in work.copies:
            for place in range(PAGE):
                if (source, place) in self.memory:
                    self.memory[target, place] = self.memory[source, place]
        for piece in work.pieces:
            assert piece.start == piece.stem.computed
            for position in range(piece.start, piece.stop):
                self._write(piece.stem.pages, position, int(piece.stem.tokens_T[position]))
            self.filled += piece.stop - piece.start
            self.scheduler.filled(piece, version=version)
        for row in work.rows:
            self._decode(row, min(work.steps, row.left))
        return work

    def run(self, **options: int) -> None:
        for _ in range(10_000):
            if not self.scheduler.stems and not self.scheduler.rows:
                return
            work = self.step(**options)
            assert work.rows or work.pieces, "a step in which nothing happens"
        raise AssertionError("it never ends")

    def _decode(self, row: Response, count: int) -> None:
        for _ in range(count):
            self._write(row.pages, row.position, row.last_token)
            known = [*row.request.prompt_T.tolist(), *row.tokens]
            for position, token in enumerate(known):
                assert self.memory[row.pages[position // PAGE], position % PAGE] == token
            row.tokens.append(100 + sum(known) * 7 % 50 + row.index)
        if row.left == 0:
            row.done = True
            self.scheduler.leave(row)
            self.answers.setdefault(row.request.id, []).append(row.tokens)

    def _write(self, pages: list[int], position: int, token: int) -> None:
        page = pages[position // PAGE]
        assert page != 0
        self.memory[page, position % PAGE] = token


def expected(job: Job) -> list[list[int]]:
    tokens = []
    for j in range(job.request.num_responses):
        known = job.request.prompt_T.tolist()
        for _ in range(job.request.max_tokens):
            known.append(100 + sum(known) * 7 % 50 + j)
        tokens.append(known[len(job.request.prompt_T) :])
    return tokens


@pytest.mark.parametrize("together", [False, True])
@pytest.mark.parametrize("pages", [9, 14, 60])
@pytest.mark.parametrize("seed", range(4))
def test_every_request_is_answered_from_its_own_pages(seed: int, pages: int, together: bool) -> None:
    """Guards sharing, copying, growing, preemption and replay, with requests that arrive while others run."""
    rng = np.random.default_rng(seed)
    machine = Machine(pages)
    for i in range(25):
        prompt = [*([5] * int(rng.integers(0, 10))), *rng.integers(0, 50, rng.integers(1, 12)).tolist()]
        machine.ask(f"r{i}", prompt, responses=int(rng.integers(1, 6)), max_tokens=int(rng.integers(1, 9)))
        for _ in range(rng.integers(0, 3)):
            machine.step(steps=int(rng.integers(1, 5)) if not together else 1, together=together)
    machine.run(steps=1 if together else 3, together=together)
    for job in machine.jobs:
        assert sorted(machine.answers[job.request.id]) == sorted(expected(job))
    assert machine.pool.used == 0
    if pages == 9:
        assert machine.scheduler.preemptions > 0


def test_responses_of_a_prompt_share_one_filling() -> None:
    """Guards prefill work: all but the last token of a prompt, once, whatever the number of responses."""
    for length in (1, 2, 4, 5, 8, 9, 13):
        machine = Machine(60, prefix_cache=False)
        machine.ask("r", list(range(length)), responses=7)
        machine.run()
        assert machine.filled == length - 1


def test_a_known_prefix_is_not_filled_again() -> None:
    """Guards the prefix cache: full pages are found again, under the same version of the weights only."""
    machine = Machine(60)
    prompt = list(range(11))
    machine.ask("first", prompt)
    machine.run()
    assert machine.filled == 10
    machine.ask("second", [*prompt[:9], 40, 41])
    machine.run()
    assert machine.filled == 10 + 2
    assert machine.scheduler.cached_tokens == 8
    machine.ask("third", prompt)
    machine.run(version=1)
    assert machine.filled == 12 + 10


def test_a_prompt_that_waited_is_known_by_the_weights_that_filled_it() -> None:
    """Guards the cache of prefixes where weights change while a request waits for pages."""
    machine, prompt = Machine(5), list(range(9))
    machine.ask("first", [20 + token for token in prompt], max_tokens=8)
    machine.step()
    machine.step()
    machine.ask("waiting", prompt)
    assert [row.request.id for row in machine.step().rows] == ["first"]
    assert [stem.started for stem in machine.scheduler.stems] == [False]
    machine.run(version=1)
    found = [machine.pool.known(prefix_keys(np.array(prompt[:-1]), PAGE, root=f"p/{version}/")) for version in (0, 1)]
    assert [len(pages) for pages in found] == [0, 2]


def test_a_long_prompt_does_not_stop_those_that_decode() -> None:
    """Guards chunked filling: rows go on decoding while a long prompt is filled in pieces."""
    machine = Machine(60, budget=4)
    machine.ask("short", [1, 2], max_tokens=12)
    machine.step(steps=1)
    machine.ask("long", list(range(30)))
    seen = []
    while not machine.answers.get("short"):
        work = machine.step(steps=1)
        seen.append((len(work.rows), sum(p.stop - p.start for p in work.pieces)))
    assert seen[:7] == [(1, 4)] * 7


def test_a_row_joins_in_the_step_after_another_left() -> None:
    """Guards continuous batching: no row waits for the whole batch to end."""
    machine = Machine(60, max_rows=2)
    for name, tokens in (("a", 1), ("b", 6), ("c", 2)):
        machine.ask(name, [1], max_tokens=tokens)
    rows = [[row.request.id for row in machine.step(steps=1).rows] for _ in range(4)]
    assert rows == [["a", "b"], ["b", "c"], ["b", "c"], ["b"]]


def test_nothing_new_begins_while_draining_and_begun_jobs_end() -> None:
    """Guards the policy "finish": a request that has begun gets all its responses, one that has not waits."""
    machine = Machine(60, max_rows=2)
    machine.ask("begun", [1, 2, 3], responses=5, max_tokens=2)
    machine.step(steps=1)
    machine.ask("waits", [4, 5])
    machine.scheduler.draining = True
    for _ in range(20):
        machine.step(steps=1)
    assert len(machine.answers["begun"]) == 5
    assert "waits" not in machine.answers
    machine.scheduler.draining = False
    machine.run()
    assert len(machine.answers["waits"]) == 1


def test_starting_over_drops_every_token_and_keeps_the_order() -> None:
    """Guards the policy "restart": each unfinished response is answered from its first token by the new weights."""
    machine = Machine(20, max_rows=3)
    jobs = [machine.ask(name, [1, 2, 3, 4, 5], responses=2, max_tokens=5) for name in "abc"]
    for _ in range(2):
        machine.step(steps=1)
    machine.scheduler.start_over()
    assert machine.pool.used == 0
    assert [stem.job for stem in machine.scheduler.stems] == jobs
    assert not any(r.tokens for job in jobs for r in job.responses)
    machine.run(version=1)
    for job in jobs:
        assert job.version == 1
        assert sorted(machine.answers[job.request.id]) == sorted(expected(job))


def test_a_request_that_is_given_up_leaves_nothing_behind() -> None:
    """Guards cancellation in every state: waiting, being filled, running."""
    for steps in range(5):
        machine = Machine(20, max_rows=2, budget=3)
        gone = machine.ask("gone", [1, 2, 3, 4, 5, 6], responses=4)
        for _ in range(steps):
            machine.step(steps=1)
        machine.scheduler.remove(gone)
        assert machine.pool.used == 0
        assert machine.scheduler.stems == deque()
        kept = machine.ask("kept", [1, 2, 3, 4, 5, 6])
        machine.run()
        assert machine.answers["kept"] == expected(kept)
