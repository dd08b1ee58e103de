"""Conversion from and to a real S3 server: what a user sees, and what is in the bucket
afterwards.
"""

from __future__ import annotations

import bz2
import gzip
import lzma
import re
from pathlib import Path

import pytest

from flame_composer.dataset import workers
from flame_composer.dataset.manifest import read_manifest
from flame_composer.dataset.writer import DatasetWriter
from flame_composer.errors import ConfigError, DataError
from flame_composer.storage import files, s3_client
from flame_composer.text.documents import read_documents
from flame_composer.text.sources import find_files, slice_files
from tests.data_fixtures import byte_tokenizer, files_under, words, write_jsonl
from tests.dataset.test_convert import run_here
from tests.s3 import BUCKET, Relay
from tests.text.test_formats import DOUBTFUL, RECOGNISED

# Converted in this process
ONE_UNIT = ("tokenizer=tokenizer", "context_length=64", "shard_size=20000", "encoder=hf")
COMMON = (*ONE_UNIT, "unit_size=9000")


@pytest.fixture
def folder(tmp_path, monkeypatch, s3) -> Path:
    """The current folder, with `source` (every format) and `tokenizer` in it; temporary files go
    to `staging`.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    monkeypatch.chdir(tmp_path)
    source = tmp_path / "source"
    (source / "deep").mkdir(parents=True)
    plain = write_jsonl(
        source / "a.jsonl", [words(1 + i * 37 % 400, i) for i in range(60)]
    ).read_bytes()
    packers = {
        ".gz": gzip.compress,
        ".bz2": bz2.compress,
        ".xz": lzma.compress,
        ".zst": lambda data: pa.Codec("zstd").compress(data, asbytes=True),
    }
    for number, (suffix, pack) in enumerate(packers.items()):
        (source / "deep" / f"b.jsonl{suffix}").write_bytes(
            pack(plain[: plain.index(b"\n", number * 9000) + 1])
        )
    pq.write_table(
        pa.table({"text": [words(50, 500 + i) for i in range(90)]}),
        source / "c.parquet",
        row_group_size=20,
    )
    (source / "d.txt").write_text(words(700, 900))
    (source / ".hidden.txt").write_text("hidden")
    byte_tokenizer().save_pretrained(tmp_path / "tokenizer")
    (tmp_path / "staging").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "staging"))
    return tmp_path


@pytest.fixture
def bucket(folder, s3) -> str:
    """A place of the test's own, with `source` in it."""
    s3.upload(folder / "source", f"{folder.name}/source")
    return f"s3://{BUCKET}/{folder.name}"


def objects(place: str) -> dict[str, bytes]:
    return {name: files.read(f"{place}/{name}") for name in files.find(place)}


def texts(paths: list[str], max_bytes: int) -> list[tuple[str, int, str]]:
    parts = slice_files(paths, max_bytes)
    return [
        (Path(d.path).name, d.position, d.text)
        for part in parts
        for d in read_documents(part, "text")
    ]


@pytest.mark.parametrize("max_bytes", [1000, 1 << 20])
def test_what_is_read_is_what_is_read_locally(bucket, max_bytes):
    local, remote = find_files(["source"]), find_files([f"{bucket}/source/"])
    assert remote == [f"{bucket}/{path}" for path in local]
    assert len(local) == 7
    documents = texts(remote, max_bytes)
    assert documents == texts(local, max_bytes)
    assert len(documents) > 200
    text, table = f"{bucket}/source/d.txt", f"{bucket}/source/c.parquet"
    assert find_files([f"{bucket}/source/*.txt", table]) == [text, table]
    assert find_files([f"{bucket}/source/**/.*.txt"]) == [f"{bucket}/source/.hidden.txt"]
    assert find_files([f"{bucket}/source"], [".parquet"]) == [table]
    assert {part.version is None for part in slice_files(remote, max_bytes)} == {False}


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("source/none", "no such file or folder"),
        ("source/*.nothing", "no file matches this pattern"),
        (
            "source/deep",
            r"this folder holds no file ending in \.x; name the endings to take with suffixes",
        ),
    ],
)
def test_sources_in_which_there_is_nothing(bucket, source, message):
    with pytest.raises(
        ConfigError,
        match=rf"^source: {bucket}/{source.replace('*', '.')}: {message}".replace("/./", "/."),
    ):
        find_files([f"{bucket}/{source}"], [".x"])


