"""A learner group: N processes on one JAX mesh behind one handle, that live and die together.

    handle = start_group("learner", Learner, {...}, GroupSpec(processes=2))
    call(handle, "begin", job)           # runs on every rank; the answer is rank 0's
    handle.progressed()                  # a checkpoint was committed: the budget of restarts is whole again

A member that dies or freezes takes the group with it: every process is killed (a survivor is never saved), a fresh group
is formed under a fresh coordinator, and the pending call raises `GroupRestartedError`. The role's state is gone then: the
caller begins its job again, from its last checkpoint. A handle is for one thread of the driver.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

from actors.failures import InfrastructureError
from actors.group_member import Process
from actors.group_placement import GroupSpec
from actors.group_watch import Loss, Members, Split, Watch, collect
from actors.host import ActorStats, RayPending
from afm_rl.errors import UserError

__all__ = ["GroupFailedError", "GroupHandle", "GroupRestartedError", "GroupSpec", "start_group"]

log = logging.getLogger(__name__)


class GroupRestartedError(InfrastructureError):
    """A member was lost during a call, and the group was built anew: begin the job again, from its last checkpoint."""

    def __init__(self, name: str, *, restarts: int, rank: int, cause: str) -> None:
        super().__init__(f"{name} lost rank {rank} ({cause}) and was built anew (restart {restarts}): begin the job again")
        self.restarts, self.rank, self.cause = restarts, rank, cause


class GroupFailedError(RuntimeError):
    """The group was lost more often than its budget allows, or has ended."""


@dataclass(frozen=True, kw_only=True)
class GroupPending(RayPending):
    """A call on every rank. `ref` is rank 0's value; `calls` say per rank that it has ended."""

    group: GroupHandle
    generation: int
    calls: Sequence[Any]

    def settle(self, timeout_s: float) -> None:
        """Wait until the call has ended on every rank; its exception, GroupRestartedError, or TimeoutError."""
        self.group.wait(self, timeout_s)

    def result(self, timeout_s: float) -> Any:
        return self.group.wait(self, timeout_s, fetch=self.ref is not None)


