"""Calls that answer item by item, and handles of actors that may die and come back: what samplers and the committee are.

`handle.stream(method, ...)` starts a call of a generator method. `Stream.next` gives its next item within a time or raises;
`items` iterates with one deadline between any two of them; `ready` says which of several calls can be read at once. Under
Ray every stream of an actor has a thread there, calls have another one, and liveness a third: an actor that generates still
takes weights and says how it does. Inline, an item is computed when it is asked for.
"""

from __future__ import annotations

import itertools
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from actors.host import (
    DEFAULT_DEADLINE_S,
    END,
    ActorLostError,
    ActorStats,
    DeadlineError,
    Handle,
    InlineHandle,
    OtherLifeError,
    Pending,
    RayHandle,
    RayPending,
    actor_value,
    call_arguments,
    gather,
)

log = logging.getLogger(__name__)

#: Streams that an actor answers at a time; one more waits for the end of another.
MAX_STREAMS = 8
#: Ray's concurrency groups: a thread for each stream, one for liveness. Calls have the default one.
STREAM_GROUP, ASIDE_GROUP = "stream", "aside"
CONCURRENCY_GROUPS = {STREAM_GROUP: MAX_STREAMS, ASIDE_GROUP: 1}
#: Seconds until an actor that was ended for good has given its name back; one that was stopped takes longest.
CLOSE_DEADLINE_S = 30.0
#: Seconds a busy machine may take to start a process anew and construct its role.
REVIVAL_DEADLINE_S = 120.0


class Stream(Protocol):
    """A call under way that answers item by item."""

    @property
    def what(self) -> str:
        """ACTOR.METHOD, for messages."""

    def next(self, timeout_s: float) -> Any:
        """The next item, or END; the role's exception, ActorLostError where its process is gone, or TimeoutError."""

    def close(self) -> None:
        """Nobody will read on: the actor may stop."""


class StreamingHandle(Handle, Protocol):
    """An actor whose answers can be read as they are finished, and which comes back when its process is lost."""

    def stream(self, method: str, *args: Any, **kwargs: Any) -> Stream:
        """Start a call of a method that is a generator."""

    def submit_in(self, life: str, method: str, *args: Any) -> Pending:
        """As `submit`, in that life of the actor only; OtherLifeError in a later one."""

    def submit_returning(self, method: str, *args: Any) -> Pending:
        """As `submit`, and while the actor is on its way back the call waits for it: for one that may run twice."""

    def end(self) -> None:
        """Kill the actor's process, working or stopped; what it was doing is lost, and it starts anew."""

    def close(self) -> None:
        """End the actor for good, and let its name and its place go."""

    def revive(self) -> Pending:
        """A call that ends, with a name for its life, once a lost actor answers again, or in ActorLostError."""


def items(stream: Stream, *, deadline_s: float = DEFAULT_DEADLINE_S) -> Iterator[Any]:
    """The items of a stream as they come. Raises DeadlineError naming which one was not there in time."""
    try:
        for number in itertools.count():
            try:
                item = stream.next(deadline_s)
            except TimeoutError as error:
                raise DeadlineError(f"waited {deadline_s:.0f} s for item {number} of {stream.what}") from error
            if item is END:
                return
            yield item
    finally:
        stream.close()


def look_at(handles: Sequence[StreamingHandle], method: str, *args: Any, deadline_s: float) -> dict[str, Any]:
    """What a quick method answers, by actor, without those that are lost or do not answer in time."""
    pending = [(handle.name, handle.submit(method, *args)) for handle in handles]
    end_s, found = time.monotonic() + deadline_s, {}
    for name, one in pending:
        try:
            found[name] = one.result(max(0.0, end_s - time.monotonic()))
        except (ActorLostError, TimeoutError) as error:
            log.info("%s is left out: %s", one.what, error)
    return found


def ready(calls: Sequence[Pending | Stream], timeout_s: float) -> list[Pending | Stream]:
    """Those of the calls that can be read without waiting, as soon as one can; none when the time is over."""
    here = [call for call in calls if not isinstance(call, RayPending | RayStream)]
    refs = {call.ref: call for call in calls if isinstance(call, RayPending | RayStream)}
    if not refs:
        return here
    import ray

    ray.wait(list(refs), num_returns=1, timeout=0 if here else timeout_s, fetch_local=False)
    return here + [refs[ref] for ref in ray.wait(list(refs), num_returns=len(refs), timeout=0, fetch_local=False)[0]]


#: The face of `ready`.
Wait = Callable[[Sequence[Pending | Stream], float], list[Pending | Stream]]


