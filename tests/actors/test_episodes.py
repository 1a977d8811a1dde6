"""Episodes of several turns: token-exact conversations, what is trained on, how they end, and whose fault is whose."""

from __future__ import annotations

import string
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest

from actors.episodes import EpisodeOptions, play
from actors.failures import ActorsLostError
from actors.turn_tokens import TurnTokens
from afm_rl.environments.calculator import Calculator
from afm_rl.environments.hosts import LocalHost
from afm_rl.environments.interface import SingleTurn, StepResult
from afm_rl.tokenizer import Tokenizer
from afm_rl.types import GenerationRequest, Group, Message, Prompt
from pretrain.tokenizer_training import MIN_VOCAB_SIZE, train_tokenizer

OPTIONS = EpisodeOptions(responses=2, max_turns=4, max_tokens=200, max_context=400, seed=5)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    texts = [f"<call>{a}{b}</call> answer" for a in string.ascii_lowercase for b in string.ascii_lowercase]
    return train_tokenizer(texts, vocab_size=MIN_VOCAB_SIZE + 16, folder=tmp_path_factory.mktemp("tokenizer"))


def prompt(name: str, question: str, answer: str) -> Prompt:
    return Prompt(name, (Message("user", question),), checks=({"type": "answer", "value": answer},))


FIRST, SECOND = prompt("p", "What is 3*4+5?", "17"), prompt("q", "What is 2*2?", "4")


class Script:
    """A policy that says what it is told to: (prompt's id, response) -> its turns. Keeps every request."""

    def __init__(
        self, tokenizer: Tokenizer, turns: dict[tuple[str, int], list[str]], *, versions: Sequence[int] = (0,)
    ) -> None:
        self.tokenizer, self.turns, self.versions = tokenizer, turns, versions
        self.requests: list[list[GenerationRequest]] = []

    def __call__(self, requests: Sequence[GenerationRequest]) -> list[Group]:
        turn = len(self.requests)
        self.requests.append(list(requests))
        return [self._answer(request, turn) for request in requests]

    def _answer(self, request: GenerationRequest, turn: int) -> Group:
        name, _, rest = request.id.partition("/")
        numbers = [int(rest.split("/")[0])] if rest else list(range(request.num_responses))
        tokens = [self._tokens(self.turns[name, j][turn], request.max_tokens) for j in numbers]
        logps = tuple(np.full(len(t), -1.0 - turn, np.float32) for t in tokens)
        finished = tuple(t[-1] in self.tokenizer.stop_ids for t in tokens)
        version = self.versions[min(turn, len(self.versions) - 1)]
        return Group(request.id, request.prompt_T, tuple(tokens), logps, finished, "policy", version)

    def _tokens(self, text: str, limit: int) -> np.ndarray:
        end = self.tokenizer.eos_id if text.endswith("#") else self.tokenizer.end_of_turn_id
        return np.array([*self.tokenizer.encode(text.removesuffix("#")), end], np.int32)[:limit]


CALLS = {
    ("p", 0): ["<call>3*4</call>", "<call>12+5</call>", "answer 17"],
    ("p", 1): ["answer 18"],
    ("q", 0): ["<call>2*2</call>", "answer 4"],
    ("q", 1): ["<call>2*</call>", "answer 4"],
}


def test_a_conversation_is_the_engines_own_tokens(tokenizer: Tokenizer) -> None:
    """Guards exactness: every turn's prompt is the last one's, the sampled tokens and the environment's, as chats are."""
    script = Script(tokenizer, CALLS)
    first, second = play(script, [FIRST, SECOND], host=LocalHost(Calculator), tokenizer=tokenizer, options=OPTIONS)
    assert [len(asked) for asked in script.requests] == [2, 3, 1]
    chat = [
        *FIRST.messages,
        Message("assistant", "<call>3*4</call>"),
        Message("user", "<result>12</result>"),
        Message("assistant", "<call>12+5</call>"),
        Message("user", "<result>17</result>"),
        Message("assistant", "answer 17"),
    ]
    whole = np.concatenate([first.group.prompt_T, first.group.responses[0]])
    assert whole.tolist() == tokenizer.encode_chat(chat, add_generation_prompt=False)
    for turn, request in ((1, script.requests[1][0]), (2, script.requests[2][0])):
        assert request.prompt_T.tolist() == tokenizer.encode_chat(chat[: 1 + 2 * turn])
        assert request.id == f"p/0/{turn}"
    np.testing.assert_array_equal(first.reward_G, [1.0, 0.0])
    np.testing.assert_array_equal(second.reward_G, [1.0, 1.0])
    assert "<result>error: not arithmetic</result>" in tokenizer.decode(second.group.responses[1].tolist())
    np.testing.assert_array_equal(first.components["environment"], first.reward_G)


