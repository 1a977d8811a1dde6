"""Vectors of float32 for compiled CPU kernels: a numba type, and the few operations on it, straight to LLVM.

What a kernel holds in registers are rows: a tuple of G vectors of W lanes, one per query that shares what is read. G and W
are part of the type, so every operation is unrolled and nothing depends on what LLVM's vectorizer makes of a loop. No
operation is contracted or reordered: what is written is the order of the arithmetic, on every machine. A `shape` stands for
G and W where no rows are at hand; it is nothing at run time.

Addresses are plain integers, strides are bytes. The functions are numba intrinsics: they exist inside compiled code only.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import models, register_model

from afm_rl.generation.cpu_memory import intrinsic

FLOAT = ir.FloatType()
INT = ir.IntType(32)


class Bfloat16(ir.Type):
    """LLVM's `bfloat`, which llvmlite has no class for."""

    def _to_string(self) -> str:
        return "bfloat"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Bfloat16)

    def __hash__(self) -> int:
        return hash(Bfloat16)


class Vector(types.Type):
    """`lanes` float32."""

    def __init__(self, lanes: int) -> None:
        self.lanes = lanes
        super().__init__(name=f"float32x{lanes}")


@register_model(Vector)
class _VectorModel(models.PrimitiveModel):
    def __init__(self, manager: Any, vector: Vector) -> None:
        super().__init__(manager, vector, ir.VectorType(FLOAT, vector.lanes))


class Shape(types.Type):
    """Rows without the rows: `count` vectors of `lanes` float32."""

    def __init__(self, lanes: int, count: int) -> None:
        self.lanes, self.count = lanes, count
        super().__init__(name=f"Shape({lanes}, {count})")

    @property
    def rows(self) -> Any:
        """The type of such rows."""
        return types.UniTuple(Vector(self.lanes), self.count)


register_model(Shape)(models.OpaqueModel)


def _is_rows(kind: Any) -> bool:
    return isinstance(kind, types.UniTuple) and isinstance(kind.dtype, Vector)


def _integer(value: int) -> Any:
    return ir.Constant(INT, value)


def _constant(kind: Any, value: float) -> Any:
    """A vector of one value."""
    return ir.Constant(kind, [value] * kind.count)


def call_llvm(builder: Any, name: str, result: Any, *args: Any) -> Any:
    kind = ir.FunctionType(result, [arg.type for arg in args])
    return builder.call(cgutils.get_or_insert_function(builder.module, kind, name), args)


def fma(builder: Any, a: Any, b: Any, c: Any) -> Any:
    return call_llvm(builder, f"llvm.fma.v{a.type.count}f32", a.type, a, b, c)


def _pointer(builder: Any, kind: Any, address: Any) -> Any:
    return builder.inttoptr(address, ir.PointerType(kind))


def load_vector(builder: Any, kind: Any, address: Any) -> Any:
    return builder.load(_pointer(builder, kind, address), align=4)


def _splat(builder: Any, scalar: Any, lanes: int) -> Any:
    first = builder.insert_element(ir.Constant(ir.VectorType(scalar.type, lanes), ir.Undefined), scalar, _integer(0))
    return builder.shuffle_vector(first, first, ir.Constant(ir.VectorType(INT, lanes), [0] * lanes))


def splat_load(builder: Any, kind: Any, address: Any, lanes: int) -> Any:
    return _splat(builder, load_vector(builder, kind, address), lanes)


def offset(builder: Any, address: Any, stride: Any, count: int) -> Any:
    return builder.add(address, builder.mul(stride, ir.Constant(stride.type, count)))


def _lanes(builder: Any, operation: Callable[..., Any], vector: Any) -> Any:
    """All lanes reduced by a commutative operation, pairwise, the result in every lane."""
    lanes = vector.type.count
    step = lanes // 2
    while step:
        mask = ir.Constant(ir.VectorType(INT, lanes), [lane ^ step for lane in range(lanes)])
        vector = operation(builder, vector, builder.shuffle_vector(vector, vector, mask))
        step //= 2
    return vector


def _add(builder: Any, a: Any, b: Any) -> Any:
    return builder.fadd(a, b)


def _maximum(builder: Any, a: Any, b: Any) -> Any:
    return builder.select(builder.fcmp_ordered(">", a, b), a, b)


