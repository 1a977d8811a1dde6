"""What becomes of scored groups before a policy update: their layout, and what is refused."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest

from actors.jobs import OnlineSettings
from actors.online_batch import OnlineBatch, responses_batch
from actors.online_report import fresh_tokens, logp_mismatch, staleness
from afm_rl.packing import Batch
from afm_rl.types import Group, ScoredGroup

SETTINGS = OnlineSettings(beta=0.1, inner_steps=2, temperature=0.8, microbatch=4)


def scored(name: str, lengths: tuple[int, ...]) -> ScoredGroup:
    """A prompt of two tokens with responses of these lengths, each of its own token."""
    responses = tuple(np.full(n, 3 + i, np.int32) for i, n in enumerate(lengths))
    logps = tuple(np.zeros(n, np.float32) for n in lengths)
    group = Group(name, np.array([1, 2], np.int32), responses, logps, (True,) * len(lengths), "p", 0)
    rewards = np.arange(len(lengths), dtype=np.float32)
    return ScoredGroup(group, rewards, np.array([n > 1 for n in lengths]))


def answers(
    lengths: tuple[int, ...], rewards: tuple[float, ...], *, prompt: int, version: int = 0, **fields: Any
) -> ScoredGroup:
    """A group whose tokens, and whose sampler's log-probabilities, are all different; a NaN reward is an invalid one."""
    rng = np.random.default_rng((*lengths, prompt))
    responses = tuple(rng.integers(3, 13, n).astype(np.int32) for n in lengths)
    logps = tuple(rng.normal(-1, 0.3, n).astype(np.float32) for n in lengths)
    group = Group("g", rng.integers(3, 13, prompt).astype(np.int32), responses, logps, (True,) * len(lengths), "p", version)
    group, reward_G = dataclasses.replace(group, **fields), np.array(rewards, np.float32)
    return ScoredGroup(group, reward_G, np.isfinite(reward_G))


