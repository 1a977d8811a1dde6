"""Every message and record of the system, as frozen dataclasses (floor 1: imported by everyone, imports nothing of ours).

Shapes: P prompts, G responses per prompt, T tokens. Arrays are NumPy, so that a message crosses a Ray border without a copy.
Grades and preference levels follow appendix E.1 of the paper.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

#: Preference levels of E.1, by index: how much better the chosen response is.
LEVELS = ("negligibly", "slightly", "better", "significantly")
#: The four single-sided gradings of E.1, in the order of the reward model's heads.
GRADINGS = ("instruction_following", "verbosity", "truthfulness", "harmlessness")

Role = Literal["system", "user", "assistant"]


@dataclass(frozen=True)
class Message:
    """One turn of a conversation."""

    role: Role
    content: str


@dataclass(frozen=True)
class Prompt:
    """What a policy answers. `checks` are declarative ground truth (see `afm_rl/data/checks.py`); may be empty."""

    id: str
    messages: tuple[Message, ...]
    kind: str = "general"
    checks: tuple[Mapping[str, Any], ...] = ()


@dataclass(frozen=True)
class Demonstration:
    """A prompt and the response to imitate (4.1)."""

    prompt: Prompt
    response: str


@dataclass(frozen=True)
class Grades:
    """Single-sided grades of one response (E.1), each a class 0..2.

    instruction_following, truthfulness, harmlessness: 0 major issue, 1 minor issue, 2 no issue.
    verbosity: 0 too verbose, 1 too short, 2 just right.
    """

    instruction_following: int
    verbosity: int
    truthfulness: int
    harmlessness: int


@dataclass(frozen=True)
class Preference:
    """One annotated pair (E.1): `level` indexes LEVELS; `source` says who judged (simulated, human, judge, a file)."""

    prompt: Prompt
    chosen: str
    rejected: str
    level: int
    chosen_grades: Grades
    rejected_grades: Grades
    annotator: str
    source: str


@dataclass(frozen=True)
class Pair:
    """Two committee responses to one prompt, waiting for an annotator; the policy names never reach one."""

    prompt: Prompt
    response_a: str
    response_b: str
    policy_a: str
    policy_b: str


@dataclass(frozen=True)
class SamplingOptions:
    """How tokens are chosen beside the temperature; the defaults change nothing, and training takes no others (9).

    In this order: `logit_bias` is added, `repetition_penalty` divides positive and multiplies negative logits of tokens
    that the prompt or the response holds, stop tokens are impossible before `min_tokens`, the temperature divides, `top_k`
    (0: all), `top_p` and `min_p` cut. `stop` strings and `stop_ids` end a response beside the policy's own end tokens.
    `logprobs`: the n best alternatives of each response token; `prompt_logprobs`: likewise of the prompt (0: only the own).
    """

    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    min_tokens: int = 0
    stop: tuple[str, ...] = ()
    stop_ids: tuple[int, ...] = ()
    ignore_stop: bool = False  # go on past the policy's end tokens, up to max_tokens
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    logprobs: int | None = None
    prompt_logprobs: int | None = None

    @property
    def plain(self) -> bool:
        """Whether the temperature alone decides each token, and no alternatives are asked for."""
        cuts = self.top_k == 0 and self.top_p == 1.0 and self.min_p == 0.0 and self.min_tokens == 0
        return cuts and self.repetition_penalty == 1.0 and not self.logit_bias and not self.logprobs


#: Temperature only.
PLAIN = SamplingOptions()


@dataclass(frozen=True)
class GenerationRequest:
    """Ask a sampler for `num_responses` responses to one tokenised prompt.

    temperature 0 is greedy. Response j draws from the random stream (seed, j), whatever shares its batch. `adapter` names
    a LoRA adapter that the sampler holds; "" is the policy itself.
    max_tokens 0 asks for nothing but the prompt's log-probabilities.
    """

    id: str
    prompt_T: np.ndarray  # [T] int32
    num_responses: int = 1
    max_tokens: int = 64
    temperature: float = 1.0
    seed: int = 0
    options: SamplingOptions = PLAIN
    adapter: str = ""


@dataclass(frozen=True)
class TopLogprobs:
    """The n best alternatives at each of T positions, best first, under the same distribution as the log-probabilities."""

    ids_TN: np.ndarray  # [T, n] int32
    logps_TN: np.ndarray  # [T, n] float32


@dataclass(frozen=True)
class Group:
    """The G responses of one request, with what the sampler knew: its own log-probabilities and its policy's version.

    A response sampled while weights were updated in flight has tokens of several versions: `versions` then says which made
    each; `version` is the one that the group was begun with. In a conversation of several turns the response holds what the
    environment said too: `actions` is then True on the tokens that the policy chose, and only those are trained on.
    """

    id: str
    prompt_T: np.ndarray  # [T] int32
    responses: tuple[np.ndarray, ...]  # G x [T_g] int32, the end-of-sequence token included when it was sampled
    logps: tuple[np.ndarray, ...]  # G x [T_g] float32, log p of each token at the sampling temperature
    finished: tuple[bool, ...]  # G; False: cut at max_tokens
    policy: str
    version: int
    versions: tuple[np.ndarray, ...] = ()  # G x [T_g] int32 where any token is of another version, else empty
    actions: tuple[np.ndarray, ...] = ()  # G x [T_g] bool where the environment wrote any token, else empty
    top: tuple[TopLogprobs, ...] = ()  # G, where options.logprobs asked for them
    prompt_logp_T: np.ndarray | None = None  # [T] float32, the first NaN, where options.prompt_logprobs asked for it
    prompt_top: TopLogprobs | None = None


@dataclass(frozen=True)
class Refused:
    """A request that can never run (an empty prompt, one longer than the context, ...), and why."""

    id: str
    reason: str


@dataclass(frozen=True)
class Answered:
    """What became of request `index` of a batch that a sampler was handed; answers come as they are finished."""

    index: int
    result: Group | Refused


@dataclass(frozen=True)
class ScoredGroup:
    """A group with its rewards; `valid_G` False marks a response whose reward could not be computed, `problems` says why."""

    group: Group
    reward_G: np.ndarray  # [G] float32
    valid_G: np.ndarray  # [G] bool
    components: Mapping[str, np.ndarray] = field(default_factory=dict)  # name -> [G] float32
    problems: tuple[str, ...] = ()  # G, "" where a response is valid; empty where all are


@dataclass(frozen=True)
class TrainedGroup:
    """What the learner found of a group that it updated on: per response, sums over its own tokens in nats."""

    id: str
    advantage_G: np.ndarray  # [G] float32, 0 where a response did not count
    counted_G: np.ndarray  # [G] bool, part of the update
    logp_G: np.ndarray  # [G] float32, log pi_theta_k
    ref_logp_G: np.ndarray  # [G] float32, log pi_ref
    mismatch_G: np.ndarray  # [G] float32, largest |log p(sampler) - log p(learner)| of a token


@dataclass(frozen=True)
class PolicyUpdate:
    """The learner's report of one policy-update stage."""

    metrics: Mapping[str, float]
    groups: tuple[TrainedGroup, ...]


@dataclass(frozen=True)
class Weights:
    """A parameter tree in flight: one flat buffer per dtype, how to cut it up again, and a digest of the bytes.

    bfloat16 travels as uint16. `layout` rows: (path, dtype, shape, offset in elements).
    """

    policy: str
    version: int
    buffers: Mapping[str, np.ndarray]
    layout: tuple[tuple[str, str, tuple[int, ...], int], ...]
    digest: str
