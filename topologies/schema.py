"""The topology file, typed: one YAML describes the whole system.

Every default stands here, in `actor_options` or in `stage_options`. An unknown key, a wrong type, a stage out of order
or data that a stage reads and nobody gives is an error with file, line and the nearest valid name. `load_topology` is
the way in; `Topology.resolved` is what a run folder keeps.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    ValidationError,
    ValidationInfo,
    field_serializer,
    model_validator,
)

from afm_rl.config import PRESETS, ModelConfig
from afm_rl.errors import UserError
from topologies.actor_options import Actors
from topologies.mesh_checks import check_mesh
from topologies.stage_options import STAGES, AnyStage, StageOptions, stage_from_yaml
from topologies.strict import Count, CountOrZero, Positive, Strict, nearest, problem
from topologies.yaml_source import Document, Loc, apply_override, parse_yaml, read_yaml, show

_DIMENSIONS = ("vocab_size", "dim", "ffn_dim", "num_layers", "num_heads", "num_kv_heads", "head_dim")

#: A path of the user's, made absolute at once: actors run elsewhere.
DataPath = Annotated[str, AfterValidator(os.path.abspath)]


def _checks_files(info: ValidationInfo) -> bool:
    return bool((info.context or {}).get("check_files"))


class Model(Strict):
    """A preset (with changes), dimensions of one's own, or the folder of a Hugging Face checkpoint."""

    preset: str | None = None
    huggingface: DataPath | None = None
    vocab_size: Count | None = None
    dim: Count | None = None
    ffn_dim: Count | None = None
    num_layers: Count | None = None
    num_heads: Count | None = None
    num_kv_heads: Count | None = None
    head_dim: Count | None = None
    rope_base: Positive | None = None
    norm_eps: Positive | None = None
    tie_embeddings: bool | None = None
    max_positions: Count | None = None

    @model_validator(mode="after")
    def _check(self, info: ValidationInfo) -> Model:
        changes = self._changes()
        if self.huggingface is not None and (self.preset or changes):
            other = "preset" if self.preset else next(iter(changes))
            raise problem("a Hugging Face folder gives all dimensions itself; remove this", at=(other,))
        if self.preset is not None and self.preset not in PRESETS:
            raise problem(f"unknown model preset '{self.preset}'{nearest(self.preset, PRESETS)}", at=("preset",))
        missing = [name for name in _DIMENSIONS if name not in changes]
        if self.preset is None and self.huggingface is None and missing:
            raise problem(f"missing {', '.join(missing)}; give every dimension, or a preset: {', '.join(PRESETS)}")
        if self.huggingface is None or _checks_files(info):
            try:
                self.config()
            except (ValueError, OSError) as error:
                raise problem(str(error), at=("huggingface",) if self.huggingface else ()) from error
        return self

    def config(self) -> ModelConfig:
        """The model's shape. Reads the folder where `huggingface` is given; errors as `afm_rl.huggingface`."""
        if self.huggingface is not None:
            from afm_rl.huggingface import load_config  # imports JAX, which a topology without a folder does not need

            return load_config(self.huggingface)
        if self.preset is not None:
            return PRESETS[self.preset].replace(**self._changes())
        return ModelConfig(**self._changes())

    def _changes(self) -> dict[str, Any]:
        values = {name: getattr(self, name) for name in type(self).model_fields if name not in ("preset", "huggingface")}
        return {name: value for name, value in values.items() if value is not None}


class SmallModel(Strict):
    """What `prune` makes: the model with a narrower FFN (3.2.1 prunes nothing else)."""

    ffn_dim: Count = 192


class Checkpoints(Strict):
    """How often a training job commits a checkpoint (optimizer steps, iterations of the online loop), and what is kept.

    The newest `keep` of a job under way are kept, and for good every checkpoint whose number `keep_every` divides.
    """

    steps: Count = 50
    iterations: Count = 5
    keep: Count = 2
    keep_every: Count | None = None


