"""Episodes with the real engine: what it said of its tokens is what the model says of the whole conversation."""

from __future__ import annotations

import string
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from actors.episodes import EpisodeOptions, play
from actors.online_batch import responses_batch
from afm_rl.config import ModelConfig
from afm_rl.environments.hosts import LocalHost
from afm_rl.environments.interface import StepResult
from afm_rl.generate import Generator
from afm_rl.generation.options import EngineOptions
from afm_rl.model import forward, logits
from afm_rl.parameters import init_params
from afm_rl.types import Message, Prompt
from pretrain.tokenizer_training import MIN_VOCAB_SIZE, train_tokenizer

CONFIG = ModelConfig(MIN_VOCAB_SIZE + 8, 16, 32, 2, 2, 1, 8, max_positions=256)


class Echo:
    """Says how many characters it read; pays a tenth a turn."""

    def reset(self, prompt: Prompt, seed: int) -> tuple[Message, ...]:
        del seed
        return prompt.messages

    def step(self, action: str) -> StepResult:
        return StepResult(f"read {len(action)}", reward=0.1)


@pytest.mark.slow
def test_the_engines_log_probabilities_are_those_of_the_conversation(tmp_path: Path) -> None:
    """Guards the whole path: prompts of later turns, cached pages, masks. A token off by one place would show at once."""
    texts = [f"read {a}{b}" for a in string.ascii_lowercase for b in string.ascii_lowercase]
    tokenizer = train_tokenizer(texts, vocab_size=CONFIG.vocab_size, folder=tmp_path)
    params = jax.tree.map(lambda leaf: 3.0 * leaf if leaf.ndim > 1 else leaf, init_params(CONFIG, jax.random.key(0)))
    # A random policy rarely ends a turn; with every twelfth token as an end its turns are short.
    engine = Generator(CONFIG, stop_ids=range(6, CONFIG.vocab_size, 12), options=EngineOptions(max_batch=8, page_size=8))
    engine.load(params, policy="p", version=2)
    prompts = [Prompt(name, (Message("user", text),)) for name, text in (("a", "read ab"), ("b", "read xyz"))]
    options = EpisodeOptions(responses=3, max_turns=3, max_tokens=120, max_context=200, seed=1)
    found = play(engine.generate, prompts, host=LocalHost(Echo), tokenizer=tokenizer, options=options)
    again = play(engine.generate, prompts[1:], host=LocalHost(Echo), tokenizer=tokenizer, options=options)
    batch, _, valid_PG = responses_batch(found)
    assert valid_PG.all()
    hidden_BTD = forward(params, jnp.asarray(batch["tokens_BT"]), config=CONFIG)
    logp_BTV = np.asarray(jax.nn.log_softmax(logits(params, hidden_BTD, CONFIG).astype(jnp.float32)))
    for i, scored in enumerate(found):
        for j, (tokens, logps, mine) in enumerate(
            zip(scored.group.responses, scored.group.logps, scored.group.actions, strict=True)
        ):
            row, first = 3 * i + j, len(scored.group.prompt_T)
            at = np.arange(first, first + len(tokens))
            model_T = logp_BTV[row, at - 1, tokens]
            np.testing.assert_allclose(logps[mine], model_T[mine], atol=2e-4)
            np.testing.assert_array_equal(batch["mask_BT"][row, at], mine)
            assert not batch["sampler_logp_BT"][row, at][~mine].any()
    assert sum((~mine).sum() for scored in found for mine in scored.group.actions) > 20
    for mine, yours in zip(found[1].group.responses, again[0].group.responses, strict=True):
        np.testing.assert_array_equal(mine, yours)