def test_a_dataset_is_the_same_in_a_store_and_in_a_folder(bucket, folder, monkeypatch, capsys, s3):
    arguments = (*ONE_UNIT, f"source={bucket}/source", "val_fraction=0.2", "seed=1")
    assert run_here(monkeypatch, "to_mds", *arguments, "out=local/train", "val_out=local/val") == 0
    assert (
        run_here(
            monkeypatch,
            "to_mds",
            *arguments,
            f"out={bucket}/out/train",
            f"val_out={bucket}/out/val",
        )
        == 0
    )
    assert objects(f"{bucket}/out") == files_under(folder / "local")
    assert files.ls(f"{bucket}/out/train") == ["index.json", "manifest.json", "units"]
    assert files_under(folder / "staging") == {}
    manifest = read_manifest(f"{bucket}/out/train")
    assert manifest.totals.shards > 3
    stats = files.find(f"{bucket}/source")
    assert {(part.path, part.version) for unit in manifest.units for part in unit.inputs} == {
        (f"{bucket}/source/{name}", stat.version)
        for name, stat in stats.items()
        if not name.startswith(".")
    }
    capsys.readouterr()

    # Again: nothing to do. Other settings, other inputs, another thing in that place: refused.
    before = files.find(f"{bucket}/out")
    assert (
        run_here(
            monkeypatch,
            "to_mds",
            *arguments,
            f"out={bucket}/out/train",
            f"val_out={bucket}/out/val",
        )
        == 0
    )
    out, err = capsys.readouterr()
    assert out.startswith(f"{bucket}/out/train: already finished, nothing to do\nsplit")
    assert (
        run_here(
            monkeypatch,
            "to_mds",
            *ONE_UNIT,
            f"source={bucket}/source",
            f"out={bucket}/out/train",
            "seed=2",
        )
        == 2
    )
    err = capsys.readouterr().err
    assert re.fullmatch(
        rf"error: out: {bucket}/out/train: holds a conversion with other settings: seed \(1 there,"
        r" 2 now\), "
        r"val_fraction \(0.2 there, 0.0 now\); name another out, or remove this folder\n",
        err,
    ), err
    files.write(f"{bucket}/source/d.txt", files.read(f"{bucket}/source/d.txt").upper())
    assert (
        run_here(
            monkeypatch,
            "to_mds",
            *arguments,
            f"out={bucket}/out/train",
            f"val_out={bucket}/out/val",
        )
        == 2
    )
    assert re.search(r"other settings: inputs \(\"7 files of .* now\);", capsys.readouterr().err)
    assert (
        run_here(monkeypatch, "to_mds", *ONE_UNIT, f"source={bucket}/source", f"out={bucket}") == 2
    )
    assert (
        f"out: {bucket}: this folder is not empty and holds no conversion"
        in capsys.readouterr().err
    )
    assert files.find(f"{bucket}/out") == before


@pytest.fixture
def without_a_pool(monkeypatch) -> None:
    """Units are converted in this process, for those of a pool have the environment of an
    earlier test.
    """

    def convert(conversion, numbers, num_workers, on_progress):
        converter = conversion.build_converter()
        yield from filter(
            None,
            (
                converter.convert(conversion.inputs(number), number, on_progress)
                for number in numbers
            ),
        )

    monkeypatch.setattr(workers, "_convert_on_pool", convert)


def begin(folder: Path, bucket: str, monkeypatch) -> None:
    """An interrupted conversion to `bucket`/out: its first units are committed, the source then
    breaks it off.
    """
    good = files.read(f"{bucket}/source/d.txt")
    files.write(f"{bucket}/source/d.txt", b"\xff" * len(good))
    assert (
        run_here(monkeypatch, "to_mds", *COMMON, f"source={bucket}/source", f"out={bucket}/out")
        == 1
    )
    files.write(f"{bucket}/source/d.txt", good)


