"""Attention over the paged cache as one compiled CPU kernel: writes keys and values, then reads every page once.

Paper section 2 (grouped-query attention). An item of work is one kv head of a few tokens. All M query heads of the kv head
share what is read, and so do the tokens where they are of one row (a prompt). The softmax is taken BLOCK positions at a
time, with a running maximum. The order of a token's arithmetic depends on its own position and the model's shape alone:
blocks and pages are counted from position 0, whatever else is in the call.

Shapes: N tokens, Q query heads, K kv heads, M query heads per kv head, H head dim, R rows, B pages of a row, T tokens that
share an item, G = T M rows of registers. Addresses are plain integers, lengths without a unit are counts.
"""

from __future__ import annotations

import math

from numba import float32, int64

from afm_rl.generation.cpu_accumulate import accumulate
from afm_rl.generation.cpu_ffi import (
    OWN_WORDS,
    compiled,
    dimension,
    integer_attribute,
    item_done,
    let_go,
    new_context,
    next_item,
    operand,
    result,
    set_items,
    wait_for,
)
from afm_rl.generation.cpu_memory import (
    prefetch,
    read_float,
    read_int,
    read_word,
    scratch,
    write_float,
    write_int,
    write_word,
)
from afm_rl.generation.cpu_vector import (
    add,
    count,
    divide,
    exp,
    hide,
    lanes,
    lanes_maximum,
    lanes_sum,
    load_rows,
    maximum,
    minus_infinity,
    multiply,
    multiply_add,
    repeated,
    shared,
    splat_rows,
    store_rows,
    subtract,
    zeros,
)

#: Positions whose scores are held at a time.
BLOCK = 128

#: The largest head dim and number of query heads per kv head: what fits the scratch on a thread's stack.
MAX_HEAD_DIM = 512
MAX_HEADS_PER_KV = 8

#: Multiplications of a query and a key that take about as long as waking a thread.
_PRODUCTS_PER_THREAD = 32768

#: Pages of a row that are asked for before they are read: memory answers in about the time that two take.
_FETCH_AHEAD = 2

#: Tokens of an item that writes: whole pages of a prompt, as two threads in one page would fight for its cache lines.
_WRITTEN_TOGETHER = 64

# The words of a call's context.
_Q, _K, _V, _POSITION, _ROW, _BLOCKS, _OUT, _KEYS, _VALUES = (OWN_WORDS + 8 * i for i in range(9))
_TOKENS, _HEADS, _KV_HEADS, _HEAD_DIM, _PAGE, _ROW_PAGES, _GROUPS, _WRITES = (OWN_WORDS + 8 * i for i in range(9, 17))
_WORDS = 17

# A thread's scratch: queries [G, H], mixed values [H / lanes, G, lanes], scores [G, BLOCK], totals [G, lanes], limits [G].
_SUMS = 4 * MAX_HEADS_PER_KV * MAX_HEAD_DIM
_SCORES = 2 * _SUMS
_TOTALS = _SCORES + 4 * MAX_HEADS_PER_KV * BLOCK
_LIMITS = _TOTALS + 64 * MAX_HEADS_PER_KV
_SCRATCH = _LIMITS + 64


