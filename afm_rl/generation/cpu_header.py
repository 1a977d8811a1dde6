"""Is the running machine, and the jaxlib it has, what the compiled CPU kernels are written for?

A kernel reads XLA's structures at fixed offsets. jaxlib ships the header that declares them, so they are compared before the
first kernel is compiled, and a jaxlib that moved one leaves the programs with plain XLA instead of a crash.
"""

from __future__ import annotations

import importlib.util
import re
from functools import cache
from pathlib import Path

import jax

#: Version of the interface that a kernel declares: major has to be the header's, minor at most the header's.
API_VERSION = (0, 3)

#: What the kernels read and write: bytes from a structure's start.
OFFSETS = {
    "XLA_FFI_Extension_Base.type": 8,
    "XLA_FFI_Extension_Base.next": 16,
    "XLA_FFI_Metadata_Extension.metadata": 24,
    "XLA_FFI_Metadata.api_version": 8,
    "XLA_FFI_Metadata.traits": 32,
    "XLA_FFI_Api_Version.major_version": 16,
    "XLA_FFI_Api_Version.minor_version": 20,
    "XLA_FFI_CallFrame.extension_start": 8,
    "XLA_FFI_CallFrame.api": 16,
    "XLA_FFI_CallFrame.ctx": 24,
    "XLA_FFI_CallFrame.args": 40,
    "XLA_FFI_CallFrame.rets": 80,
    "XLA_FFI_CallFrame.attrs": 120,
    "XLA_FFI_Args.args": 32,
    "XLA_FFI_Rets.rets": 32,
    "XLA_FFI_Attrs.attrs": 40,
    "XLA_FFI_Buffer.dtype": 16,
    "XLA_FFI_Buffer.data": 24,
    "XLA_FFI_Buffer.dims": 40,
    "XLA_FFI_Scalar.value": 8,
    "XLA_FFI_ThreadPool_Schedule_Args.ctx": 16,
    "XLA_FFI_ThreadPool_Schedule_Args.task": 24,
    "XLA_FFI_ThreadPool_Schedule_Args.data": 32,
    "XLA_FFI_ThreadPool_NumThreads_Args.ctx": 16,
    "XLA_FFI_ThreadPool_NumThreads_Args.num_threads": 24,
    "XLA_FFI_Error_Destroy_Args.error": 16,
    "XLA_FFI_Api.XLA_FFI_Error_Destroy": 64,
    "XLA_FFI_Api.XLA_FFI_ThreadPool_Schedule": 136,
    "XLA_FFI_Api.XLA_FFI_ThreadPool_NumThreads": 144,
}

#: XLA_FFI_DataType of a buffer.
BFLOAT16 = 16

#: Sizes of the structures that a kernel passes to XLA.
SIZES = {
    "XLA_FFI_ThreadPool_Schedule_Args": 40,
    "XLA_FFI_ThreadPool_NumThreads_Args": 32,
    "XLA_FFI_Error_Destroy_Args": 24,
}

_HALF_WORD_TYPES = {"int", "int32_t", "uint32_t"}


@cache
def unusable_reason() -> str | None:
    """Why compiled kernels cannot run in this process; None where they can."""
    if importlib.util.find_spec("numba") is None:
        return "numba is not installed"
    header = Path(jax.ffi.include_dir()) / "xla" / "ffi" / "api" / "c_api.h"
    if not header.is_file():
        return f"jaxlib ships no {header}"
    return header_difference(header.read_text()) or _processor_lacks()


def header_difference(text: str) -> str | None:
    """The first difference between XLA's header and what the kernels expect, in words."""
    defined = {name: int(value) for name, value in re.findall(r"#define XLA_FFI_API_(MAJOR|MINOR) (\d+)", text)}
    version = (defined.get("MAJOR", -1), defined.get("MINOR", -1))
    if version[0] != API_VERSION[0] or version[1] < API_VERSION[1]:
        return f"jaxlib's foreign function interface has the version {version}, the kernels are for {API_VERSION}"
    layout = Layout(text)
    for name, expected in OFFSETS.items():
        struct, field = name.split(".")
        found = layout.offsets(struct).get(field)
        if found != expected:
            return f"jaxlib's header has {name} at byte {found}, the kernels expect it at {expected}"
    for struct, expected in SIZES.items():
        if layout.size(struct) != expected:
            return f"jaxlib's header has {struct} of {layout.size(struct)} bytes, the kernels expect {expected}"
    bfloat16 = re.search(r"XLA_FFI_DataType_BF16 = (\d+)", text)
    if bfloat16 is None or int(bfloat16[1]) != BFLOAT16:
        return f"jaxlib's header gives bfloat16 the number {bfloat16 and bfloat16[1]}, the kernels expect {BFLOAT16}"
    return None


def _processor_lacks() -> str | None:
    """Fused multiply-add is one instruction everywhere but on old x86 processors, where it would be a slow function call."""
    from llvmlite import binding

    if binding.get_process_triple().startswith("x86_64"):
        return None if binding.get_host_cpu_features().get("fma") else "the processor has no fused multiply-add"
    return None


def has_vectors_of_512_bits() -> bool:
    """Whether 32 registers of 16 float32 are there."""
    from llvmlite import binding

    return bool(binding.get_host_cpu_features().get("avx512f"))


class Layout:
    """Where a 64-bit C compiler puts the fields of the structures of a header."""

    def __init__(self, text: str) -> None:
        text = re.sub(r"//[^\n]*|/\*.*?\*/", "", text, flags=re.DOTALL)
        bodies = re.findall(r"struct (\w+) \{(.*?)\}(?: \w+)?;", text, flags=re.DOTALL)
        self._fields = {name: [_field(line) for line in body.split(";") if line.strip()] for name, body in bodies}

    def offsets(self, struct: str) -> dict[str, int]:
        """Bytes from the start of a structure to each field; empty for one that the header does not have."""
        found, end = {}, 0
        for kind, name in self._fields.get(struct, []):
            size, alignment = self._size_alignment(kind)
            end += -end % alignment
            found[name] = end
            end += size
        return found

    def size(self, struct: str) -> int:
        """Bytes up to the end of the last field, as the header's own STRUCT_SIZE."""
        fields = self._fields.get(struct)
        return self.offsets(struct)[fields[-1][1]] + self._size_alignment(fields[-1][0])[0] if fields else 0

    def _size_alignment(self, kind: str) -> tuple[int, int]:
        if kind in _HALF_WORD_TYPES or (kind.startswith("XLA_FFI_") and kind not in self._fields):
            return 4, 4  # what is neither a pointer nor a structure is an enumeration
        if kind in self._fields:
            size = self.size(kind)
            return size + -size % 8, 8
        return 8, 8


def _field(declaration: str) -> tuple[str, str]:
    """The type (pointer, if it is one) and the name of a field."""
    table = re.search(r"_XLA_FFI_API_STRUCT_FIELD\((\w+)\)", declaration)
    if table:
        return "pointer", table[1]
    function = re.search(r"\(\*(\w+)\)", declaration)
    if function:
        return "pointer", function[1]
    kind, name = declaration.replace("const ", "").replace("struct ", "").strip().rsplit(None, 1)
    return ("pointer", name.lstrip("*")) if "*" in declaration else (kind, name)
