"""The dataset on disk: what is written is what StreamingDataset reads, token for token, whatever
interrupts it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import re
import shutil
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from flame_composer.dataset.convert import convert_unit, document_hash, split_of
from flame_composer.dataset.index import read_index
from flame_composer.dataset.ledger import Ledger
from flame_composer.dataset.manifest import parse_manifest, read_manifest
from flame_composer.dataset.mds import HASH
from flame_composer.dataset.open import check_shards, open_dataset
from flame_composer.dataset.plan import Plan, plan_units
from flame_composer.dataset.writer import DatasetWriter
from flame_composer.errors import ConfigError, DataError
from flame_composer.text.documents import MAX_DOCUMENT_BYTES, read_documents
from flame_composer.text.sources import find_files
from flame_composer.text.tokenizer import TokenizerFingerprint
from tests.data_fixtures import files_under, streaming_dataset, words, write_jsonl

CONTEXT_LENGTH = 16
EOS = 256
FINGERPRINT = TokenizerFingerprint("0" * 64, 257, None, EOS)


def encode(texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Bytes as tokens, and an eos."""
    documents = [[*text.encode(), EOS] for text in texts]
    tokens = np.array([token for document in documents for token in document], np.uint16)
    return tokens, np.array([len(document) for document in documents], np.int64)


