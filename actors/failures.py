"""What can go wrong with a call, and how often it may: failures of the infrastructure, and failures of the data.

An infrastructure failure (a process or a machine is gone, frozen, late; bytes arrived damaged) says nothing about the work,
which is done again, here or elsewhere. A data failure (weights that are not finite, a request that can never run) comes back
however often the work is done. Each kind has a budget of its own, which progress restores; everything else is a fault of the
program and is never caught.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

from afm_rl.errors import UserError
from afm_rl.weights import DigestMismatchError

FailureKind = Literal["infrastructure", "data"]
#: Causes that the end of a budget names.
CAUSES_SHOWN = 5


class InfrastructureError(RuntimeError):
    """A process, a machine or what lies between them failed: the work can be done again."""


class ActorsLostError(InfrastructureError):
    """No actor of a role is left to do the work."""


class DataError(UserError):
    """What was given cannot be worked on; doing it again changes nothing."""


class FailuresExhaustedError(RuntimeError):
    """Something failed more often than its budget allows, without progress in between."""

    def __init__(self, message: str, *, kind: FailureKind, causes: tuple[str, ...]) -> None:
        super().__init__(message)
        self.kind, self.causes = kind, causes


def failure_kind(error: BaseException) -> FailureKind | None:
    """Which budget an exception is charged to; None for what is neither, and must not be caught."""
    if isinstance(error, InfrastructureError | DigestMismatchError):
        return "infrastructure"
    return "data" if isinstance(error, DataError) else None


@dataclass
class Attempt:
    """What became of a block that spends: its failure, or None where it went well."""

    failure: Exception | None = None

    @property
    def failed(self) -> bool:
        """Whether the block failed, and may be tried again."""
        return self.failure is not None


class FailureBudget:
    """How many failures of each kind `name` may have without progress. For any thread.

    Use: `with budget.infrastructure("what is tried") as attempt: ...`, again while `attempt.failed`; `progressed()` once
    something was reached that a later failure does not undo.
    """

    def __init__(self, name: str, *, infrastructure: int, data: int = 0) -> None:
        self._name = name
        self._allowed: dict[FailureKind, int] = {"infrastructure": infrastructure, "data": data}
        self._causes: dict[FailureKind, list[str]] = {"infrastructure": [], "data": []}
        self._lock = threading.Lock()
        self.total: dict[FailureKind, int] = {"infrastructure": 0, "data": 0}

    def left(self, kind: FailureKind) -> int:
        """How many more failures of a kind are allowed before progress."""
        return max(0, self._allowed[kind] - len(self._causes[kind]))

    def causes(self, kind: FailureKind) -> tuple[str, ...]:
        """What was charged since the last progress, oldest first."""
        return tuple(self._causes[kind])

    def spend(self, kind: FailureKind, what: str, error: Exception) -> None:
        """Charge a failure. Raises FailuresExhaustedError, from `error`, when there was nothing left to charge it to."""
        with self._lock:
            self.total[kind] += 1
            self._causes[kind].append(f"{what}: {_one_line(error)}")
            causes = tuple(self._causes[kind])
        if len(causes) > self._allowed[kind]:
            raise FailuresExhaustedError(self._message(kind, causes), kind=kind, causes=causes) from error

    def progressed(self) -> None:
        """Something was reached: earlier failures no longer count."""
        with self._lock:
            self._causes = {"infrastructure": [], "data": []}

    @contextmanager
    def infrastructure(self, what: str) -> Iterator[Attempt]:
        """A block whose infrastructure failures are charged, and caught while there is budget; others are raised."""
        with self._charged(what, ("infrastructure",)) as attempt:
            yield attempt

    @contextmanager
    def any(self, what: str) -> Iterator[Attempt]:
        """A block whose failures of either kind are charged to their own budget, and caught while there is some."""
        with self._charged(what, ("infrastructure", "data")) as attempt:
            yield attempt

    @contextmanager
    def _charged(self, what: str, kinds: tuple[FailureKind, ...]) -> Iterator[Attempt]:
        attempt = Attempt()
        try:
            yield attempt
        except Exception as error:
            kind = failure_kind(error)
            if kind not in kinds:
                raise
            attempt.failure = error
            self.spend(kind, what, error)

    def _message(self, kind: FailureKind, causes: tuple[str, ...]) -> str:
        shown, before = causes[-CAUSES_SHOWN:], len(causes) - CAUSES_SHOWN
        earlier = f"{before} earlier; " if before > 0 else ""
        return (
            f"{self._name}: {len(causes)} {kind} failures without progress, {self._allowed[kind]} allowed: "
            f"{earlier}{'; then '.join(shown)}"
        )


def _one_line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]
