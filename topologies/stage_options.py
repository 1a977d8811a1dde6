"""The options of every stage, with their defaults, and what a stage needs from earlier ones and makes for later ones.

Numbers that do not depend on scale are the paper's, with their section; learning rates, too, are the paper's for its
3B model. Steps, batches and lengths are ours: what a small model trains with in minutes on two cores. The paper's own
are in `afm_rl/schedules.py`.
"""

# ruff: noqa: RUF012 (pydantic copies a mutable default for every instance)

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Discriminator, Field, model_validator

from pretrain.tokenizer_training import MIN_VOCAB_SIZE
from topologies.online_options import OnlineTraining
from topologies.reward_options import RewardWeights
from topologies.strict import Count, CountOrZero, Fraction, Positive, PositiveOrZero, Strict, nearest, one_of, problem

PhaseName = Annotated[str, one_of("pre-training stage", ("core", "continued", "context_lengthening"))]
Member = Annotated[str, one_of("committee member", ("sft", "rs", "dpo", "ipo", "mdloo"))]
Domain = Annotated[str, one_of("domain", ("web", "code", "math", "long_context"))]


class StageOptions(Strict):
    """What every stage has: a name, what it needs, what it makes, and which parts of `data` it reads."""

    internal = ("name",)
    needs: ClassVar[tuple[str, ...]] = ()
    makes: ClassVar[tuple[str, ...]] = ()
    reads: ClassVar[tuple[str, ...]] = ()


class Training(Strict):
    """One training run over responses (4.2). `sequence_length` bounds prompt and response together, in tokens."""

    steps: Count = 200
    batch: Count = 32
    sequence_length: Count = 128
    learning_rate: Positive = 2e-5  # paper 4.2, on-device
    warmup_steps: CountOrZero = 10


class TokenizerStage(StageOptions):
    """SentencePiece BPE (3.1.6). `vocab_size` is the model's, and may be left out."""

    makes = ("tokenizer",)
    reads = ("documents",)
    name: Literal["tokenizer"] = "tokenizer"
    vocab_size: Annotated[int, Field(ge=MIN_VOCAB_SIZE)] | None = None


class Phase(Strict):
    """One stage of the pre-training recipe (3.2); `rope_base` "rescaled" follows the context length (3.2.3)."""

    steps: Count = 400
    batch: Count = 16
    sequence_length: Annotated[int, Field(ge=8)] = 128
    peak_lr: Positive = 0.01  # paper 3.2.1
    warmup_steps: CountOrZero = 20
    end_fraction: Fraction = 0.005  # paper 3.2.1
    weight_decay: PositiveOrZero = 3.16e-4  # paper 3.2.1
    z_loss: PositiveOrZero = 1e-6  # axlearn
    mixture: dict[Domain, PositiveOrZero] = {"web": 0.35, "code": 0.5, "math": 0.15}
    rope_base: Positive | Literal["model", "rescaled"] = "model"

    @model_validator(mode="after")
    def _check(self) -> Phase:
        if not any(self.mixture.values()):
            raise problem("every weight is 0, so there is nothing to train on", at=("mixture",))
        if self.warmup_steps > self.steps:
            raise problem(f"{self.warmup_steps} warm-up steps do not fit in {self.steps} steps", at=("warmup_steps",))
        return self


class ContinuedPhase(Phase):
    """Continued pre-training (3.2.2): math up, bulk down."""

    steps: Count = 150
    batch: Count = 8
    sequence_length: Annotated[int, Field(ge=8)] = 256
    peak_lr: Positive = 3e-4  # paper 3.2.2
    warmup_steps: CountOrZero = 10
    end_fraction: Fraction = 0.001  # paper 3.2.2
    weight_decay: PositiveOrZero = 1e-5  # paper 3.2.2
    mixture: dict[Domain, PositiveOrZero] = {"web": 0.15, "code": 0.25, "math": 0.6}


class ContextPhase(ContinuedPhase):
    """Context lengthening (3.2.3): the continued mixture and synthetic long-context data, at four times its length."""

    steps: Count = 40
    batch: Count = 2
    sequence_length: Annotated[int, Field(ge=8)] = 1024
    warmup_steps: CountOrZero = 5
    mixture: dict[Domain, PositiveOrZero] = {"web": 0.1, "code": 0.2, "math": 0.3, "long_context": 0.4}
    rope_base: Positive | Literal["model", "rescaled"] = "rescaled"  # paper 3.2.3: 6315089 at the paper's lengths


