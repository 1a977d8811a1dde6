"""The online loop (4.3.3, E.2): data-collection stages and policy-update stages by turns, or overlapping.

    prompts -> samplers -> rewards -> groups -> learner -> weights (version, digest) -> samplers

| role | consumes | produces | waits for | unblocked by |
|---|---|---|---|---|
| sampler | prompts, weights of version k | groups of G responses | acknowledged weights of version k | a publish |
| reward | groups | scored groups | a share of an iteration's groups | the samplers |
| buffer | scored groups | an iteration's batch, by ticket | all groups of the iteration | the producer |
| learner | a batch | weights of version k + 1, metrics | a batch | the buffer |

With max_staleness 0 what is trained on was sampled from exactly the current policy; with s >= 1 an iteration's prompts may
be asked s versions early, while the learner updates. A job goes on from its newest checkpoint, whose metadata says which
groups are consumed; later ones that are on disk, made by the very weights that the job has then, are not sampled again.
"""

from __future__ import annotations

import dataclasses
import logging
import time
from collections import Counter
from collections.abc import Generator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from actors.failures import DataError, FailureBudget, FailuresExhaustedError
from actors.host import call
from actors.jobs import OnlineSettings, TrainingJob
from actors.streams import REVIVAL_DEADLINE_S
from afm_rl.errors import UserError
from afm_rl.generate import request_seed
from afm_rl.recipe import OptimizerSpec
from afm_rl.rewards.problems import invalid_by_cause
from afm_rl.types import GenerationRequest, Group, PolicyUpdate, Prompt, ScoredGroup
from topologies.online.buffer import GroupBuffer
from topologies.online.ledger import Ledger, consumed_below
from topologies.online.producer import Producer, Sources, Spent
from topologies.online.rollouts import Rollout, RolloutFiles
from topologies.online.tickets import Ticket, tickets_of
from topologies.online_options import OnlineTraining
from topologies.stages.context import Context, Policy

log = logging.getLogger(__name__)


def train_online(
    ctx: Context,
    options: OnlineTraining,
    *,
    stage: str,
    start: Policy,
    reward_model: Policy | None,
    policy: Policy,
) -> None:
    """Train `policy` from `start`, which is also the frozen reference, against the reward of `options`.

    Raises UserError for a prompt that does not fit the context.
    """
    job = TrainingJob(
        task=policy.name,
        objective="online",
        optimizer=OptimizerSpec(
            "adamw",
            options.learning_rate,
            warmup_steps=options.warmup_steps,
            total_steps=options.iterations * options.inner_steps,
            end_fraction=options.end_fraction,
        ),
        checkpoint_folder=str(ctx.checkpoints(policy.name)),
        init=str(start.folder),
        frozen={"reference": str(start.folder)},
        checkpoint_every=ctx.topology.checkpoints.iterations,
        seed=ctx.seed,
    )

    def work() -> None:
        loop = _Loop(ctx, options, stage=stage, start=start, policy=policy)
        spec = options.reward.spec(
            tokenizer_folder=str(ctx.tokenizer_folder),
            model_folder=None if reward_model is None else str(reward_model.folder),
            max_tokens=options.max_tokens,
        )
        ctx.rewards.load(spec)

        def from_iteration(first: int) -> None:
            loop.run(first)
            ctx.export(job, policy)
            ctx.log_goodput(job, step=options.iterations)

        ctx.on_learner(job, from_iteration)

    ctx.once(f"train/{policy.name}", work)
    ctx.drop_checkpoints(ctx.checkpoints(policy.name))


@dataclass(frozen=True)
class _Clock:
    """Seconds of one iteration, as the learner's side of the loop sees them."""

    publish_s: float
    wait_s: float
    update_s: float


