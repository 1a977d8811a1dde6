"""Changing a running launch from another terminal: `afm-rl scale RUN sampler=4`.

    scale                                      launch
    RUN/control/ID.json   -- rename -->        ID.taken         between two calls of a stage, or while it waits for answers
    RUN/control/ID.result <-- write ---        once every new actor has what the others were given, or the old ones are gone

A request names the process it is meant for, so that a later launch never finds an old one. New actors are used once they
have acknowledged the current weights; those that leave finish what they do first. The journal does not know of it: a resumed
run starts with the topology's numbers.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import threading
import time
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from actors.failures import InfrastructureError
from actors.streams import StreamingHandle
from afm_rl.errors import UserError
from topologies.run_folder import RunFolder
from topologies.starting import PLACEMENT_DEADLINE_S
from topologies.system import SCALABLE, System

log = logging.getLogger(__name__)

#: Seconds between two looks at the folder, of the launch and of the command.
LOOK_S = 0.5


class Scalable(Protocol):
    """The users of a role's actors: a `Roster` or a `Pool`."""

    def add(self, handle: StreamingHandle) -> None:
        """One more."""

    def joined(self, name: str) -> bool:
        """Whether a new one can be used; InfrastructureError when it never will."""

    def given_up(self, name: str) -> bool:
        """Whether this one failed too often and will never be used again."""

    def retire(self, name: str) -> None:
        """This one gets no more to do."""

    def idle(self, name: str) -> bool:
        """Whether it has finished what it was given."""

    def remove(self, name: str) -> StreamingHandle:
        """Forget about it."""


@dataclass
class _Change:
    """A request under way: the actors that have to join, those that have to finish, and until when the former may take."""

    path: Path
    role: str
    before: int
    count: int
    until_s: float
    joining: list[StreamingHandle] = field(default_factory=list)
    leaving: list[StreamingHandle] = field(default_factory=list)