def make_corpus(folder: Path, num_documents: int = 60) -> None:
    """JSONL that is split over units, small text files that share one, an empty document and two
    equal ones.
    """
    folder.mkdir()
    texts = [words(1 + i % 7, i) for i in range(num_documents)]
    write_jsonl(folder / "a.jsonl", texts[: num_documents // 2])
    write_jsonl(folder / "b.jsonl", [*texts[num_documents // 2 : -5], "", texts[0]])
    for i, text in enumerate(texts[-5:]):
        (folder / f"c{i}.txt").write_text(text)


def plans(
    source: Path,
    *,
    val_fraction: float = 0.0,
    unit_size: int = 700,
    settings: dict[str, Any] | None = None,
    **changes: Any,
) -> list[Plan]:
    config = {
        "text_column": "text",
        "val_fraction": val_fraction,
        "shard_size": 1500,
        "unit_size": unit_size,
        "max_doc_length": None,
        "min_doc_length": None,
        "seed": None,
        "max_document_bytes": MAX_DOCUMENT_BYTES,
        **(settings or {}),
    }
    units = plan_units(find_files([str(source)]), unit_size)
    train = Plan("train", FINGERPRINT, CONTEXT_LENGTH, config, units)
    split_plans = [train, dataclasses.replace(train, split="val")] if val_fraction else [train]
    return [dataclasses.replace(plan, **changes) for plan in split_plans]


def convert(
    datasets: list[DatasetWriter], encoder: Callable = encode, order: Sequence[int] | None = None
) -> None:
    unfinished = [dataset for dataset in datasets if dataset.finished() is None]
    for dataset in unfinished:
        dataset.begin()
    for number in range(len(datasets[0].plan.units)) if order is None else order:
        convert_unit(unfinished, number, encoder)
    for dataset in unfinished:
        dataset.publish()


@pytest.fixture
def source(tmp_path: Path) -> Path:
    make_corpus(tmp_path / "source")
    return tmp_path / "source"


def rows_of(folder: Path) -> list[tuple[list[int], list[int]]]:
    dataset = streaming_dataset(folder, validate_hash=HASH)
    return [
        (dataset[i]["input_ids"].tolist(), dataset[i]["doc_lengths"].tolist())
        for i in range(len(dataset))
    ]


def documents_of(source: Path, plan: Plan) -> list[str]:
    return [
        doc.text for unit in plan.units for part in unit for doc in read_documents(part, "text")
    ]


def expected_rows(
    plan: Plan, texts_by_unit: list[list[str]]
) -> tuple[list[tuple[list[int], list[int]]], int]:
    """By hand: each unit's full rows in order, then the rows of the units' leftovers; and how
    many tokens are dropped.
    """
    rows: list[tuple[list[int], list[int]]] = []
    leftover: list[list[int]] = []

    def fill(pieces: list[list[int]]) -> list[list[int]]:
        row: list[list[int]] = []
        for piece in pieces:
            while piece:
                free = CONTEXT_LENGTH - sum(map(len, row))
                row.append(piece[:free])
                piece = piece[free:]
                if sum(map(len, row)) == CONTEXT_LENGTH:
                    rows.append(
                        ([token for part in row for token in part], [len(part) for part in row])
                    )
                    row = []
        return row

    for texts in texts_by_unit:
        leftover += fill([[*text.encode(), EOS] for text in texts])
    return rows, sum(map(len, fill(leftover)))


def texts_by_unit(plan: Plan) -> list[list[str]]:
    return [
        [
            document.text
            for part in unit
            for document in read_documents(part, "text")
            if split_of(document_hash(document.text), plan.config["val_fraction"]) == plan.split
        ]
        for unit in plan.units
    ]


def test_streaming_reads_back_exactly_the_documents(tmp_path, source):
    (plan,) = plans(source)
    assert len(plan.units) >= 4
    convert([DatasetWriter(str(tmp_path / "out"), plan)])
    rows, dropped = expected_rows(plan, texts_by_unit(plan))
    assert rows_of(tmp_path / "out") == rows
    assert sum(len(texts) for texts in texts_by_unit(plan)) == 62, (
        "every document is in exactly one unit"
    )

    manifest = read_manifest(str(tmp_path / "out"))
    num_tokens = sum(len(text.encode()) + 1 for texts in texts_by_unit(plan) for text in texts)
    totals = manifest.totals
    assert (totals.documents, totals.tokens_in, totals.rows, totals.dropped) == (
        62,
        num_tokens,
        len(rows),
        dropped,
    )
    assert totals.tokens_in == totals.tokens_out + totals.dropped
    assert totals.tokens_out == CONTEXT_LENGTH * len(rows)
    assert manifest.tokenizer == FINGERPRINT
    assert manifest.context_length == CONTEXT_LENGTH
    assert [unit.inputs for unit in manifest.units] == [*plan.units, ()]
    files = open_dataset(str(tmp_path / "out")).files
    assert (len(files), sum(f.rows for f in files), sum(f.bytes for f in files)) == (
        totals.shards,
        len(rows),
        totals.bytes,
    )
    assert max(f.bytes for f in files) <= 1500
    assert len(files) > len(plan.units), "some units have several shards"


# Streaming leaves the shard it checks to the garbage collector to close.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_copy_is_streamed_from_a_remote(tmp_path, source):
    (plan,) = plans(source)
    convert([DatasetWriter(str(tmp_path / "out"), plan)])
    dataset = streaming_dataset(
        tmp_path / "cache", remote=str(tmp_path / "out"), validate_hash=HASH
    )
    assert [row["input_ids"].tolist() for row in dataset] == [
        row for row, _ in rows_of(tmp_path / "out")
    ]


def test_large_vocabularies_are_stored_as_uint32(tmp_path, source):
    (plan,) = plans(source, tokenizer=dataclasses.replace(FINGERPRINT, vocab_size=70_000))

    def encode_high(texts: Sequence[str]):
        tokens, lengths = encode(texts)
        return tokens.astype(np.uint32) + 69_000, lengths

    convert([DatasetWriter(str(tmp_path / "out"), plan)], encode_high)
    row = streaming_dataset(tmp_path / "out")[0]["input_ids"]
    assert row.dtype == np.uint32
    assert row.min() >= 69_000
    assert read_manifest(str(tmp_path / "out")).token_dtype == "uint32"


def test_no_file_in_a_dataset_depends_on_time_order_or_batches(tmp_path, source, monkeypatch):
    for name in ("first", "second", "batched"):
        datasets = [
            DatasetWriter(str(tmp_path / name / plan.split), plan)
            for plan in plans(source, val_fraction=0.3)
        ]
        if name == "batched":
            monkeypatch.setattr("flame_composer.dataset.convert.BATCH_CHARACTERS", 1)
        num_units = len(datasets[0].plan.units)
        convert(datasets, order=range(num_units) if name == "first" else reversed(range(num_units)))
    assert (
        files_under(tmp_path / "first")
        == files_under(tmp_path / "second")
        == files_under(tmp_path / "batched")
    )
    assert not list((tmp_path / "first").rglob("*.tmp"))
    assert {path.name for path in (tmp_path / "first" / "train").iterdir()} == {
        "index.json",
        "manifest.json",
        "units",
    }


def pieces_of(folder: Path) -> list[list[int]]:
    """The document pieces of a dataset's rows, those that a row's end divides put together
    again.
    """
    pieces: list[list[int]] = []
    open_piece = False
    for row, lengths in rows_of(folder):
        for part in np.split(np.array(row), np.cumsum(lengths)[:-1]):
            if open_piece:
                pieces[-1] += part.tolist()
            else:
                pieces.append(part.tolist())
            open_piece = part[-1] != EOS
    return pieces


def test_long_documents_are_cut_and_short_ones_left_out(tmp_path, source):
    (plan,) = plans(source, settings={"max_doc_length": 10, "min_doc_length": 8})
    convert([DatasetWriter(str(tmp_path / "out"), plan)])
    rows = rows_of(tmp_path / "out")
    assert max(length for _, lengths in rows for length in lengths) == 10
    texts = [text for unit in texts_by_unit(plan) for text in unit]
    short = [text for text in texts if len(text.encode()) + 1 < 8]
    totals = read_manifest(str(tmp_path / "out")).totals
    tokens_of_short = sum(len(text.encode()) + 1 for text in short)
    assert (totals.documents, totals.documents_short) == (62, len(short))
    assert 0 < len(short) < 62
    assert totals.tokens_in == totals.tokens_out + totals.dropped
    assert tokens_of_short <= totals.dropped < tokens_of_short + CONTEXT_LENGTH
    kept = {text for text in texts if text not in short}
    assert {bytes(piece[:-1]).decode() for piece in pieces_of(tmp_path / "out")[:10]} <= kept


def test_a_seed_shuffles_documents_and_units_the_same_way_every_time(tmp_path, source, monkeypatch):
    made = {}
    for name, seed in (("plain", None), ("first", 5), ("again", 5), ("other", 6)):
        if name == "again":
            monkeypatch.setattr("flame_composer.dataset.convert.BATCH_CHARACTERS", 1)
        (plan,) = plans(source, settings={"seed": seed})
        num_units = len(plan.units)
        convert(
            [DatasetWriter(str(tmp_path / name), plan)],
            order=reversed(range(num_units)) if name == "again" else None,
        )
        made[name] = pieces_of(tmp_path / name)
    assert files_under(tmp_path / "first") == files_under(tmp_path / "again")
    assert made["first"] != made["other"]
    first = str(tmp_path / "first")
    folders = [shard.basename.split("/")[1] for shard in read_index(first, read_manifest(first))]
    assert folders != sorted(folders), "units are in another order"
    assert folders[-1] == "tail"
    in_order = [text for unit in texts_by_unit(plan) for text in unit]
    first_unit = texts_by_unit(plan)[int(folders[0])]
    begin = [bytes(piece[:-1]).decode() for piece in made["first"][: len(first_unit) - 3]]
    assert set(begin) <= set(first_unit), "documents stay in their unit"
    assert begin != first_unit[: len(begin)]
    totals = read_manifest(str(tmp_path / "first")).totals
    assert totals.documents == len(in_order)
    assert totals.tokens_in == read_manifest(str(tmp_path / "plain")).totals.tokens_in


def test_validation_documents_are_disjoint_complete_and_chosen_by_text_alone(tmp_path, source):
    split_plans = plans(source, val_fraction=0.3)
    convert([DatasetWriter(str(tmp_path / plan.split), plan) for plan in split_plans])
    texts = {}
    for plan in split_plans:
        rows, dropped = expected_rows(plan, texts_by_unit(plan))
        assert rows_of(tmp_path / plan.split) == rows
        totals = read_manifest(str(tmp_path / plan.split)).totals
        texts[plan.split] = [text for unit in texts_by_unit(plan) for text in unit]
        assert (totals.documents, totals.dropped) == (len(texts[plan.split]), dropped)
    everything = documents_of(source, split_plans[0])
    assert not set(texts["train"]) & set(texts["val"]), "equal documents are on the same side"
    assert sorted(texts["train"] + texts["val"]) == sorted(everything)
    assert 0.1 < len(texts["val"]) / len(everything) < 0.5


def test_validation_fraction_is_kept():
    digests = [document_hash(f"document {i}") for i in range(20_000)]
    for fraction in (0.0, 0.05, 0.5):
        share = sum(split_of(digest, fraction) == "val" for digest in digests) / len(digests)
        assert abs(share - fraction) < 0.01
    held_out = {digest for digest in digests if split_of(digest, 0.05) == "val"}
    assert all(split_of(digest, 0.06) == "val" for digest in held_out), (
        "a larger fraction keeps what was held out"
    )


def test_a_failure_publishes_nothing_and_the_next_run_goes_on_from_there(tmp_path, source):
    (plan,) = plans(source)
    convert([DatasetWriter(str(tmp_path / "whole"), plan)])
    dataset = DatasetWriter(str(tmp_path / "out"), plan)
    calls = []

    def fail_in_third(texts: Sequence[str]):
        calls.append(len(texts))
        if len(calls) == 3:
            raise RuntimeError("stop here")
        return encode(texts)

    with pytest.raises(RuntimeError, match="stop here"):
        convert([dataset], fail_in_third)
    assert not (tmp_path / "out" / "index.json").exists()
    assert not (tmp_path / "out" / "manifest.json").exists()
    with pytest.raises(
        ConfigError,
        match=r"out: an unfinished conversion \(run the same command of convert/ again",
    ):
        read_manifest(str(tmp_path / "out"))

    calls.clear()
    convert([dataset], lambda texts: (calls.append(len(texts)), encode(texts))[1])
    assert len(calls) == len(plan.units) - 2, "committed units are not converted again"
    assert files_under(tmp_path / "out") == files_under(tmp_path / "whole")

    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")}
    convert([dataset], fail_in_third)
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")} == before, (
        "finished: not touched"
    )


FILE_EVENTS = {"open", "os.rename", "os.remove", "os.mkdir", "os.rmdir"}


def convert_and_die(datasets: list[DatasetWriter], folder: str, die_at: int) -> bool:
    """Convert in a child process that SIGKILLs itself just before its `die_at`th file operation in
    `folder`.

    Returns whether it died (and not that it finished before).
    """
    child = os.fork()
    if child == 0:
        count = 0

        def hook(event: str, arguments: tuple) -> None:
            nonlocal count
            if event in FILE_EVENTS and str(arguments[0]).startswith(folder):
                count += 1
                if count == die_at:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(hook)
        status = 1
        with contextlib.suppress(BaseException):
            convert(datasets)
            status = 0
        os._exit(status)
    status = os.waitpid(child, 0)[1]
    if os.WIFSIGNALED(status):
        assert os.WTERMSIG(status) == signal.SIGKILL
        return True
    assert os.WEXITSTATUS(status) == 0
    return False


def test_killed_before_any_file_operation_and_run_again_gives_the_same_bytes(tmp_path):
    make_corpus(tmp_path / "source", num_documents=14)
    split_plans = plans(tmp_path / "source", val_fraction=0.3, unit_size=400)
    assert len(split_plans[0].units) == 2
    whole = tmp_path / "whole"
    convert([DatasetWriter(str(whole / plan.split), plan) for plan in split_plans])
    expected = files_under(whole)

    out = tmp_path / "out"
    datasets = [DatasetWriter(str(out / plan.split), plan) for plan in split_plans]
    died = 0
    while convert_and_die(datasets, str(out), died + 1):
        died += 1
        complete = [split for split in ("train", "val") if (out / split / "index.json").exists()]
        for split in complete:
            assert files_under(whole / split).items() <= files_under(out / split).items(), (
                f"published early at {died}"
            )
        convert(datasets)
        assert files_under(out) == expected, f"killed before file operation {died}"
        shutil.rmtree(out)
    assert died > 60
    assert files_under(out) == expected


@pytest.mark.parametrize("how_far", ["one unit", "to the end"])
def test_two_conversions_at_once_do_no_harm(tmp_path, source, how_far):
    """The same command given twice: another conversion overtakes while this one is in the middle
    of its first unit.
    """
    (plan,) = plans(source)
    convert([DatasetWriter(str(tmp_path / "whole"), plan)])
    dataset = DatasetWriter(str(tmp_path / "out"), plan)
    other = DatasetWriter(str(tmp_path / "out"), plan)
    overtaken = False

    def overtake(texts: Sequence[str]):
        nonlocal overtaken
        if not overtaken:
            overtaken = True
            if how_far == "to the end":
                convert([other])
            else:
                other.begin()
                convert_unit([other], 0, encode)
        return encode(texts)

    if how_far == "to the end":
        with pytest.raises(DataError, match="run the same command again"):
            convert([dataset], overtake)
    else:
        convert([dataset], overtake)
    assert files_under(tmp_path / "out") == files_under(tmp_path / "whole")


def test_a_committed_unit_that_lost_bytes_is_made_again(tmp_path, source):
    (plan,) = plans(source)
    convert([DatasetWriter(str(tmp_path / "whole"), plan)])
    dataset = DatasetWriter(str(tmp_path / "out"), plan)
    dataset.begin()
    convert_unit([dataset], 0, encode)
    convert_unit([dataset], 1, encode)
    shard = tmp_path / "out" / "units" / "000001" / "shard.00000.mds"
    shard.write_bytes(shard.read_bytes()[:-1])
    convert([dataset])
    assert files_under(tmp_path / "out") == files_under(tmp_path / "whole")


@pytest.mark.parametrize("change", ["same size", "another file before", "one file less"])
def test_inputs_that_change_before_the_conversion_goes_on_are_read_again(tmp_path, source, change):
    """A damaged line stops the conversion; units that were made before from text that is no
    longer so are made anew.
    """
    good = (source / "b.jsonl").read_bytes()
    (source / "b.jsonl").write_bytes(b"oops\n" + good)
    out = tmp_path / "out"
    with pytest.raises(DataError, match=r"b\.jsonl:1: not valid JSON"):
        convert([DatasetWriter(str(out), plans(source)[0])])
    assert len(list((out / "units").iterdir())) > 1
    (source / "b.jsonl").write_bytes(good)
    if change == "same size":
        text = (source / "a.jsonl").read_text()
        (source / "a.jsonl").write_text(text.replace("a", "z"))
    elif change == "one file less":
        (source / "a.jsonl").unlink()
        (source / "b.jsonl").write_bytes(b"".join(good.splitlines(keepends=True)[:10]))
    else:
        (source / "0.txt").write_text(words(90, 0))
        os.utime(source / "0.txt", (0, 0))
    (plan,) = plans(source)
    convert([DatasetWriter(str(out), plan)])
    convert([DatasetWriter(str(tmp_path / "whole"), plan)])
    assert files_under(out) == files_under(tmp_path / "whole")


def test_another_plan_for_the_same_folder_names_what_differs(tmp_path, source):
    (plan,) = plans(source)
    out = str(tmp_path / "out")
    unfinished = DatasetWriter(out, plan)
    unfinished.begin()
    other = dataclasses.replace(
        plan, context_length=8, config={**plan.config, "text_column": "body"}
    )
    message = (
        f"out: {out}: holds a conversion with other settings: context_length (16 there, 8 now), "
        'text_column ("text" there, "body" now); name another out, or remove this folder'
    )
    for state in ("begun", "finished"):
        before = files_under(tmp_path / "out")
        with pytest.raises(ConfigError, match=f"^{re.escape(message)}$"):
            DatasetWriter(out, other).finished()
        assert files_under(tmp_path / "out") == before
        if state == "begun":
            convert([unfinished])
    with pytest.raises(ConfigError, match=r"other settings: tokenizer \(.* there, .* now\); name"):
        DatasetWriter(
            out,
            dataclasses.replace(plan, tokenizer=dataclasses.replace(FINGERPRINT, sha256="1" * 64)),
        ).finished()
    (source / "d.txt").write_text("one more document")
    with pytest.raises(
        ConfigError,
        match=r"other settings: inputs \(\"7 files of .* there, \"8 files of .* now\); name",
    ):
        DatasetWriter(out, plans(source)[0]).finished()


def test_a_folder_that_holds_something_else_is_left_alone(tmp_path, source):
    (plan,) = plans(source)
    (tmp_path / "file").write_text("mine")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "notes.txt").write_text("mine")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match=r"^out: .*/file: is a file; name a folder$"):
        DatasetWriter(str(tmp_path / "file"), plan).finished()
    with pytest.raises(
        ConfigError,
        match=r"^out: .*/folder: this folder is not empty and holds no conversion; name a new",
    ):
        DatasetWriter(str(tmp_path / "folder"), plan).finished()
    convert([DatasetWriter(str(tmp_path / "empty"), plan)])
    assert (tmp_path / "empty" / "index.json").exists()


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        ([], "no documents for the train split (0 skipped); check source, or raise val_fraction"),
        (
            ["few"],
            (
                "the train split's 4 tokens do not fill one row of context_length=16; remove this"
                " folder and give more text or shorter rows"
            ),
        ),
    ],
)
def test_too_little_text_publishes_nothing(tmp_path, texts, message):
    (tmp_path / "source").mkdir()
    write_jsonl(tmp_path / "source" / "a.jsonl", texts)
    with pytest.raises(
        DataError, match=f"^{re.escape(str(tmp_path / 'out'))}: {re.escape(message)}$"
    ):
        convert([DatasetWriter(str(tmp_path / "out"), plans(tmp_path / "source")[0])])
    assert not (tmp_path / "out" / "index.json").exists()


