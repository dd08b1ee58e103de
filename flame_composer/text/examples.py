"""Examples to tune a model on: conversations, taken from the records of common formats."""

from __future__ import annotations

import difflib
import functools
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from flame_composer.errors import ConfigError
from flame_composer.text.chat import Message
from flame_composer.text.jsonl import InvalidRecord, kind_of

FormatName = Literal["alpaca", "sharegpt", "messages", "prompt_completion"]
HASH_KEY = b"flame_composer example"
Conversation = tuple[Message, ...]

# The columns of each format, under the names that LLaMA-Factory's registry has for them, and their
# names in a record if the user gives none. Those that begin with "?" need not be there.
COLUMNS: dict[str, dict[str, str]] = {
    "alpaca": {
        "prompt": "instruction",
        "query": "?input",
        "response": "output",
        "system": "?system",
        "history": "?history",
    },
    "sharegpt": {"messages": "conversations", "system": "?system"},
    "messages": {"messages": "messages", "system": "?system"},
    "prompt_completion": {"prompt": "prompt", "response": "completion", "system": "?system"},
}
# The keys and the roles of a message, under LLaMA-Factory's names without their ending `_tag`
MESSAGE_TAGS = {
    "role": "role",
    "content": "content",
    "user": "user",
    "assistant": "assistant",
    "system": "system",
}
TAGS: dict[str, dict[str, str]] = {
    "alpaca": {},
    "sharegpt": {
        "role": "from",
        "content": "value",
        "user": "human",
        "assistant": "gpt",
        "system": "system",
    },
    "messages": MESSAGE_TAGS,
    "prompt_completion": MESSAGE_TAGS,
}

REASONS = {
    "empty_answer": "an answer is empty",
    "empty_prompt": "a prompt is empty",
    "not_text": "a message is not text",
    "roles": "its roles are out of turn",
    "special_token": "a message holds a special token of the tokenizer as text",
    "no_loss": "no answer of it is to be trained on",
    "duplicate": "an earlier example has the same messages",
    "in_validation": "its prompt is in the validation split",
    "too_long": "it is longer than a row",
    "template": "the chat template refuses it",
    "seam": "the tokens of its prompt change where an answer follows",
    "no_end": "the template does not end an answer that is trained on",
}


class LeftOut(Exception):
    """The error for an example that is left out: one of REASONS, and what exactly is wrong."""

    def __init__(self, reason: str, detail: str = ""):
        assert reason in REASONS, reason
        super().__init__(reason, detail)
        self.reason, self.detail = reason, detail


@dataclass(frozen=True)
class Form:
    """The form of a dataset's records: its format, and the names of its columns and tags.

    `columns` maps LLaMA-Factory's names for columns (COLUMNS) to those in the records; a name that
    begins with "?" need not be there. `tags` maps the names in TAGS to those in the records.
    """

    format: FormatName
    columns: Mapping[str, str]
    tags: Mapping[str, str]

    @functools.cached_property
    def roles(self) -> dict[str, str]:
        """Our names for the roles of messages, by those in the records."""
        return {self.tags[name]: name for name in ("user", "assistant", "system")}

    @functools.cached_property
    def role_key(self) -> str:
        """The key of a message's role."""
        return self.tags["role"]

    @functools.cached_property
    def content_key(self) -> str:
        """The key of a message's content."""
        return self.tags["content"]

    @functools.cached_property
    def readings(self) -> list[tuple[str, str]]:
        """Our names for all columns of the format, and those in the records; "" if not read."""
        return [
            (name, self.columns[name].removeprefix("?") if name in self.columns else "")
            for name in COLUMNS[self.format]
        ]

    @property
    def names(self) -> list[str]:
        """The columns to read from a record."""
        return [name.removeprefix("?") for name in self.columns.values()]

    @functools.cached_property
    def required(self) -> list[str]:
        """The columns that every record must have."""
        return [name for name in self.columns.values() if not name.startswith("?")]


def form_of(
    format: FormatName, columns: Mapping[str, str], tags: Mapping[str, str], place: str
) -> Form:
    """Return the form of a format whose columns and tags may have other names.

    Raise ConfigError, which begins with `place`, for a column or a tag that the format lacks.
    """
    for kind, given, known in (
        ("columns", columns, COLUMNS[format]),
        ("tags", tags, TAGS[format]),
    ):
        for name, value in given.items():
            if name not in known:
                offered = f"has the {kind} {', '.join(known)}" if known else f"has no {kind}"
                near = difflib.get_close_matches(name, known, 1)
                hint = f"; did you mean {near[0]}?" if near else ""
                if ":" in name:  # what YAML makes of {prompt:content}
                    hint = "; write a space after each colon, and put all between quotation marks"
                raise ConfigError(f"{place}{kind}.{name}: format={format} {offered}{hint}")
            if not isinstance(value, str) or not value.removeprefix("?"):
                shown = json.dumps(value, default=str)
                rule = "must be the name in the records, a text"
                raise ConfigError(f"{place}{kind}.{name}={shown}: {rule}")
    named = {name: str(value) for name, value in columns.items()}
    # As in LLaMA-Factory, naming some columns leaves out the optional ones that are not named.
    defaults = {
        name: value
        for name, value in COLUMNS[format].items()
        if not named or not value.startswith("?")
    }
    return Form(format, defaults | named, TAGS[format] | dict(tags))


