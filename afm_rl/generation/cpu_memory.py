"""Scalars in memory for compiled CPU kernels: loads, stores, atomic counters, scratch, calls through an address.

Addresses are plain integers (int64). The functions are numba intrinsics: they exist inside compiled code only.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import extending
from numba.core import cgutils, types

#: numba's decorator. Its callers are compiled code: types of Python do not apply.
intrinsic: Any = extending.intrinsic

BYTE = ir.IntType(8)
WORD = ir.IntType(64)
_LLVM = {types.int32: ir.IntType(32), types.int64: WORD, types.float32: ir.FloatType()}
_ALIGNMENT = {types.int32: 4, types.int64: 8, types.float32: 4}


def _typed(result: Any, kinds: tuple[Any, ...], generate: Callable[..., Any]) -> Any:
    """An intrinsic's typing and code: `generate` makes an LLVM value from LLVM values (None for no result)."""

    def code(context: Any, builder: Any, _: Any, values: Any) -> Any:
        made = generate(builder, *values)
        return context.get_dummy_value() if result == types.none else made

    return result(*kinds), code


def _pointer(builder: Any, kind: Any, address: Any) -> Any:
    return builder.inttoptr(address, ir.PointerType(kind))


def _external(builder: Any, name: str, result: Any, *args: Any) -> Any:
    """A call of a C function."""
    kind = ir.FunctionType(result, [arg.type for arg in args])
    return builder.call(cgutils.get_or_insert_function(builder.module, kind, name), args)


def _read(kind: Any) -> Any:
    return _typed(
        kind,
        (types.int64,),
        lambda builder, address: builder.load(_pointer(builder, _LLVM[kind], address), align=_ALIGNMENT[kind]),
    )


def _write(kind: Any) -> Any:
    def generate(builder: Any, address: Any, value: Any) -> None:
        builder.store(value, _pointer(builder, _LLVM[kind], address), align=_ALIGNMENT[kind])

    return _typed(types.none, (types.int64, kind), generate)


@intrinsic
def read_word(_: Any, address: Any) -> Any:  # noqa: ARG001 - numba takes the arguments' names from here
    """The int64 at an address."""
    return _read(types.int64)


@intrinsic
def read_int(_: Any, address: Any) -> Any:  # noqa: ARG001
    """The int32 at an address."""
    return _read(types.int32)


@intrinsic
def read_float(_: Any, address: Any) -> Any:  # noqa: ARG001
    """The float32 at an address."""
    return _read(types.float32)


@intrinsic
def write_word(_: Any, address: Any, value: Any) -> Any:  # noqa: ARG001
    """An int64 to an address."""
    return _write(types.int64)


@intrinsic
def write_int(_: Any, address: Any, value: Any) -> Any:  # noqa: ARG001
    """An int32 to an address."""
    return _write(types.int32)


@intrinsic
def write_float(_: Any, address: Any, value: Any) -> Any:  # noqa: ARG001
    """A float32 to an address."""
    return _write(types.float32)


@intrinsic
def atomic_add(_: Any, address: Any, value: Any) -> Any:  # noqa: ARG001
    """Adds to the int64 at an address; what it was before. Sequentially consistent."""

    def generate(builder: Any, place: Any, amount: Any) -> Any:
        return builder.atomic_rmw("add", _pointer(builder, WORD, place), amount, "seq_cst")

    return _typed(types.int64, (types.int64, types.int64), generate)


@intrinsic
def atomic_read(_: Any, address: Any) -> Any:  # noqa: ARG001
    """The int64 at an address, with everything written before it was."""

    def generate(builder: Any, place: Any) -> Any:
        return builder.load_atomic(_pointer(builder, WORD, place), "acquire", 8)

    return _typed(types.int64, (types.int64,), generate)


@intrinsic
def allocate(_: Any, size: Any) -> Any:  # noqa: ARG001
    """Address of `size` new bytes, aligned to 16; `free` gives them back."""
    return _typed(
        types.int64,
        (types.int64,),
        lambda builder, count: builder.ptrtoint(_external(builder, "malloc", BYTE.as_pointer(), count), WORD),
    )


@intrinsic
def free(_: Any, address: Any) -> Any:  # noqa: ARG001
    """Gives bytes of `allocate` back."""

    def generate(builder: Any, place: Any) -> None:
        _external(builder, "free", ir.VoidType(), _pointer(builder, BYTE, place))

    return _typed(types.none, (types.int64,), generate)


@intrinsic(prefer_literal=True)
def scratch(_: Any, size: Any) -> Any:
    """Address of `size` (a constant) bytes on the stack, aligned to 64, until the compiled function returns."""

    def generate(builder: Any, _: Any) -> Any:
        with builder.goto_entry_block():  # not numba's own alloca_once, which fills it with zeros
            block = builder.alloca(ir.ArrayType(BYTE, size.literal_value))
        block.align = 64
        return builder.ptrtoint(block, WORD)

    return _typed(types.int64, (size,), generate)


@intrinsic
def give_way(_: Any) -> Any:
    """Lets another thread have the processor."""
    return _typed(types.none, (), lambda builder: _external(builder, "sched_yield", ir.IntType(32)))


@intrinsic
def call(_: Any, function: Any, argument: Any) -> Any:  # noqa: ARG001
    """Calls the C function at an address with one pointer; returns the pointer it returns."""

    def generate(builder: Any, address: Any, value: Any) -> Any:
        return builder.call(_pointer(builder, ir.FunctionType(WORD, [WORD]), address), [value])

    return _typed(types.int64, (types.int64, types.int64), generate)


@intrinsic(prefer_literal=True)
def symbol_address(_: Any, name: Any) -> Any:
    """The address of a symbol of this process; its name is a constant."""

    def generate(builder: Any, _: Any) -> Any:
        kind = ir.FunctionType(WORD, [WORD])
        return builder.ptrtoint(cgutils.get_or_insert_function(builder.module, kind, name.literal_value), WORD)

    return _typed(types.int64, (name,), generate)


@intrinsic
def prefetch(_: Any, address: Any) -> Any:  # noqa: ARG001
    """Asks for the cache line of an address, into the second level: the first one has fewer places for lines under way."""

    def generate(builder: Any, place: Any) -> None:
        pointer = _pointer(builder, BYTE, place)
        hints = [ir.Constant(ir.IntType(32), hint) for hint in (0, 2, 1)]  # to read, second level, data
        kind = ir.FunctionType(ir.VoidType(), [pointer.type] + [hint.type for hint in hints])
        builder.call(cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0"), [pointer, *hints])

    return _typed(types.none, (types.int64,), generate)
