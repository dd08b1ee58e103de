"""convert/to_mds.py on tokens that others have made: the rows of the text they were made from."""

from __future__ import annotations

import gzip
import json
import os
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from flame_composer.dataset.manifest import read_manifest
from flame_composer.dataset.plan import is_newer
from flame_composer.errors import StoreError
from flame_composer.text.given_tokens import Vocabulary
from flame_composer.text.token_files import read_tokens, slice_tokens
from tests.data_fixtures import (
    byte_tokenizer,
    files_under,
    llama_tokenizer,
    rows_in,
    words,
    write_jsonl,
)
from tests.runs import Script, check, run_script
from tests.s3 import BUCKET, S3
from tests.text.test_token_borders import table, write_borders
from tests.text.test_token_files import fail, write_array, write_megatron

TEXTS = [words(1 + i * 7 % 60, i) for i in range(300)] + [""]
EOS = 0  # of byte_tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tokenizer, text, and its tokens as five kinds of files."""
    folder = tmp_path_factory.mktemp("given")
    tokenizer = byte_tokenizer()
    tokenizer.save_pretrained(folder / "tokenizer")
    write_jsonl(folder / "text.jsonl", TEXTS)
    documents = [tokenizer(text, add_special_tokens=False).input_ids for text in TEXTS]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tests.text.test_token_files.EOS", EOS)
        write_array(folder / "raw.npy", documents, "uint16")
        write_array(folder / "whole.npy", documents, "uint32", header=True)
        write_megatron(folder / "megatron.bin", documents, "int32")
        write_array(folder / "bordered.npy", documents, "uint16")
    write_borders(folder / "bordered.npy", table([len(each) + 1 for each in documents]))
    # Without an eos: only the borders tell where documents are
    flat = [token for each in documents for token in each]
    np.array(flat, "<u2").tofile(folder / "plain.npy")
    write_borders(folder / "plain.npy", table([len(each) for each in documents]))
    return folder


def convert(folder: Path, source: str, out: Path, *keys: str) -> Path:
    given = (f"source={folder}/{source}", f"tokenizer={folder}/tokenizer", f"out={out}")
    check(run_script("convert/to_mds.py", *given, "context_length=32", "num_workers=1", *keys))
    return out


def rows_of(place: Path) -> list[tuple[list[int], list[int]]]:
    """The tokens and document lengths of every row."""
    rows = (view.row(number) for view, number in rows_in(place))
    return [(tokens.tolist(), lengths.tolist()) for tokens, lengths in rows]


FILES = [
    ("raw.npy", "uint16", "eos"),
    ("whole.npy", "uint32", "eos"),
    ("megatron.bin", "int32", "eos"),
    ("bordered.npy", "uint16", "csv"),
    ("plain.npy", "uint16", "csv"),
]


@pytest.mark.parametrize(("name", "dtype", "borders"), FILES)
@pytest.mark.parametrize("ends", [(), ("add_bos=true",), ("add_eos=false", "max_doc_length=9")])
def test_the_same_rows_as_from_text(
    folder: Path, tmp_path: Path, name: str, dtype: str, borders: str, ends: tuple[str, ...]
) -> None:
    text = convert(folder, "text.jsonl", tmp_path / "text", *ends)
    keys = (f"token_dtype={dtype}", f"token_borders={borders}", *ends)
    tokens = convert(folder, name, tmp_path / "tokens", *keys)
    assert rows_of(tokens) == rows_of(text)
    ours, theirs = (read_manifest(str(place)) for place in (tokens, text))
    assert ours.totals.documents == theirs.totals.documents == len(TEXTS)
    assert ours.totals.tokens_in == theirs.totals.tokens_in
    assert ours.tokenizer == theirs.tokenizer
    assert ours.config["token_dtype"] == dtype
    assert ours.config.get("token_borders", "eos") == borders
    assert {record.encoder for record in ours.units} == {"given", None}
    assert "token_dtype" not in theirs.config, "manifests of text are as they always were"


