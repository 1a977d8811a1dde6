"""From records to batches: demonstrations for fine-tuning, preferences for the reward model, DPO and IPO.

Each builder returns `batches(step)`, a pure function of (records, seed, step). Shapes: B pairs, T time; preference batches
hold the chosen rows first, then the rejected ones.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from afm_rl.errors import UserError
from afm_rl.packing import Batch, Example, epoch_rows, pack, pad
from afm_rl.tokenizer import Tokenizer
from afm_rl.types import GRADINGS, Demonstration, Grades, Preference, Prompt

Batches = Callable[[int], Batch]


def example(tokenizer: Tokenizer, prompt: Prompt, response: str, *, limit: int) -> Example:
    """Prompt and response as one document whose targets are the response's tokens. UserError when over `limit` tokens."""
    prompt_ids = tokenizer.encode_chat(prompt.messages)
    tokens = [*prompt_ids, *tokenizer.encode_response(response)]
    if len(tokens) > limit:
        raise UserError(
            f"the record {prompt.id!r} takes {len(tokens)} tokens and the stage's sequence_length is {limit}: raise it, or "
            "shorten the record"
        )
    return Example(tokens, first_target=len(prompt_ids))


def num_tokens(tokenizer: Tokenizer, prompt: Prompt, response: str | None) -> int:
    """What prompt and response take together; None: the prompt alone."""
    answer = 0 if response is None else len(tokenizer.encode_response(response))
    return len(tokenizer.encode_chat(prompt.messages)) + answer


def supervised_batches(
    tokenizer: Tokenizer, demonstrations: Sequence[Demonstration], *, length: int, batch: int, seed: int
) -> Batches:
    """Packed rows of demonstrations, in endless shuffled epochs."""
    rows = pack(
        [example(tokenizer, d.prompt, d.response, limit=length) for d in demonstrations],
        length=length,
        pad_id=tokenizer.pad_id,
        too_long="refuse",
    )
    return lambda step: rows.take(epoch_rows(step, batch=batch, rows=len(rows), seed=seed))


def preference_rows(tokenizer: Tokenizer, preferences: Sequence[Preference], *, length: int) -> Batch:
    """All pairs as one padded batch: tokens_BT, mask_BT, length_B, grades [2B, 4] (chosen first), level_B [B]."""
    examples = [example(tokenizer, p.prompt, p.chosen, limit=length) for p in preferences]
    examples += [example(tokenizer, p.prompt, p.rejected, limit=length) for p in preferences]
    grades = [_classes(p.chosen_grades) for p in preferences] + [_classes(p.rejected_grades) for p in preferences]
    return {
        **pad(examples, pad_id=tokenizer.pad_id),
        "length_B": np.array([len(e.tokens) for e in examples], np.int32),
        "grades": np.array(grades, np.int32),
        "level_B": np.array([p.level for p in preferences], np.int32),
    }


def pair_batches(rows: Batch, *, batch: int, seed: int) -> Batches:
    """`batches(step)` of `batch` pairs out of `preference_rows` (with whatever per-row columns were added to them)."""
    pairs = len(rows["level_B"])

    def batches(step: int) -> Batch:
        picked = epoch_rows(step, batch=batch, rows=pairs, seed=seed)
        both = np.concatenate([picked, picked + pairs])
        return {name: values[picked if name == "level_B" else both] for name, values in rows.items()}

    return batches


def _classes(grades: Grades) -> list[int]:
    return [getattr(grades, name) for name in GRADINGS]