class PretrainStage(StageOptions):
    """Pre-training (3.2): the listed phases in order, one optimizer recipe each."""

    needs = ("tokenizer",)
    makes = ("base model",)
    reads = ("documents",)
    name: Literal["pretrain"] = "pretrain"
    stages: Annotated[list[PhaseName], Field(min_length=1)] = ["core", "continued", "context_lengthening"]
    core: Phase = Phase()
    continued: ContinuedPhase = ContinuedPhase()
    context_lengthening: ContextPhase = ContextPhase()

    @model_validator(mode="after")
    def _check(self) -> PretrainStage:
        for i, name in enumerate(self.stages):
            if name in self.stages[:i]:
                raise problem(f"'{name}' is listed twice", at=("stages", i))
        return self

    @property
    def phases(self) -> list[tuple[str, Phase]]:
        """The phases to run, in order, each with its name."""
        return [(name, getattr(self, name)) for name in self.stages]


class PruneStage(StageOptions):
    """Soft-Top-K pruning of the FFN hidden dimension to `small_model`, then core training, distilled or not (3.2.1)."""

    needs = ("tokenizer", "base model")
    makes = ("small base model",)
    reads = ("documents",)
    name: Literal["prune"] = "prune"
    mask_steps: Count = 100
    mask_lr: Positive = 0.003
    steps: Count = 200
    batch: Count = 16
    sequence_length: Annotated[int, Field(ge=8)] = 128
    peak_lr: Positive = 0.01
    warmup_steps: CountOrZero = 10
    end_fraction: Fraction = 0.005
    weight_decay: PositiveOrZero = 3.16e-4
    distill: bool = True
    true_weight: Fraction = 0.1  # paper 3.2.1: 0.1 true label + 0.9 teacher's top-1
    scratch: bool = True  # also train the small model from scratch, to compare
    mixture: dict[Domain, PositiveOrZero] = {"web": 0.35, "code": 0.5, "math": 0.15}


class FineTuning(Training):
    """Imitation of given responses: demonstrations, or the ones the reward model likes best (4.2, 4.3.2)."""

    dropout: Fraction = 0.1  # paper 4.2
    end_fraction: Fraction = 1.0  # of the learning rate at the last step, by a cosine; 1: constant (paper 4.2)


class SftStage(StageOptions, FineTuning):
    """Supervised fine-tuning on demonstrations (4.2)."""

    needs = ("tokenizer", "base model")
    makes = ("SFT policy",)
    reads = ("demonstrations",)
    name: Literal["sft"] = "sft"
    steps: Count = 1000


class RewardTraining(Training):
    """The reward model (4.3.1, E.1); `grading_weight` is lambda of its loss."""

    grading_weight: PositiveOrZero = 0.25


class RewardModelStage(StageOptions, RewardTraining):
    """A reward model from the preferences in `data`, before any round of iTeC."""

    needs = ("tokenizer", "base model")
    makes = ("reward model",)
    reads = ("preferences",)
    name: Literal["reward_model"] = "reward_model"


class PreferenceTraining(Training):
    """DPO or IPO (4.3.2); `beta` is the weight of the reference policy (IPO's tau)."""

    beta: Positive = 0.1


class RlStage(StageOptions, OnlineTraining):
    """Online RL of one policy (4.3.3), from the SFT policy where there is one, else from the base model."""

    needs = ("tokenizer", "base model")
    makes = ("RL policy",)
    reads = ("prompts",)
    name: Literal["rl"] = "rl"
    start: Literal["sft", "base"] | None = None


class ItecStage(StageOptions):
    """Iterative teaching committee (4.3.2): sample, annotate, refresh the reward model, train every member, again."""

    needs = ("tokenizer", "SFT policy")
    makes = ("reward model", "committee")
    reads = ("prompts",)
    name: Literal["itec"] = "itec"
    rounds: Count = 2
    members: Annotated[list[Member], Field(min_length=1)] = ["sft", "rs", "dpo", "ipo", "mdloo"]
    prompts_per_round: Count = 128
    responses_per_prompt: Annotated[int, Field(ge=2)] = 8  # of the whole committee, shared out among its members
    pairs_per_prompt: Count = 2
    rerank: RewardWeights = RewardWeights()  # by which RS, and SFT from round 2 on, are taught; held-out prompts: the model
    rerank_prompts: Count = 100  # held-out prompts on which prompt-level reranking is measured (4.3.2)
    responses_per_member: Count = 2  # there
    temperature: Positive = 1.0
    max_tokens: Count = 32
    reward: RewardTraining = RewardTraining()
    sft: FineTuning = FineTuning()
    rs: FineTuning = FineTuning()
    dpo: PreferenceTraining = PreferenceTraining()
    ipo: PreferenceTraining = PreferenceTraining()
    mdloo: OnlineTraining = OnlineTraining()

    @property
    def preference_length(self) -> int:
        """Tokens that a response may take with its prompt to be trained on by everything that learns from pairs."""
        return min(of.sequence_length for of in (self.reward, self.dpo, self.ipo))

    @model_validator(mode="after")
    def _check(self) -> ItecStage:
        for i, name in enumerate(self.members):
            if name in self.members[:i]:
                raise problem(f"'{name}' is listed twice", at=("members", i))
        return self


