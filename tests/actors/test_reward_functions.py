"""The reward actor with the user's functions: weighted sums, failures that cost one response, scores in any company."""

from __future__ import annotations

import logging
import string
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from actors.reward import Reward, RewardSpec
from afm_rl.rewards.limits import SoftOverlong, Truncation
from afm_rl.rewards.problems import invalid_by_cause
from afm_rl.rewards.spec import FunctionSpec
from afm_rl.tokenizer import Tokenizer
from afm_rl.types import Group, Message, Prompt, ScoredGroup
from afm_rl.workers.pool import Task, WorkerStartError
from pretrain.tokenizer_training import MIN_VOCAB_SIZE, train_tokenizer

MODULE = """
import os
import time

def slow(prompt, response, data):
    time.sleep(1000)

def words(prompt, response, data):
    if response == "die":
        os._exit(1)
    if response == "fail":
        raise ValueError("no")
    if response == "nan":
        return float("nan")
    if response == "huge":
        return 10 ** 400
    if response == "text":
        return "five"
    assert prompt == "how many?" and data["id"] == "p" and data["messages"][0]["role"] == "user"
    return len(response.split()) + 0.25 * data["finished"]

def rank(prompt, responses, data):
    return [sorted(responses).index(response) for response in responses]

rank.batch = True

def short(prompt, responses, data):
    return [1.0]

short.batch = True

def seen(prompt, response, data):
    return float(data["transcript"] == "one\\nTOOL\\ntwo" and response == "one\\ntwo" and data["tokens"] == 5)
"""
PROMPT = Prompt("p", (Message("user", "how many?"),))


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> tuple[Tokenizer, str]:
    folder = tmp_path_factory.mktemp("tokenizer")
    texts = [f"one two {a}{b} TOOL" for a in string.ascii_lowercase for b in string.ascii_lowercase]
    return train_tokenizer(texts, vocab_size=MIN_VOCAB_SIZE + 16, folder=folder), str(folder)


