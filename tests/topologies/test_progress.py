"""Progress: lines for a file, bars for a terminal, and neither hides an error."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from topologies.progress import ProgressView


def test_a_file_gets_lines() -> None:
    """Guards logs: one line when a piece of work ends, with its size and what a resume skipped, and no control codes."""
    out = io.StringIO()
    with ProgressView(Console(file=out, soft_wrap=True, highlight=False)) as progress:
        progress.say("start")
        with progress.task("sft", total=20, done=5) as bar:
            bar.advance(10)
            bar.move_to(20)
        with progress.task("dpo", total=3):
            pass
    start, sft, dpo = out.getvalue().splitlines()
    assert start.endswith(" s  start")
    assert "sft: 20 (resumed at 5) in " in sft
    assert "dpo: 3 in " in dpo
    assert "\x1b" not in out.getvalue()


def test_a_terminal_gets_bars() -> None:
    """Guards the bar's count, which moves while work runs and is gone afterwards."""
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=100)
    with ProgressView(console) as progress:
        with progress.task("sft", total=20) as bar:
            bar.advance(7)
            assert progress._progress is not None
            progress._progress.refresh()
        assert not progress._progress.tasks
    assert "7/20" in out.getvalue()


def test_work_that_fails_is_not_reported_as_done() -> None:
    """Guards the log of a crash: the error comes through, and no line claims that the work ended."""
    out = io.StringIO()
    with ProgressView(Console(file=out)) as progress, pytest.raises(ZeroDivisionError), progress.task("sft", total=1):
        raise ZeroDivisionError
    assert out.getvalue() == ""
