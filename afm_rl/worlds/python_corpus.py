"""Text from the Python installation that runs us: nothing is downloaded and nothing is redistributed.

web: the language reference's help topics and the standard library's docstrings. code: the standard library's source
without its tests. The split is by file, for code and docstrings alike, so that a held-out file is held out in both.
The text depends on the Python version, which `describe_source` names.
"""

from __future__ import annotations

import ast
import os
import platform
import pydoc_data.topics
import re
import sysconfig
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from afm_rl.data.split import is_held_out, stable_hash

#: Documents are cut, at blank lines, to at most about this many characters.
DOCUMENT_CHARS = 4000
MIN_DOCSTRING_CHARS = 80
HELD_OUT_FRACTION = 0.05
#: Folders without prose or code to learn from: tests, other people's packages, character tables, the topics themselves.
_SKIPPED = re.compile(
    r"tests?|.*_test|test_.*|site-packages|dist-packages|encodings|pydoc_data|lib2to3|turtledemo|_sysconfig.*"
)
_DEFINITIONS = (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
_Documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True)
class SplitDocuments:
    """Documents of one domain, by side of the split."""

    training: list[str]
    held_out: list[str]


def describe_source() -> str:
    """Where the text comes from, for the report."""
    return f"the standard library of {platform.python_implementation()} {platform.python_version()} on this machine"


def web_documents(*, size_bytes: int, seed: int, keep: Callable[[str], bool]) -> SplitDocuments:
    """About `size_bytes` of help topics and docstrings for which `keep` holds, and the held-out ones met on the way."""
    topics = sorted(pydoc_data.topics.topics.items())
    pieces = [(f"topic {name}", piece) for name, text in topics for piece in _cut(text)]
    pieces = sorted(pieces, key=lambda item: stable_hash(str(seed), *item))
    # Topics are the better prose: up to half of the text is theirs.
    share = _take(iter(pieces), size_bytes=size_bytes // 2, keep=keep)
    rest = size_bytes - sum(len(text.encode()) for text in share.training)
    found = ((name, text) for name, source in _sources(seed) for text in _docstrings(name, source))
    docstrings = _take(found, size_bytes=rest, keep=keep)
    return SplitDocuments(share.training + docstrings.training, share.held_out + docstrings.held_out)


def code_documents(*, size_bytes: int, seed: int, keep: Callable[[str], bool]) -> SplitDocuments:
    """The same of source; every piece begins with the name of its file."""
    found = ((name, f"# {name}\n{piece}") for name, source in _sources(seed) for piece in _cut(source))
    return _take(found, size_bytes=size_bytes, keep=keep)


def _take(found: Iterator[tuple[str, str]], *, size_bytes: int, keep: Callable[[str], bool]) -> SplitDocuments:
    """The first different documents, until `size_bytes` are there to train on and at least one is held out."""
    sides = SplitDocuments([], [])
    seen: set[str] = set()
    left = size_bytes
    for name, text in found if size_bytes > 0 else ():
        if left <= 0 and sides.held_out:
            break
        if text in seen or not keep(text):
            continue
        seen.add(text)
        if is_held_out(name, fraction=HELD_OUT_FRACTION, salt="python_corpus"):
            sides.held_out.append(text)
        elif left > 0:
            sides.training.append(text)
            left -= len(text.encode())
    return sides


def _sources(seed: int) -> Iterator[tuple[str, str]]:
    """(file name, text) of the standard library's modules, in an order that only seed and names decide."""
    root = Path(sysconfig.get_path("stdlib"))
    names: list[Path] = []
    for folder, folders, files in os.walk(root):
        folders[:] = [name for name in folders if not _SKIPPED.fullmatch(name)]
        modules = (Path(folder, name) for name in files if name.endswith(".py"))
        names += [path.relative_to(root) for path in modules if not _SKIPPED.fullmatch(path.stem)]
    for name in sorted(names, key=lambda n: stable_hash(str(seed), n.as_posix())):
        try:
            yield name.as_posix(), (root / name).read_text(encoding="utf-8")
        except UnicodeDecodeError:  # a few modules declare another encoding; they are not needed
            continue


def _docstrings(name: str, source: str) -> Iterator[str]:
    """The longer docstrings of a module and of the classes and functions that stand directly in one another."""
    nodes: list[tuple[str, _Documented]] = [(name, ast.parse(source))]
    while nodes:
        title, node = nodes.pop()
        nodes += [(child.name, child) for child in node.body if isinstance(child, _DEFINITIONS)]
        text = ast.get_docstring(node) or ""
        if len(text) >= MIN_DOCSTRING_CHARS:
            yield from (f"{title}\n\n{piece}" for piece in _cut(text))


def _cut(text: str) -> list[str]:
    """`text` in pieces of at most DOCUMENT_CHARS (or one line), cut at blank lines, else at line ends."""
    pieces: list[str] = []
    current: list[str] = []
    size = 0
    for block in re.split(r"(?<=\n)(?=\n)", text.strip("\n")):
        for part in [block] if len(block) <= DOCUMENT_CHARS else block.splitlines(keepends=True):
            if current and size + len(part) > DOCUMENT_CHARS:
                pieces.append("".join(current).strip("\n"))
                current, size = [], 0
            current.append(part)
            size += len(part)
    pieces.append("".join(current).strip("\n"))
    return [piece for piece in pieces if piece.strip()]
