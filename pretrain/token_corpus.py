"""Tokenised corpora on disk: flat memory maps, one per domain and split, with a header that names the token type.

Section 3.1's mixture needs one stream per domain. A corpus is two files: NAME.bin (tokens of all documents, one after
another) and NAME.json (dtype, document offsets, tokenizer fingerprint). uint16 holds vocabularies up to 65,536 entries.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np


class Encoder(Protocol):
    """The part of a tokenizer that a corpus needs."""

    @property
    def vocab_size(self) -> int: ...

    @property
    def eos_id(self) -> int: ...

    @property
    def fingerprint(self) -> str: ...

    def encode(self, text: str) -> list[int]: ...


@dataclass(frozen=True)
class TokenCorpus:
    """`tokens` [N] memory-mapped; document i is tokens[offsets[i]:offsets[i + 1]], its end-of-sequence included."""

    tokens: np.ndarray
    offsets: np.ndarray

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def document(self, index: int) -> np.ndarray:
        return self.tokens[self.offsets[index] : self.offsets[index + 1]]


def write_corpus(path: Path, documents: Iterable[str], tokenizer: Encoder) -> int:
    """Tokenise `documents` into PATH.bin and PATH.json; returns the number of tokens. The header is written last."""
    dtype = np.uint16 if tokenizer.vocab_size <= 65_536 else np.uint32
    path.parent.mkdir(parents=True, exist_ok=True)
    path.with_suffix(".json").unlink(missing_ok=True)  # an older header must not vouch for half of a new file
    offsets = [0]
    with open(path.with_suffix(".bin"), "wb") as file:
        for text in documents:
            ids = np.asarray([*tokenizer.encode(text), tokenizer.eos_id], dtype)
            file.write(ids.tobytes())
            offsets.append(offsets[-1] + len(ids))
        file.flush()
        os.fsync(file.fileno())
    header = {"dtype": np.dtype(dtype).name, "tokenizer": tokenizer.fingerprint, "offsets": offsets}
    path.with_suffix(".json").write_text(json.dumps(header))
    return offsets[-1]


def read_corpus(path: Path, *, fingerprint: str) -> TokenCorpus:
    """Open a corpus. Raises ValueError when it was made with another tokenizer or is shorter than its header says."""
    header = json.loads(path.with_suffix(".json").read_text())
    if header["tokenizer"] != fingerprint:
        raise ValueError(f"{path}: tokenised with another tokenizer; delete the folder and run the tokenizer stage again")
    offsets = np.asarray(header["offsets"], np.int64)
    binary = path.with_suffix(".bin")
    dtype = np.dtype(header["dtype"])
    if binary.stat().st_size != offsets[-1] * dtype.itemsize:
        raise ValueError(f"{binary}: {binary.stat().st_size} bytes instead of {offsets[-1] * dtype.itemsize}; truncated")
    tokens = np.memmap(binary, dtype, mode="r") if offsets[-1] else np.empty(0, dtype)
    return TokenCorpus(tokens, offsets)
