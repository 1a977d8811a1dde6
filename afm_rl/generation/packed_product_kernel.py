"""The product of packed_weight.py as a compiled CPU kernel.

An item of work is one block of 32 outputs of a few rows of x. T rows at a time share each number of the weight, which comes
from memory for the first of them and from the cache for the others. The sum over the inputs is taken CHUNK steps at a time.

Shapes: R rows, I inputs, B blocks, S steps, T rows that share what is read of the weight. Addresses are plain integers.
"""

from __future__ import annotations

from numba import int64

from afm_rl.generation.cpu_accumulate import accumulate, accumulate_bfloat16
from afm_rl.generation.cpu_ffi import (
    OWN_WORDS,
    compiled,
    dimension,
    item_done,
    let_go,
    new_context,
    next_item,
    operand,
    result,
    result_is_bfloat16,
    set_items,
)
from afm_rl.generation.cpu_memory import prefetch, read_word, scratch, write_word
from afm_rl.generation.cpu_vector import (
    add,
    count,
    doubled,
    lanes,
    load_rows,
    store_bfloat16,
    store_rows,
    zeros,
)

#: Steps whose products are summed one after another; the sums of chunks are then added.
CHUNK = 256

#: Rows of an item.
_ITEM_ROWS = 64

#: Bytes of the weight ahead of the one that is multiplied: what memory delivers while it answers.
_AHEAD_BYTES = 4096

#: Bytes of weights, or as many products of eight rows, that take about as long as waking a thread.
_BYTES_PER_THREAD = 32768

# The words of a call's context.
_X, _WEIGHT, _OUT, _ROWS, _STEPS, _OUTPUTS, _ROW_ITEMS, _PAIRS, _ROUNDED = (OWN_WORDS + 8 * i for i in range(9))
_WORDS = 9


@compiled
def start(frame):
    """The context of a call and its items."""
    context = new_context(_WORDS)
    rows, blocks, steps = dimension(frame, 0, 0), dimension(frame, 1, 0), dimension(frame, 1, 1)
    row_items = (rows + _ITEM_ROWS - 1) // _ITEM_ROWS
    write_word(context + _X, operand(frame, 0))
    write_word(context + _WEIGHT, operand(frame, 1))
    write_word(context + _OUT, result(frame, 0))
    write_word(context + _ROWS, rows)
    write_word(context + _STEPS, steps)
    write_word(context + _OUTPUTS, blocks * 32)
    write_word(context + _ROW_ITEMS, row_items)
    write_word(context + _PAIRS, int64(dimension(frame, 1, 3) == 2))
    write_word(context + _ROUNDED, int64(result_is_bfloat16(frame, 0)))
    set_items(context, blocks * row_items, 1 + blocks * steps * 128 * (8 + rows) // 8 // _BYTES_PER_THREAD)
    return context


@compiled
def work(context, tile):
    """Items until there are none; `tile` is one vector for each of T rows."""
    rows, row_items = read_word(context + _ROWS), read_word(context + _ROW_ITEMS)
    area = scratch(2 * 8 * 64)
    item = next_item(context)
    while item >= 0:
        first = item % row_items * _ITEM_ROWS
        for row in range(first, min(first + _ITEM_ROWS, rows), count(tile)):
            _multiply(context, item // row_items, min(row, rows - count(tile)), tile, area)
        item_done(context)
        item = next_item(context)
    let_go(context)


@compiled
def _multiply(context, block, row, tile, area):
    """A block's outputs of the rows from `row` on that `tile` has. The last rows are taken with some before them, again."""
    steps, T = read_word(context + _STEPS), count(tile)
    pair = doubled(tile)
    x = read_word(context + _X) + 4 * steps * row
    weight = read_word(context + _WEIGHT) + 128 * steps * block
    store_rows(zeros(pair), area, 64)
    for first in range(0, steps, CHUNK):
        sums = _chunk(context, x + 4 * first, weight + 128 * first, min(CHUNK, steps - first), tile)
        store_rows(add(load_rows(pair, area, 64), sums), area, 64)
    for half in range(2):
        outputs, place = read_word(context + _OUTPUTS), 32 * block + lanes(tile) * half
        sums = load_rows(tile, area + 64 * T * half, 64)
        if read_word(context + _ROUNDED) != 0:
            store_bfloat16(sums, read_word(context + _OUT) + 2 * (outputs * row + place), 2 * outputs)
        else:
            store_rows(sums, read_word(context + _OUT) + 4 * (outputs * row + place), 4 * outputs)


@compiled
def _chunk(context, x, weight, steps, tile):
    """The sums over some steps."""
    x_bytes = 4 * read_word(context + _STEPS)
    sums = zeros(doubled(tile))
    if read_word(context + _PAIRS) != 0:
        for _ in range(steps):
            prefetch(weight + _AHEAD_BYTES)
            prefetch(weight + _AHEAD_BYTES + 64)
            sums = accumulate_bfloat16(sums, weight, x, x_bytes, tile)
            weight += 128
            x += 4
    else:
        for _ in range(steps):
            prefetch(weight + _AHEAD_BYTES)
            prefetch(weight + _AHEAD_BYTES + 64)
            sums = accumulate(sums, weight, x, x_bytes, tile)
            weight += 128
            x += 4
    return sums