class Compute(Strict):
    """How forward and backward passes are computed; master weights and optimizer state are always float32."""

    dtype: Literal["float32", "bfloat16"] = "float32"
    remat: Literal["none", "full", "dots", "names"] = "none"  # recompute: nothing, all, all but products, all but branches
    attention: Literal["auto", "xla", "cudnn", "splash"] = "auto"
    logits_per_pass: Count = 2**26  # the most [token, vocabulary] logits in memory at a time, per device
    microbatch_tokens: Count | None = None  # larger batches are cut, and their gradients summed


class Documents(Strict):
    """One file or folder of text per domain of the mixtures."""

    web: DataPath | None = None
    code: DataPath | None = None
    math: DataPath | None = None
    long_context: DataPath | None = None


class Files(Strict):
    """The user's own data (docs/data.md). Relative paths start at the directory the command runs in."""

    documents: Documents | None = None
    heldout_documents: Documents | None = None
    demonstrations: DataPath | None = None
    prompts: DataPath | None = None
    eval_prompts: DataPath | None = None
    preferences: DataPath | None = None
    feature_demonstrations: DataPath | None = None
    feature_eval_prompts: DataPath | None = None

    @model_validator(mode="after")
    def _must_exist(self, info: ValidationInfo) -> Files:
        for loc, path in self.paths().items():
            if _checks_files(info) and not Path(path).exists():
                raise problem(f"{path} does not exist", at=loc)
        return self

    def paths(self) -> dict[Loc, str]:
        """Every path given, by its place."""
        found: dict[Loc, str] = {}
        for name, value in self:
            if isinstance(value, Documents):
                found |= {(name, domain): path for domain, path in value if path is not None}
            elif value is not None:
                found[(name,)] = value
        return found


class WorldSizes(Strict):
    """How much the embedded world makes: arguments of `build_world`."""

    web_bytes: CountOrZero = 1_000_000
    code_bytes: CountOrZero = 2_000_000
    math_documents: CountOrZero = 3000
    long_context_documents: CountOrZero = 500
    long_context_length_chars: Count = 1600
    demonstrations: CountOrZero = 6000
    prompts: CountOrZero = 2000
    eval_prompts: CountOrZero = 400
    preferences: CountOrZero = 1000
    feature_demonstrations: CountOrZero = 800
    feature_eval_prompts: CountOrZero = 100


class Data(Strict):
    """The embedded world, or files."""

    world: Literal["python"] | None = None
    sizes: WorldSizes = WorldSizes()
    files: Files | None = None

    @model_validator(mode="before")
    @classmethod
    def _default_to_the_world(cls, data: Any) -> Any:
        if isinstance(data, dict) and data.get("world") is None and data.get("files") is None:
            return {**data, "world": "python"}
        return data

    @model_validator(mode="after")
    def _check(self) -> Data:
        if self.world is not None and self.files is not None:
            raise problem("give either files or world, not both", at=("files",))
        return self

    def has(self, part: str) -> bool:
        """Whether the data holds `part`; prompts held out by hash stand in for a missing evaluation file."""
        if self.files is None:
            return True
        if part == "documents":
            return self.files.documents is not None and any(value for _, value in self.files.documents)
        if part == "eval_prompts":
            return bool(self.files.eval_prompts or self.files.prompts)
        return getattr(self.files, part) is not None


def _model_from_yaml(value: Any) -> Any:
    return {"preset": value} if isinstance(value, str) else value


