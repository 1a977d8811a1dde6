"""The algorithms of online learning by name, and which constants each of them has: what a topology may ask for.

MDLOO is the paper's (4.3.3, E.2); the others are there to compare with. Their mathematics is in
`afm_rl/objectives/online.py`; this page is read when a topology is, and needs no arrays.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from afm_rl.errors import UserError

#: What may be subtracted from rewards, by name (see `objectives/online.py: advantages`).
BASELINES = ("leave_one_out", "group_mean", "group_standardized", "running_average", "none")
#: The two exact forms of MDLOO's KL to theta_k: from the sampled tokens, or over the whole vocabulary.
KL_FORMS = ("sampled", "full")


@dataclass(frozen=True)
class Algorithm:
    """What an algorithm has. `reference`: where the frozen reference policy enters, weighed by beta.

    `baselines`: those it runs with, its own first. `pairs`: it learns from the best and the worst response of a group only.
    """

    reference: Literal["reward", "loss"]
    baselines: tuple[str, ...]
    pairs: bool = False


_ANY = ("leave_one_out", "group_mean", "running_average", "none")
ALGORITHMS = {
    "mdloo": Algorithm("reward", _ANY),
    "ppo": Algorithm("reward", _ANY),
    "rloo": Algorithm("reward", ("leave_one_out",)),
    "grpo": Algorithm("loss", ("group_standardized",)),
    "reinforce": Algorithm("reward", ("running_average", "none", "group_mean", "leave_one_out")),
    "online_dpo": Algorithm("loss", ("none",), pairs=True),
}


def check_choice(algorithm: str, *, kl: str, baseline: str, beta: float) -> None:
    """Raise UserError, saying what there is instead, for a combination that no algorithm has."""
    if algorithm not in ALGORITHMS:
        raise UserError(f"unknown algorithm {algorithm!r}; there are {', '.join(ALGORITHMS)}")
    if kl not in KL_FORMS:
        raise UserError(f"unknown form {kl!r} of the KL to the sampling policy; there are {', '.join(KL_FORMS)}")
    if kl == "full" and algorithm != "mdloo":
        raise UserError(f"kl: full belongs to mdloo; {algorithm} has no KL to the sampling policy, so leave `kl` out")
    known = ALGORITHMS[algorithm].baselines
    if baseline not in ("own", *known):
        raise UserError(f"{algorithm} has no baseline {baseline!r}; there are {', '.join(known)}")
    if ALGORITHMS[algorithm].pairs and not beta > 0:
        raise UserError(f"{algorithm} needs a beta above 0 (it prices the distance to the reference), got {beta}")
