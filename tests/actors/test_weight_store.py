"""The weight store: what is current is held, and no more; who was given what, acknowledged or not."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from actors.host import InlineHandle, call
from actors.sampler import PolicySpec
from actors.weights import WeightsOutOfSyncError, WeightStore, publish_folder
from afm_rl.config import ModelConfig
from afm_rl.huggingface import save_pretrained
from afm_rl.parameters import ParamSpec, param_specs
from afm_rl.types import Weights
from afm_rl.weights import DigestMismatchError, digest, flatten

CONFIG = ModelConfig(11, 8, 16, 1, 2, 1, 4)
SPEC = PolicySpec(CONFIG, stop_ids=(3,))


def weights(policy: str, version: int, value: float = 0.0) -> Weights:
    return flatten({"x": np.full(4, value, np.float32)}, policy=policy, version=version)


def give(store: WeightStore, receivers: list[str], policy: str, digest: str, beside: Sequence[str] = ()) -> None:
    store.assign(receivers, policy, SPEC, digest=digest, beside=beside)
    store.settle(receivers)


def version_of(store: WeightStore, receiver: str) -> int:
    [(found, _)] = store.assigned(receiver)
    return found.version


def test_the_newest_version_is_held() -> None:
    """Guards staleness: a late publication of an older version is refused, the same one may come again (a retry)."""
    store = WeightStore()
    first, second = weights("mdloo", 1), weights("mdloo", 2, 1.0)
    assert store.publish(first) == first.digest
    assert store.publish(second) == second.digest
    with pytest.raises(ValueError, match="'mdloo': version 1 is older than the published 2"):
        store.publish(first)
    assert store.publish(second) == second.digest
    assert store.fetch("mdloo") is second


def test_policies_do_not_mix() -> None:
    """Guards a committee's store: names are apart, an unknown one lists what there is, a forgotten one is gone."""
    store = WeightStore()
    for name in ("sft", "dpo"):
        store.publish(weights(name, 3))
    assert store.fetch("sft").policy == "sft"
    with pytest.raises(KeyError, match="'ipo'; published: dpo, sft"):
        store.fetch("ipo")
    store.forget("dpo")
    store.forget("dpo")
    with pytest.raises(KeyError, match="'dpo'; published: sft"):
        store.fetch("dpo")


def test_a_folder_is_read_once_per_version(tmp_path: Path) -> None:
    """Guards the path from an exported policy to its samplers: the digest is that of the parameters. What was handed over is
    read again for who asks later, and must be what it was."""
    rng = np.random.default_rng(0)

    def make() -> dict[str, Any]:
        import jax

        return jax.tree.map(
            lambda s: rng.normal(size=s.shape).astype(np.float32),
            param_specs(CONFIG),
            is_leaf=lambda x: isinstance(x, ParamSpec),
        )

    params, other = make(), make()
    save_pretrained(params, tmp_path / "sft", config=CONFIG)
    store = InlineHandle("weights", WeightStore, {})
    assert publish_folder(store, "sft", 0, tmp_path / "sft") == digest(params)
    save_pretrained(other, tmp_path / "sft", config=CONFIG)
    assert publish_folder(store, "sft", 0, tmp_path / "sft") == digest(params)
    assert call(store, "fetch", "sft").digest == digest(params)
    with pytest.raises(DigestMismatchError, match="sft no longer holds what was published of policy 'sft'"):
        call(store, "fetch", "sft")
    assert publish_folder(store, "sft", 1, tmp_path / "sft") == digest(other)
    assert [call(store, "fetch", "sft").digest for _ in range(2)] == [digest(other)] * 2
    save_pretrained(params, tmp_path / "final", config=CONFIG)
    assert publish_folder(store, "sft", 1, tmp_path / "final") == digest(params)  # a folder of its own is another policy


def test_the_store_holds_what_is_in_use_and_no_more() -> None:
    """Guards its memory, and a receiver that is started anew: it is told what it was last given."""
    store = WeightStore()
    digests = {name: store.publish(weights(name, 1, value)) for value, name in enumerate(("sft", "dpo", "mdloo"))}
    samplers, committee = ["sampler-0", "sampler-1"], ["committee-0"]
    give(store, samplers, "sft", digests["sft"])
    give(store, committee, "sft", digests["sft"])
    give(store, committee, "dpo", digests["dpo"], beside=["sft"])
    assert [w.policy for w, _ in store.assigned("committee-0")] == ["sft", "dpo"]
    give(store, samplers, "mdloo", digests["mdloo"])
    assert [(w.policy, spec) for w, spec in store.assigned("sampler-1")] == [("mdloo", SPEC)]
    assert store.policies() == ["dpo", "mdloo", "sft"]
    store.release(committee)
    assert store.policies() == ["mdloo"]
    assert store.assigned("committee-0") == store.assigned("nobody") == []
    store.forget("mdloo")
    assert store.assigned("sampler-0") == []
    store.publish(weights("mdloo", 0))  # a learner that went back behind what was published


def test_one_that_returns_gets_what_it_was_given_not_what_is_newest() -> None:
    """Guards the moment between publishing and giving: a sampler that is started anew then must not run ahead, and weights
    that somebody still has to acknowledge are not freed for those who already have newer ones."""
    store = WeightStore()
    digests = [store.publish(weights("mdloo", 1, 1.0))]
    give(store, ["a", "b"], "mdloo", digests[0])
    for version in (2, 3, 4):
        digests.append(store.publish(weights("mdloo", version, version)))
        assert version_of(store, "b") == version - 1
        store.assign(["a", "b"], "mdloo", SPEC, digest=digests[-1])
        store.settle(["a"])  # b is away, and acknowledges nothing
        assert (version_of(store, "a"), version_of(store, "b")) == (version, version)
        assert store.versions("mdloo") == [1, version]
    store.settle(["b"])
    assert store.versions("mdloo") == [4]


def test_what_was_refused_is_not_assigned() -> None:
    """Guards a return after a refusal: the weights that were acknowledged before, not the ones nobody can load."""
    store = WeightStore()
    give(store, ["a"], "mdloo", store.publish(weights("mdloo", 1, 1.0)))
    bad = store.publish(weights("mdloo", 2, np.nan))
    store.assign(["a"], "mdloo", SPEC, digest=bad)
    store.withdraw(["a"])
    assert version_of(store, "a") == 1
    store.publish(weights("mdloo", 3, 3.0))
    assert store.versions("mdloo") == [1, 3]
    assert version_of(store, "a") == 1


def test_what_is_not_there_cannot_be_given() -> None:
    """Guards a publication that never arrived."""
    store = WeightStore()
    old, new = weights("mdloo", 4), weights("mdloo", 5, 1.0)
    for held in ("none", f"digest {old.digest[:12]} of version 4"):
        with pytest.raises(WeightsOutOfSyncError, match=f"the weight store holds {held}, not digest {new.digest[:12]}"):
            store.assign(["a"], "mdloo", SPEC, digest=new.digest)
        store.publish(old)
    assert store.assigned("a") == []
