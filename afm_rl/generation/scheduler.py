"""Who runs next: admission, chunked filling of stems, rows that decode, and who gives up pages when none are left.

Requests join and leave at every token. Nothing here touches an array: `schedule` gives back what the engine is to compute.
Order of arrival decides throughout: stems are filled first come first served, and the youngest gives up its pages. What
gave up its pages is filled again from its tokens later, which costs time but loses nothing.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np

from afm_rl.generation.pages import PagePool, prefix_keys
from afm_rl.generation.sequences import Job, Response, Stem


@dataclass(frozen=True)
class Piece:
    """Positions `start` to `stop` of a stem, to be filled now."""

    stem: Stem
    start: int
    stop: int


@dataclass
class Work:
    """One step: pages to copy first, then pieces to fill, then rows that each decode up to `steps` tokens.

    `answered` are requests for no tokens, whose prompts have been filled.
    """

    copies: list[tuple[int, int]] = field(default_factory=list)
    pieces: list[Piece] = field(default_factory=list)
    rows: list[Response] = field(default_factory=list)
    steps: int = 0
    answered: list[Job] = field(default_factory=list)


class Scheduler:
    """Keeps the queue of stems and the running rows over one page pool. `prefix_cache` reuses known pages."""

    def __init__(self, pool: PagePool, *, max_rows: int, prefix_cache: bool) -> None:
        self.pool, self.max_rows, self.prefix_cache = pool, max_rows, prefix_cache
        self.stems: deque[Stem] = deque()
        self.rows: list[Response] = []
        self.draining = False  # no request is begun
        self.preemptions = 0
        self.cached_tokens = 0

    @property
    def waiting(self) -> int:
        """Responses that do not run yet."""
        return sum(len(stem.waiting) for stem in self.stems)

    def add(self, job: Job) -> None:
        """A new request, behind all others."""
        self.stems.append(Stem(job, np.asarray(job.request.prompt_T, np.int32), deque(job.responses)))

    def schedule(self, *, budget: int, steps: int, weights: str, version: int, together: bool = False) -> Work:
        """The next step: at most `budget` positions to fill, and up to `steps` tokens for every row.

        `weights` names the weights that will compute it, `version` is theirs. `together`: the rows are part of the budget.
        """
        work = Work()
        self._start_stems(weights, version)
        self._fork(work)
        work.rows, work.steps = self._grow(steps)
        self._fill(work, budget - len(work.rows) if together else budget)
        return work

    def filled(self, piece: Piece, *, version: int) -> None:
        """A piece has been computed: its full pages are known from now on, if one version of the weights made them all."""
        stem = piece.stem
        stem.computed = piece.stop
        if stem.filled and stem.job.prompt_scores is not None:
            stem.job.prompt_scored = True
        if not self.prefix_cache or stem.version != version:
            return
        full = stem.computed // self.pool.page_size
        for i in range(stem.remembered, full):
            self.pool.remember(stem.pages[i], stem.keys[i])
        stem.remembered = max(stem.remembered, full)

    def leave(self, response: Response) -> None:
        """A row has ended."""
        self.rows.remove(response)
        self._release(response)

    def remove(self, job: Job) -> None:
        """A request is given up."""
        for stem in [s for s in self.stems if s.job is job]:
            self._reset(stem)
            self.stems.remove(stem)
        for row in [r for r in self.rows if r.job is job]:
            self.leave(row)

    def start_over(self) -> None:
        """Every unfinished response goes back to the queue, in its order of arrival, without its tokens; nothing is filled.

        Responses that had ended stay as they are: else frequent updates would keep a large group from ever ending.
        """
        unfinished = sorted((*self.rows, *(r for stem in self.stems for r in stem.waiting)), key=lambda r: r.age)
        for row in list(self.rows):
            self.leave(row)
        for stem in self.stems:
            self._reset(stem)
        self.stems.clear()
        jobs = {id(r.job): r.job for r in unfinished}
        for response in unfinished:
            response.cut(0)
        for job in jobs.values():
            job.version, job.prompt_scored = -1, False
            members = deque(r for r in unfinished if r.job is job)
            self.stems.append(Stem(job, np.asarray(job.request.prompt_T, np.int32), members))

    def _start_stems(self, weights: str, version: int) -> None:
        """Give pages to as many stems as could decode soon, in order."""
        expected = len(self.rows)
        for stem in self.stems:
            if expected >= self.max_rows:
                return
            if self.draining and not stem.job.begun:
                return
            if not stem.started and not self._start(stem, weights, version):
                return
            expected += len(stem.waiting)

    def _start(self, stem: Stem, weights: str, version: int) -> bool:
        size = self.pool.page_size
        known: list[int] = []
        if self.prefix_cache:
            self._name_pages(stem, f"{weights}/{stem.job.adapter_key}")
            known = [] if stem.scored else self.pool.known(stem.keys)
        needed = -(-stem.target // size) - len(known)
        # A page is left to each row, so that what starts now does not push out what runs.
        if needed + self.pool.idle(known) + len(self.rows) > self.pool.available and self.rows:
            return False
        if needed + self.pool.idle(known) > self.pool.available and not self._take_back(needed, known, sparing=stem):
            return False
        self.pool.share(known)
        stem.pages = known + self.pool.allocate(needed)
        stem.computed = len(known) * size
        stem.remembered, stem.version, stem.started = len(known), version, True
        if not stem.job.begun:
            stem.job.version = version
        self.cached_tokens += stem.computed
        return True

    def _name_pages(self, stem: Stem, root: str) -> None:
        """The keys of its full pages under `root`: hashed once, however often it has to wait for pages."""
        if stem.root != root:
            stem.keys = prefix_keys(stem.tokens_T[: stem.target], self.pool.page_size, root=root)
            stem.root = root

    def _take_back(self, needed: int, known: list[int], *, sparing: Stem) -> bool:
        """Take pages of stems behind this one back until it has what it needs."""
        for stem in reversed(self.stems):
            if needed + self.pool.idle(known) <= self.pool.available:
                return True
            if stem is sparing:
                return False
            self._reset(stem)
        return needed + self.pool.idle(known) <= self.pool.available

    def _fork(self, work: Work) -> None:
        """Responses of filled stems become rows, while there are rows and pages."""
        for stem in list(self.stems):
            if stem.filled and stem.job.request.max_tokens == 0:
                self._answer(stem, work)
            while stem.filled and stem.waiting and len(self.rows) < self.max_rows:
                if not self.rows:
                    self._take_back(1, [], sparing=stem)
                elif self.pool.available < 1 + len(self.rows):
                    return
                self._fork_one(stem, work)
            if stem.filled and not stem.waiting:
                self.stems.remove(stem)

    def _answer(self, stem: Stem, work: Work) -> None:
        for response in stem.waiting:
            response.done = True
        stem.waiting.clear()
        self._reset(stem)
        work.answered.append(stem.job)
        self.stems.remove(stem)

    def _fork_one(self, stem: Stem, work: Work) -> None:
        response = stem.waiting.popleft()
        full = stem.target // self.pool.page_size
        last = not stem.waiting
        if last:
            response.pages, stem.pages = stem.pages, []
        else:
            self.pool.share(stem.pages[:full])
            response.pages = stem.pages[:full]
            if stem.target % self.pool.page_size:
                [copy] = self.pool.allocate(1)
                work.copies.append((stem.pages[full], copy))
                response.pages = [*response.pages, copy]
        self.rows.append(response)

    def _fill(self, work: Work, budget: int) -> None:
        for stem in self.stems:
            if budget == 0:
                return
            if stem.started and stem.computed < stem.target:
                stop = min(stem.target, stem.computed + budget)
                work.pieces.append(Piece(stem, stem.computed, stop))
                budget -= stop - stem.computed

    def _grow(self, steps: int) -> tuple[list[Response], int]:
        """Pages for the next tokens of every row: fewer tokens where pages are short, fewer rows where one is too many."""
        while self.rows:
            steps = min(steps, max(row.left for row in self.rows))
            for wanted in sorted({steps, *(s for s in (8, 4, 2, 1) if s < steps)}, reverse=True):
                if sum(self._missing(row, wanted) for row in self.rows) <= self.pool.available:
                    for row in self.rows:
                        row.pages += self.pool.allocate(self._missing(row, wanted))
                    return list(self.rows), wanted
            self._preempt()
        return [], 0

    def _missing(self, row: Response, steps: int) -> int:
        last = row.position + min(steps, row.left)  # positions row.position .. last - 1 are written
        return max(0, -(-last // self.pool.page_size) - len(row.pages))

    def _preempt(self) -> None:
        """Pages back from the last stem that holds any, else from the youngest row."""
        for stem in reversed(self.stems):
            if stem.pages:
                self._reset(stem)
                return
        row = max(self.rows, key=lambda r: r.age)
        self.leave(row)
        self.preemptions += 1
        tokens_T = np.concatenate([row.request.prompt_T, np.asarray(row.tokens, np.int32)]).astype(np.int32)
        self._insert(Stem(row.job, tokens_T, deque([row])))

    def _insert(self, stem: Stem) -> None:
        """Into the queue by age."""
        younger = (i for i, other in enumerate(self.stems) if other.waiting[0].age > stem.waiting[0].age)
        self.stems.insert(next(younger, len(self.stems)), stem)

    def _reset(self, stem: Stem) -> None:
        self.pool.release(stem.pages)
        stem.pages, stem.computed, stem.remembered, stem.started = [], 0, 0, False

    def _release(self, response: Response) -> None:
        self.pool.release(response.pages)
        response.pages = []


def tokens_to_fill(pieces: Iterable[Piece]) -> int:
    """Positions of all these pieces."""
    return sum(piece.stop - piece.start for piece in pieces)