def conversation_of(record: Mapping[str, Any], form: Form) -> Conversation:
    """Return the conversation in a record.

    It has a system prompt or none, and then prompts and answers in turn, of which the last is an
    answer. Raise InvalidRecord if the record lacks a column, LeftOut if it holds no such
    conversation.
    """
    for name in form.required:
        if name not in record:
            listed = ", ".join(list(record)[:20]) or "none"
            raise InvalidRecord(
                f"no column '{name}'; its columns are: {listed} (name them with"
                " columns=..., or leave such records out with on_error=skip)"
            )
    values = {name: record.get(column) if column else None for name, column in form.readings}
    messages = _READ[form.format](values, form)
    system = values["system"]
    if system is not None and not (messages and messages[0].role == "system"):
        messages = [Message("system", _text(system, "the system prompt")), *messages]
    if messages and messages[0].role == "system" and not messages[0].content:
        del messages[0]  # an empty system prompt is none
    _check_turns(messages)
    return tuple(messages)


def _of_alpaca(values: Mapping[str, Any], _: Form) -> list[Message]:
    messages: list[Message] = []
    history = values["history"]
    if history is not None:
        if not isinstance(history, list):
            raise LeftOut("not_text", f"its history is {kind_of(history)}")
        for pair in history:
            if not isinstance(pair, list | tuple) or len(pair) != 2:
                raise LeftOut("roles", "its history must hold pairs of a prompt and an answer")
            messages += _pair(*pair)
    parts = [
        _text(values[name], f"its {name}")
        for name in ("prompt", "query")
        if values[name] is not None
    ]
    return messages + _pair("\n".join(part for part in parts if part), values["response"])


def _of_messages(values: Mapping[str, Any], form: Form) -> list[Message]:
    found = values["messages"]
    if not isinstance(found, list | tuple):
        raise LeftOut("not_text", f"its messages are {kind_of(found)}, not a list")
    return [_message(each, form) for each in found]


def _of_prompt_completion(values: Mapping[str, Any], form: Form) -> list[Message]:
    prompt, completion = values["prompt"], values["response"]
    if isinstance(prompt, list) and isinstance(completion, list):
        return [_message(each, form) for each in (*prompt, *completion)]
    return _pair(prompt, completion)


_READ: dict[str, Callable[[Mapping[str, Any], Form], list[Message]]] = {
    "alpaca": _of_alpaca,
    "sharegpt": _of_messages,
    "messages": _of_messages,
    "prompt_completion": _of_prompt_completion,
}


def _pair(prompt: Any, answer: Any) -> list[Message]:
    return [
        Message("user", _text(prompt, "a prompt")),
        Message("assistant", _text(answer, "an answer")),
    ]


def _message(value: Any, form: Form) -> Message:
    if not isinstance(value, dict):
        raise LeftOut("not_text", f"a message is {kind_of(value)}, not an object")
    role = value.get(form.role_key)
    if not isinstance(role, str) or role not in form.roles:
        raise LeftOut("roles", f"a message has the role {role!r:.60}, not {', '.join(form.roles)}")
    content = _text(value.get(form.content_key), "a message")
    if "loss" not in value:
        return Message(form.roles[role], content)
    loss = value["loss"]
    if loss is not None and not isinstance(loss, bool):
        raise LeftOut("not_text", f"the loss of a message is {kind_of(loss)}, not true or false")
    return Message(form.roles[role], content, loss is not False)


def _text(value: Any, what: str) -> str:
    if not isinstance(value, str):
        raise LeftOut("not_text", f"{what} is {kind_of(value)}, not a string")
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError:
            raise LeftOut("not_text", f"{what} holds half of a surrogate pair") from None
    return value


def _check_turns(messages: Sequence[Message]) -> None:
    """Raise LeftOut unless prompts and answers take turns, and none of them is empty."""
    turns = messages[1:] if messages and messages[0].role == "system" else messages
    if not turns or len(turns) % 2:
        raise LeftOut("roles", f"it has {len(turns)} messages; every prompt must have an answer")
    for number, message in enumerate(turns):
        wanted = "assistant" if number % 2 else "user"
        if message.role != wanted:
            raise LeftOut("roles", f"message {number + 1} is the {message.role}'s")
        if not message.content.strip():
            raise LeftOut("empty_answer" if number % 2 else "empty_prompt")


def hash_of(messages: Sequence[Message]) -> bytes:
    """Return a hash of 16 bytes that depends on the roles and contents of the messages alone."""
    # Lengths make it plain where a content ends, whatever it holds.
    parts = [f"{each.role} {len(each.content)} {each.content}" for each in messages]
    return hashlib.blake2b("".join(parts).encode(), digest_size=16, key=HASH_KEY).digest()


def prompt_of(messages: Sequence[Message]) -> Sequence[Message]:
    """Return the messages up to the first answer: those that two examples must not share."""
    first = next(number for number, each in enumerate(messages) if each.role == "assistant")
    return messages[:first]
