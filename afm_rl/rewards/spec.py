"""What a reward is made of, as plain data: the components' weights, functions in worker processes, length and truncation."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from afm_rl.rewards.limits import PerToken, SoftOverlong, Truncation
from afm_rl.workers.pool import Task

#: Components that are computed elsewhere than in a worker: what they need is said in `RewardSpec`.
BUILT_IN = ("model", "verifier", "environment", "length")


@dataclass(frozen=True)
class FunctionSpec:
    """A component that worker processes compute: `limit_s` seconds a response (a batch function: times its responses)."""

    name: str
    task: Task
    limit_s: float = 5.0
    workers: int = 1


@dataclass(frozen=True)
class RewardSpec:
    """Where the reward model and the tokenizer are, how much each component counts, and the rules beside the sum.

    `weights` names components: "model", "verifier" (the prompt's declarative checks), "environment" (what it paid),
    "length", and those of `functions`. All of them may take `budget_s` seconds for the responses of a call together.
    """

    tokenizer_folder: str
    model_folder: str | None
    weights: Mapping[str, float]
    functions: tuple[FunctionSpec, ...] = ()
    length: SoftOverlong | PerToken | None = None
    truncation: Truncation = field(default_factory=Truncation)
    budget_s: float = 240.0

    def __post_init__(self) -> None:
        """Raises ValueError for components that do not exist, or that cannot be computed."""
        known = [*BUILT_IN, *(function.name for function in self.functions)]
        if unknown := sorted(set(self.weights) - set(known)):
            raise ValueError(f"unknown reward component {unknown[0]!r}; known: {', '.join(known)}")
        if twice := sorted(name for name in known if known.count(name) > 1):
            raise ValueError(f"two reward components are called {twice[0]!r}; give one another name")
        if self.weights.get("model") and self.model_folder is None:
            raise ValueError("the reward gives the model a weight, but there is no reward model yet")
        if self.weights.get("length") and self.length is None:
            raise ValueError("the reward gives the length a weight, but does not say how it is punished")
