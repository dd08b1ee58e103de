"""convert/train_tokenizer.py and convert/to_mds.py as a user runs them."""

from __future__ import annotations

import bz2
import gzip
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from transformers import AutoTokenizer

from flame_composer.config.cli import run
from flame_composer.config.convert import ConvertConfig, TokenizerTrainConfig
from flame_composer.dataset import finish, workers
from flame_composer.dataset.manifest import read_manifest
from flame_composer.dataset.open import check_shards, open_dataset
from flame_composer.dataset.writer import DatasetWriter
from flame_composer.loader.datasets import open_for_model
from flame_composer.storage.files import dump_json
from flame_composer.text.tokenizer import fingerprint, load_tokenizer
from tests.data_fixtures import (
    byte_tokenizer,
    files_under,
    streaming_dataset,
    words,
    write_configurations,
    write_jsonl,
)

ROOT = Path(__file__).parents[2]


def run_script(script: str, *arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(ROOT / "convert" / script), *arguments],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=120,
    )


def load_script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / "convert" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run_here(monkeypatch: pytest.MonkeyPatch, name: str, *arguments: str) -> int:
    """The script in this process, which has already paid for the imports; returns the exit
    status.
    """
    script = load_script(name)
    classes = {"to_mds": ConvertConfig, "train_tokenizer": TokenizerTrainConfig}
    monkeypatch.setattr(sys, "argv", [f"convert/{name}.py", *arguments])
    return run(script.main, classes[name])


@pytest.fixture
def corpus(tmp_path, monkeypatch) -> Path:
    """The current folder, with `source` (Python files, JSONL) and `tokenizer` in it."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "source" / "deep").mkdir(parents=True)
    for i in range(30):
        (tmp_path / "source" / "deep" / f"{i}.py").write_text(words(60, i))
    write_jsonl(tmp_path / "source" / "a.jsonl", [words(50, 100 + i) for i in range(20)])
    byte_tokenizer().save_pretrained(tmp_path / "tokenizer")
    return tmp_path


def test_folder_of_python_files_to_tokenizer_to_dataset(corpus):
    """The README's two commands, in processes of their own."""
    trained = run_script(
        "train_tokenizer.py",
        "source=source",
        "suffixes=[.py]",
        "out=tok",
        "vocab_size=300",
        cwd=corpus,
    )
    assert (trained.returncode, trained.stderr) == (0, "")
    assert trained.stdout == "tok: 300 tokens learnt from 30 documents (0 skipped)\n"
    tokenizer = load_tokenizer("tok")
    assert len(tokenizer) == 300

    command = (
        "source=source",
        "suffixes=[.py]",
        "out=data/train",
        "val_out=data/val",
        "val_fraction=0.2",
        "tokenizer=tok",
        "context_length=32",
    )
    converted = run_script("to_mds.py", *command, cwd=corpus)
    assert (converted.returncode, converted.stderr) == (0, "")
    manifests = {split: read_manifest(f"data/{split}") for split in ("train", "val")}
    assert sum(manifest.totals.documents for manifest in manifests.values()) == 30
    totals = manifests["train"].totals
    header, train, val, rate = converted.stdout.splitlines()
    assert re.split("  +", header.strip()) == [
        "split",
        "documents",
        "skipped",
        "short",
        "tokens in",
        "tokens out",
        "dropped",
        "rows",
        "shards",
        "bytes",
    ]
    assert train.split() == [
        "train",
        str(totals.documents),
        "0",
        "0",
        f"{totals.tokens_in:,}",
        f"{totals.tokens_out:,}",
        str(totals.dropped),
        str(totals.rows),
        "1",
        f"{totals.bytes:,}",
    ]
    assert val.split()[:2] == ["val", str(manifests["val"].totals.documents)]
    assert re.fullmatch(
        r"[\d,]+ tokens in \d+\.\d s: [\d,]+ tokens/s \((gigatoken [\d.]+|hf)\)", rate
    )
    for split, manifest in manifests.items():
        assert manifest.split == split
        assert manifest.tokenizer == fingerprint(tokenizer)
        assert (manifest.config["source"], manifest.config["add_eos"]) == (["source"], True)
        check_shards(open_dataset(f"data/{split}"))

    rows = streaming_dataset("data/train")
    stream = [token for row in rows for token in row["input_ids"].tolist()]
    texts = tokenizer.decode(stream).split("<|endoftext|>")
    assert len(texts) in (totals.documents, totals.documents + 1)
    assert set(texts[:-1]) <= {path.read_text() for path in (corpus / "source").rglob("*.py")}

    before = files_under(corpus / "data")
    again = run_script("to_mds.py", *command, cwd=corpus)
    assert (again.returncode, again.stderr) == (0, "")
    assert again.stdout.startswith("data/train: already finished, nothing to do\nsplit")
    assert files_under(corpus / "data") == before


