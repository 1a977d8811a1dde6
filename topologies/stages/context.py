"""What a stage works with: the topology, the run folder, the actors, the data, and the few verbs every stage shares.

The verbs are `once` (do it unless the journal says it is done), `train` (a job on the learner, resumed from its newest
checkpoint), `deploy` (weights to generators, acknowledged), `sample` (responses of a policy, by the samplers). Everything a
verb computes is a function of the topology and its seed, so that a resumed run ends with the same numbers: to the bit with
`deterministic: true`; without it, which responses share a batch shows in the last digits.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from actors.group import GroupHandle, GroupRestartedError
from actors.host import call
from actors.jobs import TrainingJob
from actors.metrics import GOODPUT_STAGE, Metrics
from actors.pool import Pool
from actors.sampler import PolicySpec
from actors.weights import publish_folder
from afm_rl.data.dataset import Dataset
from afm_rl.errors import UserError
from afm_rl.generate import request_seed
from afm_rl.huggingface import load_config
from afm_rl.packing import Batch
from afm_rl.tokenizer import Tokenizer
from afm_rl.types import GenerationRequest, Group, Prompt
from topologies.control import Control, Scalable
from topologies.environment_options import EnvironmentOptions
from topologies.generators import Generators
from topologies.journal import Journal
from topologies.progress import ProgressView
from topologies.rewards import Rewards
from topologies.run_folder import RunFolder
from topologies.schema import Topology
from topologies.system import System

log = logging.getLogger(__name__)

T = TypeVar("T")

#: Optimizer steps handed to the learner in one call: few enough that a progress bar moves, enough to hide the call.
STEPS_PER_CALL = 10
#: Longest measured response where the topology has no evaluate stage.
DEFAULT_MAX_TOKENS = 32


@dataclass(frozen=True)
class Policy:
    """A trained policy (or reward model) of the run: its name and folder, which never changes once journalled."""

    name: str
    folder: Path
    version: int = 0


@dataclass
class Context:
    """Handed to every stage."""

    topology: Topology
    run: RunFolder
    journal: Journal
    system: System
    metrics: Metrics
    progress: ProgressView
    data: Dataset
    _tokenizer: Tokenizer | None = field(default=None, init=False)
    _restarts_s: float = field(default=0.0, init=False)

    def __post_init__(self) -> None:
        actors, system = self.topology.actors, self.system
        self.samplers = Generators(system.samplers, system.store, actors.sampler)
        self.committee = Generators(system.committee, system.store, actors.committee)
        self.rewards = Rewards(system.rewards, actors.reward)
        limit_s, max_losses = actors.quantizer.call_deadline_s, actors.quantizer.max_restarts
        self.quantizers = Pool("quantizer", system.quantizers, deadline_s=limit_s, max_losses=max_losses)
        self.annotator = Pool("annotator", [system.annotator])
        users: dict[str, Scalable] = {
            "sampler": self.samplers.roster,
            "committee": self.committee.roster,
            "reward": self.rewards.pool,
        }
        self.control = Control(self.run, system, users)
        self.samplers.between = self.committee.between = self.control.poll

    @property
    def seed(self) -> int:
        return self.topology.seed

    @property
    def tokenizer_folder(self) -> Path:
        """The run's own tokenizer, or that of the Hugging Face folder the model comes from."""
        return Path(self.topology.model.huggingface) if self.topology.model.huggingface else self.run.tokenizer

    @property
    def tokenizer(self) -> Tokenizer:
        if self._tokenizer is None:
            self._tokenizer = Tokenizer.load(self.tokenizer_folder)
        return self._tokenizer

    def once(self, key: str, fn: Callable[[], Any]) -> Any:
        """fn() the first time, its journalled result ever after."""
        return self.journal.once(key, fn)

    def policy(self, name: str) -> Policy:
        """The policy of that name, whether it exists yet or not."""
        return Policy(name, self.run.policies / name / "0")

    def has(self, stage: str) -> bool:
        """Whether the topology lists this stage."""
        return stage in self.topology.stage_names

    @property
    def base(self) -> Policy:
        """The pre-trained model: the run's own, or the Hugging Face folder of the topology."""
        folder = self.topology.model.huggingface
        return Policy("base", Path(folder)) if folder else self.policy("base")

    @property
    def small_base(self) -> Policy:
        """The pruned small model where the topology makes one, else the base."""
        return self.policy("small-base") if self.has("prune") else self.base

    @property
    def device_policy(self) -> Policy:
        """What is compressed and served: the distilled model, else the policy of online RL, else the SFT policy."""
        return self.policy("distilled" if self.has("distill_committee") else "rl" if self.has("rl") else "sft")

    @property
    def corpora(self) -> Path:
        """Tokenised corpora, one pair of files per domain and side."""
        return self.run.path / "corpora"

    def present(self, mixture: Mapping[str, float]) -> dict[str, float]:
        """The mixture over the domains that have text. Raises UserError when none of its domains has any."""
        kept = {name: weight for name, weight in mixture.items() if weight > 0 and self.data.documents.get(name)}
        if not kept:
            there = ", ".join(name for name, texts in self.data.documents.items() if texts) or "none"
            raise UserError(f"no domain of the mixture {dict(mixture)} has documents; domains with documents: {there}")
        return kept

    @property
    def environment(self) -> EnvironmentOptions | None:
        """What policies of this run act in, where its online stage says so: they are measured in it too."""
        return self.topology.stage("rl").environment if self.has("rl") else None

    @property
    def context_tokens(self) -> int:
        """Positions that a sampler's engine has for a prompt and its response."""
        return self.topology.actors.sampler.engine.max_context or self.topology.model.config().max_positions

    @property
    def max_tokens(self) -> int:
        """Length limit of a measured response."""
        return self.topology.stage("evaluate").max_tokens if self.has("evaluate") else DEFAULT_MAX_TOKENS

    def checkpoints(self, task: str) -> Path:
        return self.run.checkpoints / task

    def train(self, job: TrainingJob, *, stage: str, policy: Policy, steps: int, batches: Callable[[int], Batch]) -> None:
        """Run a job to its end and export it as `policy`.

        `batches(step)` must be a pure function of the step: a resumed job asks again for the steps after its checkpoint.
        """

        def from_step(start: int) -> None:
            with self.progress.task(job.task, total=steps, done=start) as bar:
                for first in range(start, steps, STEPS_PER_CALL):
                    chunk = range(first, min(first + STEPS_PER_CALL, steps))
                    rows = self.learner("train", [batches(step) for step in chunk])
                    for step, row in zip(chunk, rows, strict=True):
                        self.metrics.log(stage=stage, task=job.task, step=step, values=row)
                    bar.advance(len(chunk))
            self.export(job, policy)
            self.log_goodput(job, step=steps)

        self.once(f"train/{job.task}", lambda: self.on_learner(job, from_step))
        self.drop_checkpoints(job.checkpoint_folder)

    def drop_checkpoints(self, folder: str | Path) -> None:
        """A job's exported policy is journalled: its checkpoints have served, unless some are to be kept for good."""
        if self.topology.checkpoints.keep_every is None:
            shutil.rmtree(folder, ignore_errors=True)

    def on_learner(self, job: TrainingJob, work: Callable[[int], T]) -> T:
        """`work(step)` with the job begun, `step` being where its newest checkpoint is; again whenever the learner was lost.

        A learner that loses a process is built anew without its state. Its budget of restarts is whole again once a later
        checkpoint was reached.
        """
        reached = 0
        while True:
            try:
                start = self.learner("begin", job)
                if start > reached:
                    self._learner_progressed()
                reached = start
                result = work(start)
                self._learner_progressed()
                return result
            except GroupRestartedError as error:
                log.warning("%s", error)
                self.progress.say(f"  {error}")

    def learner(self, method: str, *args: Any) -> Any:
        """One call of the learner, waited for as long as the topology allows."""
        self.control.poll()
        return call(self.system.learner, method, *args, deadline_s=self.topology.actors.learner.call_deadline_s)

    def _learner_progressed(self) -> None:
        if isinstance(self.system.learner, GroupHandle):
            self.system.learner.progressed()

    def log_goodput(self, job: TrainingJob, *, step: int) -> None:
        """Where the job's time went, as metrics of their own (`afm_rl/goodput.py`)."""
        learner, values = self.system.learner, self.learner("goodput")
        restarts_s = learner.restart_seconds if isinstance(learner, GroupHandle) else 0.0
        values["restart_s"] = restarts_s - self._restarts_s
        self._restarts_s = restarts_s
        values["goodput"] = values["step_s"] / max(sum(s for kind, s in values.items() if kind.endswith("_s")), 1e-9)
        self.metrics.log(stage=GOODPUT_STAGE, task=job.task, step=step, values=values)

    def export(self, job: TrainingJob, policy: Policy) -> None:
        """Write what the learner trained as `policy`'s folder."""
        tokenizer = str(self.tokenizer_folder) if job.part == "policy" else None
        self.learner("export", str(policy.folder), tokenizer)

    def spec(self, policy: Policy) -> PolicySpec:
        """Shape and end tokens of a policy folder."""
        return PolicySpec(load_config(policy.folder), self.stop_ids, str(self.tokenizer_folder))

    @property
    def stop_ids(self) -> tuple[int, ...]:
        return self.tokenizer.stop_ids

    def deploy(self, policy: Policy, to: Generators, *, beside: Sequence[Policy] = ()) -> None:
        """Bring a policy folder's weights to generators, through the store, acknowledged by digest."""
        digest = publish_folder(self.system.store, policy.name, policy.version, policy.folder)
        if not to.hold(policy.name, digest):
            names = [other.name for other in beside]
            to.give(policy.name, policy.version, self.spec(policy), digest=digest, beside=names)

    def requests(
        self,
        prompts: Sequence[Prompt],
        *,
        purpose: object,
        responses: int = 1,
        temperature: float,
        max_tokens: int,
    ) -> list[GenerationRequest]:
        """One request per prompt; its random stream depends on the run's seed, `purpose` and the prompt's id alone."""
        return [
            GenerationRequest(
                id=prompt.id,
                prompt_T=self.encode_prompt(prompt),
                num_responses=responses,
                max_tokens=max_tokens,
                temperature=temperature,
                seed=request_seed(self.seed, purpose, prompt.id),
            )
            for prompt in prompts
        ]

    def encode_prompt(self, prompt: Prompt) -> Any:
        import numpy as np

        return np.asarray(self.tokenizer.encode_chat(prompt.messages), np.int32)

    def sample(self, policy: Policy, requests: Sequence[GenerationRequest]) -> list[Group]:
        """Answers of one policy, by the samplers; order kept."""
        self.deploy(policy, self.samplers)
        return self.samplers.answer(policy.name, requests)

    @contextmanager
    def engines_logged(self, stage: str) -> Iterator[None]:
        """Log what every engine does during a stage."""
        roles = (self.samplers, self.committee)
        before = [role.look() for role in roles]
        yield
        for role, since in zip(roles, before, strict=True):
            role.log(self.metrics, since, task=stage, step=0)

    def texts(self, group: Group) -> list[str]:
        """The decoded responses of a group."""
        return [self.tokenizer.decode(response.tolist()) for response in group.responses]