def test_the_policys_tokens_are_told_from_the_environments(tokenizer: Tokenizer) -> None:
    """Guards the loss: actions are the turns with their end, once; the environment's tokens have no log-probability."""
    first, _ = play(
        Script(tokenizer, CALLS), [FIRST, SECOND], host=LocalHost(Calculator), tokenizer=tokenizer, options=OPTIONS
    )
    group = first.group
    said = [tokenizer.encode_response(text) for text in CALLS["p", 0]]
    assert group.responses[0][group.actions[0]].tolist() == [token for turn in said for token in turn]
    expected = np.concatenate([np.full(len(turn), -1.0 - i) for i, turn in enumerate(said)])
    np.testing.assert_array_equal(group.logps[0][group.actions[0]], expected)
    np.testing.assert_array_equal(group.logps[0][~group.actions[0]], 0.0)
    assert group.actions[1].all()
    assert group.finished == (True, True)
    assert group.versions == ()


def test_one_turn_needs_no_actions(tokenizer: Tokenizer) -> None:
    """Guards the simplest case: a verifier as environment gives the groups that plain sampling gives."""
    script = Script(tokenizer, CALLS)
    verify = LocalHost(lambda: SingleTurn(lambda asked, said: float(asked.id in said or "18" in said)))
    (found,) = play(script, [FIRST], host=verify, tokenizer=tokenizer, options=OPTIONS)
    assert found.group.actions == ()
    assert len(script.requests) == 1
    np.testing.assert_array_equal(found.reward_G, [0.0, 1.0])


def test_seeds_follow_from_prompt_response_and_turn(tokenizer: Tokenizer) -> None:
    """Guards reproducibility: no two turns share a stream, and company changes none."""
    script, alone = Script(tokenizer, CALLS), Script(tokenizer, CALLS)
    play(script, [FIRST, SECOND], host=LocalHost(Calculator), tokenizer=tokenizer, options=OPTIONS)
    play(alone, [SECOND], host=LocalHost(Calculator), tokenizer=tokenizer, options=OPTIONS)
    seeds = {request.id: request.seed for asked in script.requests for request in asked}
    assert len(set(seeds.values())) == len(seeds) == 6
    assert {r.id: r.seed for asked in alone.requests for r in asked}.items() <= seeds.items()
    other = Script(tokenizer, CALLS)
    play(other, [FIRST], host=LocalHost(Calculator), tokenizer=tokenizer, options=replace(OPTIONS, seed=6))
    assert other.requests[0][0].seed != seeds["p"]


def test_how_an_episode_ends(tokenizer: Tokenizer) -> None:
    """Guards each end: out of turns, a turn that nothing ends, no room for an answer; `finished` says which were cut."""
    loop = {("p", j): ["<call>1</call>"] * 9 for j in range(2)}

    def ended(options: EpisodeOptions) -> tuple[Group, list[list[GenerationRequest]]]:
        script = Script(tokenizer, loop)
        (found,) = play(script, [FIRST], host=LocalHost(Calculator), tokenizer=tokenizer, options=options)
        return found.group, script.requests

    group, requests = ended(replace(OPTIONS, max_turns=3))
    assert len(requests) == 3
    assert group.finished == (True, True)
    assert group.actions[0][-1]  # no environment's word at the end, which nothing answers
    turn = len(tokenizer.encode_response("<call>1</call>"))
    group, requests = ended(replace(OPTIONS, turn_tokens=turn - 1))  # a whole call, but not the end of its turn
    assert (len(requests), group.finished) == (1, (False, False))
    group, requests = ended(replace(OPTIONS, max_tokens=turn + 4))
    assert (len(requests), group.finished) == (1, (False, False))
    assert len(group.responses[0]) == turn
    context = len(group.prompt_T) + turn + 4
    group, requests = ended(replace(OPTIONS, max_context=context))
    assert len(group.responses[0]) == turn
    assert requests[0][0].max_tokens == turn + 4


