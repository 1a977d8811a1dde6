"""The browser of rollouts: a bounded sample that follows prompts, every number of a response, and text that stays text."""

from __future__ import annotations

import itertools
import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from afm_rl.types import Message
from tests.topologies.online.fakes import PROMPTS as ASKED
from tests.topologies.online.fakes import group, scored
from tests.topologies.online_run import BATCH, HOSTILE, RESPONSES, TASK, write_online_run
from tests.topologies.test_report import Page
from topologies.online.rollouts import Rollout, RolloutFiles
from topologies.online.tickets import Ticket
from topologies.report import write_report
from topologies.report_rollouts import (
    CHARACTERS,
    ITERATIONS,
    PROMPTS,
    Shown,
    TaskRollouts,
    choose_iterations,
    rollouts_section,
    sample_rollouts,
)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = write_online_run(tmp_path_factory.mktemp("runs"), iterations=40)
    (path / "report.json").write_text(json.dumps({"name": "smoke"}))
    return path


@pytest.fixture(scope="module")
def sample(run: Path) -> TaskRollouts:
    [task] = sample_rollouts(run)
    return task


@pytest.fixture(scope="module")
def page(run: Path) -> Page:
    return Page(write_report(run).read_text(encoding="utf-8"))


def text_of(page: Page) -> str:
    return " ".join(" ".join(page.text).split())


def test_the_sample_is_bounded_and_has_both_ends(run: Path, sample: TaskRollouts) -> None:
    """Guards the page's size, whatever the run's, and that what is left out is said."""
    iterations = sorted({one.iteration for one in sample.shown})
    assert (iterations[0], iterations[-1], len(iterations)) == (0, 39, ITERATIONS)
    assert all(sum(one.iteration == i for one in sample.shown) <= PROMPTS for i in iterations)
    assert (sample.task, sample.iterations, sample.prompts) == (TASK, 40, BATCH)
    assert f"{ITERATIONS} of 40 iterations, {BATCH} prompts in each" in rollouts_section([sample])
    assert write_report(run).stat().st_size < 400_000


def test_iterations_are_chosen_where_prompts_recur() -> None:
    """Guards the way across iterations: beside the even one, the neighbour with the prompts of the first and the last."""
    prompts = {
        i: {f"p{i % 7}"} for i in range(100)
    }  # 0, 7, 14, ...: the first iteration's prompt; 1, 8, ...: the last one's
    chosen = choose_iterations(range(100), prompts, count=6)
    assert (chosen[0], chosen[-1], len(chosen)) == (0, 99, 6)
    assert all(i % 7 in (0, 1) for i in chosen)
    assert all(10 < later - earlier < 30 for earlier, later in itertools.pairwise(chosen))
    assert choose_iterations(range(100), {}, count=6) == [0, 20, 40, 59, 79, 99]
    assert choose_iterations([3, 5], {}, count=6) == [3, 5]


def test_prompts_that_recur_come_first(tmp_path: Path) -> None:
    """Guards the choice among more prompts than are shown."""
    files = RolloutFiles(tmp_path / "rollouts" / TASK)
    for iteration in (0, 1):
        for number in range(10):
            files.add(
                iteration, [made(f"{'both' if number >= 5 else f'only-{iteration}'}-{number}", 10 * iteration + number)]
            )
    (task,) = sample_rollouts(tmp_path)
    for iteration in (0, 1):
        shown = [one.prompt for one in task.shown if one.iteration == iteration]
        assert shown == [f"both-{n}" for n in range(5, 10)] + [f"only-{iteration}-{n}" for n in range(3)]


def test_everything_about_a_response_is_on_its_card(sample: TaskRollouts, page: Page) -> None:
    """Guards the numbers: reward, components, advantage, KL, mismatch, length, and why one did not count."""
    one = next(s for s in sample.shown if s.trained is not None and not s.rollout.scored.valid_G.all())
    assert one.trained is not None
    rewards, trained, text = one.rollout.scored, one.trained, text_of(page)
    sign = "+" if trained.advantage_G[0] > 0 else ""
    said = (
        f"response 1 {rewards.reward_G[0]:.3g} {one.rollout.texts[0]} "
        f"verifier {rewards.components['verifier'][0]:.3g} model {rewards.components['model'][0]:.3g} "
        f"advantage {sign}{trained.advantage_G[0]:.3g} "
        f"KL to reference {trained.logp_G[0] - trained.ref_logp_G[0]:.3g} log p mismatch {trained.mismatch_G[0]:.3g} "
        f"tokens {len(rewards.group.responses[0])}, {'finished' if rewards.group.finished[0] else 'cut'}"
    )
    assert said.replace("-", "−") in text
    assert "not counted: verifier: TimeoutError after 2 s" in text
    assert "no update on it yet" in text
    assert f"weights of version {one.iteration}" in text


