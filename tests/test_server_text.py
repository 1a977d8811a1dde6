"""The incremental decoder behind streams: characters, stop strings, arbitrary tokens."""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest

from actors.server_text import ResponseText
from afm_rl.tokenizer import Tokenizer
from pretrain.tokenizer_training import MIN_VOCAB_SIZE, train_tokenizer


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("tokenizer")
    return train_tokenizer(["hello there, hello again"] * 20, vocab_size=MIN_VOCAB_SIZE + 3, folder=folder)


def pieces(tokens: list[int], tokenizer: Tokenizer, *, stop: tuple[str, ...] = ()) -> Iterator[str]:
    text = ResponseText(tokenizer.token_bytes, stop=stop)
    for token in tokens:
        yield text.push(token)
    yield text.close()


def test_pieces_of_any_tokens_add_up_to_their_decoding(tokenizer: Tokenizer) -> None:
    """Guards the incremental decoder on random tokens: broken bytes, markers, whole pieces, real text."""
    rng = random.Random(0)
    for _ in range(300):
        tokens = [rng.randrange(tokenizer.vocab_size) for _ in range(rng.randrange(30))]
        assert "".join(pieces(tokens, tokenizer)) == tokenizer.decode(tokens)
    for text in ("naïve 🦊🦊 \ufffd end \ufffd", " leading\n\n", "\u2581"):
        assert "".join(pieces(tokenizer.encode(text), tokenizer)) == text


@pytest.mark.parametrize(
    ("text", "stop", "expected"),
    [
        ("aab", ("ab",), "a"),
        ("ababac", ("abac",), "ab"),
        ("abc", ("abc", "b"), "a"),
        ("abc", ("bc", "abc"), ""),
        ("only the star", ("start",), "only the star"),
        ("stop", ("stop",), ""),
        ("a🦊b", ("🦊",), "a"),
    ],
)
def test_stop_strings_whatever_the_chunks(text: str, stop: tuple[str, ...], expected: str, tokenizer: Tokenizer) -> None:
    """Guards overlapping starts, several stop strings, and an unfinished one at the end, however the text is cut up."""
    assert "".join(pieces(tokenizer.encode(text), tokenizer, stop=stop)) == expected
    for size in (1, 2, 3, 100):
        raw = text.encode()
        chunks = [raw[i : i + size] for i in range(0, len(raw), size)]
        response = ResponseText(lambda i, chunks=chunks: chunks[i], stop=stop)
        assert "".join(response.push(i) for i in range(len(chunks))) + response.close() == expected
        assert response.stopped == (expected != text)
