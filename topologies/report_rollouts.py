"""The report's browser of rollouts: what an online job was asked, what it answered, and what that was worth.

The page holds a sample (`sample_rollouts`): iterations spread over the run, with its first and last, moved a little where
neighbours share more prompts, so that a prompt can be followed across iterations. Text of a model is escaped like all else.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from afm_rl.types import TrainedGroup
from topologies.journal import read_journal
from topologies.online.ledger import KIND
from topologies.online.rollouts import Rollout, RolloutFiles
from topologies.report_html import MISSING, escape

#: What the page holds at most: jobs, iterations of each, prompts of each, responses of each, characters of each text.
TASKS, ITERATIONS, PROMPTS, RESPONSES, CHARACTERS = 4, 12, 8, 8, 1200
#: Characters of a prompt where it is one among many.
LABEL = 48


@dataclass(frozen=True)
class Shown:
    """One group on the page; `trained` None before the learner has updated on it."""

    iteration: int
    rollout: Rollout
    trained: TrainedGroup | None

    @property
    def prompt(self) -> str:
        """The prompt's id, which is the same in every iteration."""
        return prompt_of(self.rollout.scored.group.id)

    @property
    def label(self) -> str:
        """What was asked, in a few words: ids mean little to a reader."""
        said = " ".join(self.rollout.messages[-1].content.split()) if self.rollout.messages else ""
        return (said if len(said) <= LABEL else f"{said[: LABEL - 1]}…") or self.prompt

    @property
    def mean_reward(self) -> float | None:
        """Over the responses that have one."""
        rewards = self.rollout.scored.reward_G[self.rollout.scored.valid_G]
        return float(rewards.mean()) if len(rewards) else None


@dataclass(frozen=True)
class TaskRollouts:
    """The sample of one job; `iterations` and `prompts` count what there is on disk, in all and in the largest iteration."""

    task: str
    iterations: int
    prompts: int
    shown: tuple[Shown, ...]


def prompt_of(group_id: str) -> str:
    """The prompt's id in a group's, which is PROMPT@TICKET."""
    return group_id.rpartition("@")[0]


def sample_rollouts(run_path: Path) -> list[TaskRollouts]:
    """A sample of RUN/rollouts for every online job, the newest jobs last; [] where there are none."""
    folder = run_path / "rollouts"
    tasks = sorted((f for f in folder.iterdir() if f.is_dir()), key=_changed) if folder.is_dir() else []
    if not tasks:
        return []
    records = [r for r in read_journal(run_path / "journal.msgpack") if isinstance(r, dict) and r.get("kind") == KIND]
    prompts: dict[str, dict[int, set[str]]] = {task.name: {} for task in tasks}
    for record in records:
        if "groups" in record and record["task"] in prompts:
            prompts[record["task"]].setdefault(record["iteration"], set()).update(map(prompt_of, record["groups"]))
    found = (_sample(RolloutFiles(task), task.name, prompts[task.name]) for task in tasks[-TASKS:])
    return [task for task in found if task.shown]


def choose_iterations(there: Sequence[int], prompts: Mapping[int, Collection[str]], *, count: int) -> list[int]:
    """At most `count` of the sorted iterations: first, last, and others about evenly between, each the one of its
    neighbourhood that shares most prompts with the first and the last."""
    if len(there) <= count:
        return list(there)
    step = (len(there) - 1) / (count - 1)
    wanted = {*prompts.get(there[0], ()), *prompts.get(there[-1], ())}
    chosen = [there[0]]
    for i in range(1, count - 1):
        around = range(math.ceil((i - 0.5) * step), math.ceil((i + 0.5) * step))
        best = max(around, key=lambda at: (len(wanted.intersection(prompts.get(there[at], ()))), -abs(at - i * step)))
        chosen.append(there[best])
    return sorted({*chosen, there[-1]})


def _changed(folder: Path) -> tuple[float, str]:
    return folder.stat().st_mtime, folder.name


