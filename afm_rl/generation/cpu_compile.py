"""Compiles a CPU kernel's two C functions (handler and pool task), keeps the code between processes, registers it with XLA.

The code is kept by numba beside the sources, or in the user's cache folder where that is not writable; NUMBA_CACHE_DIR
chooses another place. A kernel is compiled again when one of the files it is made of, numba or the processor changes.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import threading
import time
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numba
from llvmlite import binding

from afm_rl.generation import cpu_accumulate, cpu_ffi, cpu_header, cpu_memory, cpu_vector

_log = logging.getLogger(__name__)
_lock = threading.Lock()
_targets: set[str] = set()
#: Their code lives as long as they do.
_functions: list[Any] = []


def sources_digest(files: Iterable[str]) -> str:
    """Names what a kernel is compiled from: numba's cache looks at the file of the outermost function only."""
    shared = (cpu_accumulate, cpu_ffi, cpu_header, cpu_memory, cpu_vector)
    parts = [*files, __file__, *(str(module.__file__) for module in shared)]
    return hashlib.sha256("".join(Path(part).read_text() for part in parts).encode()).hexdigest()[:12]


def target(name: str, build: Callable[[str], None]) -> str:
    """`name`, after `build(name)` has registered it: once in a process, whoever asks."""
    with _lock:
        if name not in _targets:
            build(name)
            _targets.add(name)
    return name


def compile_function(function: Callable[[int], int], name: str) -> int:
    """The address of a C function (pointer) -> pointer, known to other kernels as the symbol `name`."""
    start_s = time.perf_counter()
    function.__name__ = function.__qualname__ = name
    decorate = partial(numba.cfunc, "int64(int64)", error_model="numpy")
    try:
        built = decorate(cache=True)(function)
    except RuntimeError as error:
        if "no locator available" not in str(error):
            raise
        _log.warning("compiled kernels are not kept between processes: %s", error)
        built = decorate()(function)
    _functions.append(built)
    address: Any = built.address
    binding.add_symbol(name, address)
    _log.info("%s: %.2f s%s", name, time.perf_counter() - start_s, " from the cache" if built.cache_hits else "")
    return int(address)


def register(name: str, address: int) -> None:
    """Makes a handler known to XLA's CPU programs."""
    handler = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_void_p)(address)
    jax.ffi.register_ffi_target(name, jax.ffi.pycapsule(handler), platform="cpu")
