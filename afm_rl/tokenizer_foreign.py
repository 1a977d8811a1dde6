"""Tokenizers of other people's Hugging Face folders, behind the same face as ours.

Differences from transformers are wanted: text never makes a special token (there, a user who writes <|im_end|> ends the
turn), so special tokens spelt in a message are encoded as characters, in conversations too; everything else of a
conversation gives the ids of `apply_chat_template`. Nothing is added to plain text (no bos). The files are kept and
saved byte for byte. Decoding an id that the vocabulary lacks gives nothing, because models are often padded beyond it.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from afm_rl.tokenizer import (
    FAST_FILE,
    SENTENCEPIECE_FILE,
    TOKENIZER_FILES,
    Tokenizer,
    TokenizerError,
    require_unicode,
    write_files,
)
from afm_rl.tokenizer_chat import PLAIN_TEMPLATE, ChatTemplate, find_template
from afm_rl.tokenizer_cores import Core, FastCore, SentencePieceCore
from afm_rl.types import Message

_TOKEN_NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_PROBE = "afm-rl-probe"


class ForeignTokenizer(Tokenizer):
    """A tokenizer.json or a SentencePiece tokenizer.model, with the settings files beside it."""

    def __init__(self, files: Mapping[str, bytes]) -> None:
        """`files`: names of TOKENIZER_FILES and their contents. Raises TokenizerError naming what is wrong with which."""
        self._files = dict(files)
        settings = self._json("special_tokens_map.json") | self._json("tokenizer_config.json")
        self.kind = FAST_FILE if FAST_FILE in files else "SentencePiece"  # type: ignore[misc]
        self._core: Core = _core(files, settings)
        self._special_tokens = _special_tokens(settings)
        self._generation = self._json("generation_config.json")
        self._stop_ids, self._pad_id = self._find_ends()
        self._chat_template = find_template(files, settings)
        names = {"eos_token": self.piece(self._stop_ids[0]), **self._special_tokens}
        self._chat = ChatTemplate(PLAIN_TEMPLATE if self._chat_template is None else self._chat_template, names)
        self._markers = {*self._core.specials.values(), *self._stop_ids, self._pad_id}
        self._special = re.compile("|".join(map(re.escape, sorted(self._core.specials, key=len, reverse=True))) or r"(?!)")
        self._end_of_turn_id = self._find_end_of_turn()

    @staticmethod
    def load(folder: str | os.PathLike[str]) -> ForeignTokenizer:
        """Read the tokenizer files of a folder; config.json gives the end tokens where generation_config.json is missing."""
        folder = Path(folder)
        files = {name: (folder / name).read_bytes() for name in TOKENIZER_FILES if (folder / name).is_file()}
        try:
            if "generation_config.json" not in files and (folder / "config.json").is_file():
                config = _object("config.json", (folder / "config.json").read_bytes())
                ends = {k: config[k] for k in ("eos_token_id", "pad_token_id") if config.get(k) is not None}
                files |= {"generation_config.json": json.dumps(ends).encode()} if ends else {}
            return ForeignTokenizer(files)
        except ValueError as error:
            raise TokenizerError(f"{folder}: {error}") from error

    def save(self, folder: str | os.PathLike[str]) -> None:
        write_files(folder, self._files)

    def __reduce__(self) -> tuple[type[ForeignTokenizer], tuple[dict[str, bytes]]]:
        return ForeignTokenizer, (self._files,)

    @property
    def vocab_size(self) -> int:
        return self._core.vocab_size

    @property
    def pad_id(self) -> int:
        return self._pad_id

    @property
    def eos_id(self) -> int:
        return self._stop_ids[0]

    @property
    def end_of_turn_id(self) -> int:
        return self._end_of_turn_id

    @property
    def stop_ids(self) -> tuple[int, ...]:
        return tuple(dict.fromkeys((self._end_of_turn_id, *self._stop_ids)))

    @property
    def chat_template(self) -> str | None:
        return self._chat_template

    @property
    def fingerprint(self) -> str:
        digest = hashlib.sha256()
        for name, content in sorted(self._files.items()):
            digest.update(f"{name} {len(content)} ".encode() + content)
        return digest.hexdigest()

    def piece(self, token: int) -> str:
        if token < 0:
            raise ValueError(f"token id {token} is outside the vocabulary of {self.vocab_size}")
        piece = self._core.piece(token)
        return f"<unused {token}>" if piece is None else piece

    def encode(self, text: str) -> list[int]:
        require_unicode(text)
        return self._core.encode(text, see_specials=False)

    def token_bytes(self, token: int) -> bytes:
        if token < 0:
            raise ValueError(f"token id {token} is outside the vocabulary of {self.vocab_size}")
        return b"" if token in self._markers else self._core.piece_bytes(token)

    def byte_stream(self) -> Callable[[int], bytes]:
        if not self._core.leading_space:
            return self.token_bytes
        begun = False

        def push(token: int) -> bytes:
            nonlocal begun
            content = self.token_bytes(token)
            first, begun = not begun and bool(content), begun or bool(content)
            return content.removeprefix(b" ") if first else content

        return push

    def encode_chat(self, messages: Sequence[Message], *, add_generation_prompt: bool = True) -> list[int]:
        """The ids of the rendered template. Special tokens in a message's text are encoded as its characters."""
        for message in messages:
            require_unicode(message.content)
        spelt: list[str] = []
        stand_in = _unused_character("".join(message.content for message in messages))

        def hide(match: re.Match[str]) -> str:
            spelt.append(match[0])
            return f"{stand_in}{len(spelt) - 1}{stand_in}"

        hidden = [Message(message.role, self._special.sub(hide, message.content)) for message in messages]
        text = self._chat.render(hidden, add_generation_prompt=add_generation_prompt)
        ids: list[int] = []
        for i, part in enumerate(re.split(f"{stand_in}([0-9]+){stand_in}", text)):
            ids += self.encode(spelt[int(part)]) if i % 2 else self._core.encode(part, see_specials=True)
        return ids

    def _json(self, name: str) -> dict[str, Any]:
        return _object(name, self._files[name]) if name in self._files else {}

    def _find_ends(self) -> tuple[tuple[int, ...], int]:
        """(ids that end a text, the tokenizer's own first; the padding id)."""
        given = self._generation.get("eos_token_id")
        stops = [given] if isinstance(given, int) else list(given or [])
        if (eos := self._id_of("eos_token")) is not None:
            stops.insert(0, eos)
        if not stops:
            raise TokenizerError(
                "no end token: give eos_token in tokenizer_config.json or eos_token_id in generation_config.json"
            )
        pads = (self._id_of("pad_token"), self._generation.get("pad_token_id"), stops[0])
        return tuple(dict.fromkeys(stops)), next(pad for pad in pads if isinstance(pad, int))

    def _id_of(self, name: str) -> int | None:
        """The id of eos_token or pad_token, where it is set and one token."""
        text = self._special_tokens.get(name)
        if text is None:
            return None
        ids = self._core.encode(text, see_specials=True)
        return ids[0] if len(ids) == 1 else None

    def _find_end_of_turn(self) -> int:
        """The first end token that the template puts after an assistant's text; eos where it puts none."""
        turn = [Message("user", "a"), Message("assistant", _PROBE)]
        try:
            _, _, after = self._chat.render(turn, add_generation_prompt=False).rpartition(_PROBE)
        except ValueError:  # a template may refuse anything; it will say so when it is used
            return self.eos_id
        return next((i for i in self._core.encode(after, see_specials=True) if i in self._stop_ids), self.eos_id)


