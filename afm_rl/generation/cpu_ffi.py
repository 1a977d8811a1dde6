"""Compiled CPU kernels inside jitted programs: numba functions that XLA calls through its foreign function interface.

A kernel cuts its work into numbered items. `run` hands the numbers out to the calling thread and to threads of XLA's own
pool, from one atomic counter: nobody waits for a pool that is busy elsewhere, as an item is in a running thread's hands or
still in the counter. The calling thread returns when all items are done. A task of the pool that starts late finds the
counter at its end; the context it looks at lives until the last one lets go of it.

XLA's structures are read at the offsets of cpu_header.py. Addresses are plain integers.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import numba

from afm_rl.generation.cpu_header import API_VERSION, BFLOAT16, OFFSETS, SIZES
from afm_rl.generation.cpu_memory import (
    allocate,
    atomic_add,
    atomic_read,
    call,
    free,
    give_way,
    read_int,
    read_word,
    scratch,
    write_int,
    write_word,
)

#: For functions that compiled kernels are made of: part of the caller, never called from Python.
compiled: Any = partial(
    numba.njit, forceinline=True, error_model="numpy", no_cpython_wrapper=True, no_cfunc_wrapper=True, _nrt=False
)

#: A context's first words: who holds it, the next item, how many items are done, how many there are, and how many
#: threads may work on them. A kernel's own words follow.
_HOLDERS, _NEXT, _DONE, _ITEMS, _THREADS = 0, 64, 128, 136, 144
OWN_WORDS = 192

_EXTENSION = OFFSETS["XLA_FFI_CallFrame.extension_start"]
_EXTENSION_TYPE = OFFSETS["XLA_FFI_Extension_Base.type"]
_EXTENSION_NEXT = OFFSETS["XLA_FFI_Extension_Base.next"]
_METADATA_EXTENSION = 1
_METADATA = OFFSETS["XLA_FFI_Metadata_Extension.metadata"]
_METADATA_MAJOR = OFFSETS["XLA_FFI_Metadata.api_version"] + OFFSETS["XLA_FFI_Api_Version.major_version"]
_METADATA_MINOR = OFFSETS["XLA_FFI_Metadata.api_version"] + OFFSETS["XLA_FFI_Api_Version.minor_version"]
_METADATA_TRAITS = OFFSETS["XLA_FFI_Metadata.traits"]
_MAJOR, _MINOR = API_VERSION
_API = OFFSETS["XLA_FFI_CallFrame.api"]
_CONTEXT = OFFSETS["XLA_FFI_CallFrame.ctx"]
_ARGS = OFFSETS["XLA_FFI_CallFrame.args"] + OFFSETS["XLA_FFI_Args.args"]
_RETS = OFFSETS["XLA_FFI_CallFrame.rets"] + OFFSETS["XLA_FFI_Rets.rets"]
_ATTRS = OFFSETS["XLA_FFI_CallFrame.attrs"] + OFFSETS["XLA_FFI_Attrs.attrs"]
_DATA = OFFSETS["XLA_FFI_Buffer.data"]
_DTYPE = OFFSETS["XLA_FFI_Buffer.dtype"]
_DIMS = OFFSETS["XLA_FFI_Buffer.dims"]
_VALUE = OFFSETS["XLA_FFI_Scalar.value"]
_SCHEDULE = OFFSETS["XLA_FFI_Api.XLA_FFI_ThreadPool_Schedule"]
_SCHEDULE_CONTEXT = OFFSETS["XLA_FFI_ThreadPool_Schedule_Args.ctx"]
_SCHEDULE_TASK = OFFSETS["XLA_FFI_ThreadPool_Schedule_Args.task"]
_SCHEDULE_DATA = OFFSETS["XLA_FFI_ThreadPool_Schedule_Args.data"]
_SCHEDULE_SIZE = SIZES["XLA_FFI_ThreadPool_Schedule_Args"]
_NUM_THREADS = OFFSETS["XLA_FFI_Api.XLA_FFI_ThreadPool_NumThreads"]
_NUM_THREADS_CONTEXT = OFFSETS["XLA_FFI_ThreadPool_NumThreads_Args.ctx"]
_NUM_THREADS_OUT = OFFSETS["XLA_FFI_ThreadPool_NumThreads_Args.num_threads"]
_NUM_THREADS_SIZE = SIZES["XLA_FFI_ThreadPool_NumThreads_Args"]
_DESTROY = OFFSETS["XLA_FFI_Api.XLA_FFI_Error_Destroy"]
_DESTROY_ERROR = OFFSETS["XLA_FFI_Error_Destroy_Args.error"]
_DESTROY_SIZE = SIZES["XLA_FFI_Error_Destroy_Args"]


@compiled
def describes_itself(frame: int) -> bool:
    """Whether XLA asks for the handler's version (answered here) rather than for work."""
    extension = read_word(frame + _EXTENSION)
    while extension != 0:
        if read_int(extension + _EXTENSION_TYPE) == _METADATA_EXTENSION:
            metadata = read_word(extension + _METADATA)
            write_int(metadata + _METADATA_MAJOR, _MAJOR)
            write_int(metadata + _METADATA_MINOR, _MINOR)
            write_int(metadata + _METADATA_TRAITS, 0)
            return True
        extension = read_word(extension + _EXTENSION_NEXT)
    return False