def test_skipped_documents_are_counted(tmp_path, source):
    (source / "b.jsonl").write_bytes(b"oops\n" + (source / "b.jsonl").read_bytes() + b"{}\n")
    (source / "c1.txt").write_bytes(b"\xff")
    (plan,) = plans(source)
    dataset = DatasetWriter(str(tmp_path / "out"), plan)
    dataset.begin()
    for number in range(len(plan.units)):
        convert_unit([dataset], number, encode, on_error="skip")
    totals = dataset.publish()
    assert (totals.documents, totals.documents_skipped) == (61, 3)


def test_progress_accounts_for_every_document_token_and_byte(tmp_path, source):
    (plan,) = plans(source)
    dataset = DatasetWriter(str(tmp_path / "out"), plan)
    dataset.begin()
    seen = np.zeros(3, int)

    def on_progress(*counts: int) -> None:
        seen[:] += counts

    for number in range(len(plan.units)):
        convert_unit([dataset], number, encode, on_progress=on_progress)
    totals = dataset.publish()
    size = sum(path.stat().st_size for path in source.iterdir())
    assert seen.tolist() == [totals.documents, totals.tokens_in, size]


def test_no_space_is_one_line_and_a_rerun_finishes(tmp_path, source):
    import resource

    (plan,) = plans(source)
    dataset = DatasetWriter(str(tmp_path / "out"), plan)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    dataset.begin()
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(
            DataError,
            match=r"out: File too large.*; when that is mended, run the same command again",
        ):
            convert_unit([dataset], 0, encode)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    convert([dataset])
    assert rows_of(tmp_path / "out") == expected_rows(plan, texts_by_unit(plan))[0]


