"""The reward actor: components apart and weighted, responses that cannot be scored, and scores of one sequence at a time."""

from __future__ import annotations

import logging
import string
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

import actors.reward as reward_module
import actors.reward_model_scores as scores_module
from actors.artifacts import save_artifact
from actors.reward import Reward, RewardSpec
from afm_rl.config import ModelConfig
from afm_rl.parameters import init_params
from afm_rl.reward_model import init_heads, score
from afm_rl.tokenizer import Tokenizer
from afm_rl.types import GRADINGS, Group, Message, Prompt
from pretrain.tokenizer_training import MIN_VOCAB_SIZE, train_tokenizer


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> tuple[Tokenizer, str]:
    folder = tmp_path_factory.mktemp("tokenizer")
    texts = [f"yes {a}{b} no" for a in string.ascii_lowercase for b in string.ascii_lowercase]
    return train_tokenizer(texts, vocab_size=MIN_VOCAB_SIZE + 8, folder=folder), str(folder)


CONFIG = ModelConfig(MIN_VOCAB_SIZE + 8, 8, 16, 1, 2, 1, 4, max_positions=128)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Any]:
    """A reward model whose every head says something."""
    shapes = jax.eval_shape(lambda k: {"trunk": init_params(CONFIG, k), "heads": init_heads(CONFIG, k)}, jax.random.key(0))
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype(np.float32), shapes)
    folder = tmp_path_factory.mktemp("reward") / "model"
    save_artifact(folder, params, CONFIG)
    return str(folder), params


def loaded(tokenizer: tuple[Tokenizer, str], folder: str | None, **weights: float) -> Reward:
    actor = Reward()
    actor.load(RewardSpec(tokenizer[1], folder, weights))
    return actor


def sequences(count: int) -> list[np.ndarray]:
    """Token sequences of lengths on both sides of the padding's multiple of 32."""
    rng = np.random.default_rng(1)
    return [rng.integers(7, CONFIG.vocab_size, size=n).astype(np.int32) for n in rng.integers(1, 60, size=count)]


def alone(params: Any, tokens: np.ndarray) -> tuple[float, list[int]]:
    """Reward and grades of one sequence without any padding."""
    out = jax.jit(score, static_argnames="config")(params, tokens[None], np.array([len(tokens)]), config=CONFIG)
    return float(out.reward_B[0]), [int(np.argmax(out.grade_logits[name][0])) for name in GRADINGS]


