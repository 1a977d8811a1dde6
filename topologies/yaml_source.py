"""YAML with a memory: plain data plus the file and line (or the `--set` option) that every value came from.

Scalars follow YAML 1.2, not PyYAML's 1.1: `1e-3` is a number, `yes` and `on` are text, `010` is ten. Duplicate keys are
errors. `--set a.b=c` parses c as YAML; a list item is named by its index or, in an ordered list of stages, by the name
of the stage (`stages.itec.rounds=1`).
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from afm_rl.errors import UserError

#: Where a value sits: mapping keys and list indices from the root.
Loc = tuple[str | int, ...]


class _Loader(yaml.SafeLoader):
    """SafeLoader with YAML 1.2 core scalars: null, true/false, decimal integers (1_000 allowed), floats."""

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}  # noqa: RUF012 (PyYAML's own class attribute)


_NULL, _BOOL, _INT, _FLOAT, _STR = (f"tag:yaml.org,2002:{kind}" for kind in ("null", "bool", "int", "float", "str"))
_Loader.add_implicit_resolver(_NULL, re.compile(r"^(?:~|null|Null|NULL|)$"), ["~", "n", "N", ""])
_Loader.add_implicit_resolver(_BOOL, re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF"))
_Loader.add_implicit_resolver(_INT, re.compile(r"^[-+]?[0-9]+(?:_[0-9]+)*$"), list("-+0123456789"))
_Loader.add_implicit_resolver(
    _FLOAT,
    re.compile(r"^[-+]?(?:\.[0-9]+|[0-9]+(?:_[0-9]+)*(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?$"),
    list("-+.0123456789"),
)


@dataclass
class Document:
    """Plain data and the place each value came from, by location; `place` falls back to the nearest parent."""

    data: Any
    source: str
    places: dict[Loc, str] = field(default_factory=dict)

    def place(self, loc: Loc) -> str:
        """'FILE:LINE' or '--set ...' of the deepest part of `loc` that was written anywhere."""
        for end in range(len(loc), -1, -1):
            if loc[:end] in self.places:
                return self.places[loc[:end]]
        return self.source

    def has(self, loc: Loc) -> bool:
        """Whether `loc` names a value that exists in the data."""
        try:
            self.at(loc)
        except (KeyError, IndexError, TypeError):
            return False
        return True

    def at(self, loc: Loc) -> Any:
        """The value at `loc`. Errors: KeyError, IndexError or TypeError where there is none."""
        value = self.data
        for part in loc:
            value = value[part]
        return value

    def replace(self, loc: Loc, value: Any, place: str) -> None:
        """Put `value` at `loc`, whose parent exists, and forget where anything below it came from."""
        self.places = {known: where for known, where in self.places.items() if known[: len(loc)] != loc}
        self.places[loc] = place
        if not loc:
            self.data = value
            return
        self.at(loc[:-1])[loc[-1]] = value


def show(loc: Loc) -> str:
    """('stages', 2, 'itec') -> 'stages[2].itec'."""
    text = ""
    for part in loc:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else part
    return text


def read_yaml(path: str | Path) -> Document:
    """Read one YAML file. Errors: `UserError` with file and line for bad syntax, duplicate keys, odd keys."""
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text (byte {error.start}); save the file as UTF-8") from error
    return parse_yaml(text, source=str(path))


def parse_yaml(text: str, *, source: str) -> Document:
    """As `read_yaml`, from text; `source` is what places call the file."""
    try:
        node = yaml.compose(text, Loader=_Loader)
    except yaml.YAMLError as error:
        raise UserError(_syntax_message(error, source)) from error
    document = Document(None, source)
    if node is not None:
        document.data = _convert(node, (), document, ())
    return document


def apply_override(document: Document, override: str) -> None:
    """Apply one `a.b=c` to the document in place. Errors: `UserError` naming the option and what it could not find."""
    path, sign, text = override.partition("=")
    path, place = path.strip(), f"--set {override}"
    if not sign or not path or not all(path.split(".")):
        raise UserError(f"{place}: expected key=value with a dotted key, as in stages.itec.rounds=1")
    value = parse_yaml(text, source=place).data
    loc: Loc = ()
    parts = path.split(".")
    for i, part in enumerate(parts):
        loc = _descend(document, loc, part, place=place)
        if i < len(parts) - 1 and not document.has(loc):
            document.replace(loc, {}, place)
    document.replace(loc, value, place)


def _syntax_message(error: yaml.YAMLError, source: str) -> str:
    if not isinstance(error, yaml.MarkedYAMLError):
        return f"{source}: not YAML: {' '.join(str(error).split())}"
    mark = error.problem_mark or error.context_mark
    where = f"{source}:{mark.line + 1}" if mark else source
    context = f" {error.context}" if error.context else ""
    return f"{where}: not YAML: {error.problem or 'syntax error'}{context}"


def _convert(node: yaml.Node, loc: Loc, document: Document, above: tuple[yaml.Node, ...]) -> Any:
    """A composed node as plain data; the line of every value goes to `document.places`."""
    line = f"{document.source}:{node.start_mark.line + 1}"
    document.places[loc] = line
    if node in above:
        raise UserError(f"{line}: {show(loc)}: an alias inside the value it names; write the value out")
    above = (*above, node)
    if isinstance(node, yaml.SequenceNode):
        return [_convert(child, (*loc, i), document, above) for i, child in enumerate(node.value)]
    if isinstance(node, yaml.MappingNode):
        return _convert_mapping(node, loc, document, above)
    return _convert_scalar(node, loc, line)


def _convert_mapping(node: yaml.MappingNode, loc: Loc, document: Document, above: tuple[yaml.Node, ...]) -> dict[str, Any]:
    mapping: dict[str, Any] = {}
    for key_node, value_node in node.value:
        line = f"{document.source}:{key_node.start_mark.line + 1}"
        at = f"{line}: {show(loc)}: " if loc else f"{line}: "
        if not isinstance(key_node, yaml.ScalarNode) or key_node.tag != _STR:
            raise UserError(f'{at}a key must be text, got {getattr(key_node, "value", "a list or mapping")}; put it in "…"')
        key = key_node.value
        if key in mapping:
            raise UserError(f"{at}the key '{key}' is given twice; remove one")
        mapping[key] = _convert(value_node, (*loc, key), document, above)
        # The key's line, not the value's: `a:` with its value on the next line is reported where the name stands.
        document.places[(*loc, key)] = line
    return mapping


def _convert_scalar(node: yaml.Node, loc: Loc, line: str) -> Any:
    text = node.value
    if node.tag == _STR:
        return text
    if node.tag == _NULL:
        return None
    if node.tag == _BOOL:
        return text.lower() == "true"
    if node.tag == _INT:
        return int(text)
    if node.tag == _FLOAT:
        return float(text)
    raise UserError(f"{line}: {show(loc)}: the tag {node.tag} is not supported; write plain YAML")


def _descend(document: Document, loc: Loc, part: str, *, place: str) -> Loc:
    """One step of an override's path below `loc`, opening a bare stage name (`- itec`) into `itec: {}` where needed."""
    value = document.at(loc)
    if value is None and document.has(loc):
        document.replace(loc, {}, place)
        return (*loc, part)
    if isinstance(value, dict):
        return (*loc, part)
    if isinstance(value, list):
        return _descend_list(document, loc, part, place=place)
    if isinstance(value, str) and value == part:  # stages.2.itec with the item written as a bare name
        document.replace(loc, {part: {}}, place)
        return (*loc, part)
    raise UserError(f"{place}: {show(loc)} is {value!r}, which has no '{part}'; set {show(loc)} itself to a mapping")


def _descend_list(document: Document, loc: Loc, part: str, *, place: str) -> Loc:
    items = document.at(loc)
    if part.isdecimal():
        if int(part) >= len(items):
            raise UserError(f"{place}: {show(loc)} has {len(items)} items, counted from 0; there is no item {part}")
        return (*loc, int(part))
    names = [str(name) for item in items for name in (list(item)[:1] if isinstance(item, dict) else [item])]
    for i, item in enumerate(items):
        if item == part:
            document.replace((*loc, i), {part: {}}, place)
            return (*loc, i, part)
        if isinstance(item, dict) and part in item:
            return (*loc, i, part)
    raise UserError(f"{place}: {show(loc)} has no '{part}'; it has: {', '.join(names) or 'nothing'}")
