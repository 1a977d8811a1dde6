"""Log-probabilities in OpenAI's two shapes, from scores written by hand."""

from __future__ import annotations

import numpy as np
import pytest

from actors.server_objects import LOWEST_LOGP, TokenScores, chat_logprobs, completion_logprobs
from afm_rl.tokenizer import Tokenizer
from pretrain.tokenizer_training import MIN_VOCAB_SIZE, train_tokenizer


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("tokenizer")
    return train_tokenizer(["hello there, hello again"] * 20, vocab_size=MIN_VOCAB_SIZE + 3, folder=folder)


def scores(own: list[float], top_ids: list[list[int]], top_logp: list[list[float]]) -> TokenScores:
    return TokenScores(np.array(own, np.float32), np.array(top_ids, np.int32), np.array(top_logp, np.float32))


def test_torn_characters_and_markers_are_written_out(tokenizer: Tokenizer) -> None:
    """Guards the chat form: bytes of a torn character as bytes, a marker by its name, alternatives in their order."""
    tokens = [*tokenizer.encode("é"), tokenizer.end_of_turn_id]
    given = scores([np.nan, -0.5, -np.inf], [[0, 0], [tokens[1], tokens[2]], [9, 10]], [[0, 0], [-0.5, -1], [-0.25, -2]])
    content = chat_logprobs(tokens, given, tokenizer, start=1, top=2)["content"]
    assert [(entry["token"], entry["bytes"]) for entry in content] == [("bytes:\\xa9", [0xA9]), ("<|end|>", None)]
    assert [entry["logprob"] for entry in content] == [-0.5, LOWEST_LOGP]
    assert [other["logprob"] for other in content[0]["top_logprobs"]] == [-0.5, -1.0]


def test_two_ids_that_read_the_same_keep_the_likelier_figure(tokenizer: Tokenizer) -> None:
    """Guards likelihood evaluations: a byte token that spells "A" must not pass for the greedy letter "A"."""
    letter = tokenizer.encode("A")[0]
    byte = tokenizer.pieces.index("<0x41>")
    assert letter != byte
    assert tokenizer.decode([letter]) == tokenizer.decode([byte])
    given = scores([np.nan, -3.0], [[0], [letter]], [[0.0], [-0.125]])
    logprobs = completion_logprobs([letter, byte], given, tokenizer, start=0, top=1)
    assert logprobs["token_logprobs"] == [None, -3.0]
    assert logprobs["top_logprobs"] == [None, {"A": -0.125}]


def test_offsets_count_characters_that_are_certain(tokenizer: Tokenizer) -> None:
    """Guards text_offset: characters before each token, where a character takes several tokens too."""
    tokens = tokenizer.encode("a🦊b")
    given = scores([-1.0] * len(tokens), [[0]] * len(tokens), [[-1.0]] * len(tokens))
    logprobs = completion_logprobs(tokens, given, tokenizer, start=0, top=0)
    assert logprobs["text_offset"] == [0, 1, 1, 1, 1, 2]
