"""Extraction of the text from a line of JSON, with the reason where there is none."""

from __future__ import annotations

import json
import re
from typing import Any

# A string, a bracket, or whatever stands between them. The quantifiers are possessive, so that
# matching a long string takes no memory.
TOKEN = re.compile(r'"(?:[^"\\]++|\\.)*+"|[\[\]{}]|[^"\[\]{}]++|"', re.DOTALL)


class InvalidRecord(Exception):
    """The error for a JSONL record without a text; its message says why there is none."""


def text_of(line: bytes | bytearray, text_column: str) -> str:
    """Return the string in `text_column` of the JSON object in `line`.

    Raises InvalidRecord if there is no such object or string.
    """
    record = parse(line)
    if not isinstance(record, dict):
        raise InvalidRecord(
            f"must be a JSON object, not {kind_of(record)}; mend or remove the line"
        )
    if text_column not in record:
        raise InvalidRecord(f"no column '{text_column}'; {columns(list(record))}")
    text = record[text_column]
    if not isinstance(text, str):
        raise InvalidRecord(
            f"column '{text_column}' must be a string, not {kind_of(text)}; mend or remove the line"
        )
    # Only a \u escape can yield half of a surrogate pair, which no encoding can represent.
    if b"\\u" in line and not _encodable(text):
        raise InvalidRecord(
            f"column '{text_column}' holds half of a surrogate pair; mend or remove the line"
        )
    return text


def parse(line: bytes | bytearray) -> Any:
    """Return the JSON value in `line`. Raises InvalidRecord if it holds none.

    Numbers may have any number of digits and values may be nested to any depth, although Python's
    parser refuses both. Such values come back as placeholders that keep only their kind: a float
    for a number, an empty list or object for what is nested.
    """
    try:
        decoded = line.decode().rstrip("\r\n")
    except UnicodeDecodeError as error:
        raise InvalidRecord(
            f"not valid UTF-8 at byte {error.start} of the line; mend or remove the line"
        ) from None
    try:
        return _parse_json(decoded)
    except json.JSONDecodeError as error:
        if error.doc != decoded:
            raise InvalidRecord(
                f"not valid JSON: {error.msg}, nested deep; mend or remove the line"
            ) from None
        raise InvalidRecord(
            f"not valid JSON: {error.msg} at column {error.colno}; mend or remove the line"
        ) from None


def _parse_json(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        raise
    # A number has too many digits for `int`, or the value is nested too deeply.
    except (ValueError, RecursionError):
        pass
    try:
        return json.loads(text, parse_int=float)
    except RecursionError:
        return _parse_nested(text)


def _parse_nested(text: str) -> Any:
    """Return the value in `text` with the lists and objects inside it emptied.

    Each of them is checked by itself, from the innermost outwards.
    """
    levels: list[list[str]] = [[]]
    for match in TOKEN.finditer(text):
        token = match[0]
        if token in ("[", "{"):
            levels.append([token])
            continue
        levels[-1].append(token)
        if token in ("]", "}") and len(levels) > 2:
            json.loads("".join(levels.pop()), parse_int=float)
            levels[-1].append("[]" if token == "]" else "{}")
    if len(levels) > 2:
        raise json.JSONDecodeError("brackets are not closed", "", 0)
    return json.loads("".join(token for level in levels for token in level), parse_int=float)


def _encodable(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def kind_of(value: Any) -> str:
    """Return the name that JSON has for a value's type, with its article, such as "a number"."""
    names: dict[type, str] = {
        type(None): "null",
        bool: "a boolean",
        int: "a number",
        float: "a number",
        str: "a string",
        list: "a list",
        dict: "an object",
    }
    return names.get(type(value), type(value).__name__)


def columns(names: list[str]) -> str:
    """Return words for an error about a missing column that say which columns there are."""
    listed = ", ".join(names[:20]) + (", ..." if len(names) > 20 else "")
    return (
        f"its columns are: {listed} (name one with text_column=...)"
        if names
        else "it has no columns"
    )
