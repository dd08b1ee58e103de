"""Compressed files of several streams, whole and not, and lines and files that are too long for
memory.
"""

from __future__ import annotations

import bz2
import functools
import gzip
import json
import lzma
import re
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pytest
from pyarrow import parquet

from flame_composer.errors import ConfigError, DataError
from flame_composer.text import hub
from flame_composer.text.documents import read_documents
from flame_composer.text.sources import slice_file
from tests.data_fixtures import words
from tests.text.test_corpus import COMPRESS, LINES, texts_of

# Files of several compressed streams


# All legal
PADDING = {
    ".gz": b"\0" * 5,
    ".xz": b"\0" * 8,
    ".zst": b"\x50\x2a\x4d\x18\x04\0\0\0abcd",
    ".bz2": b"",
}


def streams(suffix: str) -> tuple[bytes, dict[int, int]]:
    """A file of four lines, some padding, three lines and padding, and the lengths at which a
    shorter file is whole.
    """
    first, second = (COMPRESS[suffix](b'{"text": "a line"}\n' * number) for number in (4, 3))
    padding = PADDING[suffix]
    step = {".gz": 1, ".xz": 4}.get(suffix, len(padding) or 1)
    lengths = {len(first) + i: 4 for i in range(0, len(padding) + 1, step)}
    whole = first + padding + second
    return whole + padding, lengths | {len(whole) + i: 7 for i in range(0, len(padding) + 1, step)}


def number_of_texts(path: Path) -> int | str:
    """The number, or what the error says of the file; lines that are no JSON are left out."""
    try:
        return len(texts_of(path, on_damage=lambda _: None))
    except DataError as error:
        return re.sub(r"^\S+: damaged: .*; fetch the file again$", "damaged", str(error))


@pytest.mark.parametrize("suffix", COMPRESS)
def test_a_compressed_file_cut_at_any_byte_is_damaged_unless_a_stream_ends_there(tmp_path, suffix):
    path = tmp_path / f"a.jsonl{suffix}"
    data, lengths = streams(suffix)
    for length in range(len(data) + 1):
        path.write_bytes(data[:length])
        assert number_of_texts(path) == lengths.get(length, "damaged"), length


