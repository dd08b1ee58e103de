"""convert/to_sft.py as a user runs it, and what its datasets hold."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from flame_composer.config.cli import run
from flame_composer.config.convert import InspectConfig
from flame_composer.config.sft import SftConfig
from flame_composer.dataset.manifest import Manifest, read_manifest
from flame_composer.dataset.mds import BadShard, ShardView, ShardWriter
from flame_composer.dataset.packing import Rows, best_fit, pack_whole
from flame_composer.storage import files
from flame_composer.storage.filesystems import is_url
from flame_composer.text.chat import ChatTemplate, Message, load_template
from flame_composer.text.loss_mask import Masker, Tokens
from flame_composer.text.tokenizer import bare, build_encoder, load_tokenizer
from tests.data_fixtures import byte_tokenizer, files_under, rows_in, words
from tests.dataset.test_convert import ROOT, load_script
from tests.s3 import BUCKET

ROW = 512  # tokens


def example(number: int, **more: Any) -> dict[str, Any]:
    """An example in the form alpaca, of up to 60 words."""
    rng = random.Random(number)
    made = {
        "instruction": words(rng.randrange(1, 12), number),
        "output": words(rng.randrange(1, 25), 1000 + number),
    }
    if rng.random() < 0.3:
        made["input"] = words(rng.randrange(1, 6), 2000 + number)
    return made | more


def write_lines(path: Path, records: list[Any]) -> Path:
    path.write_text("".join(f"{json.dumps(each, ensure_ascii=False)}\n" for each in records))
    return path


def read_lines(path: Path) -> list[Any]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """A folder with a tokenizer, and examples in three files, with what is to be left out."""
    folder = tmp_path_factory.mktemp("tuning")
    byte_tokenizer().save_pretrained(folder / "tokenizer")
    (folder / "in").mkdir()
    for number in range(3):
        records = [example(100 * number + i) for i in range(60)]
        records += [
            example(100 * number, output=""),
            example(7),
            example(100 * number, output=None),
        ]
        write_lines(folder / "in" / f"{number}.jsonl", records)
    return folder


def convert(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["convert/to_sft.py", *arguments])
    return run(load_script("to_sft").main, SftConfig)


def common(folder: Path, *more: str) -> list[str]:
    return [
        f"source={folder}/in",
        "format=alpaca",
        "template=alpaca",
        f"tokenizer={folder}/tokenizer",
        f"context_length={ROW}",
        "shard_size=8000",
        "unit_size=6000",
        "too_long=drop",
        "encoder=hf",
        *more,
    ]


def rows_of(place: Path) -> Iterator[tuple[Any, Any, Any]]:
    """The tokens, document lengths and loss mask of every row."""
    for view, number in rows_in(place):
        yield *view.row(number), view.loss_mask(number)


def examples_of(place: Path) -> list[tuple[tuple[int, ...], tuple[bool, ...]]]:
    """The tokens and loss flags of every example, in order; checks what must hold of each row."""
    found = []
    for tokens, doc_lengths, mask in rows_of(place):
        start = 0
        for length in doc_lengths.tolist():
            ids, flags = tokens[start : start + length], mask[start : start + length]
            start += length
            if flags.any():
                assert not flags[0], "an example's first token is predicted from another example"
                found.append((tuple(ids.tolist()), tuple(flags.tolist())))
            else:
                assert start == len(tokens), "only padding carries no loss, and it comes last"
                assert len(set(ids.tolist())) == 1
    return found


def check_ledger(manifest: Manifest, place: Path) -> None:
    totals = manifest.totals
    assert totals.tokens_in + totals.padding == totals.tokens_out + totals.dropped
    found = examples_of(place)
    assert totals.documents == len(found)
    assert totals.tokens_in - totals.dropped == sum(len(ids) for ids, _ in found)
    assert totals.loss_tokens == sum(sum(flags) for _, flags in found)
    left_out = read_lines(place / "left_out.jsonl")
    assert Counter(each["reason"] for each in left_out) == Counter(totals.left_out)


def test_examples_become_rows(source: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    assert convert(monkeypatch, *common(source, f"out={tmp_path}/out")) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert "an answer is empty" in out
    manifest = read_manifest(str(tmp_path / "out"))
    assert (manifest.version, manifest.kind) == (2, "sft")
    check_ledger(manifest, tmp_path / "out")
    totals = manifest.totals
    assert totals.left_out == {"duplicate": 3, "empty_answer": 3, "not_text": 3}
    assert len(manifest.units) > 4, "the test must have several units"
    tokenizer = load_tokenizer(str(source / "tokenizer"))
    wanted = Counter()
    for number in range(3):
        for i in range(60):
            each = example(100 * number + i)
            prompt = "\n".join(filter(None, (each["instruction"], each.get("input", ""))))
            wanted[
                "Below is an instruction that describes a task. Write a response that appropriately"
                f" completes the request.\n\n### Instruction:\n{prompt}\n\n### Response:\n",
                f"{each['output']}<|endoftext|>\n\n",
            ] += 1
    found = Counter()
    for ids, flags in examples_of(tmp_path / "out"):
        first = flags.index(True)
        assert all(flags[first:])
        found[tokenizer.decode(ids[:first]), tokenizer.decode(ids[first:])] += 1
    if totals.dropped == 0:
        assert found == wanted
    assert not found - wanted
    # The same command again finds nothing to do, and changes nothing.
    before = files_under(tmp_path / "out")
    assert convert(monkeypatch, *common(source, f"out={tmp_path}/out")) == 0
    assert "already finished" in capsys.readouterr().out
    assert files_under(tmp_path / "out") == before


FORMATS: dict[str, Any] = {
    "alpaca": lambda p, a, s: {"instruction": p, "output": a, "system": s},
    "sharegpt": lambda p, a, s: {
        "conversations": [{"from": "human", "value": p}, {"from": "gpt", "value": a}],
        "system": s,
    },
    "messages": lambda p, a, s: {
        "messages": [
            *([{"role": "system", "content": s}] if s else []),
            {"role": "user", "content": p},
            {"role": "assistant", "content": a},
        ]
    },
    "prompt_completion": lambda p, a, s: {"prompt": p, "completion": a, "system": s},
}


@pytest.mark.parametrize("kind", ["jsonl", "array", "parquet", "gz"])
@pytest.mark.parametrize("format", FORMATS)
def test_every_format_in_every_kind_of_file(
    source: Path, tmp_path: Path, monkeypatch, format: str, kind: str
) -> None:
    """They all give the rows of the same conversations."""
    triples = [
        (words(5, i), words(9, 50 + i), words(3, 90 + i) if i % 3 else None) for i in range(40)
    ]
    records = [FORMATS[format](*each) for each in triples]
    (tmp_path / "in").mkdir()
    lines = "".join(json.dumps(each) + "\n" for each in records)
    if kind == "jsonl":
        (tmp_path / "in/a.jsonl").write_text(lines)
    elif kind == "array":
        (tmp_path / "in/a.json").write_text(json.dumps(records, indent=1))
    elif kind == "parquet":
        parquet.write_table(
            pa.Table.from_pylist(records), tmp_path / "in/a.parquet", row_group_size=7
        )
    else:
        import gzip

        (tmp_path / "in/a.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    arguments = [
        *common(source, f"out={tmp_path}/out", f"source={tmp_path}/in", f"format={format}"),
        "unit_size=1000000",
        "shard_size=1000000",
    ]
    assert convert(monkeypatch, *arguments) == 0
    write_lines(tmp_path / "plain.jsonl", [FORMATS["alpaca"](*each) for each in triples])
    plain = common(source, f"out={tmp_path}/plain", f"source={tmp_path}/plain.jsonl")
    assert convert(monkeypatch, *plain, "unit_size=1000000", "shard_size=1000000") == 0
    assert examples_of(tmp_path / "out") == examples_of(tmp_path / "plain")


lengths = st.lists(st.integers(1, 50), min_size=1, max_size=120)


@settings(max_examples=200, deadline=None)
@given(lengths=lengths, capacity=st.integers(50, 90))
def test_packing_loses_and_doubles_nothing(lengths: list[int], capacity: int) -> None:
    rng = np.random.default_rng(len(lengths))
    tokens = [rng.integers(1, 60000, length).astype(np.uint16) for length in lengths]
    flags = [rng.random(length) < 0.5 for length in lengths]
    rows, padding = pack_whole(tokens, flags, capacity, 0, np.uint16)
    assert rows.loss_mask is not None
    assert padding == len(rows) * capacity - sum(lengths)
    found, firsts = [], []
    for (ids, doc_lengths), mask in zip(rows, rows.loss_mask, strict=True):
        ends = np.cumsum(doc_lengths)
        assert ends[-1] == capacity
        pieces = [
            (ids[end - length : end].tolist(), mask[end - length : end].tolist())
            for end, length in zip(ends, doc_lengths, strict=True)
        ]
        if not ids[-1]:  # no token of an example is 0
            assert not any(pieces[-1][0])
            assert not any(pieces[-1][1])
            pieces.pop()
        numbers = [
            next(n for n, t in enumerate(tokens) if t.tolist() == piece[0]) for piece in pieces
        ]
        assert numbers == sorted(numbers)
        firsts.append(numbers[0])
        found += pieces
    assert firsts == sorted(firsts)
    given = [(t.tolist(), f.tolist()) for t, f in zip(tokens, flags, strict=True)]
    assert sorted(found) == sorted(given)


@settings(max_examples=100, deadline=None)
@given(lengths=lengths)
def test_a_document_goes_into_the_row_with_the_least_space_that_suffices(
    lengths: list[int],
) -> None:
    """As the textbook has it: compared with a search over all rows."""
    spaces: list[int] = []
    for length in sorted(lengths, reverse=True):
        fitting = [space for space in spaces if space >= length]
        if fitting:
            spaces.remove(min(fitting))
            spaces.append(min(fitting) - length)
        else:
            spaces.append(60 - length)
    rows = best_fit(np.array(lengths), 60)
    used = np.bincount(rows, lengths)
    assert sorted(60 - used.astype(int)) == sorted(spaces)


contents = st.text(st.characters(codec="utf-8"), min_size=0, max_size=30)
anything = contents | st.none() | st.integers() | st.just(" \n")


@settings(max_examples=40, deadline=None)
@given(
    records=st.lists(
        st.fixed_dictionaries({"instruction": anything, "output": anything}),
        min_size=1,
        max_size=30,
    ),
    fraction=st.sampled_from([0.0, 0.4]),
    too_long=st.sampled_from(["drop", "cut_prompt"]),
)
def test_every_example_is_in_a_row_or_left_out_with_a_reason(
    source: Path, tmp_path_factory, records: list[dict[str, Any]], fraction: float, too_long: str
) -> None:
    folder = tmp_path_factory.mktemp("any")
    write_lines(folder / "a.jsonl", records)
    arguments = common(
        source, f"out={folder}/out", f"source={folder}/a.jsonl", "context_length=200"
    )
    arguments += [f"too_long={too_long}", "unit_size=300"]
    outs = [folder / "out"]
    if fraction:
        arguments += [f"val_fraction={fraction}", f"val_out={folder}/val"]
        outs.append(folder / "val")
    with pytest.MonkeyPatch.context() as monkeypatch:
        status = convert(monkeypatch, *arguments)
    if status:
        return  # nothing was left for one of the splits, which is an error
    manifests = [read_manifest(str(out)) for out in outs]
    for out, manifest in zip(outs, manifests, strict=True):
        check_ledger(manifest, out)
    seen = sum(each.totals.documents + sum(each.totals.left_out.values()) for each in manifests)
    assert seen == len(records)
    if fraction:
        stop = manifests[0].config["stop_token"]
        prompts = [{ids[: flags.index(True)] for ids, flags in examples_of(out)} for out in outs]
        assert not prompts[0] & prompts[1], "a prompt must not be in both splits"
        assert all(stop in ids for out in outs for ids, _ in examples_of(out))


def test_duplicates_are_found_wherever_they_are(source: Path, tmp_path: Path, monkeypatch) -> None:
    """The first of them stays; with duplicates=keep, all do."""
    (tmp_path / "in").mkdir()
    for name in "abc":
        write_lines(tmp_path / "in" / f"{name}.jsonl", [example(i) for i in range(20)])
    write_lines(tmp_path / "once.jsonl", [example(i) for i in range(20)])
    for name, more in (("drop", []), ("keep", ["duplicates=keep"])):
        arguments = common(source, f"out={tmp_path}/{name}", f"source={tmp_path}/in", *more)
        assert convert(monkeypatch, *arguments, "unit_size=1500") == 0
    once = common(source, f"out={tmp_path}/once", f"source={tmp_path}/once.jsonl")
    assert convert(monkeypatch, *once) == 0
    found = {name: Counter(examples_of(tmp_path / name)) for name in ("drop", "keep", "once")}
    assert found["drop"] == found["once"]
    assert found["keep"] == Counter(dict.fromkeys(found["once"], 3))
    left_out = read_lines(tmp_path / "drop/left_out.jsonl")
    assert {Path(each["path"]).name for each in left_out} == {"b.jsonl", "c.jsonl"}


def test_prompts_of_a_given_validation_split_are_not_trained_on(
    source: Path, tmp_path: Path, monkeypatch, capsys
) -> None:
    write_lines(tmp_path / "train.jsonl", [example(i) for i in range(30)])
    # The same prompts with other answers, and prompts of their own
    held = [example(i, output=f"another {i}") for i in range(5)] + [
        example(i) for i in range(50, 60)
    ]
    write_lines(tmp_path / "val.jsonl", held)
    arguments = common(source, f"out={tmp_path}/train", f"source={tmp_path}/train.jsonl")
    arguments += [f"val_source={tmp_path}/val.jsonl", f"val_out={tmp_path}/val"]
    assert convert(monkeypatch, *arguments) == 0
    train, val = (read_manifest(str(tmp_path / name)) for name in ("train", "val"))
    assert train.totals.left_out == {"in_validation": 5}
    assert (train.totals.documents, val.totals.documents) == (25, 15)
    assert (train.split, val.split) == ("train", "val")
    before = files_under(tmp_path)
    assert convert(monkeypatch, *arguments) == 0
    assert files_under(tmp_path) == before


@pytest.mark.parametrize("too_long", ["fail", "drop", "cut_prompt"])
def test_what_is_longer_than_a_row(
    source: Path, tmp_path: Path, monkeypatch, capsys, too_long: str
) -> None:
    long_prompt = {"instruction": words(200, 1), "output": words(20, 2)}
    long_answer = {"instruction": words(5, 3), "output": words(200, 4)}
    write_lines(tmp_path / "a.jsonl", [example(1), long_prompt, long_answer, example(2)])
    arguments = common(source, f"out={tmp_path}/out", f"source={tmp_path}/a.jsonl")
    status = convert(monkeypatch, *arguments, f"too_long={too_long}")
    err = capsys.readouterr().err
    if too_long == "fail":
        assert status == 1
        assert "has " in err
        assert "more than context_length=512; set too_long=drop or cut_prompt" in err
        assert not (tmp_path / "out/index.json").exists()
        return
    assert status == 0
    totals = read_manifest(str(tmp_path / "out")).totals
    found = examples_of(tmp_path / "out")
    check_ledger(read_manifest(str(tmp_path / "out")), tmp_path / "out")
    if too_long == "drop":
        assert (totals.documents, totals.left_out, totals.documents_cut) == (2, {"too_long": 2}, 0)
        return
    assert (totals.documents, totals.left_out, totals.documents_cut) == (3, {"too_long": 1}, 1)
    tokenizer = load_tokenizer(str(source / "tokenizer"))
    text = next(
        tokenizer.decode(ids) for ids, _ in found if long_prompt["output"] in tokenizer.decode(ids)
    )
    prompt, _, answer = text.partition("\n\n### Response:\n")
    assert answer == f"{long_prompt['output']}<|endoftext|>\n\n", "an answer is never cut"
    kept = prompt.partition("### Instruction:\n")[2]
    assert long_prompt["instruction"].startswith(kept)
    assert len(kept) > 20


def test_any_number_of_workers_gives_the_same_bytes(source: Path, tmp_path: Path) -> None:
    for workers in (1, 2, 3):
        finish(source, str(tmp_path / f"{workers}"), workers)
    one = files_under(tmp_path / "1")
    assert one == files_under(tmp_path / "2") == files_under(tmp_path / "3")


def start(source: Path, place: str, workers: int) -> subprocess.Popen[str]:
    arguments = common(source, f"out={place}/train", f"val_out={place}/val", "val_fraction=0.2")
    command = [
        sys.executable,
        str(ROOT / "convert/to_sft.py"),
        *arguments,
        f"num_workers={workers}",
    ]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )


def finish(source: Path, place: str, workers: int = 2) -> None:
    process = start(source, place, workers)
    _, err = process.communicate(timeout=120)
    assert (process.returncode, err) == (0, "")


FAULTS = [
    pytest.mark.faults,
    pytest.mark.skipif(
        "FLAME_COMPOSER_FAULTS" not in os.environ, reason="takes minutes: make test-faults"
    ),
]


@pytest.mark.parametrize(
    ("store", "kills"),
    [
        ("folder", 4),
        ("s3", 2),
        pytest.param("folder", 20, marks=FAULTS),
        pytest.param("s3", 20, marks=FAULTS),
    ],
)
def test_killed_at_any_instant_and_resumed_it_gives_the_same_bytes(
    source: Path, tmp_path: Path, store: str, kills: int, request
) -> None:
    if store == "s3":
        request.getfixturevalue("s3")
    finish(source, str(tmp_path / "whole"))
    rng = random.Random(kills)
    base = str(tmp_path / "killed") if store == "folder" else f"s3://{BUCKET}/tuning{kills}"
    number = done = 0
    while done < kills:
        place = f"{base}{number}"
        process = start(source, place, 1 + done % 3)
        deadline = time.monotonic() + 60
        while not there(place) and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(rng.uniform(0, 0.6))
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            done += 1
        process.communicate(timeout=60)
        if process.returncode == 0:
            check_same(place, tmp_path / "whole")
            number += 1
    finish(source, f"{base}{number}")
    check_same(f"{base}{number}", tmp_path / "whole")


def there(place: str) -> bool:
    return bool(files.ls(f"{place}/train"))


def check_same(place: str, whole: Path) -> None:
    found = {name: files.read(f"{place}/{name}") for name in files.find(place)}
    assert found == files_under(whole)
    if not is_url(place):
        check_ledger(read_manifest(f"{place}/train"), Path(place, "train"))


def test_a_number_of_many_digits_in_an_array(source: Path, tmp_path: Path, monkeypatch) -> None:
    """Python's parser refuses it; in JSON lines, too, it is a number like any other."""
    (tmp_path / "a.json").write_text(f'[{json.dumps(example(1))[:-1]}, "id": {"9" * 5000}}}]')
    (tmp_path / "a.jsonl").write_text((tmp_path / "a.json").read_text()[1:-1] + "\n")
    for name in ("a.json", "a.jsonl"):
        arguments = common(source, f"out={tmp_path}/{name}.out", "num_workers=1")
        arguments[0] = f"source={tmp_path}/{name}"
        assert convert(monkeypatch, *arguments) == 0
    tokens = [next(rows_of(tmp_path / f"{name}.out"))[0] for name in ("a.json", "a.jsonl")]
    assert np.array_equal(*tokens)


