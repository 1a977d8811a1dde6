"""Train the tokenizer (paper 3.1.6): SentencePiece BPE, digits split, byte fallback, no normalisation.

Two choices are ours. A newline is a symbol of its own (training is line by line, so it would never be learnt), and
every printable ASCII character has a token whatever the corpus holds. Equal texts in equal order give equal bytes.
"""

from __future__ import annotations

import io
import os
import random
import re
import string
from collections.abc import Iterable, Iterator

import sentencepiece

from afm_rl.errors import UserError
from afm_rl.tokenizer_afm import (
    END_OF_TURN_PIECE,
    EOS_PIECE,
    MARKER_PIECES,
    PAD_PIECE,
    ROLE_PIECES,
    SPACE_SIGN,
    UNKNOWN_PIECE,
    AfmTokenizer,
)

_NEWLINE = "\n"
_REQUIRED = "".join(sorted(set(string.printable) - {" ", _NEWLINE, "\x0b", "\x0c"}))
#: Markers, the newline, 256 bytes, the space and the required characters: what is there before anything is learnt.
MIN_VOCAB_SIZE = len(MARKER_PIECES) + 1 + 256 + 1 + len(_REQUIRED)
#: SentencePiece skips what it cannot hold in one piece; longer lines are cut here instead of lost.
_MAX_LINE_CHARS = 4000
#: Never learnt from: the markers' spelling, SentencePiece's own signs (space, unknown), NUL (it drops such lines).
_NOT_LEARNT = re.compile("|".join(re.escape(s) for s in (*MARKER_PIECES, SPACE_SIGN, "\u2585", "\x00")))


class TokenizerTrainingError(UserError, ValueError):
    """The corpus and the requested vocabulary do not go together."""


def train_tokenizer(
    texts: Iterable[str],
    *,
    vocab_size: int,
    folder: str | os.PathLike[str],
    max_chars: int = 8_000_000,
) -> AfmTokenizer:
    """Learn `vocab_size` pieces from `texts` and save the tokenizer in `folder`.

    At most `max_chars` characters are learnt from: a fixed pseudo-random sample of whole texts (4 MB take a second).
    Raises TokenizerTrainingError for an empty corpus, or a `vocab_size` below MIN_VOCAB_SIZE or too large for it.
    """
    if vocab_size < MIN_VOCAB_SIZE:
        raise TokenizerTrainingError(
            f"tokenizer.vocab_size must be at least {MIN_VOCAB_SIZE} (bytes, ASCII and markers), got {vocab_size}"
        )
    lines = list(_lines(_sample(texts, max_chars)))
    if not lines:
        raise TokenizerTrainingError("the tokenizer has no text to learn from: the corpus is empty")
    tokenizer = AfmTokenizer(_train(lines, vocab_size))
    tokenizer.save(folder)
    return tokenizer


def _train(lines: list[str], vocab_size: int) -> bytes:
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(lines),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            split_digits=True,
            byte_fallback=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=False,
            allow_whitespace_only_pieces=True,
            required_chars=_REQUIRED,
            user_defined_symbols=[_NEWLINE],
            control_symbols=[*ROLE_PIECES.values(), END_OF_TURN_PIECE],
            pad_id=MARKER_PIECES.index(PAD_PIECE),
            eos_id=MARKER_PIECES.index(EOS_PIECE),
            unk_id=MARKER_PIECES.index(UNKNOWN_PIECE),
            bos_id=-1,
            pad_piece=PAD_PIECE,
            eos_piece=EOS_PIECE,
            unk_piece=UNKNOWN_PIECE,
            max_sentence_length=8 * _MAX_LINE_CHARS,
            shuffle_input_sentence=False,
            num_threads=1,  # it is written into the model: a machine's core count must not change the bytes
            minloglevel=2,
        )
    except RuntimeError as error:
        raise TokenizerTrainingError(_too_small(vocab_size, lines, str(error))) from error
    return model.getvalue()


def _too_small(vocab_size: int, lines: list[str], cause: str) -> str:
    limit = re.search(r"value <= (\d+)", cause)
    most = f"it gives at most {limit[1]} pieces" if limit else cause
    return (
        f"tokenizer.vocab_size {vocab_size} is too large for this corpus ({sum(map(len, lines))} characters in "
        f"{len(lines)} lines): {most}; give it more text or a smaller vocabulary"
    )


def _sample(texts: Iterable[str], max_chars: int) -> list[str]:
    """All of `texts`, or a fixed random choice of them holding about `max_chars` characters, in their first order."""
    every = list(texts)
    order = list(range(len(every)))
    random.Random(0).shuffle(order)
    chosen, left = [], max_chars
    for index in order:
        if left <= 0:
            break
        chosen.append((index, every[index][:left]))
        left -= len(every[index])
    return [text for _, text in sorted(chosen)]


def _lines(texts: Iterable[str]) -> Iterator[str]:
    for text in texts:
        clean = text.encode("utf-8", "ignore").decode()
        for line in clean.split(_NEWLINE):
            for part in _NOT_LEARNT.split(line):
                yield from (part[i : i + _MAX_LINE_CHARS] for i in range(0, len(part), _MAX_LINE_CHARS))