@pytest.fixture(scope="module")
def user(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("user")
    (folder / "my_rewards.py").write_text(MODULE)
    return str(folder)


@pytest.fixture
def actor() -> Iterator[Reward]:
    actor = Reward()
    yield actor
    for function in actor._functions.values():
        function.close()


def spec(tokenizer: tuple[Tokenizer, str], user: str, *names: str, **more: object) -> RewardSpec:
    functions = tuple(FunctionSpec(name, Task(f"my_rewards:{name}", search_path=(user,))) for name in names)
    weights = dict.fromkeys(names, 2.0) | dict(more.pop("weights", {}))  # type: ignore[call-overload]
    return RewardSpec(tokenizer[1], None, weights, functions=functions, **more)  # type: ignore[arg-type]


def group(tokenizer: Tokenizer, *responses: str, cut: tuple[int, ...] = ()) -> Group:
    tokens = [tokenizer.encode(text) if j in cut else tokenizer.encode_response(text) for j, text in enumerate(responses)]
    logps = tuple(np.zeros(len(t), np.float32) for t in tokens)
    finished = tuple(j not in cut for j in range(len(responses)))
    return Group("p", np.array([4, 9], np.int32), tuple(np.array(t, np.int32) for t in tokens), logps, finished, "mdloo", 0)


def test_a_function_that_fails_costs_one_response(
    tokenizer: tuple[Tokenizer, str], user: str, actor: Reward, caplog: pytest.LogCaptureFixture
) -> None:
    """Guards a long run: every way to fail marks its own response, says why, is counted, and is logged once."""
    actor.load(spec(tokenizer, user, "words"))
    texts = ("a b", "die", "fail", "nan", "huge", "text", "a b c", "die", "fail")
    with caplog.at_level(logging.WARNING):
        (found,) = actor.score([group(tokenizer[0], *texts, cut=(6,))], [PROMPT])
    np.testing.assert_array_equal(found.valid_G, [True, False, False, False, False, False, True, False, False])
    np.testing.assert_array_equal(found.reward_G[found.valid_G], [4.5, 6.0])
    assert np.isnan(found.reward_G[~found.valid_G]).all()
    assert found.problems[1] == "words died: its worker process exited with 1"
    assert found.problems[2] == "words raised: ValueError: no"
    assert found.problems[3] == "words not_finite: returned nan"
    assert found.problems[5] == "words not_a_number: returned 'five'"
    assert actor.invalid_causes() == {"words_died": 2, "words_raised": 2, "words_not_finite": 2, "words_not_a_number": 1}
    assert len([r for r in caplog.records if "has no reward" in r.getMessage()]) == 4
    assert invalid_by_cause([found])["invalid"] == actor.invalid_responses() == 7
    assert invalid_by_cause([found])["invalid_words_died"] == 2


def test_slow_functions_share_a_calls_time(tokenizer: tuple[Tokenizer, str], user: str, actor: Reward) -> None:
    """Guards the actor: however many components are slow, a call ends in time, and no response is scored again for ever."""
    actor.load(spec(tokenizer, user, "slow", "words", budget_s=0.5))
    began_s = time.monotonic()
    (found,) = actor.score([group(tokenizer[0], "a", "b")], [PROMPT])
    assert time.monotonic() - began_s < 4.0
    assert [text.partition(":")[0] for text in found.problems] == ["slow timeout", "slow budget"]
    assert actor._functions["words"]([(PROMPT, [("a", {"finished": True})])], budget_s=5.0)[0][0].tolist() == [1.25]
    assert not np.isfinite(found.components["words"]).any()


def test_a_batch_function_sees_one_prompts_responses(tokenizer: tuple[Tokenizer, str], user: str, actor: Reward) -> None:
    """Guards the batch form: all responses to a prompt and no others, a number for each or none for any."""
    actor.load(spec(tokenizer, user, "rank", "short"))
    first, second = group(tokenizer[0], "b", "a", "c"), group(tokenizer[0], "z")
    found = actor.score([first, second], [PROMPT, PROMPT])
    np.testing.assert_array_equal(found[0].components["rank"], [1, 0, 2])
    np.testing.assert_array_equal(found[1].components["rank"], [0])
    assert not found[0].valid_G.any()
    assert found[0].problems[0] == "short not_a_number: returned [1.0] for 3 responses, not as many numbers"
    np.testing.assert_array_equal(found[1].reward_G, [2.0])


def test_the_environments_words_are_not_the_responses(tokenizer: tuple[Tokenizer, str], user: str, actor: Reward) -> None:
    """Guards several turns: rewards read the policy's own text, lengths count its own tokens, the transcript has all."""
    one, tool, two = (tokenizer[0].encode_response(text) for text in ("one", "TOOL", "two"))
    tokens = np.array([*one, *tool, *two], np.int32)
    mine = np.array([True] * len(one) + [False] * len(tool) + [True] * len(two))
    played = Group("p", np.array([4]), (tokens,), (np.zeros(len(tokens)),), (True,), "mdloo", 0, actions=(mine,))
    paid = ScoredGroup(played, np.float32([0.5]), np.array([True]), {"environment": np.float32([0.5])})
    length = {
        "length": SoftOverlong(max_tokens=len(one) + len(two), buffer_tokens=1),
        "weights": {"environment": 3.0, "length": 1.0},
    }
    actor.load(spec(tokenizer, user, "seen", **length))
    (found,) = actor.score([paid], [PROMPT])
    np.testing.assert_array_equal(found.reward_G, [2.0 + 1.5 - 1.0])
    assert set(found.components) == {"seen", "environment", "length"}
    with pytest.raises(ValueError, match="group 'p' was not played in one; give the stage an `environment`"):
        actor.score([played], [PROMPT])


def test_an_episode_that_failed_stays_invalid(tokenizer: tuple[Tokenizer, str], user: str, actor: Reward) -> None:
    """Guards several turns: a response whose environment failed has no reward even where only others count."""
    actor.load(spec(tokenizer, user, "words"))
    valid = np.array([True, False])
    paid = np.float32([1.0, np.nan])
    played = ScoredGroup(group(tokenizer[0], "a", "b"), paid, valid, {"environment": paid}, ("", "environment died: x"))
    (found,) = actor.score([played], [PROMPT])
    np.testing.assert_array_equal(found.valid_G, valid)
    assert found.problems == ("", "environment died: x")
    np.testing.assert_array_equal(found.components["environment"], paid)


def test_cut_responses_get_what_the_topology_says(tokenizer: tuple[Tokenizer, str], user: str, actor: Reward) -> None:
    """Guards the truncation policy in the sum, and that a cut response left out says so."""
    asked = group(tokenizer[0], "a b", "a b", cut=(1,))
    for truncation, expected in ((Truncation(), 4.0), (Truncation("zero"), 0.0), (Truncation("penalty", 1.5), 2.5)):
        actor.load(spec(tokenizer, user, "words", truncation=truncation))
        (found,) = actor.score([asked], [PROMPT])
        np.testing.assert_array_equal(found.reward_G, [4.5, expected])
    actor.load(spec(tokenizer, user, "words", truncation=Truncation("invalid")))
    (found,) = actor.score([asked], [PROMPT])
    np.testing.assert_array_equal(found.valid_G, [True, False])
    assert found.problems[1].startswith("truncated invalid: nothing ended the response")


def test_a_wrong_path_is_refused_at_load(tokenizer: tuple[Tokenizer, str], user: str, actor: Reward) -> None:
    """Guards the start of a run: before anything is generated, in one line."""
    with pytest.raises(WorkerStartError, match="'my_rewards' has no 'wrds'"):
        actor.load(spec(tokenizer, user, "wrds"))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_scores_are_the_same_bits_in_any_company(dtype: str, tmp_path: Path) -> None:
    """Guards replay after a kill: shuffled, split and single calls, under the product's own compilation."""
    program = Path(__file__).parents[1] / "programs" / "reward_bits.py"
    done = subprocess.run([sys.executable, str(program), dtype, str(tmp_path)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