#: exp(r) = 1 + r + r^2 P(r) for |r| <= ln(2) / 2: the coefficients of P, highest first (Cephes' expf).
_EXP_POLYNOMIAL = (1.9875691500e-4, 1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1)
#: ln(2) in two parts, the first of few bits, so that n times it is exact.
_LN2_HIGH, _LN2_LOW = 0.693359375, -2.12194440e-4
#: Adding it rounds to an integer, which then lies in the lowest bits.
_ROUND = 1.5 * 2**23
#: Below it the result is 0: exp would be within a factor 2 of float32's smallest normal number.
_EXP_LOWEST = -87.0


def _exp(builder: Any, x: Any) -> Any:
    """exp(x) for x <= 0 within 2 units in the last place; exactly 1 at 0; 0 below _EXP_LOWEST."""
    kind = x.type
    shifted = fma(builder, x, _constant(kind, 1.44269504088896341), _constant(kind, _ROUND))
    n = builder.fsub(shifted, _constant(kind, _ROUND))
    r = fma(builder, n, _constant(kind, -_LN2_HIGH), x)
    r = fma(builder, n, _constant(kind, -_LN2_LOW), r)
    p = _constant(kind, _EXP_POLYNOMIAL[0])
    for coefficient in _EXP_POLYNOMIAL[1:]:
        p = fma(builder, p, r, _constant(kind, coefficient))
    y = builder.fadd(fma(builder, p, builder.fmul(r, r), r), _constant(kind, 1.0))
    bits = ir.VectorType(INT, kind.count)
    exponent = builder.shl(builder.bitcast(shifted, bits), ir.Constant(bits, [23] * kind.count))
    y = builder.bitcast(builder.add(builder.bitcast(y, bits), exponent), kind)
    return builder.select(builder.fcmp_ordered("<", x, _constant(kind, _EXP_LOWEST)), _constant(kind, 0.0), y)


