"""Samplers and the committee: nobody answers without acknowledged weights, and every answer says whose it is."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from actors.host import InlineHandle, call
from actors.sampler import Acknowledged, Committee, PolicySpec, Sampler, UnacknowledgedError
from actors.streams import InlineStreamingHandle, items
from actors.weights import WeightStore
from afm_rl.types import GenerationRequest, Group, Refused
from afm_rl.weights import DigestMismatchError
from tests.actors.toy_policy import CONFIG, ENGINE, SPEC, damaged, not_finite, request, weights

REQUEST = request("r", 5, 1)


def sampler() -> Sampler:
    return Sampler(engine=ENGINE)


def groups(actor: Committee, policy: str, *requests: GenerationRequest) -> list[Group]:
    """The answers in the order of the requests; none may be refused."""
    found = sorted(actor.answer(policy, requests), key=lambda one: one.index)
    assert all(isinstance(one.result, Group) for one in found)
    return [one.result for one in found]  # type: ignore[misc]


def tokens(actor: Committee, policy: str, asked: GenerationRequest = REQUEST) -> list[int]:
    return groups(actor, policy, asked)[0].responses[0].tolist()


def test_a_sampler_without_weights_refuses() -> None:
    """Guards the protocol: no weights, or weights that arrived damaged, and nothing is generated."""
    actor = sampler()
    with pytest.raises(RuntimeError, match="'sft', but no weights of it were delivered here; held: none"):
        actor.answer("sft", [REQUEST])
    unversioned = dataclasses.replace(weights("sft", 1), version=-1)
    for bad in (damaged(weights("sft", 1)), not_finite("sft", 1), unversioned):
        with pytest.raises(ValueError, match=r"policy 'sft' (version 1|have version -1)"):
            actor.load(bad, SPEC)
        assert actor.members() == []
        with pytest.raises(RuntimeError, match="held: none"):
            actor.answer("sft", [REQUEST])


def test_a_sampler_acknowledges_and_stamps() -> None:
    """Guards staleness: the digest that comes back is that of the bytes, the answers carry policy and version."""
    actor = sampler()
    first, second = weights("mdloo", 1), weights("mdloo", 2, seed=1)
    assert [actor.load(first, SPEC)] == actor.held() == [Acknowledged("mdloo", 1, first.digest)]
    [before] = groups(actor, "mdloo", REQUEST)
    assert (before.id, before.policy, before.version) == ("r", "mdloo", 1)
    assert [actor.load(second, SPEC)] == actor.held() == [Acknowledged("mdloo", 2, second.digest)]
    assert second.digest != first.digest
    [after] = groups(actor, "mdloo", REQUEST)
    assert after.version == 2
    assert before.responses[0].tolist() != after.responses[0].tolist()


def test_weights_it_will_not_take_leave_the_last_good_ones() -> None:
    """Guards a sampler in service: damaged bytes, or values that are not finite, and it keeps its version."""
    actor = sampler()
    actor.load(weights("mdloo", 1), SPEC)
    whole = tokens(actor, "mdloo")
    with pytest.raises(DigestMismatchError, match="version 2 are damaged"):
        actor.load(damaged(weights("mdloo", 2, seed=1)), SPEC)
    with pytest.raises(ValueError, match="version 2 hold values that are not finite"):
        actor.load(not_finite("mdloo", 2), SPEC)
    with pytest.raises(ValueError, match="not finite"):  # in an engine of its own: another shape
        actor.load(not_finite("mdloo", 2), dataclasses.replace(SPEC, stop_ids=(4,)))
    assert groups(actor, "mdloo", REQUEST)[0].version == 1
    assert tokens(actor, "mdloo") == whole
    assert actor.held() == [Acknowledged("mdloo", 1, weights("mdloo", 1).digest)]


def test_a_sampler_follows_one_policy() -> None:
    """Guards memory: another policy replaces the one held, in the same engine."""
    actor = sampler()
    actor.load(weights("sft", 1), SPEC)
    tokens(actor, "sft")
    did = actor.use()
    actor.load(weights("mdloo", 1, seed=1), SPEC)
    assert actor.members() == ["mdloo"]
    assert groups(actor, "mdloo", REQUEST)[0].policy == "mdloo"
    assert actor.use().compiled_programs == did.compiled_programs > 0
    assert actor.use().steps > did.steps
    with pytest.raises(RuntimeError, match="'sft', but no weights"):
        actor.answer("sft", [REQUEST])


def test_other_weights_of_the_same_version_are_other_weights() -> None:
    """Guards the cache of prefixes: version 0 of a policy in training, and version 0 of its folder, are two."""
    long = request("long", *range(4, 11), *range(4, 11), *range(4, 11))
    actor, fresh = sampler(), sampler()
    actor.load(weights("mdloo", 0), SPEC)
    first = groups(actor, "mdloo", long)[0]
    for one in (actor, fresh):
        one.load(weights("mdloo", 0, seed=1), SPEC)
    again, expected = groups(actor, "mdloo", long)[0], groups(fresh, "mdloo", long)[0]
    assert again.responses[0].tolist() == expected.responses[0].tolist() != first.responses[0].tolist()
    np.testing.assert_allclose(again.logps[0], expected.logps[0], atol=1e-5)


def test_a_committee_answers_for_each_member() -> None:
    """Guards 4.3.2: members side by side, each with its own weights; those not kept are gone."""
    committee = Committee(engine=ENGINE)
    for seed, name in enumerate(("sft", "dpo", "mdloo")):
        committee.load(weights(name, seed, seed=seed), SPEC)
    assert committee.members() == ["dpo", "mdloo", "sft"]
    answers = {name: groups(committee, name, REQUEST)[0] for name in committee.members()}
    assert {(name, g.policy) for name, g in answers.items()} == {(name, name) for name in answers}
    assert len({str(g.responses[0].tolist()) for g in answers.values()}) == 3
    did = committee.use()
    committee.keep_only(["sft"])
    assert (committee.use().response_tokens, committee.use().pages) == (did.response_tokens, did.pages // 3)
    with pytest.raises(RuntimeError, match="'dpo', but no weights of it were delivered here; held: sft"):
        committee.answer("dpo", [REQUEST])
    assert tokens(committee, "sft") == answers["sft"].responses[0].tolist()


def test_another_shape_under_the_same_name_is_a_new_engine() -> None:
    """Guards a policy whose stop ids change between rounds."""
    committee = Committee(engine=ENGINE)
    committee.load(weights("sft", 1), SPEC)
    whole = tokens(committee, "sft")
    committee.load(weights("sft", 1), PolicySpec(CONFIG, stop_ids=(whole[0],)))
    assert tokens(committee, "sft") == whole[:1]


def test_a_request_that_can_never_run_is_its_own_error() -> None:
    """Guards the rest of a batch: what is refused says why, by name, and everybody else is answered."""
    actor = sampler()
    actor.load(weights("sft", 1), SPEC)
    adapted = dataclasses.replace(REQUEST, id="adapted", adapter="none such")
    asked = [REQUEST, request("empty"), request("long", *[5] * 40), adapted, request("s", 5, 2)]
    answered = {one.index: one.result for one in actor.answer("sft", asked)}
    refused = {i: one for i, one in answered.items() if isinstance(one, Refused)}
    assert {i: one.id for i, one in refused.items()} == {1: "empty", 2: "long", 3: "adapted"}
    assert all(repr(one.id) in one.reason for one in refused.values())
    assert [answered[0].id, answered[4].id] == ["r", "s"]


def test_streams_share_the_batch_and_may_use_the_same_ids() -> None:
    """Guards several readers of one engine: each gets its own answers, whatever the other's are called."""
    actor = sampler()
    actor.load(weights("sft", 1), SPEC)
    alone = [tokens(actor, "sft", request("r", 5, 1)), tokens(actor, "sft", request("r", 7, 2))]
    before = actor.use()
    one, two = (actor.answer("sft", [request("r", *prompt)]) for prompt in ((5, 1), (7, 2)))
    first = next(one)
    second = next(two)
    assert [first.result.responses[0].tolist(), second.result.responses[0].tolist()] == alone
    assert first.result.id == second.result.id == "r"
    assert [*one, *two] == []
    assert actor.use().since(before).response_tokens == sum(map(len, alone))


