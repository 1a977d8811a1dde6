"""Requests over samplers: each answered once, whoever dies, freezes or refuses; in which order things happen."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pytest

from actors.dispatch import Dispatch, DispatchOptions, RequestsRefusedError
from actors.failures import ActorsLostError
from afm_rl.types import Answered, GenerationRequest, Group, Refused
from tests.actors.fake_samplers import Everyone, FakeSampler, World, answer_to, request

INF = math.inf


def dispatch(samplers: Sequence[FakeSampler], requests: Sequence[GenerationRequest], **options: float) -> Dispatch:
    """A call on the samplers' own clock."""
    world, how = samplers[0].world, DispatchOptions(**{"window": 4, "deadline_s": 10.0} | options)
    return Dispatch(Everyone(samplers), requests, policy="p", options=how, wait=world.wait, clock=world.clock)


def run(samplers: Sequence[FakeSampler], requests: Sequence[GenerationRequest], **options: float) -> list[Answered]:
    return list(dispatch(samplers, requests, **options).answers())


def assert_each_once(requests: Sequence[GenerationRequest], answers: Sequence[Answered]) -> None:
    """Every request has one answer: its own, by its own seed."""
    assert sorted(one.index for one in answers) == list(range(len(requests)))
    for one in answers:
        assert isinstance(one.result, Group)
        expected = answer_to(requests[one.index])
        assert one.result.id == expected.id
        np.testing.assert_array_equal(one.result.responses, expected.responses)


def test_a_faster_sampler_answers_more() -> None:
    """Guards balance: everybody gets a like share first, then as they finish; nobody more than the window at a time."""
    world = World()
    fast, slow = FakeSampler("fast", world, seconds=1.0), FakeSampler("slow", world, seconds=4.0)
    requests = [request(i) for i in range(40)]
    answers = run([fast, slow], requests, window=4)
    assert_each_once(requests, answers)
    assert [len(world.of(name)[0].split()) - 1 for name in ("fast", "slow")] == [4, 4]
    assert (fast.most, slow.most) == (4, 4)
    assert fast.answered == pytest.approx(32, abs=3)
    assert world.now_s <= 45  # 80 with equal shares


def test_responses_are_what_a_window_counts() -> None:
    """Guards the memory of a sampler: a request for 8 responses is 8, and one larger than the window goes alone."""
    world = World()
    samplers = [FakeSampler("a", world), FakeSampler("b", world)]
    requests = [request(0, 8), *(request(i, 2) for i in range(1, 9)), request(9, 8)]
    assert_each_once(requests, run(samplers, requests, window=4))
    assert max(sampler.most for sampler in samplers) == 8
    assert "asked r0" in world.of("a") + world.of("b")
    assert all(len(event.split()) <= 3 for _, _, event in world.events)


def test_requests_of_a_dead_sampler_go_to_others_and_to_its_next_life() -> None:
    """Guards a death: what it had answered stays, the rest goes first to who has room, with its seeds."""
    world = World()
    dying, other = FakeSampler("dying", world, lives=(2, INF)), FakeSampler("other", world)
    requests = [request(i) for i in range(16)]
    answers = run([dying, other], requests, window=4)
    assert_each_once(requests, answers)
    dead, returned = (next(e for e in world.events if e[1:] == ("dying", what)) for what in ("died", "returned"))
    first = world.of("dying")[0].split()[1:]
    assert first == ["r0", "r2", "r4", "r6"]
    after = [event.split()[1:] for _, _, event in world.events[world.events.index(dead) :] if event.startswith("asked")]
    assert [name for some in after for name in some][:2] == ["r4", "r6"]
    assert not {"r0", "r2"} & {name for some in after for name in some}
    assert returned[0] == dead[0] + 3
    assert world.of("dying")[-1].startswith("asked")


def test_a_death_of_all_is_survived() -> None:
    """Guards a run whose samplers die together: it waits for one to return."""
    world = World()
    samplers = [FakeSampler(name, world, lives=(1, INF)) for name in "ab"]
    requests = [request(i) for i in range(8)]
    assert_each_once(requests, run(samplers, requests))


def test_a_frozen_sampler_is_killed_and_its_requests_go_on() -> None:
    """Guards against a process that lives and does nothing: after the deadline it is ended, like a dead one."""
    world = World()
    frozen, other = FakeSampler("frozen", world, lives=("frozen", INF)), FakeSampler("other", world)
    requests = [request(i) for i in range(8)]
    assert_each_once(requests, run([frozen, other], requests, deadline_s=10.0))
    assert world.of("frozen")[:3] == ["asked r0 r2 r4 r6", "killed", "returned"]
    assert next(at for at, _, event in world.events if event == "killed") == pytest.approx(10.0)


