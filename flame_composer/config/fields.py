"""The keys of a configuration: the types, defaults and docs of its dataclasses' fields."""

from __future__ import annotations

import ast
import dataclasses
import difflib
import functools
import inspect
import itertools
import textwrap
import typing
from collections.abc import Iterator
from typing import Any, Literal, get_args, get_origin

from omegaconf import MISSING

ANY_NAME = "NAME"  # in help, stands for a section's name that the user chooses
SECTIONS = "sections under names of your own"


@functools.cache
def hints_of(cls: type) -> dict[str, Any]:
    """Return the type of every field of a dataclass by the field's name."""
    hints = typing.get_type_hints(cls)
    return {field.name: hints[field.name] for field in dataclasses.fields(cls)}


def hint_of(cls: type, key: str) -> Any:
    """Return the type of the field with this full key, or None if there is no such field."""
    hint: Any = None
    names = iter(key.split("."))
    for name in names:
        hint = hints_of(cls).get(name)
        below, each = dataclass_of(hint), named_sections(hint)
        if each is not None and next(names, None) is not None:
            below = hint = each
        if below is None:
            return hint if next(names, None) is None else None
        cls = below
    return hint


def fields_of(cls: type, prefix: str = "") -> Iterator[tuple[str, str, str | None, str]]:
    """Yield the full key, type, default and doc of every field, sections' fields included.

    The default is None for a section, and "(must be set)" for a key without one.
    """
    hints, docs = hints_of(cls), docs_of(cls)
    for f in dataclasses.fields(cls):
        section, each = dataclass_of(hints[f.name]), named_sections(hints[f.name])
        annotation = str(f.type).replace("Literal[", "one of [") if section is None else "section"
        annotation = annotation if each is None else SECTIONS
        if f.default is dataclasses.MISSING:
            assert f.default_factory is not dataclasses.MISSING
            default = None if section else show(f.default_factory())
        else:
            default = "(must be set)" if f.default == MISSING else show(f.default)
        yield f"{prefix}{f.name}", annotation, default, docs.get(f.name, "")
        if section is not None:
            yield from fields_of(section, f"{prefix}{f.name}.")
        if each is not None:
            yield from fields_of(each, f"{prefix}{f.name}.{ANY_NAME}.")


def annotation_of(cls: type, key: str) -> str:
    """Return the type of a field as `--help` shows it, or '' if there is no such field."""

    def is_it(field: str) -> bool:
        parts, ours = field.split("."), key.split(".")
        return len(parts) == len(ours) and all(
            part in (our, ANY_NAME) for part, our in zip(parts, ours, strict=True)
        )

    return next((annotation for name, annotation, _, _ in fields_of(cls) if is_it(name)), "")


@functools.cache
def docs_of(cls: type) -> dict[str, str]:
    """Return the doc of each field of the class and its bases, as one line.

    The doc is the string literal under the field.
    """
    docs: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        if not dataclasses.is_dataclass(base):
            continue
        body = typing.cast(
            ast.ClassDef, ast.parse(textwrap.dedent(inspect.getsource(base))).body[0]
        ).body
        for node, following in itertools.pairwise(body):
            if isinstance(node, ast.AnnAssign) and isinstance(following, ast.Expr):
                text: str = ast.literal_eval(following.value)
                docs[ast.unparse(node.target)] = " ".join(text.split())
    return docs


def choices_of(cls: type, key: str) -> list[str]:
    """Return the values that the field with this full key may have, or [] if it is not a choice."""
    hint = hint_of(cls, key)
    literals = (each for each in (hint, *get_args(hint)) if get_origin(each) is Literal)
    return [str(choice) for each in literals for choice in get_args(each)]


def doc_of(cls: type, key: str) -> str:
    return next((doc.rstrip(".") for name, _, _, doc in fields_of(cls) if name == key), "")


def dataclass_of(annotation: Any) -> type | None:
    """Return the dataclass in `X` or `X | None`, or None if there is none."""
    if get_origin(annotation) is dict:
        return None
    for candidate in (annotation, *get_args(annotation)):
        if dataclasses.is_dataclass(candidate):
            return typing.cast(type, candidate)
    return None


def named_sections(annotation: Any) -> type | None:
    """Return the dataclass X of `dict[str, X]`, or None if the type is another.

    Such a dict holds sections under names that the user chooses.
    """
    return dataclass_of(get_args(annotation)[1]) if get_origin(annotation) is dict else None


def sections_of(config: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the key prefix and the value of every section, innermost first.

    In this order the rules of each section are checked before rules across sections.
    """
    for f in dataclasses.fields(config):
        value = getattr(config, f.name)
        if dataclasses.is_dataclass(value):
            yield from sections_of(value, f"{prefix}{f.name}.")
        for name, each in value.items() if isinstance(value, dict) else ():
            if dataclasses.is_dataclass(each):
                yield from sections_of(each, f"{prefix}{f.name}.{name}.")
    yield prefix, config


def show(value: Any) -> str:
    if isinstance(value, dict) and any(map(dataclasses.is_dataclass, value.values())):
        return ", ".join(value)
    return (
        "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
    )


def nearest(name: str, allowed: list[str]) -> str:
    """Return '; did you mean X?' for the name most like `name`, or '' if none is like it.

    Of keys, one of the same name in any section comes first, then a similar one in the same
    section, then a similar one anywhere.
    """
    section, _, last = name.lower().rstrip(".").rpartition(".")
    wholes = {key.lower(): key for key in reversed(allowed)}
    leaves = {key.rpartition(".")[2]: known for key, known in wholes.items()}
    beside = {
        key.rpartition(".")[2]: known
        for key, known in wholes.items()
        if key.rpartition(".")[0] == section
    }
    if last in leaves:
        return f"; did you mean {leaves[last]}?"
    # Last parts are compared, as full keys in one section are alike already.
    for names, likeness in ((beside, 0.6), (leaves, 0.7)):
        if close := difflib.get_close_matches(last, list(names), n=1, cutoff=likeness):
            return f"; did you mean {names[close[0]]}?"
    return ""