class Control:
    """The launch's side. `poll` takes up requests and drives them, and may be called by any thread; it waits for nothing but
    the end of an actor that leaves."""

    def __init__(
        self, run: RunFolder, system: System, users: Mapping[str, Scalable], clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._folder, self._system, self._users, self._clock = run.path / "control", system, users, clock
        self._lock = threading.Lock()
        self._due_s = 0.0
        self._change: _Change | None = None

    def poll(self) -> None:
        """Take up the next request, or go on with the one under way, if it is time to look."""
        if self._clock() < self._due_s or not self._lock.acquire(blocking=False):
            return
        try:
            self._due_s = self._clock() + LOOK_S
            if self._change is None:
                self._take_next()
            if self._change is not None:
                self._go_on(self._change)
        finally:
            self._lock.release()

    def _take_next(self) -> None:
        for path in sorted(self._folder.glob("*.json")) if self._folder.is_dir() else ():
            taken = path.with_suffix(".taken")
            try:
                path.rename(taken)
            except FileNotFoundError:  # the command has given it up
                continue
            try:
                request = json.loads(taken.read_text())
                launch, role, count = int(request["launch"]), str(request["role"]), int(request["count"])
            except (ValueError, TypeError, KeyError) as error:  # not written by the command: no reason to end a run
                log.warning("%s is not a request: %s", taken, error)
                taken.unlink()
                continue
            if launch != os.getpid():
                taken.unlink()
                continue
            try:
                self._change = self._begin(taken, role, count)
                return
            except (UserError, ValueError) as error:  # Ray's, for a name that an actor still has which was to end
                _answer(taken, error=str(error))

    def _begin(self, path: Path, role: str, count: int) -> _Change:
        check_request(role, count)
        user = self._users[role]
        lost = [handle for handle in self._system.of(role) if user.given_up(handle.name)]
        present = [handle for handle in self._system.of(role) if handle not in lost]
        change = _Change(path, role, len(present), count, self._clock() + PLACEMENT_DEADLINE_S)
        if count > len(present):
            change.joining = self._system.add(role, count - len(present))
            for handle in change.joining:
                user.add(handle)
        for handle in lost + present[count:]:
            user.retire(handle.name)
            change.leaving.append(handle)
        return change

    def _go_on(self, change: _Change) -> None:
        user = self._users[change.role]
        try:
            waiting = [handle for handle in change.joining if not user.joined(handle.name)]
        except InfrastructureError as error:
            self._undo(change, f"a new {change.role} was lost before it could be used: {error}")
            return
        if waiting and self._clock() > change.until_s:
            self._undo(change, f"{change.role} could not be placed within {PLACEMENT_DEADLINE_S:.0f} s; see `ray status`")
            return
        for handle in list(change.leaving):
            if user.idle(handle.name):
                change.leaving.remove(handle)
                self._let_go(change.role, handle)
        if not waiting and not change.leaving:
            self._end(change, f"{change.role}: {change.before} -> {change.count}")

    def _undo(self, change: _Change, error: str) -> None:
        self._change = None
        for handle in change.joining:
            self._let_go(change.role, handle)
        _answer(change.path, error=f"{error}; there are {change.before} as before")

    def _let_go(self, role: str, handle: StreamingHandle) -> None:
        try:
            try:
                self._users[role].remove(handle.name)
            finally:
                self._system.remove(handle)
        except InfrastructureError as error:  # nobody asks it any more: no reason to end a run
            log.warning("%s gets no more to do, but may not have ended: %s", handle.name, error)

    def _end(self, change: _Change, message: str) -> None:
        self._change = None
        log.info("scaled %s", message)
        _answer(change.path, message=message)


def scale(run: RunFolder, role: str, count: int, *, timeout_s: float) -> str:
    """Ask the launch of a run for `count` actors of a role, and wait until it has them; what it says of it.

    Raises UserError when no launch is running, for a role or number it cannot have, and when it is not done in time.
    """
    check_request(role, count)
    launch, end_s = _launch_of(run), time.monotonic() + timeout_s
    folder = run.path / "control"
    folder.mkdir(exist_ok=True)
    request = folder / f"{time.time_ns()}-{uuid.uuid4().hex[:8]}.json"
    _write(request, {"launch": launch, "role": role, "count": count})
    result = request.with_suffix(".result")
    while not result.exists():
        if time.monotonic() > end_s:
            raise UserError(_late(request, timeout_s))
        try:
            _launch_of(run)
        except UserError:
            request.unlink(missing_ok=True)
            request.with_suffix(".taken").unlink(missing_ok=True)
            raise
        time.sleep(LOOK_S / 2)
    answer = json.loads(result.read_text())
    result.unlink()
    if answer["error"]:
        raise UserError(answer["error"])
    return str(answer["message"])


def check_request(role: str, count: int) -> None:
    """Raises UserError for a role that cannot be scaled, or a number that is none."""
    if role not in SCALABLE:
        raise UserError(f"there is no role {role!r} that can be scaled; there are: {', '.join(SCALABLE)}")
    if count < 1:
        raise UserError(f"{role}={count}: a run needs at least one of each; end the launch to have none")


def _launch_of(run: RunFolder) -> int:
    """The process whose launch holds the run's journal. Raises UserError when there is none."""
    lock = run.journal_file.with_name(run.journal_file.name + ".lock")
    if lock.exists():
        with lock.open() as file:
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                return int(file.read().strip() or 0)
    raise UserError(f"no launch of {run.path} is running; continue it with `afm-rl launch FILE --resume`")


def _late(request: Path, timeout_s: float) -> str:
    """What to say when the time is over; a request that was not taken up is withdrawn."""
    try:
        request.unlink()
    except FileNotFoundError:
        return (
            f"the launch has taken the request up, but was not done after {timeout_s:g} s; it goes on with it "
            "(a new actor takes time to start, one that leaves finishes what it does)"
        )
    return (
        f"the launch has not taken the request up within {timeout_s:g} s, and nothing was changed: it looks between two "
        "calls of a stage; give it longer with --timeout"
    )


def _answer(taken: Path, *, message: str = "", error: str = "") -> None:
    _write(taken.with_suffix(".result"), {"message": message, "error": error})
    taken.unlink()


def _write(path: Path, value: Mapping[str, Any]) -> None:
    """The whole file or none of it."""
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(value), encoding="utf-8")
    temporary.replace(path)
