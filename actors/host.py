"""Where an actor lives: handles that a stage calls, in this process (inline) or in a Ray actor, with the same face.

Roles are plain classes. A `Host` owns one instance and keeps what the report shows of it (busy seconds, calls, peak
memory). `Handle.submit(method, ...)` starts a call, `gather` waits for several with a deadline that names what it waited
for: no call of the system waits for ever. Handles whose calls answer item by item are in `actors/streams.py`.
"""

from __future__ import annotations

import ctypes
import resource
import threading
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

from actors.failures import InfrastructureError
from actors.signs import EngineSigns, Signs, place, resident_mib
from afm_rl.errors import UserError

#: Seconds a call may take before the wait for it is an error; generous, because a first call compiles.
DEFAULT_DEADLINE_S = 600.0
#: A call of this many seconds or more has probably compiled a program, which leaves hundreds of megabytes freed but mapped.
TRIM_AFTER_S = 3.0
#: What follows the last item of a stream.
END = object()


class DeadlineError(InfrastructureError, TimeoutError):
    """A wait for actors passed its deadline."""


class ActorLostError(InfrastructureError):
    """The process behind a call is gone, and with it what it was working on."""


class OtherLifeError(InfrastructureError):
    """An actor was started anew, unnoticed, and does not have what it had been given."""


@dataclass(frozen=True)
class ActorStats:
    """What one actor did since it started."""

    name: str
    role: str
    busy_s: float
    calls: int
    peak_mib: float


class Host:
    """Owns one plain actor object and times its calls. Under Ray this class is what becomes the actor.

    Its methods may be called from several threads at a time, if those of the role may.
    """

    def __init__(self, name: str, role: type, kwargs: dict[str, Any]) -> None:
        self._name, self._role = name, role
        self._actor = role(**kwargs)
        self._lock = threading.Lock()
        self._busy_s, self._calls = 0.0, 0
        self._working, self._since_s = 0, 0.0
        self._ended_streams: set[int] = set()
        self._life = uuid.uuid4().hex

    def run(self, method: str, kwargs: dict[str, Any], *args: Any) -> Any:
        """Run one method of the actor. Positional, because Ray resolves only top-level references among arguments."""
        start = time.perf_counter()
        try:
            with self._work():
                return getattr(self._actor, method)(*args, **kwargs)
        finally:
            self._called(time.perf_counter() - start)

    def run_in(self, life: str, method: str, kwargs: dict[str, Any], *args: Any) -> Any:
        """As `run`, if this is still the life that the caller prepared. Raises OtherLifeError."""
        if life != self._life:
            raise OtherLifeError(f"{self._name} was started anew before {method!r}")
        return self.run(method, kwargs, *args)

    def stream(self, number: int, method: str, kwargs: dict[str, Any], *args: Any) -> Iterator[Any]:
        """The items of a method that is a generator, until its end or `end_stream` of this number."""
        items, took_s = None, 0.0
        try:
            while number not in self._ended_streams:
                start = time.perf_counter()
                with self._work():
                    items = items if items is not None else getattr(self._actor, method)(*args, **kwargs)
                    item = next(items, END)
                took_s += time.perf_counter() - start
                if item is END:
                    return
                yield item
        finally:
            if items is not None:
                items.close()
            self._ended_streams.discard(number)
            self._called(took_s)

    def end_stream(self, number: int) -> None:
        """Nobody reads this stream any more: it ends with the item that it is working on."""
        self._ended_streams.add(number)

    def ping(self) -> str:
        """Answers once the actor has been placed and constructed, with a name for this life of its process."""
        return self._life

    def stats(self) -> ActorStats:
        """Busy time (however many calls were under way), calls, and the process's peak resident memory."""
        return ActorStats(self._name, self._role.__name__, round(self._busy_s, 2), self._calls, round(_peak_mib(), 1))

    def pulse(self) -> Signs:
        """What the actor is doing now. Takes no lock that its work holds for long, so a busy one answers too."""
        with self._lock:
            running_s = time.perf_counter() - self._since_s if self._working else 0.0
            working, busy_s, calls = self._working, self._busy_s + running_s, self._calls
        use = self._actor.use() if hasattr(self._actor, "use") else None
        engine = None if use is None else EngineSigns(use.version, use.running, use.waiting, use.response_tokens)
        host, pid = place()
        return Signs(
            name=self._name,
            role=self._role.__name__,
            life=self._life,
            host=host,
            pid=pid,
            working=working,
            busy_s=round(busy_s, 2),
            calls=calls,
            mib=round(resident_mib(), 1),
            peak_mib=round(_peak_mib(), 1),
            engine=engine,
        )

    @contextmanager
    def _work(self) -> Iterator[None]:
        with self._lock:
            if self._working == 0:
                self._since_s = time.perf_counter()
            self._working += 1
        try:
            yield
        finally:
            with self._lock:
                self._working -= 1
                if self._working == 0:
                    self._busy_s += time.perf_counter() - self._since_s

    def _called(self, took_s: float) -> None:
        with self._lock:
            self._calls += 1
        if took_s >= TRIM_AFTER_S:
            return_freed_memory()