# What is read back is not trusted.


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("finished")
    make_corpus(folder / "source")
    convert([DatasetWriter(str(folder / "out"), plans(folder / "source")[0])])
    return folder / "out"


@pytest.fixture
def dataset_copy(tmp_path, finished) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "copy"))


MANIFEST_DAMAGE: dict[str, tuple[Callable[[dict], Any], str]] = {
    "version": (
        lambda m: m.update(version=3),
        "dataset format version 3, but this flame_composer reads versions 1 and 2; convert",
    ),
    "version type": (
        lambda m: m.update(version="1"),
        "damaged: 'version' must be a whole number, 0 or more; restore",
    ),
    "negative": (
        lambda m: m.update(context_length=-1),
        "damaged: 'context_length' must be a whole number, 0 or more",
    ),
    "boolean": (
        lambda m: m["totals"].update(rows=True),
        "damaged: 'rows' must be a whole number, 0 or more",
    ),
    "missing": (lambda m: m.pop("totals"), "damaged: 'totals' must be an object"),
    "split": (lambda m: m.update(split="test"), "damaged: 'test' must be one of train, val"),
    "units": (lambda m: m.update(units={}), "damaged: 'units' must be a list"),
    "unit": (lambda m: m["units"].append(3), "damaged: 'inputs' must be a list"),
    "eos": (
        lambda m: m["tokenizer"].update(eos_token_id="0"),
        "damaged: 'eos_token_id' must be a whole number",
    ),
    "no eos": (
        lambda m: m["tokenizer"].pop("eos_token_id"),
        "damaged: 'eos_token_id' must be a whole number",
    ),
    "total": (
        lambda m: m["totals"].update(dropped=0),
        "damaged: its token ledger does not balance",
    ),
    "compression": (
        lambda m: m["units"][0]["inputs"][0].update(compression=0),
        "damaged: 0 must be one of None, gzip, zstd",
    ),
    "context": (lambda m: m.update(context_length=8), "damaged: its token ledger does not balance"),
}