@pytest.mark.parametrize("ends", [(), ("add_bos=true",)])
def test_a_bos_in_the_tokens_is_not_put_there_twice(tmp_path: Path, ends: tuple[str, ...]) -> None:
    """Nor does it stay where documents begin with none: the manifest would not say so."""
    tokenizer = llama_tokenizer()
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    write_jsonl(tmp_path / "text.jsonl", TEXTS)
    documents = [tokenizer(text).input_ids for text in TEXTS]
    assert {each[0] for each in documents} == {tokenizer.bos_token_id}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tests.text.test_token_files.EOS", tokenizer.eos_token_id)
        write_array(tmp_path / "a.npy", documents, "uint16")
        write_megatron(tmp_path / "a.bin", documents, "uint16")
    write_borders(tmp_path / "a.npy", table([len(each) + 1 for each in documents]))
    text = rows_of(convert(tmp_path, "text.jsonl", tmp_path / "text", *ends))
    for name, borders in (("a.npy", "eos"), ("a.npy", "csv"), ("a.bin", "eos")):
        keys = ("token_dtype=uint16", f"token_borders={borders}", *ends)
        assert rows_of(convert(tmp_path, name, tmp_path / f"{name}.{borders}", *keys)) == text


@pytest.mark.parametrize(("name", "borders"), [("raw.npy", "eos"), ("plain.npy", "csv")])
def test_units_and_splits_lose_nothing(
    folder: Path, tmp_path: Path, name: str, borders: str
) -> None:
    """The bytes depend neither on the number of workers nor on a run that stopped in the middle."""
    keys = ("token_dtype=uint16", "unit_size=900", "val_fraction=0.3", "seed=7")
    keys = (*keys, f"token_borders={borders}")
    given = (f"source={folder}/{name}", f"tokenizer={folder}/tokenizer", "context_length=32")
    outs = [tmp_path / name for name in ("one", "two", "stopped")]
    for out, number in zip(outs, (1, 2, 1), strict=True):
        more = (f"out={out}", f"val_out={out}.val", f"num_workers={number}")
        if out.name == "stopped":
            script = Script("convert/to_mds.py", *given, *keys, *more)
            while len(list(out.glob("units/*/unit.json"))) < 3 and script.process.is_alive():
                pass
            script.process.kill()
            script.wait()
            assert not (out / "index.json").exists()
        check(run_script("convert/to_mds.py", *given, *keys, *more))
    for out in outs[1:]:
        assert files_under(out) == files_under(outs[0])
        assert files_under(Path(f"{out}.val")) == files_under(Path(f"{outs[0]}.val"))
    manifests = [read_manifest(str(outs[0])), read_manifest(f"{outs[0]}.val")]
    assert len(manifests[0].units) > 10
    assert sum(each.totals.documents for each in manifests) == len(TEXTS)
    tokens = np.fromfile(folder / "raw.npy", "<u2")  # with the eos that each document gets
    assert sum(each.totals.tokens_in for each in manifests) == len(tokens)
    for each in manifests:
        totals = each.totals
        assert totals.tokens_in == totals.tokens_out + totals.dropped


@pytest.mark.parametrize(("name", "dtype", "borders"), FILES)
def test_in_a_store(
    folder: Path, tmp_path: Path, s3: S3, name: str, dtype: str, borders: str
) -> None:
    """Read from a bucket and written to one, by several units."""
    for path in folder.glob(f"{Path(name).stem}.*"):
        s3.client.upload_file(str(path), BUCKET, f"{tmp_path.name}/{path.name}")
    keys = (f"tokenizer={folder}/tokenizer", "context_length=32", "num_workers=1")
    keys = (*keys, f"token_dtype={dtype}", f"token_borders={borders}", "unit_size=4000")
    place = f"s3://{BUCKET}/{tmp_path.name}"
    for source, out in ((folder, tmp_path), (place, place)):
        given = (f"source={source}/{name}", f"out={out}/out", *keys)
        check(run_script("convert/to_mds.py", *given, env=s3.env))
    ours, theirs = read_manifest(str(tmp_path / "out")), read_manifest(f"{place}/out")
    assert len(ours.units) > 2
    assert ours.index_sha256 == theirs.index_sha256
    assert ours.totals == theirs.totals


