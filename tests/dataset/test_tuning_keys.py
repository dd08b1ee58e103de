"""What the keys of convert/to_sft.py make of examples."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from flame_composer.dataset import examples as census
from flame_composer.dataset import finish, workers
from flame_composer.dataset.manifest import Ledger, read_manifest
from flame_composer.text.tokenizer import load_tokenizer
from tests.data_fixtures import byte_tokenizer, files_under, words
from tests.dataset.test_tuning import convert, example, examples_of, read_lines, write_lines

Texts = list[tuple[str, str]]  # of each example: what carries no loss, and what does


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder, with a tokenizer."""
    monkeypatch.chdir(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path / "tokenizer")
    return tmp_path


def made(monkeypatch: pytest.MonkeyPatch, out: str, *arguments: str) -> Texts:
    """The examples of a conversion into `out`."""
    keys = [
        *("format=alpaca", "template=alpaca", "tokenizer=tokenizer", f"out={out}"),
        *("context_length=512", "num_workers=1", "encoder=hf"),
    ]
    assert convert(monkeypatch, *keys, *arguments) == 0
    return texts_of(out)


def texts_of(out: str) -> Texts:
    tokenizer = load_tokenizer("tokenizer")
    found = []
    for ids, flags in examples_of(Path(out)):
        parts: list[list[int]] = [[], []]
        for id, flag in zip(ids, flags, strict=True):
            parts[flag].append(id)
        found.append((tokenizer.decode(parts[0]), tokenizer.decode(parts[1])))
    return sorted(found)


def totals_of(out: str) -> Ledger:
    return read_manifest(out).totals


def pairs(count: int) -> list[dict[str, str]]:
    return [{"instruction": f"say {i}", "output": f"it is {i}"} for i in range(count)]


def asked(text: str) -> str:
    return f"### Instruction:\n{text}\n\n### Response:\n"


def test_how_an_example_begins(folder: Path, monkeypatch) -> None:
    """With the tokenizer's bos, and with a system prompt for those that have none."""
    write_lines(folder / "a.jsonl", [*pairs(1), pairs(2)[1] | {"system": "Own."}])
    answers = [(f"it is {i}<|endoftext|>\n\n") for i in range(2)]
    keys = ["source=a.jsonl", "default_system=Be brief."]
    assert made(monkeypatch, "plain", *keys) == [
        ("Be brief." + asked("say 0"), answers[0]),
        ("Own." + asked("say 1"), answers[1]),
    ]
    assert made(monkeypatch, "bos", *keys, "add_bos=true") == [
        ("<|endoftext|>Be brief." + asked("say 0"), answers[0]),
        ("<|endoftext|>Own." + asked("say 1"), answers[1]),
    ]
    none = made(monkeypatch, "none", "source=a.jsonl", "default_system=", "add_bos=false")
    assert none == [(asked("say 0"), answers[0]), ("Own." + asked("say 1"), answers[1])]
    (folder / "own.jinja").write_text(
        "{% for m in messages %}{{ m.role + ' ' }}{% if m.role == 'assistant' %}{% generation %}"
        "{{ m.content + eos_token }}{% endgeneration %}{% else %}{{ m.content }}{% endif %}"
        "{% endfor %}"
    )
    assert made(monkeypatch, "own", "source=a.jsonl", "template=own.jinja") == [
        ("system Own.user say 1assistant ", "it is 1<|endoftext|>"),
        ("user say 0assistant ", "it is 0<|endoftext|>"),
    ]


def test_examples_begin_as_documents_did_in_training(folder: Path, monkeypatch) -> None:
    """Unless add_bos says otherwise."""
    from flame_composer.text.ends import Ends, with_ends

    with_ends(byte_tokenizer(), Ends(bos=True, eos=True)).save_pretrained(folder / "tokenizer")
    write_lines(folder / "a.jsonl", pairs(1))
    for name, more, start in (
        ("as_it_is", [], "<|endoftext|>"),
        ("without", ["add_bos=false"], ""),
    ):
        ((prompt, _),) = made(monkeypatch, name, "source=a.jsonl", "default_system=", *more)
        assert prompt == start + asked("say 0")


def test_other_names_of_columns_and_tags(folder: Path, monkeypatch) -> None:
    write_lines(folder / "a.jsonl", [each | {"system": "Be brief."} for each in pairs(5)])
    wanted = made(monkeypatch, "alpaca", "source=a.jsonl")
    write_lines(
        folder / "b.jsonl",
        [{"q": each["instruction"], "a": each["output"], "s": "Be brief."} for each in pairs(5)],
    )
    columns = "columns={prompt: q, response: a, system: s}"
    assert made(monkeypatch, "columns", "source=b.jsonl", columns) == wanted
    write_lines(
        folder / "c.jsonl",
        [
            {
                "turns": [
                    {"who": "sys", "what": "Be brief."},
                    {"who": "person", "what": each["instruction"]},
                    {"who": "bot", "what": each["output"]},
                ],
            }
            for each in pairs(5)
        ],
    )
    tags = "tags={role: who, content: what, user: person, assistant: bot, system: sys}"
    for format in ("sharegpt", "messages"):
        keys = [f"format={format}", "columns={messages: turns}", tags]
        assert made(monkeypatch, format, "source=c.jsonl", *keys) == wanted