def _sample(files: RolloutFiles, task: str, prompts: Mapping[int, Collection[str]]) -> TaskRollouts:
    there = files.iterations()
    read = {i: files.read(i) for i in choose_iterations(there, prompts, count=ITERATIONS)}
    often = Counter(
        prompt_of(rollout.scored.group.id) for iteration in read.values() for rollout in iteration.rollouts.values()
    )
    shown = []
    for i, iteration in read.items():
        rollouts = sorted(iteration.rollouts.values(), key=lambda r: (-often[prompt_of(r.scored.group.id)], r.ticket))
        shown += [Shown(i, one, iteration.trained.get(one.scored.group.id)) for one in rollouts[:PROMPTS]]
    most = max((len(iteration.rollouts) for iteration in read.values()), default=0)
    return TaskRollouts(task, len(there), most, tuple(shown))


def rollouts_section(tasks: Sequence[TaskRollouts]) -> str:
    """The browser: for each job a table prompt x iteration, two choices, and a card for every group. "" for no job."""
    if not tasks:
        return ""
    lead = (
        "What the policy answered while it was trained, what that was worth, and what the learner made of it. A sample: at "
        f"most {TASKS} jobs, {ITERATIONS} iterations of each (the first and the last among them), {PROMPTS} prompts of an "
        f"iteration, {RESPONSES} responses to a prompt, {CHARACTERS:,} characters of a text; everything is in the run's "
        "folder <code>rollouts</code>."
    )
    parts = "".join(_browser(index, task) for index, task in enumerate(tasks))
    return f'<section id="rollouts"><header><h2>Rollouts</h2><p class="lead">{lead}</p></header>{parts}</section>'


def _browser(index: int, task: TaskRollouts) -> str:
    iterations = sorted({one.iteration for one in task.shown})
    labels = {one.prompt: one.label for one in task.shown}
    per = f"{PROMPTS} of {task.prompts}" if task.prompts > PROMPTS else f"{task.prompts}"
    facts = f"{len(iterations)} of {task.iterations} iterations, {per} prompts in each"
    chosen = "".join(f'<option value="{i}">{i}</option>' for i in iterations)
    asked = "".join(f'<option value="{escape(prompt)}">{escape(label)}</option>' for prompt, label in labels.items())
    controls = (
        '<form class="controls"><label>Iteration <button type="button" class="step" value="-1" aria-label="the one before">'
        f'‹</button><select class="iteration"><option value="">all</option>{chosen}</select>'
        '<button type="button" class="step" value="1" aria-label="the next one">›</button></label>'
        f'<label>Prompt <select class="prompt"><option value="">all</option>{asked}</select></label>'
        '<output class="shown"></output></form>'
    )
    cards = "".join(_card(index, one) for one in task.shown)
    start = max((one.iteration for one in task.shown if one.trained is not None), default=iterations[-1])
    return (
        f'<div class="browser" data-start="{start}"><h3>{escape(task.task)}</h3><p class="note">{facts}</p>'
        f"{_matrix(index, task, iterations)}{controls}{cards}</div>"
    )


