"""The options of online RL (4.3.3), wherever it runs: the stage `rl` and the committee's member in `itec`."""

from __future__ import annotations

from typing import Annotated, Literal

from afm_rl.objectives.algorithms import check_choice
from pydantic import Field, model_validator

from afm_rl.errors import UserError
from topologies.strict import Count, CountOrZero, Fraction, Positive, PositiveOrZero, Strict, one_of, problem

Algorithm = Annotated[str, one_of("algorithm", ("mdloo", "ppo", "rloo", "grpo", "reinforce", "online_dpo"))]


class RewardWeights(Strict):
    """R = model * reward model + verifier * checks passed; the verifier scores 0 where a prompt has no checks."""

    model: PositiveOrZero = 1.0
    verifier: PositiveOrZero = 0.0


class OnlineTraining(Strict):
    """`prompts` x `responses` an iteration, then `inner_steps` updates on them by the algorithm.

    `max_staleness` s lets samplers run up to s versions ahead of the update; `buffer` bounds the groups that are asked for
    and not trained on (default: what the staleness can use).
    """

    algorithm: Algorithm = "mdloo"  # paper 4.3.3; the others are there to compare with
    iterations: Count = 20
    prompts: Count = 16
    responses: Annotated[int, Field(ge=2)] = 8  # the leave-one-out baseline needs another one
    inner_steps: Count = 2  # MDLOO: at least 2; with one, the KL to theta_k has gradient 0 and gamma does nothing
    kl: Literal["sampled", "full"] = "sampled"  # MDLOO: which exact form of the KL to theta_k; full has less variance
    beta: PositiveOrZero = 0.05  # per nat of KL to the reference, inside R (online_dpo, grpo: in the loss)
    gamma: PositiveOrZero = 1.0  # MDLOO: reward per nat of sequence KL to theta_k
    clip: Positive = 0.2  # ppo, rloo, grpo: bound of the ratio
    baseline: str = "own"  # what is subtracted from rewards: the algorithm's own
    baseline_decay: Fraction = 0.9  # of the running average, an iteration
    max_kl: Positive | None = None  # nats a sequence to theta_k, beyond which the inner steps end early
    max_staleness: CountOrZero = 0  # versions; 0: sampling and updating take turns
    staleness_cap: Positive = 2.0  # of min(pi_k / pi_mu, cap), by which a stale response counts
    buffer: Count | None = None  # groups
    learning_rate: Positive = 2e-5
    end_fraction: Fraction = 1.0  # of the learning rate at the last step, by a cosine; 1: constant
    warmup_steps: CountOrZero = 10
    microbatch: Count = 64  # responses that share a forward pass; bounds the learner's memory
    temperature: Positive = 1.0
    max_tokens: Count = 32
    long_prompts: Literal["error", "drop"] = "error"  # those that leave no room for max_tokens
    keep_rollouts: Count | None = None  # iterations whose rollouts stay on disk; null: all
    reward: RewardWeights = RewardWeights()

    @model_validator(mode="after")
    def _check(self) -> OnlineTraining:
        if self.algorithm == "mdloo" and self.inner_steps < 2:
            raise problem("mdloo needs 2 or more: with one, the KL to theta_k has gradient 0", at=("inner_steps",))
        if self.buffer is not None and self.buffer < self.prompts:
            message = f"{self.buffer} groups cannot hold an iteration's {self.prompts}: no update could ever begin"
            raise problem(message, at=("buffer",))
        try:
            check_choice(self.algorithm, kl=self.kl, baseline=self.baseline, beta=self.beta)
        except UserError as error:
            raise problem(str(error)) from error
        return self

    @property
    def buffer_groups(self) -> int:
        """Groups asked for and not trained on, at most."""
        return self.buffer if self.buffer is not None else (self.max_staleness + 1) * self.prompts
