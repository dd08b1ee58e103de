"""What a file is taken for, by its name and its first bytes, and which files a source holds."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import re
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from flame_composer.errors import ConfigError, DataError
from flame_composer.text.documents import read_documents
from flame_composer.text.sources import find_files, slice_files
from tests.text.test_corpus import COMPRESS, LINES, texts_of

PLAIN = "A line of plain text.\n" * 3


def table_bytes(**columns: list) -> bytes:
    buffer = io.BytesIO()
    pq.write_table(pa.table(columns), buffer)
    return buffer.getvalue()


TABLE = table_bytes(text=["one", "two"])
ZSTD = COMPRESS[".zst"]
RECOGNISED = {
    "c4-train.00000.json": (LINES, "jsonl", None),
    "bom.json": (b"\xef\xbb\xbf\n" + LINES, "jsonl", None),
    "minified.json": (b'{"text": "one"}', "jsonl", None),
    "first_line_broken.json": (b'{"text": \n' + LINES, "jsonl", None),
    "long_line.json": (b'{"text": "' + b"x" * 100_000 + b'"}\n', "jsonl", None),
    "nothing.json": (b"", "jsonl", None),
    "a.json.gz": (gzip.compress(LINES), "jsonl", "gzip"),
    "part-0000.gz": (gzip.compress(LINES), "jsonl", "gzip"),
    "part-00000-0f8d.c000.zst": (ZSTD(LINES), "jsonl", "zstd"),
    "part-0001": (LINES, "jsonl", None),
    "part-0001.gz": (gzip.compress(b"oops\n" + LINES), "jsonl", "gzip"),
    "part-0002": (PLAIN.encode(), "text", None),
    "part-0003.bz2": (bz2.compress(PLAIN.encode()), "text", "bz2"),
    "000000_0": (TABLE, "parquet", None),
    "table.parq": (TABLE, "parquet", None),
    "x.jsonl.gzip": (gzip.compress(LINES), "jsonl", "gzip"),
    "y.jsonl.zstd": (ZSTD(LINES), "jsonl", "zstd"),
    "skippable.jsonl.zst": (b"\x50\x2a\x4d\x18\x04\0\0\0abcd" + ZSTD(LINES), "jsonl", "zstd"),
    "notes.txt.xz": (lzma.compress(PLAIN.encode()), "text", "xz"),
    "code.py": (b'{"a": 1}\n', "text", None),
    "README": (b"[1] A reference.\n", "text", None),
    "BZh9.txt": (b"BZh91 is how bzip2 begins.\n", "text", None),
    "PAR1.txt": (b"PAR1 is how Parquet begins.\n", "text", None),
}


@pytest.mark.parametrize("name", RECOGNISED)
def test_a_file_is_read_as_what_its_name_and_its_bytes_say(tmp_path, name, caplog):
    data, form, compression = RECOGNISED[name]
    (tmp_path / name).write_bytes(data)
    parts = slice_files([str(tmp_path / name)], 1 << 30)
    assert {(part.format, part.compression) for part in parts} == (
        {(form, compression)} if data else set()
    )
    if form == "text":
        assert [len(text) > 5 for text in texts_of(tmp_path / name)] == [True]
    else:
        others = {"minified.json": ["one"], "long_line.json": ["x" * 100_000], "nothing.json": []}
        assert texts_of(tmp_path / name, on_damage=lambda error: None) == others.get(
            name, ["one", "two"]
        )
    assert caplog.messages == []


IS_READ_SO = "by its first bytes, and is read so"
DOUBTFUL = {
    "a.jsonl": (
        gzip.compress(LINES),
        ["one", "two"],
        f"is JSON lines by its name, but is gzip {IS_READ_SO}",
    ),
    "a.jsonl.gz": (ZSTD(LINES), ["one", "two"], f"is gzip by its name, but is zstd {IS_READ_SO}"),
    "b.jsonl.gz": (LINES, ["one", "two"], f"is gzip by its name, but is not packed {IS_READ_SO}"),
    "a.json": (TABLE, ["one", "two"], f"is JSON by its name, but is Parquet {IS_READ_SO}"),
    "a.txt": (TABLE, ["one", "two"], f"is plain text by its name, but is Parquet {IS_READ_SO}"),
    "b.parquet": (
        LINES,
        ["one", "two"],
        "is Parquet by its name, but holds JSON lines, and is read so",
    ),
    "b.txt": (
        LINES,
        [LINES.decode()],
        (
            "holds JSON lines, but is read as plain text, one document, by its name; to change "
            "that, name it .jsonl"
        ),
    ),
    "c.dat": (
        LINES,
        [LINES.decode()],
        (
            "holds JSON lines, but is read as plain text, one document, by its name; to change "
            "that, name it .jsonl"
        ),
    ),
    "part-9": (
        b'[\n {"text": "one"}\n]\n',
        ['[\n {"text": "one"}\n]\n'],
        (
            "holds one JSON array, but must hold one JSON object per line; convert it with: jq -c"
            " '.[]' FILE > FILE.jsonl; it is read as plain text, one document"
        ),
    ),
}


@pytest.mark.parametrize("name", DOUBTFUL)
def test_where_name_and_bytes_disagree_one_line_says_so(tmp_path, name, caplog):
    data, texts, message = DOUBTFUL[name]
    files = [str(tmp_path / folder / name) for folder in ("x", "y")]
    for file in files:
        Path(file).parent.mkdir()
        Path(file).write_bytes(data)
    parts = slice_files(files, 1 << 30)
    assert [
        document.text for part in parts for document in read_documents(part, "text")
    ] == 2 * texts
    assert caplog.messages == [f"warning: {files[0]} (and 1 more like it): {message}"]


ARRAY = (
    "holds one JSON array, but must hold one JSON object per line; convert it with: jq -c '.[]'"
    " FILE > FILE.jsonl, or name it"
)
OBJECT = (
    "holds one JSON object over several lines, but must hold one per line; convert it with: jq"
    " -c . FILE > FILE.jsonl, or name it"
)
ONE_DOCUMENT = {
    "a.json": (b'[{"text": "one"},\n {"text": "two"}]', ARRAY),
    "b.json": (b'\n[\n  {\n    "text": "one"\n  }\n]\n', ARRAY),
    "c.json.gz": (gzip.compress(b'[{"text": "one"}]'), ARRAY),
    "d.json": (b'{\n  "text": "one"\n}\n', OBJECT),
    "e.json": (b'{"data": [\n{"text": "one"},\n{"text": "two"}\n]}\n', OBJECT),
    "f.json.zst": (ZSTD(b'{"text": "one",\n "id": 1}'), OBJECT),
}


@pytest.mark.parametrize("name", ONE_DOCUMENT)
def test_a_json_file_that_has_no_lines_is_refused(tmp_path, name):
    data, message = ONE_DOCUMENT[name]
    (tmp_path / name).write_bytes(data)
    with pytest.raises(
        ConfigError,
        match=f"^source: {re.escape(f'{tmp_path / name}: {message}')} .txt to read it as plain",
    ):
        slice_files([str(tmp_path / name)], 1 << 20)


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("part-0.gz", gzip.compress(TABLE)),
        ("a.parquet", gzip.compress(TABLE)),
        ("source.xz", lzma.compress(bytes(257) + b"ustar\x0000" + bytes(500))),
    ],
)
def test_what_is_packed_within_a_packed_file_is_refused(tmp_path, name, data):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(
        ConfigError, match="archives and packed Parquet files cannot be read; unpack it first"
    ):
        slice_files([str(tmp_path / name)], 1 << 20)


@pytest.mark.parametrize("name", ["a.jsonl", "a.txt", "a.parquet", "part-0", "a.json.gz"])
def test_what_git_lfs_leaves_in_place_of_a_file_is_no_document(tmp_path, name):
    (tmp_path / name).write_bytes(
        b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3\n"
    )
    message = (
        r"damaged: it is a pointer that git-lfs left \(git lfs pull gets the file\); fetch the file"
        r" again$"
    )
    with pytest.raises(DataError, match=message):
        slice_files([str(tmp_path / name)], 1 << 20)


@pytest.mark.parametrize(
    ("data", "kind"),
    [
        (b"ORC\x0a\x0b\x0c\xff", "an ORC file"),
        (b"Obj\x01\x04\xff", "an Avro file"),
        (b"PK\x03\x04\xff", "a zip archive"),
        ("text".encode("utf-16"), "UTF-16"),
        (b"\x04\x22\x4d\x18\xff", "packed with LZ4"),
    ],
)
def test_what_cannot_be_read_is_named_and_can_be_left_out(tmp_path, data, kind):
    (tmp_path / "000000_0").write_bytes(data)
    skipped: list[DataError] = []
    assert texts_of(tmp_path / "000000_0", on_damage=skipped.append) == []
    (error,) = skipped
    assert re.search(
        rf"not valid UTF-8 at byte \d \(it begins as {kind} does\); convert the file to UTF-8",
        str(error),
    )


def test_what_spark_and_hadoop_leave_beside_their_parts_is_not_read(tmp_path):
    for name in ("part-00000.jsonl", "part-00001.jsonl.gz"):
        (tmp_path / name).write_bytes(gzip.compress(LINES) if name.endswith(".gz") else LINES)
    for name in (
        "_SUCCESS",
        "._SUCCESS.crc",
        ".part-00000.jsonl.crc",
        "part.crc",
        "_committed_123",
        "_metadata",
    ):
        (tmp_path / name).write_bytes(b"")
    (tmp_path / "_temporary" / "0").mkdir(parents=True)
    (tmp_path / "_temporary" / "0" / "part-00000.jsonl").write_bytes(LINES)
    parts = [
        str(tmp_path / f"part-0000{number}.jsonl{end}") for number, end in enumerate(("", ".gz"))
    ]
    for source, suffixes in (
        (tmp_path, []),
        (tmp_path / "*", []),
        (tmp_path / "**", []),
        (tmp_path, [""]),
    ):
        assert find_files([str(source)], suffixes) == parts
    assert find_files([str(tmp_path / "_temporary" / "*" / "*")]) == [
        str(tmp_path / "_temporary" / "0" / "part-00000.jsonl")
    ]
    (tmp_path / "json").mkdir()
    (tmp_path / "json" / "a.json").write_bytes(LINES)
    with pytest.raises(
        ConfigError,
        match=r"holds no file ending in .*; name the endings to take with suffixes=\[\.json\]$",
    ):
        find_files([str(tmp_path / "json")])