def test_jsonl_parquet_and_text_together_with_comma_separated_sources(corpus, monkeypatch, capsys):
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(
        pa.table({"body": [words(40, i) for i in range(9)], "text": ["x"] * 9}),
        corpus / "b.parquet",
    )
    write_jsonl(corpus / "c.jsonl", ["x"])
    (corpus / "c.jsonl").write_text(json.dumps({"body": "one document"}) + "\n")
    arguments = [
        "source=b.parquet,c.jsonl,source/deep/*.py",
        "text_column=body",
        "tokenizer=tokenizer",
        "context_length=64",
    ]
    assert run_here(monkeypatch, "to_mds", *arguments, "out=out") == 0
    assert read_manifest("out").totals.documents == 9 + 1 + 30
    assert run_here(monkeypatch, "to_mds", *arguments, "out=other", "unit_size=3000") == 0
    assert read_manifest("other").totals.tokens_in == read_manifest("out").totals.tokens_in
    assert len(read_manifest("other").units) > len(read_manifest("out").units)


def test_a_hugging_face_dataset_equals_its_files(corpus, monkeypatch, capsys):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (corpus / "set").mkdir()
    write_jsonl(corpus / "set" / "train.jsonl", [words(50, i) for i in range(20)])
    write_jsonl(corpus / "set" / "test.jsonl", ["another"])
    arguments = ["tokenizer=tokenizer", "context_length=64"]
    assert run_here(monkeypatch, "to_mds", *arguments, "source=set", "split=train", "out=out") == 0
    assert run_here(monkeypatch, "to_mds", *arguments, "source=set/train.jsonl", "out=files") == 0
    shards = [
        (corpus / out / "units" / "000000" / "shard.00000.mds").read_bytes()
        for out in ("out", "files")
    ]
    assert shards[0] == shards[1]
    assert run_here(monkeypatch, "to_mds", *arguments, "source=set", "split=train", "out=out") == 0
    assert "out: already finished" in capsys.readouterr().out
    write_configurations(corpus / "named", one=[words(50, i) for i in range(20)], two=["another"])
    assert (
        run_here(
            monkeypatch,
            "to_mds",
            *arguments,
            "source=named",
            "split=train",
            "name=one",
            "out=named_out",
        )
        == 0
    )
    assert (corpus / "named_out/units/000000/shard.00000.mds").read_bytes() == shards[0]
    assert (
        run_here(monkeypatch, "to_mds", *arguments, "source=set", "name=default", "out=other") == 2
    )
    assert "split: must be set together with name, e.g. split=train" in capsys.readouterr().err