def _matrix(index: int, task: TaskRollouts, iterations: Sequence[int]) -> str:
    """Mean rewards of the prompts that are there more than once, each linked to its card."""
    often = Counter(one.prompt for one in task.shown)
    at = {(one.prompt, one.iteration): one for one in task.shown}
    means = [one.mean_reward for one in task.shown if one.mean_reward is not None]
    labels = {one.prompt: one.label for one in task.shown}
    rows = [prompt for prompt, times in often.items() if times > 1]
    if not rows or not means:
        return ""
    low, span = min(means), (max(means) - min(means)) or 1.0
    head = "".join(f"<th>{i}</th>" for i in iterations)
    body = ""
    for prompt in rows:
        cells = "".join(_cell(index, at.get((prompt, i)), low, span) for i in iterations)
        body += f'<tr><td title="{escape(prompt)}">{escape(labels[prompt])}</td>{cells}</tr>'
    return (
        '<div class="scroll matrix" tabindex="0"><table>'
        "<caption>mean reward of a prompt's responses, by iteration</caption>"
        f"<thead><tr><th>prompt</th>{head}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def _cell(index: int, one: Shown | None, low: float, span: float) -> str:
    if one is None or one.mean_reward is None:
        return "<td></td>"
    share = 100 * (one.mean_reward - low) / span
    return f'<td><a href="#{_id(index, one)}" style="--w:{share:.0f}%">{one.mean_reward:.2f}</a></td>'.replace(
        "-0.00", "0.00"
    )


def _id(index: int, one: Shown) -> str:
    return f"rollout-{index}-{one.iteration}-{one.rollout.ticket}"


def _card(index: int, one: Shown) -> str:
    scored, group = one.rollout.scored, one.rollout.scored.group
    messages = "".join(
        f'<p class="by">{escape(message.role)}</p><pre dir="auto">{escape(_cut(message.content))}</pre>'
        for message in one.rollout.messages
    )
    versions = "–".join(str(v) for v in sorted({min(one.rollout.digests), max(one.rollout.digests)}))
    facts = f"weights of version {versions}, mean reward {_three(one.mean_reward)}"
    total = len(group.responses)
    left = f'<p class="note">and {total - RESPONSES} more responses</p>' if total > RESPONSES else ""
    answers = "".join(_answer(one, j) for j in range(min(RESPONSES, total)))
    state = "" if one.trained is not None else ", no update on it yet"
    valid = int(scored.valid_G.sum())
    return (
        f'<article class="sample rollout" id="{_id(index, one)}" data-iteration="{one.iteration}" '
        f'data-prompt="{escape(one.prompt)}"><div class="asked"><p class="by">iteration {one.iteration}'
        f'<button type="button" class="kind follow" title="this prompt in every iteration">{escape(one.prompt)}</button></p>'
        f'{messages}<p class="expected">{facts}; {valid} of {total} responses have a reward{state}</p></div>'
        f'<div class="answers">{answers}{left}</div></article>'
    )


def _answer(one: Shown, j: int) -> str:
    """One response: its text, and the numbers that decided what it taught."""
    scored, group, trained = one.rollout.scored, one.rollout.scored.group, one.trained
    advantage = float(trained.advantage_G[j]) if trained is not None and trained.counted_G[j] else None
    state = "unchecked" if not advantage else "pass" if advantage > 0 else "fail"
    bits = [(name, _three(_float(values[j]))) for name, values in scored.components.items()]
    bits.append(("advantage", ("+" if advantage and advantage > 0 else "") + _three(advantage)))
    if trained is not None and trained.counted_G[j]:
        bits.append(("KL to reference", _three(_float(trained.logp_G[j] - trained.ref_logp_G[j]))))
        bits.append(("log p mismatch", _three(_float(trained.mismatch_G[j]))))
    bits.append(("tokens", f"{_length(group.actions, group.responses, j)}, {'finished' if group.finished[j] else 'cut'}"))
    listed = "".join(f"<li>{escape(name)} <b>{escape(value)}</b></li>" for name, value in bits)
    text = one.rollout.texts[j]
    shown = f'<pre dir="auto">{escape(_cut(text))}</pre>' if text else '<p class="none">(empty)</p>'
    reward = _three(_float(scored.reward_G[j])) if scored.valid_G[j] else "no reward"
    return (
        f'<div class="answer {state}"><p class="by"><span>response {j + 1}</span>'
        f'<span class="chip {state}">{escape(reward)}</span></p>{shown}'
        f'<ul class="bits">{listed}</ul>{_excluded(one, j)}</div>'
    )


def _excluded(one: Shown, j: int) -> str:
    """Why a response did not count, if it did not."""
    scored, trained = one.rollout.scored, one.trained
    if not scored.valid_G[j]:
        why = scored.problems[j] if scored.problems else "its reward could not be computed"
    elif trained is not None and not trained.counted_G[j]:
        why = "fewer than two responses to compare, or left out by the learner"
    else:
        return ""
    return f'<p class="problem">not counted: {escape(_cut(why))}</p>'


def _length(actions: Sequence[np.ndarray], responses: Sequence[np.ndarray], j: int) -> str:
    """Tokens of a response; in a conversation of several turns, how many of them the policy chose."""
    total = len(responses[j])
    return f"{int(actions[j].sum())} of {total} its own" if actions else str(total)


def _three(value: float | None) -> str:
    """Three significant digits."""
    return MISSING if value is None else f"{value:.3g}".replace("-", "−")


def _float(value: float | np.floating) -> float | None:
    return float(value) if math.isfinite(value) else None


def _cut(text: str) -> str:
    return text if len(text) <= CHARACTERS else f"{text[:CHARACTERS]} … ({len(text) - CHARACTERS:,} more characters)"
