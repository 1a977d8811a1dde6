"""All the data of a run in one value: documents by domain, demonstrations, prompts, preferences, a feature's data.

There is one path into the system: a world (`afm_rl/worlds/`) and a user's files both become a `Dataset`. Held-out data
comes from files of its own, or from a split by a hash of the content. A conversation that is held out is nowhere in the
training records: what overlaps is left out of training, and said so (the paper's decontamination, 3.1.5, by identity).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from afm_rl.data import records
from afm_rl.data.documents import read_documents, write_documents
from afm_rl.data.split import conversation_key, is_held_out, stable_hash
from afm_rl.errors import UserError
from afm_rl.types import Demonstration, Preference, Prompt

logger = logging.getLogger(__name__)

#: The paper's kinds of pre-training data (3.1), each with a weight in a stage's mixture.
DOMAINS = ("web", "code", "math", "long_context")
#: The share of a user's prompts or documents that is held out where no file for it is given.
HELD_OUT_FRACTION = 0.1

Item = TypeVar("Item")
PathLike = str | Path


@dataclass(frozen=True)
class Dataset:
    """What the stages train and evaluate on. Any field may be empty; a stage that needs it says so."""

    source: str
    documents: dict[str, list[str]] = field(default_factory=dict)
    heldout_documents: dict[str, list[str]] = field(default_factory=dict)
    demonstrations: list[Demonstration] = field(default_factory=list)
    prompts: list[Prompt] = field(default_factory=list)
    eval_prompts: list[Prompt] = field(default_factory=list)
    preferences: list[Preference] = field(default_factory=list)
    feature_demonstrations: list[Demonstration] = field(default_factory=list)
    feature_eval_prompts: list[Prompt] = field(default_factory=list)

    def write_files(self, folder: PathLike) -> dict[str, object]:
        """Write everything as the files that `from_files` reads, and return its arguments (paths as text)."""
        folder = Path(folder)
        paths: dict[str, object] = {}
        for name, by_domain in (("documents", self.documents), ("heldout_documents", self.heldout_documents)):
            (folder / name).mkdir(parents=True, exist_ok=True)
            written = {domain: folder / name / f"{domain}.jsonl" for domain, texts in by_domain.items() if texts}
            for domain, path in written.items():
                write_documents(path, by_domain[domain])
            if written:
                paths[name] = {domain: str(path) for domain, path in written.items()}
        writers: dict[str, Callable[..., None]] = {
            "demonstrations": records.write_demonstrations,
            "prompts": records.write_prompts,
            "eval_prompts": records.write_prompts,
            "preferences": records.write_preferences,
            "feature_demonstrations": records.write_demonstrations,
            "feature_eval_prompts": records.write_prompts,
        }
        for name, write in writers.items():
            if getattr(self, name):
                paths[name] = str(folder / f"{name}.jsonl")
                write(folder / f"{name}.jsonl", getattr(self, name))
        return paths


def from_files(
    *,
    documents: Mapping[str, PathLike] | None = None,
    heldout_documents: Mapping[str, PathLike] | None = None,
    demonstrations: PathLike | None = None,
    prompts: PathLike | None = None,
    eval_prompts: PathLike | None = None,
    preferences: PathLike | None = None,
    feature_demonstrations: PathLike | None = None,
    feature_eval_prompts: PathLike | None = None,
    held_out_fraction: float = HELD_OUT_FRACTION,
) -> Dataset:
    """The user's own data. `documents` maps domains (see DOMAINS) to files or folders; the rest are JSON-lines files.

    Without `eval_prompts`, `held_out_fraction` of the prompts is held out, and likewise each domain of documents that
    `heldout_documents` leaves out; `feature_eval_prompts` then come out of `feature_demonstrations`. Raises UserError.
    """
    if not any((documents, demonstrations, prompts, preferences, feature_demonstrations)):
        raise UserError("data.files: no files; give at least one of documents, demonstrations, prompts, preferences")
    training_documents, held_documents = _documents(documents or {}, heldout_documents or {}, held_out_fraction)
    shown = records.read_demonstrations(demonstrations) if demonstrations else []
    asked = records.read_prompts(prompts) if prompts else []
    held = _eval_prompts(eval_prompts, asked, held_out_fraction)
    feature_shown = records.read_demonstrations(feature_demonstrations) if feature_demonstrations else []
    feature_held = _eval_prompts(feature_eval_prompts, [d.prompt for d in feature_shown], held_out_fraction)
    compared = records.read_preferences(preferences) if preferences else []
    held_keys = {conversation_key(prompt) for prompt in (*held, *feature_held)}
    return Dataset(
        source="the user's files",
        documents=training_documents,
        heldout_documents=held_documents,
        demonstrations=_without(held_keys, shown, "demonstrations", lambda d: d.prompt),
        prompts=_without(held_keys, asked, "prompts", lambda p: p),
        eval_prompts=held,
        preferences=_without(held_keys, compared, "preferences", lambda p: p.prompt),
        feature_demonstrations=_without(held_keys, feature_shown, "feature_demonstrations", lambda d: d.prompt),
        feature_eval_prompts=feature_held,
    )


def hold_out(items: Sequence[Item], key: Callable[[Item], str], *, fraction: float) -> set[str]:
    """The keys that are held out: by hash, and from two different keys on at least one and never all of them."""
    keys = {key(item) for item in items}
    held = {k for k in keys if is_held_out(k, fraction=fraction, salt="held-out")}
    if fraction > 0 and len(keys) > 1 and len(held) in (0, len(keys)):
        first = min(keys, key=lambda k: (stable_hash("held-out", k), k))
        return {first} if not held else held - {first}
    return held


def _documents(
    training: Mapping[str, PathLike], held_out: Mapping[str, PathLike], fraction: float
) -> tuple[dict[str, list[str]], dict[str, list[str]]]:
    """The documents of both sides. A domain's only document is trained on: nothing is left to hold out."""
    for domain in (*training, *held_out):
        if domain not in DOMAINS:
            raise UserError(f"data.files.documents: unknown domain {domain!r}; the domains are {', '.join(DOMAINS)}")
    kept: dict[str, list[str]] = {}
    held = {domain: read_documents(path) for domain, path in held_out.items()}
    for domain, path in training.items():
        texts = read_documents(path)
        if domain not in held:
            keys = hold_out(texts, str, fraction=fraction)
            held[domain] = [text for text in texts if text in keys]
        else:
            keys = set(held[domain])
        kept[domain] = [text for text in texts if text not in keys]
    return kept, held


def _eval_prompts(path: PathLike | None, candidates: Sequence[Prompt], fraction: float) -> list[Prompt]:
    if path is not None:
        return records.read_prompts(path)
    keys = hold_out(candidates, conversation_key, fraction=fraction)
    held = {conversation_key(prompt): prompt for prompt in candidates if conversation_key(prompt) in keys}
    return list(held.values())


def _without(held: set[str], items: list[Item], name: str, prompt_of: Callable[[Item], Prompt]) -> list[Item]:
    """`items` less those whose conversation is held out for evaluation."""
    kept = [item for item in items if conversation_key(prompt_of(item)) not in held]
    if len(kept) < len(items):
        logger.warning("%s: %d of %d records are held out for evaluation", name, len(items) - len(kept), len(items))
    return kept
