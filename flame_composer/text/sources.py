"""The files of a corpus in their order, and the slices in which they are read."""

from __future__ import annotations

import dataclasses
import functools
import glob
import logging
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from flame_composer.errors import ConfigError
from flame_composer.storage import files
from flame_composer.storage.filesystems import is_url
from flame_composer.storage.many import each
from flame_composer.text import hub
from flame_composer.text.formats import COMPRESSIONS, FOUND, Format, detect
from flame_composer.text.parquet import open_parquet
from flame_composer.text.unpacking import Compression, stat_of

log = logging.getLogger(__name__)
T = TypeVar("T")

# Marker files that Hadoop and Spark leave beside the parts of a table, and their folder for parts
# that were never committed.
MARKS = re.compile(r"_SUCCESS|_(committed|started)_\d+|_(common_)?metadata|.*\.crc")
UNCOMMITTED = "_temporary"


@dataclass(frozen=True, slots=True)  # a large corpus has a million
class Slice:
    """A part of one input file.

    `start` and `end` are byte offsets in JSONL and in arrays of tokens (a record belongs to the
    slice it starts in), row groups in Parquet, documents in Megatron's files, bytes of the unpacked
    .csv.gz where that has the borders of an array's documents, and shards in a dataset. Plain text,
    JSON arrays and compressed files are one slice, from 0 to the file's size. `num_bytes` is the
    slice's share of the file's size. `version` identifies the content of a file in an object store,
    such as its ETag, and `beside` that of the file beside it which says where documents are.
    """

    path: str
    format: Format
    start: int
    end: int
    num_bytes: int
    version: str | None = None
    compression: Compression | None = None
    beside: str | None = None


SLICE_FIELDS = tuple(field.name for field in dataclasses.fields(Slice))


def slice_json(part: Slice) -> dict[str, Any]:
    """Return a slice as JSON values; `beside` is there only if there is such a file."""
    content = {name: getattr(part, name) for name in SLICE_FIELDS}
    if part.beside is None:
        del content["beside"]
    return content


Unit = tuple[Slice, ...]


def find_files(
    sources: Sequence[str], suffixes: Sequence[str] = (), *, found_by: Sequence[str] = FOUND
) -> list[str]:
    """Return the files that `sources` name, each once.

    A source is a file, a folder or a glob, as a path or a URL. Files come in the order of the
    sources, and sorted by path within each source.

    - A file is taken whatever its name.
    - A folder is searched recursively for files that end in one of `suffixes`, or of `found_by`,
      the known ones, if there are none. Names that begin with a dot are left out.
    - A glob takes every file it matches, whatever its suffix.

    Folders and globs leave out the marker files of Hadoop and Spark (`_SUCCESS`, `.crc`), and their
    uncommitted parts.

    Raises ConfigError if a source is missing or has nothing to read.
    """
    wanted = tuple(suffixes or found_by)
    plain = [each for each in found_by if not each.endswith(tuple(COMPRESSIONS))]
    named = ", ".join(suffixes or plain) + (
        ""
        if suffixes or plain == list(found_by)
        else f" (or compressed, {', '.join(COMPRESSIONS)})"
    )
    paths: dict[str, None] = {}
    for source in sources:
        is_folder = os.path.isdir(source)
        if is_url(source):
            found, is_folder = _find_remote(source, wanted)
        elif is_folder:
            found = _walk(source, wanted)
        elif os.path.exists(source):
            found = [source]
        elif glob.has_magic(source):
            found = [path for path in glob.glob(source, recursive=True) if os.path.isfile(path)]
            found = [path for path in found if _is_input(path, source)]
        else:
            found = []
        if not found and is_folder:
            raise ConfigError(
                f"source: {source}: this folder holds no file ending in {named}; name the endings"
                f" to take with suffixes=[{'...' if suffixes else _endings(source)}]"
            )
        if not found and glob.has_magic(source):
            raise ConfigError(f"source: {source}: no file matches this pattern")
        if not found:
            may_be_id = re.fullmatch(r"[\w-]+/[\w.-]+", source)
            hint = "; for a Hugging Face dataset give split=train as well" if may_be_id else ""
            raise ConfigError(f"source: {source}: no such file or folder{hint}")
        paths.update(
            dict.fromkeys(sorted(found if is_url(source) else map(os.path.normpath, found)))
        )
    return list(paths)