def test_an_interrupted_conversion_goes_on(bucket, folder, without_a_pool, monkeypatch, capsys, s3):
    begin(folder, bucket, monkeypatch)
    error = capsys.readouterr().err
    assert f"{bucket}/source/d.txt: not valid UTF-8 at byte 0; convert the file" in error
    units = f"{bucket}/out/units"
    assert files.ls(f"{bucket}/out") == ["plan.json", "units"]
    committed = files.ls(units)
    assert len(committed) > 6

    # What kills leave behind, and what must not be taken for a unit.
    shard = f"{units}/000000/shard.00000.mds"
    files.write(shard, files.read(shard)[:-1])
    files.delete(f"{units}/000001/unit.json")
    files.write(f"{units}/000002/shard.00099.mds", b"left")
    files.write(f"{units}/000777/shard.00000.mds", b"left")
    first = files.read(f"{bucket}/source/a.jsonl").replace(b"a", b"b", 1)
    files.write(f"{bucket}/source/a.jsonl", first)
    begun = s3.client.create_multipart_upload(
        Bucket=BUCKET, Key=f"{folder.name}/out/units/000003/shard.00000.mds"
    )
    s3.client.upload_part(
        Bucket=BUCKET,
        Key=begun["Key"],
        UploadId=begun["UploadId"],
        PartNumber=1,
        Body=b"x" * (5 << 20),
    )
    untouched = files.stat(f"{units}/{committed[-2]}/unit.json")

    assert (
        run_here(monkeypatch, "to_mds", *COMMON, f"source={bucket}/source", f"out={bucket}/out")
        == 0
    )
    assert run_here(monkeypatch, "to_mds", *COMMON, f"source={bucket}/source", "out=local") == 0
    assert objects(f"{bucket}/out") == files_under(folder / "local")
    assert files.stat(f"{units}/{committed[-2]}/unit.json") == untouched, (
        "what was whole is not done again"
    )
    assert "Uploads" not in s3.client.list_multipart_uploads(
        Bucket=BUCKET, Prefix=f"{folder.name}/"
    )
    assert files_under(folder / "staging") == {}


def test_a_source_that_changes_while_it_is_read(bucket):
    (part,) = slice_files([f"{bucket}/source/d.txt"], 1 << 20)
    files.write(f"{bucket}/source/d.txt", b"x" * part.num_bytes)
    with pytest.raises(DataError, match=r"/d\.txt: has been replaced since it was looked at$"):
        list(read_documents(part, "text"))
    files.delete(f"{bucket}/source/d.txt")
    with pytest.raises(
        DataError, match=r"/source/d\.txt: cannot be read: No such file or directory$"
    ):
        list(read_documents(part, "text"))


def test_a_damaged_line_is_named_and_one_left_out_costs_no_reading(bucket, monkeypatch):
    lines = files.read(f"{bucket}/source/a.jsonl").splitlines(keepends=True)
    files.write(f"{bucket}/source/bad.jsonl", b"".join([*lines[:30], b"oops\n", *lines[30:]]))
    *_, last = slice_files([f"{bucket}/source/bad.jsonl"], 12000)
    errors: list[DataError] = []
    for part in slice_files([f"{bucket}/source/bad.jsonl"], 12000):
        assert list(read_documents(part, "text", errors.append)) or part == last
    assert [str(error) for error in errors] == [
        f"{bucket}/source/bad.jsonl:31: not valid JSON: Expecting value at column 1; mend or remove"
        " the line"
    ]


@pytest.mark.parametrize("name", [*RECOGNISED, *DOUBTFUL])
def test_a_file_is_told_by_its_bytes_as_it_is_locally(bucket, folder, name):
    data = (RECOGNISED | DOUBTFUL)[name][0]
    (folder / name).write_bytes(data)
    files.write(f"{bucket}/{name}", data)
    local, remote = slice_files([name], 1 << 20), slice_files([f"{bucket}/{name}"], 1 << 20)
    assert [(part.format, part.compression) for part in remote] == [
        (part.format, part.compression) for part in local
    ]
    texts = [
        [d.text for part in parts for d in read_documents(part, "text", lambda _: None)]
        for parts in (local, remote)
    ]
    assert texts[0] == texts[1]
    assert (texts[0] == []) == (name == "nothing.json")


def test_damage_to_a_later_stream_and_lines_that_are_too_long(bucket, folder):
    pack = bz2.compress(b'{"text": "a line"}\n' * 9)
    files.write(f"{bucket}/a.jsonl.bz2", pack + b"x" + pack[1:])
    files.write(f"{bucket}/b.jsonl.gz", b"")
    for name in ("a.jsonl.bz2", "b.jsonl.gz"):
        with pytest.raises(DataError, match=rf"{name}: damaged: .*; fetch the file again$"):
            texts([f"{bucket}/{name}"], 1 << 20)
    long = b'{"text": "' + b"w" * (3 << 20) + b'"}\n'
    (folder / "c.jsonl").write_bytes(
        b'{"text": "a"}\n' + long + b'{"text": "b"}\n' + long + b'{"text": "c"}'
    )
    s3_place = f"{bucket}/c.jsonl"
    files.put(folder / "c.jsonl", s3_place)
    for max_bytes in (1 << 30, 1 << 20):
        found = []
        for place in (s3_place, "c.jsonl"):
            skipped: list[DataError] = []
            documents = [
                (document.text, document.position)
                for part in slice_files([place], max_bytes)
                for document in read_documents(part, "text", skipped.append, 1 << 20)
            ]
            found.append((documents, [str(error).removeprefix(place) for error in skipped]))
        rule = (
            "longer than max_document_bytes=1048576; mend or remove the line, or raise"
            " max_document_bytes"
        )
        assert found[0] == found[1]
        assert found[0][1] == [f":2: {rule}", f":4: {rule}"]
        assert [text for text, _ in found[0][0]] == ["a", "b", "c"]


