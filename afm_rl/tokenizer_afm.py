"""Our tokenizer (paper 3.1.6): SentencePiece BPE, one token per digit, byte fallback, no Unicode normalisation.

Text comes back byte for byte. Two things SentencePiece alone would not give are done here: a literal U+2581 (its own
sign for a space) is encoded as three byte tokens, and decoding joins bytes itself. Chat markers are control symbols,
which SentencePiece never matches in text: a user who writes "<|user|>" gets the tokens of those eight characters.

A conversation is `<|user|>text<|end|><|assistant|>text<|end|>`: one marker a turn, one end, nothing else (ours; the
paper gives no format). Training is in `pretrain/tokenizer_training.py`, the Hugging Face form in `tokenizer_export.py`.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import ClassVar

import sentencepiece

from afm_rl.tokenizer import SENTENCEPIECE_FILE, Tokenizer, TokenizerError, require_unicode, write_files
from afm_rl.types import Message

PAD_PIECE = "<|pad|>"
EOS_PIECE = "<|endoftext|>"
UNKNOWN_PIECE = "<|unknown|>"  # SentencePiece insists on one; byte fallback means that no text ever produces it
ROLE_PIECES = {"system": "<|system|>", "user": "<|user|>", "assistant": "<|assistant|>"}
END_OF_TURN_PIECE = "<|end|>"
#: In the order of their ids, from 0.
MARKER_PIECES = (PAD_PIECE, EOS_PIECE, UNKNOWN_PIECE, *ROLE_PIECES.values(), END_OF_TURN_PIECE)
#: SentencePiece's stand-in for a space inside a piece.
SPACE_SIGN = "\u2581"

#: The same format for Hugging Face, whose tokenizers (unlike ours) do see markers that a user writes out.
CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{%- if message['role'] not in ['system', 'user', 'assistant'] -%}"
    "{{- raise_exception('role ' ~ message['role'] ~ ' is not one of system, user, assistant') -}}"
    "{%- endif -%}"
    "{{- '<|' ~ message['role'] ~ '|>' ~ message['content'] ~ '<|end|>' -}}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|assistant|>' -}}{%- endif -%}"
)


class AfmTokenizer(Tokenizer):
    """Text to token ids and back, exactly. Made by `load`, `train_tokenizer` or from a tokenizer.model's bytes."""

    kind: ClassVar[str] = "afm SentencePiece"

    def __init__(self, model: bytes) -> None:
        """Raises ValueError when `model` is no SentencePiece model, or not one trained by this project's rules."""
        try:
            self._processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        except RuntimeError as error:
            raise TokenizerError(f"not a SentencePiece model ({len(model)} bytes): {error}") from error
        self._model = model
        self._piece_bytes = _piece_bytes(self._processor)
        self._byte_ids = {self._processor.id_to_piece(i): i for i in self._ids_where(self._processor.is_byte)}
        self._check()
        self._roles = {role: self._processor.piece_to_id(piece) for role, piece in ROLE_PIECES.items()}
        self._space_sign_ids = [self._byte_ids[f"<0x{byte:02X}>"] for byte in SPACE_SIGN.encode()]

    def _check(self) -> None:
        pieces = _first_pieces(self._processor)
        if pieces != MARKER_PIECES:
            raise TokenizerError(
                f"this SentencePiece model is not of this project: its first pieces are {list(pieces)}, "
                f"expected {list(MARKER_PIECES)}; train one with pretrain.tokenizer_training.train_tokenizer"
            )
        if len(self._byte_ids) != 256:
            raise TokenizerError(f"the SentencePiece model has {len(self._byte_ids)} byte pieces, needs 256 (byte_fallback)")

    def _ids_where(self, condition: Callable[[int], bool]) -> list[int]:
        return [i for i in range(self.vocab_size) if condition(i)]

    @staticmethod
    def made(path: str | os.PathLike[str]) -> bool:
        """Whether a tokenizer.model is of this project, by its first pieces. Raises TokenizerError naming the file."""
        try:
            processor = sentencepiece.SentencePieceProcessor(model_proto=Path(path).read_bytes())
        except RuntimeError as error:
            raise TokenizerError(
                f"{path}: not a SentencePiece model ({Path(path).stat().st_size} bytes): {error}"
            ) from error
        return _first_pieces(processor) == MARKER_PIECES

    @staticmethod
    def load(folder: str | os.PathLike[str]) -> AfmTokenizer:
        """Read `folder`/tokenizer.model. Raises FileNotFoundError or ValueError, naming the file."""
        path = Path(folder) / SENTENCEPIECE_FILE
        if not path.is_file():
            raise FileNotFoundError(f"{path} does not exist: a tokenizer folder of this project holds one")
        try:
            return AfmTokenizer(path.read_bytes())
        except ValueError as error:
            raise TokenizerError(f"{path}: {error}") from error

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write `folder`/tokenizer.model, whole or not at all."""
        write_files(folder, {SENTENCEPIECE_FILE: self._model})

    def __reduce__(self) -> tuple[type[AfmTokenizer], tuple[bytes]]:
        return AfmTokenizer, (self._model,)

    @property
    def vocab_size(self) -> int:
        return self._processor.vocab_size()

    @property
    def pad_id(self) -> int:
        return 0

    @property
    def eos_id(self) -> int:
        """Ends a document in pre-training; generation stops at it too."""
        return 1

    @property
    def end_of_turn_id(self) -> int:
        return self._processor.piece_to_id(END_OF_TURN_PIECE)

    @property
    def chat_template(self) -> str:
        """The conversation format as a Jinja template, for Hugging Face's `apply_chat_template`."""
        return CHAT_TEMPLATE

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the model's bytes, in hex."""
        return hashlib.sha256(self._model).hexdigest()

    @property
    def pieces(self) -> list[str]:
        """The vocabulary in the order of ids, spaces as U+2581, bytes as <0xNN>."""
        return [self._processor.id_to_piece(i) for i in range(self.vocab_size)]

    def piece(self, token: int) -> str:
        return self._processor.id_to_piece(self._known(token))

    def encode(self, text: str) -> list[int]:
        """The ids of `text`, never a marker's: `decode(encode(text)) == text` for every string that is valid Unicode."""
        require_unicode(text)
        first, *rest = text.split(SPACE_SIGN)
        ids = self._processor.encode(first)
        for part in rest:
            ids += self._space_sign_ids
            ids += self._processor.encode(part)
        return ids

    def token_bytes(self, token: int) -> bytes:
        return self._piece_bytes[self._known(token)]

    def _known(self, token: int) -> int:
        if not 0 <= token < len(self._piece_bytes):
            raise ValueError(f"token id {token} is outside the vocabulary of {self.vocab_size}")
        return token

    def encode_chat(self, messages: Sequence[Message], *, add_generation_prompt: bool = True) -> list[int]:
        """The ids of a conversation; `add_generation_prompt` opens the assistant's turn at the end.

        Ends with the same ids however it was split: chat + `encode_response(text)` equals the chat with that
        assistant message, closed. Raises ValueError for an unknown role.
        """
        ids: list[int] = []
        for index, message in enumerate(messages):
            if message.role not in self._roles:
                raise ValueError(f"messages[{index}].role is {message.role!r}, must be one of {', '.join(self._roles)}")
            ids += [self._roles[message.role], *self.encode_response(message.content)]
        return [*ids, self._roles["assistant"]] if add_generation_prompt else ids


def _first_pieces(processor: sentencepiece.SentencePieceProcessor) -> tuple[str, ...]:
    return tuple(processor.id_to_piece(i) for i in range(min(len(MARKER_PIECES), processor.vocab_size())))


def _piece_bytes(processor: sentencepiece.SentencePieceProcessor) -> list[bytes]:
    """What every id decodes to."""
    table = []
    for token in range(processor.vocab_size()):
        piece = processor.id_to_piece(token)
        if processor.is_byte(token):
            table.append(bytes([int(piece[1:-1], 16)]))
        elif processor.is_control(token) or processor.is_unknown(token):
            table.append(b"")
        else:
            table.append(piece.replace(SPACE_SIGN, " ").encode())
    return table