class Topology(Strict):
    """The whole file. `launcher`, `address` and `run_root` say where it runs; everything else says what is computed."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
    seed: CountOrZero = 0
    deterministic: bool = False
    launcher: Literal["inline", "local", "cluster"] = "local"
    address: str | None = None
    run_root: str = "runs"
    model: Annotated[Model, BeforeValidator(_model_from_yaml)] = Model(preset="tiny")
    small_model: SmallModel = SmallModel()
    compute: Compute = Compute()
    checkpoints: Checkpoints = Checkpoints()
    data: Data = Data(world="python")
    actors: Actors = Actors()
    stages: Annotated[list[Annotated[AnyStage, BeforeValidator(stage_from_yaml)]], Field(min_length=1)]

    @model_validator(mode="after")
    def _check(self, info: ValidationInfo) -> Topology:
        if self.address is not None and self.launcher != "cluster":
            raise problem("only the cluster launcher takes an address; set launcher: cluster", at=("address",))
        self._check_order()
        for i, stage in enumerate(self.stages):
            for part in stage.reads:
                if not self.data.has(part):
                    raise problem(f"reads {part}, and data.files gives none", at=("stages", i, stage.name))
        if self.model.huggingface is None or _checks_files(info):
            self._check_shapes()
        return self

    def _check_order(self) -> None:
        made: set[str] = {"tokenizer", "base model"} if self.model.huggingface else set()
        for i, stage in enumerate(self.stages):
            at = ("stages", i, stage.name)
            if any(stage.name == earlier.name for earlier in self.stages[:i]):
                raise problem(f"the stage '{stage.name}' is listed twice", at=at)
            for need in stage.needs:
                if need not in made:
                    makers = " or ".join(f"'{name}'" for name, cls in STAGES.items() if need in cls.makes)
                    raise problem(
                        f"needs {_with_article(need)}, which no earlier stage makes; put {makers} before it", at=at
                    )
            if stage.name == "rl" and stage.reward.model and "reward model" not in made:
                message = "gives the reward model a weight, and no earlier stage makes one; put 'reward_model' before it"
                raise problem(f"{message}, or write model: 0", at=(*at, "reward"))
            if self.model.huggingface and stage.name in ("prune", "recover"):
                message = "needs the corpora that the tokenizer stage writes, which a Hugging Face folder goes without"
                raise problem(f"{message}; remove this stage and those that build on it", at=at)
            for thing in made.intersection(stage.makes) if self.model.huggingface else ():
                if stage.name in ("tokenizer", "pretrain"):
                    raise problem(f"the Hugging Face folder already gives the {thing}; remove this stage", at=at)
            made.update(stage.makes)

    def _check_shapes(self) -> None:
        check_mesh(self)
        self._check_engines()
        for i, stage in enumerate(self.stages):
            at: Loc = ("stages", i, stage.name)
            # A model with more tokens than its tokenizer would sample ids that nobody can decode.
            if stage.name == "tokenizer" and stage.vocab_size not in (None, self.model.config().vocab_size):
                message = f"must be model.vocab_size, {self.model.config().vocab_size}; change that, or leave this out"
                raise problem(message, at=(*at, "vocab_size"))
            if stage.name == "prune" and self.small_model.ffn_dim >= self.model.config().ffn_dim:
                limit = self.model.config().ffn_dim
                raise problem(f"must be less than model.ffn_dim, {limit}: prune narrows it", at=("small_model", "ffn_dim"))
            if stage.name == "pretrain":
                self._check_phases(stage, at)
            if stage.name == "rl":
                self._check_online(stage, at)
            if stage.name == "itec":
                self._check_online(stage.mdloo, (*at, "mdloo"))
            if stage.name == "adapters" and stage.rank not in (ranks := self.stage("recover").ranks):
                message = f"no recovery adapter of rank {stage.rank} to start from; recover.ranks are {ranks}"
                raise problem(message, at=(*at, "rank"))

    def _check_online(self, options: Any, at: Loc) -> None:
        if self.deterministic and options.max_staleness:
            message = "must be 0 with deterministic: true: which weights answer a prompt early is a matter of speed"
            raise problem(message, at=(*at, "max_staleness"))
        room = self.actors.sampler.engine.max_context or self.model.config().max_positions
        if options.max_tokens >= room:
            raise problem(f"leaves no room for a prompt in a context of {room} tokens", at=(*at, "max_tokens"))

    def _check_engines(self) -> None:
        limit = self.model.config().max_positions
        for role in ("sampler", "committee"):
            engine, at = getattr(self.actors, role).engine, ("actors", role, "engine")
            if engine.max_context is not None and engine.max_context > limit:
                raise problem(f"more than model.max_positions, {limit}", at=(*at, "max_context"))
            if self.deterministic and engine.speculative.kind != "off":
                raise problem("not with deterministic: true: its steps have shapes of their own", at=(*at, "speculative"))

    def _check_phases(self, stage: Any, at: Loc) -> None:
        limit = self.model.config().max_positions
        for i, (name, phase) in enumerate(stage.phases):
            if phase.sequence_length > limit:
                raise problem(f"more than model.max_positions, {limit}", at=(*at, name, "sequence_length"))
            if phase.rope_base == "rescaled" and i == 0:
                raise problem("a rescaled RoPE base needs a phase before it to start from", at=(*at, name, "rope_base"))

    @field_serializer("stages")
    def _stages_to_yaml(self, stages: list[StageOptions]) -> list[dict[str, Any]]:
        return [{stage.name: stage.model_dump(mode="json", exclude={"name"})} for stage in stages]  # type: ignore[attr-defined]

    def stage(self, name: str) -> Any:
        """The options of the stage called `name`. Errors: KeyError where the topology does not list it."""
        for stage in self.stages:
            if stage.name == name:
                return stage
        raise KeyError(f"the topology '{self.name}' has no stage '{name}'; it has: {', '.join(self.stage_names)}")

    @property
    def stage_names(self) -> list[str]:
        return [stage.name for stage in self.stages]

    def resolved(self) -> dict[str, Any]:
        """The topology with every default written out: plain data that `parse_topology` reads back to an equal one."""
        return self.model_dump(mode="json", exclude_none=True)

    def to_yaml(self) -> str:
        """`resolved` as YAML text."""
        return yaml.safe_dump(self.resolved(), sort_keys=False, allow_unicode=True, width=120)


def _with_article(thing: str) -> str:
    if thing.endswith("s"):
        return thing
    return f"an {thing}" if thing.startswith("SFT") else f"a {thing}"


def load_topology(path: str | Path, overrides: Sequence[str] = (), *, check_files: bool = True) -> Topology:
    """Read a topology file and apply `--set` overrides in order.

    `check_files` False accepts data paths that are gone, for looking at an old run. Errors: `UserError`, one line a
    mistake, each with FILE:LINE (or the `--set` option), the place, and what to do.
    """
    return _validate(read_yaml(path), overrides, check_files=check_files)


def parse_topology(text: str, *, source: str = "topology", check_files: bool = False) -> Topology:
    """As `load_topology`, from text."""
    return _validate(parse_yaml(text, source=source), (), check_files=check_files)


def _validate(document: Document, overrides: Sequence[str], *, check_files: bool) -> Topology:
    if isinstance(document.data, dict) and isinstance(model := document.data.get("model"), str):
        document.replace(("model",), _model_from_yaml(model), document.place(("model",)))  # so that model.dim=64 can follow
    for override in overrides:
        apply_override(document, override)
    if not isinstance(document.data, dict):
        raise UserError(f"{document.place(())}: a topology is a mapping with name and stages, got {document.data!r}")
    try:
        return Topology.model_validate(document.data, context={"check_files": check_files})
    except ValidationError as error:
        raise UserError(_explain(error, document)) from error


def _explain(error: ValidationError, document: Document) -> str:
    """One line per place; the alternatives of a union that all failed share a line."""
    lines: dict[Loc, list[str]] = {}
    for item in error.errors(include_url=False):
        if item["type"] == "missing":
            lines.setdefault(item["loc"], []).append("missing; it has no default")
            continue
        # Pydantic appends the member of a union it tried; what the user wrote ends before that.
        loc: Loc = next(item["loc"][:end] for end in range(len(item["loc"]), -1, -1) if document.has(item["loc"][:end]))
        if item["type"] == "topology":
            loc, message = (*loc, *item["ctx"]["at"]), item["msg"]
        else:
            message = f"{item['msg'][0].lower()}{item['msg'][1:]}, got {item['input']!r}"
        lines.setdefault(loc, []).append(message)
    return "\n".join(f"{document.place(loc)}: {show(loc) or 'topology'}: {_join(texts)}" for loc, texts in lines.items())


def _join(messages: list[str]) -> str:
    """'a, got x' and 'b, got x' -> 'a, or b, got x'."""
    heads = [message.rpartition(", got ")[0] or message for message in messages[:-1]]
    return ", or ".join([*heads, messages[-1]])
