"""The options of online RL (4.3.3), wherever it runs: the stage `rl` and the committee's member in `itec`.

The names of the algorithm's constants are those of `actors/jobs.py: OnlineSettings`, which the loop makes of them.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from afm_rl.algorithms import ALGORITHMS, BASELINES, KL_FORMS, check_choice
from afm_rl.errors import UserError
from topologies.environment_options import EnvironmentOptions
from topologies.reward_options import RewardWeights
from topologies.strict import Count, CountOrZero, Fraction, Positive, PositiveOrZero, Strict, one_of, problem


class OnlineAlgorithm(Strict):
    """`algorithm` is the paper's mdloo or one to compare it with: ppo, rloo, grpo, reinforce, online_dpo.

    `kl` is the form of mdloo's KL to theta_k: `sampled`, from the sampled tokens alone, or `full`, over the vocabulary
    (less variance, for one more copy of the weights and of every later inner step's forward pass).
    """

    algorithm: Annotated[str, one_of("algorithm", tuple(ALGORITHMS))] = "mdloo"
    inner_steps: Count = 2  # mdloo: with one, the KL to theta_k has gradient 0 and gamma does nothing
    kl: Annotated[str, one_of("form of the KL", KL_FORMS)] = "sampled"
    beta: PositiveOrZero = 0.05  # per nat of KL to the reference, inside R (grpo, online_dpo: in the loss)
    gamma: PositiveOrZero = 1.0  # mdloo: reward per nat of sequence KL to theta_k
    clip: Fraction = 0.2  # ppo, rloo, grpo: how far the ratio may go from 1
    baseline: Annotated[str, one_of("baseline", ("own", *BASELINES))] = "own"  # own: the algorithm's
    baseline_decay: Fraction = 0.9  # of the running average, an iteration
    max_kl: Positive | None = None  # nats a sequence, measured; beyond it the inner steps end early
    staleness_cap: Annotated[float, Field(ge=1)] = 2.0  # of pi_k / pi_mu, the weight of a response from older weights
    temperature: Positive = 1.0
    microbatch: Count = 64  # responses that share a forward pass; bounds the learner's memory

    @model_validator(mode="after")
    def _check_algorithm(self) -> OnlineAlgorithm:
        if self.algorithm == "mdloo" and self.inner_steps < 2:
            why = "mdloo takes at least 2 inner steps: with one, the KL to theta_k has gradient 0 and gamma does nothing"
            raise problem(why, at=("inner_steps",))
        try:
            check_choice(self.algorithm, kl=self.kl, baseline=self.baseline, beta=self.beta)
        except UserError as error:
            raise problem(str(error), at=("algorithm",)) from error
        return self


class OnlineTraining(OnlineAlgorithm):
    """`prompts` x `responses` an iteration, then up to `inner_steps` updates on them.

    `max_staleness` s lets samplers run up to s versions ahead of the update; `buffer` bounds the groups that are asked for
    and not trained on (null: what the staleness can use).
    """

    iterations: Count = 20
    prompts: Count = 16
    responses: Annotated[int, Field(ge=2)] = 8  # the leave-one-out baseline needs another one
    max_staleness: CountOrZero = 0  # versions; 0: sampling and updating take turns
    buffer: Count | None = None  # groups
    learning_rate: Positive = 2e-5
    end_fraction: Fraction = 1.0  # of the learning rate at the last step, by a cosine; 1: constant
    warmup_steps: CountOrZero = 10
    max_tokens: Count = 32
    long_prompts: Literal["error", "drop"] = "error"  # those that leave no room for max_tokens
    keep_rollouts: Count | None = None  # iterations whose rollouts stay on disk; null: all
    environment: EnvironmentOptions | None = None  # several turns; null: a response is one turn
    reward: RewardWeights = RewardWeights()

    @model_validator(mode="after")
    def _check_buffer(self) -> OnlineTraining:
        if self.buffer is not None and self.buffer < self.prompts:
            message = f"{self.buffer} groups cannot hold an iteration's {self.prompts}: no update could ever begin"
            raise problem(message, at=("buffer",))
        if self.reward.environment and self.environment is None:
            raise problem("pays what an environment says, and there is none; add one", at=("reward", "environment"))
        return self

    @property
    def buffer_groups(self) -> int:
        """Groups asked for and not trained on, at most."""
        return self.buffer if self.buffer is not None else (self.max_staleness + 1) * self.prompts
