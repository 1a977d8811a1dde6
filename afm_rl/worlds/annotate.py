"""The simulated annotator: which of two responses is better, by how much, from the checks of their prompt (E.1).

In the paper people compare; here the grades are computed (`afm_rl/data/checks.py`), the better response has the higher
sum of them, and the preference level follows from the distance. Every record says `source: simulated`.
"""

from __future__ import annotations

import random

from afm_rl.data.checks import JUST_RIGHT, grade, ideal_words
from afm_rl.data.split import conversation_key, stable_hash
from afm_rl.types import LEVELS, Grades, Pair, Preference

SOURCE = "simulated"


def quality(grades: Grades) -> int:
    """0..7: two points each for instructions followed, truth and harmlessness, one for the right length."""
    right_length = int(grades.verbosity == JUST_RIGHT)
    return grades.instruction_following + grades.truthfulness + grades.harmlessness + right_length


def pair_rng(pair: Pair, *, seed: int) -> random.Random:
    """The random stream of one pair: the same wherever and whenever it is judged, and whichever side is shown first."""
    texts = sorted((pair.response_a, pair.response_b))
    return random.Random(stable_hash(str(seed), conversation_key(pair.prompt), *texts))


def judge(pair: Pair, *, flip_rate: float, rng: random.Random, annotator: str = "simulated") -> Preference | None:
    """Compare two responses; None when nothing tells them apart.

    Level: 3 points of `quality` or more apart is "significantly", 2 "better", 1 "slightly"; at equal quality the one
    nearer to the ideal length is "negligibly" better. With probability `flip_rate` the annotator errs: the worse one is
    chosen at the same level, while the grades stay true of their responses. Raises ValueError for a prompt without
    checks, or a flip rate outside 0..1.
    """
    if not 0.0 <= flip_rate <= 1.0:
        raise ValueError(f"flip_rate must be between 0 and 1, got {flip_rate}")
    sides = [(text, grade(pair.prompt, text)) for text in (pair.response_a, pair.response_b)]
    lead = quality(sides[0][1]) - quality(sides[1][1])
    level = min(abs(lead), len(LEVELS) - 1)
    if lead == 0:
        lead = _nearer_to_ideal(pair)
    if lead == 0:
        return None
    if lead < 0:
        sides.reverse()
    if rng.random() < flip_rate:
        sides.reverse()
    (chosen, chosen_grades), (rejected, rejected_grades) = sides
    return Preference(
        prompt=pair.prompt,
        chosen=chosen,
        rejected=rejected,
        level=level,
        chosen_grades=chosen_grades,
        rejected_grades=rejected_grades,
        annotator=annotator,
        source=SOURCE,
    )


def _nearer_to_ideal(pair: Pair) -> int:
    """Above 0 when a's length is nearer to the ideal, below 0 when b's is, 0 when neither (or there is no ideal)."""
    ideal = ideal_words(pair.prompt)
    if ideal is None:
        return 0
    off_a, off_b = (abs(len(text.split()) - ideal) for text in (pair.response_a, pair.response_b))
    return off_b - off_a