def test_inputs_that_change_between_census_and_conversion_are_noticed(
    source: Path, tmp_path: Path, monkeypatch, capsys
) -> None:
    """What is left out was decided by what the inputs were: it would hit other examples."""
    from flame_composer.dataset import sft

    path = write_lines(tmp_path / "a.jsonl", [example(i) for i in (1, 2, 1, 3)])
    take = sft.take_census

    def take_and_change(*given: Any) -> Any:
        found = take(*given)
        write_lines(path, [example(i) for i in (1, 2, 3, 3)])
        return found

    monkeypatch.setattr(sft, "take_census", take_and_change)
    arguments = common(source, f"out={tmp_path}/out", f"source={path}")
    assert convert(monkeypatch, *arguments) == 1
    assert capsys.readouterr().err == (
        f"error: {path}, unit 000000: was changed while it was converted; remove the unfinished"
        f" {tmp_path}/out, and run the same command again\n"
    )
    assert not (tmp_path / "out/index.json").exists()


def lying(masks: list[list[int]]) -> Rows:
    """Two rows of 16 tokens, of a document of 6 and one of 10 each, with these loss masks."""
    tokens = np.arange(32, dtype=np.uint16).reshape(2, 16)
    loss_mask = np.zeros((2, 16), np.bool_)
    for row, places in zip(loss_mask, masks, strict=True):
        row[places] = True
    return Rows(tokens, np.array([6, 10, 6, 10]), np.array([0, 2, 4]), loss_mask)


