"""Our tokenizer as Hugging Face reads it: tokenizer.json and tokenizer_config.json, written without their library.

Same ids for every text (their BPE merges pairs by rank, ours pieces by rank, hence `_merges`). Spaces stand in the
vocabulary as themselves instead of U+2581 plus a replacing normaliser, so a literal U+2581 falls to bytes there too.
One difference is wanted: their tokenizers turn a marker spelt in the text into the marker's id, which is how their chat
templates work. Pass `split_special_tokens=True` there for text that is not trusted.
"""

from __future__ import annotations

import itertools
from typing import Any

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


def tokenizer_json(tokenizer: AfmTokenizer) -> dict[str, Any]:
    """The content of tokenizer.json: a byte-fallback BPE whose encoding equals `tokenizer.encode`."""
    pieces = [piece.replace(SPACE_SIGN, " ") for piece in tokenizer.pieces]
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [_added_token(token, piece) for token, piece in enumerate(MARKER_PIECES)],
        "normalizer": None,
        "pre_tokenizer": None,
        "post_processor": None,
        "decoder": {"type": "Sequence", "decoders": [{"type": "ByteFallback"}, {"type": "Fuse"}]},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": UNKNOWN_PIECE,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": True,
            "ignore_merges": False,
            "vocab": {piece: token for token, piece in enumerate(pieces)},
            "merges": _merges(pieces),
        },
    }


def tokenizer_config(tokenizer: AfmTokenizer, *, max_positions: int) -> dict[str, Any]:
    """The content of tokenizer_config.json, with the chat template; pads on the left, as generation there wants."""
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "pad_token": PAD_PIECE,
        "eos_token": EOS_PIECE,
        "unk_token": UNKNOWN_PIECE,
        "additional_special_tokens": [*ROLE_PIECES.values(), END_OF_TURN_PIECE],
        "clean_up_tokenization_spaces": False,
        "model_max_length": max_positions,
        "padding_side": "left",
        "chat_template": tokenizer.chat_template,
    }


def _added_token(token: int, piece: str) -> dict[str, Any]:
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return {"id": token, "content": piece, **flags}


def _merges(pieces: list[str]) -> list[list[str]]:
    """Every pair that makes a learnt piece, the pieces in the order they were learnt.

    Learnt pieces come first to last in the vocabulary, single characters after them. A piece may have several splits;
    the one that its own text goes through is put first, though no other is ever met while ranks decide.
    """
    first_learnt = len(MARKER_PIECES) + 1 + 256
    learnt = pieces[first_learnt:]
    rank = {piece: i for i, piece in enumerate(learnt) if len(piece) > 1}
    known = set(learnt)
    merges = []
    for piece in rank:
        splits = [(piece[:i], piece[i:]) for i in range(1, len(piece)) if piece[:i] in known and piece[i:] in known]
        own = _last_merge(piece, rank)
        merges += [list(split) for split in sorted(splits, key=lambda split: split != own)]
    return merges


def _last_merge(piece: str, rank: dict[str, int]) -> tuple[str, str]:
    """The pair left when `piece` itself is encoded, one merge before the end."""
    symbols = list(piece)
    while len(symbols) > 2:
        joined = [rank.get(left + right, len(rank)) for left, right in itertools.pairwise(symbols)]
        at = min(range(len(joined)), key=joined.__getitem__)
        symbols[at : at + 2] = [symbols[at] + symbols[at + 1]]
    return symbols[0], symbols[1]
