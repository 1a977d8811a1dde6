"""Tokens to text, one at a time: what a stream may send of a response that is still being written.

Two things are held back until they are certain: bytes that may be the beginning of a character (a character can span
several tokens), and characters that may be the beginning of a stop string. The pieces sent add up to the decoded
response, cut before the first stop string; whole responses run through the same class, so that streamed and unstreamed
answers agree.
"""

from __future__ import annotations

import codecs
from collections.abc import Callable, Sequence


class ResponseText:
    """Incremental decoder of one response.

    `token_bytes` gives the UTF-8 bytes of each token in order (`Tokenizer.byte_stream`); bytes that are not UTF-8 become
    U+FFFD. A stop string is found where it is first complete, as if the text came character by character, and is not part
    of the text.
    """

    def __init__(self, token_bytes: Callable[[int], bytes], *, stop: Sequence[str] = ()) -> None:
        self._token_bytes = token_bytes
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._stop = tuple(stop)
        self._held = ""  # decoded, but perhaps the beginning of a stop string
        self.stopped = False

    def push(self, token: int) -> str:
        """Take the next token; return the text that is certain now. Nothing follows once `stopped` is true."""
        return "" if self.stopped else self._cut(self._decoder.decode(self._token_bytes(token)))

    def close(self) -> str:
        """The rest: an incomplete character becomes U+FFFD, the beginning of a stop string is text after all."""
        if self.stopped:
            return ""
        text = self._cut(self._decoder.decode(b"", final=True))
        text, self._held = text + self._held, ""
        return text

    def _cut(self, text: str) -> str:
        held = self._held + text
        found = [(held.find(stop) + len(stop), held.find(stop)) for stop in self._stop if stop in held]
        if found:
            self.stopped, self._held = True, ""
            return held[: min(found)[1]]
        keep = max((_overlap(held, stop) for stop in self._stop), default=0)
        self._held = held[len(held) - keep :]
        return held[: len(held) - keep]


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that is a beginning of `stop`, short of all of it."""
    longest = min(len(text), len(stop) - 1)
    return next((size for size in range(longest, 0, -1) if text.endswith(stop[:size])), 0)