def test_what_carries_loss(folder: Path, monkeypatch) -> None:
    """All answers, the last, those that `loss` does not take out, or everything."""
    turns = [
        {"role": "user", "content": "one"},
        {"role": "assistant", "content": "two"},
        {"role": "user", "content": "three"},
        {"role": "assistant", "content": "four"},
    ]
    write_lines(folder / "a.jsonl", [{"messages": turns}])
    turns[3]["loss"] = False  # type: ignore[assignment]
    write_lines(folder / "b.jsonl", [{"messages": turns}])
    end = "<|endoftext|>\n\n"
    first, last = f"two{end}", f"four{end}"
    keys = ["format=messages", "default_system="]
    for name, source, train_on, without, loss in (
        ("all", "a", "all", asked("one") + asked("three"), first + last),
        ("last", "a", "last", asked("one") + first + asked("three"), last),
        ("too", "a", "prompt_too", "#", asked("one")[1:] + first + asked("three") + last),
        ("loss", "b", "all", asked("one") + asked("three") + last, first),
        ("loss_too", "b", "prompt_too", "#" + last, asked("one")[1:] + first + asked("three")),
    ):
        ((prompt, answer),) = made(
            monkeypatch, name, f"source={source}.jsonl", f"train_on={train_on}", *keys
        )
        assert len(prompt + answer) == len(without + loss)
        # The first token of all holds more than a character, perhaps.
        assert answer == loss[len(prompt) - len(without) :]
        assert prompt.startswith(without[:1])