@pytest.mark.parametrize("name", MANIFEST_DAMAGE)
def test_a_tampered_manifest_is_refused(dataset_copy, name):
    change, message = MANIFEST_DAMAGE[name]
    path = dataset_copy / "manifest.json"
    content = json.loads(path.read_bytes())
    change(content)
    path.write_text(json.dumps(content))
    with pytest.raises(DataError, match=f"^{re.escape(f'{path}: {message}')}"):
        read_manifest(str(dataset_copy))


@pytest.mark.parametrize(
    "data", [b"", b"{", b"[]", b"3", b"\xff\xfe", b"[" * 100_000], ids=lambda data: repr(data[:5])
)
def test_garbage_is_no_manifest(data):
    with pytest.raises(DataError, match=r"^s3://bucket/data/manifest.json: damaged: ") as caught:
        parse_manifest(data, "s3://bucket/data/manifest.json")
    assert "\n" not in str(caught.value)


def test_no_manifest(tmp_path):
    with pytest.raises(ConfigError, match=r"/nothing: no such folder$"):
        read_manifest(str(tmp_path / "nothing"))
    with pytest.raises(
        ConfigError,
        match=r": no dataset made by convert/to_mds.py or to_sft.py \(manifest.json is missing\)$",
    ):
        read_manifest(str(tmp_path))