def test_what_keys_make_of_documents(corpus, monkeypatch):
    write_jsonl(corpus / "d.jsonl", [words(1 + 7 * i % 40, i) for i in range(40)])
    arguments = ["source=d.jsonl", "tokenizer=tokenizer", "context_length=64", "num_workers=1"]
    keys = [
        "add_bos=true",
        "add_eos=false",
        "max_doc_length=20",
        "min_doc_length=9",
        "shard_size=1600",
    ]
    convert_units, processes = workers.convert_units, []
    monkeypatch.setattr(
        finish, "convert_units", lambda *given: processes.append(given[2]) or convert_units(*given)
    )
    assert run_here(monkeypatch, "to_mds", *arguments, "num_workers=3", "out=plain") == 0
    assert run_here(monkeypatch, "to_mds", *arguments, *keys, "out=keys") == 0
    assert run_here(monkeypatch, "to_mds", *arguments, *keys, "seed=3", "out=shuffled") == 0
    assert processes == [3, 1, 1]
    plain, ours = read_manifest("plain").totals, read_manifest("keys").totals
    streams = {
        out: [row["input_ids"].tolist() for row in streaming_dataset(out)]
        for out in ("plain", "keys", "shuffled")
    }
    assert (plain.documents_short, plain.documents) == (0, 40)
    assert 0 < ours.documents_short < 40
    assert max(length for row in streaming_dataset("plain") for length in row["doc_lengths"]) > 20
    assert max(length for row in streaming_dataset("keys") for length in row["doc_lengths"]) == 20
    assert (plain.shards, ours.shards > 1) == (1, True)
    assert streams["plain"][0][0] != 0, "the number of bos and eos"
    assert streams["keys"][0][0] == 0
    assert 30 < sum(row.count(0) for row in streams["keys"]) <= 40 - ours.documents_short, (
        "bos before each, eos after none"
    )
    assert streams["shuffled"] != streams["keys"]
    totals = [vars(read_manifest(out).totals) for out in ("shuffled", "keys")]
    assert all(
        totals[0][name] == totals[1][name] for name in ("documents", "tokens_in", "tokens_out")
    )