@compiled
def start(frame, sharing):
    """The context of a call: the arrays' addresses, this layer's in the pools, and the items of `sharing` tokens each."""
    context = new_context(_WORDS)
    for i in range(3):
        write_word(context + _Q + 8 * i, operand(frame, i))
        write_word(context + _POSITION + 8 * i, operand(frame, 5 + i))
    N, Q, H = dimension(frame, 0, 0), dimension(frame, 0, 1), dimension(frame, 0, 2)
    K, page = dimension(frame, 1, 1), dimension(frame, 3, 4)
    layer_bytes = integer_attribute(frame, 0) * dimension(frame, 3, 1) * K * H * page * 4
    write_word(context + _OUT, result(frame, 0))
    write_word(context + _KEYS, result(frame, 1) + layer_bytes)
    write_word(context + _VALUES, result(frame, 2) + layer_bytes)
    write_word(context + _TOKENS, N)
    write_word(context + _HEADS, Q)
    write_word(context + _KV_HEADS, K)
    write_word(context + _HEAD_DIM, H)
    write_word(context + _PAGE, page)
    write_word(context + _ROW_PAGES, dimension(frame, 7, 1))
    groups = (N + sharing - 1) // sharing
    keys, one_each = _look_over(context)
    writes = 0 if one_each else (N + _WRITTEN_TOGETHER - 1) // _WRITTEN_TOGETHER * K
    write_word(context + _GROUPS, groups)
    write_word(context + _WRITES, writes)
    set_items(context, writes + groups * K, 1 + keys * Q * H // _PRODUCTS_PER_THREAD)
    return context


@compiled
def _look_over(context):
    """How many keys all tokens read together, and whether every token is its row's only one (rows in increasing order)."""
    keys, row, one_each = 0, -1, True
    for n in range(read_word(context + _TOKENS)):
        position = int64(read_int(read_word(context + _POSITION) + 4 * n))
        if position >= 0:
            this = int64(read_int(read_word(context + _ROW) + 4 * n))
            one_each = one_each and this > row
            row = this
            keys += position + 1
    return keys, one_each


@compiled
def work(context, rows):
    """Items until there are none."""
    area = scratch(_SCRATCH)
    item = next_item(context)
    while item >= 0:
        _item(context, item, rows, area)
        item_done(context)
        item = next_item(context)
    let_go(context)


@compiled
def _item(context, item, rows, area):
    """An item: one kv head of a few tokens. Where tokens of one row come together, all are written before any reads."""
    N, K = read_word(context + _TOKENS), read_word(context + _KV_HEADS)
    groups, writes = read_word(context + _GROUPS), read_word(context + _WRITES)
    if item < writes:
        start = item // K * _WRITTEN_TOGETHER
        for n in range(start, min(start + _WRITTEN_TOGETHER, N)):
            _write(context, n, item % K)
        return
    tile = shared(rows)
    sharing = count(tile) // count(rows)
    item = writes + groups * K - 1 - item  # backwards: a prompt's last tokens read most
    kv, start = item // groups, item % groups * sharing
    end = min(start + sharing, N)
    if writes > 0:
        wait_for(context, writes)
    if sharing > 1 and writes > 0 and _of_one_row(context, start, end, sharing):
        _attend(context, start, start, kv, rows, tile, area)
    else:
        for n in range(start, end):
            following = n + 1 if n + 1 < end and read_int(read_word(context + _POSITION) + 4 * n + 4) >= 0 else n
            _attend(context, n, following, kv, rows, rows, area)


@compiled
def _of_one_row(context, start, end, number):
    """Whether tokens start..end are `number`, none of them padding, of the same row."""
    row = read_int(read_word(context + _ROW) + 4 * start)
    one = end - start == number
    for n in range(start, end):
        one = one and read_int(read_word(context + _ROW) + 4 * n) == row
        one = one and read_int(read_word(context + _POSITION) + 4 * n) >= 0
    return one


@compiled
def _page_start(context, row, number, kv):
    """Where a row's page lies in a layer's keys or values, from the layer's start."""
    page = int64(read_int(read_word(context + _BLOCKS) + 4 * (row * read_word(context + _ROW_PAGES) + number)))
    size = read_word(context + _HEAD_DIM) * read_word(context + _PAGE)
    return 4 * size * (page * read_word(context + _KV_HEADS) + kv)


@compiled
def _upcoming(context, row, number, pages, next_row, kv):
    """The page to fetch while page `number` of a row is read: two further, or one of the row that is read next."""
    number += _FETCH_AHEAD
    if number < pages:
        return _page_start(context, row, number, kv)
    return _page_start(context, next_row, min(number - pages, read_word(context + _ROW_PAGES) - 1), kv)


@compiled
def _write(context, n, kv):
    """A token's key and value of one kv head into their page."""
    position = int64(read_int(read_word(context + _POSITION) + 4 * n))
    if position < 0:
        return
    H, page = read_word(context + _HEAD_DIM), read_word(context + _PAGE)
    place = position % page
    start = _page_start(context, int64(read_int(read_word(context + _ROW) + 4 * n)), position // page, kv)
    token = 4 * H * (n * read_word(context + _KV_HEADS) + kv)
    k, keys = read_word(context + _K) + token, read_word(context + _KEYS) + start + 4 * place
    v, values = read_word(context + _V) + token, read_word(context + _VALUES) + start + 4 * H * place
    for h in range(H):
        write_float(keys + 4 * page * h, read_float(k + 4 * h))
        write_float(values + 4 * h, read_float(v + 4 * h))


@compiled
def _attend(context, n, following, kv, rows, tile, area):
    """One kv head of the tokens from n on that fill `tile`, all of one row; a padding token, which is alone, gets zeros.

    The first pages of token `following` are fetched at the end.
    """
    H, page = read_word(context + _HEAD_DIM), read_word(context + _PAGE)
    last = _prepare(context, n, kv, rows, tile, area)
    row = int64(read_int(read_word(context + _ROW) + 4 * n))
    next_row = int64(read_int(read_word(context + _ROW) + 4 * following))
    pages = (last + page) // page
    at_once = max(1, BLOCK // page)
    top, total = minus_infinity(tile), zeros(tile)
    for first in range(0, pages, at_once):
        end = min(first + at_once, pages)
        if end == pages and read_word(context + _WRITES) == 0:
            _write(context, n, kv)
        new_top = maximum(top, lanes_maximum(_score(context, row, next_row, kv, first, end, pages, tile, area)))
        kept = exp(subtract(top, new_top))
        top = new_top
        total = multiply_add(total, kept, _weigh(tile, top, (end - first) * page, area))
        for j in range(H // lanes(tile)):
            sums = area + _SUMS + 4 * lanes(tile) * count(tile) * j
            store_rows(multiply(load_rows(tile, sums, 4 * lanes(tile)), kept), sums, 4 * lanes(tile))
        _mix(context, row, next_row, kv, first, end, last, tile, area)
    store_rows(lanes_sum(total), area + _TOTALS, 4 * lanes(tile))
    _finish(context, n, kv, rows, tile, area, last)


@compiled
def _prepare(context, n, kv, rows, tile, area):
    """Scaled queries and the tokens' positions into the scratch, zeros where values are summed; the last position."""
    H, M, W = read_word(context + _HEAD_DIM), count(rows), lanes(rows)
    write_float(area + _TOTALS, float32(1.0 / math.sqrt(H)))
    scale = splat_rows(rows, area + _TOTALS, 0)
    last = int64(-1)
    for t in range(count(tile) // M):
        position = read_int(read_word(context + _POSITION) + 4 * (n + t))
        last = max(last, int64(position))
        for m in range(M):
            write_int(area + _LIMITS + 4 * (t * M + m), position)
        q = read_word(context + _Q) + 4 * H * ((n + t) * read_word(context + _HEADS) + kv * M)
        for h in range(0, H, W):
            store_rows(multiply(load_rows(rows, q + 4 * h, 4 * H), scale), area + 4 * (t * M * H + h), 4 * H)
    for j in range(H // W):
        store_rows(zeros(tile), area + _SUMS + 4 * W * count(tile) * j, 4 * W)
    return last


@compiled
def _score(context, row, next_row, kv, first, end, pages, tile, area):
    """Scores of pages first..end into the scratch; the greatest of every lane. Later pages are fetched meanwhile."""
    H, page, W = read_word(context + _HEAD_DIM), read_word(context + _PAGE), lanes(tile)
    top = minus_infinity(tile)
    for number in range(first, end):
        start = _page_start(context, row, number, kv)
        ahead = _upcoming(context, row, number, pages, next_row, kv) - start
        for place in range(0, page, W):
            keys = read_word(context + _KEYS) + start + 4 * place
            even, odd = zeros(tile), zeros(tile)
            for h in range(0, H, 2):
                prefetch(keys + ahead)
                even = accumulate(even, keys, area + 4 * h, 4 * H, tile)
                prefetch(keys + ahead + 4 * page)
                odd = accumulate(odd, keys + 4 * page, area + 4 * h + 4, 4 * H, tile)
                keys += 8 * page
            scores = hide(add(even, odd), number * page + place, area + _LIMITS, 4)
            store_rows(scores, area + _SCORES + 4 * ((number - first) * page + place), 4 * BLOCK)
            top = maximum(top, scores)
    return top


@compiled
def _weigh(tile, top, positions, area):
    """The scratch's scores become exp(score - top); their sums, lane by lane."""
    total = zeros(tile)
    for place in range(0, positions, lanes(tile)):
        scores = area + _SCORES + 4 * place
        weights = exp(subtract(load_rows(tile, scores, 4 * BLOCK), top))
        store_rows(weights, scores, 4 * BLOCK)
        total = add(total, weights)
    return total


@compiled
def _mix(context, row, next_row, kv, first, end, last, tile, area):
    """Adds the weighted values of pages first..end, as many lanes at a time as registers hold."""
    wide, vectors = repeated(tile), read_word(context + _HEAD_DIM) // lanes(tile)
    many = count(wide) // count(tile)
    whole = vectors - vectors % many
    for j in range(0, whole, many):
        _mix_lanes(context, row, next_row, kv, first, end, last, j, wide, tile, area)
    for j in range(whole, vectors):
        _mix_lanes(context, row, next_row, kv, first, end, last, j, tile, tile, area)


@compiled
def _mix_lanes(context, row, next_row, kv, first, end, last, j, wide, tile, area):
    """`_mix` for the lanes from vector j on that `wide` has. Nothing beyond the last position is read."""
    H, page, W = read_word(context + _HEAD_DIM), read_word(context + _PAGE), lanes(tile)
    place = area + _SUMS + 4 * W * count(tile) * j
    sums = load_rows(wide, place, 4 * W)
    for number in range(first, end):
        start = _page_start(context, row, number, kv)
        values = read_word(context + _VALUES) + start + 4 * W * j
        ahead = _upcoming(context, row, number, last // page + 1, next_row, kv) - start
        weights = area + _SCORES + 4 * (number - first) * page
        for s in range(min(page, last + 1 - number * page)):
            for line in range(0, W * count(wide) // count(tile), 16):
                prefetch(values + ahead + 4 * line)
            sums = accumulate(sums, values, weights + 4 * s, 4 * BLOCK, tile)
            values += 4 * H
    store_rows(sums, place, 4 * W)


@compiled
def _finish(context, n, kv, rows, tile, area, last):
    """Divides by the totals and writes the result; zeros for padding."""
    H, M, W = read_word(context + _HEAD_DIM), count(rows), lanes(rows)
    for t in range(count(tile) // M):
        out = read_word(context + _OUT) + 4 * H * ((n + t) * read_word(context + _HEADS) + kv * M)
        total = load_rows(rows, area + _TOTALS + 4 * W * M * t, 4 * W)
        for j in range(H // W):
            sums = load_rows(rows, area + _SUMS + 4 * W * (count(tile) * j + t * M), 4 * W)
            store_rows(divide(sums, total) if last >= 0 else zeros(rows), out + 4 * W * j, 4 * H)
