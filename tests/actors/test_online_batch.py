"""What becomes of scored groups before a policy update: their layout, and what is refused."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from actors.online_batch import responses_batch
from actors.online_report import fresh_tokens, logp_mismatch, staleness
from afm_rl.types import Group, ScoredGroup


def scored(name: str, lengths: tuple[int, ...]) -> ScoredGroup:
    """A prompt of two tokens with responses of these lengths, each of its own token."""
    responses = tuple(np.full(n, 3 + i, np.int32) for i, n in enumerate(lengths))
    logps = tuple(np.zeros(n, np.float32) for n in lengths)
    group = Group(name, np.array([1, 2], np.int32), responses, logps, (True,) * len(lengths), "p", 0)
    rewards = np.arange(len(lengths), dtype=np.float32)
    return ScoredGroup(group, rewards, np.array([n > 1 for n in lengths]))


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
