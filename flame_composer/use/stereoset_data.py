"""The examples of StereoSet, from the authors' file or the hub's."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from flame_composer.errors import ConfigError, DataError, one_line
from flame_composer.text.jsonl import InvalidRecord, kind_of, parse
from flame_composer.use.task_data import Split, TaskData, is_file, rows_of

DATASET = "McGill-NLP/stereoset"
SPLIT = "validation"
KINDS = ("intrasentence", "intersentence")
DOMAINS = ("gender", "profession", "race", "religion")
# The order in which an example has its sentences; the hub's files number the labels otherwise.
LABELS = ("stereotype", "anti-stereotype", "unrelated")
NUMBERED = ("anti-stereotype", "stereotype", "unrelated")
# Where the authors' file may be, in data_root.
RELEASED = (f"{DATASET}/dev.json", "stereoset/dev.json")
MOST_BYTES = 256 << 20


class Example(NamedTuple):
    """Three sentences about a target term: a stereotype, its opposite, and an unrelated one."""

    kind: str
    domain: str
    target: str
    context: str
    sentences: tuple[str, str, str]


class _Bad(Exception):
    """What is wrong with an example."""


def read_examples(data: TaskData | None, limit: int | None) -> list[Example]:
    """Return the examples of both kinds, the first `limit` of each (None: all).

    They are read from `data`, or from the hub without it. Raise ConfigError if they are not there,
    DataError if a file is damaged.
    """
    if data is None:
        return _from_hub(limit)
    released = _released_in(data.root)
    if released is not None:
        return _from_released(released, limit)
    splits = wanted_of(data)
    if not data.files.keys() >= set(splits):
        try:
            data.find(splits)
        except ConfigError as error:
            place = os.path.join(data.root, RELEASED[-1])
            raise ConfigError(f"{error}; or put the authors' dev.json at {place}") from None
    examples = []
    for kind, split in zip(KINDS, splits, strict=True):
        of_kind: list[Example] = []
        for path in data.files[split]:
            for place, row in rows_of(path):
                of_kind.append(_example(row, kind, f"{path}: {place}"))
        if not of_kind:
            raise DataError(f"{data.files[split][0]}: has no rows; copy it again")
        examples += of_kind[:limit]
    return examples


def wanted_of(data: TaskData) -> list[Split]:
    """Return the splits that are read from `data`: none if it has the authors' file."""
    if _released_in(data.root) is not None:
        return []
    return [Split(DATASET, kind, SPLIT) for kind in KINDS]


def _released_in(root: str) -> str | None:
    """Return the path of the authors' file, or None if it is not there."""
    places = (os.path.join(root, place) for place in RELEASED)
    return next((place for place in places if is_file(place)), None)


def _from_hub(limit: int | None) -> list[Example]:
    """Return the examples from the hub, by `datasets`."""
    from datasets import load_dataset

    examples = []
    for kind in KINDS:
        try:
            rows = list(load_dataset(DATASET, kind, split=SPLIT))
        except Exception as error:  # the hub and the network may raise anything
            raise ConfigError(
                f"tasks: stereoset: cannot be loaded: {one_line(error)}; set data_root to a folder"
                " that has it"
            ) from None
        for number, row in enumerate(rows[:limit], start=1):
            examples.append(_example(row, kind, f"{DATASET}: {kind}: row {number}"))
    return examples


def _from_released(path: str, limit: int | None) -> list[Example]:
    """Return the examples of the authors' dev.json."""
    try:
        with Path(path).open("rb") as file:
            content = file.read(MOST_BYTES + 1)
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {one_line(error)}; copy it again") from None
    if len(content) > MOST_BYTES:
        raise DataError(f"{path}: has more than {MOST_BYTES >> 20} MiB; copy the authors' file")
    try:
        whole = parse(content.removeprefix(b"\xef\xbb\xbf"))
    except InvalidRecord as error:
        raise DataError(f"{path}: {error}; copy the authors' file again") from None
    data = whole.get("data") if isinstance(whole, dict) else None
    examples = []
    for kind in KINDS:
        listed = data.get(kind) if isinstance(data, dict) else None
        if not isinstance(listed, list) or not listed:
            raise DataError(
                f"{path}: must hold a list of examples at data.{kind}, not"
                f" {'an empty one' if listed == [] else kind_of(listed)}; copy the authors' file"
                " again"
            )
        for number, row in enumerate(listed[:limit], start=1):
            examples.append(_example(row, kind, f"{path}: data.{kind}: example {number}"))
    return examples


def _example(row: Any, kind: str, place: str) -> Example:
    """Return an example, or raise DataError, which names `place`."""
    try:
        if not isinstance(row, Mapping):
            raise _Bad(f"must be an object, not {kind_of(row)}")
        target, domain, context = (_text(row, name) for name in ("target", "bias_type", "context"))
        if domain not in DOMAINS:
            raise _Bad(f"bias_type must be one of {', '.join(DOMAINS)}, not {domain!r:.40}")
        found = {label: sentence for sentence, label in _labelled(row.get("sentences"))}
        if set(found) != set(LABELS):
            raise _Bad(f"must have a sentence for each gold_label: {', '.join(LABELS)}")
    except _Bad as error:
        raise DataError(f"{place}: {error}; mend the file or copy it again") from None
    first, second, third = (found[label] for label in LABELS)
    return Example(kind, domain, target, context, (first, second, third))


def _text(row: Mapping[str, Any], name: str) -> str:
    value = row.get(name)
    if not isinstance(value, str) or not value.strip():
        raise _Bad(f"{name} must be a text that is not empty, not {kind_of(value)}")
    return value


def _labelled(sentences: Any) -> list[tuple[str, str]]:
    """Return sentences with their labels, of a list of objects or an object of lists."""
    if isinstance(sentences, Mapping):
        texts, labels = sentences.get("sentence"), sentences.get("gold_label")
        if not isinstance(texts, list) or not isinstance(labels, list):
            raise _Bad("sentences must have lists `sentence` and `gold_label`")
        sentences = [
            {"sentence": text, "gold_label": label}
            for text, label in zip(texts, labels, strict=False)
        ]
    if not isinstance(sentences, list) or len(sentences) != 3:
        raise _Bad("sentences must be three")
    pairs = []
    for each in sentences:
        if not isinstance(each, Mapping):
            raise _Bad(f"a sentence must be an object, not {kind_of(each)}")
        label = each.get("gold_label")
        if isinstance(label, int) and not isinstance(label, bool) and 0 <= label < len(NUMBERED):
            label = NUMBERED[label]
        pairs.append((_text(each, "sentence"), label if isinstance(label, str) else ""))
    return pairs
