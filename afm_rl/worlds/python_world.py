"""The embedded default: a small world read from this Python installation, in which everything has ground truth.

`build_world` makes the same `Dataset` that a user's files make. Documents: help topics and docstrings (web), standard
library source (code), arithmetic (math), key-value recall (long_context). Instructions: two-digit addition, format
constraints, summaries, refusals, with demonstrations from a weak teacher. It shows the mechanism of the paper's system,
not language ability; the paper's data (sections 3.1, 4.1) is not public. A held-out operand pair is in no document.
"""

from __future__ import annotations

import functools
import random
from collections.abc import Mapping, Sequence

from afm_rl.data.dataset import Dataset
from afm_rl.data.split import conversation_key
from afm_rl.types import Demonstration, Pair, Preference
from afm_rl.worlds import arithmetic, instructions, needle, python_corpus
from afm_rl.worlds.annotate import judge, pair_rng
from afm_rl.worlds.task import Task, weak_teacher

#: Share of each kind of instruction among demonstrations and prompts.
MIX: Mapping[str, float] = {"arithmetic": 0.7, "format": 0.15, "summary": 0.08, "refusal": 0.07}


def build_world(
    *,
    seed: int = 0,
    web_bytes: int = 1_000_000,
    code_bytes: int = 2_000_000,
    math_documents: int = 3000,
    long_context_documents: int = 500,
    long_context_length_chars: int = 1600,
    demonstrations: int = 6000,
    prompts: int = 2000,
    eval_prompts: int = 400,
    preferences: int = 1000,
    feature_demonstrations: int = 800,
    feature_eval_prompts: int = 100,
    bias_rate: float = 0.6,
    flip_rate: float = 0.05,
) -> Dataset:
    """The whole world. Deterministic in `seed` (on one Python version); a held-out task is the same for every seed.

    Sizes: `*_bytes` of text (about 3 a token), `long_context_length_chars` of one document; the others count records,
    held-out documents come on top. `bias_rate` is how often the weak teacher makes its mistake where it has one,
    `flip_rate` how often the simulated annotator of the first preferences errs. Raises ValueError when more prompts
    are asked for than the world has.
    """
    web = python_corpus.web_documents(size_bytes=web_bytes, seed=seed, keep=_is_clean)
    code = python_corpus.code_documents(size_bytes=code_bytes, seed=seed, keep=_is_clean)
    math_sides = [
        arithmetic.math_documents(count, rng=_rng(seed, f"math-{side}"))
        for side, count in (("training", math_documents), ("held-out", _share(math_documents)))
    ]
    recall_sides = [
        needle.needle_documents(
            count, filler=_filler(texts), length_chars=long_context_length_chars, rng=_rng(seed, f"recall-{side}")
        )
        for side, texts, count in (
            ("training", web.training, long_context_documents),
            ("held-out", web.held_out, _share(long_context_documents)),
        )
    ]
    training, held_out = _tasks("training"), _tasks("held-out")
    feature_train, feature_held = _feature_tasks(feature_demonstrations, feature_eval_prompts, _rng(seed, "feature"))
    return Dataset(
        source=f"python_world (seed {seed}), from {python_corpus.describe_source()}",
        documents={"web": web.training, "code": code.training, "math": math_sides[0], "long_context": recall_sides[0]},
        heldout_documents={
            "web": web.held_out,
            "code": code.held_out,
            "math": math_sides[1],
            "long_context": recall_sides[1],
        },
        demonstrations=_demonstrations(training, demonstrations, bias_rate=bias_rate, rng=_rng(seed, "sft")),
        prompts=[t.prompt for t in _draw(training, prompts, rng=_rng(seed, "prompts"))],
        eval_prompts=[t.prompt for t in _draw(held_out, eval_prompts, rng=_rng(seed, "eval"))],
        preferences=_preferences(training, preferences, flip_rate=flip_rate, seed=seed),
        feature_demonstrations=[Demonstration(t.prompt, t.right) for t in feature_train],
        feature_eval_prompts=[t.prompt for t in feature_held],
    )


def needle_cases(n: int, *, length_chars: int, seed: int = 0) -> list[needle.NeedleCase]:
    """`n` recall cases of about `length_chars` characters, over text that training does not see."""
    return needle.make_needle_cases(n, filler=_held_out_lines(seed), length_chars=length_chars, seed=seed)


