"""Cleaned documents on disk: a folder of JSONL parts, one for each task, published as a whole.

    out/manifest.json           what was done, where every document went, the parts; published last
    out/documents/00000.jsonl.zst ...
    out/.work/                  while a cleaning is unfinished: its plan, its parts so far, its logs

The bytes of every file depend on the settings and the source alone: not on when it was made, by how
many workers, or how often that was interrupted.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import os
import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, cast

from flame_composer.errors import ConfigError, DataError
from flame_composer.storage import files
from flame_composer.storage.files import dump_json
from flame_composer.storage.folders import require_folder_inside, require_safe
from flame_composer.storage.local import create
from flame_composer.text.documents import MAX_DOCUMENT_BYTES
from flame_composer.text.formats import format_by_suffix
from flame_composer.text.sources import Unit

FORMAT = "flame_composer cleaned documents"
VERSION = 1
WORK = ".work"  # with a dot, so that whoever reads the folder ignores it
LOCK = ".lock"  # held by the process that is at work
DOCUMENTS = "documents"
# In the order in which documents go through them.
STEPS = ("language", "gopher_repetition", "gopher_quality", "c4", "exact_dedup", "minhash")


@dataclass
class Counts:
    """The numbers of documents, by where they went.

    At the end documents == unreadable + empty + removed by each step + out, exactly. `removed` is
    by step and reason ("" if a step has only one), `changed` by step.
    """

    documents: int = 0
    unreadable: int = 0
    empty: int = 0
    removed: dict[str, Counter[str]] = field(default_factory=dict)
    changed: Counter[str] = field(default_factory=Counter)
    out: int = 0
    characters: int = 0
    characters_out: int = 0

    def add(self, other: Counts) -> None:
        """Add the numbers of another part of the documents."""
        for name in ("documents", "unreadable", "empty", "out", "characters", "characters_out"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        for step, reasons in other.removed.items():
            self.removed.setdefault(step, Counter()).update(reasons)
        self.changed.update(other.changed)

    @property
    def balances(self) -> bool:
        """Every document went somewhere."""
        removed = sum(sum(reasons.values()) for reasons in self.removed.values())
        return self.documents == self.unreadable + self.empty + removed + self.out

    def to_json(self) -> dict[str, Any]:
        """Return the counts as they are written to a manifest."""
        return {
            **vars(self),
            "removed": {step: dict(reasons) for step, reasons in self.removed.items()},
            "changed": dict(self.changed),
        }

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> Counts:
        """Return the counts that `to_json` made `content` of."""
        removed = {step: Counter(reasons) for step, reasons in content["removed"].items()}
        return cls(**{**content, "removed": removed, "changed": Counter(content["changed"])})


class PartWriter:
    """A writer of one part of documents, which appears as a whole when `commit` is called.

    A part without documents does not appear.
    """

    def __init__(self, path: Path):
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path, self.temporary = path, path.with_name(f"{path.name}.tmp")
        self.documents = 0
        self.file = _create(self.temporary)
        path.unlink(missing_ok=True)

    def write(self, document_id: str, text: str, reason: str | None = None) -> None:
        record = {"id": document_id, "text": text, **({} if reason is None else {"reason": reason})}
        self.file.write(json.dumps(record, ensure_ascii=False).encode() + b"\n")
        self.documents += 1

    def commit(self) -> None:
        """Put the part in its place, if it holds any documents."""
        self.file.close()
        if self.documents:
            os.replace(self.temporary, self.path)
        else:
            self.temporary.unlink()


def _create(path: Path) -> BinaryIO:
    """Return a new file to write to, compressed as the suffix before .tmp says.

    Equal content gives equal bytes.
    """
    inner = path.with_suffix("").suffix
    if inner == ".zst":
        from pyarrow import output_stream

        return cast(
            BinaryIO,
            io.BufferedWriter(output_stream(create(path), compression="zstd"), 1 << 20),
        )
    file = create(path)
    if inner == ".gz":
        return cast(BinaryIO, _Gzip(file))
    return file


class _Gzip(gzip.GzipFile):
    """A gzip file without a name and a time in its header."""

    def __init__(self, file: BinaryIO):
        super().__init__("", "wb", 6, file, mtime=0)
        self.below = file

    def close(self) -> None:
        super().close()
        self.below.close()


def read_part(path: Path) -> Iterator[tuple[str, str]]:
    """Yield the ids and texts in a .zst part, or nothing if it does not exist."""
    if not path.exists():
        return
    from pyarrow import input_stream

    with io.BufferedReader(input_stream(str(path), compression="zstd"), 1 << 20) as lines:
        for line in lines:
            record = json.loads(line)
            yield record["id"], record["text"]


@dataclass(frozen=True)
class PartsFolder:
    """A folder of parts, in the making or finished."""

    key: str  # of the configuration, which names the folder
    out: str
    settings: dict[str, Any]  # what its bytes depend on beside the source, as JSON values
    versions: dict[str, str]  # of the packages that do the work
    units: tuple[Unit, ...]

    @property
    def work(self) -> Path:
        """The folder that holds all files until the cleaning is finished."""
        return Path(self.out, WORK)

    def part(self, number: int, folder: str = DOCUMENTS) -> Path:
        """Return the path to which a task writes its part until the cleaning is published."""
        compression = self.settings["compression"]
        return (
            self.work
            / folder
            / f"{number:05}.jsonl{'' if compression == 'none' else f'.{compression}'}"
        )

    def finished(self) -> dict[str, Any] | None:
        """Return the manifest if this very cleaning is finished already, or None if it is not.

        Raise ConfigError if the folder holds anything else, and DataError if the finished cleaning
        is damaged.
        """
        out = Path(self.out)
        if out.exists() and not out.is_dir():
            raise ConfigError(f"{self.key}: {out}: is a file; name a folder")
        require_safe(out, self.key)
        require_folder_inside(out, WORK, self.key)
        if (out / "manifest.json").exists():
            manifest = self._read(out / "manifest.json")
            there = {**manifest["settings"], "inputs": manifest["inputs"]}
            self._refuse_difference(there, {**self.settings, "inputs": inputs_of(self.units)})
            for part in manifest["parts"]:
                path = out / DOCUMENTS / part["name"]
                size = path.stat().st_size if path.is_file() else None
                if size != part["bytes"]:
                    what = (
                        "missing" if size is None else f"{size} bytes long, must be {part['bytes']}"
                    )
                    raise DataError(
                        f"{path}: is {what}; restore it from a copy, or delete {out} and run the"
                        " command again"
                    )
            shutil.rmtree(self.work, ignore_errors=True)
            Path(self.out, LOCK).unlink(missing_ok=True)
            return manifest
        for folder in (out, self.work):
            require_folder_inside(folder, DOCUMENTS, self.key)
        if (self.work / "plan.json").exists():
            plan = self._read(self.work / "plan.json")
            self._refuse_difference(
                {**plan["settings"], **plan["versions"]}, {**self.settings, **self.versions}
            )
        elif out.exists() and any(path.name not in (WORK, LOCK) for path in out.iterdir()):
            raise ConfigError(
                f"{self.key}: {out}: this folder is not empty and holds no cleaning; name a new one"
                " or empty it"
            )
        return None

    def begin(self) -> None:
        """Prepare the folder for a new cleaning, or to continue an interrupted one."""
        plan = {
            "format": FORMAT,
            "version": VERSION,
            "settings": self.settings,
            "versions": self.versions,
            "num_units": len(self.units),
        }
        if (self.work / "plan.json").exists() and self._read(self.work / "plan.json") != plan:
            # The units of the source have changed, and the finished parts have the old numbers.
            shutil.rmtree(self.work)
        self.work.mkdir(parents=True, exist_ok=True)
        if Path(self.out, DOCUMENTS).exists():  # it was interrupted while publishing
            os.rename(Path(self.out, DOCUMENTS), self.work / DOCUMENTS)
        publish_file(self.work / "plan.json", plan)

    def publish(self, counts: Counts) -> None:
        """Put all parts in their place with one rename, then write the manifest."""
        assert counts.balances, counts
        here, there = self.work / DOCUMENTS, Path(self.out, DOCUMENTS)
        here.mkdir(exist_ok=True)
        for folder in (
            path for path in here.iterdir() if path.is_dir() and not any(path.iterdir())
        ):
            folder.rmdir()  # its step removed nothing
        os.rename(here, there)
        paths = sorted(path for path in there.rglob("*") if path.is_file())
        manifest = {
            "format": FORMAT,
            "version": VERSION,
            "settings": self.settings,
            "versions": self.versions,
            "inputs": inputs_of(self.units),
            "counts": counts.to_json(),
            "parts": [
                {"name": str(path.relative_to(there)), "bytes": path.stat().st_size}
                for path in paths
            ],
        }
        publish_file(Path(self.out, "manifest.json"), manifest)

    def _read(self, path: Path) -> dict[str, Any]:
        content = read_json(path)
        if (
            not isinstance(content, dict)
            or content.get("format") != FORMAT
            or content.get("version") != VERSION
        ):
            raise ConfigError(
                f"{self.key}: {self.out}: holds what convert/clean.py did not write; name another"
                " folder"
            )
        if not _is_whole(content, path.name):
            raise DataError(
                f"{path}: damaged: a key is missing, or of another kind; remove its folder and run"
                " the command again"
            )
        return content

    def _refuse_difference(self, there: dict[str, Any], here: dict[str, Any]) -> None:
        differences = _differences(_whole(there), _whole(here))
        shown = [
            f"{key} ({_short(before)} there, {_short(now)} now)" for key, before, now in differences
        ]
        if shown:
            raise ConfigError(
                f"{self.key}: {self.out}: holds a cleaning with other settings: {', '.join(shown)};"
                f" name another {self.key}, or remove this folder"
            )


def _is_whole(content: dict[str, Any], name: str) -> bool:
    """Return whether a manifest.json or a plan.json holds all that is read from it."""
    kinds: dict[str, type] = {"settings": dict, "versions": dict}
    if name == "manifest.json":
        kinds |= {"inputs": str, "counts": dict, "parts": list}
    if not all(isinstance(content.get(key), kind) for key, kind in kinds.items()):
        return False
    for part in content.get("parts", ()):
        names = part.get("name") if isinstance(part, dict) else None
        if not isinstance(names, str) or not all(map(files.is_plain_name, names.split("/"))):
            return False
        if not isinstance(part.get("bytes"), int):
            return False
    return name != "manifest.json" or _are_counts(content["counts"])


def _are_counts(content: dict[str, Any]) -> bool:
    try:
        counts = Counts.from_json(content)
        removed = [number for reasons in counts.removed.values() for number in reasons.values()]
    except (AttributeError, KeyError, TypeError, ValueError):
        return False
    numbers = [value for name, value in vars(counts).items() if name not in ("removed", "changed")]
    are_numbers = all(
        type(number) is int and number >= 0
        for number in (*numbers, *removed, *counts.changed.values())
    )
    return are_numbers and set(counts.removed) <= set(STEPS) and counts.balances


def publish_file(path: Path, content: dict[str, Any]) -> None:
    """Write a JSON file that appears as a whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    files.write(str(path), dump_json(content))


