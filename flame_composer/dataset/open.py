"""Finished datasets: opening, checking and downloading them."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from flame_composer.dataset.index import read_header, read_index
from flame_composer.dataset.manifest import Manifest, damaged, read_manifest
from flame_composer.dataset.mds import BadShard
from flame_composer.dataset.table import ShardTable
from flame_composer.errors import ConfigError, DataError, one_line
from flame_composer.storage import files
from flame_composer.storage.filesystems import is_url
from flame_composer.storage.shards import TooLong, fetch_file
from flame_composer.text.tokenizer import TokenizerFingerprint


@dataclass(frozen=True)
class Dataset:
    """A finished dataset, in a local folder, under a URL or both.

    `folder` holds the dataset, or the part of `remote` that has been downloaded so far. It is ""
    for a remote dataset of which nothing is kept locally. `files` are the shards in row order.
    """

    folder: str
    remote: str | None
    manifest: Manifest
    files: ShardTable

    @property
    def place(self) -> str:
        """The dataset's URL, or its folder if it has none, as the user named it."""
        return self.remote or self.folder

    def locate(self, row: int) -> tuple[int, int]:
        """Return the number of the shard that holds a row, and the row's number within it."""
        ends = self.files.rows.cumsum()
        number = int(np.searchsorted(ends, row, side="right"))
        return number, row - int(ends[number] - self.files.rows[number])


def open_dataset(folder: str, remote: str | None = None, *, with_units: bool = True) -> Dataset:
    """Return the dataset in a folder, local or in an object store; see `Dataset` for `remote`.

    Without the manifest's records of units, opening takes less than 100 bytes of memory a shard.
    Raises ConfigError or DataError if there is none, or if it is unfinished or damaged. The shards
    are not looked at: `check_shards` does that.
    """
    manifest = read_manifest(folder) if with_units else read_header(folder)
    dataset = Dataset(folder, remote, manifest, read_index(folder, manifest))
    listed = (
        int(dataset.files.rows.sum()),
        len(dataset.files),
        int(dataset.files.bytes.sum()),
    )
    totals = (manifest.totals.rows, manifest.totals.shards, manifest.totals.bytes)
    if listed != totals:
        raise damaged(
            f"{dataset.place.rstrip('/')}/manifest.json",
            "its totals (rows, shards, bytes) are {}, {}, {}, but those of "
            "index.json are {}, {}, {}".format(*totals, *listed),
        )
    return dataset


def open_at(address: str) -> Dataset:
    """Return the dataset in a local folder or under a URL, without keeping anything locally.

    Raises ConfigError or DataError as `open_dataset` does.
    """
    if not is_url(address):
        return open_dataset(address)
    with tempfile.TemporaryDirectory() as folder:
        for name in ("manifest.json", "index.json"):
            source = f"{address.rstrip('/')}/{name}"
            try:
                download_at_most(source, Path(folder, name), files.MOST_READ)
            except BadShard as problem:
                raise ConfigError(
                    f"{source}: {problem}; check the address, the credentials and that the"
                    " conversion has finished"
                ) from None
        found = open_dataset(folder, address)
    return Dataset("", address, found.manifest, found.files)


def check_shards(dataset: Dataset) -> None:
    """Raise DataError if a shard is missing or has the wrong size, naming the first such shard.

    Only sizes are looked at: content is checked when it is read.
    """
    assert dataset.folder, "a dataset that is only looked at where it is has no folder"
    # A listing asks a store 1,000 times less often, but it is in memory, with all other files
    listed = files.find(dataset.folder) if is_url(dataset.folder) else None
    for file in dataset.files:
        if listed is None:
            found = files.stat(files.join(dataset.folder, file.basename))
        else:
            found = listed.get(file.basename)
        if found is None or found.size != file.bytes:
            what = "missing" if found is None else f"{found.size} bytes long, must be {file.bytes}"
            raise DataError(
                f"{files.join(dataset.folder, file.basename)}: shard is {what}; restore it from a"
                f" copy, or delete {dataset.folder} and convert again"
            )


def check_tokenizer(dataset: Dataset, ours: TokenizerFingerprint, name: str) -> None:
    """Raise ConfigError if the dataset was made with another tokenizer than `ours`.

    The error calls our tokenizer `name`, and says what differs.
    """
    theirs = dataset.manifest.tokenizer
    for key in ("vocab_size", "bos_token_id", "eos_token_id", "sha256"):
        here, there = getattr(ours, key), getattr(theirs, key)
        if here != there:
            raise ConfigError(
                f"{dataset.place}: was made with another tokenizer than {name} ({key}: {there}"
                f" there, {here} here); set tokenizer to the one it was converted with, or convert"
                " the text again"
            )


def download(source: str, path: Path, *, at_most: int) -> None:
    """Download a file of a remote dataset, which other threads may do too; see `fetch_file`.

    Raises BadShard if the file has more than `at_most` bytes (only S3 and local files are checked
    for that), FileNotFoundError, ConfigError, or an error of the store's client.
    """
    try:
        fetch_file(source, path, most=at_most)
    except TooLong as problem:
        raise BadShard(str(problem)) from None


def download_at_most(source: str, path: Path, num_bytes: int) -> None:
    """Fetch a file of a remote dataset in a process that writes no other file meanwhile.

    Raises BadShard that says why the file cannot be had, or that it has more than `num_bytes`.
    """
    try:
        fetch_file(source, path, most=num_bytes, is_alone=True)
    except TooLong as problem:
        raise BadShard(str(problem)) from None
    except Exception as error:  # every store's client has exceptions of its own
        reason = one_line(error).removeprefix(f"{source}: ")
        raise BadShard(f"cannot be downloaded: {reason}") from None
