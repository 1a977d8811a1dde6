"""The `environment` of an online stage: what its episodes are played in (several turns; tools).

    environment: {kind: calculator, max_turns: 4}
    environment: {path: my_package.my_module:MyEnvironment, options: {level: 2}, max_turns: 6}

What the environment pays is the reward's component `environment`.
"""

# ruff: noqa: RUF012 (pydantic copies a mutable default for every instance)

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import ValidationInfo, model_validator

from afm_rl.environments.hosts import KINDS, EnvironmentHost, LocalHost, WorkerHost
from afm_rl.environments.interface import Environment
from afm_rl.tokenizer import Tokenizer
from afm_rl.types import Prompt, ScoredGroup
from afm_rl.workers.pool import Task, WorkerStartError
from topologies.strict import Count, Positive, Strict, one_of, problem

if TYPE_CHECKING:
    from actors.episodes import Ask

Kind = Annotated[str, one_of("environment", tuple(KINDS))]


class EnvironmentOptions(Strict):
    """One of ours by `kind`, or a class of the user's by import `path`, made anew for every episode with `options`.

    An episode has at most `max_turns` turns of the policy, each of at most `turn_tokens` tokens. A user's environment runs
    in `workers` processes, where a step may take `timeout_s` seconds.
    """

    kind: Kind | None = None
    path: str | None = None
    options: dict[str, Any] = {}
    max_turns: Count = 4
    turn_tokens: Count | None = None
    timeout_s: Positive = 10.0
    memory_mib: Count = 1024
    workers: Count = 1

    @model_validator(mode="after")
    def _check(self, info: ValidationInfo) -> EnvironmentOptions:
        if (self.kind is None) == (self.path is None):
            raise problem(f"give kind (one of {', '.join(KINDS)}) or path (package.module:Class), and only one")
        if self.kind is not None:
            try:
                self._ours()
            except TypeError as error:
                raise problem(f"{self.kind}: {error}", at=("options",)) from error
        elif (info.context or {}).get("check_files"):
            try:
                self.host().close()
            except WorkerStartError as error:
                raise problem(str(error), at=("path",)) from error
        return self

    def host(self) -> EnvironmentHost:
        """Where episodes are played. Raises WorkerStartError for a path that cannot be loaded."""
        if self.kind is not None:
            return LocalHost(self._ours)
        assert self.path is not None
        task = Task(self.path, self.options, memory_bytes=self.memory_mib * 2**20, search_path=(os.getcwd(),))
        return WorkerHost(task, limit_s=self.timeout_s, workers=self.workers)

    def episodes(
        self,
        ask: Ask,
        prompts: Sequence[Prompt],
        *,
        host: EnvironmentHost,
        tokenizer: Tokenizer,
        responses: int,
        max_tokens: int,
        max_context: int,
        temperature: float,
        seed: int,
    ) -> list[ScoredGroup]:
        """Play the episodes of every prompt (`actors/episodes.py`), `responses` each, in place of sampling."""
        from actors.episodes import EpisodeOptions, play  # imports JAX, which the reading of a topology goes without

        options = EpisodeOptions(
            responses=responses,
            max_turns=self.max_turns,
            max_tokens=max_tokens,
            max_context=max_context,
            temperature=temperature,
            seed=seed,
            turn_tokens=self.turn_tokens,
        )
        return play(ask, prompts, host=host, tokenizer=tokenizer, options=options)

    def _ours(self) -> Environment:
        assert self.kind is not None
        make: Callable[..., Environment] = KINDS[self.kind]
        return make(**self.options)
