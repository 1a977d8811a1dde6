"""The inner step of compiled CPU products: vectors from memory times single numbers from memory, added to rows of sums.

A number is a float32, or a pair of bfloat16 whose two products are added. Every vector that is read serves all the rows.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llvmlite import binding, ir

from afm_rl.generation.cpu_memory import intrinsic
from afm_rl.generation.cpu_vector import FLOAT, INT, Bfloat16, call_llvm, fma, load_vector, offset, returning, splat_load


@intrinsic
def accumulate(_: Any, sums: Any, vectors: Any, scalars: Any, stride: Any, shape: Any) -> Any:
    """sums[b G + g] + v[b] s[g]: vectors v one after another from `vectors`, floats s at `scalars + g stride`.

    G is the number of rows of `shape`; `sums` has a multiple of it, one G for each of the vectors.
    """

    def product(builder: Any, total: Any, v: Any, s: Any) -> Any:
        return fma(builder, v, s, total)

    return _accumulate(FLOAT, product, sums, vectors, scalars, stride, shape)


@intrinsic
def accumulate_bfloat16(_: Any, sums: Any, vectors: Any, scalars: Any, stride: Any, shape: Any) -> Any:
    """`accumulate` where every number is a pair of bfloat16, and a product the sum of theirs (float32 throughout)."""
    return _accumulate(INT, _pair_product, sums, vectors, scalars, stride, shape)


def _accumulate(number: Any, product: Callable[..., Any], *kinds: Any) -> Any:
    """The code of `accumulate`, given the type of what is read and how two of them multiply and add to a sum."""
    sums, *_, shape = kinds

    def generate(builder: Any, totals: list[Any], start: Any, factor: Any, step: Any, _: Any) -> list[Any]:
        kind = ir.VectorType(number, shape.lanes)
        width = ir.Constant(start.type, 4 * shape.lanes)
        places = [offset(builder, start, width, b) for b in range(len(totals) // shape.count)]
        read = [load_vector(builder, kind, place) for place in places]
        factors = [splat_load(builder, number, offset(builder, factor, step, g), shape.lanes) for g in range(shape.count)]
        pairs = [(v, s) for v in read for s in factors]
        return [product(builder, total, v, s) for (v, s), total in zip(pairs, totals, strict=True)]

    return returning(sums, kinds, generate)


def _pair_product(builder: Any, total: Any, a: Any, b: Any) -> Any:
    """total + the products of two pairs of bfloat16 in each lane: one instruction where the processor has it."""
    if a.type.count == 16 and binding.get_host_cpu_features().get("avx512bf16"):
        pairs = ir.VectorType(Bfloat16(), 32)
        a, b = builder.bitcast(a, pairs), builder.bitcast(b, pairs)
        return call_llvm(builder, "llvm.x86.avx512bf16.dpbf16ps.512", total.type, total, a, b)
    for half in (_low_half, _high_half):
        total = fma(builder, half(builder, a, total.type), half(builder, b, total.type), total)
    return total


def _low_half(builder: Any, words: Any, kind: Any) -> Any:
    return builder.bitcast(builder.shl(words, ir.Constant(words.type, [16] * kind.count)), kind)


def _high_half(builder: Any, words: Any, kind: Any) -> Any:
    return builder.bitcast(builder.and_(words, ir.Constant(words.type, [-(1 << 16)] * kind.count)), kind)
