"""Progress on the terminal: one bar for every piece of work over two seconds, plain lines where the output is a file."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn


class Bar:
    """One running piece of work: `done` of `total`."""

    def __init__(self, progress: Progress | None, task: TaskID | None, *, name: str, total: int, done: int) -> None:
        self._progress, self._task = progress, task
        self.name, self.total, self.done = name, total, done

    def advance(self, count: int) -> None:
        self.move_to(self.done + count)

    def move_to(self, done: int) -> None:
        self.done = done
        if self._progress is not None and self._task is not None:
            self._progress.update(self._task, completed=done)


class ProgressView:
    """Prints what stages do. Use as a context manager."""

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console(file=sys.stdout, soft_wrap=True, highlight=False)
        self._start = time.perf_counter()
        #: What is under way, outermost first.
        self.bars: tuple[Bar, ...] = ()
        self._progress: Progress | None = None
        if self.console.is_terminal:
            self._progress = Progress(
                TextColumn("  {task.description:<28}"),
                BarColumn(bar_width=32),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                console=self.console,
                transient=True,
            )

    def __enter__(self) -> ProgressView:
        if self._progress is not None:
            self._progress.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        if self._progress is not None:
            self._progress.stop()

    def say(self, text: str) -> None:
        """One line that stays, with the seconds since the launch before it. `text` may hold anything: it is no markup."""
        self._line(escape(text))

    def heading(self, text: str) -> None:
        """As `say`, in bold."""
        self._line(f"[bold]{escape(text)}[/bold]")

    def _line(self, markup: str) -> None:
        self.console.print(f"[dim]{time.perf_counter() - self._start:6.0f} s[/dim]  {markup}")

    @contextmanager
    def task(self, name: str, *, total: int, done: int = 0) -> Iterator[Bar]:
        """A bar while the block runs; on a file, one line when it ends."""
        begin = time.perf_counter()
        task = None if self._progress is None else self._progress.add_task(name, total=total, completed=done)
        bar = Bar(self._progress, task, name=name, total=total, done=done)
        self.bars = (*self.bars, bar)
        try:
            yield bar
        finally:
            self.bars = tuple(other for other in self.bars if other is not bar)
            if self._progress is not None and task is not None:
                self._progress.remove_task(task)
        resumed = f" (resumed at {done})" if done else ""
        self.say(f"  {name}: {total}{resumed} in {time.perf_counter() - begin:.1f} s")
