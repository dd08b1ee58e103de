"""convert/inspect_mds.py on real datasets, whole and broken, in a folder and in a real S3
server.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from streaming import MDSWriter
from streaming.base.storage import CloudDownloader

from flame_composer.config import cli
from flame_composer.config.convert import InspectConfig
from flame_composer.dataset import open as opening
from flame_composer.dataset import report, sample_row
from flame_composer.dataset.manifest import read_manifest
from flame_composer.dataset.mds import ROWS_AT_ONCE, BadShard, ShardView, add
from flame_composer.dataset.open import open_dataset
from flame_composer.dataset.survey import (
    Row,
    choose_shards,
    spread,
)
from flame_composer.quantities import format_bytes
from flame_composer.text.tokenizer import fingerprint
from tests.conftest import CONTEXT_LENGTH, make_dataset
from tests.data_fixtures import TEXTS, byte_tokenizer, llama_tokenizer, streaming_dataset
from tests.dataset.test_convert import ROOT, load_script

Result = tuple[int, str, str]


@pytest.fixture
def inspect(monkeypatch, capsys) -> Iterator[Callable[..., Result]]:
    """Runs the script in this process, which has paid for the imports: exit status, stdout,
    stderr.
    """
    main = load_script("inspect_mds").main
    handler = signal.getsignal(signal.SIGPIPE)

    def run(*arguments: object) -> Result:
        monkeypatch.setattr(sys, "argv", ["convert/inspect_mds.py", *map(str, arguments)])
        status = cli.run(main, InspectConfig)
        return status, *capsys.readouterr()

    yield run
    signal.signal(signal.SIGPIPE, handler)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    byte_tokenizer().save_pretrained(folder)
    return folder


def json_of(result: Result) -> dict[str, Any]:
    return json.loads(result[1].splitlines()[-1])


def rows_of(folder: Path) -> list[dict[str, Any]]:
    return list(streaming_dataset(folder))


def shards_of(folder: Path) -> list[Path]:
    return [
        folder / shard["raw_data"]["basename"]
        for shard in json.loads((folder / "index.json").read_bytes())["shards"]
    ]


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def test_numbers_are_those_that_streaming_reads(dataset, copy_of, inspect):
    folder = copy_of(dataset)
    rows, totals = rows_of(folder), read_manifest(str(folder)).totals
    status, out, err = result = inspect(f"data={folder}", "verify=true", "rows=0")
    assert (status, err) == (0, "")
    lengths = np.concatenate([row["doc_lengths"] for row in rows])
    summary = json_of(result)
    assert summary["document_pieces"] == len(lengths)
    assert summary["median_piece_length"] == int(np.quantile(lengths, 0.5, method="inverted_cdf"))
    assert summary["shards_verified"] == summary["shards_read"] == totals.shards > 3
    assert summary["bad_shards"] == {}
    assert (summary["rows"], summary["tokens_in"]) == (len(rows), totals.tokens_in)

    def count(low: int, high: int) -> str:
        return f"{np.sum((lengths >= low) & (lengths <= high)):,}"

    table = dict(
        re.findall(r"^ *([\d,-]+) +([\d,]+) +[\d.]+% +[\d.]+%", out.split("Rows:")[0], re.MULTILINE)
    )
    assert table == {
        "1": count(1, 1),
        "2-3": count(2, 3),
        "4-7": count(4, 7),
        "8-15": count(8, 15),
        "16-31": count(16, 31),
        "32": count(32, 32),
    }
    assert (
        f"{totals.tokens_in:,} tokens in = {totals.tokens_out:,} out + {totals.dropped:,} dropped"
        in out
    )
    assert "Every shard has the size and the hash it was written with." in out


@pytest.mark.parametrize(
    ("context_length", "num_rows", "most_pieces", "dtype"),
    [(4, ROWS_AT_ONCE + 5, 4, "uint16"), (300, 50, 300, "uint32"), (70000, 3, 70000, "uint16")],
)
def test_every_row_is_read_as_streaming_reads_it(
    tmp_path, context_length, num_rows, most_pieces, dtype
):
    """More rows than are looked at in one go; numbers of pieces that take one, two and four
    bytes.
    """
    choose = np.random.default_rng(context_length)
    columns = {"input_ids": f"ndarray:{dtype}:{context_length}", "doc_lengths": "ndarray:uint32"}
    with MDSWriter(columns=columns, out=str(tmp_path), size_limit=1 << 27) as writer:
        for row in range(num_rows):
            num_pieces = most_pieces if row == 0 else choose.integers(1, most_pieces + 1)
            borders = np.sort(
                choose.choice(np.arange(1, context_length), num_pieces - 1, replace=False)
            )
            writer.write(
                {
                    "doc_lengths": (
                        np.diff(borders, prepend=0, append=context_length).astype(np.uint32)
                    ),
                    "input_ids": choose.integers(0, 60000, context_length, dtype=dtype),
                }
            )
    rows = rows_of(tmp_path)
    shard = ShardView(
        tmp_path / "shard.00000.mds",
        num_rows=num_rows,
        context_length=context_length,
        token_dtype=dtype,
    )
    lengths, pieces, _ = shard.count()
    np.testing.assert_array_equal(
        lengths, np.bincount(np.concatenate([row["doc_lengths"] for row in rows]))
    )
    np.testing.assert_array_equal(pieces, np.bincount([len(row["doc_lengths"]) for row in rows]))
    for number in (0, num_rows // 2, num_rows - 1):
        input_ids, doc_lengths = shard.row(number)
        assert input_ids.dtype == dtype
        np.testing.assert_array_equal(input_ids, rows[number]["input_ids"])
        np.testing.assert_array_equal(doc_lengths, rows[number]["doc_lengths"])


def test_sample_rows_show_the_text_and_every_border(dataset, copy_of, inspect, tokenizer):
    folder = copy_of(dataset)
    rows = rows_of(folder)
    wanted = [next(i for i, row in enumerate(rows) if len(row["doc_lengths"]) == 3), 0]
    status, out, err = inspect(
        f"data={folder}",
        f"tokenizer={tokenizer}",
        f"row_numbers={wanted[0]},{wanted[1]}",
        "whole_rows=true",
    )
    assert (status, err) == (0, "")
    shown = re.findall(r"^Row ([\d,]+):.*\n((?:[┌├│].*\n)+)└", out, re.MULTILINE)
    assert [int(number) for number, _ in shown] == wanted
    for number, block in shown:
        row, start = rows[int(number)], 0
        texts: list[str] = []
        for line in block.splitlines():
            if line[0] == "│":
                texts[-1] += line[2:]
            else:
                length = int(row["doc_lengths"][len(texts)])
                span = (
                    f"tokens {start + 1}-{start + length}" if length > 1 else f"token {start + 1}"
                )
                assert line == f"{'├' if texts else '┌'}─ piece {len(texts) + 1}: {span} ".ljust(
                    100, "─"
                )
                texts.append("")
                start += length
        assert start == CONTEXT_LENGTH
        pieces = np.split(row["input_ids"], np.cumsum(row["doc_lengths"])[:-1])
        assert texts == [byte_tokenizer().decode(piece.tolist()) for piece in pieces]
        assert texts[0].endswith("<|endoftext|>")


def test_without_a_tokenizer_rows_are_ids(dataset, inspect):
    status, out, _ = inspect(f"data={dataset}", "row_numbers=1")
    assert status == 0
    block = out[out.index("Row 1:") :]
    ids = [
        int(number)
        for line in block.splitlines()
        if line[0:1] == "│"
        for number in line[2:].split()
    ]
    assert "(token ids; tokenizer=... shows text)" in block
    assert ids == rows_of(dataset)[1]["input_ids"].tolist()


def test_text_that_would_not_be_seen_is_made_visible():
    text = "a\tb\r\n\x1b[31m\x7f zero\u200bwidth \u202e\u2028 数据 e\u0301\n"
    lines = sample_row.show_row(
        Row(0, "s", np.zeros(1, np.uint16), np.array([1])), lambda _: text, whole=True
    )
    assert lines[2:-1] == [
        "│ a␉b␍␊",
        "│ ␛[31m␡ zero<U+200B>width <U+202E><U+2028>",
        "│  数据 e\u0301␊",
    ]
    assert all(report.visible(text).isprintable() for text in TEXTS)


def test_long_rows_are_shortened_and_fit_the_width():
    ids, lengths = np.arange(2000, dtype=np.uint16), np.array([100] * 20)
    lines = sample_row.show_row(
        Row(7, "s", ids, lengths), lambda ids: "数据 word\n" * len(ids), whole=False
    )
    assert len(lines) < 70
    assert lines[1].startswith("┌─ piece 1: tokens 1-100 ─")
    assert "├─ 14 pieces of 1,400 tokens left out ".ljust(100, "─") in lines
    assert any(line.startswith("├─ piece 20: tokens 1,901-2,000 ─") for line in lines)
    note = "... 93 lines left out (whole_rows=true shows them) ..."
    assert sum(note in line for line in lines) == 6
    whole = sample_row.show_row(Row(7, "s", ids, lengths), lambda ids: "数" * 200, whole=True)
    assert not any("left out" in line for line in whole)
    assert [len(line) for line in whole[2:8]] == [2 + 49] * 4 + [2 + 4, 100]


def test_what_fills_up_a_row_of_examples_is_named():
    ids, lengths, mask = np.zeros(8, np.uint16), np.array([3, 5]), np.arange(8) == 2
    for whole in (False, True):
        lines = sample_row.show_row(
            Row(0, "s", ids, lengths, mask), lambda ids: "<pad>" * len(ids), whole=whole
        )
        assert lines[2:4] == ["│ <pad><pad>", "┃ <pad>"]
        assert lines[4].startswith("├─ piece 2: tokens 4-8 ─")
        assert lines[5:-1] == ["│ padding"]


def test_long_rows_are_shown_whole_if_asked_for(inspect, tmp_path):
    make_dataset(tmp_path / "long", num_documents=60, context_length=512, shard_size=9000)
    shown = [
        inspect(f"data={tmp_path / 'long/out'}", f"whole_rows={whole}")[1]
        for whole in ("false", "true")
    ]
    assert ["left out" in out for out in shown] == [True, False]


def test_a_ledger_of_many_large_units_fits_the_width(dataset):
    opened = open_dataset(str(dataset))
    unit = opened.manifest.units[0]
    ledger = dataclasses.replace(
        unit.ledger,
        documents=9_672_101,
        tokens_in=10_123_456_789,
        tokens_out=10_123_456_000,
        carried_out=789,
        rows=4_943_093,
        shards=312,
    )
    units = tuple(dataclasses.replace(unit, name=f"{i:06}", ledger=ledger) for i in range(500))
    manifest = dataclasses.replace(opened.manifest, units=units, totals=ledger)
    lines = report.ledger_table(dataclasses.replace(opened, manifest=manifest))
    assert max(map(len, lines)) <= 100
    names = [line.split()[0] for line in lines if line.split()[0].isdecimal()]
    assert names == [f"{i:06}" for i in [*range(8), *range(496, 500)]]
    assert lines[0] == "Ledger (of 500 units, 488 are not shown)"


def test_what_the_dataset_is_takes_a_few_lines(dataset):
    opened = open_dataset(str(dataset))
    totals = dataclasses.replace(
        opened.manifest.totals,
        documents=1000,
        tokens_in=123_456,
        documents_short=3,
        documents_skipped=2,
    )
    config = {
        "source": ["corpus/\x1b[2J.jsonl"],
        "add_eos": True,
        "suffixes": [f".{i}" for i in range(40)],
    }
    manifest = dataclasses.replace(opened.manifest, totals=totals, config=config)
    lines = report.describe(dataclasses.replace(opened, manifest=manifest), "my_tokenizer")
    assert max(map(len, lines)) <= 100
    assert "".join(lines).isprintable()
    assert lines[0] == str(dataset)
    theirs = fingerprint(byte_tokenizer())
    assert " ".join("\n".join(lines[1:]).split()).startswith(
        f"split train rows {totals.rows} of 32 tokens (uint16), {totals.bytes / 1000:.3g} kB in"
        f" {totals.shards} shards documents 1,000, 123 tokens each on average; 3 of them were too"
        " short and were dropped; 2 more could not be read inputs 1 file,"
        f" {format_bytes(sum(part.num_bytes for part in manifest.units[0].inputs))} tokenizer"
        f" {theirs.sha256[:12]}: {theirs.vocab_size} tokens, bos 0, eos 0; matches my_tokenizer"
        f" encoder {manifest.units[0].encoder} settings add_eos=true "
    )


def truncate(folder: Path) -> None:
    shard = shards_of(folder)[1]
    shard.write_bytes(shard.read_bytes()[:-7])


def flip_token(folder: Path) -> None:
    flip(shards_of(folder)[1], -3)


def flip_length(folder: Path) -> None:
    """In the header of the first row's document lengths."""
    path = shards_of(folder)[1]
    begin = int(np.frombuffer(path.read_bytes()[4:8], np.uint32)[0])
    flip(path, begin + 6)


