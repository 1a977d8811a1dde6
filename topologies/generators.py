"""The samplers, or the committee, as stages use them: give them weights, ask them, and log what their engines did.

Whatever is asked goes through `actors/dispatch.py`; an answer from other weights than those given last is an error, so that
nothing is ever trained or measured on the wrong policy.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from actors.dispatch import DispatchOptions, generate
from actors.engine_use import EngineUse
from actors.host import Handle, Pending, call
from actors.metrics import ENGINE_STAGE, Metrics
from actors.sampler import PolicySpec
from actors.streams import StreamingHandle, call_again
from actors.weights import WeightsOutOfSyncError, deliver
from afm_rl.types import GenerationRequest, Group
from topologies.actor_options import Generating

#: More of the responses that fit an engine's batch are given to it, so that a free row finds its next response waiting.
QUEUED = 0.25

Looks = Sequence[EngineUse]


@dataclass(frozen=True)
class Given:
    """What the actors were given last."""

    policy: str
    version: int
    digest: str


class Generators:
    """The actors of one role."""

    def __init__(self, handles: Sequence[StreamingHandle], store: Handle, options: Generating) -> None:
        self._handles, self._store = handles, store
        self._dispatch = DispatchOptions(
            window=options.max_batch + round(QUEUED * options.max_batch),
            deadline_s=options.group_deadline_s,
            max_losses=options.max_restarts,
        )
        self._given: dict[str, Given] = {}

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
        """Bring the store's weights of a policy to every actor, as `actors.weights.deliver` does."""
        deliver(self._store, self._handles, policy, spec, digest=digest, beside=beside, made_by=made_by)
        kept = {name: given for name, given in self._given.items() if name in beside}
        self._given = {**kept, policy: Given(policy, version, digest)}

    def hold(self, policy: str, digest: str) -> bool:
        """Whether these weights were given and not replaced since."""
        return policy in self._given and self._given[policy].digest == digest

    def free(self) -> None:
        """Let go of every policy."""
        call(self._store, "release", [handle.name for handle in self._handles])
        for handle in self._handles:
            call_again(handle, "keep_only", [])
        self._given = {}

    def answer(self, policy: str, requests: Sequence[GenerationRequest]) -> list[Group]:
        """The answers of a policy given before, in order. Raises as `generate` does, and WeightsOutOfSyncError."""
        by_id = {group.id: group for group in self.answers(policy, requests)}
        return [by_id[request.id] for request in requests]

    def answers(self, policy: str, requests: Sequence[GenerationRequest]) -> Iterator[Group]:
        """The answers of a policy given before, each as it is finished; ids must differ. Raises as `answer` does.

        Tokens may be of the version given last before the call, or of any that was given since.
        """
        first = self._given[policy].version
        for group in generate(self._handles, requests, policy=policy, options=self._dispatch):
            assert isinstance(group, Group)
            last = self._given[policy].version
            used = {group.version, *(int(v) for versions in group.versions for v in np.unique(versions))}
            if group.policy != policy or not all(first <= version <= last for version in used):
                wanted = f"version {first}" if first == last else f"versions {first} to {last}"
                raise WeightsOutOfSyncError(
                    f"request {group.id!r} was answered by {group.policy!r} version "
                    f"{', '.join(map(str, sorted(used)))} instead of {policy!r} {wanted}"
                )
            yield group

    def look(self) -> Looks:
        """What every engine did so far."""
        return [call_again(handle, "use") for handle in self._handles]

    def log(self, metrics: Metrics, since: Looks, *, task: str, step: int) -> dict[str, float]:
        """Log what each actor did since a look, as TASK/ACTOR of the stage "engine"; the same of all together, or {}."""
        spans = [now.since(before) for before, now in zip(since, self.look(), strict=True)]
        for handle, span in zip(self._handles, spans, strict=True):
            if span.steps:
                metrics.log(stage=ENGINE_STAGE, task=f"{task}/{handle.name}", step=step, values=span.metrics())
        together = sum(spans, EngineUse())
        return together.metrics() if together.steps else {}
