"""The data of tasks, read from files in a folder that people have copied.

Files are read as plain values: nothing in them is run, nothing is fetched, and no cache of another
reader takes part, so what is read is what the files hold now.
"""

from __future__ import annotations

import csv
import os
import re
import stat
from collections.abc import Iterable, Iterator, Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import yaml
from datasets import Dataset, load_dataset

from flame_composer.config.written import require_shallow
from flame_composer.errors import ConfigError, DataError, one_line
from flame_composer.quantities import plural
from flame_composer.storage import files
from flame_composer.text.jsonl import InvalidRecord, kind_of, parse
from flame_composer.text.parquet import open_parquet, read_rows
from flame_composer.use.columns import LAYOUTS, problem_of

KINDS = (".jsonl", ".parquet", ".csv")
MAX_LINE = 16 << 20  # bytes; a line of these datasets has some thousands
# Readers of `datasets` that take files by name: a task that names one brings its own data.
OWN_FILES = ("json", "parquet", "csv", "text", "arrow")


class Split(NamedTuple):
    """A split of a dataset: the dataset's and the configuration's name on the hub, the split's."""

    path: str
    name: str | None
    split: str

    def __str__(self) -> str:
        return "/".join(part for part in self if part)


def splits_of(settings: Any, shots: int) -> list[Split]:
    """Return the splits that a task reads to be scored with `shots` examples before a question.

    `settings` is the harness's TaskConfig. The examples come from where the harness takes them.
    """
    path = settings.dataset_path
    if settings.custom_dataset is not None or path is None or path in OWN_FILES:
        return []
    scored = settings.test_split or settings.validation_split
    names = [scored] if scored else []
    examples = settings.fewshot_config
    if shots > 0 and examples.split is not None:
        names.append(examples.split)
    elif shots > 0 and examples.samples is None:
        names.append(settings.training_split or settings.validation_split or scored)
    return [Split(path, settings.dataset_name, each) for each in names]


class TaskData:
    """The folder that all tasks' data is read from, and what was found in it."""

    def __init__(self, root: str):
        """Take files from the folder `root`."""
        self.root = root
        self.files: dict[Split, list[str]] = {}
        self.also: list[Split] = []  # what is looked for with the next splits

    def find(self, wanted: Iterable[Split]) -> None:
        """Find the files of all these splits, and of those in `also`; `load` then reads some.

        Raise ConfigError if any are missing, which it names all, or if it is not clear which ones
        are meant.
        """
        missing = []
        for split in dict.fromkeys([*wanted, *self.also]):
            self.files[split] = _files_of(self.root, split)
            if not self.files[split]:
                missing.append(split)
        if missing:
            first = missing[0].path
            raise ConfigError(
                f"data_root={self.root}: {plural(len(missing), 'file')} missing, in it:"
                f" {_grouped(missing)} (or {', '.join(KINDS[1:])}); docs/benchmarks_data.md says"
                f" what they hold; copy them, e.g. huggingface-cli download {first} --repo-type"
                f" dataset --local-dir {os.path.join(self.root, first)}"
            )

    def load(self, path: str, name: str | None = None, **options: Any) -> Any:
        """Return the splits of a dataset that `find` was asked for, by their names.

        Every other split is there, too, without rows. This takes `datasets.load_dataset`'s place;
        it reads the files that a task brings by itself, and refuses addresses. Raise DataError if a
        file is damaged, or not as the task needs it.
        """
        if path in OWN_FILES:
            _require_local(path, options)
            return load_dataset(path, name, **options)
        found = {
            split.split: _dataset(paths, LAYOUTS.get(path))
            for split, paths in self.files.items()
            if (split.path, split.name) == (path, name)
        }
        if not found:
            raise ConfigError(
                f"data_root={self.root}: a task reads {path} by itself, not by its settings; leave"
                " out the task, or data_root"
            )
        return _Splits(found)


class _Splits(dict[str, Dataset]):
    """The splits that were read by name; the others have the same columns and no rows."""

    def __missing__(self, split: str) -> Dataset:
        return next(iter(self.values())).select([])


def _require_local(path: str, options: Mapping[str, Any]) -> None:
    """Raise ConfigError if a task's own files are somewhere on a network."""
    waiting: list[Any] = list(options.values())
    while waiting:
        value = waiting.pop()
        if isinstance(value, Mapping):
            waiting += value.values()
        elif isinstance(value, (list, tuple)):
            waiting += value
        elif isinstance(value, str) and "://" in value:
            raise ConfigError(
                f"data_root: a task of task_path reads {value} ({path}), and with data_root no"
                " network is used; copy the file and name the copy"
            )


