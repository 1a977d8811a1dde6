"""The committee's bookkeeping: pairs to annotate, prompt-level reranking, who sits on the next committee."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np

from afm_rl.types import Message, Prompt
from topologies.stages import committee
from topologies.stages.context import Policy
from topologies.stages.itec import MemberScore, _next_committee


def prompt(name: str) -> Prompt:
    return Prompt(name, (Message("user", name),))


def test_pairs_are_distinct_texts_of_one_prompt_and_carry_their_authors():
    """Guards the annotator's input: no pair of equal texts, at most per_prompt a prompt, both sides in random order."""
    prompts = [prompt(f"p{i}") for i in range(40)]
    answers = [{"a": ["x", "y"], "b": ["y", f"z{i}"]} for i in range(40)]
    pairs = committee.distinct_pairs(prompts, answers, per_prompt=2, seed=(0, 1))
    assert len(pairs) == 80
    assert all(p.response_a != p.response_b for p in pairs)
    assert {p.policy_a for p in pairs if p.response_a == "y"} == {"a"}  # the first member that gave it
    first_sides = [p.response_a == "x" for p in pairs if "x" in (p.response_a, p.response_b)]
    assert 0 < sum(first_sides) < len(first_sides)
    assert pairs == committee.distinct_pairs(prompts, answers, per_prompt=2, seed=(0, 1))


def test_a_prompt_with_one_distinct_answer_gives_no_pair():
    """Guards against asking a person to compare a text with itself."""
    assert committee.distinct_pairs([prompt("p")], [{"a": ["x", "x"], "b": ["x"]}], per_prompt=3, seed=(0,)) == []


def test_prompt_level_rerank_takes_the_best_of_all_members_and_global_the_best_member(monkeypatch):
    """Guards 4.3.2: per prompt the best response of anybody, beside the best of the member with the highest mean."""
    value = {"a1": 0.0, "a2": 1.0, "b1": 5.0, "b2": -9.0}

    def rewards(*arguments):
        return [np.array([value[t] for t in ts]) for ts in arguments[2]]

    monkeypatch.setattr(committee, "_rewards", rewards)
    answers = [{"a": ["a1"], "b": ["b1"]}, {"a": ["a2"], "b": ["b2"]}]
    chosen = committee.best_by_prompt(SimpleNamespace(), None, answers, [prompt("p"), prompt("q")])
    assert chosen["prompt-level rerank over the committee"] == ["b1", "a2"]
    assert chosen["best single member (a), reranked"] == ["a1", "a2"]
    assert chosen["b, one response"] == ["b1", "b2"]


def test_the_next_committee_is_the_latest_members_and_the_best_earlier_one():
    """Guards the flywheel: every latest member sits on it, and the best of the earlier rounds by net win rate."""

    def score(round_: int, name: str, win: float) -> MemberScore:
        return MemberScore(round_, name, Policy(f"itec-{round_}-{name}", Path()), None, 0.0, {"win": win, "loss": 0.1})

    latest = {"rs": Policy("itec-2-rs", Path()), "dpo": Policy("itec-2-dpo", Path())}
    scores = [score(1, "rs", 0.1), score(1, "dpo", 0.7), score(2, "rs", 0.2), score(2, "dpo", 9.0)]
    assert [p.name for p in _next_committee(2, latest, scores)] == ["itec-2-rs", "itec-2-dpo", "itec-1-dpo"]
    assert [p.name for p in _next_committee(1, latest, scores[2:])] == ["itec-2-rs", "itec-2-dpo"]
