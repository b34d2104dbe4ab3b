"""Chat templates: a list of messages -> the prompt a chat model was trained on.

The template is Jinja, from ``chat_template.jinja`` or tokenizer_config.json, and comes from strangers: it runs in
Jinja's sandbox, with the names Hugging Face transformers offers (``raise_exception``, ``strftime_now``, the ``tojson``
filter, ``break``/``continue``, ``{% generation %}`` blocks).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from cupyinfer.errors import CheckpointError, ConfigError, RequestError
from cupyinfer.text.tokenizer import read_json

Message = Mapping[str, Any]  # role: system, user, assistant, tool; content: text; more where the template reads it

BUILTIN = {
    # For models without a template. The model goes on with the plain text: what was said so far, end to end.
    "completion": (
        "{% for m in messages %}{{ m.content }}"
        "{% if m.role != 'user' and not loop.last %}{{ '\n' }}{% endif %}{% endfor %}"
    ),
    # A play script, for base models that have read dialogues. Stop at "\nUser:".
    "transcript": (
        "{% for m in messages %}{{ m.role | capitalize }}: {{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}Assistant:{% endif %}"
    ),
}
BUILTIN_STOP: dict[str, tuple[str, ...]] = {"completion": (), "transcript": ("\nUser:", "\nSystem:")}


@dataclass(frozen=True)
class ChatTemplate:
    """A compiled template. ``name``: where it comes from, or a key of BUILTIN.

    ``stop``: stop strings that belong to it. ``adds_special_tokens``: the rendered text lacks the begin token, so the
    tokenizer must add it (a model's own template writes it out).
    """

    name: str
    source: str
    special_tokens: Mapping[str, str] = field(default_factory=dict)
    stop: tuple[str, ...] = ()
    adds_special_tokens: bool = False

    def __post_init__(self) -> None:
        try:
            object.__setattr__(self, "_compiled", _environment().from_string(self.source))
        except jinja2.TemplateError as error:
            raise CheckpointError(f"the chat template of {self.name} is not valid Jinja: {error}") from None

    def render(self, messages: Sequence[Message], *, add_generation_prompt: bool = True, **variables: Any) -> str:
        """The prompt text. ``variables`` (tools, documents, enable_thinking, ...) are handed to the template.

        Raises RequestError when a message is malformed or the template refuses the conversation.
        """
        check_messages(messages)
        names = {**self.special_tokens, "tools": None, "documents": None, **variables}
        try:
            compiled: jinja2.Template = self._compiled  # type: ignore[attr-defined]
            return compiled.render(messages=list(messages), add_generation_prompt=add_generation_prompt, **names)
        except Exception as error:  # whatever a stranger's template runs into
            raise RequestError(f"messages: the chat template of {self.name} refused them: {error}") from None


def check_messages(messages: Sequence[Message]) -> None:
    """Raise RequestError unless ``messages`` is a non-empty list of objects with a role and content."""
    if isinstance(messages, (str, bytes, Mapping)) or not isinstance(messages, Sequence) or not messages:
        raise RequestError(f"messages={messages!r} is not allowed; allowed: a non-empty list of {{role, content}}")
    for index, message in enumerate(messages):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise RequestError(f"messages[{index}]={message!r} is not allowed; allowed: {{role, content}}")
        if "content" not in message and "tool_calls" not in message:
            raise RequestError(f"messages[{index}] has no content")


def load_chat_template(directory: str | Path, special_tokens: Mapping[str, str]) -> ChatTemplate | None:
    """The template of a model directory, or None when it has none. Raises CheckpointError when it is malformed."""
    directory = Path(directory)
    file = directory / "chat_template.jinja"
    if file.is_file():
        return ChatTemplate(str(file), file.read_text(encoding="utf-8"), special_tokens)
    for file in (directory / "tokenizer_config.json", directory / "chat_template.json"):
        source = read_json(file).get("chat_template")
        if isinstance(source, list):  # several, named; "default" is the one for plain chat
            named = {t.get("name"): t.get("template") for t in source if isinstance(t, dict)}
            source = named.get("default") or next(iter(named.values()), None)
        if source is not None and not isinstance(source, str):
            raise CheckpointError(f"{file}: chat_template must be text, it is a {type(source).__name__}")
        if source:
            return ChatTemplate(str(file), source, special_tokens)
    return None


def named_chat_template(name: str, special_tokens: Mapping[str, str]) -> ChatTemplate:
    """A built-in template by name, or one from a file. Raises ConfigError when it is neither."""
    if name in BUILTIN:
        return ChatTemplate(name, BUILTIN[name], special_tokens, BUILTIN_STOP[name], adds_special_tokens=True)
    try:
        return ChatTemplate(name, Path(name).read_text(encoding="utf-8"), special_tokens)
    except (OSError, UnicodeDecodeError):
        allowed = f"{', '.join(BUILTIN)} or a readable file"
        raise ConfigError(f"chat_template={name!r} is not allowed; allowed: {allowed}") from None


class _Generation(Extension):
    """``{% generation %}...{% endgeneration %}`` marks the assistant's words for training; here it is transparent."""

    tags = {"generation"}

    def parse(self, parser: Any) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=line)


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
    )
    environment.filters["tojson"] = _to_json  # Jinja's own escapes HTML
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment


def _to_json(value: Any, ensure_ascii: bool = False, indent: int | None = None, **options: Any) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **options)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)