def test_a_reader_that_goes_away_leaves_nothing_behind() -> None:
    """Guards the engine's memory: requests that nobody waits for are given up, and their pages are free again."""
    actor = sampler()
    actor.load(weights("sft", 1), SPEC)
    stream = actor.answer("sft", [request("short", 5, 1, tokens=1), request("long", 7, 2, tokens=40)])
    assert next(stream).result.id == "short"
    stream.close()
    use = actor.use()
    assert (use.running, use.waiting) == (0, 0)
    assert use.free_pages == use.pages
    assert tokens(actor, "sft") == tokens(actor, "sft")


def started_anew() -> tuple[InlineHandle, InlineStreamingHandle, InlineStreamingHandle]:
    """A store, a sampler and a committee that have been given weights and were then lost."""
    store = InlineHandle("weights", WeightStore, {})
    told = {"engine": ENGINE, "store": store}
    follower = InlineStreamingHandle("sampler-0", Sampler, {**told, "name": "sampler-0"})
    members = InlineStreamingHandle("committee-0", Committee, {**told, "name": "committee-0"})
    for seed, name in enumerate(("sft", "dpo")):
        digest = call(store, "publish", weights(name, 1, seed=seed))
        call(store, "assign", ["sampler-0"], name, SPEC, digest=digest)
        call(store, "assign", ["committee-0"], name, SPEC, digest=digest, beside=["sft"])
    for handle in (follower, members):
        handle.end()
    return store, follower, members


def test_one_started_anew_takes_its_weights_from_the_store() -> None:
    """Guards a restart: sampler and committee come back with what they were last given, and answer alike."""
    _, follower, members = started_anew()
    assert [[one.policy for one in call(handle, "held")] for handle in (follower, members)] == [["dpo"], ["sft", "dpo"]]
    for handle, policy, seed in ((follower, "dpo", 1), (members, "sft", 0), (members, "dpo", 1)):
        [one] = items(handle.stream("answer", policy, [REQUEST]))
        fresh = sampler()
        fresh.load(weights(policy, 1, seed=seed), SPEC)
        assert one.result.responses[0].tolist() == tokens(fresh, policy)


def test_one_started_anew_answers_nobody_before_it_has_said_what_it_holds() -> None:
    """Guards against a restart that nobody has noticed: no token before the weights were acknowledged."""
    _, follower, _ = started_anew()
    with pytest.raises(UnacknowledgedError, match="asked for policy 'dpo' by someone who does not know"):
        list(items(follower.stream("answer", "dpo", [REQUEST])))
    call(follower, "held")
    assert len(list(items(follower.stream("answer", "dpo", [REQUEST])))) == 1


def test_one_started_anew_comes_back_without_what_it_cannot_load() -> None:
    """Guards a restart against weights that nobody can load: it says that it does not hold them, and can be given others."""
    store, follower, _ = started_anew()
    digest = call(store, "publish", not_finite("mdloo", 3))
    call(store, "assign", ["sampler-0"], "mdloo", SPEC, digest=digest)
    follower.end()
    assert call(follower, "held") == []
    good = weights("mdloo", 4)
    assert call(follower, "load", good, SPEC) == Acknowledged("mdloo", 4, good.digest)