def test_another_stop_token_is_followed_by_the_end_of_turn(tokenizer: Tokenizer) -> None:
    """Guards the format: a turn that ended by the document's end is closed before the environment's words, as theirs."""
    script = Script(tokenizer, {("p", 0): ["<call>1</call>#", "answer 17"]})
    (found,) = play(script, [FIRST], host=LocalHost(Calculator), tokenizer=tokenizer, options=replace(OPTIONS, responses=1))
    tokens, mine = found.group.responses[0].tolist(), found.group.actions[0]
    at = tokens.index(tokenizer.eos_id)
    assert (tokens[at + 1], bool(mine[at]), bool(mine[at + 1])) == (tokenizer.end_of_turn_id, True, False)


def test_updated_weights_are_stamped_by_token(tokenizer: Tokenizer) -> None:
    """Guards staleness: a conversation across an update names the version of every token."""
    script = Script(tokenizer, CALLS, versions=(3, 4))
    first, _ = play(script, [FIRST, SECOND], host=LocalHost(Calculator), tokenizer=tokenizer, options=OPTIONS)
    assert first.group.version == 3
    changes = np.flatnonzero(np.diff(first.group.versions[0]))
    opening = len(TurnTokens(tokenizer).after(np.array([tokenizer.end_of_turn_id]), "<result>12</result>"))
    assert changes.tolist() == [len(tokenizer.encode_response("<call>3*4</call>")) + opening - 1]
    assert (first.group.versions[1] == 3).all()


class Faulty(Calculator):
    """Fails in the ways an environment can."""

    def reset(self, prompt: Prompt, seed: int) -> Sequence[Message]:
        if prompt.id == "q":
            raise OSError("no such episode")
        return super().reset(prompt, seed)

    def step(self, action: str) -> StepResult:
        return StepResult("\ud800") if action == "answer 18" else super().step(action)


def test_an_environment_that_fails_costs_its_episodes(tokenizer: Tokenizer) -> None:
    """Guards the loop: a reset that raises costs its prompt, a step its episode; the others end as they would."""
    first, second = play(
        Script(tokenizer, CALLS), [FIRST, SECOND], host=LocalHost(Faulty), tokenizer=tokenizer, options=OPTIONS
    )
    np.testing.assert_array_equal(first.valid_G, [True, False])
    assert first.problems[1].startswith("environment raised: an observation that cannot be encoded")
    assert not second.valid_G.any()
    assert second.problems == ("environment raised: OSError: no such episode",) * 2
    assert [len(r) for r in second.group.responses] == [0, 0]
    tight = replace(OPTIONS, max_context=4)
    (third,) = play(Script(tokenizer, CALLS), [FIRST], host=LocalHost(Calculator), tokenizer=tokenizer, options=tight)
    assert third.problems[0].startswith("environment too_long: it opens with")


def test_a_host_is_closed_whatever_ends_its_episodes(tokenizer: Tokenizer) -> None:
    """Guards worker processes: a batch whose samplers are lost leaves none behind."""

    class Closing(LocalHost):
        closed = False

        def close(self) -> None:
            self.closed = True

    def lost(_: Sequence[GenerationRequest]) -> list[Group]:
        raise ActorsLostError("no sampler is left")

    host = Closing(Calculator)
    with pytest.raises(ActorsLostError):
        play(lost, [FIRST], host=host, tokenizer=tokenizer, options=OPTIONS)
    assert host.closed
