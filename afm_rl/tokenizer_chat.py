"""Chat templates of Hugging Face folders, rendered as transformers does: Jinja in a sandbox, with the same helpers.

A template is `chat_template.jinja`, or `chat_template` of tokenizer_config.json (a string, or a list of named ones of
which "default" counts). A folder without one gets `PLAIN_TEMPLATE`: the role and a colon on one line, the text below it, an
empty line between turns, and the end token after what the assistant said.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from afm_rl.tokenizer import TokenizerError
from afm_rl.types import Message

PLAIN_TEMPLATE = (
    "{%- for message in messages -%}"
    "{{- message['role'] ~ ':\\n' ~ message['content'] -}}"
    "{%- if message['role'] == 'assistant' -%}{{- eos_token -}}{%- endif -%}"
    "{{- '\\n\\n' -}}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- 'assistant:\\n' -}}{%- endif -%}"
)


class ChatTemplate:
    """A compiled template; `special_tokens` (bos_token, eos_token, ...) are variables of it."""

    def __init__(self, source: str, special_tokens: Mapping[str, Any]) -> None:
        """Raises TokenizerError when the template is not Jinja."""
        try:
            self._template = _environment().from_string(source)
        except jinja2.TemplateSyntaxError as error:
            raise TokenizerError(f"the chat template does not parse: line {error.lineno}: {error.message}") from error
        self._special_tokens = dict(special_tokens)

    def render(self, messages: Sequence[Message], *, add_generation_prompt: bool) -> str:
        """The conversation as text. Raises ValueError with the template's own words where it refuses one."""
        turns = [{"role": message.role, "content": message.content} for message in messages]
        try:
            return self._template.render(
                messages=turns,
                tools=None,
                documents=None,
                add_generation_prompt=add_generation_prompt,
                **self._special_tokens,
            )
        except (jinja2.TemplateError, TypeError) as error:
            raise ValueError(f"the chat template refuses the conversation: {error}") from error


def find_template(files: Mapping[str, bytes], settings: Mapping[str, Any]) -> str | None:
    """The template of a folder's files, `settings` being tokenizer_config.json."""
    if "chat_template.jinja" in files:
        return files["chat_template.jinja"].decode()
    given = settings.get("chat_template")
    if isinstance(given, list):
        given = {row["name"]: row["template"] for row in given}
    if isinstance(given, Mapping):
        if "default" not in given:
            raise TokenizerError(f"tokenizer_config.json: chat_template has no 'default', only {', '.join(given)}")
        given = given["default"]
    return given


class _Generation(jinja2.ext.Extension):
    """{% generation %} marks the assistant's words for training masks there; here it only lets them through."""

    tags = {"generation"}  # noqa: RUF012 (the base class declares it)

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment


def _raise(message: str) -> None:
    raise jinja2.TemplateError(message)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Jinja's own filter would escape HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
