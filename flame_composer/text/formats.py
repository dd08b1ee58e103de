"""The format and compression of an input file, told from its name and its first bytes."""

from __future__ import annotations

import json
import os
import re
from typing import Literal, NamedTuple

from flame_composer.errors import ConfigError, DataError
from flame_composer.storage import files
from flame_composer.text.jsonl import InvalidRecord, parse
from flame_composer.text.unpacking import Compression, open_input, reading

Format = Literal["jsonl", "json", "parquet", "text", "dataset", "tokens", "bordered", "megatron"]

FORMATS: dict[str, Format] = {
    ".jsonl": "jsonl",
    ".json-lines": "jsonl",
    ".ndjson": "jsonl",
    ".parquet": "parquet",
    ".txt": "text",
}
COMPRESSIONS: dict[str, Compression] = {
    ".gz": "gzip",
    ".gzip": "gzip",
    ".zst": "zstd",
    ".zstd": "zstd",
    ".bz2": "bz2",
    ".xz": "xz",
}
# The endings that folders are searched for. A plain .json file may be anything; a compressed one
# holds JSON lines, as in C4.
FOUND = (*FORMATS, *(f"{inner}{outer}" for inner in (*FORMATS, ".json") for outer in COMPRESSIONS))
ARCHIVES = (".zip", ".tar", ".tgz", ".7z")
START = 65536  # bytes of a file that are looked at
UTF8_BOM = b"\xef\xbb\xbf"
LFS_POINTER = b"version https://git-lfs.github.com/spec/"
# No text begins like this: even where the first bytes are letters (bzip2, Parquet), the bytes after
# them are not found in text.
PACKED: dict[Compression, re.Pattern[bytes]] = {
    "gzip": re.compile(rb"\x1f\x8b\x08"),
    "zstd": re.compile(rb"\x28\xb5\x2f\xfd|[\x50-\x5f]\x2a\x4d\x18"),
    "bz2": re.compile(rb"BZh[1-9](1AY&SY|\x17\x72\x45\x38\x50\x90)"),
    "xz": re.compile(rb"\xfd7zXZ\0"),
}
PARQUET = re.compile(rb"PAR[1E]\x15")
TAR = re.compile(rb"(?s).{257}ustar[\0 ]")
# Other kinds of file, which are not read but named in errors.
OTHERS = {
    "an ORC file": rb"ORC[\0-\x1f\x80-\xff]",
    "an Avro file": rb"Obj\x01",
    "an Arrow file": rb"ARROW1\0",
    "a Hadoop sequence file": rb"SEQ[\x04-\x06]",
    "a zip archive": rb"PK\x03\x04",
    "a 7z archive": rb"7z\xbc\xaf",
    "packed with LZ4": rb"\x04\x22\x4d\x18",
    "packed with Snappy": rb"\xff\x06\0\0sNaPpY",
    "UTF-16": rb"\xff\xfe|\xfe\xff",
}
# Endings that say nothing about the format: none at all, numbers, and those of the parts that Spark
# writes (part-00000-....c000).
NUMBERED = re.compile(r"\.?c?[0-9_-]*")


class Kind(NamedTuple):
    """The format and compression that a file is read with.

    `doubt` says how the file's name and its first bytes disagree; "" if they agree.
    """

    format: Format
    compression: Compression | None
    doubt: str = ""


class Name(NamedTuple):
    """The format and compression that a file's name indicates.

    The format "json" is any form of JSON, "other" is plain text unless the bytes say otherwise,
    and None means that the name says nothing.
    """

    format: Literal["jsonl", "parquet", "text", "json", "other"] | None
    compression: Compression | None


def _endings(path: str) -> tuple[str, str]:
    stem, suffix = os.path.splitext(path.lower())
    return suffix, os.path.splitext(stem)[1]


def by_name(path: str) -> Name:
    """Return what a file's name says about its format and compression.

    Raises ConfigError for archives and compressed Parquet files, which cannot be read.
    """
    suffix, inner = _endings(path)
    if suffix in ARCHIVES or (suffix in COMPRESSIONS and inner in (".tar", ".parquet")):
        raise _unreadable_archive(path)
    compression = COMPRESSIONS.get(suffix)
    ending = inner if compression else suffix
    if ending in FORMATS:
        return Name(FORMATS[ending], compression)  # type: ignore[arg-type]  # never "dataset"
    if ending == ".json":
        return Name("json", compression)
    return Name(None if NUMBERED.fullmatch(ending) else "other", compression)


def format_by_suffix(path: str) -> Format:
    """Return the format that a file's suffix alone names, as earlier versions chose it."""
    suffix, inner = _endings(path)
    if suffix not in (".gz", ".zst", ".bz2", ".xz"):
        return FORMATS.get(suffix, "text")
    return "jsonl" if inner == ".json" else FORMATS.get(inner, "text")


