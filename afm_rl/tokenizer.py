"""The tokenizer (paper 3.1.6): SentencePiece BPE, one token per digit, byte fallback, no Unicode normalisation.

Text comes back byte for byte. Two things SentencePiece alone would not give are done here: a literal U+2581 (its own
sign for a space) is encoded as three byte tokens, and decoding joins bytes itself. Chat markers are control symbols,
which SentencePiece never matches in text: a user who writes "<|user|>" gets the tokens of those eight characters.

A conversation is `<|user|>text<|end|><|assistant|>text<|end|>`: one marker a turn, one end, nothing else (ours; the
paper gives no format). Training is in `pretrain/tokenizer_training.py`, the Hugging Face form in `tokenizer_export.py`.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import sentencepiece

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
FILE_NAME = "tokenizer.model"

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


class Tokenizer:
    """Text to token ids and back, exactly. Made by `load`, `train_tokenizer` or from a tokenizer.model's bytes."""

    def __init__(self, model: bytes) -> None:
        """Raises ValueError when `model` is no SentencePiece model, or not one trained by this project's rules."""
        try:
            self._processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        except RuntimeError as error:
            raise ValueError(f"not a SentencePiece model ({len(model)} bytes): {error}") from error
        self._model = model
        self._piece_bytes = _piece_bytes(self._processor)
        self._byte_ids = {self._processor.id_to_piece(i): i for i in self._ids_where(self._processor.is_byte)}
        self._check()
        self._roles = {role: self._processor.piece_to_id(piece) for role, piece in ROLE_PIECES.items()}
        self._space_sign_ids = [self._byte_ids[f"<0x{byte:02X}>"] for byte in SPACE_SIGN.encode()]

    def _check(self) -> None:
        pieces = [self._processor.id_to_piece(i) for i in range(min(len(MARKER_PIECES), self.vocab_size))]
        if tuple(pieces) != MARKER_PIECES:
            raise ValueError(
                f"this SentencePiece model is not of this project: its first pieces are {pieces}, "
                f"expected {list(MARKER_PIECES)}; train one with pretrain.tokenizer_training.train_tokenizer"
            )
        if len(self._byte_ids) != 256:
            raise ValueError(f"the SentencePiece model has {len(self._byte_ids)} byte pieces, needs 256 (byte_fallback)")

    def _ids_where(self, condition: Callable[[int], bool]) -> list[int]:
        return [i for i in range(self.vocab_size) if condition(i)]

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> Tokenizer:
        """Read `folder`/tokenizer.model. Raises FileNotFoundError or ValueError, naming the file."""
        path = Path(folder) / FILE_NAME
        if not path.is_file():
            raise FileNotFoundError(f"{path} does not exist: a tokenizer folder of this project holds a {FILE_NAME}")
        try:
            return cls(path.read_bytes())
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write `folder`/tokenizer.model, whole or not at all."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        path = Path(folder) / FILE_NAME
        temporary = path.with_name(f"{FILE_NAME}.{os.getpid()}.tmp")
        temporary.write_bytes(self._model)
        temporary.replace(path)

    def __reduce__(self) -> tuple[type[Tokenizer], tuple[bytes]]:
        return Tokenizer, (self._model,)

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
        """Ends a turn of a conversation; what a response is trained to finish with."""
        return self._processor.piece_to_id(END_OF_TURN_PIECE)

    @property
    def chat_template(self) -> str:
        """The conversation format as a Jinja template, for Hugging Face's `apply_chat_template`."""
        return CHAT_TEMPLATE

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the model's bytes, in hex: equal fingerprints give equal ids."""
        return hashlib.sha256(self._model).hexdigest()

    @property
    def pieces(self) -> list[str]:
        """The vocabulary in the order of ids, spaces as U+2581, bytes as <0xNN>."""
        return [self._processor.id_to_piece(i) for i in range(self.vocab_size)]

    def encode(self, text: str) -> list[int]:
        """The ids of `text`, never a marker's: `decode(encode(text)) == text` for every string that is valid Unicode.

        Raises ValueError for a lone surrogate, which no UTF-8 text can hold.
        """
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(
                f"character {error.start} of the text is the lone surrogate {text[error.start]!r}, not Unicode text; "
                "drop it with text.encode('utf-8', 'ignore').decode()"
            ) from error
        first, *rest = text.split(SPACE_SIGN)
        ids = self._processor.encode(first)
        for part in rest:
            ids += self._space_sign_ids
            ids += self._processor.encode(part)
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids`: markers give nothing, invalid UTF-8 gives U+FFFD. Raises ValueError for an unknown id."""
        return b"".join(self.token_bytes(int(i)) for i in ids).decode("utf-8", "replace")

    def token_bytes(self, token: int) -> bytes:
        """The UTF-8 bytes one id stands for (perhaps part of a character; empty for a marker), for streaming."""
        if not 0 <= token < len(self._piece_bytes):
            raise ValueError(f"token id {token} is outside the vocabulary of {self.vocab_size}")
        return self._piece_bytes[token]

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

    def encode_response(self, text: str) -> list[int]:
        """The ids of a turn's text and its end."""
        return [*self.encode(text), self.end_of_turn_id]


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