def returning(result: Any, kinds: tuple[Any, ...], generate: Callable[..., list[Any]]) -> Any:
    """An intrinsic's typing and code: `generate` makes the vectors of `result` (or nothing, for none).

    Arguments that are rows reach `generate` as lists of LLVM vectors, others as they are.
    """

    def code(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        unpacked = [
            cgutils.unpack_tuple(builder, value, kind.count) if _is_rows(kind) else value
            for kind, value in zip(kinds, values, strict=True)
        ]
        vectors = generate(builder, *unpacked)
        if signature.return_type == types.none:
            return context.get_dummy_value()
        return context.make_tuple(builder, signature.return_type, vectors)

    return result(*kinds), code


def _elementwise(operation: Callable[..., Any], *kinds: Any) -> Any:
    return returning(kinds[0], kinds, lambda builder, *rows: [operation(builder, *row) for row in zip(*rows, strict=True)])


def _shape(lanes: int, count: int, *kinds: Any) -> Any:
    return Shape(lanes, count)(*kinds), lambda context, *_: context.get_dummy_value()


def _number(value: int, *kinds: Any) -> Any:
    return types.int64(*kinds), lambda *_: ir.Constant(ir.IntType(64), value)


def _filled(shape: Any, value: float) -> Any:
    filled = _constant(ir.VectorType(FLOAT, shape.lanes), value)
    return returning(shape.rows, (shape,), lambda *_: [filled] * shape.count)


@intrinsic(prefer_literal=True)
def shape_of(_: Any, lanes: Any, count: Any) -> Any:
    """The shape of `count` rows of `lanes` lanes; both are constants."""
    return _shape(lanes.literal_value, count.literal_value, lanes, count)


@intrinsic
def shared(_: Any, shape: Any) -> Any:
    """`shape` as often as 8 rows hold it."""
    return _shape(shape.lanes, shape.count * max(1, 8 // shape.count), shape)


@intrinsic
def repeated(_: Any, shape: Any) -> Any:
    """`shape` as often as 16 rows hold it, up to 4 times."""
    return _shape(shape.lanes, shape.count * (4 if shape.count <= 4 else 2), shape)


@intrinsic
def doubled(_: Any, shape: Any) -> Any:
    """Twice `shape`."""
    return _shape(shape.lanes, 2 * shape.count, shape)


@intrinsic
def lanes(_: Any, shape: Any) -> Any:
    """The lanes of a row."""
    return _number(shape.lanes, shape)


@intrinsic
def count(_: Any, shape: Any) -> Any:
    """The number of rows."""
    return _number(shape.count, shape)


@intrinsic
def zeros(_: Any, shape: Any) -> Any:
    """Rows of zeros."""
    return _filled(shape, 0.0)


@intrinsic
def minus_infinity(_: Any, shape: Any) -> Any:
    """Rows of minus infinity."""
    return _filled(shape, float("-inf"))


@intrinsic
def add(_: Any, a: Any, b: Any) -> Any:
    """a + b."""
    return _elementwise(_add, a, b)


@intrinsic
def subtract(_: Any, a: Any, b: Any) -> Any:
    """a - b."""
    return _elementwise(lambda builder, x, y: builder.fsub(x, y), a, b)


@intrinsic
def divide(_: Any, a: Any, b: Any) -> Any:
    """a / b."""
    return _elementwise(lambda builder, x, y: builder.fdiv(x, y), a, b)


@intrinsic
def multiply(_: Any, a: Any, b: Any) -> Any:
    """a b."""
    return _elementwise(lambda builder, x, y: builder.fmul(x, y), a, b)


@intrinsic
def multiply_add(_: Any, a: Any, b: Any, c: Any) -> Any:
    """a b + c, rounded once."""
    return _elementwise(fma, a, b, c)


@intrinsic
def maximum(_: Any, a: Any, b: Any) -> Any:
    """The greater."""
    return _elementwise(_maximum, a, b)


@intrinsic
def exp(_: Any, x: Any) -> Any:
    """exp of what is not positive (`_exp`)."""
    return _elementwise(_exp, x)


@intrinsic
def lanes_maximum(_: Any, x: Any) -> Any:
    """Each row's greatest lane, in all its lanes."""
    return _elementwise(lambda builder, row: _lanes(builder, _maximum, row), x)


@intrinsic
def lanes_sum(_: Any, x: Any) -> Any:
    """Each row's sum, in all its lanes."""
    return _elementwise(lambda builder, row: _lanes(builder, _add, row), x)


@intrinsic
def load_rows(_: Any, shape: Any, address: Any, stride: Any) -> Any:
    """Rows, row g from `address + g stride`."""
    kind = ir.VectorType(FLOAT, shape.lanes)

    def generate(builder: Any, _: Any, start: Any, step: Any) -> list[Any]:
        return [load_vector(builder, kind, offset(builder, start, step, g)) for g in range(shape.count)]

    return returning(shape.rows, (shape, address, stride), generate)


@intrinsic
def splat_rows(_: Any, shape: Any, address: Any, stride: Any) -> Any:
    """Rows, all lanes of row g the float at `address + g stride`."""

    def generate(builder: Any, _: Any, start: Any, step: Any) -> list[Any]:
        places = [offset(builder, start, step, g) for g in range(shape.count)]
        return [splat_load(builder, FLOAT, place, shape.lanes) for place in places]

    return returning(shape.rows, (shape, address, stride), generate)


@intrinsic
def store_rows(_: Any, x: Any, address: Any, stride: Any) -> Any:
    """Row g to `address + g stride`."""

    def generate(builder: Any, rows: list[Any], start: Any, step: Any) -> list[Any]:
        for g, row in enumerate(rows):
            builder.store(row, _pointer(builder, row.type, offset(builder, start, step, g)), align=4)
        return []

    return returning(types.none, (x, address, stride), generate)


@intrinsic
def store_bfloat16(_: Any, x: Any, address: Any, stride: Any) -> Any:
    """Row g, rounded to bfloat16, to `address + g stride`."""

    def generate(builder: Any, rows: list[Any], start: Any, step: Any) -> list[Any]:
        for g, row in enumerate(rows):
            rounded = builder.fptrunc(row, ir.VectorType(Bfloat16(), row.type.count))
            builder.store(rounded, _pointer(builder, rounded.type, offset(builder, start, step, g)), align=2)
        return []

    return returning(types.none, (x, address, stride), generate)


@intrinsic
def hide(_: Any, scores: Any, first: Any, limits: Any, stride: Any) -> Any:
    """Minus infinity in the lanes whose number `first + lane` is beyond the int32 at `limits + g stride`."""

    def generate(builder: Any, rows: list[Any], start: Any, limit: Any, step: Any) -> list[Any]:
        count = rows[0].type.count
        lanes = ir.Constant(ir.VectorType(INT, count), list(range(count)))
        numbers = builder.add(_splat(builder, builder.trunc(start, INT), count), lanes)
        bounds = [splat_load(builder, INT, offset(builder, limit, step, g), count) for g in range(len(rows))]
        hidden = _constant(rows[0].type, float("-inf"))
        return [
            builder.select(builder.icmp_signed("<=", numbers, bound), row, hidden)
            for row, bound in zip(rows, bounds, strict=True)
        ]

    return returning(scores, (scores, first, limits, stride), generate)
