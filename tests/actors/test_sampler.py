"""Samplers and the committee: nobody answers without acknowledged weights, and every answer says whose it is."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import pytest

from actors.sampler import Committee, PolicySpec, Sampler
from afm_rl.config import ModelConfig
from afm_rl.parameters import ParamSpec, param_specs
from afm_rl.types import GenerationRequest, Group, Weights
from afm_rl.weights import DigestMismatchError, flatten

CONFIG = ModelConfig(11, 8, 16, 1, 2, 1, 4, max_positions=48)
SPEC = PolicySpec(CONFIG, stop_ids=(3,))


def weights(policy: str, version: int, seed: int = 0) -> Weights:
    rng = np.random.default_rng(seed)

    def draw(spec: ParamSpec) -> np.ndarray:
        return np.ones(spec.shape, np.float32) if spec.std is None else rng.normal(size=spec.shape).astype(np.float32)

    params = jax.tree.map(draw, param_specs(CONFIG), is_leaf=lambda x: isinstance(x, ParamSpec))
    return flatten(params, policy=policy, version=version)


def damaged(good: Weights) -> Weights:
    buffers = {name: buffer.copy() for name, buffer in good.buffers.items()}
    buffers["float32"].view(np.uint8)[0] ^= 1
    return dataclasses.replace(good, buffers=buffers)


REQUEST = GenerationRequest("r", np.array([5, 1], np.int32), max_tokens=16, temperature=0.0)


def answer(group: Group) -> list[int]:
    return group.responses[0].tolist()


def test_a_sampler_without_weights_refuses() -> None:
    """Guards the protocol: no weights, or weights that arrived damaged, and nothing is generated."""
    sampler = Sampler(max_batch=4)
    with pytest.raises(RuntimeError, match="no weights yet"):
        sampler.generate([REQUEST])
    with pytest.raises(DigestMismatchError):
        sampler.load(damaged(weights("sft", 1)), SPEC)
    with pytest.raises(RuntimeError, match="no weights yet"):
        sampler.generate([REQUEST])


def test_a_sampler_acknowledges_and_stamps() -> None:
    """Guards staleness: the digest that comes back is that of the bytes, the answers carry policy and version."""
    sampler = Sampler(max_batch=4)
    first, second = weights("mdloo", 1), weights("mdloo", 2, seed=1)
    assert sampler.load(first, SPEC) == first.digest
    before = sampler.generate([REQUEST])[0]
    assert (before.policy, before.version) == ("mdloo", 1)
    assert sampler.load(second, SPEC) == second.digest != first.digest
    after = sampler.generate([REQUEST])[0]
    assert after.version == 2
    assert answer(before) != answer(after)


def test_a_damaged_delivery_leaves_the_last_good_weights() -> None:
    """Guards a sampler in service: it keeps its version, and says so."""
    sampler = Sampler(max_batch=4)
    sampler.load(weights("mdloo", 1), SPEC)
    with pytest.raises(DigestMismatchError, match="version 2"):
        sampler.load(damaged(weights("mdloo", 2, seed=1)), SPEC)
    assert sampler.generate([REQUEST])[0].version == 1


def test_a_sampler_follows_one_policy() -> None:
    """Guards memory: another policy replaces the one held."""
    sampler = Sampler(max_batch=4)
    sampler.load(weights("sft", 1), SPEC)
    sampler.load(weights("mdloo", 1, seed=1), SPEC)
    assert sampler.members() == ["mdloo"]
    assert sampler.generate([REQUEST])[0].policy == "mdloo"


def test_a_committee_answers_for_each_member() -> None:
    """Guards 4.3.2: members side by side, each with its own weights; those not kept are gone."""
    committee = Committee(max_batch=4)
    for seed, name in enumerate(("sft", "dpo", "mdloo")):
        committee.load(weights(name, seed, seed=seed), SPEC)
    assert committee.members() == ["dpo", "mdloo", "sft"]
    groups = {name: committee.sample(name, [REQUEST])[0] for name in committee.members()}
    assert {(name, g.policy) for name, g in groups.items()} == {(name, name) for name in groups}
    assert len({str(answer(g)) for g in groups.values()}) == 3
    committee.keep_only(["sft"])
    with pytest.raises(RuntimeError, match="'dpo', but no weights of it were delivered here; held: sft"):
        committee.sample("dpo", [REQUEST])
    assert answer(committee.sample("sft", [REQUEST])[0]) == answer(groups["sft"])


def test_another_shape_under_the_same_name_is_a_new_generator() -> None:
    """Guards a policy whose stop ids change between rounds."""
    committee = Committee(max_batch=4)
    committee.load(weights("sft", 1), SPEC)
    whole = answer(committee.sample("sft", [REQUEST])[0])
    committee.load(weights("sft", 1), PolicySpec(CONFIG, stop_ids=(whole[0],)))
    assert answer(committee.sample("sft", [REQUEST])[0]) == whole[:1]
