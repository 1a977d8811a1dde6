"""The plumbing of compiled CPU kernels: XLA's structures, vectors' arithmetic, and items that are each done once."""

from __future__ import annotations

import ctypes
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import numba
import numpy as np
import pytest

from afm_rl.generation import cpu_header
from afm_rl.generation.cpu_compile import compile_function, register
from afm_rl.generation.cpu_ffi import (
    OWN_WORDS,
    describes_itself,
    dimension,
    integer_attribute,
    item_done,
    let_go,
    new_context,
    next_item,
    operand,
    result,
    run,
    set_items,
    wait_for,
)
from afm_rl.generation.cpu_memory import atomic_add, give_way, read_word, symbol_address, write_word
from afm_rl.generation.cpu_vector import exp, hide, lanes_maximum, lanes_sum, load_rows, shape_of, store_rows

HEADER = (Path(jax.ffi.include_dir()) / "xla" / "ffi" / "api" / "c_api.h").read_text()

pointer, word, half_word = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32


def structure(name: str, *fields: tuple[str, type]) -> type[ctypes.Structure]:
    return type(name, (ctypes.Structure,), {"_fields_": list(fields)})


BASE = (("struct_size", word), ("extension_start", pointer))
Table = structure("Table", *BASE, ("size", word), ("types", pointer), ("values", pointer))
Attributes = structure("Attributes", *BASE, ("size", word), ("types", pointer), ("names", pointer), ("values", pointer))
Frame = structure(
    "Frame",
    *BASE,
    ("api", pointer),
    ("ctx", pointer),
    ("stage", half_word),
    ("args", Table),
    ("rets", Table),
    ("attrs", Attributes),
)
Buffer = structure("Buffer", *BASE, ("dtype", half_word), ("data", pointer), ("rank", word), ("dims", pointer))
Version = structure("Version", *BASE, ("major", half_word), ("minor", half_word))
Extension = structure("Extension", ("struct_size", word), ("type", half_word), ("next", pointer))
Metadata = structure("Metadata", ("struct_size", word), ("api_version", Version), ("traits", half_word), ("state", word))
Schedule = structure("Schedule", *BASE, ("ctx", pointer), ("task", pointer), ("data", pointer))


def test_the_offsets_are_those_a_c_compiler_gives() -> None:
    """Against the structures as declared here, by ctypes: the header is read by the product's own small parser."""
    offsets = cpu_header.OFFSETS
    for struct, fields in {
        "CallFrame": {"api": Frame.api, "ctx": Frame.ctx, "args": Frame.args, "rets": Frame.rets, "attrs": Frame.attrs},
        "Args": {"args": Table.values},
        "Rets": {"rets": Table.values},
        "Attrs": {"attrs": Attributes.values},
        "Buffer": {"dtype": Buffer.dtype, "data": Buffer.data, "dims": Buffer.dims},
        "Extension_Base": {"type": Extension.type, "next": Extension.next},
        "Metadata": {"api_version": Metadata.api_version, "traits": Metadata.traits},
        "Api_Version": {"major_version": Version.major, "minor_version": Version.minor},
        "ThreadPool_Schedule_Args": {"ctx": Schedule.ctx, "task": Schedule.task, "data": Schedule.data},
    }.items():
        for field, descriptor in fields.items():
            assert offsets[f"XLA_FFI_{struct}.{field}"] == descriptor.offset, f"{struct}.{field}"
    assert offsets["XLA_FFI_Metadata_Extension.metadata"] == ctypes.sizeof(Extension)
    assert cpu_header.SIZES["XLA_FFI_ThreadPool_Schedule_Args"] == ctypes.sizeof(Schedule)


def test_the_header_of_this_jaxlib_is_the_expected_one() -> None:
    assert cpu_header.header_difference(HEADER) is None
    table = HEADER.split("struct XLA_FFI_Api {")[1].split("};")[0].split("_XLA_FFI_API_STRUCT_FIELD(")[1:]
    names = [entry.split(")")[0] for entry in table]
    before = ctypes.sizeof(word) + ctypes.sizeof(pointer) + ctypes.sizeof(Version) + ctypes.sizeof(pointer)
    for name in ("XLA_FFI_Error_Destroy", "XLA_FFI_ThreadPool_Schedule", "XLA_FFI_ThreadPool_NumThreads"):
        assert cpu_header.OFFSETS[f"XLA_FFI_Api.{name}"] == before + 8 * names.index(name)


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("XLA_FFI_API_MAJOR 0", "XLA_FFI_API_MAJOR 1", "has the version"),
        ("XLA_FFI_API_MINOR 3", "XLA_FFI_API_MINOR 2", "has the version"),
        ("  XLA_FFI_ExecutionStage stage;\n", "", "XLA_FFI_CallFrame.args at byte 32, the kernels expect it at 40"),
        ("  _XLA_FFI_API_STRUCT_FIELD(XLA_FFI_Stream_Get);\n", "", "XLA_FFI_Api.XLA_FFI_ThreadPool_Schedule at byte 128"),
        ("struct XLA_FFI_Buffer {", "struct XLA_FFI_Array {", "XLA_FFI_Buffer.dtype at byte None"),
        ("XLA_FFI_DataType_BF16 = 16", "XLA_FFI_DataType_BF16 = 34", "the number 34, the kernels expect 16"),
        ("int64_t* num_threads;", "int32_t num_threads;", "NumThreads_Args of 28 bytes"),
    ],
)
def test_another_header_is_noticed(old: str, new: str, said: str) -> None:
    assert old in HEADER
    assert said in str(cpu_header.header_difference(HEADER.replace(old, new)))