@pytest.mark.parametrize(
    ("name", "dtype", "borders"), [("megatron.bin", "int32", "eos"), ("plain.npy", "uint16", "csv")]
)
def test_what_says_where_documents_are_is_pinned(
    folder: Path, tmp_path: Path, s3: S3, name: str, dtype: str, borders: Any
) -> None:
    """Another .idx or .csv.gz in a store is noticed, though it fits the same tokens."""
    place = f"s3://{BUCKET}/{tmp_path.name}"
    ending = {"eos": ".idx", "csv": ".csv.gz"}[borders]
    beside = folder / f"{Path(name).stem}{ending}"
    for path in (folder / name, beside):
        s3.client.upload_file(str(path), BUCKET, f"{tmp_path.name}/{path.name}")
    known = Vocabulary(dtype, 400, EOS)
    parts = slice_tokens([f"{place}/{name}"], known, 1 << 20, borders)
    keys = (f"source={place}/{name}", f"tokenizer={folder}/tokenizer", "context_length=32")
    keys = (*keys, "num_workers=1", f"token_dtype={dtype}", f"token_borders={borders}")
    keys = (*keys, "unit_size=4000", f"out={tmp_path}/out")
    check(run_script("convert/to_mds.py", *keys, env=s3.env))
    check(run_script("convert/to_mds.py", *keys, env=s3.env))

    # The first border between two documents is a token later
    data = beside.read_bytes()
    if borders == "csv":
        first, second, rest = gzip.decompress(data).decode().split("\r\n", 2)
        end = int(first.split(",")[1])
        moved = f"0,{end + 1},a,b,1\r\n{end + 1},{second.split(',')[1]},a,b,1\r\n{rest}"
        data = gzip.compress(moved.encode())
    else:
        count = int(np.frombuffer(data, "<u8", 1, 18)[0])
        numbers = np.frombuffer(data, np.uint8).copy()
        numbers[34:42].view("<i4")[:] += np.array([1, -1], "<i4")
        numbers[34 + 4 * count + 8 :][:8].view("<i8")[:] += 4
        data = numbers.tobytes()
    s3.client.put_object(Bucket=BUCKET, Key=f"{tmp_path.name}/{beside.name}", Body=data)
    assert slice_tokens([f"{place}/{name}"], known, 1 << 20, borders) != parts
    with pytest.raises(StoreError, match=f"{beside.name}: has been replaced since it was looked"):
        [list(read_tokens(part, known, fail, 1 << 20)) for part in parts]
    answer = run_script("convert/to_mds.py", *keys, env=s3.env)
    assert answer.returncode == 2
    assert "holds a conversion with other settings: inputs" in answer.stderr


def test_borders_that_change_on_a_disk_are_read_again(folder: Path, tmp_path: Path) -> None:
    """A unit that is committed is converted again where its .csv.gz is newer than it."""
    for name in ("plain.npy", "plain.csv.gz"):
        shutil.copy(folder / name, tmp_path / name)
    (part,) = slice_tokens(
        [f"{tmp_path}/plain.npy"], Vocabulary("uint16", 400, EOS), 1 << 30, "csv"
    )
    now = time.time()
    assert not is_newer((part,), now + 100)
    os.utime(tmp_path / "plain.csv.gz", (now + 200, now + 200))
    assert is_newer((part,), now + 100)
    (tmp_path / "plain.csv.gz").unlink()
    assert is_newer((part,), now + 1000)


def test_it_is_shown_like_any_other(folder: Path, tmp_path: Path) -> None:
    shown = run_script(
        "convert/inspect_mds.py",
        f"data={convert(folder, 'raw.npy', tmp_path / 'out', 'token_dtype=uint16')}",
        f"tokenizer={folder}/tokenizer",
        "verify=true",
        "row_numbers=[0]",
        "whole_rows=true",
    )
    check(shown)
    assert TEXTS[0] in shown.stdout


