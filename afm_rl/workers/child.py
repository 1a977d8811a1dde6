"""The program of a worker process: loads one function by its import path, then calls it for every request it reads.

    parent -> {"path", "options", "search_path", "memory_bytes"}      child -> {"value": {"batch": bool}} | {"error"}
    parent -> {"arguments", "limit_s"}                                child -> {"value"} | {"error"}

Frames are a length of four bytes and JSON, on standard input and on what was standard output; what the function prints
goes to standard error. Uses the standard library alone, so that a start costs what the function's own imports cost.
The parent enforces the time limit; should it be gone, the kernel ends this process by the alarm that every call sets.
Not in the paper, which does not say how its rewards are guarded.
"""

from __future__ import annotations

import importlib
import json
import os
import resource
import signal
import struct
import sys
from collections.abc import Callable
from typing import Any, BinaryIO

#: Seconds after its limit at which a call ends this process by itself, should the parent not have done so.
ORPHAN_GRACE_S = 5.0
_LENGTH = struct.Struct("<I")


def write_frame(stream: BinaryIO, message: object) -> None:
    """Write one message; NumPy numbers and arrays become plain ones."""
    content = json.dumps(message, default=_plain).encode()
    stream.write(_LENGTH.pack(len(content)) + content)
    stream.flush()


def read_frame(stream: BinaryIO) -> Any:
    """The next message, None at the end of the stream."""
    head = stream.read(_LENGTH.size)
    if len(head) < _LENGTH.size:
        return None
    (length,) = _LENGTH.unpack(head)
    content = stream.read(length)
    return json.loads(content) if len(content) == length else None


def load_object(path: str) -> Any:
    """What `package.module:name` names. Raises ValueError saying which part of the path is wrong, and what to do."""
    module_name, separator, name = path.partition(":")
    if not separator or not module_name or not name:
        raise ValueError(f"{path!r} is not an import path; write package.module:function")
    try:
        found = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name and (module_name == error.name or module_name.startswith(error.name + ".")):
            where = "install its package, or start the command in the folder that holds it"
            raise ValueError(f"{path!r}: there is no module {error.name!r}; {where}") from error
        raise ValueError(f"{path!r}: module {module_name!r} cannot be imported: {error}") from error
    except Exception as error:
        message = f"{path!r}: module {module_name!r} cannot be imported: {type(error).__name__}: {error}"
        raise ValueError(message) from error
    for part in name.split("."):
        if not hasattr(found, part):
            public = ", ".join(sorted(n for n in vars(found) if callable(getattr(found, n)) and not n.startswith("_")))
            raise ValueError(f"{path!r}: {module_name!r} has no {part!r}; it has {public or 'no functions'}")
        found = getattr(found, part)
    return found


def load_callable(path: str, options: dict[str, Any]) -> Callable[..., Any]:
    """As `load_object`; with options the path names a factory, which is called with them and returns the function."""
    found = load_object(path)
    if not callable(found):
        raise ValueError(f"{path!r} is a {type(found).__name__}, not a function")
    if not options:
        return found
    try:
        made = found(**options)
    except Exception as error:
        raise ValueError(f"{path!r} refuses its options {options}: {type(error).__name__}: {error}") from error
    if not callable(made):
        raise ValueError(f"{path!r} with options returned a {type(made).__name__}, not a function")
    return made


def describe(error: BaseException) -> str:
    """An exception in one line of at most 300 characters."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:300].rstrip(": ")


def main() -> None:
    """Serve until standard input ends."""
    requests, answers = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(2, 1)  # what the function prints must not stand between the frames
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # an interrupt at the terminal is the parent's to handle
    setup = read_frame(requests)
    if setup is None:
        return
    try:
        sys.path[:] = setup["search_path"]
        function = load_callable(setup["path"], setup["options"])
        _limit_memory(setup["memory_bytes"])
    except ValueError as error:
        write_frame(answers, {"error": str(error)})
        return
    write_frame(answers, {"value": {"batch": bool(getattr(function, "batch", False))}})
    while (request := read_frame(requests)) is not None:
        write_frame(answers, _answer(function, request))


def _answer(function: Callable[..., Any], request: dict[str, Any]) -> dict[str, Any]:
    signal.setitimer(signal.ITIMER_REAL, request["limit_s"] + ORPHAN_GRACE_S)
    try:
        value = function(*request["arguments"])
        json.dumps(value, default=_plain)
    except BaseException as error:  # whatever a user's function does is its own problem, sys.exit() too
        return {"error": describe(error)}
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0.0)
    return {"value": value}


def _limit_memory(memory_bytes: int) -> None:
    """So many bytes of address space beside what the imports took."""
    if sys.platform == "linux":
        with open("/proc/self/statm") as statm:
            mapped = int(statm.read().split()[0]) * resource.getpagesize()
        _, hard = resource.getrlimit(resource.RLIMIT_AS)
        limit = mapped + memory_bytes if hard == resource.RLIM_INFINITY else min(mapped + memory_bytes, hard)
        resource.setrlimit(resource.RLIMIT_AS, (limit, hard))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _plain(value: Any) -> Any:
    for convert in ("item", "tolist"):
        if hasattr(value, convert) and (convert == "tolist" or getattr(value, "size", 0) == 1):
            return getattr(value, convert)()
    raise TypeError(f"a {type(value).__name__} is not plain data (numbers, text, lists, mappings)")


if __name__ == "__main__":
    main()
