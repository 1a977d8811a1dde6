"""What the report draws of online jobs."""

from __future__ import annotations

from collections.abc import Sequence

from topologies.report_data import Curve


def online_curves(name: str, tasks: Sequence[str]) -> list[Curve]:
    """Reward, distances between policies, and where the time went, of the jobs `tasks`."""
    lines: list[tuple[str, list[str], str]] = [
        ("reward", ["reward"], ""),
        ("accuracy on training prompts", ["accuracy"], ""),
        ("KL to the reference", ["kl_to_reference"], "nats"),
        ("KL to pi_k after the inner steps", ["kl_to_behavior"], "nats"),
        ("importance ratio", ["ratio_mean", "ratio_max"], ""),
        ("effective sample size", ["effective_sample_fraction"], "share"),
        ("a token's log p, sampler against learner", ["logp_mismatch_max", "logp_mismatch_mean"], "nats"),
        ("staleness of what is trained on", ["staleness_mean", "staleness_max"], "versions"),
        ("where an iteration's time goes", ["generate_s", "reward_s", "update_s", "publish_s"], "s"),
        ("who waits", ["learner_wait_s", "sampler_wait_s"], "s"),
    ]
    return [Curve(title=f"{name}: {title}", y=y, tasks=list(tasks), unit=unit) for title, y, unit in lines]