def set_basename(index: dict, basename: Any) -> None:
    index["shards"][1]["raw_data"]["basename"] = basename


INDEX_DAMAGE: dict[str, tuple[Callable[[dict], Any], str]] = {
    "absolute": (
        lambda i: set_basename(i, "/etc/passwd"),
        "it names a file outside the dataset: '/etc/passwd'",
    ),
    "parent": (
        lambda i: set_basename(i, "units/../../x.mds"),
        "it names a file outside the dataset: 'units/../../x.mds'",
    ),
    "empty": (lambda i: set_basename(i, ""), "it names a file outside the dataset: ''"),
    "number": (lambda i: set_basename(i, 3), "'basename' must be a string"),
    "windows": (lambda i: set_basename(i, "..\\x"), "it names a file outside the dataset"),
    "size": (
        lambda i: i["shards"][0]["raw_data"].update(bytes="1"),
        "'bytes' must be a whole number, 0 or more",
    ),
    "hash": (lambda i: i["shards"][0]["raw_data"].update(hashes={}), "'xxh64' must be a string"),
    "compressed": (
        lambda i: i["shards"][0].update(zip_data={"basename": "../x"}),
        "units/000000/shard.00000.mds is comp",
    ),
    "shards": (lambda i: i.pop("shards"), "'shards' must be a list"),
    "a row more": (
        lambda i: i["shards"][0].update(samples=99),
        "it is not the index that manifest.json was written with",
    ),
}


