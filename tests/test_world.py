"""The embedded world: its ground truth is true, nothing held out leaks, the teacher is weak as stated, it is stable."""

import random
import re
from collections import Counter

import pytest

from afm_rl.data.checks import grade, passes
from afm_rl.data.dataset import DOMAINS
from afm_rl.data.split import conversation_key
from afm_rl.types import Grades
from afm_rl.worlds import arithmetic, instructions, python_corpus
from afm_rl.worlds.python_world import MIX, build_world, needle_cases

SIZES = {"web_bytes": 150_000, "code_bytes": 200_000, "math_documents": 400, "long_context_documents": 40}


@pytest.fixture(scope="module")
def world():
    return build_world(seed=1, **SIZES, demonstrations=3000, prompts=1000, preferences=300)


def test_worked_addition_by_hand():
    """The worked form and the teacher's mistake for the cases that differ: no carry, a carry, a sum over 99."""
    assert arithmetic.worked(37, 25) == "7+5=12 3+2+1=6 answer 62"
    assert arithmetic.worked(31, 25) == "1+5=6 3+2=5 answer 56"
    assert arithmetic.worked(57, 68) == "7+8=15 5+6+1=12 answer 125"
    assert arithmetic.dropped_carry(37, 25) == "7+5=12 3+2=5 answer 52"
    assert arithmetic.dropped_carry(31, 25) is None


def test_every_right_response_passes_and_every_mistake_fails():
    """Over the whole world: the right response has perfect grades, the teacher's mistake is wrong by the checks."""
    tasks = [
        *arithmetic.arithmetic_tasks(),
        *instructions.format_tasks(),
        *instructions.summary_tasks(),
        *instructions.refusal_tasks(),
        *(instructions.feature_task(random.Random(i)) for i in range(50)),
    ]
    for task in tasks:
        assert passes(task.prompt, task.right), task
        assert grade(task.prompt, task.right) == Grades(2, 2, 2, 2), task
        assert task.biased is None or not passes(task.prompt, task.biased), task
    texts = [conversation_key(task.prompt) for task in tasks[:-50]]
    assert len(set(texts)) == len(texts)


def test_held_out_pairs():
    """About 12 % of the unordered pairs, the same for 37+25 and 25+37, and both sums with and without a carry."""
    held = arithmetic.held_out_pairs()
    assert 0.10 < len(held) / 4095 < 0.15
    for task in arithmetic.arithmetic_tasks():
        a, b = map(int, re.findall(r"\d+", task.prompt.messages[0].content))
        assert task.held_out == (arithmetic.pair_key(b, a) in held)


def test_mentions_are_found():
    """The leak detector sees an addition in either order and with spaces, and a subtraction that gives it away."""
    a, b = map(int, min(arithmetic.held_out_pairs()).split("+"))
    for leak in (f"{a}+{b}", f"{b} + {a} is", f"x=({b}+{a})", f"{a + b}-{b}={a}", f"{a + b} - {a} ="):
        assert arithmetic.mentions_held_out_pair(leak), leak
    for other in (f"{a} and {b}", f"1{a}+{b}", f"{a}.{b}", f"{a}+{b}5"):
        assert not arithmetic.mentions_held_out_pair(other), other


def test_no_held_out_pair_in_training(world):
    """No document, demonstration, prompt or preference adds a held-out pair, by a search that is not the filter's."""
    texts = [text for texts in world.documents.values() for text in texts]
    for records in (world.demonstrations, world.preferences):
        texts += [record.prompt.messages[0].content for record in records]
    texts += [prompt.messages[0].content for prompt in world.prompts]
    seen = {
        f"{min(a, b)}+{max(a, b)}"
        for text in texts
        for a, b in ((int(x), int(y)) for x, y in re.findall(r"(?<!\d)(\d\d) ?\+ ?(\d\d)(?!\d)", text))
    }
    assert len(seen) > 1000
    assert seen.isdisjoint(arithmetic.held_out_pairs())


def test_eval_prompts_are_new(world):
    """No evaluation prompt of any kind is a training prompt, and every arithmetic one adds a held-out pair."""
    training = {conversation_key(p) for p in world.prompts} | {conversation_key(d.prompt) for d in world.demonstrations}
    training |= {conversation_key(p.prompt) for p in world.preferences}
    held = [conversation_key(p) for p in world.eval_prompts]
    assert training.isdisjoint(held)
    assert len(set(held)) == len(held) == 400
    assert all(
        arithmetic.mentions_held_out_pair(p.messages[0].content) for p in world.eval_prompts if p.kind == "arithmetic"
    )
    feature = {conversation_key(d.prompt) for d in world.feature_demonstrations}
    assert feature.isdisjoint(conversation_key(p) for p in world.feature_eval_prompts)
    assert (len(feature), len(world.feature_eval_prompts)) == (800, 100)


def test_mix(world):
    """Prompts of every kind, in the stated shares, ids unique."""
    for prompts in (world.prompts, world.eval_prompts):
        shares = Counter(p.kind for p in prompts)
        assert all(abs(shares[kind] / len(prompts) - share) < 0.01 for kind, share in MIX.items())
        assert len({p.id for p in prompts}) == len(prompts)


