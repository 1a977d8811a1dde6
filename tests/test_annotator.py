"""The simulated annotator: who wins and by how much, the flip rate, and judgements that depend on the pair alone."""

import pytest

from actors.annotator import Annotator
from afm_rl.errors import UserError
from afm_rl.types import LEVELS, Grades, Message, Pair, Prompt
from afm_rl.worlds.annotate import quality
from afm_rl.worlds.arithmetic import arithmetic_task

CHECKS = ({"type": "answer", "value": "62"}, {"type": "upper_case"}, {"type": "length", "words": 4})


def pair(a, b, *, checks=CHECKS, number=0):
    return Pair(Prompt(f"p{number}", (Message("user", f"question {number}"),), checks=checks), a, b, "one", "two")


@pytest.mark.parametrize(
    ("better", "worse", "level"),
    [
        ("THE ANSWER IS 62", "no idea at all", "significantly"),
        ("THE ANSWER IS 62", "THE ANSWER IS 52", "better"),
        ("THE ANSWER IS 62", "62 7", "significantly"),
        ("THE ANSWER IS 62", "THE ANSWER is 62", "slightly"),
        ("THE ANSWER IS 62", "OH THE ANSWER IS 62", "negligibly"),
    ],
)
def test_level_follows_from_the_distance(better, worse, level):
    """The better response is chosen from either side, at the level its lead in grades gives; records are simulated."""
    annotator = Annotator()
    for shown in (pair(better, worse), pair(worse, better)):
        (preference,) = annotator.annotate([shown])
        assert (preference.chosen, preference.rejected) == (better, worse)
        assert LEVELS[preference.level] == level
        assert preference.source == "simulated"
        assert quality(preference.chosen_grades) >= quality(preference.rejected_grades)


def test_quality_by_hand():
    """Two points a grading, and one for the right length only."""
    assert [quality(g) for g in (Grades(2, 2, 2, 2), Grades(2, 0, 2, 2), Grades(2, 1, 0, 1), Grades(0, 0, 0, 0))] == [
        *(7, 6, 3, 0)
    ]


def test_ties_are_left_out():
    """Equal responses, and different ones that nothing tells apart, give no preference; the order of the rest stays."""
    undecided = [pair("X 62", "X 62", number=1), pair("AB IS IT 62", "CD IS IT 62", number=2)]
    decided = [pair("THE ANSWER IS 62", "52", number=n) for n in (3, 4)]
    found = Annotator().annotate([decided[0], *undecided, decided[1]])
    assert [preference.prompt.id for preference in found] == ["p3", "p4"]
    no_ideal = pair("RED", "RED CAT", checks=({"type": "upper_case"},))
    assert Annotator().annotate([no_ideal]) == []


def test_flips_swap_the_texts_and_keep_the_grades_true():
    """At flip rate 1 the worse response is chosen, each text still with its own grades; at 0.3 about 30 % flip."""
    (flipped,) = Annotator(flip_rate=1.0).annotate([pair("THE ANSWER IS 62", "THE ANSWER IS 52")])
    assert flipped.chosen == "THE ANSWER IS 52"
    assert (flipped.chosen_grades.truthfulness, flipped.rejected_grades.truthfulness) == (0, 2)
    pairs = [pair("THE ANSWER IS 62", "THE ANSWER IS 52", number=n) for n in range(1000)]
    flips = sum("52" in preference.chosen for preference in Annotator(flip_rate=0.3).annotate(pairs))
    assert abs(flips - 300) < 75


def test_a_judgement_depends_on_seed_and_pair_alone():
    """Neither the order of the pairs, the replica nor the side changes a judgement; the seed does."""
    pairs = [pair("THE ANSWER IS 62", f"THE ANSWER IS {n}", number=n) for n in range(100)]
    swapped = [pair(f"THE ANSWER IS {n}", "THE ANSWER IS 62", number=n) for n in range(100)]
    noisy = Annotator(seed=7, flip_rate=0.5)
    first = noisy.annotate(pairs)
    assert Annotator(seed=7, flip_rate=0.5).annotate(pairs[::-1]) == first[::-1]
    assert noisy.annotate(swapped) == first
    assert [p.chosen for p in Annotator(seed=8, flip_rate=0.5).annotate(pairs)] != [p.chosen for p in first]


def test_worlds_mistake_loses():
    """On the world's own prompts the carried sum beats the dropped carry."""
    task = arithmetic_task(37, 25)
    (preference,) = Annotator().annotate([Pair(task.prompt, task.biased, task.right, "a", "b")])
    assert (preference.chosen, LEVELS[preference.level]) == (task.right, "better")


@pytest.mark.parametrize("kind", ["judge", "human"])
def test_kinds_of_later_versions_are_refused(kind):
    """What the paper has and this version has not says so and lists what there is."""
    with pytest.raises(UserError, match=f"{kind}' is not available in this version; valid: simulated"):
        Annotator(kind=kind)


def test_mistakes():
    """An unknown kind, a flip rate out of range and a prompt without ground truth are the user's errors."""
    with pytest.raises(UserError, match="unknown kind 'robot'; valid: simulated"):
        Annotator(kind="robot")
    with pytest.raises(UserError, match="flip_rate must be between 0 and 1"):
        Annotator(flip_rate=1.5)
    with pytest.raises(UserError, match="'p0' has no checks"):
        Annotator().annotate([pair("a", "b", checks=())])
