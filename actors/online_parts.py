"""How the rows of an online batch pass through the model: cut into microbatches, without computing what is not needed.

A row is a prompt and a response, padded to the right and not packed. A microbatch has one of three layouts:

- whole: rows of like length, every [B, T] entry as wide as they are;
- window: the same rows, but the other entries, and so the logits, from each row's first target on (`first_B`);
- shared: each prompt once, in front of its group's responses (`afm_rl/shared_prompt.py`).

Widths are rounded up, so that few shapes are compiled. Shapes: P prompts, G responses per prompt, B rows, T time.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from afm_rl.packing import Batch, length_buckets
from afm_rl.shared_prompt import fits


@dataclass(frozen=True)
class Part:
    """A microbatch: which rows, padded to which width.

    `window`: how wide their responses are (None: layout whole). `group`: that many rows in a row share a prompt of
    `prompt_width` (0: none do).
    """

    rows: np.ndarray
    width: int
    window: int | None = None
    group: int = 0
    prompt_width: int = 0

    def cut(self, batch: Batch, first_B: np.ndarray) -> Batch:
        """The microbatch out of a padded batch, whose scalars belong to the whole and stay."""
        if self.window is None:
            return {
                n: v[self.rows, : self.width] if v.ndim == 2 else v[self.rows] if v.ndim else v for n, v in batch.items()
            }
        index_BT = first_B[self.rows][:, None] + np.arange(self.window)
        found: Batch = {}
        for name, value in batch.items():
            if value.ndim == 2 and (self.group or name != "tokens_BT"):
                beyond = np.pad(value[self.rows], ((0, 0), (0, self.window)))
                found[name] = np.take_along_axis(beyond, index_BT, axis=1)
            elif value.ndim == 2:
                found[name] = value[self.rows, : self.width]
            else:
                found[name] = value[self.rows] if value.ndim else value
        if not self.group:
            return {**found, "first_B": first_B[self.rows].astype(np.int32)}
        leading = self.rows[:: self.group]
        length_P = first_B[leading].astype(np.int32)
        return {**found, "prompt_PS": batch["tokens_BT"][leading, : self.prompt_width], "length_P": length_P}

    def put_back(self, whole_BT: np.ndarray, value_BT: np.ndarray, first_B: np.ndarray) -> None:
        """Write a microbatch's [B, T] result into the rows of the whole batch's array."""
        if self.window is None:
            whole_BT[self.rows, : self.width] = value_BT
            return
        index_BT = first_B[self.rows][:, None] + np.arange(self.window)
        inside_BT = index_BT < whole_BT.shape[1]
        row_BT = np.broadcast_to(self.rows[:, None], index_BT.shape)
        whole_BT[row_BT[inside_BT], index_BT[inside_BT]] = value_BT[inside_BT]


def cut_into_parts(
    unit_rows: np.ndarray,
    *,
    first_B: np.ndarray,
    end_B: np.ndarray,
    rows: int,
    group: int,
    whole_rows: bool,
    share: bool = True,
) -> list[Part]:
    """Microbatches of at most `rows` rows.

    Args:
      unit_rows: [units, n], the rows that stay together; of a part, all first rows of its units come before the second.
      first_B, end_B: where each row's response begins and ends.
      group: consecutive rows with the same prompt; 1: none.
      whole_rows: no layout but the first.
      share: whether to consider the last. It is one flat row, which a mesh cannot cut: every device would compute it all.
    """
    if share and not whole_rows and 1 < group <= rows and unit_rows.shape[1] == 1:
        shared = _shared(unit_rows.reshape(-1, group), first_B=first_B, end_B=end_B, rows=rows)
        if shared:
            return shared
    parts = []
    for units, width in length_buckets(end_B[unit_rows].max(axis=1), rows=max(rows // unit_rows.shape[1], 1)):
        of_part = unit_rows[units].T.reshape(-1)
        window = _power_of_two((end_B - first_B)[of_part].max())
        parts.append(Part(of_part, width, None if whole_rows or 4 * window > 3 * width else window))
    return parts


def _shared(groups_PG: np.ndarray, *, first_B: np.ndarray, end_B: np.ndarray, rows: int) -> list[Part]:
    """The microbatches of whole groups, each prompt once; none where that computes no less."""
    G, parts = groups_PG.shape[1], []
    for groups, width in length_buckets(end_B[groups_PG].max(axis=1), rows=rows // G):
        of_part = groups_PG[groups].reshape(-1)
        prompt_width = _multiple_of_16(first_B[of_part].max())
        window = _multiple_of_16((end_B - first_B)[of_part].max())
        if not fits(prompt_tokens=prompt_width, response_tokens=window, group=G, row_tokens=width):
            return []
        parts.append(Part(of_part, width, window, group=G, prompt_width=prompt_width))
    return parts


def _multiple_of_16(tokens: int) -> int:
    return -(-int(tokens) // 16) * 16


def _power_of_two(tokens: int) -> int:
    return max(16, 1 << (int(tokens) - 1).bit_length())