def test_teacher_drops_the_carry_in_60_percent(world):
    """The bias comes at the stated rate, only where there is a carry, and is exactly the dropped carry."""
    dropped: list[bool] = []
    for shown in world.demonstrations:
        if shown.prompt.kind == "arithmetic":
            a, b = map(int, re.findall(r"\d+", shown.prompt.messages[0].content))
            if a % 10 + b % 10 <= 9:
                assert f"answer {a + b}" in shown.response
            else:
                assert shown.response.split()[-1] in (str(a + b), str(a + b - 10))
                dropped.append(shown.response.endswith(f" {a + b - 10}"))
    assert len(dropped) > 700
    assert abs(sum(dropped) / len(dropped) - 0.6) < 0.06


def test_every_kind_starts_above_30_percent(world):
    """The teacher is right often enough everywhere for the online loop to find something to reinforce."""
    for kind in MIX:
        right = [passes(d.prompt, d.response) for d in world.demonstrations if d.prompt.kind == kind]
        assert 0.3 < sum(right) / len(right) < 0.97, kind


def test_arithmetic_documents_are_true(world):
    """Every equation in the generated text is right; the least-digit-first form reads backwards."""
    for text in world.documents["math"]:
        for left, right in re.findall(r"(?<![\d+-])(\d+(?:[+-]\d+)+)=(\d+)", text):
            assert sum(map(int, re.findall(r"[+-]?\d+", left))) == int(right)
        for a, b, digits in re.findall(r"(\d+)\+(\d+) least digit first is (\d+)", text):
            assert int(digits[::-1]) == int(a) + int(b)


def test_documents_have_their_sizes(world):
    """All four domains on both sides; sizes as asked; no document much longer than a piece; sides disjoint."""
    assert set(world.documents) == set(world.heldout_documents) == set(DOMAINS)
    assert all(world.heldout_documents[domain] for domain in DOMAINS)
    for domain, size in (("web", 150_000), ("code", 200_000)):
        assert size <= sum(len(t.encode()) for t in world.documents[domain]) < size + 10_000
        assert max(map(len, world.documents[domain])) < python_corpus.DOCUMENT_CHARS + 300
        assert set(world.documents[domain]).isdisjoint(world.heldout_documents[domain])
    assert all(800 * 0.9 < len(text) <= 1600 for text in world.documents["long_context"])


def test_a_small_world_still_has_held_out_documents():
    """However little is asked for, every domain can be evaluated (a smoke run asks for next to nothing)."""
    sizes = {"web_bytes": 1000, "code_bytes": 1000, "math_documents": 1, "long_context_documents": 1}
    small = build_world(seed=0, **sizes, demonstrations=10, prompts=10, eval_prompts=10, preferences=5)
    assert all(small.documents[domain] and small.heldout_documents[domain] for domain in DOMAINS)


def test_deterministic_and_seeded():
    """The same seed gives the same world; another seed another one, with the same held-out pairs."""
    sizes = {"web_bytes": 20_000, "code_bytes": 20_000, "math_documents": 20, "long_context_documents": 5}
    sizes |= {"demonstrations": 300, "prompts": 100, "preferences": 30, "feature_demonstrations": 10}
    again, other = build_world(seed=1, **sizes), build_world(seed=2, **sizes)
    assert build_world(seed=1, **sizes) == again
    assert other.prompts != again.prompts
    assert other.documents["web"] != again.documents["web"]


def test_nothing_asked_nothing_made():
    """Every size may be 0, for a run that needs only some of the world; too many prompts are an error."""
    names = (*SIZES, "demonstrations", "prompts", "eval_prompts", "preferences", "feature_demonstrations")
    empty = build_world(seed=0, **dict.fromkeys(names, 0), feature_eval_prompts=0)
    assert not any((*empty.documents.values(), *empty.heldout_documents.values()))
    assert [empty.demonstrations, empty.prompts, empty.preferences, empty.feature_eval_prompts] == [[], [], [], []]
    with pytest.raises(ValueError, match=r"50000 prompts need 35000 of kind 'arithmetic', the world has"):
        build_world(seed=0, **{**dict.fromkeys(names, 0), "prompts": 50_000})


def test_needle_cases():
    """The answer stands in the text once, at the stated depth, and a case is as long as asked, whatever the length."""
    for length_chars in (500, 3000):
        cases = needle_cases(12, length_chars=length_chars, seed=5)
        for case in cases:
            assert abs(len(case.prompt) - length_chars) < 80
            statement = f"{case.prompt.rsplit(chr(10), 1)[1]} {case.answer}."
            assert case.prompt.count(statement) == 1
            assert case.prompt.index(statement) / len(case.prompt) == pytest.approx(case.depth, abs=0.1)
            assert case.passes(f" {case.answer}.\n")
            assert not case.passes(" 0000")
    assert len({case.depth for case in cases}) > 6
    assert needle_cases(12, length_chars=3000, seed=5) == cases
    with pytest.raises(ValueError, match="too short"):
        needle_cases(1, length_chars=100)


def test_long_context_documents_ask_for_what_they_state(world):
    """Every statement of a training document comes twice, the second time after all of the first."""
    for text in world.documents["long_context"]:
        statements = re.findall(r"The code of \w+ is \d{3}\.", text)
        assert Counter(Counter(statements).values()) == {2: 6}
        assert set(statements[:6]) == set(statements[6:])