class DistillCommitteeStage(StageOptions, FineTuning):
    """Committee distillation (4.3.2): the final policy imitates each prompt's best response, by the reward model."""

    needs = ("committee", "reward model")
    makes = ("final policy",)
    reads = ("prompts",)
    name: Literal["distill_committee"] = "distill_committee"
    prompts: Count = 256
    responses_per_member: Count = 2
    rerank: RewardWeights = RewardWeights()
    temperature: Positive = 1.0
    max_tokens: Count = 32


#: Rows of a batch that quantize measures sensitivities on.
SENSITIVITY_BATCH = 8


def _as_list(value: Any) -> Any:
    return [value] if isinstance(value, int | float) and not isinstance(value, bool) else value


class QuantizeStage(StageOptions):
    """Palettization with mixed 2- and 4-bit operations (5.2.1, F); the first target is the one that is served."""

    needs = ("SFT policy",)
    makes = ("palettized model",)
    reads = ("demonstrations",)
    name: Literal["quantize"] = "quantize"
    bits_per_weight: Annotated[list[Annotated[float, Field(ge=2, le=8)]], Field(min_length=1), BeforeValidator(_as_list)] = [
        3.7,
        3.5,
    ]  # paper 5.2.1
    group_size: Count = 16  # paper 5.2.1
    sensitivity_batches: Count = 4


class RecoverStage(StageOptions):
    """Accuracy-recovery adapters on the frozen palettized model (5.2.2): pre-training data, then post-training data."""

    needs = ("palettized model",)
    makes = ("recovery adapters",)
    reads = ("documents", "demonstrations")
    name: Literal["recover"] = "recover"
    ranks: Annotated[list[Count], Field(min_length=1)] = [8, 16, 32]  # paper 5.2.2
    steps_pretrain: CountOrZero = 40
    steps_posttrain: CountOrZero = 60
    batch: Count = 16
    sequence_length: Annotated[int, Field(ge=8)] = 128
    learning_rate: Positive = 1e-3


class AdaptersStage(StageOptions):
    """A feature's LoRA adapter, started from the recovery adapter of its rank (5.1)."""

    needs = ("recovery adapters",)
    makes = ("feature adapter",)
    reads = ("feature_demonstrations",)
    name: Literal["adapters"] = "adapters"
    feature: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]*$")] = "summary"
    rank: Count = 16  # paper 5.1
    steps: Count = 100
    batch: Count = 16
    sequence_length: Annotated[int, Field(ge=8)] = 128
    learning_rate: Positive = 1e-3


class EvaluateStage(StageOptions):
    """Every policy on the held-out prompts, greedy and sampled."""

    needs = ("base model",)
    reads = ("eval_prompts",)
    name: Literal["evaluate"] = "evaluate"
    prompts: Count = 256
    max_tokens: Count = 32


class ServeStage(StageOptions):
    """The OpenAI-compatible server: answers `questions`, then stops; `afm-rl serve RUN` keeps one up."""

    needs = ("SFT policy",)
    makes = ("server",)
    name: Literal["serve"] = "serve"
    questions: list[str] = ["What is 37 + 25?"]
    max_tokens: Count = 32


AnyStage = Annotated[
    TokenizerStage
    | PretrainStage
    | PruneStage
    | SftStage
    | RewardModelStage
    | RlStage
    | ItecStage
    | DistillCommitteeStage
    | QuantizeStage
    | RecoverStage
    | AdaptersStage
    | EvaluateStage
    | ServeStage,
    Discriminator("name"),
]

STAGES: dict[str, type[StageOptions]] = {
    cls.model_fields["name"].default: cls
    for cls in (
        TokenizerStage,
        PretrainStage,
        PruneStage,
        SftStage,
        RewardModelStage,
        RlStage,
        ItecStage,
        DistillCommitteeStage,
        QuantizeStage,
        RecoverStage,
        AdaptersStage,
        EvaluateStage,
        ServeStage,
    )
}


def stage_from_yaml(item: Any) -> Any:
    """`itec` or `{itec: {rounds: 2}}` -> `{name: itec, rounds: 2}`; an unknown name names the nearest one."""
    if isinstance(item, StageOptions):
        return item
    name: Any = item
    options: Any = {}
    if isinstance(item, dict):
        if len(item) != 1:
            raise problem("a stage is a name or {name: {options}}; indent its options below the name")
        name, options = next(iter(item.items()))
    if name not in STAGES:
        raise problem(f"unknown stage '{name}'{nearest(name, STAGES)}")
    options = {} if options is None else options
    if not isinstance(options, dict):
        raise problem(f"the options of '{name}' must be a mapping, got {options!r}", at=(name,))
    if "name" in options:
        raise problem(f"unknown key 'name'{nearest('name', STAGES[name].keys())}", at=(name, "name"))
    return {"name": name, **options}