def test_scores_are_those_of_each_sequence_alone(
    tokenizer: tuple[Tokenizer, str], model: tuple[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards batching: sorted by length, padded and cut into batches, every score still lands on its own sequence."""
    monkeypatch.setattr(scores_module, "LEAST_ROWS", 4)
    monkeypatch.setattr(scores_module, "PASS_TOKENS", 128)
    batch = sequences(10)
    found = loaded(tokenizer, model[0], model=1.0).sequence_scores(batch)
    turned = loaded(tokenizer, model[0], model=1.0).sequence_scores(batch[::-1])
    np.testing.assert_allclose(turned.reward_B[::-1], found.reward_B, rtol=1e-4)
    for i in (0, 4, 9):
        expected, grades = alone(model[1], batch[i])
        assert found.reward_B[i] == pytest.approx(expected, rel=1e-4)
        assert found.grades_B4[i].tolist() == grades
    assert len({round(float(r), 3) for r in found.reward_B}) == 10


def group(tokenizer: Tokenizer, name: str, *responses: str) -> Group:
    tokens = tuple(np.array(tokenizer.encode_response(r), np.int32) for r in responses)
    logps = tuple(np.zeros(len(t), np.float32) for t in tokens)
    return Group(name, np.array([4, 9], np.int32), tokens, logps, (True,) * len(tokens), "mdloo", 0)


def prompt(name: str, **check: str) -> Prompt:
    return Prompt(name, (Message("user", "?"),), checks=(check,))


YES = prompt("p", type="contains", text="yes")


def test_reranking_picks_the_best_of_each_prompt(
    tokenizer: tuple[Tokenizer, str], model: tuple[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards 4.3.2: the index within the prompt's own candidates, by the model, the checks, or both."""
    monkeypatch.setattr(scores_module, "LEAST_ROWS", 4)
    monkeypatch.setattr(scores_module, "PASS_TOKENS", 128)
    prompts = [YES, prompt("q", type="ends_with", text="no")]
    responses = [["a", "b", "yes", "d", "oh"], ["no", "yes"]]
    actor = loaded(tokenizer, model[0], model=1.0)
    chats = [tokenizer[0].encode_chat(p.messages) for p in prompts]
    sequences_ = [
        np.array([*chat, *tokenizer[0].encode_response(text)], np.int32)
        for chat, texts in zip(chats, responses, strict=True)
        for text in texts
    ]
    rewards = actor.sequence_scores(sequences_).reward_B
    assert actor.rerank(prompts, responses) == [int(rewards[:5].argmax()), int(rewards[5:].argmax())]
    assert loaded(tokenizer, model[0], model=1e-3, verifier=1.0).rerank(prompts, responses) == [2, 0]
    assert loaded(tokenizer, None, verifier=1.0).rerank(prompts, responses) == [2, 0]


def test_the_verifier_reads_the_text(tokenizer: tuple[Tokenizer, str]) -> None:
    """Guards programmatic rewards: 1 or 0 on the decoded response, its end marker not part of it, no model needed."""
    actor = loaded(tokenizer, None, verifier=2.0)
    upper = prompt("q", type="ends_with", text="no")
    groups = [group(tokenizer[0], "p", "yes", "no", "oh yes"), group(tokenizer[0], "q", "so no")]
    first, second = actor.score(groups, [YES, upper])
    np.testing.assert_array_equal(first.reward_G, [2, 0, 2])
    np.testing.assert_array_equal(second.reward_G, [2])
    assert first.valid_G.all()
    assert first.group is groups[0]
    assert actor.invalid_responses() == 0


def test_components_are_weighted_and_kept_apart(tokenizer: tuple[Tokenizer, str], model: tuple[str, Any]) -> None:
    """Guards a mixed reward: the sum by the weights, over prompt and response, with every component as it was."""
    actor = loaded(tokenizer, model[0], model=0.5, verifier=2.0)
    groups = [group(tokenizer[0], "p", "yes", "no"), group(tokenizer[0], "p", "so yes", "never", "yes")]
    scored = actor.score(groups, [YES, YES])
    for found, source, truth in zip(scored, groups, ([1, 0], [1, 0, 1]), strict=True):
        whole = [np.concatenate([source.prompt_T, r]) for r in source.responses]
        model_G = actor.sequence_scores(whole).reward_B
        np.testing.assert_allclose(found.components["model"], model_G, rtol=1e-5)
        np.testing.assert_array_equal(found.components["verifier"], truth)
        np.testing.assert_allclose(found.reward_G, 0.5 * model_G + 2.0 * np.array(truth), rtol=1e-5)
        assert found.reward_G.dtype == np.float32


def test_a_check_that_fails_spoils_one_response(
    tokenizer: tuple[Tokenizer, str], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Guards a long run: the response is marked, counted and logged with its prompt; the others keep their rewards."""

    def passes(prompt: Prompt, response: str) -> bool:
        del prompt
        if response == "no":
            raise ZeroDivisionError
        return True

    monkeypatch.setattr(reward_module, "passes", passes)
    actor = loaded(tokenizer, None, verifier=1.0)
    with caplog.at_level(logging.WARNING):
        (found,) = actor.score([group(tokenizer[0], "p", "yes", "no", "yes")], [YES])
    np.testing.assert_array_equal(found.valid_G, [True, False, True])
    np.testing.assert_array_equal(found.reward_G[found.valid_G], 1.0)
    assert actor.invalid_responses() == 1
    assert found.problems == ("", "verifier raised: ZeroDivisionError", "")
    assert actor.invalid_causes() == {"verifier_raised": 1}
    assert "response 1 to prompt p has no reward" in caplog.text


def test_a_component_without_weight_is_not_computed(tokenizer: tuple[Tokenizer, str]) -> None:
    """Guards cost: weight 0 needs neither a model nor checks."""
    actor = loaded(tokenizer, None, model=0.0, verifier=1.0)
    (found,) = actor.score([group(tokenizer[0], "p", "yes")], [YES])
    assert set(found.components) == {"verifier"}


def test_impossible_specs_are_refused(tokenizer: tuple[Tokenizer, str], tmp_path: Path) -> None:
    """Guards the reward of a topology: unknown components, a weight without a model, a policy instead of a reward model."""
    with pytest.raises(ValueError, match="unknown reward component 'judge'; known: model, verifier, environment, length"):
        loaded(tokenizer, None, judge=1.0)
    with pytest.raises(ValueError, match="there is no reward model yet"):
        loaded(tokenizer, None, model=1.0)
    shapes = jax.eval_shape(lambda k: init_params(CONFIG, k), jax.random.key(0))
    save_artifact(tmp_path / "sft", jax.tree.map(lambda s: np.zeros(s.shape, np.float32), shapes), CONFIG)
    with pytest.raises(ValueError, match="sft is a policy, not a reward model"):
        loaded(tokenizer, str(tmp_path / "sft"), model=1.0)
    with pytest.raises(RuntimeError, match="holds no reward model"):
        Reward().sequence_scores([np.array([1])])
