"""afm-rl's side of `benchmarks/online_rl.py`: one process that trains a fresh policy by its own feedback, on request.

    python benchmarks/online_rl_worker.py '{"model": FOLDER, "dtype": "bfloat16", "settings": {"algorithm": "rloo"}, ...}'

Requests are those of `peers/workload.py`. A step goes through the classes that a topology launches as actors, in one
process: the learner publishes its weights, the sampler verifies and loads them and answers, the learner updates. It lacks
what a topology adds: messages between processes and the journal.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from peers.workload import Workload, make_prompts, serve_kinds, token_share

from actors.jobs import LearnerSetup, OnlineSettings, TrainingJob
from actors.learner import Learner
from actors.sampler import PolicySpec, Sampler
from afm_rl.compute import Compute
from afm_rl.generation.options import EngineOptions
from afm_rl.huggingface import load_params
from afm_rl.recipe import OptimizerSpec
from afm_rl.types import GenerationRequest, Group, Refused, SamplingOptions, ScoredGroup

#: Enough for every workload: nothing has to give up its pages.
KV_CACHE_BYTES = 2**28
#: What a step's seconds are split into.
PARTS = ("weights", "generate", "score", "train")


class Clock:
    """Seconds of the parts of each step."""

    def __init__(self) -> None:
        self.seconds: dict[str, list[float]] = {part: [] for part in PARTS}
        self._before = 0.0

    def start(self) -> None:
        """A step begins."""
        self._before = time.perf_counter()

    def end(self, part: str) -> None:
        """A part of it ends, and the next one begins."""
        now = time.perf_counter()
        self.seconds[part].append(now - self._before)
        self._before = now

    def steps(self) -> list[float]:
        """Seconds of each whole step."""
        return [sum(parts) for parts in zip(*self.seconds.values(), strict=True)]


class Loop:
    """One policy, its sampler and its learner."""

    def __init__(self, job: Mapping[str, Any]) -> None:
        self.job = job
        self.config, _ = load_params(job["model"])
        batch = job["max_batch"]
        options = EngineOptions(max_batch=batch, compute_dtype=job["dtype"], kv_cache_bytes=KV_CACHE_BYTES)
        self.sampler = Sampler(engine=options)
        self.learner = Learner(LearnerSetup(compute=Compute(dtype=job["dtype"])))

    def train(self, run: Workload) -> dict[str, Any]:
        """A training of a fresh policy; the seconds of every step and what they went to, and its mean reward."""
        clock, rewards, metrics = Clock(), [], {}
        ids_PS = make_prompts({**run, "prompts": run["prompts"] * run["steps"]}, self.config.vocab_size)
        with tempfile.TemporaryDirectory() as folder:
            self.learner.begin(self._training(run, folder))
            for step in range(run["steps"]):
                clock.start()
                scored = self._collect(run, step, ids_PS[step * run["prompts"] :][: run["prompts"]], clock)
                metrics = self._update(run, step, scored)
                clock.end("train")
                rewards.append(float(np.mean([group.reward_G for group in scored])))
                if run.get("until") is not None and rewards[-1] >= run["until"]:
                    break
        return {"seconds": clock.steps(), "rewards": rewards, **clock.seconds, "metrics": dict(metrics)}

    def _training(self, run: Workload, folder: str) -> TrainingJob:
        return TrainingJob(
            task="policy",
            objective="online",
            optimizer=OptimizerSpec("adamw", run["rate"], clip_norm=run["clip"]),
            checkpoint_folder=os.path.join(folder, "checkpoints"),
            init=self.job["model"],
            frozen={"reference": self.job["model"]},
            checkpoint_every=run["steps"] + 1,
            seed=run["seed"],
        )

    def _collect(self, run: Workload, step: int, prompts_PS: np.ndarray, clock: Clock) -> list[ScoredGroup]:
        """The data-collection stage of a step."""
        weights = self.learner.publish("policy", step)
        assert weights is not None
        self.sampler.load(weights, PolicySpec(self.config, ()))
        clock.end("weights")
        answers = self.sampler.answer("policy", requests_of(run, step, prompts_PS))
        groups = [None] * run["prompts"]
        for answered in answers:
            assert not isinstance(answered.result, Refused), answered.result
            groups[answered.index] = answered.result  # type: ignore[call-overload]
        clock.end("generate")
        scored = [score(group) for group in groups]  # type: ignore[arg-type]
        clock.end("score")
        return scored

    def _update(self, run: Workload, step: int, scored: Sequence[ScoredGroup]) -> Mapping[str, float]:
        sequences = run["prompts"] * run["responses"]
        settings = OnlineSettings(temperature=1.0, beta=0.0, microbatch=sequences, **self.job["settings"])
        return self.learner.update_policy(step, scored, settings).metrics


def requests_of(run: Workload, step: int, prompts_PS: np.ndarray) -> list[GenerationRequest]:
    """One request a prompt; each draws from a stream of its own."""
    options = SamplingOptions(ignore_stop=True)
    return [
        GenerationRequest(
            id=f"{step}/{i}",
            prompt_T=prompt_S,
            num_responses=run["responses"],
            max_tokens=run["new_tokens"],
            seed=hash((run["seed"], step, i)) % 2**31,
            options=options,
        )
        for i, prompt_S in enumerate(prompts_PS)
    ]


def score(group: Group) -> ScoredGroup:
    """The rewards of a group."""
    reward_G = np.array([token_share(response) for response in group.responses], np.float32)
    return ScoredGroup(group, reward_G, np.ones(len(reward_G), bool))


def main() -> None:
    """Answer requests to train."""
    loop = Loop(json.loads(sys.argv[1]))
    serve_kinds(train=loop.train)


if __name__ == "__main__":
    main()