def test_a_tokenizer_of_ones_own_making(corpus, monkeypatch):
    lines = [{"body": word, "text": "never"} for word in ("zqx", "zqx", "zqx", "wvw", "wvw")]
    (corpus / "body.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    keys = ("text_column=body", "min_frequency=3", "eos_token=<end>", "vocab_size=300")
    assert run_here(monkeypatch, "train_tokenizer", "source=body.jsonl", "out=own", *keys) == 0
    tokenizer = load_tokenizer("own")
    assert (tokenizer.eos_token, tokenizer.bos_token) == ("<end>", "<end>")
    assert tokenizer.tokenize("zqx") == ["zqx"]
    assert tokenizer.tokenize("wvw") == ["w", "v", "w"], "which is not in there often enough"


def test_two_conversions_with_a_tokenizer_that_draws_lots_are_the_same(corpus, monkeypatch, caplog):
    """And are those without its dropout; a dataset that was made with it before is still one of
    this tokenizer.
    """
    path = corpus / "tokenizer" / "tokenizer.json"
    content = json.loads(path.read_bytes())
    arguments = (
        "source=source/a.jsonl",
        "tokenizer=tokenizer",
        "context_length=64",
        "num_workers=1",
    )
    assert run_here(monkeypatch, "to_mds", *arguments, "out=without") == 0
    content["model"]["dropout"] = 0.3
    path.write_text(json.dumps(content))
    for out in ("one", "two"):
        assert run_here(monkeypatch, "to_mds", *arguments, f"out={out}") == 0
    assert [message.count("dropout") for message in caplog.messages] == [1, 1]
    rows = [
        [row["input_ids"].tolist() for row in streaming_dataset(out)]
        for out in ("without", "one", "two")
    ]
    assert rows[0] == rows[1] == rows[2]
    assert files_under(corpus / "one") == files_under(corpus / "two")
    as_it_was = AutoTokenizer.from_pretrained(corpus / "tokenizer")
    assert as_it_was.backend_tokenizer.model.dropout == pytest.approx(0.3)
    assert read_manifest("one").tokenizer == fingerprint(as_it_was)
    open_for_model("one", None, tokenizer=load_tokenizer("tokenizer"), context_length=64)


def test_a_finished_dataset_whose_totals_are_not_those_of_its_index_is_damaged(
    corpus, monkeypatch, capsys
):
    arguments = ("source=source", "tokenizer=tokenizer", "context_length=64", "out=out")
    arguments = (*arguments, "suffixes=[.py]")
    assert run_here(monkeypatch, "to_mds", *arguments) == 0
    path = corpus / "out" / "manifest.json"
    manifest = json.loads(path.read_bytes())
    manifest["totals"]["bytes"] += 1
    manifest["units"][0]["ledger"]["bytes"] += 1
    path.write_text(json.dumps(manifest))
    capsys.readouterr()
    assert run_here(monkeypatch, "to_mds", *arguments) == 1
    told = capsys.readouterr()
    assert told.err.startswith(
        "error: out/manifest.json: damaged: its totals (rows, shards, bytes)"
    )
    assert told.err.count("\n") == 1


def test_skipping_what_cannot_be_read(corpus, monkeypatch, capsys):
    (corpus / "source" / "bad.py").write_bytes(b"caf\xe9")
    arguments = [
        "source=source",
        "suffixes=[.py]",
        "tokenizer=tokenizer",
        "context_length=64",
        "out=out",
    ]
    assert run_here(monkeypatch, "to_mds", *arguments) == 1
    assert (
        capsys.readouterr().err
        == "error: source/bad.py: not valid UTF-8 at byte 3; convert the file to UTF-8 or remove"
        " it\n"
    )
    assert not (corpus / "out" / "index.json").exists()
    assert run_here(monkeypatch, "to_mds", *arguments, "on_error=skip") == 0
    assert capsys.readouterr().out.splitlines()[1].split()[:3] == ["train", "30", "1"]
    assert (
        run_here(
            monkeypatch,
            "train_tokenizer",
            *arguments[:2],
            "out=tok",
            "vocab_size=300",
            "on_error=skip",
        )
        == 0
    )
    assert capsys.readouterr().out == "tok: 300 tokens learnt from 30 documents (1 skipped)\n"


def test_a_line_that_is_too_long(corpus, monkeypatch, capsys):
    long = json.dumps({"text": "x" * 5000}) + "\n"
    (corpus / "source" / "a.jsonl").write_text(json.dumps({"text": words(50, 1)}) + "\n" + long)
    arguments = ["source=source/a.jsonl", "tokenizer=tokenizer", "context_length=64", "out=out"]
    assert run_here(monkeypatch, "to_mds", *arguments, "max_document_bytes=5000") == 1
    assert (
        capsys.readouterr().err
        == "error: source/a.jsonl:2: longer than max_document_bytes=5000; mend or remove the line,"
        " or raise max_document_bytes\n"
    )
    assert (
        run_here(monkeypatch, "to_mds", *arguments, "max_document_bytes=5000", "on_error=skip") == 0
    )
    assert capsys.readouterr().out.splitlines()[1].split()[:3] == ["train", "1", "1"]
    assert run_here(monkeypatch, "to_mds", *arguments) == 2
    assert (
        "other settings: max_document_bytes (5000 there, 67108864 now); name another out"
        in capsys.readouterr().err
    )
    assert run_here(monkeypatch, "to_mds", *arguments[:3], "out=all") == 0
    assert read_manifest("all").totals.documents == 2
    keys = (
        "source=source/a.jsonl",
        "out=tok",
        "vocab_size=257",
        "max_document_bytes=5000",
        "on_error=skip",
    )
    assert run_here(monkeypatch, "train_tokenizer", *keys) == 0
    assert "tok: 257 tokens learnt from 1 documents (1 skipped)\n" in capsys.readouterr().out


MIXED = (
    "tokenizer=tokenizer",
    "context_length=64",
    "unit_size=1500",
    "encoder=hf",
    "num_workers=1",
)


@pytest.fixture
def mixed(corpus) -> Path:
    """Besides the corpus, a folder of four work units, one a file, and the dataset `whole` made
    of them.
    """
    folder = corpus / "mixed"
    folder.mkdir()
    lines = [
        write_jsonl(folder / "a.jsonl", [words(50, seed * 10 + i) for i in range(8)]).read_bytes()
        for seed in range(4)
    ]
    (folder / "a.jsonl").write_bytes(b"".join(lines[0].splitlines(keepends=True)[:5]))
    (folder / "b.json").write_bytes(b"\n".join(lines[1].splitlines()[:4]))
    (folder / "c.jsonl.bz2").write_bytes(bz2.compress(lines[2] * 2))
    (folder / "d.jsonl.gz").write_bytes(gzip.compress(lines[3] * 2, mtime=0))
    return folder


def as_an_earlier_version_left_it(out: Path, units: dict[str, dict[str, Any]]) -> None:
    """Its manifest does not say what the compressed files were unpacked as, nor how long lines
    may be.
    """
    for path in (out / "manifest.json", out / "plan.json"):
        content = json.loads(path.read_bytes())
        del content["config"]["max_document_bytes"]
        for part in [
            part
            for unit in content["units"]
            for part in (unit["inputs"] if isinstance(unit, dict) else unit)
        ]:
            del part["compression"]
            part |= units.get(Path(part["path"]).name, {})
        path.write_bytes(dump_json(content))
    for path in out.glob("units/*/unit.json"):
        content = json.loads(path.read_bytes())
        for part in content["record"]["inputs"]:
            del part["compression"]
            part |= units.get(Path(part["path"]).name, {})
        path.write_bytes(dump_json(content))


def test_a_conversion_that_an_earlier_version_began_or_finished(corpus, mixed, monkeypatch, capsys):
    files = ",".join(str(path) for path in sorted(mixed.iterdir()))
    arguments = (*MIXED, f"source={files}")
    assert run_here(monkeypatch, "to_mds", *arguments, "out=whole") == 0
    names = [
        [Path(part.path).name for part in unit.inputs] for unit in read_manifest("whole").units
    ]
    assert names == [["a.jsonl"], ["b.json"], ["c.jsonl.bz2"], ["d.jsonl.gz"], []], "each is a unit"
    began: list[bytes] = []
    begin = DatasetWriter.begin

    def begin_and_note(self):
        begin(self)
        began.append(Path(self.out, "plan.json").read_bytes())

    monkeypatch.setattr(DatasetWriter, "begin", begin_and_note)
    assert run_here(monkeypatch, "to_mds", *arguments, "out=out") == 0
    whole = files_under(corpus / "whole")
    (corpus / "out/plan.json").write_bytes(began[0])
    as_an_earlier_version_left_it(corpus / "out", {"b.json": {"format": "text"}})
    capsys.readouterr()

    # Finished: what was read as something else is no longer this conversion, and is named; the rest
    # is as good as new.
    (corpus / "out/plan.json").rename(corpus / "plan.json")
    assert run_here(monkeypatch, "to_mds", *arguments, "out=out") == 2
    error = capsys.readouterr().err
    assert re.search(
        r"other settings: formats \(\"3 jsonl, 1 text, hash .*\" there, \"4 jsonl, hash .*\" now\);"
        r" name",
        error,
    )
    without = (*MIXED, f"source={files.replace(str(mixed / 'b.json') + ',', '')}")
    assert run_here(monkeypatch, "to_mds", *without, "out=three") == 0
    (corpus / "three/plan.json").write_bytes(began[-1])
    as_an_earlier_version_left_it(corpus / "three", {})
    (corpus / "three/plan.json").unlink()
    capsys.readouterr()
    assert run_here(monkeypatch, "to_mds", *without, "out=three") == 0
    assert capsys.readouterr().out.startswith("three: already finished, nothing to do\n")

    # Begun: units of bz2 and xz, of which some may have been passed over, and of what was another
    # format, are made again.
    (corpus / "plan.json").rename(corpus / "out/plan.json")
    for name in ("index.json", "manifest.json"):
        (corpus / "out" / name).unlink()
    before = {
        unit: (corpus / "out/units" / unit / "unit.json").stat().st_mtime_ns
        for unit in os.listdir(corpus / "out/units")
    }
    assert run_here(monkeypatch, "to_mds", *arguments, "out=out") == 0
    after = {
        unit: (corpus / "out/units" / unit / "unit.json").stat().st_mtime_ns for unit in before
    }
    assert [unit for unit in sorted(before) if before[unit] == after[unit]] == ["000000", "000003"]
    shards = {name for name in whole if name.endswith(".mds")} | {"index.json", "manifest.json"}
    assert {name: files_under(corpus / "out")[name] for name in shards} == {
        name: whole[name] for name in shards
    }


def test_a_folder_with_files_that_are_empty_or_damaged(corpus, mixed, monkeypatch, capsys):
    """No unit of it is converted where that shows at once, and nothing is published where it
    shows later.
    """
    arguments = (*MIXED, "source=mixed", "out=out", "on_error=skip")
    (mixed / "e.jsonl.xz").write_bytes(b"")
    assert run_here(monkeypatch, "to_mds", *arguments) == 1
    assert (
        capsys.readouterr().err
        == "error: mixed/e.jsonl.xz: damaged: it is empty, which no compressed file is; fetch the"
        " file again\n"
    )
    assert not (corpus / "out").exists()
    (mixed / "e.jsonl.xz").unlink()
    (mixed / "f.jsonl").write_bytes(b"")
    whole = (mixed / "c.jsonl.bz2").read_bytes()
    (mixed / "c.jsonl.bz2").write_bytes(whole + b"x" + whole[1:])
    assert run_here(monkeypatch, "to_mds", *arguments) == 1
    error = capsys.readouterr().err
    assert error == "error: mixed/c.jsonl.bz2: damaged: Invalid data stream; fetch the file again\n"
    assert not (corpus / "out" / "index.json").exists()
    (mixed / "c.jsonl.bz2").write_bytes(whole + whole)
    assert run_here(monkeypatch, "to_mds", *arguments) == 0
    assert capsys.readouterr().out.splitlines()[1].split()[1:3] == [
        str(5 + 32 + 16),
        "0",
    ], "but for b.json"


def bad_json(folder: Path) -> None:
    (folder / "source" / "a.jsonl").write_text('{"text": "fine"}\n{"text": oops}\n')


def bad_utf8(folder: Path) -> None:
    (folder / "source" / "bad.txt").write_bytes(b"\xff")


def no_eos(folder: Path) -> None:
    path = folder / "tokenizer" / "tokenizer_config.json"
    content = json.loads(path.read_bytes())
    path.write_text(
        json.dumps({key: value for key, value in content.items() if key != "eos_token"})
    )
    (folder / "tokenizer" / "special_tokens_map.json").unlink(missing_ok=True)


def finished_with_64(folder: Path) -> None:
    arguments = ["source=source", "out=out", "tokenizer=tokenizer", "context_length=64"]
    assert run_here(pytest.MonkeyPatch(), "to_mds", *arguments) == 0


def truncated_shard(folder: Path) -> None:
    finished_with_64(folder)
    shard = folder / "out" / "units" / "000000" / "shard.00000.mds"
    shard.write_bytes(shard.read_bytes()[:100])


def unrelated_out(folder: Path) -> None:
    (folder / "out").mkdir()
    (folder / "out" / "thesis.tex").write_text("mine")


def nothing(folder: Path) -> None:
    pass


BAD_INPUT = {
    "missing source": (nothing, ["source=nowhere"], 2, "source: nowhere: no such file or folder"),
    "empty source": (
        lambda f: (f / "none").mkdir(),
        ["source=none"],
        2,
        (
            "source: none: this folder holds no file ending in .jsonl, .json-lines, .ndjson,"
            " .parquet, .txt (or compressed, .gz, .gzip, .zst, .zstd, .bz2, .xz); name the endings"
            " to take with suffixes=[...]"
        ),
    ),
    "no match": (
        nothing,
        ["source=source/*.csv"],
        2,
        "source: source/*.csv: no file matches this pattern",
    ),
    "malformed line": (
        bad_json,
        [],
        1,
        "source/a.jsonl:2: not valid JSON: Expecting value at column 10; mend or remove the line",
    ),
    "missing column": (
        nothing,
        ["text_column=body"],
        1,
        (
            "source/a.jsonl:1: no column 'body'; its columns are: text, id "
            "(name one with text_column=...)"
        ),
    ),
    "bad UTF-8": (
        bad_utf8,
        [],
        1,
        "source/bad.txt: not valid UTF-8 at byte 0; convert the file to UTF-8 or remove it",
    ),
    "missing tokenizer": (
        nothing,
        ["tokenizer=./tok"],
        2,
        "tokenizer: ./tok: no such folder; give a Hugging Face tokenizer folder or hub id",
    ),
    "no eos": (
        no_eos,
        [],
        2,
        "add_eos: the tokenizer has no eos token; set add_eos=false or give it one",
    ),
    "other settings": (
        finished_with_64,
        ["context_length=32"],
        2,
        (
            "out: out: holds a conversion with other settings: "
            "context_length (64 there, 32 now); name another out, or remove this folder"
        ),
    ),
    "out in use": (
        unrelated_out,
        [],
        2,
        "out: out: this folder is not empty and holds no conversion; name a new one or empty it",
    ),
    "damaged": (
        truncated_shard,
        [],
        1,
        (
            "out/units/000000/shard.00000.mds: shard is 100 bytes long, must be {size}; restore "
            "it from a copy, or delete out and convert again"
        ),
    ),
    "too little": (
        nothing,
        ["context_length=100000"],
        1,
        (
            "out: the train split's {tokens} tokens do not fill one row of "
            "context_length=100000; remove this folder and give more text or shorter rows"
        ),
    ),
    "val_out inside out": (
        nothing,
        ["val_fraction=0.1", "val_out=out/val"],
        2,
        (
            "command line: val_out=out/val: must be a "
            "folder beside out=out, neither the same nor inside the other"
        ),
    ),
    "tiny shards": (
        nothing,
        ["shard_size=1000"],
        2,
        (
            "command line: shard_size=1000: must be at least 1536 (one row) and "
            "less than 4294967296 bytes"
        ),
    ),
}


@pytest.mark.parametrize("name", BAD_INPUT)
def test_bad_input_is_one_line_and_nothing_is_overwritten(corpus, monkeypatch, capsys, name):
    prepare, arguments, status, message = BAD_INPUT[name]
    prepare(corpus)
    capsys.readouterr()
    before = files_under(corpus)
    defaults = ["source=source", "out=out", "tokenizer=tokenizer", "context_length=64"]
    assert run_here(monkeypatch, "to_mds", *defaults, *arguments) == status
    out, err = capsys.readouterr()
    assert re.fullmatch(
        re.escape(f"error: {message}\n")
        .replace(r"\{size\}", r"\d+")
        .replace(r"\{tokens\}", r"\d+"),
        err,
    )
    assert out == ""
    after = files_under(corpus)
    assert before.items() <= after.items(), "a file that was there has changed"
    assert "out/index.json" not in after.keys() - before.keys(), "nothing may be published"


def test_errors_reach_the_shell_without_a_traceback(corpus):
    result = run_script("to_mds.py", "source=nowhere", "out=out", "tokenizer=tokenizer", cwd=corpus)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr == "error: source: nowhere: no such file or folder\n"
    bad_json(corpus)
    result = run_script("train_tokenizer.py", "source=source", "out=tok", cwd=corpus)
    assert (result.returncode, result.stdout) == (1, "")
    assert (
        result.stderr
        == "error: source/a.jsonl:2: not valid JSON: Expecting value at column 10; mend or remove"
        " the line\n"
    )
    assert not (corpus / "tok").exists()


def test_training_a_tokenizer_again(corpus, monkeypatch, capsys):
    arguments = ["source=source", "out=tok", "vocab_size=300"]
    assert run_here(monkeypatch, "train_tokenizer", *arguments) == 0
    before = files_under(corpus)
    capsys.readouterr()
    assert run_here(monkeypatch, "train_tokenizer", *arguments) == 0
    assert capsys.readouterr().out == "tok: already trained, nothing to do\n"
    assert (
        run_here(monkeypatch, "train_tokenizer", "source=source", "out=tok", "vocab_size=310") == 2
    )
    assert (
        capsys.readouterr().err
        == "error: out: tok: holds a tokenizer trained with other settings or text (see"
        " tok/training.json); name another out, or remove this folder\n"
    )
    assert (
        run_here(monkeypatch, "train_tokenizer", "source=source", "out=source", "vocab_size=310")
        == 2
    )
    assert (
        capsys.readouterr().err
        == "error: out: source: is not an empty folder; name a new one or empty it\n"
    )
    assert files_under(corpus) == before


def test_a_tokenizer_smaller_than_asked_for_says_so(corpus, monkeypatch, capsys):
    (corpus / "small.txt").write_text("ab ab ab")
    assert (
        run_here(monkeypatch, "train_tokenizer", "source=small.txt", "out=tok", "vocab_size=5000")
        == 0
    )
    out, err = capsys.readouterr()
    assert re.fullmatch(r"tok: 2\d\d tokens learnt from 1 documents \(0 skipped\)\n", out)
    assert (
        err == "warning: fewer than vocab_size=5000: no more pairs occur 2 times; give more text\n"
    )


def test_a_sampled_tokenizer_reads_only_its_share(corpus, monkeypatch, capsys):
    arguments = ["source=source", "suffixes=[.py]", "vocab_size=280", "max_bytes=2000"]
    assert run_here(monkeypatch, "train_tokenizer", *arguments, "out=tok") == 0
    count = int(
        re.match(r"tok: 280 tokens learnt from (\d+) documents", capsys.readouterr().out)[1]
    )  # pyright: ignore
    assert 1 < count < 30
    assert run_here(monkeypatch, "train_tokenizer", *arguments, "out=again") == 0
    assert (corpus / "tok" / "tokenizer.json").read_bytes() == (
        corpus / "again" / "tokenizer.json"
    ).read_bytes()


@pytest.mark.parametrize("script", ["to_mds.py", "train_tokenizer.py"])
def test_help_names_every_key(script, tmp_path):
    result = run_script(script, "--help", cwd=tmp_path)
    assert result.returncode == 0
    for key in ("source", "suffixes", "text_column", "on_error", "out"):
        assert f"  {key}: " in result.stdout


def test_a_full_disk_is_one_line_and_a_rerun_finishes(corpus):
    """A small filesystem, filled up and then enlarged, where a mount namespace may be made."""
    small = corpus / "small"
    small.mkdir()
    namespace = ["unshare", "--user", "--mount", "--map-root-user", "sh", "-c"]
    mount = "mount -t tmpfs -o size=12k none small"
    if (
        shutil.which("unshare") is None
        or subprocess.run([*namespace, mount], cwd=corpus, capture_output=True).returncode
    ):
        pytest.skip("no mount namespaces here")
    convert = (
        f"{sys.executable} {ROOT}/convert/to_mds.py source=source tokenizer=tokenizer"
        " context_length=64 encoder=hf"
    )
    commands = f"{mount}; {convert} out=small/out; echo status $?; find small -name index.json; "
    commands += f"mount -o remount,size=10m small; {convert} out=small/out && cp -r small/out ."
    done = subprocess.run(
        [*namespace, commands], cwd=corpus, capture_output=True, text=True, timeout=120
    )
    assert re.fullmatch(
        r"error: small/out: No space left on device.*; when that is mended, run the same command"
        r" again: it "
        r"goes on from the last finished unit\n",
        done.stderr,
    ), done.stderr
    assert done.stdout.startswith("status 1\nsplit"), "nothing was published"
    whole = subprocess.run(
        f"{convert} out=whole", shell=True, cwd=corpus, capture_output=True, timeout=120
    )
    assert whole.returncode == 0
    assert files_under(corpus / "out") == files_under(corpus / "whole")
