"""Who may be asked: actors that generate, the weights each has acknowledged, and what becomes of one that has not.

    give -> the store notes it -> every actor loads, verifies, acknowledges (policy, version, digest) -> it may be asked

| event | what follows |
|---|---|
| bytes arrive damaged, or something else is acknowledged | that one is given the weights again, and is not asked meanwhile |
| an actor dies, before, while or after it loads | the others go on; it starts anew with what the store says, and joins |
| it was given newer weights while it was away | it is given those before it joins |
| an actor does not take the weights within the deadline | it is killed, then as above |
| the weights hold values that are not finite | WeightsRefusedError; everybody goes on with what they had |
| one fails more often than its budget, without answering | it is given up; the last one's end is an error |

`give` returns once somebody may be asked and nobody who lives still loads. It may run in one thread while another generates:
an actor is asked on while newer weights are on their way to it, and each of its tokens says which version made it.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from actors.failures import ActorsLostError, FailureBudget, FailuresExhaustedError, InfrastructureError
from actors.host import Handle, Pending, RayPending, call, gather
from actors.sampler import Acknowledged, PolicySpec
from actors.streams import REVIVAL_DEADLINE_S, Failed, StreamingHandle, ready
from actors.weights import WeightsOutOfSyncError, WeightsRefusedError
from afm_rl.weights import DigestMismatchError

log = logging.getLogger(__name__)

#: Seconds between two looks at who has joined or left, while others work.
LOOK_S = 0.5


@dataclass(frozen=True)
class Given:
    """What the actors are to hold of a policy."""

    version: int
    digest: str
    spec: PolicySpec


@dataclass(frozen=True)
class Sync:
    """Whether every actor that was not given up has acknowledged the newest weights of a policy, and who has not."""

    version: int
    digest: str
    actors: int
    lagging: tuple[str, ...]

    @property
    def in_sync(self) -> bool:
        """Nobody lags, and there is somebody."""
        return self.actors > 0 and not self.lagging

    def metrics(self) -> dict[str, float]:
        """`weights_in_sync` is 1 or 0; how many actors there are, and how many of them lag."""
        return {"weights_in_sync": float(self.in_sync), "actors_live": self.actors, "actors_lagging": len(self.lagging)}


@dataclass
class _Member:
    """`away`: the call that must end before it may be asked."""

    handle: StreamingHandle
    budget: FailureBudget
    held: dict[str, Acknowledged] = field(default_factory=dict)
    away: Pending | None = None
    given_up: str | None = None
    leaving: bool = False
    streams: int = 0


class Roster:
    """The actors of one role. For any threads.

    `max_failures`: of one actor, without an answer in between. `deadline_s`: to load weights.
    """

    def __init__(
        self,
        handles: Sequence[StreamingHandle],
        store: Handle,
        *,
        max_failures: int = 3,
        deadline_s: float = REVIVAL_DEADLINE_S,
    ) -> None:
        self._store, self._max_failures, self._deadline_s = store, max_failures, deadline_s
        self._lock, self._delivery = threading.RLock(), threading.Lock()
        self._members = {handle.name: self._member(handle) for handle in handles}
        self._given: dict[str, Given] = {}
        self._log: dict[str, list[Given]] = {}
        self._arriving: str | None = None

    # Weights

    def give(
        self,
        policy: str,
        version: int,
        spec: PolicySpec,
        *,
        digest: str,
        beside: Sequence[str] = (),
        made_by: Pending | None = None,
    ) -> None:
        """Bring the store's weights of `policy` with this digest to every actor, instead of all it held but `beside`.

        `made_by` is the call whose value was published: under Ray that travels from where it lies, not as a copy.
        Raises WeightsRefusedError naming who would not take them, ActorsLostError when nobody is left.
        """
        given = Given(version, digest, spec)
        with self._delivery:
            members = self._asked()
            names = [member.handle.name for member in members]
            self._assign(names, policy, given, beside)
            before, log_before = self._note(policy, given, beside)
            try:
                self._load_all([m for m in members if m.away is None], policy, given, made_by)
            except WeightsRefusedError:
                with self._lock:
                    self._given, self._log[policy] = before, log_before
                    for member in members:
                        if member.given_up is None and member.away is None:
                            self._bring_up_to_date(member)  # back to what was held, where it had taken them
                raise
            finally:
                self._arriving = None
            self._await_somebody(policy)

    def given(self, policy: str) -> Given:
        """What the actors are to hold of a policy. Raises KeyError naming what they were given."""
        if policy not in self._given:
            held = ", ".join(sorted(self._given)) or "nothing"
            raise KeyError(f"policy {policy!r} was not given to these actors; they hold {held}")
        return self._given[policy]

    def holds(self, policy: str, digest: str) -> bool:
        """Whether these weights were given and not replaced since."""
        return policy in self._given and self._given[policy].digest == digest

    def accepted(self, policy: str, *, since: int) -> set[int]:
        """The versions given since the `since`th delivery of a policy (see `deliveries`), that one included."""
        return {given.version for given in self._log.get(policy, [])[since:]}

    def deliveries(self, policy: str) -> int:
        """How often a policy was given, without the delivery under way: some still answer by what was given before it."""
        with self._lock:
            return len(self._log.get(policy, [])) - (self._arriving == policy)

    def sync(self, policy: str) -> Sync:
        """Who has acknowledged the newest weights of a policy, as of now."""
        with self._lock:
            given = self.given(policy)
            live = self._asked()
            lagging = tuple(m.handle.name for m in live if not self._in_sync(m, policy))
            return Sync(given.version, given.digest, len(live), lagging)

    def forget(self) -> None:
        """The actors hold nothing any more."""
        with self._lock:
            self._given = {}
            for member in self._members.values():
                member.held = {}

    # Who may be asked: `actors.dispatch.Members`

    def handles(self) -> list[StreamingHandle]:
        """Those who are asked, or will be once they have what was given."""
        return [member.handle for member in self._asked()]

    look_s = LOOK_S

    def away(self, handle: StreamingHandle) -> Pending | None:
        """The call that must end before this one may be asked, or None."""
        member = self._members.get(handle.name)
        return member.away if member is not None else None

    def lost(self, handle: StreamingHandle, cause: str) -> None:
        """Its process is gone: it joins once its next life has acknowledged what was given."""
        with self._lock:
            member = self._members.get(handle.name)
            if member is not None and member.away is None:
                self._fail(member, "its process", InfrastructureError(cause))
                if member.given_up is None:
                    self._returning(member)

    def returned(self, handle: StreamingHandle, pending: Pending) -> None:
        """Read the call that was waited for. Afterwards `away` says what is to be waited for next, if anything."""
        with self._lock:
            member = self._members.get(handle.name)
            if member is None or member.away is not pending:
                return  # somebody else has read it
            try:
                found = pending.result(self._deadline_s)
            except (InfrastructureError, DigestMismatchError) as error:
                self._fail(member, pending.what, error)
                if member.given_up is None:
                    self._returning(member)
                return
            for one in found if isinstance(found, list) else [found]:
                member.held[one.policy] = one
            try:
                self._bring_up_to_date(member)
            except WeightsOutOfSyncError as error:  # the store has let go of what was given: something newer is to follow
                if not self._fail(member, "its weights", error):
                    self._returning(member)

    def answered(self, handle: StreamingHandle) -> None:
        """It does its work: what it failed in before no longer counts."""
        if handle.name in self._members:
            self._members[handle.name].budget.progressed()

    def streaming(self, handle: StreamingHandle, change: int) -> None:
        """It has so many more, or fewer, streams under way."""
        with self._lock:
            if handle.name in self._members:
                self._members[handle.name].streams += change

    # Scaling

    def add(self, handle: StreamingHandle) -> None:
        """One more: it is given what the others were given, and joins."""
        with self._lock:
            self._members[handle.name] = member = self._member(handle)
            self._returning(member)

    def given_up(self, name: str) -> bool:
        """Whether this one failed too often to be asked again."""
        return self._members[name].given_up is not None

    def retire(self, name: str) -> None:
        """This one is asked no more."""
        with self._lock:
            self._members[name].leaving = True

    def idle(self, name: str) -> bool:
        """Whether nobody waits for an answer of this one."""
        return self._members[name].streams == 0

    def remove(self, name: str) -> StreamingHandle:
        """Forget about this one, and what it held."""
        with self._lock:
            member = self._members.pop(name)
        call(self._store, "release", [name], deadline_s=self._deadline_s)
        return member.handle

    def joined(self, name: str) -> bool:
        """Whether this one may be asked. Reads what has ended. Raises ActorsLostError when it was given up."""
        with self._lock:
            member = self._members[name]
            while member.away is not None and ready([member.away], 0.0):
                self.returned(member.handle, member.away)
            if member.given_up is not None:
                raise ActorsLostError(f"{name}: {member.given_up}")
            return member.away is None

    def causes(self) -> str:
        """Why each one that was given up was."""
        with self._lock:
            return "; ".join(f"{m.handle.name}: {m.given_up}" for m in self._members.values() if m.given_up is not None)

    # Inside

    def _asked(self) -> list[_Member]:
        """Those that are asked, or will be. Others may join and leave meanwhile, in another thread."""
        with self._lock:
            return [member for member in self._members.values() if member.given_up is None and not member.leaving]

    def _member(self, handle: StreamingHandle) -> _Member:
        return _Member(handle, FailureBudget(handle.name, infrastructure=self._max_failures))

    def _note(self, policy: str, given: Given, beside: Sequence[str]) -> tuple[dict[str, Given], list[Given]]:
        """From now on this is what is to be held; what was noted before."""
        with self._lock:
            before, log_before = self._given, self._log.get(policy, [])
            self._given = {**{name: held for name, held in before.items() if name in beside}, policy: given}
            self._log[policy], self._arriving = [*log_before, given], policy
            return before, log_before

    def _assign(self, names: Sequence[str], policy: str, given: Given, beside: Sequence[str]) -> None:
        limit_s = self._deadline_s
        call(self._store, "assign", names, policy, given.spec, digest=given.digest, beside=beside, deadline_s=limit_s)

    def _load_all(self, members: Sequence[_Member], policy: str, given: Given, made_by: Pending | None) -> None:
        weights = _lying(made_by) if made_by is not None else self._store.submit("fetch", policy, given.digest)
        refused: dict[str, str] = {}
        loading = [(member, _submitted(member.handle, weights, given.spec)) for member in members]
        for member, pending in loading:
            try:
                self._take_load(member, pending, policy, given)
            except ValueError as error:
                refused[member.handle.name] = str(getattr(error, "cause", error))  # Ray wraps what an actor raised
        accepted = [m.handle.name for m in members if m.handle.name not in refused and m.away is None]
        call(self._store, "settle", accepted, deadline_s=self._deadline_s)
        if refused:
            call(self._store, "withdraw", list(refused), deadline_s=self._deadline_s)
            who, why = ", ".join(refused), next(iter(refused.values()))
            raise WeightsRefusedError(f"{who} goes on without the new weights: {why}")

    def _take_load(self, member: _Member, pending: Pending, policy: str, given: Given) -> None:
        """Wait for an acknowledgement; what fails without its process is tried again. Raises ValueError for a refusal."""
        while True:
            try:
                [found] = gather([pending], deadline_s=self._deadline_s)
                self._check(member, found, policy, given)
            except (DigestMismatchError, WeightsOutOfSyncError) as error:
                member.held.pop(policy, None)
                if self._fail(member, "its weights", error):
                    return
                pending = _submitted(member.handle, self._store.submit("fetch", policy, given.digest), given.spec)
            except InfrastructureError as error:
                if isinstance(error, TimeoutError):
                    member.handle.end()
                self.lost(member.handle, str(error))
                return
            else:
                return

    def _check(self, member: _Member, found: Acknowledged, policy: str, given: Given) -> None:
        if found != Acknowledged(policy, given.version, given.digest):
            raise WeightsOutOfSyncError(
                f"{member.handle.name} acknowledged {found}, and not version {given.version} of {policy!r} with digest "
                f"{given.digest[:12]}"
            )
        with self._lock:
            if member.away is None:
                member.held = {name: one for name, one in member.held.items() if name in self._given} | {policy: found}

    def _bring_up_to_date(self, member: _Member) -> None:
        """Submit the first of the given weights that it lacks; it has joined when it lacks none."""
        name = member.handle.name
        for policy, given in self._given.items():
            if not self._in_sync(member, policy):
                others = [other for other in self._given if other != policy]
                self._assign([name], policy, given, others)
                weights = self._store.submit("fetch", policy, given.digest)
                member.away = _submitted(member.handle, weights, given.spec)
                return
        member.away = None
        self._store.submit("settle", [name])
        log.info("%s has what was given and is asked", name)

    def _returning(self, member: _Member) -> None:
        member.held = {}
        member.away = member.handle.submit_returning("held")

    def _in_sync(self, member: _Member, policy: str) -> bool:
        given, held = self._given[policy], member.held.get(policy)
        return held is not None and (held.version, held.digest) == (given.version, given.digest)

    def _fail(self, member: _Member, what: str, error: Exception) -> bool:
        """Charge a failure; whether that one is given up with it."""
        log.warning("%s failed (%s): %s", member.handle.name, what, error)
        try:
            member.budget.spend("infrastructure", what, error)
        except FailuresExhaustedError as end:
            member.given_up, member.away = str(end), None
            log.error("%s is given up: %s", member.handle.name, end)
        return member.given_up is not None

    def _await_somebody(self, policy: str) -> None:
        """Until one may be asked. Raises ActorsLostError when none ever will, or after the deadline."""
        end_s = time.monotonic() + self._deadline_s
        while True:
            members = self._asked()
            if any(m.away is None for m in members):
                return
            if not members or time.monotonic() > end_s:
                waited = ", ".join(m.away.what for m in members if m.away is not None)
                why = f"waited {self._deadline_s:g} s for {waited}" if members else self.causes()
                raise ActorsLostError(f"no actor is left to take policy {policy!r} ({why})")
            for pending in ready([m.away for m in members if m.away is not None], LOOK_S):
                member = next(m for m in members if m.away is pending)
                self.returned(member.handle, pending)  # type: ignore[arg-type]


def _lying(made_by: Pending) -> Pending:
    """The value of a call that has ended, whatever has become since of those who made it."""
    return RayPending(made_by.what, made_by.ref) if isinstance(made_by, RayPending) else made_by


def _submitted(handle: StreamingHandle, weights: Pending, spec: PolicySpec) -> Pending:
    """The call; where it runs at once, what it raised is raised when it is read."""
    try:
        return handle.submit("load", weights, spec)
    except Exception as error:  # whatever it is, it is read in its turn
        return Failed(f"{handle.name}.load", error)