def fake_log_probs(batch: Batch, which: str, temperature: float) -> np.ndarray:
    """A function of the token and its place alone, whatever the microbatch; never 0, so that padding would show."""
    assert temperature == SETTINGS.temperature
    tokens_BT, first_B = batch["tokens_BT"], batch.get("first_B")
    time_BT = np.broadcast_to(np.arange(tokens_BT.shape[1]), tokens_BT.shape)
    if "length_P" in batch:
        time_BT = time_BT + np.repeat(batch["length_P"], len(tokens_BT) // len(batch["length_P"]))[:, None]
    value_BT = -0.01 * (1 + tokens_BT) * (1 + time_BT) * (1.0 if which == "current" else 0.9)
    if first_B is None:
        return value_BT
    index_BT = np.minimum(first_B[:, None] + np.arange(batch["mask_BT"].shape[1]), tokens_BT.shape[1] - 1)
    return np.take_along_axis(value_BT, index_BT, axis=1)


def test_rows_are_prompts_times_responses() -> None:
    """Guards the [P, G] layout: row p G + g is response g of prompt p, its own tokens the targets; invalid rewards are 0."""
    batch, reward_PG, valid_PG = responses_batch([scored("a", (2, 1)), scored("b", (3, 2))])
    np.testing.assert_array_equal(batch["tokens_BT"][2, :6], [1, 2, 3, 3, 3, 0])
    np.testing.assert_array_equal(batch["mask_BT"].sum(-1), [2, 1, 3, 2])
    assert batch["mask_BT"][:, :2].sum() == 0
    np.testing.assert_array_equal(reward_PG, [[0, 0], [0, 1]])
    np.testing.assert_array_equal(valid_PG, [[True, False], [True, True]])


def test_groups_of_different_sizes_are_refused() -> None:
    """Guards that layout."""
    with pytest.raises(ValueError, match=r"different sizes in one batch: \[2, 3\]"):
        responses_batch([scored("a", (2, 2)), scored("b", (2, 2, 2))])


def test_mismatch_is_of_tokens_by_hand() -> None:
    """Guards the figure that says whether sampler and learner are the same policy: token by token, padding not counted."""
    sampler_BT = np.array([[0, -1.0, -2, 0], [0, -3, 0, 0], [0, -4, 0, 0], [0, 0, -5, 0]], np.float32)
    mask_BT = np.array([[0, 1, 1, 0], [0, 1, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0]], np.float32)
    logp_BT = np.array([[9, -1.25, -1.5, 9], [9, -3, 9, 9], [9, -4, 9, 9], [9, 9, -5.1, 9]])
    found = logp_mismatch(sampler_BT, logp_BT, mask_BT > 0)
    assert found["logp_mismatch_max"] == 0.5
    assert found["logp_mismatch_mean"] == pytest.approx((0.25 + 0.5 + 0 + 0 + 0.1) / 5)
    assert found["logp_mismatch_response_max"] == pytest.approx(0.25)  # +0.25 - 0.5
    assert logp_mismatch(sampler_BT, logp_BT, np.zeros((4, 4), bool)) == {}


def test_only_tokens_of_the_same_weights_are_compared() -> None:
    """Guards the mismatch against counting what other weights sampled, which is another policy's."""
    group = scored("a", (2, 1)).group
    targets_BT = np.array([[0, 0, 1, 1], [0, 0, 1, 0]], np.float32)
    np.testing.assert_array_equal(fresh_tokens([group], targets_BT, 0), targets_BT > 0)
    assert not fresh_tokens([group], targets_BT, 1).any()
    updated = dataclasses.replace(group, versions=(np.array([0, 1]), np.array([1])))
    np.testing.assert_array_equal(fresh_tokens([updated], targets_BT, 1), [[0, 0, 0, 1], [0, 0, 1, 0]])
    assert (staleness(updated, 1), staleness(updated, 3), staleness(group, 2)) == ([1, 0], [3, 2], [2, 2])


def test_the_end_counts_once_where_it_is_the_padding_too() -> None:
    """Guards a tokenizer whose pad id is its end-of-sequence id: targets go by length, not by token."""
    group = scored("a", (3, 1)).group
    ended = tuple(np.append(response[:-1], 0).astype(np.int32) for response in group.responses)
    mine = dataclasses.replace(scored("a", (3, 1)), group=dataclasses.replace(group, responses=ended))
    batch, _, _ = responses_batch([mine], pad_id=0)
    np.testing.assert_array_equal(batch["mask_BT"][:, :6], [[0, 0, 1, 1, 1, 0], [0, 0, 1, 0, 0, 0]])


def test_what_the_environment_wrote_is_no_target() -> None:
    """Guards turns of a conversation: tokens of the environment have no mask, and no sampler's log-probability either."""
    actions = (np.array([True, False, False, True]), np.array([True, True]))
    of_turns = answers((4, 2), (1.0, 0.0), prompt=2, actions=actions)
    batch, _, _ = responses_batch([of_turns])
    np.testing.assert_array_equal(batch["mask_BT"][:, :7], [[0, 0, 1, 0, 0, 1, 0], [0, 0, 1, 1, 0, 0, 0]])
    np.testing.assert_array_equal(batch["sampler_logp_BT"] != 0, batch["mask_BT"] > 0)
    nothing = answers((4, 2), (1.0, 0.0), prompt=2, actions=(np.zeros(4, bool), actions[1]))
    assert OnlineBatch([nothing], SETTINGS, version=0).score(fake_log_probs) == 0  # one response alone has no comparison


MIXED = [
    answers((3, 9, 20), (1.0, 0.0, 2.0), prompt=40),
    answers((17, 2, 5), (0.5, np.nan, 3.0), prompt=3),
    answers((1, 1, 30), (np.nan, np.nan, 1.0), prompt=25),
]


LONG_PROMPTS = [
    answers((3, 9, 20), (1.0, 0.0, 2.0), prompt=40),
    answers((17, 2, 5), (0.5, np.nan, 3.0), prompt=50),
    answers((1, 1, 30), (np.nan, np.nan, 1.0), prompt=33),
]


@pytest.mark.parametrize("algorithm", ["mdloo", "online_dpo"])
@pytest.mark.parametrize(
    ("groups", "microbatch", "layout"),
    [
        (MIXED, 2, "first_B"),
        (MIXED, 4, "first_B"),
        (MIXED, 64, "mask_BT"),
        (LONG_PROMPTS, 4, "prompt_PS"),
        (LONG_PROMPTS, 64, "prompt_PS"),
    ],
)
def test_microbatches_hold_every_response_once(
    algorithm: str, groups: list[ScoredGroup], microbatch: int, layout: str
) -> None:
    """Guards the cut into microbatches, windows and shared prompts, by reading each response's arrays back out of them."""
    settings = dataclasses.replace(SETTINGS, algorithm=algorithm, microbatch=microbatch)
    batch = OnlineBatch(groups, settings, version=0)
    assert batch.score(fake_log_probs) == {"mdloo": 5, "online_dpo": 4}[algorithm]
    known = {tuple(r.tolist()): (g, j) for g in groups for j, r in enumerate(g.group.responses)}
    parts, found = batch.parts_of(1) if algorithm == "mdloo" else batch.parts_of(0), []
    assert any(layout in part for part in parts) or algorithm == "online_dpo"
    for part in parts:
        for row, length in enumerate(part.get("length_P", ())):
            prompt = next(g for g in groups if len(g.group.prompt_T) == length).group.prompt_T
            np.testing.assert_array_equal(part["prompt_PS"][row, :length], prompt)
        assert len(part["tokens_BT"]) <= microbatch
        own = fake_log_probs(part, "current", SETTINGS.temperature) if algorithm == "mdloo" else None
        for row in np.flatnonzero(part["mask_BT"].any(-1)):
            at = np.flatnonzero(part["mask_BT"][row])
            tokens = part["tokens_BT"][row][at + (part["first_B"][row] if "first_B" in part else 0)]
            group, j = known[tuple(tokens.tolist())]
            found.append((id(group), j))
            np.testing.assert_array_equal(part["sampler_logp_BT"][row][at], group.group.logps[j])
            if own is not None:
                np.testing.assert_allclose(part["behavior_logp_BT"][row][at], own[row][at], rtol=1e-6)
            else:
                half = len(part["advantage_B"]) // 2
                assert part["advantage_B"][row] == (1.0 if row < half else -1.0)  # chosen first, then rejected
    assert len(set(found)) == len(found) == {"mdloo": 5, "online_dpo": 4}[algorithm]


def test_a_constant_added_to_a_prompts_rewards_changes_nothing() -> None:
    """Guards advantages, with the KL to the reference inside R; constants that float32 adds without rounding."""
    shift = (8.0, -1024.0, 2.0)
    moved = [dataclasses.replace(g, reward_G=g.reward_G + np.float32(c)) for g, c in zip(MIXED, shift, strict=True)]
    first, second = (OnlineBatch(groups, SETTINGS, version=0) for groups in (MIXED, moved))
    assert first.score(fake_log_probs) == second.score(fake_log_probs) == 5
    for plain, other in zip(first.parts_of(0), second.parts_of(0), strict=True):
        np.testing.assert_allclose(other["advantage_B"], plain["advantage_B"], atol=1e-6)
    advantages = np.concatenate([part["advantage_B"] for part in first.parts_of(0)])
    assert abs(advantages.sum()) < 1e-5
    assert np.abs(advantages).max() > 0.5


def test_only_the_passes_that_are_needed_are_made() -> None:
    """Guards the time of an update: no reference without beta; theta_k from the first inner step unless R needs it."""
    made: list[str] = []

    def counted(batch: Batch, which: str, temperature: float) -> np.ndarray:
        made.append(which)
        return fake_log_probs(batch, which, temperature)

    for algorithm, beta, expected in (
        ("mdloo", 0.0, []),
        ("mdloo", 0.1, ["current", "reference"]),
        ("grpo", 0.1, ["reference"]),
        ("grpo", 0.0, []),
        ("online_dpo", 0.1, ["reference"]),
    ):
        made.clear()
        batch = OnlineBatch(MIXED, dataclasses.replace(SETTINGS, algorithm=algorithm, beta=beta), version=0)
        batch.score(counted)
        assert list(dict.fromkeys(made)) == expected
        assert ("behavior_logp_BT" in batch.parts_of(0)[0]) == ("current" in expected)
    full = OnlineBatch(MIXED, dataclasses.replace(SETTINGS, kl="full"), version=0)
    full.score(counted)
    assert ["behavior_logp_BT" in full.parts_of(inner)[0] for inner in (0, 1)] == [False, True]


def test_staleness_is_measured_and_reported() -> None:
    """Guards the weights' metrics by hand, and that fresh responses have none of the sampler's rounding in theirs."""
    stale = [answers((2, 3), (1.0, 0.0), prompt=4, version=5), answers((2, 4), (1.0, 0.0), prompt=4, version=3)]
    batch = OnlineBatch(stale, dataclasses.replace(SETTINGS, beta=0.0), version=5)
    assert batch.score(fake_log_probs) == 4
    parts = batch.parts_of(0)
    np.testing.assert_array_equal(parts[0]["stale_B"], [False, False, True, True])
    logp_BT = fake_log_probs(parts[0], "current", SETTINGS.temperature)
    measured = [{"logp_BT": logp_BT, "log_ratio_B": np.zeros(4, np.float32), "loss": np.float32(0.5)}]
    batch.learned(0, measured)
    update = batch.report(measured, {})
    own = [(logp_BT * parts[0]["mask_BT"])[row].sum() for row in range(4)]
    weight = [1.0, 1.0, *(min(np.exp(own[2 + j] - stale[1].group.logps[j].sum()), 2.0) for j in range(2))]
    assert update.metrics["staleness_max"] == 2
    assert update.metrics["staleness_mean"] == 1
    assert update.metrics["importance_weight_mean"] == pytest.approx(np.mean(weight), rel=1e-5)
    assert update.metrics["importance_weight_min"] == pytest.approx(min(weight), rel=1e-5)
    assert update.metrics["importance_effective_fraction"] == pytest.approx(sum(weight) ** 2 / 4 / np.square(weight).sum())
    fresh, old = update.groups
    np.testing.assert_allclose(fresh.logp_G, own[:2], rtol=1e-5)
    assert fresh.mismatch_G[0] == pytest.approx(
        np.abs((logp_BT * parts[0]["mask_BT"])[0][4:6] - stale[0].group.logps[0]).max(), rel=1e-5
    )
    assert np.isnan(old.mismatch_G).all()
    assert np.isnan(fresh.ref_logp_G).all()
    np.testing.assert_allclose(fresh.advantage_G, [1, -1])
    assert fresh.counted_G.all()


def test_prompts_are_not_shared_where_rows_are_cut_over_a_mesh() -> None:
    """Guards data parallelism: the flat row of shared prompts cannot be cut, so every device would compute all of it."""
    batch = OnlineBatch(LONG_PROMPTS, dataclasses.replace(SETTINGS, microbatch=64), version=0, share_prompts=False)
    batch.score(fake_log_probs)
    assert not any("prompt_PS" in part for part in batch.parts_of(0))