def _object(name: str, content: bytes) -> dict[str, Any]:
    try:
        found = json.loads(content)
    except ValueError as error:
        raise TokenizerError(f"{name} is not JSON: {error}") from error
    if not isinstance(found, dict):
        raise TokenizerError(f"{name} must be a JSON object; it holds a {type(found).__name__}")
    return found


def _core(files: Mapping[str, bytes], settings: Mapping[str, Any]) -> Core:
    if FAST_FILE in files:
        try:
            return FastCore(files[FAST_FILE])
        except TokenizerError as error:
            raise TokenizerError(f"{FAST_FILE}: {error}") from error
    added = settings.get("added_tokens_decoder", {})
    names = {row["content"]: int(i) for i, row in added.items() if row.get("special", True)}
    return SentencePieceCore(files[SENTENCEPIECE_FILE], names)


def _special_tokens(settings: Mapping[str, Any]) -> dict[str, Any]:
    """bos_token, eos_token, ... as text; their entries may be objects."""
    found: dict[str, Any] = {}
    for name in _TOKEN_NAMES:
        value = settings.get(name)
        text = value.get("content") if isinstance(value, Mapping) else value
        if text is not None:
            found[name] = text
    return found


def _unused_character(text: str) -> str:
    """A private-use character that the text does not hold."""
    return next(character for character in _private_use() if character not in text)


def _private_use() -> Iterator[str]:
    yield from map(chr, range(0xF0000, 0xFFFFE))