def flip_offset(folder: Path) -> None:
    flip(shards_of(folder)[1], 9)


def remove(folder: Path) -> None:
    shards_of(folder)[1].unlink()


# What is done to a dataset, and what is said of its second shard without verify (None: nothing is
# found) and with it.
HASHED = r"its xxh64 hash is [0-9a-f]{16}, must be [0-9a-f]{16}: the content has changed"
DAMAGE = {
    "truncated": (
        truncate,
        r"[\d,]+ bytes long, must be [\d,]+",
        r"[\d,]+ bytes long, must be [\d,]+",
    ),
    "missing": (remove, "missing", "missing"),
    "a token": (flip_token, None, HASHED),
    "a length": (flip_length, "the document lengths of its row 0 sum to 3[0-9], not 32", HASHED),
    "an offset": (flip_offset, "its row offsets are damaged", HASHED),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_every_bad_shard_is_named(dataset, copy_of, inspect, name):
    damage, plain, verified = DAMAGE[name]
    folder = copy_of(dataset)
    damage(folder)
    if name == "a token":
        flip(shards_of(folder)[2], 200)
    num_shards = len(shards_of(folder))
    for verify, expected in (("false", plain), ("true", verified)):
        names = [
            str(path.relative_to(folder))
            for path in shards_of(folder)[1 : 3 if name == "a token" else 2]
        ]
        status, out, err = result = inspect(f"data={folder}", "rows=1", f"verify={verify}")
        if expected is None:
            assert (status, err) == (0, "")
            continue
        assert status == 1
        bad = "".join(f"bad shard: {re.escape(shard)}: {expected}\n" for shard in names)
        error = (
            f"error: {re.escape(str(folder))}: {len(names)} of {num_shards} shards bad:"
            f" {', '.join(names)}; restore .*\n"
        )
        assert re.fullmatch(bad + error, err)
        summary = json_of(result)
        assert list(summary["bad_shards"]) == names
        assert summary["shards_read"] == num_shards - len(names)
        assert "Document pieces:" in out, "the others are looked at"


def test_a_shard_that_is_not_read_is_still_measured(dataset, copy_of, inspect):
    folder = copy_of(dataset)
    shards_of(folder)[0].unlink()
    status, out, err = result = inspect(f"data={folder}", "rows=0", "max_bytes=1")
    assert (status, json_of(result)["shards_read"]) == (1, 1)
    assert err.startswith("bad shard: units/000000/shard.00000.mds: missing\n")
    assert f", in 1 of {len(shards_of(folder))} shards" in out


def edit(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    content = json.loads(path.read_bytes())
    change(content)
    path.write_text(json.dumps(content))


def tampered_index(folder: Path) -> None:
    edit(folder / "index.json", lambda index: index["shards"].pop())


def outside_index(folder: Path) -> None:
    edit(
        folder / "index.json",
        lambda index: index["shards"][0]["raw_data"].update(basename="../../secret"),
    )


def tampered_ledger(folder: Path) -> None:
    edit(folder / "manifest.json", lambda manifest: manifest["totals"].update(tokens_in=1))


def tampered_totals(folder: Path) -> None:
    def change(manifest: dict[str, Any]) -> None:
        manifest["totals"]["bytes"] += 1
        manifest["units"][0]["ledger"]["bytes"] += 1

    edit(folder / "manifest.json", change)


def unfinished(folder: Path) -> None:
    (folder / "index.json").unlink()
    (folder / "manifest.json").rename(folder / "plan.json")


NOT_A_DATASET = {
    "no folder": (shutil.rmtree, 2, "DATA: no such folder"),
    "no dataset": (
        lambda f: (f / "manifest.json").unlink(),
        2,
        "DATA: no dataset made by convert/to_mds.py or to_sft.py (manifest.json is missing)",
    ),
    "unfinished": (
        unfinished,
        2,
        "DATA: an unfinished conversion (run the same command of convert/ again",
    ),
    "no index": (
        lambda f: (f / "index.json").unlink(),
        1,
        "DATA/index.json: missing; run the same command of convert/",
    ),
    "index": (
        tampered_index,
        1,
        "DATA/index.json: damaged: it is not the index that manifest.json was written with",
    ),
    "outside": (
        outside_index,
        1,
        "DATA/index.json: damaged: it names a file outside the dataset: '../../secret'",
    ),
    "manifest": (
        lambda f: (f / "manifest.json").write_text("{"),
        1,
        "DATA/manifest.json: damaged: not valid JSON",
    ),
    "ledger": (
        tampered_ledger,
        1,
        "DATA/manifest.json: damaged: its token ledger does not balance",
    ),
    "totals": (
        tampered_totals,
        1,
        "DATA/manifest.json: damaged: its totals (rows, shards, bytes) are ",
    ),
}


@pytest.mark.parametrize("name", NOT_A_DATASET)
def test_what_is_no_whole_dataset_is_refused_in_one_line(dataset, copy_of, inspect, name):
    prepare, status, message = NOT_A_DATASET[name]
    folder = copy_of(dataset)
    prepare(folder)
    found, out, err = inspect(f"data={folder}")
    assert (found, out) == (status, "")
    assert err.startswith(f"error: {message}".replace("DATA", str(folder)))
    assert err.count("\n") == 1


def test_mistakes_in_the_arguments(dataset, inspect, tmp_path):
    llama_tokenizer().save_pretrained(tmp_path / "llama")
    rows = read_manifest(str(dataset)).totals.rows
    for arguments, message in (
        (
            [f"tokenizer={tmp_path / 'llama'}"],
            (
                f"{dataset}: was made with another tokenizer than {tmp_path / 'llama'}"
                f" (vocab_size: {fingerprint(byte_tokenizer()).vocab_size} there,"
                f" {fingerprint(llama_tokenizer()).vocab_size} here); set tokenizer to the one it"
                " was converted with, or convert the text again"
            ),
        ),
        (["row_numbers=0,10000"], f"row_numbers: 10000: {dataset} has rows 0 to {rows - 1}"),
        (["row_numbers=-1"], "command line: row_numbers=[-1]: must all be 0 or more"),
        (["rows=-1"], "command line: rows=-1: must be 0 or more"),
        (["max_bytes=0"], "command line: max_bytes=0: must be more than 0 bytes, or null"),
        (
            ["plot=lengths.svg"],
            "command line: plot=lengths.svg: must be a file name ending in .png",
        ),
        (
            ["plot=/nowhere/a.png"],
            "plot: /nowhere/a.png: its folder does not exist; make it or name another",
        ),
    ):
        assert inspect(f"data={dataset}", *arguments) == (2, "", f"error: {message}\n")


def test_the_plot_is_a_png_with_something_on_it(dataset, inspect, tmp_path):
    status, out, _ = inspect(f"data={dataset}", "rows=0", f"plot={tmp_path / 'lengths.png'}")
    assert status == 0
    assert f"{tmp_path / 'lengths.png'}: the lengths of document pieces\n" in out
    with Image.open(tmp_path / "lengths.png") as image:
        assert image.format == "PNG"
        colors = image.convert("RGB").getcolors(1 << 20)
    drawn = {
        color: count for count, color in colors if color in ((0x88, 0xAA, 0xCC), (0xAA, 0x44, 0x22))
    }
    assert len(drawn) == 2
    assert min(drawn.values()) > 500


def test_spread_and_choice_of_shards(dataset):
    assert spread(2, 100) == [25, 75]
    assert spread(5, 3) == [0, 1, 2]
    assert spread(0, 3) == []
    files = open_dataset(str(dataset)).files
    assert (
        choose_shards(files, None)
        == choose_shards(files, sum(file.bytes for file in files))
        == set(range(len(files)))
    )
    assert len(choose_shards(files, 1)) == 1
    assert len(choose_shards(files, sum(file.bytes for file in files) // 2)) == len(files) // 2
    assert add(np.array([1, 2]), np.array([3, 4, 5])).tolist() == [4, 6, 5]


def test_in_a_process_of_its_own(dataset):
    """It needs none of the slow imports, a pipe that closes does not matter, nor a terminal that
    knows no Unicode.
    """
    code = (
        "import sys, runpy; sys.argv = sys.argv[1:]\ntry: runpy.run_path(sys.argv[0],"
        " run_name='__main__')\nfinally: sys.stderr.write(repr({'torch', 'streaming',"
        " 'transformers', 'matplotlib'} & set(sys.modules)))"
    )
    script = ROOT / "convert" / "inspect_mds.py"
    command = [sys.executable, "-c", code, script, f"data={dataset}", "verify=true"]
    result = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, "PYTHONIOENCODING": "ascii"}
    )
    assert (result.returncode, result.stderr) == (0, "set()")
    assert json.loads(result.stdout.splitlines()[-1])["bad_shards"] == {}
    pipe = '"$0" "$1" data="$2" rows=1000 whole_rows=true | head -1'
    piped = subprocess.run(
        ["bash", "-c", pipe, sys.executable, script, dataset], capture_output=True, text=True
    )
    assert (piped.stdout, piped.stderr) == (f"{dataset}\n", "")
    help_text = subprocess.run(
        [sys.executable, script, "--help"], capture_output=True, text=True
    ).stdout
    assert "  row_numbers: list[int] = []\n" in help_text


def test_in_an_object_store(dataset, copy_of, inspect, s3, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    folder = copy_of(dataset)
    remote = s3.upload(folder, "inspect-whole")
    arguments = [f"tokenizer={tokenizer}", "rows=3"]
    local, there = (
        inspect(f"data={folder}", *arguments, "verify=true"),
        inspect(f"data={remote}/", *arguments, "verify=true"),
    )
    assert (there[0], there[2]) == (0, "")
    assert there[1].replace(f"{remote}/", str(folder)) == local[1]
    status, out, err = result = inspect(f"data={remote}", "rows=0", "max_bytes=1")
    assert (status, err) == (0, "")
    assert (json_of(result)["shards_read"], json_of(result)["shards_verified"]) == (1, 1)
    assert f"1 of {len(shards_of(folder))} shards were downloaded" in out

    flip_token(folder)
    remove_at = shards_of(folder)[2]
    remove_at.unlink()
    remote = s3.upload(folder, "inspect-broken")
    status, out, err = result = inspect(f"data={remote}", "verify=true")
    assert status == 1
    bad, missing, error = err.splitlines()
    assert re.fullmatch(f"bad shard: units/000000/shard.00001.mds: {HASHED}", bad)
    assert missing.startswith(
        "bad shard: units/000000/shard.00002.mds: cannot be downloaded: there is no such file"
    )
    assert error.startswith(f"error: {remote}: 2 of {len(shards_of(folder))} shards bad: ")
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith("tmp")] == []

    for address in ("s3://data/nothing", "s3://no-such-bucket/x", "ftp://nowhere/x"):
        status, out, err = inspect(f"data={address}")
        assert (status, out, err.count("\n")) == (2, "", 1)
        assert err.startswith(f"error: {address}/manifest.json: cannot be downloaded: ")


def test_a_shard_without_end_is_not_downloaded_to_it(monkeypatch, tmp_path):
    """Clients of some stores write all that comes; the disk was filled."""

    def write_all(source: str, path: str) -> None:
        with Path(path).open("wb") as file:
            while True:
                file.write(b" " * (1 << 16))

    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    monkeypatch.setattr(CloudDownloader, "direct_download", write_all)
    with pytest.raises(BadShard, match=r"^longer than the 1,000,000 bytes it may have$"):
        opening.download_at_most("gs://data/file", tmp_path / "copy", 1_000_000)
    assert resource.getrlimit(resource.RLIMIT_FSIZE) == before
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) <= 1_000_000