@pytest.mark.parametrize(
    ("masks", "problem"),
    [
        ([[3, 8], [6]], "the first token of a document in its row 1 carries loss"),
        ([[0], [7]], "the first token of a document in its row 0 carries loss"),
        ([[5, 15], []], "no token of its row 1 carries loss"),
        ([[1, 7], [5, 15]], None),
    ],
)
def test_masks_that_cannot_be_right_are_bad_shards(
    tmp_path: Path, masks: list[list[int]], problem: str | None
) -> None:
    """An example must not be predicted from another one, and a row without loss is none."""
    writer = ShardWriter(tmp_path / "shards", np.uint16, 16, 1 << 20, has_loss_mask=True)
    writer.write(lying(masks))
    writer.flush()
    view = ShardView(
        tmp_path / "shards/shard.00000.mds",
        num_rows=2,
        context_length=16,
        token_dtype="uint16",
        has_loss_mask=True,
    )
    if problem is None:
        assert view.count()[2] == 4
        return
    with pytest.raises(BadShard, match=f"^{problem}$"):
        view.count()


@pytest.mark.parametrize(
    ("edit", "problem"),
    [
        (lambda m: m["config"].pop("template"), "'template' must be a string"),
        (lambda m: m["config"].update(template=7), "'template' must be a string"),
        (lambda m: m["config"].update(padding_token=-5), "'padding_token' must be a whole number"),
        (lambda m: m["config"].update(stop_token=400), "'stop_token' must be one of the token"),
        (lambda m: more_loss(m, 1), "tokens of the rows carry loss, and it says"),
        (lambda m: more_loss(m, 10**9), "tokens with loss cannot be right"),
    ],
)
def test_a_manifest_that_was_edited_is_damaged(
    source: Path, tmp_path: Path, monkeypatch, capsys, edit: Any, problem: str
) -> None:
    write_lines(tmp_path / "a.jsonl", [example(i) for i in range(20)])
    arguments = common(source, f"out={tmp_path}/out", f"source={tmp_path}/a.jsonl")
    assert convert(monkeypatch, *arguments) == 0
    path = tmp_path / "out/manifest.json"
    manifest = json.loads(path.read_text())
    edit(manifest)
    path.write_text(json.dumps(manifest))
    capsys.readouterr()
    monkeypatch.setattr(sys, "argv", ["inspect_mds.py", f"data={tmp_path}/out", "verify=true"])
    assert run(load_script("inspect_mds").main, InspectConfig) == 1
    assert re.fullmatch(
        rf"error: {re.escape(str(path))}: damaged: .*{re.escape(problem)}.*\n",
        capsys.readouterr().err,
    )


def more_loss(manifest: dict[str, Any], count: int) -> None:
    for ledger in (manifest["totals"], manifest["units"][0]["ledger"]):
        ledger["loss_tokens"] += count


def test_of_what_is_far_too_long_no_answer_is_looked_for(source: Path) -> None:
    """A template without marks is rendered once for each answer: that is quadratic."""
    tokenizer = load_tokenizer(str(source / "tokenizer"))
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['content'] }}"
        "{% if m['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    )
    template = load_template("tokenizer", tokenizer)
    encode = build_encoder(bare(tokenizer), add_bos=False, add_eos=False)
    masker = Masker(template, bare(tokenizer), encode, stop=0, train_on="all", longest=64)
    renders: list[int] = []
    render = ChatTemplate.render
    turns = [Message(role, "ab") for _ in range(200) for role in ("user", "assistant")]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            ChatTemplate, "render", lambda *a, **k: (renders.append(1), render(*a, **k))[1]
        )
        (found,) = masker.tokens_of([turns])
    assert isinstance(found, Tokens)
    assert (len(found.ids) > 64, found.has_loss.any(), len(renders)) == (True, False, 1)