def read_json(path: Path) -> Any:
    """Return what a JSON file holds. Raise DataError if it is damaged."""
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise DataError(
            f"{path}: damaged: {str(error).splitlines()[0]}; remove its folder and run the command"
            " again"
        ) from None


def inputs_of(units: Sequence[Unit]) -> str:
    """Return a short text that changes with the source's files, their sizes or their formats."""
    sizes: dict[str, int] = {}
    # Only formats that a file's name does not tell: earlier versions hashed no formats at all.
    formats: dict[str, str] = {}
    for part in (part for unit in units for part in unit):
        sizes[part.path] = sizes.get(part.path, 0) + part.num_bytes
        if part.format not in ("dataset", format_by_suffix(part.path)):
            formats[part.path] = part.format
    digest = hashlib.sha256(dump_json([*sizes.items(), *formats.items()])).hexdigest()
    return f"{len(sizes)} files of {sum(sizes.values())} bytes, hash {digest[:8]}"


def _whole(settings: dict[str, Any]) -> dict[str, Any]:
    """Return settings with the defaults of those that earlier versions did not write."""
    return {"max_document_bytes": MAX_DOCUMENT_BYTES, **settings}


def _differences(
    there: dict[str, Any], here: dict[str, Any], prefix: str = ""
) -> Iterator[tuple[str, Any, Any]]:
    for key in there | here:
        before, now = there.get(key), here.get(key)
        if isinstance(before, dict) and isinstance(now, dict):
            yield from _differences(before, now, f"{prefix}{key}.")
        elif before != now:
            yield f"{prefix}{key}", before, now


def _short(value: Any) -> str:
    shown = "set" if isinstance(value, dict) else json.dumps(value, ensure_ascii=False)
    return shown if len(shown) <= 40 else f"{shown[:37]}..."
