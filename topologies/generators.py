"""The samplers, or the committee, as stages use them: give them weights, ask them, and log what their engines did.

Whatever is asked goes through `actors/dispatch.py` to those who have acknowledged what was given (`actors/roster.py`); an
answer from other weights is an error, so that nothing is ever trained or measured on the wrong policy.

One thread may `give` while another is inside `answer` or `answers`; one call of each at a time. `sync`, `hold`, `look` and
scaling may be called from any thread at any time.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import closing

import numpy as np

from actors.dispatch import Dispatch, DispatchOptions
from actors.engine_use import EngineUse
from actors.host import Handle, Pending, call
from actors.metrics import ENGINE_STAGE, Metrics
from actors.roster import Roster, Sync
from actors.sampler import PolicySpec
from actors.streams import StreamingHandle, look_at
from actors.weights import WeightsOutOfSyncError
from afm_rl.types import GenerationRequest, Group
from topologies.actor_options import Generating

#: More of the responses that fit an engine's batch are given to it, so that a free row finds its next response waiting.
QUEUED = 0.25
#: Seconds that a look at an actor's counters may take; who is late, or lost, is left out.
LOOK_DEADLINE_S = 30.0
#: Seconds that an actor may take to let go of its weights.
FREE_DEADLINE_S = 120.0

Looks = Mapping[str, EngineUse]


class Generators:
    """The actors of one role. `between` is called now and then while answers are waited for (`topologies/control.py`)."""

    def __init__(self, handles: Sequence[StreamingHandle], store: Handle, options: Generating) -> None:
        self.roster = Roster(handles, store, max_failures=options.max_restarts)
        self._store = store
        self._dispatch = DispatchOptions(
            window=options.max_batch + round(QUEUED * options.max_batch),
            deadline_s=options.group_deadline_s,
            max_losses=options.max_restarts,
        )
        self.between: Callable[[], None] = lambda: None

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
        """Bring the store's weights of a policy to every actor that lives, as `Roster.give` does; the others join later."""
        self.roster.give(policy, version, spec, digest=digest, beside=beside, made_by=made_by)

    def hold(self, policy: str, digest: str) -> bool:
        """Whether these weights were given and not replaced since."""
        return self.roster.holds(policy, digest)

    def sync(self, policy: str) -> Sync:
        """Whether every actor has acknowledged the newest weights of a policy, and who has not; its `metrics` are gauges."""
        return self.roster.sync(policy)

    def free(self) -> None:
        """Let go of every policy."""
        handles = self.roster.handles()
        call(self._store, "release", [handle.name for handle in handles])
        self.roster.forget()
        # One that is away, or is lost now, returns with nothing: that is what the store says.
        look_at(
            [handle for handle in handles if self.roster.away(handle) is None], "keep_only", [], deadline_s=FREE_DEADLINE_S
        )

    def answer(self, policy: str, requests: Sequence[GenerationRequest]) -> list[Group]:
        """The answers of a policy given before, in the order of the requests. Raises as `answers` does."""
        found = dict(self._answers(policy, requests))
        return [found[index] for index in range(len(requests))]

    def answers(self, policy: str, requests: Sequence[GenerationRequest]) -> Generator[Group, None, None]:
        """The answers of a policy given before, each as it is finished.

        A response's tokens are of the weights given last before the call, or of any given since, and every one of those was
        acknowledged. Raises WeightsOutOfSyncError for an answer of others, RequestsRefusedError, once all others are
        answered, when some can never run, ActorsLostError when nobody is left.
        """
        for _, group in self._answers(policy, requests):
            yield group

    def _answers(self, policy: str, requests: Sequence[GenerationRequest]) -> Iterator[tuple[int, Group]]:
        self.roster.given(policy)
        since, members = max(0, self.roster.deliveries(policy) - 1), _Polling(self.roster, self.between)
        with closing(Dispatch(members, requests, policy=policy, options=self._dispatch).groups()) as groups:
            for index, group in groups:
                self._check(group, policy, self.roster.accepted(policy, since=since))
                yield index, group

    def _check(self, group: Group, policy: str, accepted: set[int]) -> None:
        used = {group.version, *(int(version) for versions in group.versions for version in np.unique(versions))}
        if group.policy != policy or not used <= accepted:
            found, wanted = (", ".join(map(str, sorted(versions))) for versions in (used, accepted))
            raise WeightsOutOfSyncError(
                f"request {group.id!r} was answered by {group.policy!r} version {found} instead of {policy!r} version "
                f"{wanted}"
            )

    def look(self) -> Looks:
        """What every engine did so far, by actor; without those that do not answer now."""
        return look_at(self.roster.handles(), "use", deadline_s=LOOK_DEADLINE_S)

    def log(self, metrics: Metrics, since: Looks, *, task: str, step: int) -> dict[str, float]:
        """Log what each actor did since a look, as TASK/ACTOR of the stage "engine"; the same of all together, or {}."""
        spans = {name: now.since(since.get(name, EngineUse())) for name, now in self.look().items()}
        for name, span in spans.items():
            if span.steps:
                metrics.log(stage=ENGINE_STAGE, task=f"{task}/{name}", step=step, values=span.metrics())
        together = sum(spans.values(), EngineUse())
        return together.metrics() if together.steps else {}


class _Polling:
    """A roster that does something else whenever it is asked who is there."""

    def __init__(self, roster: Roster, between: Callable[[], None]) -> None:
        self._roster, self._between = roster, between
        self.look_s = roster.look_s
        self.away, self.lost, self.returned = roster.away, roster.lost, roster.returned
        self.answered, self.streaming, self.causes = roster.answered, roster.streaming, roster.causes

    def handles(self) -> Sequence[StreamingHandle]:
        self._between()
        return self._roster.handles()
