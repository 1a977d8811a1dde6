"""Programmatic components: answers as mathematics under a limit that holds, rules of form, length and truncation."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

from afm_rl.rewards.format_rules import make_reward
from afm_rl.rewards.functions import FunctionReward
from afm_rl.rewards.limits import PerToken, SoftOverlong, Truncation
from afm_rl.rewards.spec import FunctionSpec
from afm_rl.types import Message, Prompt
from afm_rl.workers.pool import Task


def asked(value: str) -> Prompt:
    return Prompt("p", (Message("user", "?"),), checks=({"type": "answer", "value": value},))


def scores(reward: FunctionReward, prompt: Prompt, *responses: str) -> tuple[list[float], list[str]]:
    ((values, problems),) = reward([(prompt, [(text, {"finished": True}) for text in responses])], budget_s=60.0)
    return values.tolist(), problems


@pytest.fixture(scope="module")
def math() -> Iterator[FunctionReward]:
    reward = FunctionReward(FunctionSpec("math", Task("afm_rl.rewards.math_answers:reward"), limit_s=1.0, workers=2))
    yield reward
    reward.close()


def test_answers_compare_as_mathematics(math: FunctionReward) -> None:
    """Guards the math verifier: equal values in other forms are right, near ones are not, no answer is wrong."""
    right = ("answer 57", "7+5=12 3+2=5 answer 57.0", r"so \boxed{\frac{114}{2}}", r"we get $57$.")
    wrong = ("answer 58", "5 7", "", "fifty-seven?")
    values, problems = scores(math, asked("57"), *right, *wrong)
    assert values == [1.0] * len(right) + [0.0] * len(wrong)
    assert not any(problems)
    values, _ = scores(math, asked(r"\frac{1}{2}"), r"\boxed{0.5}", r"\boxed{\frac{2}{4}}", r"\boxed{\frac{1}{3}}")
    assert values == [1.0, 1.0, 0.0]
    values, _ = scores(math, Prompt("q", (Message("user", "?"),)), r"\boxed{1}")
    assert values == [0.0]


def test_attacks_on_the_math_verifier_cost_one_response(math: FunctionReward) -> None:
    """Guards the reward actor: towers of powers and deep nesting end within the limit; the answers beside are scored."""
    deep = r"\boxed{" + r"\frac{1}{" * 3000 + "2" + "}" * 3000 + "}"
    tower, factorials = r"\boxed{9^{9^{9^{9}}}}", r"\boxed{((((99999!)!)!)!)}"
    values, problems = scores(math, asked("57"), "answer 57", tower, deep, factorials, "answer 57")
    assert (values[0], values[-1]) == (1.0, 1.0)
    for value, problem in zip(values[1:-1], problems[1:-1], strict=True):
        assert value == 0.0 or problem.startswith("math "), (value, problem)
    assert problems[1] == "math timeout: took longer than 1 s"


def test_a_truth_that_is_no_mathematics_is_said(math: FunctionReward) -> None:
    """Guards the user's data: the response is invalid, not wrong."""
    values, problems = scores(math, asked("?"), "?")
    assert np.isnan(values[0])
    assert problems[0] == "math raised: ValueError: the prompt's answer '?' cannot be read as mathematics"


@pytest.mark.parametrize(
    ("rules", "text", "share"),
    [
        ({"regex": r"^a.*z$"}, "a\nz", 1.0),
        ({"regex": r"^a.*z$"}, "a", 0.0),
        ({"contains": ["x", "y"], "excludes": ["z"]}, "x z", 1 / 3),
        ({"tags": ["think", "answer"]}, "<think>a</think> <answer>b</answer>", 1.0),
        ({"tags": ["think", "answer"]}, "<answer>b</answer><think>a</think>", 0.0),
        ({"tags": ["think"]}, "<think>a</think><think>b</think>", 0.0),
        ({"tags": ["think"]}, "</think>a<think>", 0.0),
        ({"parses_json": True}, '{"a": [1]}', 1.0),
        ({"parses_json": True}, "[" * 100_000, 0.0),
        ({"min_words": 2, "max_chars": 4}, "a b", 1.0),
        ({"min_words": 2, "max_chars": 4}, "a b c", 0.5),
        ({"max_words": 0}, "", 1.0),
    ],
)
def test_rules_of_form(rules: dict[str, object], text: str, share: float) -> None:
    """Guards each rule, and that a score is the share of the rules that hold."""
    assert make_reward(**rules)("?", text, {}) == share  # type: ignore[arg-type]


def test_a_pattern_that_never_ends_is_stopped() -> None:
    """Guards the user's own patterns: catastrophic backtracking costs one response."""
    task = Task("afm_rl.rewards.format_rules:make_reward", {"regex": r"^(a+)+$"})
    reward = FunctionReward(FunctionSpec("format", task, limit_s=0.5))
    values, problems = scores(reward, asked("1"), "a" * 40 + "b", "aaa")
    assert problems == ["format timeout: took longer than 0.5 s", ""]
    assert values[1] == 1.0
    reward.close()


def test_soft_overlong_is_equation_13_of_dapo() -> None:
    """Guards the length penalty against the equation's three cases, written out."""

    def by_cases(length: int, longest: int, cache: int) -> float:
        if length <= longest - cache:
            return 0.0
        if length <= longest:
            return ((longest - cache) - length) / cache
        return -1.0

    lengths = np.arange(1, 80)
    found = SoftOverlong(max_tokens=64, buffer_tokens=16)(lengths)
    np.testing.assert_array_equal(found, np.float32([by_cases(n, 64, 16) for n in lengths]))
    np.testing.assert_array_equal(PerToken()(lengths), -lengths)


def test_truncation_policies() -> None:
    """Guards what a cut response gets, and which responses count as cut."""
    total, cut = np.array([2.0, 2.0, np.nan]), np.array([False, True, True])
    expected = {"keep": 2.0, "zero": 0.0, "penalty": 1.5, "invalid": np.nan}
    for kind, value in expected.items():
        found = Truncation(kind, penalty=0.5).apply(total, cut)  # type: ignore[arg-type]
        np.testing.assert_array_equal(found, [2.0, value, np.nan])
    responses = tuple(np.array(tokens, np.int32) for tokens in ([5, 9], [5, 1], [5], []))
    finished = (True, True, False, False)
    np.testing.assert_array_equal(Truncation().cut(finished, responses, end_of_turn_id=9), [False, False, True, True])
    np.testing.assert_array_equal(
        Truncation(end="turn").cut(finished, responses, end_of_turn_id=9), [False, True, True, True]
    )
