"""Token corpora on disk: documents come back, and a file that is damaged or from another tokenizer does not."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from pretrain.token_corpus import read_corpus, write_corpus


@dataclass
class Letters:
    """A tokenizer of code points."""

    vocab_size: int = 300
    eos_id: int = 1
    fingerprint: str = "letters-1"

    def encode(self, text: str) -> list[int]:
        return [ord(c) for c in text]


DOCUMENTS = ["abc", "", "zz"]


def test_documents_come_back(tmp_path: Path) -> None:
    """Guards offsets and the end-of-sequence token, one a document, in a memory map of two bytes a token."""
    assert write_corpus(tmp_path / "deep" / "web", DOCUMENTS, Letters()) == 8
    corpus = read_corpus(tmp_path / "deep" / "web", fingerprint="letters-1")
    assert [corpus.document(i).tolist() for i in range(len(corpus))] == [[97, 98, 99, 1], [1], [122, 122, 1]]
    assert isinstance(corpus.tokens, np.memmap)
    assert corpus.tokens.dtype == np.uint16
    assert (tmp_path / "deep" / "web.bin").stat().st_size == 16


def test_large_vocabularies_take_four_bytes(tmp_path: Path) -> None:
    """Guards the published model of 100k entries, whose ids would wrap in 16 bits."""
    write_corpus(tmp_path / "web", ["\U00010000"], Letters(vocab_size=100_352))
    assert read_corpus(tmp_path / "web", fingerprint="letters-1").document(0).tolist() == [65536, 1]


def test_an_empty_corpus_is_none(tmp_path: Path) -> None:
    """Guards domains without text: a file of no bytes cannot be mapped."""
    assert write_corpus(tmp_path / "web", [], Letters()) == 0
    assert len(read_corpus(tmp_path / "web", fingerprint="letters-1")) == 0


def test_another_tokenizer_is_refused(tmp_path: Path) -> None:
    """Guards ids that mean something else."""
    write_corpus(tmp_path / "web", DOCUMENTS, Letters())
    with pytest.raises(ValueError, match="web: tokenised with another tokenizer"):
        read_corpus(tmp_path / "web", fingerprint="letters-2")


def test_a_truncated_file_is_refused(tmp_path: Path) -> None:
    """Guards a copy that stopped in the middle, by the two sizes."""
    write_corpus(tmp_path / "web", DOCUMENTS, Letters())
    binary = tmp_path / "web.bin"
    binary.write_bytes(binary.read_bytes()[:-2])
    with pytest.raises(ValueError, match=r"web\.bin: 14 bytes instead of 16"):
        read_corpus(tmp_path / "web", fingerprint="letters-1")


def test_an_interrupted_write_leaves_no_header(tmp_path: Path) -> None:
    """Guards a kill while tokenising, over an older corpus too: what is half written cannot be read."""

    def documents() -> Iterator[str]:
        yield "abc"
        raise KeyboardInterrupt

    write_corpus(tmp_path / "web", DOCUMENTS, Letters())
    with pytest.raises(KeyboardInterrupt):
        write_corpus(tmp_path / "web", documents(), Letters())
    with pytest.raises(FileNotFoundError):
        read_corpus(tmp_path / "web", fingerprint="letters-1")
    write_corpus(tmp_path / "web", DOCUMENTS, Letters())
    assert json.loads((tmp_path / "web.json").read_text())["offsets"] == [0, 4, 5, 8]