def _find_remote(source: str, suffixes: tuple[str, ...]) -> tuple[list[str], bool]:
    """Return the files that a URL names, and whether it is a folder."""
    if files.stat(source) is not None:
        return [source], False
    if glob.has_magic(source):
        found = files.glob(source)  # here `*` matches a leading dot too
        return [
            path
            for path in found
            if ("/." in source or "/." not in path) and _is_input(path, source)
        ], False
    names = list(files.find(source))
    taken = [
        name for name in names if name.endswith(suffixes) and _is_visible(name) and _is_input(name)
    ]
    return [files.join(source, name) for name in taken], bool(names)


def _walk(folder: str, suffixes: tuple[str, ...]) -> list[str]:
    paths: list[str] = []
    for parent, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".") and name != UNCOMMITTED]
        taken = (
            name
            for name in names
            if name.endswith(suffixes) and _is_visible(name) and _is_input(name)
        )
        paths += [os.path.join(parent, name) for name in taken]
    return paths


def _is_visible(path: str) -> bool:
    return not any(part.startswith(".") for part in path.split("/"))


def _is_input(path: str, pattern: str = "") -> bool:
    *folders, name = path.split("/")
    return (UNCOMMITTED not in folders or UNCOMMITTED in pattern) and not MARKS.fullmatch(name)


def _endings(source: str) -> str:
    """Return the most frequent suffixes of a folder's files, as an example for an error."""
    names = filter(_is_visible, files.find(source)) if is_url(source) else _walk(source, ("",))
    endings = Counter(suffix for name in names if (suffix := Path(name).suffix))
    return ",".join(ending for ending, _ in endings.most_common(3)) or "..."


def slice_file(path: str, max_bytes: int) -> list[Slice]:
    """Return the file in slices of about `max_bytes` each.

    JSONL is cut into byte ranges and Parquet into row groups. A dataset (`hub.address`) is cut into
    its shards, whose sizes are not known and taken to be `max_bytes`. Any other file is one slice.
    """
    return _slices(path, max_bytes)[0]


def _slices(path: str, max_bytes: int, arrays: bool = False) -> tuple[list[Slice], str]:
    """Return the slices of a file, and the doubt about its format ("" if there is none)."""
    if hub.is_dataset(path):
        num_shards = hub.open_source(path).num_shards
        return [
            Slice(path, "dataset", shard, shard + 1, max_bytes) for shard in range(num_shards)
        ], ""
    stat = stat_of(path)
    size, version = stat.size, stat.version
    kind, compression, doubt = detect(path, size, arrays=arrays)
    if kind == "jsonl" and compression is None:
        starts = range(0, size, max_bytes)
        sizes = [min(max_bytes, size - start) for start in starts]
        return [
            Slice(path, kind, start, start + n, n, version)
            for start, n in zip(starts, sizes, strict=True)
        ], doubt
    if kind == "parquet":
        metadata = open_parquet(path, version).metadata
        parts: list[Slice] = []
        start = num_bytes = 0
        for group in range(metadata.num_row_groups):
            num_bytes += metadata.row_group(group).total_byte_size
            if num_bytes >= max_bytes or group + 1 == metadata.num_row_groups:
                parts.append(Slice(path, kind, start, group + 1, num_bytes, version))
                start, num_bytes = group + 1, 0
        return parts, doubt
    return [Slice(path, kind, 0, size, size, version, compression)], doubt


def of_each(paths: Sequence[str], look_at: Callable[[str], T]) -> Iterable[T]:
    """Return what `look_at` returns for each file in order; for many at a time in a store."""
    return each(look_at, paths) if any(map(is_url, paths)) else map(look_at, paths)


def slice_files(paths: Sequence[str], max_bytes: int, *, arrays: bool = False) -> list[Slice]:
    """Return the slices of all files in order, and warn where a file's name and bytes disagree.

    With `arrays`, a file may hold one JSON array of records. Files in an object store are looked at
    many at a time.
    """
    slices = functools.partial(_slices, max_bytes=max_bytes, arrays=arrays)
    found: list[Slice] = []
    doubts: dict[str, list[str]] = {}
    for path, (parts, doubt) in zip(paths, of_each(paths, slices), strict=True):
        found += parts
        if doubt:
            doubts.setdefault(doubt, []).append(path)
    for doubt, (first, *others) in doubts.items():
        more = f" (and {len(others)} more like it)" if others else ""
        log.warning("warning: %s%s: %s", first, more, doubt)
    return found
