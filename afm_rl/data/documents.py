"""Plain text documents for pre-training: folders or files of text, or JSON lines with a "text".

A folder is read recursively, files in the order of their paths. In a JSON-lines corpus every other key of an object
(address, date, licence) is left alone: unlike our own records, corpora carry what their makers put there.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from afm_rl.data.records import read_json_lines
from afm_rl.errors import UserError

TEXT_SUFFIXES = (".txt", ".md", ".py")
JSON_LINES_SUFFIX = ".jsonl"


def read_documents(path: str | Path) -> list[str]:
    """Every document under `path` that is not blank. Raises UserError naming the file (and line) and what to do."""
    path = Path(path)
    if path.is_dir():
        files = sorted(p for p in path.rglob("*") if p.suffix in (*TEXT_SUFFIXES, JSON_LINES_SUFFIX) and p.is_file())
    elif path.is_file():
        files = [path]
    else:
        raise UserError(f"{path}: no such file or folder; give a text file, a .jsonl file, or a folder of them")
    documents = [text for file in files for text in _read_file(file) if text.strip()]
    if not documents:
        kinds = ", ".join((*TEXT_SUFFIXES, JSON_LINES_SUFFIX))
        raise UserError(f"{path}: no documents in it; it needs files that end in {kinds} and are not blank")
    return documents


def write_documents(path: str | Path, documents: Iterable[str]) -> None:
    """One JSON line {"text": ...} a document."""
    with Path(path).open("w", encoding="utf-8") as file:
        for text in documents:
            file.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")


def _read_file(path: Path) -> list[str]:
    if path.suffix == JSON_LINES_SUFFIX:
        return [_text_of(path, line, fields.get("text")) for line, fields in read_json_lines(path)]
    if path.suffix not in TEXT_SUFFIXES:
        kinds = ", ".join((*TEXT_SUFFIXES, JSON_LINES_SUFFIX))
        raise UserError(f"{path}: cannot read {path.suffix or 'a file without an ending'}; documents are {kinds}")
    try:
        # Bytes are decoded here, not by text mode, which would change the line ends of the user's text.
        return [path.read_bytes().decode("utf-8")]
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 at byte {error.start}; convert the file to UTF-8 or remove it") from error


def _text_of(path: Path, line: int, text: object) -> str:
    if not isinstance(text, str):
        raise UserError(f'{path}:{line}: "text" must be the document\'s text, got {text!r}')
    return text