class _Loop:
    """One job's loop; `run` may be called again whenever the learner was lost."""

    def __init__(self, ctx: Context, options: OnlineTraining, *, stage: str, start: Policy, policy: Policy) -> None:
        self._ctx, self._options, self._stage, self._policy = ctx, options, stage, policy
        self._spec = ctx.spec(start)
        self._prompts = fitting_prompts(ctx, options)
        self._seed = request_seed(ctx.seed, policy.name)
        self._files = RolloutFiles(ctx.run.rollouts / policy.name)
        self._ledger = Ledger(ctx.journal, policy.name)
        self._budget = FailureBudget(f"the rewards of {policy.name}", infrastructure=0, data=options.data_failures)

    def run(self, first: int) -> None:
        """Iterations from `first`, where the learner's newest checkpoint is, to the last.

        Raises RuntimeError where the checkpoint lists other groups as consumed than the iterations before `first` have.
        """
        ctx, options = self._ctx, self._options
        if first and (listed := ctx.learner("resumed_from").get("consumed")) != self._consumed(first):
            raise RuntimeError(f"the checkpoint of iteration {first} lists {listed} as consumed: not what was trained on")
        call(ctx.system.store, "forget", self._policy.name)  # a learner built anew goes back behind what was published
        self._ledger.rewind(first, lambda iteration: [ticket.id for ticket in self._tickets(iteration)])
        buffer = GroupBuffer(capacity=options.buffer_groups, batch=options.prompts)
        producer = Producer(
            self._sources(),
            buffer,
            self._files,
            self._ledger,
            batch=options.prompts,
            max_staleness=options.max_staleness,
        )
        iterations = range(first, options.iterations)
        with (
            ctx.progress.task(self._policy.name, total=options.iterations, done=first) as bar,
            self._ahead(producer, iterations),
        ):
            for iteration in iterations:
                self._iterate(iteration, producer, buffer)
                bar.advance(1)

    def _ahead(self, producer: Producer, iterations: range) -> AbstractContextManager[None]:
        if self._options.max_staleness == 0:
            return nullcontext()
        return producer.running_ahead(iterations, deadline_s=self._patience_s)

    @property
    def _patience_s(self) -> float:
        """The longest silence of a producer whose waits, each with a deadline of its own, are made again after losses."""
        sampler, reward = self._ctx.topology.actors.sampler, self._ctx.topology.actors.reward
        environment = self._options.environment
        turns = environment.max_turns if environment is not None else 1
        sampling_s = turns * (sampler.max_restarts + 1) * (sampler.group_deadline_s + REVIVAL_DEADLINE_S)
        return max(sampling_s, (reward.max_restarts + 1) * (reward.call_deadline_s + REVIVAL_DEADLINE_S))

    def _iterate(self, iteration: int, producer: Producer, buffer: GroupBuffer) -> None:
        began_s, engines = time.perf_counter(), self._ctx.samplers.look()
        self._publish(iteration, producer)
        published_s = time.perf_counter()
        if self._options.max_staleness == 0:
            producer.produce(iteration)
        batch = buffer.reserve(iteration, deadline_s=self._patience_s)
        waited_s = time.perf_counter()
        update = self._update(iteration, batch)
        buffer.commit(iteration)
        self._charge(iteration, update, batch)
        clock = _Clock(published_s - began_s, waited_s - published_s, time.perf_counter() - waited_s)
        use = self._ctx.samplers.log(self._ctx.metrics, engines, task=self._policy.name, step=iteration)
        values = {f"sampler_{name}": value for name, value in use.items()}
        values |= loop_metrics(clock, producer.spent(iteration), overlapping=self._options.max_staleness > 0)
        values |= reward_metrics([rollout.scored for rollout in batch])
        values |= {"policy_version": iteration, "queue_depth": buffer.depth}
        values |= self._ctx.samplers.sync(self._policy.name).metrics()
        self._ctx.metrics.log(stage=self._stage, task=self._policy.name, step=iteration, values={**update.metrics, **values})

    def _publish(self, version: int, producer: Producer) -> None:
        """The learner's weights to the store and every sampler, acknowledged by digest."""
        ctx, name = self._ctx, self._policy.name
        published = ctx.system.learner.submit("publish", name, version)
        digest = call(ctx.system.store, "publish", published)
        self._ledger.published(version, digest)  # before anybody has them: a group may be finished before all do
        ctx.samplers.give(name, version, self._spec, digest=digest, made_by=published)
        producer.version_published(version)

    def _update(self, iteration: int, batch: Sequence[Rollout]) -> PolicyUpdate:
        consumed = self._consumed(iteration + 1)
        scored = [rollout.scored for rollout in batch]
        update = self._ctx.learner("update_policy", iteration, scored, OnlineSettings.of(self._options), consumed)
        self._files.add_update(iteration, update)
        self._ledger.consumed(iteration, [one.group.id for one in scored])
        if (keep := self._options.keep_rollouts) is not None:
            self._files.drop_before(iteration + 1 - max(keep, 2 * self._ctx.topology.checkpoints.iterations + 1))
        return update

    def _charge(self, iteration: int, update: PolicyUpdate, batch: Sequence[Rollout]) -> None:
        """An iteration without a usable response trains nothing; too many in a row end the job, with their causes."""
        if update.metrics["sequences"]:
            self._budget.progressed()
            return
        problems = Counter(problem for rollout in batch for problem in rollout.scored.problems if problem)
        causes = "; ".join(f"{count} x {problem}" for problem, count in problems.most_common(2))
        error = DataError(f"no group has two responses with a reward{': ' if causes else ''}{causes}")
        log.warning("%s, iteration %d: %s", self._policy.name, iteration, error)
        try:
            self._budget.spend("data", f"iteration {iteration}", error)
        except FailuresExhaustedError as exhausted:
            raise UserError(f"{exhausted}; mend the reward and continue with --resume") from exhausted

    def _consumed(self, iteration: int) -> dict[str, Any]:
        return consumed_below(iteration, count=self._options.prompts)

    def _sources(self) -> Sources:
        ctx = self._ctx
        return Sources(
            tickets=self._tickets,
            sample=self._sample,
            score=ctx.rewards.score,
            text=lambda tokens: ctx.tokenizer.decode(tokens.tolist()),
        )

    def _tickets(self, iteration: int) -> list[Ticket]:
        return tickets_of(iteration, self._prompts, count=self._options.prompts, seed=self._seed)

    def _sample(self, tickets: Sequence[Ticket]) -> Generator[Group | ScoredGroup, None, None]:
        """Responses to tickets, or episodes of the environment, which pays for them."""
        ctx, options, name = self._ctx, self._options, self._policy.name
        if options.environment is None:
            yield from ctx.samplers.answers(name, [self._request(ticket) for ticket in tickets])
            return
        yield from options.environment.episodes(
            partial(ctx.samplers.answer, name),
            [dataclasses.replace(ticket.prompt, id=ticket.id) for ticket in tickets],
            host=options.environment.host(),
            tokenizer=ctx.tokenizer,
            responses=options.responses,
            max_tokens=options.max_tokens,
            max_context=ctx.context_tokens,
            temperature=options.temperature,
            seed=self._seed,
        )

    def _request(self, ticket: Ticket) -> GenerationRequest:
        return GenerationRequest(
            id=ticket.id,
            prompt_T=self._ctx.encode_prompt(ticket.prompt),
            num_responses=self._options.responses,
            max_tokens=self._options.max_tokens,
            temperature=self._options.temperature,
            seed=request_seed(self._ctx.seed, self._policy.name, ticket.id),
        )


