"""The JSON-lines formats of prompts, demonstrations and preferences: one object a line, the same for users and worlds.

`docs/data.md` shows each format. A preference record is the paper's (E.1): prompt, chosen, rejected, a level, and four
grades a side. Reading is strict: an unknown key, a wrong type or a second record with the same id is a `UserError`
that names the file, the line and the fix, because a silently ignored key is a silently wrong run.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

from afm_rl.data.checks import grade, validate_check
from afm_rl.data.split import conversation_key, stable_hash
from afm_rl.errors import UserError
from afm_rl.types import GRADINGS, LEVELS, Demonstration, Grades, Message, Preference, Prompt

PROMPT_KEYS = ("id", "prompt", "messages", "kind", "checks")
DEMONSTRATION_KEYS = (*PROMPT_KEYS, "response")
PREFERENCE_KEYS = (
    *PROMPT_KEYS,
    "chosen",
    "rejected",
    "level",
    "chosen_grades",
    "rejected_grades",
    "annotator",
    "source",
)
ROLES = ("system", "user", "assistant")

Record = TypeVar("Record")
PathLike = str | Path


def read_prompts(path: PathLike) -> list[Prompt]:
    """The prompts of a JSON-lines file. Raises UserError; ids must be unique, for the online loop accounts by id."""
    prompts: list[Prompt] = []
    line_of: dict[str, int] = {}
    for line, prompt in _read(path, PROMPT_KEYS, _prompt):
        if prompt.id in line_of:
            raise UserError(
                f"{path}:{line}: the same prompt or id ({prompt.id!r}) as on line {line_of[prompt.id]}; "
                'remove it or give it an "id" of its own'
            )
        line_of[prompt.id] = line
        prompts.append(prompt)
    return prompts


def read_demonstrations(path: PathLike) -> list[Demonstration]:
    """The demonstrations of a JSON-lines file; one prompt may have several. Raises UserError."""
    return [record for _, record in _read(path, DEMONSTRATION_KEYS, _demonstration)]


def read_preferences(path: PathLike) -> list[Preference]:
    """The preference pairs of a JSON-lines file. Grades that are not given follow from the checks. Raises UserError."""
    return [record for _, record in _read(path, PREFERENCE_KEYS, _preference)]


def preference_from_json(fields: Mapping[str, Any]) -> Preference:
    """The preference of one parsed JSON object. Raises ValueError that says what is wrong with it."""
    _check_keys(fields, PREFERENCE_KEYS)
    return _preference(fields)


def write_prompts(path: PathLike, prompts: Iterable[Prompt]) -> None:
    """One prompt a line, so that `read_prompts` gives the same records back."""
    _write(path, (_prompt_fields(prompt) for prompt in prompts))


def write_demonstrations(path: PathLike, demonstrations: Iterable[Demonstration]) -> None:
    """One demonstration a line, so that `read_demonstrations` gives the same records back."""
    _write(path, ({**_prompt_fields(d.prompt), "response": d.response} for d in demonstrations))


def write_preferences(path: PathLike, preferences: Iterable[Preference]) -> None:
    """One preference a line, so that `read_preferences` gives the same records back."""
    _write(path, (preference_to_json(preference) for preference in preferences))


def preference_to_json(preference: Preference) -> dict[str, Any]:
    """The JSON object that `preference_from_json` reads back."""
    return {
        **_prompt_fields(preference.prompt),
        "chosen": preference.chosen,
        "rejected": preference.rejected,
        "level": LEVELS[preference.level],
        "chosen_grades": dataclasses.asdict(preference.chosen_grades),
        "rejected_grades": dataclasses.asdict(preference.rejected_grades),
        "annotator": preference.annotator,
        "source": preference.source,
    }


def read_json_lines(path: PathLike) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line number from 1, object) of every line that is not blank. Raises UserError: no file, no UTF-8, no object."""
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such file; give the path of a JSON-lines file (one JSON object a line)")
    with path.open("rb") as file:
        for number, raw in enumerate(file, start=1):
            try:
                line = raw.decode("utf-8-sig" if number == 1 else "utf-8")
                value = json.loads(line, object_pairs_hook=_object) if line.strip() else None
            except UnicodeDecodeError as error:
                raise UserError(f"{path}:{number}: not UTF-8 ({error.reason}); convert the file to UTF-8") from error
            except json.JSONDecodeError as error:
                raise UserError(
                    f"{path}:{number}: not JSON: {error.msg} at column {error.colno}; write one JSON object a line"
                ) from error
            except (ValueError, RecursionError) as error:
                raise UserError(f"{path}:{number}: {error}") from error
            if line.strip():
                if not isinstance(value, dict):
                    raise UserError(f"{path}:{number}: expected a JSON object, got {type(value).__name__}")
                yield number, value


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"key {next(k for k in keys if keys.count(k) > 1)!r} is given twice; keep one")
    return value


def _read(
    path: PathLike, keys: tuple[str, ...], parse: Callable[[Mapping[str, Any]], Record]
) -> Iterator[tuple[int, Record]]:
    empty = True
    for line, fields in read_json_lines(path):
        empty = False
        try:
            _check_keys(fields, keys)
            record = parse(fields)
        except ValueError as error:
            raise UserError(f"{path}:{line}: {error}") from error
        yield line, record
    if empty:
        raise UserError(f"{path}: the file has no records; it needs one JSON object a line, see docs/data.md")