@pytest.mark.parametrize("suffix", [".gz", ".bz2", ".xz"])  # pyarrow writes zstd without checksums
def test_a_flipped_bit_in_any_stream_loses_nothing_in_silence(tmp_path, suffix):
    path = tmp_path / f"a.jsonl{suffix}"
    data, _ = streams(suffix)
    damaged = 0
    for bit in range(8 * len(data)):
        flipped = bytearray(data)
        flipped[bit // 8] ^= 1 << bit % 8
        path.write_bytes(flipped)
        found = number_of_texts(path)
        # Some bits mean nothing, such as those of the time in gzip's header
        assert found in (7, "damaged"), bit
        damaged += found == "damaged"
    assert damaged > 0.7 * 8 * len(data)


@pytest.mark.parametrize("suffix", COMPRESS)
def test_what_is_no_stream_behind_one_is_damage(tmp_path, suffix):
    path = tmp_path / f"a.jsonl{suffix}"
    data, _ = streams(suffix)
    for rest in (
        b"garbage",
        b"\0\0garbage",
        COMPRESS[suffix](b"{}")[1:],
        b"" if suffix == ".gz" else b"\0\0\0",
    ):
        path.write_bytes(data + rest)
        assert number_of_texts(path) == ("damaged" if rest else 7), rest


def test_a_whole_file_of_many_streams_larger_than_the_buffers(tmp_path):
    texts = [words(2000, seed) for seed in range(300)]
    lines = [json.dumps({"text": text}).encode() + b"\n" for text in texts]
    for suffix in (".bz2", ".xz"):
        packed = b"".join(COMPRESS[suffix](b"".join(lines[i : i + 7])) for i in range(0, 300, 7))
        assert len(packed) > 1 << 20, "more than is read at a time"
        (tmp_path / f"a.jsonl{suffix}").write_bytes(packed)
        assert texts_of(tmp_path / f"a.jsonl{suffix}") == texts


def test_an_old_lzma_file_is_read_and_one_that_asks_for_too_much_memory_is_named(tmp_path):
    (tmp_path / "old.jsonl.xz").write_bytes(lzma.compress(LINES, format=lzma.FORMAT_ALONE))
    assert texts_of(tmp_path / "old.jsonl.xz") == ["one", "two"]
    frame = b"\x28\xb5\x2f\xfd\x00\xa8\x01\0\0"  # its window is of 2 GiB
    (tmp_path / "long.jsonl.zst").write_bytes(frame)
    asks = bytearray(lzma.compress(LINES, format=lzma.FORMAT_ALONE))
    asks[1:5] = (3 << 30).to_bytes(4, "little")
    (tmp_path / "asks.jsonl.xz").write_bytes(asks)
    for name in ("long.jsonl.zst", "asks.jsonl.xz"):
        with pytest.raises(
            DataError,
            match=rf"{name}: needs too much memory to be unpacked .*; compress it again with a",
        ):
            texts_of(tmp_path / name)


@pytest.mark.parametrize("suffix", [".bz2", ".xz"])
def test_damage_to_a_later_stream_of_a_dataset(tmp_path, suffix, monkeypatch):
    """The files of a Hugging Face dataset, which `datasets` reads."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    data, _ = streams(suffix)
    place = hub.address(str(tmp_path), None, "train")
    path = tmp_path / f"train.jsonl{suffix}"
    path.write_bytes(data)
    assert [row["text"] for row in hub.read_shard(place, 0)] == ["a line"] * 7
    second = data.rindex(data[:6])
    for damaged in (data[:second] + b"x" + data[second + 1 :], b""):
        path.write_bytes(damaged)
        with pytest.raises((DataError, ConfigError), match=r"cannot be (read|opened)"):
            list(hub.read_shard(place, 0))


# Lines and files that are too long


@pytest.mark.parametrize("suffix", ["", *COMPRESS])
@pytest.mark.parametrize("end", [b"\n", b""])
def test_a_line_that_is_too_long_is_counted_and_what_follows_read(tmp_path, suffix, end):
    path = tmp_path / f"a.jsonl{suffix}"
    whole = b'{"text": "' + b"w" * (3 << 20) + b'"}'  # just as long as is allowed
    lines = [
        b'{"text": "before"}',
        whole,
        b"x" * (len(whole) + 1),
        b'{"text": "after"}',
        b"y" * (9 << 20),
        b'{"text": "z"}',
    ]
    path.write_bytes(COMPRESS.get(suffix, bytes)(b"\n".join(lines) + end))
    for max_bytes in (1 << 30, 1 << 20, 100_000):
        skipped: list[DataError] = []
        documents = [
            document
            for part in slice_file(str(path), max_bytes)
            for document in read_documents(part, "text", skipped.append, len(whole))
        ]
        assert [(len(d.text), d.position) for d in documents] == [
            (6, 0),
            (3 << 20, 19),
            (5, 19 + 2 * len(whole) + 3),
            (1, 19 + 2 * len(whole) + 22 + (9 << 20)),
        ]
        rule = (
            f"longer than max_document_bytes={len(whole)}; mend or remove the line, or raise"
            " max_document_bytes"
        )
        assert [str(error) for error in skipped] == [f"{path}:3: {rule}", f"{path}:5: {rule}"]
        if suffix:
            break


@pytest.mark.parametrize("suffix", ["", *COMPRESS])
def test_a_plain_text_file_that_is_too_long_is_no_document(tmp_path, suffix):
    path = tmp_path / f"a.txt{suffix}"
    path.write_bytes(COMPRESS.get(suffix, bytes)(b"x" * 5000))
    assert texts_of(path, max_document_bytes=5000) == ["x" * 5000]
    skipped: list[DataError] = []
    assert texts_of(path, max_document_bytes=4999, on_damage=skipped.append) == []
    assert [str(error) for error in skipped] == [
        f"{path}: longer than max_document_bytes=4999; split the file, or raise max_document_bytes"
    ]


def test_a_row_of_parquet_that_is_too_long_is_no_document(tmp_path):
    path = tmp_path / "a.parquet"
    parquet.write_table(
        pa.table({"text": ["short", "é" * 2500, "é" * 2501, "x" * 5000, "x" * 5001, "last"]}), path
    )
    skipped: list[DataError] = []
    found = texts_of(path, max_document_bytes=5000, on_damage=skipped.append)
    assert found == ["short", "é" * 2500, "x" * 5000, "last"]
    rule = "longer than max_document_bytes=5000; remove the row, or raise max_document_bytes"
    assert [str(error) for error in skipped] == [f"{path}: row {row}: {rule}" for row in (3, 5)]


BOMB = """
import resource, sys
from flame_composer.text.sources import slice_file
from flame_composer.text.documents import read_documents

resource.setrlimit(resource.RLIMIT_AS, (1 << 30, 1 << 30))
skipped = []
texts = []
for part in slice_file(sys.argv[1], 1 << 26):
    texts += [d.text for d in read_documents(part, "text", skipped.append, 32 << 20)]
print(len(texts), *map(str, skipped), sep="\\n")
"""


@pytest.mark.parametrize(
    ("name", "suffix"),
    [*(("a.jsonl", end) for end in ("", *COMPRESS)), ("a.txt", ""), ("a.txt", ".gz")],
)
def test_a_bomb_takes_little_memory(tmp_path, name, suffix):
    """A line of 300 MB, in a process that may have 1 GiB: with the libraries it has loaded, some
    0.3 GiB for documents.
    """
    path = tmp_path / f"{name}{suffix}"
    if suffix == ".zst":
        with pa.output_stream(str(path), compression="zstd") as file:
            for _ in range(300):
                file.write(b"x" * 1_000_000)
            file.write(b'\n{"text": "after"}\n')
    else:
        opener = {
            "": open,
            ".gz": gzip.open,
            ".bz2": bz2.open,
            ".xz": functools.partial(lzma.open, preset=0),
        }[suffix]
        with opener(path, "wb") as file:
            for _ in range(300):
                file.write(b"x" * 1_000_000)
            file.write(b'\n{"text": "after"}\n')
    process = subprocess.run(
        [sys.executable, "-c", BOMB, str(path)], capture_output=True, text=True, timeout=100
    )
    rule = "longer than max_document_bytes=33554432"
    remedy = "split the file" if name == "a.txt" else "mend or remove the line"
    count, place = ("0", str(path)) if name == "a.txt" else ("1", f"{path}:1")
    assert (process.stdout, process.stderr) == (
        f"{count}\n{place}: {rule}; {remedy}, or raise max_document_bytes\n",
        "",
    )