@numba.njit
def _arithmetic(x: int, exps: int, maxima: int, sums: int, shown: int, blocks: int, limits: int) -> None:
    shape = shape_of(16, 2)
    for block in range(blocks):
        rows = load_rows(shape, x + 128 * block, 64)
        store_rows(exp(rows), exps + 128 * block, 64)
        store_rows(lanes_maximum(rows), maxima + 128 * block, 64)
        store_rows(lanes_sum(rows), sums + 128 * block, 64)
        store_rows(hide(rows, 16 * block, limits, 4), shown + 128 * block, 64)


def test_vectors_compute_what_numpy_does() -> None:
    """exp within 2 units in the last place over its whole range, and its corners; the reductions; the mask."""
    x = -np.float32(88) * np.random.default_rng(0).random((40_000, 2, 16), np.float32)
    x[0, 0, :6] = [0, -0.0, -np.inf, np.nan, -87, -87.01]
    exps, maxima, sums, shown = (np.empty_like(x) for _ in range(4))
    limits = np.array([15, 100], np.int32)
    _arithmetic(*(array.ctypes.data for array in (x, exps, maxima, sums, shown)), len(x), limits.ctypes.data)

    assert exps[0, 0, 0] == exps[0, 0, 1] == 1
    assert exps[0, 0, 2] == exps[0, 0, 5] == 0
    assert np.isnan(exps[0, 0, 3])
    normal = x >= -87
    expected = np.exp(x[normal].astype(np.float64))
    assert np.abs(exps[normal] - expected).max() > 0
    assert (np.abs(exps[normal] - expected) / np.spacing(expected.astype(np.float32))).max() < 2
    assert not exps[x < -87].any()
    x, maxima, sums, shown = (array[1:] for array in (x, maxima, sums, shown))
    assert (maxima == x.max(-1, keepdims=True)).all()
    np.testing.assert_allclose(sums, np.broadcast_to(x.sum(-1, keepdims=True, dtype=np.float64), x.shape), rtol=1e-6)
    number = 16 * np.arange(1, len(x) + 1)[:, None, None] + np.arange(16)
    np.testing.assert_array_equal(shown, np.where(number <= limits[:, None], x, -np.inf))


TARGET = "afm_rl_test_counts"


def _count(context: int) -> int:
    """Items of the first half add to their cell, the last of them late; the second half's read a cell and the last one."""
    out, half = read_word(context + OWN_WORDS), read_word(context + OWN_WORDS + 8)
    item = next_item(context)
    while item >= 0:
        if item % half == half - 1:
            for _ in range(100):
                give_way()
        if item < half:
            atomic_add(out + 8 * item, read_word(context + OWN_WORDS + 16))
        else:
            wait_for(context, half)
            atomic_add(out + 8 * item, read_word(out + 8 * (item - half)) + read_word(out + 8 * (half - 1)))
        item_done(context)
        item = next_item(context)
    let_go(context)
    return 0


def _count_handler(frame: int) -> int:
    if not describes_itself(frame):
        context = new_context(3)
        items = dimension(frame, 0, 0)
        write_word(context + OWN_WORDS, result(frame, 0))
        write_word(context + OWN_WORDS + 8, items // 2)
        write_word(context + OWN_WORDS + 16, integer_attribute(frame, 0))
        for item in range(items):
            write_word(result(frame, 0) + 8 * item, read_word(operand(frame, 0) + 8 * item))
        set_items(context, items, 8)
        run(frame, context, symbol_address("afm_rl_test_count_task"))
    return 0


def test_every_item_is_done_once_and_in_time() -> None:
    """By competing programs, whose tasks outlive the calls they were made for."""
    compile_function(_count, "afm_rl_test_count_task")
    register(TARGET, compile_function(_count_handler, "afm_rl_test_count_handler"))

    def work(x: jax.Array) -> list[jax.Array]:
        call = jax.ffi.ffi_call(TARGET, jax.ShapeDtypeStruct(x.shape, x.dtype))
        return [call(x + i, step=np.int64(3)) for i in range(20)]

    program = jax.jit(work)

    def made(start: np.ndarray) -> list[jax.Array]:
        with jax.enable_x64(True):  # of this thread
            return program(start)

    starts = [np.arange(size) for size in (2, 16, 10000)] * 8
    with ThreadPoolExecutor(4) as pool:
        for start, results in zip(starts, pool.map(made, starts), strict=True):
            for i, cells in enumerate(results):
                first = start[: len(start) // 2] + i + 3
                second = start[len(start) // 2 :] + i + first + first[-1]
                np.testing.assert_array_equal(cells, np.concatenate([first, second]))