def _check_keys(fields: Mapping[str, Any], keys: tuple[str, ...]) -> None:
    for key in fields:
        if key not in keys:
            near = difflib.get_close_matches(key, keys, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"the keys are {', '.join(keys)}"
            raise ValueError(f"unknown key {key!r}; {hint}")


def _text(fields: Mapping[str, Any], key: str, *, default: str | None = None) -> str:
    if key not in fields and default is not None:
        return default
    if key not in fields:
        raise ValueError(f"{key!r} is missing; it must be a text")
    value = fields[key]
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"{key!r} must be a text that is not empty, got {value!r}")
    return value


def _prompt(fields: Mapping[str, Any]) -> Prompt:
    if ("prompt" in fields) == ("messages" in fields):
        raise ValueError('give either "prompt" (a text) or "messages" (a list of role and content), and not both')
    messages = _messages(fields["messages"]) if "messages" in fields else (Message("user", _text(fields, "prompt")),)
    checks = fields.get("checks", [])
    if not isinstance(checks, list):
        raise ValueError(f"'checks' must be a list of checks, got {checks!r}")
    for check in checks:
        validate_check(check)
    named = Prompt("", messages, kind=_text(fields, "kind", default="general"), checks=tuple(checks))
    return dataclasses.replace(named, id=_text(fields, "id", default=default_id(named)))


def default_id(prompt: Prompt) -> str:
    """The id of a prompt that was given none: a hash of its kind and its messages."""
    return f"{prompt.kind}-{stable_hash(prompt.kind, conversation_key(prompt)):016x}"


def _messages(value: object) -> tuple[Message, ...]:
    if not isinstance(value, list) or not value:
        raise ValueError(f"'messages' must be a list of at least one {{role, content}}, got {value!r}")
    messages: list[Message] = []
    for index, item in enumerate(value):
        if not isinstance(item, dict) or set(item) != {"role", "content"}:
            raise ValueError(f'messages[{index}] must be {{"role": ..., "content": ...}}, got {item!r}')
        if item["role"] not in ROLES:
            raise ValueError(f"messages[{index}].role must be one of {', '.join(ROLES)}, got {item['role']!r}")
        if item["role"] == "system" and index:
            raise ValueError(f"messages[{index}]: a system message can only be the first one")
        messages.append(Message(item["role"], _text(item, "content")))
    if messages[-1].role != "user":
        raise ValueError(f"the last message must be the user's (the response follows it), got {messages[-1].role!r}")
    return tuple(messages)


def _demonstration(fields: Mapping[str, Any]) -> Demonstration:
    return Demonstration(prompt=_prompt(fields), response=_text(fields, "response"))


def _preference(fields: Mapping[str, Any]) -> Preference:
    prompt, chosen, rejected = _prompt(fields), _response(fields, "chosen"), _response(fields, "rejected")
    if chosen == rejected:
        raise ValueError("'chosen' and 'rejected' are the same text, which prefers nothing; remove the record")
    return Preference(
        prompt=prompt,
        chosen=chosen,
        rejected=rejected,
        level=_level(fields),
        chosen_grades=_grades(fields, "chosen_grades", prompt=prompt, response=chosen),
        rejected_grades=_grades(fields, "rejected_grades", prompt=prompt, response=rejected),
        annotator=_text(fields, "annotator", default="unknown"),
        source=_text(fields, "source", default="file"),
    )


def _response(fields: Mapping[str, Any], key: str) -> str:
    """A response to compare may be empty: a policy may well have said nothing."""
    if not isinstance(fields.get(key), str):
        raise ValueError(f"{key!r} must be a text (it may be empty), got {fields.get(key)!r}")
    return fields[key]


def _level(fields: Mapping[str, Any]) -> int:
    value = fields.get("level")
    if isinstance(value, str) and value in LEVELS:
        return LEVELS.index(value)
    if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < len(LEVELS):
        return value
    names = ", ".join(f"{index} or {name!r}" for index, name in enumerate(LEVELS))
    raise ValueError(f"'level' says how much better the chosen response is: {names}; got {value!r}")


def _grades(fields: Mapping[str, Any], key: str, *, prompt: Prompt, response: str) -> Grades:
    value = fields.get(key)
    if value is None and prompt.checks:
        return grade(prompt, response)
    if value is None:
        raise ValueError(
            f"{key!r} is missing and the prompt has no checks to compute it from; give {', '.join(GRADINGS)}, each 0..2"
        )
    if not isinstance(value, dict) or set(value) != set(GRADINGS):
        raise ValueError(f"{key!r} must have exactly the keys {', '.join(GRADINGS)}, got {value!r}")
    for name, number in value.items():
        if not isinstance(number, int) or isinstance(number, bool) or not 0 <= number <= 2:
            raise ValueError(f"{key}.{name} must be 0, 1 or 2, got {number!r}")
    return Grades(**value)


def _prompt_fields(prompt: Prompt) -> dict[str, Any]:
    fields: dict[str, Any] = {"id": prompt.id, "kind": prompt.kind}
    if len(prompt.messages) == 1 and prompt.messages[0].role == "user":
        fields["prompt"] = prompt.messages[0].content
    else:
        fields["messages"] = [dataclasses.asdict(message) for message in prompt.messages]
    if prompt.checks:
        fields["checks"] = [dict(check) for check in prompt.checks]
    return fields


def _write(path: PathLike, rows: Iterable[dict[str, Any]]) -> None:
    with Path(path).open("w", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