def fitting_prompts(ctx: Context, options: OnlineTraining) -> list[Prompt]:
    """The prompts that leave room for `max_tokens`. Raises UserError naming the first that does not, unless told to drop."""
    limit = ctx.context_tokens - options.max_tokens
    lengths = {prompt.id: len(ctx.encode_prompt(prompt)) for prompt in ctx.data.prompts}
    fitting = [prompt for prompt in ctx.data.prompts if lengths[prompt.id] <= limit]
    long = [prompt for prompt in ctx.data.prompts if lengths[prompt.id] > limit]
    if long and (options.long_prompts == "error" or not fitting):
        raise UserError(
            f"{len(long)} of {len(ctx.data.prompts)} prompts are longer than {limit} tokens, so that max_tokens "
            f"{options.max_tokens} does not fit behind them (the first: {long[0].id!r}, {lengths[long[0].id]} tokens); "
            "shorten them, lower max_tokens, or set long_prompts: drop"
        )
    if long:
        ctx.progress.say(f"  {len(long)} prompts of more than {limit} tokens are left out (long_prompts: drop)")
    return fitting


def loop_metrics(clock: _Clock, spent: Spent, *, overlapping: bool) -> dict[str, float]:
    """Where an iteration's time went. Overlapping samplers wait for weights and room, others for all that is not theirs."""
    whole_s = clock.publish_s + clock.wait_s + clock.update_s
    return {
        "publish_s": clock.publish_s,
        "learner_wait_s": clock.wait_s,
        "update_s": clock.update_s,
        "generate_s": spent.generate_s,
        "reward_s": spent.reward_s,
        "sampler_wait_s": spent.wait_s if overlapping else max(0.0, whole_s - spent.generate_s),
        "iteration_s": whole_s,
        "tokens_per_s": spent.tokens / max(spent.generate_s, 1e-9),
        "groups_replayed": spent.replayed,
        "groups_discarded": spent.discarded,
    }


def reward_metrics(scored: Sequence[ScoredGroup]) -> dict[str, float]:
    """Mean of each reward component over those that have one (`accuracy`: the verifier's); how many have none, by cause."""
    means = {}
    for name in scored[0].components:
        values = np.concatenate([one.components[name] for one in scored])
        if np.isfinite(values).any():
            means[f"reward_{name}"] = float(np.nanmean(values))
    if "reward_verifier" in means:
        means["accuracy"] = means["reward_verifier"]
    valid = float(np.mean(np.concatenate([one.valid_G for one in scored])))
    return {**means, "valid_fraction": valid, **invalid_by_cause(scored)}
