"""The weight store and delivery: what is current is held, and no more; a receiver that disagrees stops the run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from actors.host import ActorLostError, InlineHandle, call
from actors.sampler import PolicySpec
from actors.streams import InlineStreamingHandle
from actors.weights import WeightsOutOfSyncError, WeightsRefusedError, WeightStore, deliver, publish_folder
from afm_rl.config import ModelConfig
from afm_rl.huggingface import save_pretrained
from afm_rl.parameters import ParamSpec, param_specs
from afm_rl.types import Weights
from afm_rl.weights import DigestMismatchError, digest, flatten

CONFIG = ModelConfig(11, 8, 16, 1, 2, 1, 4)
SPEC = PolicySpec(CONFIG, stop_ids=(3,))


def weights(policy: str, version: int, value: float = 0.0) -> Weights:
    return flatten({"x": np.full(4, value, np.float32)}, policy=policy, version=version)


class Receiver:
    """Acknowledges what it got, or always the same."""

    events: list[tuple[str, str, int]] = []  # noqa: RUF012 (shared on purpose: the order over all receivers)

    def __init__(self, *, name: str, answers: str | None = None) -> None:
        self._name, self._answers = name, answers

    def load(self, weights: Weights, spec: PolicySpec) -> str:
        assert spec is SPEC
        self.events.append((self._name, weights.policy, weights.version))
        return self._answers or weights.digest


def receivers(*answers: str | None) -> list[InlineStreamingHandle]:
    Receiver.events = []
    return [
        InlineStreamingHandle(f"sampler-{i}", Receiver, {"name": str(i), "answers": answer})
        for i, answer in enumerate(answers)
    ]


def store_with(*published: Weights) -> InlineHandle:
    handle = InlineHandle("weights", WeightStore, {})
    for w in published:
        handle.submit("publish", w)
    return handle


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


def test_delivery_reaches_everyone() -> None:
    """Guards the online loop: each receiver loads the version the store holds, once."""
    w = weights("mdloo", 4)
    deliver(store_with(w), receivers(None, None), "mdloo", SPEC, digest=w.digest)
    assert Receiver.events == [("0", "mdloo", 4), ("1", "mdloo", 4)]


def test_delivery_raises_on_a_wrong_digest() -> None:
    """Guards against training on the answers of other weights: the message names the receivers that disagree."""
    w = weights("mdloo", 4)
    with pytest.raises(WeightsOutOfSyncError, match=rf"'mdloo': sampler-1 did not acknowledge digest {w.digest[:12]}"):
        deliver(store_with(w), receivers(None, "0badc0ffee"), "mdloo", SPEC, digest=w.digest)


def test_delivery_raises_when_the_store_holds_another_version() -> None:
    """Guards a publication that never arrived: receivers acknowledge the old bytes, which is not what was asked."""
    old, new = weights("mdloo", 4), weights("mdloo", 5, 1.0)
    with pytest.raises(WeightsOutOfSyncError, match="sampler-0"):
        deliver(store_with(old), receivers(None), "mdloo", SPEC, digest=new.digest)


def test_the_store_holds_what_is_in_use_and_no_more() -> None:
    """Guards its memory, and a receiver that is started anew: it is told what it was last given."""
    store = WeightStore()
    for name in ("sft", "dpo", "mdloo"):
        store.publish(weights(name, 1))
    samplers, committee = ["sampler-0", "sampler-1"], ["committee-0"]
    store.assign(samplers, "sft", SPEC)
    store.assign(committee, "sft", SPEC)
    store.assign(committee, "dpo", SPEC, ["sft"])
    assert [w.policy for w, _ in store.assigned("committee-0")] == ["sft", "dpo"]
    store.assign(samplers, "mdloo", SPEC)
    assert [(w.policy, spec) for w, spec in store.assigned("sampler-1")] == [("mdloo", SPEC)]
    assert store.policies() == ["dpo", "mdloo", "sft"]
    store.release(committee)
    assert store.policies() == ["mdloo"]
    assert store.assigned("committee-0") == store.assigned("nobody") == []
    store.publish(weights("mdloo", 2, 1.0))
    assert store.assigned("sampler-0")[0][0].version == 2  # what is published is about to be delivered
    store.forget("mdloo")
    assert store.assigned("sampler-0") == []
    store.publish(weights("mdloo", 1))  # a learner that went back behind what was published


class Returned(Receiver):
    """Takes from the store what it was last given, whenever it starts."""

    def __init__(self, *, name: str, store: InlineHandle) -> None:
        super().__init__(name=name)
        self._given = call(store, "assigned", f"sampler-{name}")
        self.events.append((name, "started", len(self._given)))

    def digest(self, policy: str) -> str:
        return {w.policy: w.digest for w, _ in self._given}[policy]


class DyingHandle(InlineStreamingHandle):
    """Its process dies over `load`."""

    def submit(self, method: str, *args: Any, **kwargs: Any) -> Any:
        return Lost() if method == "load" else super().submit(method, *args, **kwargs)

    def revive(self) -> Any:
        self.end()
        return self.ping()


class Lost:
    what = "sampler-1.load"

    def result(self, timeout_s: float) -> Any:
        raise ActorLostError(f"its process is gone, not {timeout_s:.0f} s late")


def test_a_receiver_that_dies_over_its_weights_returns_with_them() -> None:
    """Guards the order: what a receiver is given is noted before it is given, so that no moment of its death loses it."""
    w = weights("mdloo", 4)
    store, [other] = store_with(w), receivers(None)
    dying = DyingHandle("sampler-1", Returned, {"name": "1", "store": store})
    deliver(store, [other, dying], "mdloo", SPEC, digest=w.digest)
    assert Receiver.events == [("1", "started", 0), ("0", "mdloo", 4), ("1", "started", 1)]


class Refusing(Receiver):
    def load(self, weights: Weights, spec: PolicySpec) -> str:  # noqa: ARG002 (the face of a sampler)
        raise ValueError(f"weights of policy {weights.policy!r} hold values that are not finite")


def test_weights_that_are_refused_are_one_error_with_a_name() -> None:
    """Guards diagnosis: who refused, and why, in one line."""
    w = weights("mdloo", 4)
    refusing = InlineStreamingHandle("sampler-1", Refusing, {"name": "1"})
    with pytest.raises(
        WeightsRefusedError, match="sampler-1 goes on without the new weights: weights of policy 'mdloo' hold"
    ):
        deliver(store_with(w), [*receivers(None), refusing], "mdloo", SPEC, digest=w.digest)
