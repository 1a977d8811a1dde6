"""The algorithm of an online stage as a topology gives it: which one, and its constants (4.3.3, E.2).

The names are those of `actors/jobs.py: OnlineSettings`, which a stage makes of them.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, model_validator

from afm_rl.algorithms import ALGORITHMS, BASELINES, KL_FORMS, check_choice
from afm_rl.errors import UserError
from topologies.strict import Count, Fraction, Positive, PositiveOrZero, Strict, one_of, problem


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