def _peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def return_freed_memory() -> None:
    """Give what glibc keeps of freed memory back to the machine, which the actors share; nothing where it is not glibc."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


class Pending(Protocol):
    """A call under way."""

    @property
    def what(self) -> str:
        """ACTOR.METHOD, for messages."""

    def result(self, timeout_s: float) -> Any:
        """Its value, or its exception, or TimeoutError."""


class Handle(Protocol):
    """One actor of the topology."""

    name: str

    def submit(self, method: str, *args: Any, **kwargs: Any) -> Pending:
        """Start a call and return at once."""

    def ping(self) -> Pending:
        """Start a call that ends once the actor has been placed and constructed."""

    def stats(self) -> ActorStats:
        """What the actor did so far."""

    def pulses(self) -> Mapping[str, Pending]:
        """Start a call for a `Signs` (None: nothing there yet) of each of its processes, by name. For any thread."""


class InlineHandle:
    """The actor lives in this process; a call runs when it is submitted."""

    def __init__(self, name: str, role: type, kwargs: dict[str, Any]) -> None:
        self.name = name
        self._construct = partial(Host, name, role, kwargs)
        self._host = self._construct()

    def submit(self, method: str, *args: Any, **kwargs: Any) -> Pending:
        return self._done(method, self._host.run(method, kwargs, *call_arguments(args)))

    def _done(self, method: str, value: Any) -> Pending:
        return _Done(f"{self.name}.{method}", value)

    def ping(self) -> Pending:
        return _Done(f"{self.name}.ping", self._host.ping())

    def stats(self) -> ActorStats:
        return self._host.stats()

    def pulses(self) -> Mapping[str, Pending]:
        return {self.name: self._done("pulse", self._host.pulse())}


@dataclass(frozen=True)
class _Done:
    what: str
    value: Any

    def result(self, timeout_s: float) -> Any:  # noqa: ARG002 (the face of Pending; an inline call has already ended)
        return self.value


class RayHandle:
    """The actor is a named Ray actor; arguments that are themselves pending calls travel as object references."""

    def __init__(self, name: str, actor: Any) -> None:
        self.name = name
        self._actor = actor

    def __reduce__(self) -> tuple[Any, ...]:
        # By name: an actor whose arguments held Ray's own handle could not be started anew once that is out of scope.
        return _ray_handle_by_name, (self.name,)

    def submit(self, method: str, *args: Any, **kwargs: Any) -> Pending:
        call = self._actor.run.options(name=f"{self.name}.{method}")
        after = tuple(a for a in args if isinstance(a, RayPending))
        return RayPending(f"{self.name}.{method}", call.remote(method, kwargs, *call_arguments(args)), after)

    def ping(self) -> Pending:
        return RayPending(f"the placement of {self.name}", self._actor.ping.remote())

    def stats(self) -> ActorStats:
        return RayPending(f"{self.name}.stats", self._actor.stats.remote()).result(30.0)

    def pulses(self) -> Mapping[str, Pending]:
        return {self.name: RayPending(f"{self.name}.pulse", self._actor.pulse.remote())}


def _ray_handle_by_name(name: str) -> RayHandle:
    import ray

    return RayHandle(name, ray.get_actor(name))


@dataclass(frozen=True)
class RayPending:
    """A call under way on Ray, its value's reference, and the calls whose values are its arguments."""

    what: str
    ref: Any
    after: tuple[RayPending, ...] = ()

    def settle(self, timeout_s: float) -> None:
        """Wait for the arguments that know how to wait (a group's calls watch their members), without fetching them."""
        end_s = time.monotonic() + timeout_s
        for argument in self.after:
            argument.settle(max(0.0, end_s - time.monotonic()))

    def result(self, timeout_s: float) -> Any:
        end_s = time.monotonic() + timeout_s
        self.settle(timeout_s)
        return actor_value(self.what, self.ref, max(0.0, end_s - time.monotonic()))


def call_arguments(args: Sequence[Any]) -> tuple[Any, ...]:
    """Arguments as they travel: of a pending call its value where that is here, else its reference.

    A reference only travels without passing through this process when it is a top-level argument.
    """
    return tuple(a.value if isinstance(a, _Done) else a.ref if isinstance(a, RayPending) else a for a in args)


def ray_value(ref: Any, timeout_s: float) -> Any:
    """The value behind a reference, or the exception that an actor raised, or TimeoutError."""
    import ray

    try:
        return ray.get(ref, timeout=timeout_s)
    except ray.exceptions.GetTimeoutError as error:
        raise TimeoutError(str(error)) from error
    except ray.exceptions.RayTaskError as error:
        # What the user can put right is the actor's own one line; everything else keeps the remote traceback.
        if isinstance(error.cause, UserError):
            raise error.cause from error
        raise


def actor_value(what: str, ref: Any, timeout_s: float) -> Any:
    """As `ray_value`, with ActorLostError naming the call where its process is gone."""
    from ray import exceptions

    try:
        return ray_value(ref, timeout_s)
    except exceptions.RayTaskError:  # its own, or of another actor that it called
        raise
    except (
        exceptions.RayActorError,
        exceptions.WorkerCrashedError,
        exceptions.NodeDiedError,
        exceptions.OutOfMemoryError,
        exceptions.ObjectLostError,
    ) as error:
        raise ActorLostError(f"{what}: {' '.join(str(error).split())[:300]}") from error


def gather(pending: Sequence[Pending], *, deadline_s: float = DEFAULT_DEADLINE_S) -> list[Any]:
    """The results of several calls, in order. Raises DeadlineError naming the first call that was late."""
    end = time.monotonic() + deadline_s
    results = []
    for call in pending:
        try:
            results.append(call.result(max(0.0, end - time.monotonic())))
        except TimeoutError as error:
            raise DeadlineError(f"waited {deadline_s:.0f} s for {call.what}, which has not answered") from error
    return results


def call(handle: Handle, method: str, *args: Any, deadline_s: float = DEFAULT_DEADLINE_S, **kwargs: Any) -> Any:
    """One call, waited for."""
    return gather([handle.submit(method, *args, **kwargs)], deadline_s=deadline_s)[0]