WRONG = {
    "token_borders=csv": "token_borders=csv: must be set together with token_dtype",
    "token_dtype=uint16 token_borders=eod": "token_borders=eod: must be one of ['eos', 'csv']",
    "token_dtype=uint16 token_borders=csv": "raw.npy: there is no",
    "token_dtype=uint64": "token_dtype=uint64: must be one of",
    "token_dtype=unit16": "'int32', 'uint32'], or null; did you mean uint16?",
    "token_dtype=uint16 split=train": "token_dtype=uint16: must not be set together with split",
    "token_dtype=uint16 encoder=hf": "encoder=hf: must not be set together with token_dtype",
    "token_dtype=uint32": "raw.npy: token 0 is",
    "token_dtyp=uint16": "did you mean token_dtype?",
    "token_dtype=uint16 source=[{folder}]": "a.bin: there is no",
    "token_dtype=uint16 source=[{folder}/text.jsonl]": (
        "text.jsonl: with token_dtype, names must end in .npy or .bin; unpack it first"
    ),
    "token_dtype=uint16 text_column=body": "text_column=body: must not be set together with",
    "token_dtype=uint16 source=[{folder}/tokenizer]": (
        "this folder holds no file ending in .npy, .bin; name the endings"
    ),
}


@pytest.mark.parametrize("keys", WRONG)
def test_what_is_wrong_is_one_line(folder: Path, tmp_path: Path, keys: str) -> None:
    source = tmp_path / "source"
    shutil.copytree(folder, source)
    (source / "a.bin").write_bytes(b"\0" * 10)
    out = tmp_path / "out"
    given = keys.format(folder=source).split()
    default = [] if "source=" in keys else [f"source={source}/raw.npy"]
    answer = run_script(
        "convert/to_mds.py", *default, f"tokenizer={folder}/tokenizer", f"out={out}", *given
    )
    assert answer.returncode == 2, answer.stderr
    assert answer.stderr.count("\n") == 1
    assert WRONG[keys] in answer.stderr
    assert not out.exists()


@pytest.mark.parametrize(("workers", "borders"), [(1, "eos"), (2, "eos"), (2, "csv")])
def test_a_wrong_token_in_the_middle_is_one_line(
    folder: Path, tmp_path: Path, workers: int, borders: str
) -> None:
    """Behind what is looked at before anything runs, and in a process of its own."""
    tokens = np.full(3 << 20, 5, "<u2")
    tokens[99::100] = EOS
    tokens[-7] = 60_000
    tokens.tofile(tmp_path / "a.npy")
    write_borders(tmp_path / "a.npy", table([100] * (len(tokens) // 100) + [len(tokens) % 100]))
    keys = (f"source={tmp_path}/a.npy", f"tokenizer={folder}/tokenizer", f"out={tmp_path}/out")
    more = (
        "token_dtype=uint16",
        f"token_borders={borders}",
        "unit_size=1000000",
        f"num_workers={workers}",
        "on_error=skip",
    )
    answer = run_script("convert/to_mds.py", *keys, *more)
    assert answer.returncode == 2
    last = answer.stderr.splitlines()[-1]
    assert last.startswith(f"error: tokenizer: {tmp_path}/a.npy: token 3,145,721 is 60000, and the")
    assert "Traceback" not in answer.stderr
    assert not (tmp_path / "out/index.json").exists()
    tokens[-7] = 5
    tokens.tofile(tmp_path / "a.npy")
    check(run_script("convert/to_mds.py", *keys, *more))
    # And the eos that the last document lacks
    assert read_manifest(str(tmp_path / "out")).totals.tokens_in == len(tokens) + 1


def test_a_tokenizer_without_eos_is_refused(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder / "tokenizer", tmp_path / "tokenizer")
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        path = tmp_path / "tokenizer" / name
        if path.exists():
            content = {k: v for k, v in json.loads(path.read_text()).items() if k != "eos_token"}
            path.write_text(json.dumps(content))
    answer = run_script(
        "convert/to_mds.py",
        f"source={folder}/raw.npy",
        f"tokenizer={tmp_path}/tokenizer",
        f"out={tmp_path}/out",
        "token_dtype=uint16",
        "add_eos=false",
    )
    assert answer.returncode == 2
    assert "tokenizer: it has no eos token, by which documents end" in answer.stderr