class GroupHandle:
    """The group as one actor of the topology (`actors.host.Handle`). `build` starts one life of its processes.

    `restarts` counts rebuilds, `restart_seconds` adds up the time from a member's last sign of life to the group's next.
    """

    def __init__(
        self, name: str, spec: GroupSpec, build: Callable[[], Members], clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.name, self.spec = name, spec
        self._build, self._clock = build, clock
        self.restarts, self.restart_seconds = 0, 0.0
        self._causes: list[str] = []
        self._generation, self._suspended = 0, False
        self._ended: Exception | None = None
        self._last_loss: GroupRestartedError | None = None
        self._form()

    def submit(self, method: str, *args: Any, **kwargs: Any) -> GroupPending:
        """Start a call on every rank. Arguments travel once, whatever the number of ranks."""
        self._require_alive()
        ref, calls = self._members.send(method, args, kwargs)
        after = tuple(a for a in args if isinstance(a, RayPending))
        return self._pending(f"{self.name}.{method}", ref, after, calls)

    def ping(self) -> GroupPending:
        """A call that ends once the group is placed, has formed its mesh, and its roles are constructed."""
        self._require_alive()
        return self._pending(f"the placement of {self.name}", None, (), ())

    def stats(self) -> ActorStats:
        """Rank 0's."""
        return self.member_stats()[0]

    def member_stats(self) -> list[ActorStats]:
        """Every rank's. A group that lost a member while nobody waited for it is built anew here, without its state."""
        self._require_alive()
        while True:
            try:
                self._await_formed(math.inf)
                return self._members.stats()
            except Loss as loss:
                self._rebuild(loss)

    def pulses(self) -> Mapping[str, RayPending]:
        """A call for each member's `Pulse`; none while suspended. For any thread: a lost group is not built anew here."""
        return {} if self._suspended else self._members.pulses()

    @contextmanager
    def suspended(self) -> Iterator[None]:
        """End the group for the block, so that others can have its place; a fresh one, without state, forms afterwards."""
        self._require_alive()
        self._members.kill()
        self._generation += 1
        self._suspended = True
        try:
            yield
        finally:
            self._suspended = False
            self._form()

    def processes(self) -> list[Process]:
        """Where the members run that have been placed."""
        self._require_alive()
        return self._members.processes()

    def progressed(self) -> None:
        """Say that work was made safe (a checkpoint is committed): earlier losses no longer count."""
        self._causes.clear()

    def close(self) -> None:
        """End every process and give the group's place back."""
        self._end(GroupFailedError(f"{self.name} has been closed"))

    def wait(self, pending: GroupPending, timeout_s: float, *, fetch: bool = False) -> Any:
        """Wait for a call as `GroupPending.settle` says; rank 0's value where `fetch`."""
        if pending.generation != self._generation and self._last_loss is not None:
            raise self._last_loss
        self._require_alive()
        end_s = self._clock() + timeout_s
        try:
            for argument in pending.after:
                argument.settle(max(0.0, end_s - self._clock()))
            self._await_formed(max(0.0, end_s - self._clock()))
            left_s = max(0.0, end_s - self._clock())
            collect(self._watch, self._members, pending.calls, timeout_s=left_s, grace_s=self.spec.heartbeat_s)
            return self._members.value(pending.ref) if fetch else None
        except Loss as loss:
            raise self._rebuild(loss) from loss
        except Split as split:
            self._rebuild(Loss(split.rank, str(split.error)))
            split.error.add_note(
                f"raised by rank {split.rank} of {self.name} alone; the group was built anew without its state"
            )
            raise split.error from None
        except TimeoutError:
            raise
        except Exception:
            if pending.ref is not None:
                self._members.discard(pending.ref)
            raise

    def _pending(self, what: str, ref: Any, after: tuple[RayPending, ...], calls: Sequence[Any]) -> GroupPending:
        return GroupPending(what, ref, after, group=self, generation=self._generation, calls=calls)

    def _form(self) -> None:
        self._formed = False
        self._form_by_s = self._clock() + self.spec.start_deadline_s
        self._members = self._build()

    def _await_formed(self, timeout_s: float) -> None:
        """Wait until every role is constructed. Raises UserError naming what the group asks for, once it is too late."""
        if self._formed:
            return
        by_s = min(self._form_by_s, self._clock() + timeout_s)
        try:
            # An actor that waits for its place cannot answer beats: only a placed one has a pulse.
            self._collect_start(self._members.placed, by_s, heartbeat_s=math.inf)
            self._collect_start(self._members.formed, by_s, heartbeat_s=self.spec.heartbeat_s)
        except TimeoutError:
            if self._clock() < self._form_by_s:
                raise
            raise self._end(self._not_started()) from None
        except Split as split:
            raise self._end(split.error) from None
        except Exception as error:
            if not isinstance(error, Loss):
                self._end(error)
            raise
        self._formed = True

    def _collect_start(self, calls: Sequence[Any], by_s: float, *, heartbeat_s: float) -> None:
        self._watch = Watch(self._members, size=self.spec.processes, heartbeat_s=heartbeat_s, clock=self._clock)
        timeout_s, grace_s = by_s - self._clock(), self.spec.heartbeat_s
        collect(self._watch, self._members, calls, timeout_s=timeout_s, grace_s=grace_s)

    def _not_started(self) -> UserError:
        placed = len(self._members.ready(self._members.placed, 0.0)) == self.spec.processes
        what = "was placed, but its processes did not form a mesh" if placed else "could not be placed"
        advice = "do the nodes reach each other?" if placed else "compare with `ray status`"
        return UserError(
            f"{self.name} {what} within {self.spec.start_deadline_s:g} s: it asks for {self.spec.asks}; {advice}"
        )

    def _rebuild(self, loss: Loss) -> GroupRestartedError:
        """Kill what is left and form a fresh group, as often as the budget allows; what its caller must raise."""
        first, began_s = loss, self._clock() - loss.silent_s
        while True:
            self._causes.append(str(loss))
            log.warning("%s lost %s; every process of it is ended", self.name, loss)
            self._members.kill()
            if len(self._causes) > self.spec.max_restarts:
                causes = "; ".join(self._causes)
                raise self._end(
                    GroupFailedError(f"{self.name} was lost {len(self._causes)} times without progress: {causes}")
                )
            self.restarts += 1
            self._generation += 1
            try:
                self._form()
                self._await_formed(math.inf)
                break
            except Loss as again:
                loss = again
            except Exception as error:
                self._end(error)
                raise
        took_s = self._clock() - began_s
        self.restart_seconds += took_s
        log.warning("%s works again after %.1f s (restart %d)", self.name, took_s, self.restarts)
        self._last_loss = GroupRestartedError(self.name, restarts=self.restarts, rank=first.rank, cause=first.cause)
        return self._last_loss

    def _end(self, error: Exception) -> Exception:
        if self._ended is None:
            self._ended = error
            self._members.kill()
        return error

    def _require_alive(self) -> None:
        if self._ended is not None:
            raise GroupFailedError(f"{self.name} has ended: {self._ended}") from self._ended


def start_group(name: str, role: type, kwargs: dict[str, Any], spec: GroupSpec) -> GroupHandle:
    """A group of Ray actors named NAME (one process) or NAME-0..N-1, each constructing `role(**kwargs)` on the mesh.

    Returns at once; `ping` waits until the group works. Ray must be initialized.
    """
    from actors.group_ray import RayMembers

    return GroupHandle(name, spec, partial(RayMembers, name, role, kwargs, spec))
