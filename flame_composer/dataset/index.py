"""The index.json of a dataset, and its manifest without the units: read in pieces, not trusted."""

from __future__ import annotations

import contextlib
import hashlib
import io
import re
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from flame_composer.dataset.ledger import text_counts
from flame_composer.dataset.long_json import LongJson
from flame_composer.dataset.manifest import (
    Manifest,
    damaged,
    is_plain,
    manifest_of,
    require_there,
    take,
)
from flame_composer.dataset.mds import HASH, MAX_SHARD_BYTES, SHARD_NAME, ShardFile, column_form
from flame_composer.dataset.mds import VERSION as MDS_VERSION
from flame_composer.dataset.table import ShardTable, TableBuilder
from flame_composer.errors import DataError
from flame_composer.storage import files
from flame_composer.storage.filesystems import is_url
from flame_composer.text.sources import Unit, slice_json

SHARD_HASH = re.compile("[0-9a-f]{16}")


def read_header(folder: str) -> Manifest:
    """Return the manifest of the dataset in a folder, with no units, which are not looked at.

    Raises ConfigError or DataError as `read_manifest` does.
    """
    place = require_there(folder)
    content = read_without(place, "units")
    take(content, "units", list, place)
    return manifest_of(content, None, place)


def is_made_of(folder: str, manifest: Manifest, units: Iterable[Unit]) -> bool:
    """Return whether the manifest in a folder, whose header `manifest` is, records these units.

    The records are read one by one: of a million, no more than one is in memory. Only those of this
    version's form are known, which add up to the totals; of others, `read_manifest` says what they
    are.
    """
    expected = iter(units)
    sums: Counter[str] = Counter()
    state = {"is_same": True}

    def use(record: Any) -> None:
        inputs = [slice_json(part) for part in next(expected, ())]
        if state["is_same"] and is_plain(record) and record["inputs"] == inputs:
            sums.update(record["ledger"])
        else:
            state["is_same"] = False

    _read_long(require_there(folder), "units", use)
    totals = text_counts(vars(manifest.totals))
    return (
        state["is_same"]
        and next(expected, None) is None
        and all(sums[name] == count for name, count in totals.items())
    )


def read_without(place: str, key: str) -> dict[str, Any]:
    """Return the JSON object in a file, with an empty list in place of the list under `key`.

    Raises DataError, naming the file, if it cannot be read or is not a JSON object.
    """
    return _read_long(place, key, _leave_out)[0]


def _leave_out(_unit: Any) -> None:
    pass


def read_index(folder: str, manifest: Manifest) -> ShardTable:
    """Return the shards that a folder's index.json lists, in order, without looking at them.

    The index is not trusted. Raises DataError unless it is the one that `manifest` was written
    with, and names only files within the folder.
    """
    place = files.join(folder, "index.json")
    if files.stat(place) is None:
        raise DataError(
            f"{place}: missing; run the same command of convert/ again to finish the dataset"
        )
    form = column_form(
        manifest.token_dtype, manifest.context_length, has_loss_mask=manifest.has_loss_mask
    )
    row_bytes = sum(filter(None, form["column_sizes"]))
    shards = TableBuilder()

    def add(shard: Any) -> None:
        shards.add(_shard(shard, form, place))

    rest, digest = _read_long(place, "shards", add)
    take(rest, "shards", list, place)
    if take(rest, "version", int, place) != MDS_VERSION:
        raise damaged(place, f"'version' must be {MDS_VERSION}")
    if not shards:
        raise damaged(place, "it lists no shards")
    table = shards.table()
    if (name := table.find_twice()) is not None:
        raise damaged(place, f"it names {name} twice")
    if digest != manifest.index_sha256:
        raise damaged(place, "it is not the index that manifest.json was written with")
    _check_sizes(table, row_bytes, place)
    return table


def _check_sizes(table: ShardTable, row_bytes: int, place: str) -> None:
    """Raise DataError if a shard has more bytes than it can, or rows that do not fit into it."""
    most_rows = table.bytes // row_bytes
    wrong = (table.bytes > MAX_SHARD_BYTES) | (table.rows < 1) | (table.rows > most_rows)
    for number in np.flatnonzero(wrong)[:1].tolist():
        file = table[number]
        if file.bytes > MAX_SHARD_BYTES:
            what = f"{file.bytes} bytes are more than a shard can have"
        elif file.rows < 1:
            what = "the shard has no rows"
        else:
            what = f"{file.rows} rows do not fit into {file.bytes} bytes"
        raise damaged(place, f"{file.basename}: {what}")


def _shard(shard: Any, form: dict[str, Any], place: str) -> ShardFile:
    """Return the shard that an entry of index.json is about; its columns must be those of `form`.

    Raises DataError for anything else.
    """
    raw = take(shard, "raw_data", dict, place)
    basename = take(raw, "basename", str, place)
    if not SHARD_NAME.fullmatch(basename):
        raise damaged(place, f"it names a file outside the dataset: {basename!r}")
    if shard.get("zip_data") is not None or shard.get("compression") is not None:
        raise damaged(place, f"{basename} is compressed, which this format never is")
    if any(shard.get(key) != value for key, value in form.items()):
        raise damaged(place, f"{basename} is not of this format: its columns must be {form}")
    if shard.get("size_limit") is not None:
        # StreamingDataset may read this index too, and insists on a number
        take(shard, "size_limit", int, place)
    file = ShardFile(
        basename,
        take(raw, "bytes", int, place),
        take(take(raw, "hashes", dict, place), HASH, str, place),
        take(shard, "samples", int, place),
    )
    if not SHARD_HASH.fullmatch(file.hash):
        raise damaged(place, f"{basename}: {file.hash[:40]!r} is no {HASH} hash")
    if max(file.bytes, file.rows) >= 2**63:  # which the table cannot hold
        raise damaged(place, f"{basename}: neither bytes nor rows can be so many")
    return file


def _read_long(place: str, key: str, use: Callable[[Any], None]) -> tuple[dict[str, Any], str]:
    """Read a JSON object, giving the items of its list under `key` to `use`.

    Return its other members, and the SHA-256 of the file. A local file is read piece by piece.
    """
    try:
        with contextlib.ExitStack() as stack:
            file: BinaryIO = (
                io.BytesIO(files.read(place))
                if is_url(place)
                else stack.enter_context(Path(place).open("rb"))
            )
            hashed = _Hashed(file)
            rest = LongJson(hashed, key, use).rest
            return rest, hashed.digest.hexdigest()
    except OSError as error:
        raise DataError(
            f"{place}: cannot be read: {error.strerror}; delete the dataset's folder and convert"
            " again"
        ) from None
    except DataError:
        raise
    except (ValueError, RecursionError) as error:
        raise damaged(place, f"not valid JSON: {error}") from None


class _Hashed:
    """A file whose content is hashed while it is read."""

    def __init__(self, file: BinaryIO):
        self.file, self.digest = file, hashlib.sha256()

    def read(self, size: int) -> bytes:
        block = self.file.read(size)
        self.digest.update(block)
        return block
