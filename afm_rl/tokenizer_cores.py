"""The two engines behind a foreign tokenizer: Hugging Face's `tokenizers` for tokenizer.json, SentencePiece otherwise.

A core knows pieces and ids, encodes text with or without seeing the special tokens in it, and says which bytes a piece
stands for. Bytes are read off the vocabulary, so that a stream can be decoded token by token: pieces of a byte-level BPE
(Qwen, GPT-2) spell bytes as letters, others write a space as U+2581 and bytes as <0xNN>.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol

import sentencepiece
import tokenizers

from afm_rl.tokenizer import TokenizerError

_SPACE_SIGN = "\u2581"
_BYTE_PIECE = re.compile(r"<0x([0-9A-F]{2})>")
_DECODERS = ("ByteLevel", "Metaspace", "Replace", "ByteFallback", "Fuse", "Strip")


class Core(Protocol):
    """What `ForeignTokenizer` asks of an engine."""

    @property
    def specials(self) -> Mapping[str, int]:
        """The special tokens, by their text."""

    @property
    def vocab_size(self) -> int:
        """One more than the largest id."""

    @property
    def leading_space(self) -> bool:
        """Whether the first token of a text carries a space that the text has not."""

    def encode(self, text: str, *, see_specials: bool) -> list[int]:
        """The ids of a text; special tokens in it are their ids, or else ordinary characters."""

    def piece(self, token: int) -> str | None:
        """The vocabulary's entry, None for an id that has none."""

    def piece_bytes(self, token: int) -> bytes:
        """What an id that is no special token decodes to."""


class FastCore:
    """A tokenizer.json, run by the library that defines it."""

    def __init__(self, content: bytes) -> None:
        """Raises TokenizerError for what is not a tokenizer.json, or decodes in a way that is not implemented."""
        try:
            self._seeing, self._blind = (tokenizers.Tokenizer.from_buffer(content) for _ in range(2))
        except Exception as error:  # the library raises nothing narrower
            raise TokenizerError(f"not a tokenizer.json: {error}") from error
        self._blind.encode_special_tokens = True
        for engine in (self._seeing, self._blind):
            engine.no_truncation()
            engine.no_padding()
        added = self._seeing.get_added_tokens_decoder()
        self.specials = {token.content: i for i, token in added.items() if token.special}
        self._added = {i: token.content.encode() for i, token in added.items()}
        vocabulary = self._seeing.get_vocab(with_added_tokens=True)
        self._pieces = {i: piece for piece, i in vocabulary.items()}
        self.vocab_size = 1 + max(self._pieces, default=-1)
        steps = list(_decoder_steps(json.loads(content).get("decoder")))
        self._to_bytes, self.leading_space = _decoding(steps)

    def encode(self, text: str, *, see_specials: bool) -> list[int]:
        engine = self._seeing if see_specials else self._blind
        return engine.encode(text, add_special_tokens=False).ids

    def piece(self, token: int) -> str | None:
        return self._pieces.get(token)

    def piece_bytes(self, token: int) -> bytes:
        if token in self._added:
            return self._added[token]
        return self._to_bytes(self._pieces[token]) if token in self._pieces else b""


class SentencePieceCore:
    """A tokenizer.model of someone else's; `added` are tokens that tokenizer_config.json puts beside it, all special."""

    def __init__(self, content: bytes, added: Mapping[str, int]) -> None:
        try:
            self._processor = sentencepiece.SentencePieceProcessor(model_proto=content)
        except RuntimeError as error:
            raise TokenizerError(f"not a SentencePiece model ({len(content)} bytes): {error}") from error
        size = self._processor.vocab_size()
        control = [i for i in range(size) if self._processor.is_control(i)]
        self.specials = {self._processor.id_to_piece(i): i for i in control} | dict(added)
        self._names = {i: name for name, i in self.specials.items()}
        self.vocab_size = 1 + max([size - 1, *self._names])
        self.leading_space = self._processor.encode("a", out_type=str)[0].startswith(_SPACE_SIGN)
        longest_first = sorted(self.specials, key=len, reverse=True)
        self._special = re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")

    def encode(self, text: str, *, see_specials: bool) -> list[int]:
        if not see_specials:
            return list(self._processor.encode(text))
        ids, at = [], 0
        for match in self._special.finditer(text):
            ids += [*self._processor.encode(text[at : match.start()]), self.specials[match[0]]]
            at = match.end()
        return [*ids, *self._processor.encode(text[at:])]

    def piece(self, token: int) -> str | None:
        if token in self._names:
            return self._names[token]
        return self._processor.id_to_piece(token) if 0 <= token < self._processor.vocab_size() else None

    def piece_bytes(self, token: int) -> bytes:
        piece = self.piece(token)
        return b"" if piece is None or self._processor.is_unknown(token) else _spaced_bytes(piece)


def _decoder_steps(decoder: Mapping[str, Any] | None) -> Iterator[Mapping[str, Any]]:
    if decoder is None:
        return
    if decoder["type"] == "Sequence":
        for step in decoder["decoders"]:
            yield from _decoder_steps(step)
        return
    if decoder["type"] not in _DECODERS:
        raise TokenizerError(f"the decoder {decoder['type']!r} is not implemented; there are {', '.join(_DECODERS)}")
    yield decoder


def _decoding(steps: list[Mapping[str, Any]]) -> tuple[Callable[[str], bytes], bool]:
    """(bytes of a piece, whether a text's first token carries a space of its own) of a tokenizer.json's decoder."""
    kinds = {step["type"]: step for step in steps}
    if not kinds:  # the library then joins words with spaces
        return lambda piece: f" {piece}".encode(), True
    if "ByteLevel" in kinds:
        return _byte_level_bytes, False
    space = kinds.get("Metaspace", {})
    prepends = space.get("prepend_scheme", "always" if space.get("add_prefix_space", bool(space)) else "never") != "never"
    strips = kinds.get("Strip", {}).get("start", 0) > 0
    return _spaced_bytes, prepends or strips


def _spaced_bytes(piece: str) -> bytes:
    if match := _BYTE_PIECE.fullmatch(piece):
        return bytes([int(match[1], 16)])
    return piece.replace(_SPACE_SIGN, " ").encode()


def _letters() -> dict[str, int]:
    """GPT-2's letter for every byte: printable Latin-1 stands for itself, the others for U+0100 onwards."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


_BYTES = _letters()


def _byte_level_bytes(piece: str) -> bytes:
    if all(letter in _BYTES for letter in piece):
        return bytes(_BYTES[letter] for letter in piece)
    return piece.encode()
