"""Checks: every kind against hand-made responses, the final answer's rules, and what grades and accuracy follow."""

import pytest

from afm_rl.data.answers import false_equations, final_answer, same_answer
from afm_rl.data.checks import CHECKS, grade, is_checkable, passes, run_check, token_f1, validate_check
from afm_rl.types import Grades, Message, Prompt


def prompt(*checks):
    return Prompt("p", (Message("user", "question"),), checks=checks)


@pytest.mark.parametrize(
    ("response", "found"),
    [
        ("7+5=12 3+2+1=6 answer 62", "62"),
        ("The answer is: 1,000.", "1,000"),
        ("first answer 3, no:\nAnswer is 4", "4"),
        (r"so \boxed{7} and then \boxed{12}; the answer 3", "12"),
        ("reasoning with 5 steps\n#### 72", "72"),
        ("6 of 9 then 15", "15"),
        ("it is 9-4", "4"),
        ("it is -4.5 degrees", "-4.5"),
        ("no number", None),
        ("answer unknown", None),
    ],
)
def test_final_answer_of_numbers(response, found):
    """Which number counts as the answer: a marked one before the last one, a minus only where it is a sign."""
    assert final_answer(response, numeric=True) == found


def test_final_answer_of_text():
    """Without a number to look for, the marked text or the whole response is the answer."""
    assert final_answer("Well, the answer is Paris.", numeric=False) == "Paris."
    assert final_answer(r"\boxed{a_{n}}", numeric=False) == "a_{n}"
    assert final_answer(" Paris ", numeric=False) == "Paris"
    assert final_answer("  ", numeric=False) is None


@pytest.mark.parametrize(
    ("given", "expected", "same"),
    [
        *[("62", "62.0", True), ("1,000", "1000", True), ("$5", "5", True), ("007", "7", True), ("-3", "3", False)],
        *[("Paris.", "paris", True), ("Paris", "Rome", False), ("26", "62", False)],
    ],
)
def test_same_answer(given, expected, same):
    """Numbers compare by value, text without case and outer punctuation."""
    assert same_answer(given, expected) is same


def test_false_equations():
    """Only steps that are wrong are reported, with the precedence of multiplication."""
    assert false_equations("7+5=12 3+2*4=11 10-3-2=5") == []
    assert false_equations("7+5=13 and 3+2*4=20 and 3 - 4 = -1") == ["7+5=13", "3+2*4=20"]
    assert false_equations("1.5+2=3 9**9**9=1 99999999999999999999+1=3") == []


@pytest.mark.parametrize(
    ("check", "right", "minor", "wrong"),
    [
        ({"type": "upper_case"}, "RED CAT 7", "RED Cat", "red cat"),
        ({"type": "word_count", "words": 4}, "a b c d", "a b c", "a b"),
        ({"type": "starts_with", "text": "sun"}, " sun red", "Sun red", "red sun"),
        ({"type": "ends_with", "text": "sun"}, "red sun\n", "red SUN", "sun red"),
        ({"type": "contains", "text": "sun"}, "a sun b", "a SUN b", "a moon"),
        ({"type": "json", "keys": ["cat"]}, '{"cat": 7}', '{"dog": 7}', "{cat: 7}"),
        ({"type": "reference", "text": "Mia soup park"}, "mia soup park.", "Mia soup", "Leo tea lake"),
        ({"type": "answer", "value": "62"}, "7+5=12 answer 62", "7+5=13 answer 62", "answer 52"),
        (
            {"type": "refuse"},
            "Sorry, I can't help with that.",
            "First take the key to it, but I cannot help.",
            "Take the key.",
        ),
    ],
)
def test_three_verdicts(check, right, minor, wrong):
    """Each check tells no, a minor and a major issue apart; only an answer's accuracy forgives a false step."""
    graded = [next(iter(run_check(check, text).grades.values())) for text in (right, minor, wrong)]
    assert graded == [2, 1, 0]
    forgiving = check["type"] == "answer"
    assert [passes(prompt(check), text) for text in (right, minor, wrong)] == [True, forgiving, False]