@compiled
def operand(frame: int, number: int) -> int:
    """The address of an operand's data."""
    return read_word(read_word(read_word(frame + _ARGS) + 8 * number) + _DATA)


@compiled
def dimension(frame: int, number: int, axis: int) -> int:
    """The size of an operand's axis."""
    return read_word(read_word(read_word(read_word(frame + _ARGS) + 8 * number) + _DIMS) + 8 * axis)


@compiled
def result(frame: int, number: int) -> int:
    """The address of a result's data."""
    return read_word(read_word(read_word(frame + _RETS) + 8 * number) + _DATA)


@compiled
def result_is_bfloat16(frame: int, number: int) -> bool:
    """A result's type."""
    return read_int(read_word(read_word(frame + _RETS) + 8 * number) + _DTYPE) == BFLOAT16


@compiled
def integer_attribute(frame: int, number: int) -> int:
    """An int64 attribute; they are numbered by their names' order."""
    return read_word(read_word(read_word(read_word(frame + _ATTRS) + 8 * number) + _VALUE))


@compiled
def new_context(words: int) -> int:
    """A context with room for `words` of the kernel's own, at OWN_WORDS; `run` gives it back."""
    return allocate(OWN_WORDS + 8 * words)


@compiled
def set_items(context: int, items: int, threads: int) -> None:
    """How many items there are, and how many threads they are worth."""
    write_word(context + _ITEMS, items)
    write_word(context + _THREADS, min(threads, items))
    write_word(context + _NEXT, 0)
    write_word(context + _DONE, 0)


@compiled
def wait_for(context: int, items: int) -> None:
    """Returns when so many items are done. Only for items that running threads have taken already."""
    turns = 0
    while atomic_read(context + _DONE) < items:
        turns += 1
        if turns > 256:
            give_way()


@compiled
def next_item(context: int) -> int:
    """The number of an item that nobody has taken; -1 when there is none."""
    item = atomic_add(context + _NEXT, 1)
    return item if item < read_word(context + _ITEMS) else -1


@compiled
def item_done(context: int) -> None:
    """To be called after each item."""
    atomic_add(context + _DONE, 1)


@compiled
def let_go(context: int) -> None:
    """One holder less; the last one frees the context."""
    if atomic_add(context + _HOLDERS, -1) == 1:
        free(context)


@compiled
def _discard(frame: int, error: int) -> None:
    arguments = scratch(24)
    write_word(arguments, _DESTROY_SIZE)
    write_word(arguments + 8, 0)
    write_word(arguments + _DESTROY_ERROR, error)
    call(read_word(read_word(frame + _API) + _DESTROY), arguments)


@compiled
def _pool_threads(frame: int) -> int:
    arguments, threads = scratch(32), scratch(8)
    write_word(threads, 1)
    write_word(arguments, _NUM_THREADS_SIZE)
    write_word(arguments + 8, 0)
    write_word(arguments + _NUM_THREADS_CONTEXT, read_word(frame + _CONTEXT))
    write_word(arguments + _NUM_THREADS_OUT, threads)
    error = call(read_word(read_word(frame + _API) + _NUM_THREADS), arguments)
    if error != 0:
        _discard(frame, error)
        return 1
    return read_word(threads)


@compiled
def _schedule(frame: int, task: int, context: int) -> bool:
    arguments = scratch(40)
    write_word(arguments, _SCHEDULE_SIZE)
    write_word(arguments + 8, 0)
    write_word(arguments + _SCHEDULE_CONTEXT, read_word(frame + _CONTEXT))
    write_word(arguments + _SCHEDULE_TASK, task)
    write_word(arguments + _SCHEDULE_DATA, context)
    error = call(read_word(read_word(frame + _API) + _SCHEDULE), arguments)
    if error != 0:
        _discard(frame, error)
    return error == 0


@compiled
def run(frame: int, context: int, task: int) -> None:
    """All items of a context, by this thread and by some of XLA's pool; returns when they are done.

    `task` is the address of the C function that takes items until there are none and then lets go of the context.
    """
    threads = read_word(context + _THREADS)
    helpers = min(threads, _pool_threads(frame)) - 1 if threads > 1 else 0
    write_word(context + _HOLDERS, helpers + 2)  # this thread holds it as a worker, and as the one who waits
    for _ in range(helpers):
        if not _schedule(frame, task, context):
            let_go(context)
    call(task, context)
    wait_for(context, read_word(context + _ITEMS))
    let_go(context)
