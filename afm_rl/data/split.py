"""The split between training and held-out data: by a hash of the content, never by position or by a random draw.

The same item therefore falls on the same side in every run, on every machine and in every file it is in, whatever
was added around it. The paper only says that benchmarks are held out (3.1.5); splitting by hash is our choice.
"""

from __future__ import annotations

import hashlib
import json

from afm_rl.types import Prompt


def stable_hash(*parts: str) -> int:
    """A 64-bit hash of strings, the same in every process. The borders between the parts count."""
    text = json.dumps(parts, ensure_ascii=True)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")


def is_held_out(key: str, *, fraction: float, salt: str) -> bool:
    """Whether `key` is among the `fraction` (0..1) of all keys that training never sees."""
    if not 0.0 <= fraction <= 1.0:
        raise ValueError(f"fraction must be between 0 and 1, got {fraction}")
    return stable_hash(salt, key) < fraction * 2**64


def conversation_key(prompt: Prompt) -> str:
    """The identity of a prompt's text: equal for two prompts exactly when their messages are equal, whatever the id."""
    return json.dumps([[message.role, message.content] for message in prompt.messages], ensure_ascii=True)