@functools.cache
def _held_out_lines(seed: int) -> list[str]:
    web = python_corpus.web_documents(size_bytes=200_000, seed=seed, keep=_is_clean)
    return _filler(web.held_out)


def _is_clean(text: str) -> bool:
    return not arithmetic.mentions_held_out_pair(text)


def _rng(seed: int, purpose: str) -> random.Random:
    """A stream of its own for every purpose: changing one size leaves the other parts of the world as they are."""
    return random.Random(f"python_world-{seed}-{purpose}")


def _share(count: int) -> int:
    """How many generated documents are made for the held-out side: not the same ones, drawn from another stream."""
    return -(-count // 20)


def _filler(texts: Sequence[str]) -> list[str]:
    return [line for text in texts for line in text.splitlines() if len(line.strip()) > 20] or ["-" * 40]


@functools.cache
def _tasks(side: str) -> Mapping[str, list[Task]]:
    """Every task of the world on one side of the split, by kind; the same for every seed."""
    kinds = {
        "arithmetic": arithmetic.arithmetic_tasks(),
        "format": instructions.format_tasks(),
        "summary": instructions.summary_tasks(),
        "refusal": instructions.refusal_tasks(),
    }
    return {kind: [t for t in tasks if t.held_out == (side == "held-out")] for kind, tasks in kinds.items()}


def _counts(total: int) -> dict[str, int]:
    """`total` by MIX; rounding goes to the first kind."""
    counts = {kind: int(total * share) for kind, share in MIX.items()}
    counts[next(iter(MIX))] += total - sum(counts.values())
    return counts


def _draw(tasks: Mapping[str, Sequence[Task]], total: int, *, rng: random.Random) -> list[Task]:
    """`total` different tasks by MIX, in random order."""
    drawn: list[Task] = []
    for kind, count in _counts(total).items():
        if count > len(tasks[kind]):
            raise ValueError(f"{total} prompts need {count} of kind {kind!r}, the world has {len(tasks[kind])}")
        drawn += rng.sample(tasks[kind], count)
    return rng.sample(drawn, len(drawn))


def _demonstrations(
    tasks: Mapping[str, Sequence[Task]], total: int, *, bias_rate: float, rng: random.Random
) -> list[Demonstration]:
    """The weak teacher's responses; a task may be shown more than once, each time as the teacher happens to answer."""
    drawn = [task for kind, count in _counts(total).items() for task in rng.choices(tasks[kind], k=count)]
    return [weak_teacher(task, bias_rate=bias_rate, rng=rng) for task in rng.sample(drawn, len(drawn))]


def _preferences(tasks: Mapping[str, Sequence[Task]], total: int, *, flip_rate: float, seed: int) -> list[Preference]:
    """The first preferences, for a reward model before any policy has answered: right, biased, stray and cut texts."""
    rng = _rng(seed, "preferences")
    preferences: list[Preference] = []
    while len(preferences) < total:
        task = _draw(tasks, 1, rng=rng)[0] if rng.random() < 0.5 else rng.choice(tasks[rng.choice(list(MIX))])
        stray = rng.choice(tasks[task.prompt.kind]).right
        texts = [task.right, task.biased or stray, stray, task.right[: rng.randrange(len(task.right))]]
        first, second = rng.sample(texts, 2)
        pair = Pair(task.prompt, first, second, policy_a="world", policy_b="world")
        preference = judge(pair, flip_rate=flip_rate, rng=pair_rng(pair, seed=seed))
        if preference is not None:
            preferences.append(preference)
    return preferences


def _feature_tasks(training: int, held_out: int, rng: random.Random) -> tuple[list[Task], list[Task]]:
    """Different tasks of the feature, by side of the split."""
    sides: dict[bool, dict[str, Task]] = {False: {}, True: {}}
    wanted = {False: training, True: held_out}
    while any(len(sides[side]) < wanted[side] for side in sides):
        task = instructions.feature_task(rng)
        if len(sides[task.held_out]) < wanted[task.held_out]:
            sides[task.held_out][conversation_key(task.prompt)] = task
    return list(sides[False].values()), list(sides[True].values())