def test_a_hugging_face_dataset_equals_its_files(folder: Path, monkeypatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (folder / "set").mkdir()
    for name in ("de", "en"):
        records = [example(i + 100 * len(name)) | {"input": name} for i in range(9)]
        write_lines(folder / "set" / f"{name}.jsonl", records)
        write_lines(folder / "set" / f"{name}_held.jsonl", pairs(4))
    listed = "".join(
        f"- config_name: {name}\n  data_files:\n  - split: train\n    path: {name}.jsonl\n"
        f"  - split: held\n    path: {name}_held.jsonl\n"
        for name in ("de", "en")
    )
    (folder / "set/README.md").write_text(f"---\nconfigs:\n{listed}---\n")
    for name, split, file in (("de", "train", "de"), ("en", "held", "en_held")):
        keys = ["source=set", f"split={split}", f"name={name}"]
        assert made(monkeypatch, f"{name}_out", *keys) == made(
            monkeypatch, f"{name}_file", f"source=set/{file}.jsonl"
        )


def test_datasets_of_a_registry(folder: Path, monkeypatch) -> None:
    """Each in its own form, to train on and to hold out."""
    (folder / "data/more").mkdir(parents=True)
    write_lines(folder / "data/a.jsonl", pairs(6))
    write_lines(folder / "data/more/0.jsonl", [{"q": "who", "a": "I"}])
    turns = [{"from": "human", "value": "say 2"}, {"from": "gpt", "value": "no"}]
    (folder / "data/c.json").write_text(json.dumps([{"conversations": turns}]))
    entries = {
        "own": {"file_name": "a.jsonl"},
        "more": {"file_name": "more", "columns": {"prompt": "q", "response": "a"}},
        "held": {"file_name": "c.json", "formatting": "sharegpt"},
        "other": {"script_url": "never.py"},
    }
    (folder / "data/dataset_info.json").write_text(json.dumps(entries))
    keys = [
        *("registry=data", "datasets=[own,more]", "val_datasets=[held]", "out=train"),
        *("val_out=val", "template=alpaca", "tokenizer=tokenizer", "context_length=512"),
        *("num_workers=1", "encoder=hf", "default_system="),
    ]
    assert convert(monkeypatch, *keys) == 0
    numbers = [i for i in range(6) if i != 2]
    assert texts_of("train") == [
        *((asked(f"say {i}"), f"it is {i}<|endoftext|>\n\n") for i in numbers),
        (asked("who"), "I<|endoftext|>\n\n"),
    ]
    assert texts_of("val") == [(asked("say 2"), "no<|endoftext|>\n\n")]
    assert totals_of("train").left_out == {"in_validation": 1}


def test_what_is_read(folder: Path, monkeypatch) -> None:
    """Files by their endings; damaged and long records are counted, and the others taken."""
    (folder / "in").mkdir()
    lines = [json.dumps(each) for each in pairs(4)]
    lines[1:1] = [
        "{",
        "[1]",
        json.dumps({"instruction": "a"}),
        json.dumps({"instruction": "a", "output": "b" * 900}),
    ]
    (folder / "in/a.jl").write_text("".join(f"{line}\n" for line in lines))
    write_lines(folder / "in/b.jsonl", pairs(9)[6:])
    keys = ["source=in", "suffixes=[.jl]", "on_error=skip", "max_document_bytes=800"]
    found = made(monkeypatch, "out", *keys)
    assert [answer for _, answer in found] == [f"it is {i}<|endoftext|>\n\n" for i in range(4)]
    assert totals_of("out").documents_skipped == 4


def test_rows_shards_units_and_processes(folder: Path, monkeypatch) -> None:
    write_lines(folder / "a.jsonl", [example(i) for i in range(80)])
    asked_for = []
    for module in (finish, census):
        real = module.convert_units

        def noted(job: Any, *given: Any, real: Any = real) -> Any:
            asked_for.append(given[1])
            return real(job, *given)

        monkeypatch.setattr(module, "convert_units", noted)
    whole = made(monkeypatch, "whole", "source=a.jsonl")
    small = made(
        monkeypatch,
        "small",
        *("source=a.jsonl", "unit_size=3000", "shard_size=3100", "context_length=220"),
        *("num_workers=2", "too_long=drop"),
    )
    assert asked_for == [1, 1, 2, 2]
    assert set(small) < set(whole)
    counts = [
        (manifest.context_length, len(manifest.units), manifest.totals.shards)
        for manifest in map(read_manifest, ("whole", "small"))
    ]
    assert counts[0] == (512, 2, 1)
    assert counts[1][0] == 220
    assert counts[1][1] > 4
    sizes = [path.stat().st_size for path in (folder / "small").rglob("*.mds")]
    assert len(sizes) > len(read_manifest("small").units)
    assert max(sizes) <= 3100
    assert totals_of("small").left_out == {"too_long": len(whole) - len(small)}


def test_examples_are_held_out_by_their_prompts(folder: Path, monkeypatch) -> None:
    answers = [{"instruction": words(4, i % 30), "output": words(5, i)} for i in range(90)]
    write_lines(folder / "a.jsonl", answers)
    train = made(monkeypatch, "train", "source=a.jsonl", "val_fraction=0.3", "val_out=val")
    val = texts_of("val")
    assert len(train) + len(val) == 90
    assert 9 < len(val) < 54
    assert {prompt for prompt, _ in train}.isdisjoint(prompt for prompt, _ in val)


def test_the_encoder_is_the_one_that_was_asked_for(folder: Path, monkeypatch) -> None:
    write_lines(folder / "a.jsonl", pairs(9))
    found = [
        made(monkeypatch, encoder, "source=a.jsonl", f"encoder={encoder}")
        for encoder in ("hf", "gigatoken")
    ]
    assert found[0] == found[1]
    encoders = [read_manifest(name).config["encoder"] for name in ("hf", "gigatoken")]
    assert encoders[0] == "hf"
    assert encoders[1].startswith("gigatoken ")


def test_a_cluster_that_is_not_there(folder: Path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(workers, "CLUSTER_SECONDS", 1)
    write_lines(folder / "a.jsonl", pairs(3))
    keys = [
        *(f"source={folder}/a.jsonl", f"out={folder}/out", "format=alpaca", "template=alpaca"),
        *(f"tokenizer={folder}/tokenizer", "cluster=tcp://127.0.0.1:1", "encoder=hf"),
    ]
    assert convert(monkeypatch, *keys) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: cluster: tcp://127.0.0.1:1: cannot be reached")
    assert err.count("\n") == 1
    assert not (folder / "out").exists()


def test_a_dask_cluster_gives_the_same_bytes(folder: Path, monkeypatch) -> None:
    from distributed import LocalCluster

    write_lines(folder / "a.jsonl", [*(example(i) for i in range(60)), example(7)])
    keys = [
        *(f"source={folder}/a.jsonl", "format=alpaca", "template=alpaca", "context_length=512"),
        *(f"tokenizer={folder}/tokenizer", "unit_size=2000", "too_long=drop", "encoder=hf"),
    ]
    assert convert(monkeypatch, *keys, f"out={folder}/local", "num_workers=2") == 0
    with LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None) as cluster:
        place = f"cluster={cluster.scheduler_address}"
        assert convert(monkeypatch, *keys, f"out={folder}/dask", place) == 0
    assert files_under(folder / "dask") == files_under(folder / "local")
    assert (
        len(read_lines(folder / "dask/left_out.jsonl")) == totals_of("dask").left_out["duplicate"]
    )