class InlineStreamingHandle(InlineHandle):
    """The actor lives in this process. It cannot be lost; `end` constructs its role anew."""

    def stream(self, method: str, *args: Any, **kwargs: Any) -> Stream:
        return _InlineStream(f"{self.name}.{method}", self._host.stream(0, method, kwargs, *call_arguments(args)))

    def submit_in(self, life: str, method: str, *args: Any) -> Pending:
        try:
            return self._done(method, self._host.run_in(life, method, {}, *call_arguments(args)))
        except OtherLifeError as error:
            return Failed(f"{self.name}.{method}", error)

    def submit_returning(self, method: str, *args: Any) -> Pending:
        return self.submit(method, *args)

    def end(self) -> None:
        self._host = self._construct()

    def close(self) -> None:
        del self._host

    def revive(self) -> Pending:
        return self.ping()


@dataclass(frozen=True)
class Failed:
    """A call that has ended in an exception already."""

    what: str
    error: Exception

    def result(self, timeout_s: float) -> Any:  # noqa: ARG002 (the face of Pending; an inline call has already ended)
        raise self.error


class _InlineStream:
    def __init__(self, what: str, iterator: Any) -> None:
        self.what, self._iterator = what, iterator

    def next(self, timeout_s: float) -> Any:  # noqa: ARG002 (the face of Stream; inline an item is computed here and now)
        return next(self._iterator, END)

    def close(self) -> None:
        self._iterator.close()


class RayStreamingHandle(RayHandle):
    """The actor is a named Ray actor with CONCURRENCY_GROUPS that Ray restarts."""

    def __init__(self, name: str, actor: Any) -> None:
        super().__init__(name, actor)
        self._numbers = itertools.count()

    def stream(self, method: str, *args: Any, **kwargs: Any) -> Stream:
        number, what = next(self._numbers), f"{self.name}.{method}"
        call = self._actor.stream.options(num_returns="streaming", concurrency_group=STREAM_GROUP, name=what)
        generator = call.remote(number, method, kwargs, *call_arguments(args))
        return RayStream(what, generator, self._aside("end_stream"), number)

    def submit_in(self, life: str, method: str, *args: Any) -> Pending:
        what = f"{self.name}.{method}"
        return RayPending(what, self._actor.run_in.options(name=what).remote(life, method, {}, *call_arguments(args)))

    def submit_returning(self, method: str, *args: Any) -> Pending:
        what = f"{self.name}.{method}"
        run = self._actor.run.options(name=what, max_task_retries=-1)
        return RayPending(what, run.remote(method, {}, *call_arguments(args)))

    def ping(self) -> Pending:
        return RayPending(f"the placement of {self.name}", self._aside("ping").remote())

    def stats(self) -> ActorStats:
        """What the actor did since it was last started."""
        pending = RayPending(f"{self.name}.stats", self._aside("stats", max_task_retries=-1).remote())
        stats: ActorStats = gather([pending], deadline_s=REVIVAL_DEADLINE_S)[0]
        return stats

    def pulses(self) -> Mapping[str, Pending]:
        return {self.name: RayPending(f"{self.name}.pulse", self._aside("pulse").remote())}

    def end(self) -> None:
        import ray

        ray.kill(self._actor, no_restart=False)

    def close(self) -> None:
        import ray

        ray.kill(self._actor, no_restart=True)
        end_s = time.monotonic() + CLOSE_DEADLINE_S
        while self._named() and time.monotonic() < end_s:
            time.sleep(0.05)
        if self._named():
            raise DeadlineError(f"waited {CLOSE_DEADLINE_S:.0f} s for the end of {self.name}, which still has its name")

    def _named(self) -> bool:
        import ray

        try:
            ray.get_actor(self.name)
        except ValueError:
            return False
        return True

    def revive(self) -> Pending:
        # Retried for as long as the actor is on its way back; an error once Ray has given it up.
        return RayPending(f"the return of {self.name}", self._aside("ping", max_task_retries=-1).remote())

    def _aside(self, method: str, **options: Any) -> Any:
        return getattr(self._actor, method).options(concurrency_group=ASIDE_GROUP, **options)


class RayStream:
    """A stream of a Ray actor. `ref` is Ray's generator of references."""

    def __init__(self, what: str, ref: Any, end: Any, number: int) -> None:
        self.what, self.ref = what, ref
        self._end, self._number = end, number
        self._over = False

    def next(self, timeout_s: float) -> Any:
        import ray

        end_s = time.monotonic() + timeout_s
        if not ray.wait([self.ref], timeout=timeout_s, fetch_local=False)[0]:
            raise TimeoutError(f"{self.what} has not gone on")
        try:
            ref = next(self.ref)
        except StopIteration:
            self._over = True
            return END
        try:
            return actor_value(self.what, ref, max(0.0, end_s - time.monotonic()))
        except TimeoutError:
            raise
        except Exception:
            self._over = True
            raise

    def close(self) -> None:
        if not self._over:
            self._over = True
            self._end.remote(self._number)