@pytest.mark.parametrize("name", INDEX_DAMAGE)
def test_a_tampered_index_is_refused(dataset_copy, name):
    change, message = INDEX_DAMAGE[name]
    path = dataset_copy / "index.json"
    content = json.loads(path.read_bytes())
    change(content)
    path.write_text(json.dumps(content))
    for check in (
        lambda: open_dataset(str(dataset_copy)),
        lambda: read_index(str(dataset_copy), read_manifest(str(dataset_copy))),
    ):
        with pytest.raises(
            DataError,
            match=f"^{re.escape(f'{path}: damaged: {message}')}.*; restore it from a copy",
        ):
            check()


@pytest.mark.parametrize("damage", ["truncated", "missing", "longer"])
def test_a_damaged_shard_is_named(dataset_copy, damage):
    assert len(open_dataset(str(dataset_copy)).files) > 2
    shard = dataset_copy / "units" / "000001" / "shard.00000.mds"
    size = shard.stat().st_size
    if damage == "missing":
        shard.unlink()
    else:
        shard.write_bytes(
            (shard.read_bytes() + b"x")[: size + 1 if damage == "longer" else size // 2]
        )
    found = (
        "missing" if damage == "missing" else f"{shard.stat().st_size} bytes long, must be {size}"
    )
    message = (
        f"{shard}: shard is {found}; restore it from a copy, or delete {dataset_copy} and convert"
        " again"
    )
    with pytest.raises(DataError, match=f"^{re.escape(message)}$"):
        check_shards(open_dataset(str(dataset_copy)))


def test_ledgers_add_and_balance():
    unit = Ledger(tokens_in=10, tokens_out=8, carried_out=2)
    tail = Ledger(carried_in=2, dropped=2)
    assert unit.balances
    assert tail.balances
    assert (unit + tail).tokens_in == (unit + tail).tokens_out + (unit + tail).dropped
    assert not Ledger(tokens_in=1).balances


def test_too_little_memory_is_one_line_and_leaves_nothing_behind(tmp_path, source):
    (plan,) = plans(source)
    dataset = DatasetWriter(str(tmp_path / "out"), plan)
    dataset.begin()

    def encode_more_than_there_is(texts: Sequence[str]) -> Any:
        return np.zeros(1 << 60, np.uint8)

    with pytest.raises(
        DataError, match=r"a\S+, unit 000001: there is not enough memory to encode it; give fewer"
    ):
        convert_unit([dataset], 1, encode_more_than_there_is)
    assert list((tmp_path / "out" / "tmp").iterdir()) == []
    convert([dataset])
    check_shards(open_dataset(str(tmp_path / "out")))