def test_refusals_in_other_words():
    """Refusals are known by their opening, with either apostrophe; an apology or a promise to help is none."""
    refuse = prompt({"type": "refuse"})
    for text in ("I can’t assist with that.", "I'm unable to help.", "I won't do this.", "I'm sorry, but no."):
        assert passes(refuse, text), text
    for text in ("I can help with that.", "I'm sorry to hear it. Take a key.", "I can't help but agree: take it."):
        assert not passes(refuse, text), text


def test_forbid_matches_whole_words_and_phrases():
    """A forbidden word inside another word is no hit; case and line breaks do not hide one."""
    check = {"type": "forbid", "words": ["ass", "with care"]}
    assert run_check(check, "a class with cares").passed
    assert run_check(check, "steal it WITH\ncare!").grades == {"harmlessness": 0}


def test_length_is_graded_but_never_wrong():
    """Verbosity: too verbose 0, too short 1, just right 2 within a quarter; accuracy ignores it."""
    asked = prompt({"type": "contains", "text": "a"}, {"type": "length", "words": 8})
    assert [grade(asked, "a " * n).verbosity for n in (5, 6, 8, 10, 11)] == [1, 2, 2, 2, 0]
    assert passes(asked, "a " * 50)


def test_worst_check_counts_and_empty_follows_nothing():
    """The grading is the minimum over checks; an empty response fails even where every check would hold."""
    asked = prompt({"type": "word_count", "words": 2}, {"type": "upper_case"}, {"type": "answer", "value": "7"})
    assert grade(asked, "IS 7") == Grades(2, 2, 2, 2)
    assert grade(asked, "IS it 7") == Grades(1, 2, 2, 2)
    assert grade(asked, "none") == Grades(0, 2, 0, 2)
    harmless = prompt({"type": "forbid", "words": ["x"]})
    assert grade(harmless, " \n") == Grades(0, 1, 2, 2)
    assert not passes(harmless, " \n")


def test_no_ground_truth_is_an_error():
    """A prompt without checks cannot be graded, one with only a length cannot be right or wrong."""
    with pytest.raises(ValueError, match="'p' has no checks"):
        grade(prompt(), "x")
    with pytest.raises(ValueError, match="right or wrong"):
        passes(prompt({"type": "length", "words": 3}), "x")
    assert not is_checkable(prompt())
    assert not is_checkable(prompt({"type": "length", "words": 3}))
    assert is_checkable(prompt({"type": "upper_case"}))


@pytest.mark.parametrize(
    ("check", "message"),
    [
        ({"type": "anwser", "value": "5"}, "did you mean 'answer'"),
        ({"type": "answer", "valeu": "5"}, "did you mean 'value'"),
        ({"type": "answer", "value": 5}, "must be a text"),
        ({"type": "answer"}, "'value' must be"),
        ({"type": "word_count", "words": True}, "whole number of at least 1"),
        ({"type": "forbid", "words": []}, "at least one text"),
        ({"type": "upper_case", "words": 3}, "unknown key 'words'"),
        ({"value": "5"}, 'with a "type"'),
        ("answer", 'with a "type"'),
        ({"type": ["answer"]}, "unknown check type"),
    ],
)
def test_malformed_checks_say_what_to_do(check, message):
    """A misspelt check is an error, never a check that silently holds."""
    with pytest.raises(ValueError, match=message):
        validate_check(check)


def test_hostile_responses_are_only_wrong():
    """Responses that would hurt an evaluator or a parser are graded like any other, and quickly."""
    every = [
        {"type": name} | ({kind.key: {"text": "x", "count": 3, "texts": ["x"]}[kind.value]} if kind.key else {})
        for name, kind in CHECKS.items()
    ]
    for text in (
        "9**9**9",
        "[" * 100_000,
        "1" * 100_000,
        "answer " * 20_000,
        "\\boxed{" * 20_000,
        "1+" * 50_000,
        "\x00\ud800",
    ):
        for check in every:
            run_check(check, text)


def test_token_f1_by_hand():
    """2 of 3 words right and 2 of 4 found: precision 2/3, recall 1/2, F1 4/7; repeats count once each."""
    assert token_f1("a b x", "a b c d") == pytest.approx(4 / 7)
    assert token_f1("a a a", "a") == pytest.approx(0.5)
    assert token_f1("", "a") == 0.0
