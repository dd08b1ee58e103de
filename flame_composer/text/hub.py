"""Hugging Face datasets, by id or local folder, read shard by shard without a copy on disk."""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, BinaryIO, Literal, cast
from urllib.parse import parse_qs, urlencode

from flame_composer.errors import ConfigError, DataError, one_line
from flame_composer.text.unpacking import BLOCK, Streams

if TYPE_CHECKING:
    from datasets import IterableDataset

SCHEME = "dataset:"


def address(source: str, name: str | None, split: str) -> str:
    """Return the string that stands for a dataset wherever a file would have its path."""
    query = {"name": name, "split": split} if name else {"split": split}
    return f"{SCHEME}{source}?{urlencode(query)}"


def is_dataset(path: str) -> bool:
    """Return whether a path is the `address` of a dataset."""
    return path.startswith(SCHEME)


def open_source(path: str) -> IterableDataset:
    """Return the dataset that an `address` stands for, as a stream.

    HF_HUB_OFFLINE and the other settings of the `datasets` package apply. Raises ConfigError if
    there is no such dataset, configuration or split, and if the dataset names files outside of it.
    """
    from datasets import disable_progress_bars, load_dataset_builder
    from datasets.config import DATASET_STATE_JSON_FILENAME

    source, _, query = path.removeprefix(SCHEME).rpartition("?")
    settings = {key: values[0] for key, values in parse_qs(query).items()}
    looks_like_a_folder = source.startswith((".", "/", "~")) or source.count("/") > 1
    if looks_like_a_folder and not os.path.isdir(source):
        raise ConfigError(
            f"source: {source}: no such folder; with split=... it must be one, or a Hugging Face"
            " dataset id"
        )
    disable_progress_bars()
    _check_every_stream()
    try:
        if os.path.exists(os.path.join(source, DATASET_STATE_JSON_FILENAME)):
            raise ValueError("it was saved with save_to_disk; save it with to_parquet")
        builder = load_dataset_builder(source, settings.get("name"))
        for files in (builder.config.data_files or {}).values():
            for file in files:
                _check_inside(source, str(file))
        return cast("IterableDataset", builder.as_streaming_dataset(split=settings["split"]))
    except ConfigError:
        raise
    except Exception as error:  # a dataset, the hub or the network may raise anything
        raise ConfigError(
            f"source: {source}: cannot be opened as a dataset: {one_line(error)}"
        ) from None


def _check_inside(source: str, file: str) -> None:
    """Raise ConfigError if a dataset's README.md names a file that lies outside of the dataset.

    For a dataset in a folder that is any file outside of it; for one on the hub, any file on this
    machine.
    """
    place = file.rpartition("::")[2].removeprefix("file://")  # the archive it is in, if any
    is_here = "://" not in place
    if not os.path.isdir(source):
        is_outside = is_here
    else:
        folders = (os.path.realpath(source), os.path.abspath(source))
        path = os.path.abspath(place)
        is_outside = not is_here or not any(
            path.startswith(os.path.join(each, "")) for each in folders
        )
    if is_outside:
        raise ConfigError(
            f"source: {source}: its data_files name {file}, which lies outside of it; move that"
            " file into it, or give it as a source of its own"
        )


def _check_every_stream() -> None:
    """Make fsspec decompress bz2 and xz with `Streams`, which reports all damage.

    Upstream: fsspec 2026.6, `fsspec.compression.compr`, through which `datasets` reads files.
    Mends: fsspec's readers end without an error at a damaged stream.
    """
    from fsspec.compression import register_compression

    def opener(compression: Literal["bz2", "xz"]) -> Callable[..., BinaryIO]:
        return lambda file, **_: cast(
            BinaryIO, io.BufferedReader(Streams(file, compression), BLOCK)
        )

    register_compression("bz2", opener("bz2"), "bz2", force=True)
    register_compression("xz", opener("xz"), "xz", force=True)


def read_shard(path: str, shard: int) -> Iterator[dict[str, Any]]:
    """Yield the rows of one shard of a dataset. Raises DataError if the shard cannot be read."""
    dataset = open_source(path)
    rows = iter(dataset.shard(num_shards=dataset.num_shards, index=shard))
    while True:
        try:
            row = next(rows, None)
        except Exception as error:  # as in `open_source`, anything may be raised
            raise DataError(
                f"{path}: shard {shard}: cannot be read: {one_line(error)}; run the same command"
                " again"
            ) from None
        if row is None:
            return
        yield row