def detect(path: str, size: int, *, arrays: bool = False) -> Kind:
    """Return the format and compression of a file, from its name and its first bytes.

    With `arrays`, only records are looked for: a file may also hold one JSON array of them (format
    "json"), and JSON lines are recognized whatever the file's ending, unless it is .txt.

    Unmistakable bytes (compression, Parquet) are believed whatever the name says. Between JSON
    lines and plain text the name decides if it says anything, and the bytes only if it does not.

    Raises ConfigError for a file that cannot be read as it is, and DataError for one that is
    certainly not the file it should be (an empty compressed file, a git-lfs pointer).
    """
    name = by_name(path)
    start = reading(path, lambda path: files.read_start(path, START)) if size else b""
    _refuse_stand_in(path, start, name)
    compression = next(
        (packing for packing, pattern in PACKED.items() if pattern.match(start)), None
    )
    doubt = ""
    is_told_by_bytes = bool(compression or PARQUET.match(start)) or _shape(start) == "lines"
    if compression != name.compression and is_told_by_bytes:
        if name.compression or name.format in ("jsonl", "json", "parquet", "text"):
            doubt = (
                f"{_said(name)}, but is {compression or 'not packed'} by its first bytes, and is"
                " read so"
            )
    else:
        compression = name.compression
    if compression is not None and name.format != "jsonl":
        with open_input(path, compression, block_size=START) as file:
            start = file.read(START)
        if PARQUET.match(start) or TAR.match(start):
            raise _unreadable_archive(path)
    form, more = _format(path, name, start, arrays)
    return Kind(form, compression, "; ".join(filter(None, (doubt, more))))


def _format(path: str, name: Name, start: bytes, arrays: bool) -> tuple[Format, str]:
    """Return the format of a file, and how its name disagrees ("" if it does not).

    `start` holds the file's first bytes, decompressed.
    """
    if PARQUET.match(start):
        agrees = name.format in ("parquet", "other", None)
        return (
            "parquet",
            "" if agrees else f"{_said(name)}, but is Parquet by its first bytes, and is read so",
        )
    shape = _shape(start)
    if arrays and shape in ("array", "lines") and name.format in ("json", "other", None):
        return ("json" if shape == "array" else "jsonl"), ""
    if name.format == "parquet":
        if shape != "lines":
            return "parquet", ""
        return "jsonl", f"{_said(name)}, but holds JSON lines, and is read so"
    if name.format == "jsonl":
        return "jsonl", ""
    if name.format == "json":
        if shape in ("array", "object"):
            as_text = "" if arrays else ", or name it .txt to read it as plain text, as it is"
            raise ConfigError(f"source: {path}: {_HINTS[shape]}{as_text}")
        return "jsonl", ""
    if name.format is None:
        if shape in ("array", "object"):
            return "text", f"{_HINTS[shape]}; it is read as plain text, one document"
        return ("jsonl" if shape == "lines" else "text"), ""
    if shape == "lines" and _is_certain(start):
        return (
            "text",
            (
                "holds JSON lines, but is read as plain text, one document, by its name; to change"
                " that, name it .jsonl"
            ),
        )
    return "text", ""


_HINTS = {
    "array": (
        "holds one JSON array, but must hold one JSON object per line; convert it with: jq -c '.[]'"
        " FILE > FILE.jsonl"
    ),
    "object": (
        "holds one JSON object over several lines, but must hold one per line; convert it with: jq"
        " -c . FILE > FILE.jsonl"
    ),
}


def _shape(start: bytes) -> Literal["lines", "array", "object"] | None:
    """Return which form of JSON a file begins with, or None if it does not begin with JSON."""
    text = start.removeprefix(UTF8_BOM).lstrip()
    if re.match(rb"\[\s*[\[{\"\]]", text):
        return "array"
    first, newline, rest = text.partition(b"\n")
    if not text.startswith(b"{"):
        return "lines" if _is_certain(rest) else None  # lines, of which the first is damaged
    if _is_object(first):
        return "lines"
    second = rest.lstrip().partition(b"\n")[0]
    if newline and _is_cut_short(first) and not _is_object(second):
        return "object"
    return "lines" if re.match(rb'\{\s*"(?:[^"\\]|\\.)*"\s*:', first) else None


def _is_object(line: bytes) -> bool:
    try:
        return isinstance(parse(line), dict)
    except InvalidRecord:
        return False


def _is_cut_short(line: bytes) -> bool:
    try:
        json.loads(line)
    except json.JSONDecodeError as error:
        return error.pos >= len(line.decode().rstrip())
    except (ValueError, RecursionError):
        pass
    return False


def _is_certain(start: bytes) -> bool:
    """Return whether a file begins with two complete lines that are both JSON objects."""
    lines = start.removeprefix(UTF8_BOM).lstrip().splitlines()[:2]
    return len(lines) == 2 and all(map(_is_object, lines))


def _said(name: Name) -> str:
    forms = {"jsonl": "JSON lines", "json": "JSON", "parquet": "Parquet", "text": "plain text"}
    return f"is {name.compression or forms[name.format or 'text']} by its name"


def _refuse_stand_in(path: str, start: bytes, name: Name) -> None:
    if not start and name.compression is not None:
        raise DataError(
            f"{path}: damaged: it is empty, which no compressed file is; fetch the file again"
        )
    if start.startswith(LFS_POINTER):
        remedy = "(git lfs pull gets the file); fetch the file again"
        raise DataError(f"{path}: damaged: it is a pointer that git-lfs left {remedy}")


def _unreadable_archive(path: str) -> ConfigError:
    return ConfigError(
        f"source: {path}: archives and packed Parquet files cannot be read; unpack it first"
    )


def other_kind(start: bytes) -> str:
    """Return words for an error that say what a file seems to be, or "" if that is not known.

    `start` holds the first bytes of a file that is not text.
    """
    patterns = OTHERS | {"a tar archive": TAR.pattern}
    known = next(
        (kind for kind, pattern in patterns.items() if re.match(pattern, start, re.DOTALL)), None
    )
    return f" (it begins as {known} does)" if known else ""