def test_a_slow_sampler_is_not_a_frozen_one() -> None:
    """Guards long responses: the deadline is between two groups, not for all of them."""
    world = World()
    slow = FakeSampler("slow", world, seconds=9.0)
    requests = [request(i) for i in range(4)]
    assert_each_once(requests, run([slow], requests, deadline_s=10.0))
    assert "killed" not in world.of("slow")


def test_silence_counts_only_while_somebody_listens() -> None:
    """Guards a sampler against a reader that is busy elsewhere: what it had no chance to hear was not silence."""
    world = World()
    slow, fast = FakeSampler("slow", world, seconds=100.0), FakeSampler("fast", world)
    requests, seen = [request(i) for i in range(6)], []
    for one in dispatch([slow, fast], requests, window=3, deadline_s=70.0).answers():
        world.now_s += 40.0  # an update of the learner's, say
        seen.append(one)
    assert_each_once(requests, seen)
    assert "killed" not in world.of("slow")


def test_a_request_that_kills_whoever_runs_it_ends_in_an_error() -> None:
    """Guards against dying for ever: each sampler may be lost so often, then the error says who was lost, and of what."""
    world = World()
    samplers = [FakeSampler(name, world, lives=(0,) * 99) for name in "ab"]
    with pytest.raises(ActorsLostError, match=r"answer 2 of 2 requests \(a: a.answer: its process") as caught:
        run(samplers, [request(0), request(1)], max_losses=2)
    assert str(caught.value).count("its process is gone") == 6
    assert [world.of(name).count("died") for name in "ab"] == [3, 3]


def test_one_who_does_not_return_is_done_without() -> None:
    """Guards a node that is gone: the others answer, and when there is none the wait for it ends."""
    world = World()
    gone, other = FakeSampler("gone", world, lives=(1, INF), returns=False), FakeSampler("other", world)
    requests = [request(i) for i in range(8)]
    assert_each_once(requests, run([gone, other], requests))
    alone = FakeSampler("alone", world, lives=(1, INF), returns=False)
    with pytest.raises(ActorsLostError, match="did not return within 120 s"):
        run([alone], requests)


def test_one_that_is_given_up_is_done_without() -> None:
    """Guards a sampler whose construction fails: it is lost for good, with its cause."""
    world = World()
    requests = [request(i) for i in range(8)]
    with pytest.raises(ActorsLostError, match="it will not come back"):
        run([FakeSampler("alone", world, lives=(1,))], requests)


def test_all_are_answered_before_a_refusal_is_raised() -> None:
    """Guards the rest of a batch: the error names the requests, and the answers of the others are not lost."""
    samplers = [FakeSampler("a", World(), refuses=frozenset({"r1", "r2"}))]
    requests = [request(i) for i in range(5)]
    seen = []
    with pytest.raises(RequestsRefusedError, match="2 of 5 requests cannot run: request 'r1' has an empty prompt; req"):
        seen.extend(group.id for _, group in dispatch(samplers, requests).groups())
    assert seen == ["r0", "r3", "r4"]
    mixed = run(samplers, requests)
    assert [one.result.id for one in mixed if isinstance(one.result, Refused)] == ["r1", "r2"]
    assert len(mixed) == 5


def test_groups_come_as_they_finish_with_the_index_of_their_request() -> None:
    """Guards who reads them: in which order they come, and which request each answers."""
    world = World()
    samplers = [FakeSampler("slow", world, seconds=5.0), FakeSampler("fast", world)]
    requests = [request(i) for i in range(6)]
    streamed = list(dispatch(samplers, requests).groups())
    assert [index for index, _ in streamed] == [1, 3, 5, 0, 2, 4]
    assert all(group.id == f"r{index}" for index, group in streamed)


def test_an_error_of_the_samplers_own_ends_the_call() -> None:
    """Guards against taking a mistake for a death: it rises at once, and what others work on is given up."""
    world = World()
    samplers = [FakeSampler("broken", world, breaks="no weights of it"), FakeSampler("other", world)]
    with pytest.raises(RuntimeError, match="no weights of it"):
        run(samplers, [request(i) for i in range(4)])
    assert world.of("other") == ["asked r1 r3", "given up"]
    assert "died" not in world.of("broken")


def test_a_stream_that_ends_too_early_is_an_error() -> None:
    """Guards against an answer that silently stays out."""
    [short] = samplers = [FakeSampler("short", World())]
    answers = dispatch(samplers, [request(0), request(1)]).groups()
    next(answers)
    short.open[0].left.clear()
    with pytest.raises(RuntimeError, match=r"short\.answer ended without answers to r1"):
        next(answers)


def test_a_reader_that_stops_gives_the_rest_up() -> None:
    """Guards the samplers' time: nobody reads on, so nobody need work on."""
    samplers = [FakeSampler(name, World()) for name in "a"]
    answers = dispatch(samplers, [request(i) for i in range(4)]).groups()
    next(answers)
    answers.close()
    assert samplers[0].world.of("a")[-1] == "given up"
