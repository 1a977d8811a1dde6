"""What the system needs of a tokenizer, whoever made it: text to ids and back, conversations, where a response ends.

Three kinds: ours (paper 3.1.6, `tokenizer_afm.py`), a foreign tokenizer.json, and a foreign SentencePiece tokenizer.model
(both `tokenizer_foreign.py`). `Tokenizer.load` tells them apart by the folder's files; everything above works on any.
Text never makes a marker: a user who spells one gets the tokens of its characters, whichever the kind.
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import ClassVar

from afm_rl.errors import UserError
from afm_rl.types import Message

SENTENCEPIECE_FILE, FAST_FILE = "tokenizer.model", "tokenizer.json"
#: Every file of a Hugging Face folder that says how text becomes ids and where generation ends.
TOKENIZER_FILES = (
    SENTENCEPIECE_FILE,
    FAST_FILE,
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "generation_config.json",
)


class TokenizerError(UserError, ValueError):
    """A tokenizer file that cannot be read, or asks for what is not implemented."""


class Tokenizer(ABC):
    """Text to token ids and back. Pickles; equal fingerprints give equal ids."""

    #: What the command line calls it.
    kind: ClassVar[str]

    @staticmethod
    def load(folder: str | os.PathLike[str]) -> Tokenizer:
        """The tokenizer of a folder: ours where tokenizer.model is of this project, else tokenizer.json, else theirs.

        Raises FileNotFoundError or TokenizerError (a ValueError), naming the file.
        """
        from afm_rl.tokenizer_afm import AfmTokenizer

        folder = Path(folder)
        fast = (folder / FAST_FILE).is_file()
        if not (folder / SENTENCEPIECE_FILE).is_file():
            if not fast:
                raise FileNotFoundError(f"{folder} has neither {SENTENCEPIECE_FILE} nor {FAST_FILE}: no tokenizer there")
        elif AfmTokenizer.made(folder / SENTENCEPIECE_FILE):
            return AfmTokenizer.load(folder)
        from afm_rl.tokenizer_foreign import ForeignTokenizer  # takes a moment, which our own goes without

        return ForeignTokenizer.load(folder)

    @property
    @abstractmethod
    def vocab_size(self) -> int:
        """One more than the largest id."""

    @property
    @abstractmethod
    def pad_id(self) -> int:
        """Fills rows up; masked wherever it stands."""

    @property
    @abstractmethod
    def eos_id(self) -> int:
        """Ends a document."""

    @property
    @abstractmethod
    def end_of_turn_id(self) -> int:
        """Ends a turn of a conversation; what a response is trained to finish with."""

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """Every id that ends a response, the end of a turn first."""
        return tuple(dict.fromkeys((self.end_of_turn_id, self.eos_id)))

    @property
    @abstractmethod
    def chat_template(self) -> str | None:
        """The conversation format as a Jinja template, or None where the folder has none (a plain one is used)."""

    @property
    @abstractmethod
    def fingerprint(self) -> str:
        """SHA-256 in hex of all that decides the ids."""

    @abstractmethod
    def piece(self, token: int) -> str:
        """How the vocabulary writes one id, markers included. Raises ValueError for an id outside the vocabulary."""

    @abstractmethod
    def encode(self, text: str) -> list[int]:
        """The ids of `text`, never a marker's. Raises ValueError for a lone surrogate, which no UTF-8 text can hold."""

    @abstractmethod
    def token_bytes(self, token: int) -> bytes:
        """The UTF-8 bytes one id stands for: perhaps part of a character; empty for a marker."""

    def byte_stream(self) -> Callable[[int], bytes]:
        """A function that takes the ids of one text in order and returns the bytes of each."""
        return self.token_bytes

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids`: markers give nothing, invalid UTF-8 gives U+FFFD. Raises ValueError for an unknown id."""
        push = self.byte_stream()
        return b"".join(push(int(i)) for i in ids).decode("utf-8", "replace")

    @abstractmethod
    def encode_chat(self, messages: Sequence[Message], *, add_generation_prompt: bool = True) -> list[int]:
        """The ids of a conversation; `add_generation_prompt` opens the assistant's turn at the end.

        Raises ValueError for what the format does not allow (an unknown role).
        """

    def encode_response(self, text: str) -> list[int]:
        """The ids of a turn's text and its end."""
        return [*self.encode(text), self.end_of_turn_id]

    @abstractmethod
    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write the tokenizer's own files, byte for byte as they were read; what other tokenizers left goes."""


def has_tokenizer(folder: str | os.PathLike[str]) -> bool:
    """Whether `Tokenizer.load` has something to read there."""
    return any((Path(folder) / name).is_file() for name in (SENTENCEPIECE_FILE, FAST_FILE))


def write_files(folder: str | os.PathLike[str], files: dict[str, bytes]) -> None:
    """Write tokenizer files, each whole or not at all, and remove the folder's others."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        temporary = folder / f".{name}.{os.getpid()}.tmp"
        temporary.write_bytes(content)
        temporary.replace(folder / name)
    for name in TOKENIZER_FILES:
        if name not in files:
            (folder / name).unlink(missing_ok=True)


def require_unicode(text: str) -> None:
    """Raises ValueError for a lone surrogate, saying where it stands."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"character {error.start} of the text is the lone surrogate {text[error.start]!r}, not Unicode text; "
            "drop it with text.encode('utf-8', 'ignore').decode()"
        ) from error
