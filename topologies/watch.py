"""`afm-rl watch RUN`: a live view of a run in the terminal, from its folder alone.

`watch_data.py` reads, `watch_view.py` draws, here is the loop around them and the keyboard.
It works beside a launch, from another machine on the same disk, and after the end; nothing it does touches the run.
"""

from __future__ import annotations

import contextlib
import json
import select
import sys
import termios
import time
import tty
from collections.abc import Callable, Iterator
from dataclasses import asdict
from typing import Any

from rich.console import Console
from rich.live import Live

from topologies.run_folder import RunFolder
from topologies.watch_data import RunReader, View
from topologies.watch_view import frame

#: Seconds between two looks, and between two looks at the keyboard.
EVERY_S, KEY_S = 1.0, 0.1


def watch(run: RunFolder, *, console: Console | None = None) -> None:
    """Show the run until `q`, Ctrl-C, or its end, whose last frame stays. One frame where the output is no terminal."""
    console = console or Console(highlight=False)
    reader = RunReader(run)
    view = reader.look()
    if console.is_terminal and view.state != "finished":
        with contextlib.suppress(KeyboardInterrupt):
            view = _follow(reader, view, console)
    console.print(frame(view, console=console))


def print_once(run: RunFolder, *, as_json: bool = False, console: Console | None = None) -> None:
    """One frame, or the same as JSON."""
    view = RunReader(run).look()
    if as_json:
        print(json.dumps(to_json(view), indent=2))
        return
    console = console or Console(highlight=False)
    console.print(frame(view, console=console))


def to_json(view: View) -> dict[str, Any]:
    """A look for a script: of each job the newest row, instead of all."""
    jobs = [
        {"task": job.task, "stage": job.stage, "online": job.online, "groups": job.groups, "last": _last(job.rows)}
        for job in view.jobs
    ]
    said = {"name": view.name, "path": view.path, "state": view.state, "age_s": view.age_s, "why": view.why}
    return {**said, "stages": [asdict(stage) for stage in view.stages], "jobs": jobs, **_launch(view.live)}


def _last(rows: Any) -> dict[str, Any] | None:
    return dict(rows[-1]) if rows else None


def _launch(live: Any) -> dict[str, Any]:
    """What the launch said, under names that the look does not have already."""
    keys = ("pid", "host", "started", "written", "launcher", "dashboard", "bars", "actors", "messages")
    return {key: live.get(key) for key in keys}


def _follow(reader: RunReader, view: View, console: Console) -> View:
    with _keys() as pressed, Live(console=console, screen=True, auto_refresh=False, vertical_overflow="crop") as live:
        while True:
            live.update(frame(view, console=console), refresh=True)
            until = time.monotonic() + EVERY_S
            while time.monotonic() < until:
                if pressed(KEY_S) in ("q", "Q"):
                    return view
            view = reader.look()
            if view.state == "finished":
                return view


@contextlib.contextmanager
def _keys() -> Iterator[Callable[[float], str]]:
    """A function that waits so many seconds for a key, and says which; "" for none. Keys are not shown meanwhile."""
    if not sys.stdin.isatty():
        yield lambda wait_s: (time.sleep(wait_s), "")[1]
        return
    before = termios.tcgetattr(sys.stdin)
    tty.setcbreak(sys.stdin)
    try:
        yield _key
    finally:
        termios.tcsetattr(sys.stdin, termios.TCSADRAIN, before)


def _key(wait_s: float) -> str:
    return sys.stdin.read(1) if select.select([sys.stdin], [], [], wait_s)[0] else ""