def test_a_tokenizer_learns_from_a_store(bucket, folder, monkeypatch, capsys):
    arguments = ("vocab_size=300", "max_bytes=20000")
    assert (
        run_here(
            monkeypatch, "train_tokenizer", f"source={bucket}/source", "out=remote", *arguments
        )
        == 0
    )
    assert run_here(monkeypatch, "train_tokenizer", "source=source", "out=local", *arguments) == 0
    assert (folder / "remote/tokenizer.json").read_bytes() == (
        folder / "local/tokenizer.json"
    ).read_bytes()
    capsys.readouterr()
    assert (
        run_here(
            monkeypatch, "train_tokenizer", f"source={bucket}/source", "out=remote", *arguments
        )
        == 0
    )
    assert capsys.readouterr().out == "remote: already trained, nothing to do\n"


# What the user has to put right


@pytest.mark.parametrize(
    ("environment", "place", "message"),
    [
        ({"AWS_SECRET_ACCESS_KEY": "wrong"}, f"s3://{BUCKET}/x", "access denied by http://"),
        (
            {"AWS_ACCESS_KEY_ID": "", "AWS_SECRET_ACCESS_KEY": ""},
            f"s3://{BUCKET}/x",
            "no credentials; set AWS_ACCESS_KEY_ID",
        ),
        ({}, "s3://nowhere/x", "there is no bucket 'nowhere' at http://"),
        (
            {"S3_ENDPOINT_URL": "http://127.0.0.1:1"},
            f"s3://{BUCKET}/x",
            "http://127.0.0.1:1 cannot be reached",
        ),
    ],
)
@pytest.mark.parametrize("key", ["source", "out"])
def test_a_store_that_cannot_be_used(folder, monkeypatch, capsys, key, environment, place, message):
    for name, value in {
        "AWS_EC2_METADATA_DISABLED": "true",
        "HOME": str(folder),
        **environment,
    }.items():
        if value:
            monkeypatch.setenv(name, value)
        else:
            monkeypatch.delenv(name, raising=False)
    places = {"source": "source", "out": "out", key: place}
    before = files_under(folder)
    assert (
        run_here(
            monkeypatch, "to_mds", *COMMON, *(f"{name}={value}" for name, value in places.items())
        )
        == 2
    )
    error = capsys.readouterr().err
    assert error.startswith(f"error: s3://{place.split('/')[2]}: {message}")
    assert error.count("\n") == 1
    assert files_under(folder) == before


def test_a_store_that_goes_away(folder, bucket, monkeypatch, capsys, s3):
    """The connection to the server is cut once the conversion has begun, and mended later."""
    monkeypatch.setattr(s3_client, "ATTEMPTS", 2)
    begin_unit = DatasetWriter.uncommitted
    with Relay(s3.endpoint) as line:
        monkeypatch.setenv("S3_ENDPOINT_URL", line.endpoint)
        monkeypatch.setattr(
            DatasetWriter, "uncommitted", lambda self: (begin_unit(self), line.cut())[0]
        )
        assert run_here(monkeypatch, "to_mds", *ONE_UNIT, "source=source", f"out={bucket}/out") == 1
    error = capsys.readouterr().err
    assert error.startswith(f"error: s3://{BUCKET}/{folder.name}/out/units/000000")
    assert error.endswith(
        "when that is mended, run the same command again: it goes on from the last finished unit\n"
    )
    assert error.count("\n") == 1
    monkeypatch.setenv("S3_ENDPOINT_URL", s3.endpoint)
    monkeypatch.setattr(DatasetWriter, "uncommitted", begin_unit)
    assert list(files.find(f"{bucket}/out")) == ["plan.json"]
    assert run_here(monkeypatch, "to_mds", *ONE_UNIT, "source=source", f"out={bucket}/out") == 0
    assert run_here(monkeypatch, "to_mds", *ONE_UNIT, "source=source", "out=local") == 0
    assert objects(f"{bucket}/out") == files_under(folder / "local")