def test_cards_links_and_ids_agree(sample: TaskRollouts, page: Page) -> None:
    """Guards the page without its script: every cell of the table leads to a card, and every card is there once."""
    cards = [a for a in page.of("article") if "rollout" in a["class"]]
    assert len(cards) == len(sample.shown)
    links = [a["href"][1:] for a in page.of("a") if a.get("href", "").startswith("#rollout-")]
    assert links
    assert set(links) <= {card["id"] for card in cards}
    assert len(page.ids) == len(set(page.ids))


def test_text_of_a_model_does_nothing(run: Path, page: Page) -> None:
    """Guards the reader: markup, quotes and control characters in a response stay text."""
    assert "<script>alert(1)</script>" in text_of(page)
    assert not page.of("img")
    assert len(page.of("script")) == 1
    assert "\x1b" not in (run / "report.html").read_text()


def test_ids_prompts_and_problems_are_escaped_too() -> None:
    """Guards attributes: an id of a data file may hold quotes."""
    rollout = made(HOSTILE, 1)
    rewards = replace(
        rollout.scored, valid_G=np.zeros(2, bool), problems=(HOSTILE, HOSTILE), components={HOSTILE: np.ones(2)}
    )
    hostile = replace(rollout, scored=rewards, messages=(Message("user", HOSTILE),))
    source = rollouts_section([shown_alone(hostile, task=HOSTILE)])
    parsed = Page(source)
    assert not parsed.of("script")
    assert not parsed.of("img")
    [card] = [a for a in parsed.of("article") if "rollout" in a["class"]]
    assert card["data-prompt"].startswith("<script>")


def test_long_texts_many_responses_and_tools_are_cut_and_counted() -> None:
    """Guards the bound of a card, and that it says what it leaves out."""
    rollout = made("p", 1, responses=20, text="x" * (CHARACTERS + 7))
    actions = tuple(np.array([True, False, True]) for _ in range(20))
    rollout = replace(rollout, scored=replace(rollout.scored, group=replace(rollout.scored.group, actions=actions)))
    text = text_of(Page(rollouts_section([shown_alone(rollout)])))
    assert "x … (7 more characters)" in text
    assert "and 12 more responses" in text
    assert "tokens 2 of 3 its own, finished" in text


def test_a_run_without_online_jobs_has_no_browser(tmp_path: Path) -> None:
    """Guards the pages of all other runs."""
    (tmp_path / "report.json").write_text(json.dumps({"name": "plain"}))
    assert "Rollouts" not in re.sub(r"<style>.*?</style>", "", write_report(tmp_path).read_text(), flags=re.DOTALL)


def test_a_damaged_file_costs_its_own_groups(tmp_path: Path) -> None:
    """Guards the report of a run that was killed: what is whole is shown."""
    run = write_online_run(tmp_path, iterations=3)
    path = run / "rollouts" / TASK / "000001.msgpack"
    path.write_bytes(path.read_bytes()[:-500])
    (task,) = sample_rollouts(run)
    shown = [one.iteration for one in task.shown]
    assert (shown.count(0), shown.count(2)) == (BATCH, BATCH)
    assert shown.count(1) in range(1, BATCH + 1)
    assert sum(len(one.rollout.texts) for one in task.shown) == RESPONSES * len(shown)


def made(prompt: str, ticket: int, *, responses: int = 2, text: str = "answer") -> Rollout:
    """A group with rewards 0, 1, ..."""
    one = scored(replace(group(Ticket(ticket, ASKED[0]), 0, responses=responses), id=f"{prompt}@{ticket}"))
    return Rollout(ticket, one, {0: "d0"}, ASKED[0].messages, (text,) * responses)


def shown_alone(rollout: Rollout, *, task: str = "rl") -> TaskRollouts:
    return TaskRollouts(task, 1, 1, (Shown(0, rollout, None),))