def _grouped(missing: list[Split]) -> str:
    """Return the places of files in few words: owner/name/{config,config}/{split,split}.jsonl."""
    splits: dict[tuple[str, str | None], list[str]] = {}
    for split in missing:
        splits.setdefault((split.path, split.name), []).append(split.split)
    names: dict[tuple[str, tuple[str, ...]], list[str | None]] = {}
    for (path, name), each in splits.items():
        names.setdefault((path, tuple(each)), []).append(name)
    groups = []
    for (path, each_split), each_name in names.items():
        configs = [name for name in each_name if name is not None]
        parts = [path, *([_braced(configs)] if configs else []), _braced(list(each_split))]
        groups.append("/".join(parts) + KINDS[0])
    return "; ".join(groups)


def _braced(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{{{','.join(names)}}}"


# Finding


def _files_of(root: str, split: Split) -> list[str]:
    """Return the files of a split, none if there are none.

    Raise ConfigError if there are several sets of files, or one that lacks a file, and for names
    that lead out of the folder.
    """
    path, name, which = split
    for part in (*path.split("/"), name or "-", which):
        if part in ("", ".", "..") or "\\" in part or "\0" in part:
            raise ConfigError(
                f"data_root: a task's data is at {split}, which is no name of a dataset; leave out"
                " the task, or data_root"
            )
    folder = os.path.join(root, path)
    config = os.path.join(folder, name) if name else folder
    stems = [os.path.join(config, which)]
    if name in (None, "default"):
        stems += [os.path.join(folder, *each, which) for each in ((), ("data",), ("default",))]
    else:  # as in the archives of C-Eval and CMMLU
        stems += [os.path.join(folder, which, each) for each in (f"{name}_{which}", name)]
    found = [files for stem in dict.fromkeys(stems) for files in _at(stem)]
    if not found:
        found = _as_card_says(folder, name, which)
    if len(found) > 1:
        shown = " and ".join(each[0] for each in found[:3])
        raise ConfigError(
            f"data_root: {split} is there more than once: {shown}; keep the one that is meant"
        )
    return found[0] if found else []


def _at(stem: str) -> list[list[str]]:
    """Return the sets of files that are a split's: whole, in shards, or numbered in a folder."""
    folder, which = os.path.split(stem)
    found = [[stem + kind] for kind in KINDS if is_file(stem + kind)]
    shards: dict[tuple[str, int], list[str]] = {}
    for entry in _entries(folder):
        match = re.fullmatch(rf"{re.escape(which)}-(\d{{5}})-of-(\d{{5}})(\.\w+)", entry)
        if match is not None and match[3] in KINDS and is_file(os.path.join(folder, entry)):
            shards.setdefault((match[3], int(match[2])), []).append(os.path.join(folder, entry))
    for (_, count), each in shards.items():
        if len(each) != count:
            raise ConfigError(
                f"data_root: {stem}: has {len(each)} of its {plural(count, 'file')}; copy the"
                " others, too"
            )
        found.append(each)
    numbered = [entry for entry in _entries(stem) if re.fullmatch(r"\d{4}\.parquet", entry)]
    if numbered:
        parts = [os.path.join(stem, entry) for entry in numbered]
        found.append([part for part in parts if is_file(part)])
    return found


def _entries(folder: str) -> list[str]:
    return sorted(os.listdir(folder)) if os.path.isdir(folder) else []


def is_file(path: str) -> bool:
    """Return whether there is a file; raise ConfigError if there is something else of that name."""
    if not os.path.lexists(path):
        return False
    try:
        if stat.S_ISREG(os.stat(path).st_mode):  # opening a pipe would wait for a writer
            return True
    except OSError as error:
        raise ConfigError(
            f"data_root: {path}: cannot be read: {one_line(error)}; put the file in its place"
        ) from None
    raise ConfigError(f"data_root: {path}: is not a file; put the file in its place")


def _as_card_says(folder: str, name: str | None, which: str) -> list[list[str]]:
    """Return the files that the dataset's README.md names for a split; none if it names none.

    This is how the hub finds the files of a dataset. Patterns may have wildcards in the last part.
    """
    try:
        text = files.read_small(os.path.join(folder, "README.md")).decode()
        head = text.split("---\n")[1] if text.startswith("---\n") else ""
        require_shallow(head)
        content = yaml.safe_load(head)
    # Tags that do not fit their values end in any of the last ones.
    except (OSError, ValueError, yaml.YAMLError, LookupError, TypeError, AttributeError):
        return []
    listed = content.get("configs") if isinstance(content, dict) else None
    patterns: list[Any] = []
    for entry in listed if isinstance(listed, list) else []:
        if isinstance(entry, dict) and entry.get("config_name") == (name or "default"):
            splits = entry.get("data_files")
            for each in splits if isinstance(splits, list) else []:
                if isinstance(each, dict) and each.get("split") == which:
                    path = each.get("path")
                    patterns += path if isinstance(path, list) else [path]
    found = []
    for pattern in patterns:
        if isinstance(pattern, str) and not {"..", "**"} & set(pattern.split("/")):
            below, _, last = pattern.rpartition("/")
            place = os.path.join(folder, below.lstrip("/"))
            found += [
                os.path.join(place, entry)
                for entry in _entries(place)
                if fnmatchcase(entry, last)
                and Path(entry).suffix in KINDS
                and is_file(os.path.join(place, entry))
            ]
    return [found] if found else []


# Reading


def rows_of(path: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the place of each row in a file and its values, by column.

    Raise DataError if the file is damaged or no table.
    """
    kind = Path(path).suffix
    try:
        if kind == ".parquet":
            yield from _of_parquet(path)
        elif kind == ".csv":
            yield from _of_csv(path)
        else:
            yield from _of_jsonl(path)
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {one_line(error)}; copy it again") from None


def _of_jsonl(path: str) -> Iterator[tuple[str, dict[str, Any]]]:
    with Path(path).open("rb") as file:
        number = 0
        while line := file.readline(MAX_LINE + 1):
            number += 1
            place = f"line {number}"
            if len(line) > MAX_LINE:
                raise DataError(
                    f"{path}: {place}: has more than {MAX_LINE >> 20} MiB; write one JSON object"
                    " a line"
                )
            line = line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
            if not line.strip():
                continue
            try:
                row = parse(line)
            except InvalidRecord as error:
                raise DataError(f"{path}: {place}: {error}") from None
            if not isinstance(row, dict):
                raise DataError(
                    f"{path}: {place}: must be a JSON object, not {kind_of(row)}; write one a line"
                )
            yield place, row


def _of_csv(path: str) -> Iterator[tuple[str, dict[str, Any]]]:
    with Path(path).open(encoding="utf-8-sig", newline="") as file:
        reader = csv.reader(file)
        names: list[str] | None = None
        try:
            for values in reader:
                place = f"line {reader.line_num}"
                if names is None:
                    names = values
                    if len(set(names)) != len(names):
                        raise DataError(
                            f"{path}: {place}: names a column twice; give each a name of its own"
                        )
                elif len(values) == len(names):
                    yield place, dict(zip(names, values, strict=True))
                elif values:
                    raise DataError(
                        f"{path}: {place}: has {plural(len(values), 'value')} for"
                        f" {plural(len(names), 'column')}; mend the line"
                    )
        except (csv.Error, UnicodeDecodeError) as error:
            raise DataError(
                f"{path}: line {reader.line_num + 1}: not CSV in UTF-8: {one_line(error)}; copy"
                " the file again"
            ) from None


def _of_parquet(path: str) -> Iterator[tuple[str, dict[str, Any]]]:
    def refuse(error: DataError) -> None:
        raise error

    about = open_parquet(path)
    groups = range(about.metadata.num_row_groups)
    for number, row in read_rows(path, None, groups, about.schema_arrow.names, refuse):
        yield f"row {number}", row


def _dataset(paths: list[str], layout: Any) -> Dataset:
    """Return the rows of a split's files, of a known `layout` only the columns that are read.

    Raise DataError if a file has no rows, or one that does not fit the layout.
    """
    columns: dict[str, list[Any]] = {name: [] for name in layout.columns} if layout else {}
    count = 0
    for path in paths:
        before = count
        for place, row in rows_of(path):
            problem = problem_of(row, layout) if layout else ""
            if problem:
                raise DataError(f"{path}: {place}: {problem}; mend the file or copy it again")
            if not layout:
                for name in row:
                    columns.setdefault(name, [None] * count)
            for name, values in columns.items():
                values.append(row.get(name))
            count += 1
        if count == before:
            raise DataError(f"{path}: has no rows; copy it again")
    arrays = {name: _array(paths[0], name, values) for name, values in columns.items()}
    return Dataset(pa.table(arrays))


def _array(path: str, name: str, values: list[Any]) -> Any:
    try:
        return pa.array(values)
    except (pa.ArrowException, OverflowError, UnicodeError, TypeError) as error:
        raise DataError(
            f"{path}: column '{name}' must hold values of one kind: {one_line(error)}; mend the"
            " file or copy it again"
        ) from None
