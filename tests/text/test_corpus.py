"""Reading text: every document once, in the same order, and errors that name the place."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import re
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flame_composer.errors import ConfigError, DataError
from flame_composer.text import hub
from flame_composer.text.documents import read_documents, sample_texts
from flame_composer.text.sources import Slice, find_files, slice_file
from flame_composer.text.unpacking import line_at
from tests.data_fixtures import words, write_jsonl


def texts_of(path: Path, max_bytes: int = 1 << 30, **kwargs) -> list[str]:
    return [
        document.text
        for part in slice_file(str(path), max_bytes)
        for document in read_documents(part, "text", **kwargs)
    ]


def make_tree(root: Path) -> None:
    for name in (
        "b.txt",
        "a/z.jsonl",
        "a/y.parquet",
        "a/deep/er/x.txt",
        "c.py",
        ".hidden.txt",
        ".git/d.txt",
        "e.ndjson",
    ):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text("{}")


def test_folders_take_known_suffixes_in_sorted_order(tmp_path):
    make_tree(tmp_path)
    found = [str(Path(path).relative_to(tmp_path)) for path in find_files([str(tmp_path)])]
    assert found == ["a/deep/er/x.txt", "a/y.parquet", "a/z.jsonl", "b.txt", "e.ndjson"]


def test_suffixes_globs_and_files_take_what_they_name_and_each_file_once(tmp_path, monkeypatch):
    make_tree(tmp_path)
    monkeypatch.chdir(tmp_path)
    assert find_files(["."], [".py"]) == ["c.py"]
    assert find_files(["c.py", "./b.txt", "*.py"]) == ["c.py", "b.txt"]
    assert find_files(["**/*.txt"]) == ["a/deep/er/x.txt", "b.txt"]
    assert find_files(["e.ndjson", "."]) == [
        "e.ndjson",
        "a/deep/er/x.txt",
        "a/y.parquet",
        "a/z.jsonl",
        "b.txt",
    ]


@pytest.mark.parametrize(
    ("source", "suffixes", "message"),
    [
        ("nothing", [], "source: nothing: no such file or folder"),
        ("*.rst", [], "source: *.rst: no file matches this pattern"),
        (
            "empty",
            [],
            (
                "source: empty: this folder holds no file ending in .jsonl, .json-lines, .ndjson,"
                " .parquet, .txt (or compressed, .gz, .gzip, .zst, .zstd, .bz2, .xz); name the"
                " endings to take with suffixes=[...]"
            ),
        ),
        (
            ".",
            [".rst"],
            (
                "source: .: this folder holds no file ending in .rst; name the endings to take with"
                " suffixes=[...]"
            ),
        ),
    ],
)
def test_a_source_with_nothing_to_read(tmp_path, monkeypatch, source, suffixes, message):
    make_tree(tmp_path)
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}$"):
        find_files([source], suffixes)


COMPRESS = {
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": lambda data: pa.Codec("zstd").compress(data, asbytes=True),
}


LINES = b'{"text": "one"}\n{"text": "two"}\n'
COMPRESSION = {".gz": "gzip", ".bz2": "bz2", ".xz": "xz", ".zst": "zstd"}


@pytest.mark.parametrize("suffix", COMPRESS)
def test_compressed_files_are_read_whole(tmp_path, suffix):
    texts = [words(1 + i % 50, i) for i in range(3000)] + ["", "ä 🔥"]
    lines = [json.dumps({"text": text}).encode() + b"\n" for text in texts]
    # Two streams, one behind the other, as `cat` and parallel compressors leave them.
    packed = COMPRESS[suffix](b"".join(lines[:2000])) + COMPRESS[suffix](b"".join(lines[2000:]))
    for name in ("a.jsonl", "b.JSON"):
        path = tmp_path / f"{name}{suffix}"
        path.write_bytes(packed)
        assert slice_file(str(path), 1000) == [
            Slice(str(path), "jsonl", 0, len(packed), len(packed), compression=COMPRESSION[suffix])
        ]
        assert texts_of(path) == texts
    text = tmp_path / f"c.py{suffix}"
    text.write_bytes(COMPRESS[suffix](b"\xef\xbb\xbfx = 1\r\n"))
    assert texts_of(text) == ["x = 1\r\n"]
    assert find_files([str(tmp_path)]) == [str(tmp_path / f"a.jsonl{suffix}")], (
        "case and unknown endings are to be named"
    )


@pytest.mark.parametrize("suffix", COMPRESS)
def test_damaged_compressed_files_lose_nothing_in_silence(tmp_path, suffix):
    packed = COMPRESS[suffix](
        b"".join(json.dumps({"text": words(50, i)}).encode() + b"\n" for i in range(1000))
    )
    path = tmp_path / f"a.jsonl{suffix}"
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3\n"
    # Pyarrow writes no checksum
    spoilt = [] if suffix == ".zst" else [packed[:2000] + bytes(200) + packed[2200:]]
    for data in (packed[:-20], packed[: len(packed) // 2], *spoilt, pointer):
        path.write_bytes(data)
        skipped: list[DataError] = []
        with pytest.raises(
            DataError, match=rf"a\.jsonl{re.escape(suffix)}: damaged: .*; fetch the file again$"
        ) as caught:
            texts_of(path, on_damage=skipped.append)
        assert "\n" not in str(caught.value)
        # Bytes that still unpack to something may be found out as text before the checksum comes.
        assert all("not valid" in str(error) for error in skipped)


def test_a_damaged_line_in_a_compressed_file_is_named(tmp_path):
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(gzip.compress(b'{"text": "fine"}\n' * 5000 + b"oops\n"))
    with pytest.raises(DataError, match=r"a\.jsonl\.gz:5001: not valid JSON"):
        texts_of(path)


@pytest.mark.parametrize("name", ["a.zip", "a.tar", "a.tar.gz", "a.tgz", "a.parquet.zst"])
def test_archives_are_refused(tmp_path, name):
    (tmp_path / name).write_bytes(b"")
    with pytest.raises(
        ConfigError,
        match=rf"{re.escape(name)}: archives and packed Parquet files cannot be read; unpack",
    ):
        slice_file(str(tmp_path / name), 1 << 20)


@given(
    texts=st.lists(st.text(max_size=30), max_size=12),
    max_bytes=st.integers(1, 90),
    blank_line=st.booleans(),
    last_newline=st.booleans(),
)
@settings(max_examples=150, deadline=None)
def test_jsonl_slices_hold_every_record_once_in_order(
    tmp_path_factory, texts, max_bytes, blank_line, last_newline
):
    path = tmp_path_factory.mktemp("jsonl") / "a.jsonl"
    lines = [json.dumps({"text": text}, ensure_ascii=i % 2 == 0) for i, text in enumerate(texts)]
    content = ("\n\n" if blank_line else "\n").join(lines) + ("\r\n" if last_newline else "")
    path.write_text(content, newline="")
    parts = slice_file(str(path), max_bytes)
    assert sum(part.num_bytes for part in parts) == path.stat().st_size
    documents = [document for part in parts for document in read_documents(part, "text")]
    assert [document.text for document in documents] == texts
    step = 2 if blank_line else 1
    assert [line_at(str(path), document.position) for document in documents] == list(
        range(1, step * len(texts) + 1, step)
    )


def test_byte_order_marks_are_not_text(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "first"}\n{"text": "second"}\n')
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbffirst")
    assert texts_of(tmp_path / "a.jsonl") == ["first", "second"]
    assert texts_of(tmp_path / "a.txt") == ["first"]
    (tmp_path / "empty.jsonl").write_bytes(b"\xef\xbb\xbf")
    assert texts_of(tmp_path / "empty.jsonl") == []


def test_plain_text_is_one_document_with_its_line_ends(tmp_path):
    (tmp_path / "a.py").write_bytes("x = 'ä'\r\n\n".encode())
    (tmp_path / "empty.md").write_bytes(b"")
    assert texts_of(tmp_path / "a.py") == ["x = 'ä'\r\n\n"]
    assert texts_of(tmp_path / "empty.md") == [""]


@pytest.mark.parametrize(
    "kind",
    [pa.string(), pa.large_string(), pa.string_view(), pa.dictionary(pa.int32(), pa.string())],
)
def test_parquet_row_groups(tmp_path, kind):
    texts = [words(5, i) for i in range(50)]
    column = (
        pa.array(texts).cast(kind)
        if kind != pa.string_view()
        else pa.array(texts, pa.string_view())
    )
    pq.write_table(
        pa.table({"id": list(range(50)), "text": column}), tmp_path / "a.parquet", row_group_size=7
    )
    parts = slice_file(str(tmp_path / "a.parquet"), 400)
    assert len(parts) > 2
    assert [part.start for part in parts[1:]] == [part.end for part in parts[:-1]]
    assert texts_of(tmp_path / "a.parquet", 400) == texts
    rows = [document.position for document in read_documents(parts[1], "text")]
    assert rows[0] == parts[0].end * 7 + 1


JSONL_DAMAGE = {
    b'{"text": "x"': (
        "not valid JSON: Expecting ',' delimiter at column 13; mend or remove the line"
    ),
    b'{"text": "\xff"}': "not valid UTF-8 at byte 10 of the line; mend or remove the line",
    b'["x"]': "must be a JSON object, not a list; mend or remove the line",
    b"3": "must be a JSON object, not a number; mend or remove the line",
    b'{"body": "x", "id": 3}': (
        "no column 'text'; its columns are: body, id (name one with text_column=...)"
    ),
    b"{}": "no column 'text'; it has no columns",
    b'{"text": 3.5}': "column 'text' must be a string, not a number; mend or remove the line",
    b'{"text": null}': "column 'text' must be a string, not null; mend or remove the line",
    b'{"text": true}': "column 'text' must be a string, not a boolean; mend or remove the line",
    b'{"text": "\\ud83d"}': "column 'text' holds half of a surrogate pair; mend or remove the line",
    b'{"text": ' + b"1" * 5000 + b"}": (
        "column 'text' must be a string, not a number; mend or remove the line"
    ),
    b'{"text": ' + b"[" * 5000 + b"]" * 5000 + b"}": (
        "column 'text' must be a string, not a list; mend or remove the line"
    ),
    b'{"text": "x", "n": ' + b"[" * 5000 + b"]" * 4999 + b"}": (
        "not valid JSON: Expecting ',' delimiter, nested deep; mend"
    ),
}


@pytest.mark.parametrize("line", JSONL_DAMAGE, ids=lambda line: line[:25].decode(errors="replace"))
def test_a_damaged_line_is_named_or_skipped(tmp_path, line):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "before"}\n\n' + line + b'\n{"text": "after"}\n')
    with pytest.raises(DataError) as caught:
        texts_of(path)
    assert str(caught.value).startswith(f"{path}:3: {JSONL_DAMAGE[line]}")
    assert "\n" not in str(caught.value)

    # Found at the same line when read in pieces, and what is around it is read all the same.
    skipped: list[DataError] = []
    assert texts_of(path, max_bytes=10, on_damage=skipped.append) == ["before", "after"]
    assert [str(error) for error in skipped] == [str(caught.value)]


def test_deeply_nested_json_is_damage_not_a_crash(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'{"text": ' + b"[" * 100_000)
    with pytest.raises(DataError, match=r"a\.jsonl:1: not valid JSON"):
        texts_of(tmp_path / "a.jsonl")


def test_surrogate_pairs_in_escapes_are_text(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "\\ud83d\\udd25"}')
    assert texts_of(tmp_path / "a.jsonl") == ["🔥"]


def test_text_that_is_not_utf8(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfabc\xe9t\xe9")
    with pytest.raises(
        DataError,
        match=rf"^{tmp_path}/a\.txt: not valid UTF-8 at byte 6; convert the file to UTF-8",
    ):
        texts_of(tmp_path / "a.txt")


@pytest.mark.parametrize("name", ["a.npy", "a.bin"])
def test_tokens_that_are_taken_for_text(tmp_path, name):
    (tmp_path / name).write_bytes(b"\xe9\x01")
    with pytest.raises(DataError, match=r"at byte 0; set token_dtype if it holds tokens \(docs"):
        texts_of(tmp_path / name)


@pytest.mark.parametrize(
    ("table", "message"),
    [
        (
            {"body": ["x"], "id": [1]},
            ": no column 'text'; its columns are: body, id (name one with text_column=...)",
        ),
        (
            {"text": [1, 2]},
            (
                ": column 'text' must hold strings, not int64; name another column with"
                " text_column=..."
            ),
        ),
        (
            {"text": ["x", None]},
            ": row 2: column 'text' must be a string, not null; mend or remove the row",
        ),
    ],
)
def test_parquet_without_text(tmp_path, table, message):
    pq.write_table(pa.table(table), tmp_path / "a.parquet")
    with pytest.raises(DataError, match=f"^{re.escape(str(tmp_path / 'a.parquet') + message)}$"):
        texts_of(tmp_path / "a.parquet")


def test_damaged_parquet(tmp_path):
    path = tmp_path / "a.parquet"
    path.write_bytes(b"PAR1 no parquet")
    with pytest.raises(
        DataError, match=r"a\.parquet: not a Parquet file: .*; fetch the file again$"
    ):
        texts_of(path)
    pq.write_table(
        pa.table({"text": [words(50, i) for i in range(500)]}),
        path,
        compression="zstd",
        row_group_size=100,
    )
    data = bytearray(path.read_bytes())
    data[len(data) // 2 : len(data) // 2 + 2000] = bytes(2000)
    path.write_bytes(data)
    with pytest.raises(
        DataError, match=r"a\.parquet: damaged after row \d+: .*; fetch the file again$"
    ):
        texts_of(path)


def test_a_file_that_vanishes(tmp_path):
    part = Slice(str(tmp_path / "gone.txt"), "text", 0, 3, 3)
    with pytest.raises(DataError, match=r"gone\.txt: cannot be read: No such file or directory$"):
        list(read_documents(part, "text"))


def test_samples_come_from_all_over_and_are_always_the_same(tmp_path):
    for i in range(40):
        write_jsonl(
            tmp_path / f"{i:02}.jsonl", [f"{i} " + words(40, i * 10 + j) for j in range(10)]
        )
    files = find_files([str(tmp_path)])
    everything = list(sample_texts(files, "text", None))
    assert len(everything) == 400
    size = sum(len(text) for text in everything)
    sample = list(sample_texts(files, "text", size // 4))
    assert sample == list(sample_texts(files, "text", size // 4))
    assert size // 4 <= sum(map(len, sample)) < size // 4 + 1000
    assert {int(text.split()[0]) // 20 for text in sample} == {
        0,
        1,
    }, "both halves of the files must be drawn from"


def make_dataset_folder(folder: Path) -> Path:
    (folder / "data").mkdir(parents=True)
    for i in range(3):
        write_jsonl(
            folder / "data" / f"train-0000{i}.jsonl", [words(5, i * 10 + j) for j in range(4)]
        )
    write_jsonl(folder / "data" / "test-00000.jsonl", ["held out"])
    return folder


def test_a_hugging_face_dataset_is_read_by_its_shards(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    path = hub.address(str(make_dataset_folder(tmp_path / "set")), None, "train")
    parts = slice_file(path, 1000)
    assert parts == [Slice(path, "dataset", i, i + 1, 1000) for i in range(3)]
    texts = [words(5, i * 10 + j) for i in range(3) for j in range(4)]
    assert [doc.text for part in parts for doc in read_documents(part, "text")] == texts
    assert [doc.position for doc in read_documents(parts[1], "text")] == [1, 2, 3, 4]
    with pytest.raises(
        DataError,
        match=r"\?split=train: no column 'body'; its columns are: text, id \(name one with",
    ):
        list(read_documents(parts[0], "body"))
    with pytest.raises(
        DataError,
        match=r"split=train: shard 0, row 1: column 'id' must be a string, not a number; name",
    ):
        list(read_documents(parts[0], "id"))


@pytest.mark.parametrize(
    ("source", "name", "split", "message"),
    [
        (
            "set",
            "xx",
            "train",
            (
                "set: cannot be opened as a dataset: BuilderConfig 'xx' not found. Available:"
                " ['default']"
            ),
        ),
        (
            "set",
            None,
            "tst",
            (
                "set: cannot be opened as a dataset: Bad split: tst. Available splits: ['train',"
                " 'test']"
            ),
        ),
        (
            "./none",
            None,
            "train",
            "./none: no such folder; with split=... it must be one, or a Hugging Face dataset id",
        ),
    ],
)
def test_a_dataset_that_is_not_there(tmp_path, monkeypatch, source, name, split, message):
    monkeypatch.chdir(tmp_path)
    make_dataset_folder(tmp_path / "set")
    with pytest.raises(ConfigError, match=f"^source: {re.escape(message)}$"):
        hub.open_source(hub.address(source, name, split))


def test_a_dataset_id_without_a_split_gets_a_hint():
    with pytest.raises(
        ConfigError,
        match=r"^source: some/set: no such file or folder; for a Hugging Face dataset give split=",
    ):
        find_files(["some/set"])


# Values that nobody reads, and Parquet


@pytest.mark.parametrize(
    "other",
    [
        b"1" * 5000,
        b"-" + b"9" * 5000,
        b"[" * 5000 + b"]" * 5000,
        b'{"a": ' * 5000 + b'"]}\\""' + b"}" * 5000,
        b'[{"n": [' + b"7" * 5000 + b"]}" + b"," + b"[" * 3000 + b"]" * 3000 + b"]",
    ],
    ids=["digits", "negative", "lists", "objects", "both"],
)
def test_values_that_nobody_reads_may_be_anything(tmp_path, other):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"a": ' + other + b', "text": "\\u00e4 [{", "n": 1}\n{"text": "after"}\n')
    assert texts_of(path) == ["ä [{", "after"]


@pytest.mark.parametrize("rows", [1, 40])
def test_a_page_of_parquet_with_a_wrong_checksum_is_damage(tmp_path, rows):
    path = tmp_path / "a.parquet"
    column = pa.array([f"text number {i:05}" for i in range(40)])
    pq.write_table(
        pa.table({"text": column}),
        path,
        row_group_size=rows,
        compression="none",
        use_dictionary=False,
        write_page_checksum=True,
        write_statistics=False,
        column_encoding={"text": "PLAIN"},
    )
    assert len(texts_of(path)) == 40
    data = path.read_bytes()
    path.write_bytes(data.replace(b"number 00017", b"number 00018", 1))
    skipped: list[DataError] = []
    with pytest.raises(
        DataError, match=rf"a\.parquet: damaged after row {17 // rows * rows}: .*CRC checksum"
    ):
        texts_of(path, on_damage=skipped.append)
    assert skipped == []


def test_an_empty_part_of_parquet_has_no_documents_whatever_its_types(tmp_path):
    for number, column in enumerate(
        (pa.nulls(0), pa.array([], pa.int64()), pa.array([], pa.string()))
    ):
        pq.write_table(pa.table({"text": column}), tmp_path / f"{number}.parquet")
        assert pq.ParquetFile(tmp_path / f"{number}.parquet").num_row_groups == 1, (
            "the reader must be asked"
        )
        assert texts_of(tmp_path / f"{number}.parquet") == []
    pq.write_table(pa.table({"other": pa.nulls(0)}), tmp_path / "none.parquet")
    assert texts_of(tmp_path / "none.parquet") == []


def test_nulls_without_a_type_are_damaged_rows(tmp_path):
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": pa.nulls(2)}), path)
    skipped: list[DataError] = []
    assert texts_of(path, on_damage=skipped.append) == []
    place = f"{path}: row {{}}: column 'text' must be a string, not null; mend or remove the row"
    assert [str(error) for error in skipped] == [place.format(1), place.format(2)]


def test_a_column_name_twice_is_named_unless_it_is_another(tmp_path):
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table([["x"], ["y"], ["z"]], names=["text", "id", "text"]), path)
    with pytest.raises(
        ConfigError,
        match=rf"^source: {path}: has 2 columns named 'text'; write it again with a name for each",
    ):
        texts_of(path)
    pq.write_table(pa.table([["x"], ["y"], ["z"]], names=["id", "text", "id"]), path)
    assert texts_of(path) == ["y"]
    pq.write_table(pa.table([["x"], ["y"]], names=["text.a", "text"]), path)
    assert texts_of(path) == ["y"]


def test_long_rows_of_parquet_are_unpacked_a_few_at_a_time(tmp_path, monkeypatch):
    path = tmp_path / "a.parquet"
    texts = [letter * (9 << 20) for letter in "abcdefg"]
    pq.write_table(pa.table({"text": texts}), path, use_dictionary=False, compression="zstd")
    sizes: list[int] = []
    iter_batches = pq.ParquetFile.iter_batches

    def note(self, batch_size, **kwargs):
        sizes.append(batch_size)
        return iter_batches(self, batch_size, **kwargs)

    monkeypatch.setattr(pq.ParquetFile, "iter_batches", note)
    assert texts_of(path) == texts
    assert sizes == [3]
