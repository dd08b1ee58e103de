"""Answers to the examples of a tuning dataset: which prompts and labels, what the files hold, and
runs that were killed.
"""

from __future__ import annotations

import itertools
import json
import os
import runpy
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedModel

from flame_composer.checkpoint.to_model import save_hf_folder
from flame_composer.config.load import load
from flame_composer.config.use import PredictConfig
from flame_composer.errors import ConfigError, DataError
from flame_composer.model.build import build_model
from flame_composer.model.hf_config import build_hf_config
from flame_composer.text.tokenizer import load_tokenizer
from flame_composer.use.generate import continue_ids, ends_of_answers
from flame_composer.use.metrics import score
from flame_composer.use.predict import (
    PREDICTIONS,
    SETTINGS,
    Sample,
    build_answer_sampling,
    open_predictions,
    predict,
    samples_in,
    samples_of,
    settings_of,
)
from tests.conftest import GLA
from tests.data_fixtures import byte_tokenizer, words
from tests.runs import ROOT, Corpus, Script, check, last_json, run_script

# A message is its number of tokens, and whether they carry loss.
messages = st.lists(st.tuples(st.integers(1, 5), st.booleans()), min_size=1, max_size=6)


@given(st.lists(messages, min_size=1, max_size=5), st.integers(0, 4))
def test_samples_are_the_turns_with_loss(
    pieces: list[list[tuple[int, bool]]], padding: int
) -> None:
    """Against a reading of the row token by token."""
    pieces = [[*piece] for piece in pieces] + ([[(padding, False)]] if padding else [])
    lengths = np.array([sum(length for length, _ in piece) for piece in pieces], np.uint32)
    mask = np.array([has for piece in pieces for length, has in piece for _ in range(length)])
    ids = np.arange(100, 100 + len(mask), dtype=np.uint16)
    expected = []
    first = 100
    for number, piece in enumerate(pieces):
        tokens = [has for length, has in piece for _ in range(length)]
        turns = []
        start = 0
        for has, run in itertools.groupby(tokens):
            end = start + len([*run])
            if has:
                turns.append((start, end))
            start = end
        expected += [
            Sample(
                7,
                number,
                turn,
                [*range(first, first + begin)],
                [*range(first + begin, first + end)],
            )
            for turn, (begin, end) in enumerate(turns)
            if begin > 0
        ]
        first += len(tokens)
    found = [*samples_in(7, ids, lengths, mask, turns="all")]
    assert found == expected
    # The last turn with loss of a piece, unless nothing comes before it
    last = {sample.piece: sample for sample in expected}
    assert [*samples_in(7, ids, lengths, mask, turns="last")] == [*last.values()]
    assert all(type(id) is int for sample in found for id in sample.prompt_ids + sample.label_ids)


def test_samples_of_rows_in_order() -> None:
    lengths, mask = np.array([3, 1]), np.array([False, True, True, False])
    rows = [
        {"input_ids": np.arange(4) + 10 * number, "doc_lengths": lengths, "loss_mask": mask}
        for number in range(2)
    ]
    assert [*samples_of(rows, turns="last")] == [
        Sample(0, 0, 0, [0], [1, 2]),
        Sample(1, 0, 0, [10], [11, 12]),
    ]


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    torch.manual_seed(0)
    config = build_hf_config({**GLA, "initializer_range": 0.2}, byte_tokenizer(), 512)
    return build_model(config).eval()


def samples(count: int = 11) -> list[Sample]:
    """Prompts of 1 to some 60 tokens."""
    tokenizer = byte_tokenizer()

    def ids(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False).input_ids

    return [
        Sample(number // 3, number % 3, 0, ids(words(1 + 7 * number % 20, number)), [*ids("né"), 0])
        for number in range(count)
    ]


def config_of(out: Path, *keys: str) -> PredictConfig:
    given = (f"out={out}", "model=m", "data.local=d", "max_new_tokens=12", "batch_size=4")
    return load(PredictConfig, [*given, *keys])


def answer(
    model: PreTrainedModel, out: Path, *keys: str, of: list[Sample] | None = None, data: str = "d"
) -> bytes:
    config = config_of(out, *keys)
    tokenizer = byte_tokenizer()
    settings = settings_of(config, model, data=data, stop=ends_of_answers(model, tokenizer))
    with open_predictions(config.out, settings) as predictions:
        predict(
            model,
            tokenizer,
            samples() if of is None else of,
            predictions,
            config,
            num_rows=4,
        )
    return (out / PREDICTIONS).read_bytes()


def lines_of(content: bytes) -> list[dict[str, Any]]:
    return [json.loads(line) for line in content.decode().split("\n")[:-1]]


def test_greedy_answers_are_the_likeliest_tokens(model: PreTrainedModel, tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    lines = lines_of(answer(model, tmp_path / "out"))
    assert [(line["row"], line["piece"], line["turn"]) for line in lines] == [
        (number // 3, number % 3, 0) for number in range(11)
    ]
    for sample, line in zip(samples(), lines, strict=True):
        ids = [*sample.prompt_ids]
        with torch.no_grad():
            for _ in range(12):
                ids.append(int(model(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
                if ids[-1] == 0:
                    break
        assert line["prompt"] == tokenizer.decode(sample.prompt_ids)
        assert line["label"] == "né", "without the end token"
        assert line["predict"] == tokenizer.decode(
            ids[len(sample.prompt_ids) :], skip_special_tokens=True
        )
        assert line["ended"] == (ids[-1] == 0)


def test_the_end_tokens_of_the_model_end_answers(model: PreTrainedModel, tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    (whole,) = lines_of(answer(model, tmp_path / "whole", of=samples(1)))
    assert not whole["ended"]
    sampling = build_answer_sampling(config_of(tmp_path), tokenizer, [0])
    third = continue_ids(model, [samples(1)[0].prompt_ids], sampling)[0][2]
    before = model.generation_config.eos_token_id
    model.generation_config.eos_token_id = [third, "no token", -1, 10**9, True]
    try:
        assert ends_of_answers(model, tokenizer) == sorted({0, third})
        (cut,) = lines_of(answer(model, tmp_path / "cut", of=samples(1)))
    finally:
        model.generation_config.eos_token_id = before
    assert cut["ended"]
    assert whole["predict"].startswith(cut["predict"])
    assert cut["predict"] != whole["predict"]


@pytest.mark.parametrize("keys", [(), ("temperature=1", "top_p=0.9")])
def test_a_run_cut_anywhere_goes_on_to_the_same_file(
    model: PreTrainedModel, tmp_path: Path, keys: tuple[str, ...]
) -> None:
    whole = answer(model, tmp_path / "whole", *keys)
    out = tmp_path / "cut"
    answer(model, out, *keys)
    ends = [place + 1 for place, byte in enumerate(whole) if byte == ord("\n")]
    cuts = {0, 1, len(whole) - 1, len(whole), *ends, *(end - 1 for end in ends), ends[4] + 17}
    for cut in sorted(cuts):
        (out / PREDICTIONS).write_bytes(whole[:cut])
        assert answer(model, out, *keys) == whole, cut
    assert b"\xc3" in whole, "some cut is within a character"
    (out / PREDICTIONS).write_bytes(whole[: whole.index(b"\xc3") + 1])
    assert answer(model, out, *keys) == whole


def test_sampling_is_as_the_keys_say(model: PreTrainedModel, tmp_path: Path) -> None:
    made = {
        keys: answer(model, tmp_path / f"{number}", *keys)
        for number, keys in enumerate(
            [
                (),
                ("seed=1",),  # changes nothing: nothing is sampled
                ("temperature=1",),
                ("temperature=1", "seed=1"),
                ("temperature=1", "top_k=1"),
                ("temperature=1", "top_p=1e-6"),
                ("max_new_tokens=3",),
            ]
        )
    }
    greedy, same, sampled, other, top_k, top_p, short = made.values()
    assert greedy == same == top_k == top_p
    assert len({greedy, sampled, other}) == 3
    for long, line in zip(lines_of(greedy), lines_of(short), strict=True):
        # A character that is not complete yet is read as U+FFFD
        assert long["predict"].startswith(line["predict"].rstrip("\N{REPLACEMENT CHARACTER}"))
        assert len(line["predict"]) < len(long["predict"])


def test_max_examples_are_the_first_ones(model: PreTrainedModel, tmp_path: Path) -> None:
    assert (
        lines_of(answer(model, tmp_path / "few", "max_examples=5"))
        == lines_of(answer(model, tmp_path / "all"))[:5]
    )


@pytest.mark.parametrize(
    ("keys", "named"),
    [
        (("temperature=1",), "temperature, top_p, top_k, seed"),
        (("max_new_tokens=13",), "max_new_tokens"),
        (("batch_size=5",), "batch_size"),
        (("turns=all",), "turns"),
        (("max_examples=3",), "max_examples"),
    ],
)
def test_another_run_in_the_same_folder_is_refused(
    model: PreTrainedModel, tmp_path: Path, keys: tuple[str, ...], named: str
) -> None:
    before = answer(model, tmp_path, of=samples(2))
    with pytest.raises(ConfigError) as caught:
        answer(model, tmp_path, *keys)
    assert str(caught.value) == (
        f"out={tmp_path}: holds answers made with another {named}; choose another folder, or delete"
        " this one"
    )
    assert (tmp_path / PREDICTIONS).read_bytes() == before
    assert answer(model, tmp_path, "seed=7", of=samples(2)) == before, "it is not used"


def test_another_model_or_dataset_is_refused(model: PreTrainedModel, tmp_path: Path) -> None:
    answer(model, tmp_path, of=samples(1))
    with pytest.raises(ConfigError, match=r"made with another data; choose"):
        answer(model, tmp_path, data="other")
    other = build_model(model.config)
    other.load_state_dict(model.state_dict())
    answer(other, tmp_path, of=samples(1))
    with torch.no_grad():
        other.lm_head.weight[0, 0] += 1e-3
    with pytest.raises(ConfigError, match=r"made with another model; choose"):
        answer(other, tmp_path, of=samples(1))


def test_folders_and_files_that_are_no_answers(model: PreTrainedModel, tmp_path: Path) -> None:
    def refused(kind: type[Exception], message: str, out: Path) -> None:
        with pytest.raises(kind) as caught:
            answer(model, out, of=samples(2))
        assert message in str(caught.value)
        assert "\n" not in str(caught.value)

    (tmp_path / "file").write_text("mine")
    refused(ConfigError, "cannot be written to: File exists; choose another", tmp_path / "file")
    refused(ConfigError, "cannot be written to: Not a directory", tmp_path / "file/out")
    (tmp_path / "other").mkdir()
    (tmp_path / "other/mine.txt").write_text("mine")
    refused(ConfigError, "holds mine.txt, but no settings.json of answers", tmp_path / "other")
    assert os.listdir(tmp_path / "other") == ["mine.txt"]

    out = tmp_path / "out"
    whole = answer(model, out, of=samples(2))
    settings = (out / SETTINGS).read_bytes()
    for content in (b"", b"[]", b"{", b"[" * 100_000, b"\xff", b"3"):
        (out / SETTINGS).write_bytes(content)
        refused(ConfigError, "its settings.json cannot be read; delete the folder", out)
    (out / SETTINGS).write_bytes(settings)
    first, second = whole.splitlines(keepends=True)
    for damaged in (
        b"{}\n" + second,
        b"\n" + second,
        first.replace(b'"row"', b'"wor"') + second,
        first.replace(b'"row": 0', b'"row": true') + second,
        first.replace(b'"ended": ', b'"ended": 1') + second,
        b"\xff\n" + second,
        b"[" * 100_000 + b"\n" + second,
    ):
        (out / PREDICTIONS).write_bytes(damaged)
        refused(DataError, f"{out / PREDICTIONS}:1: damaged: not a line of answers", out)
        assert (out / PREDICTIONS).read_bytes() == damaged
    (out / PREDICTIONS).write_bytes(second + first)
    refused(DataError, "its answer to row 0, piece 1, turn 0 is not where it belongs", out)
    (out / PREDICTIONS).write_bytes(whole + second)
    refused(DataError, "holds 3 answers to 2 prompts; delete the folder", out)

    (out / PREDICTIONS).unlink()
    (out / PREDICTIONS).symlink_to(tmp_path / "file")
    refused(ConfigError, "cannot be written to: is a link, or no file", out)
    assert (tmp_path / "file").read_text() == "mine"


def test_two_at_once_are_refused(model: PreTrainedModel, tmp_path: Path) -> None:
    config = config_of(tmp_path)
    settings = settings_of(config, model, data="d", stop=[0])
    with (
        open_predictions(config.out, settings),
        pytest.raises(ConfigError, match="another process writes answers there; wait for its end"),
        open_predictions(config.out, settings),
    ):
        pass


def test_no_example_to_answer(model: PreTrainedModel, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"^data: no example has an answer after a prompt"):
        answer(model, tmp_path, of=[])


@dataclass
class Tuning:
    """A model and the two splits of a tuning dataset, as the convert scripts make them."""

    model: Path
    train: Path
    val: Path

    def keys(self, out: Path, *keys: str) -> list[str]:
        given = [f"model={self.model}", f"out={out}", "max_new_tokens=40", "batch_size=2"]
        place = [] if any(key.startswith("data.") for key in keys) else [f"data.local={self.val}"]
        named = {key.partition("=")[0] for key in keys}
        return [*(each for each in given if each.partition("=")[0] not in named), *place, *keys]

    def answer(self, out: Path, *keys: str) -> subprocess.CompletedProcess[str]:
        return run_script("recipes/predict.py", *self.keys(out, *keys))


@pytest.fixture(scope="module")
def tuning(corpus: Corpus, tmp_path_factory: pytest.TempPathFactory) -> Tuning:
    folder = tmp_path_factory.mktemp("tuning")
    made = Tuning(folder / "model", folder / "train", folder / "val")
    with (folder / "examples.jsonl").open("w") as file:
        for number in range(30):
            turns = []
            for turn in range(1 + number % 3):
                text = words(1 + number % 4, 10 * number + turn)
                turns += [
                    {"role": "user", "content": text},
                    {"role": "assistant", "content": f"{text} é {turn}"},
                ]
            file.write(json.dumps({"messages": turns}) + "\n")
    tokenizer = load_tokenizer(str(corpus.tokenizer))
    torch.manual_seed(0)
    config = build_hf_config({**GLA, "initializer_range": 0.2}, tokenizer, 512)
    save_hf_folder(build_model(config), tokenizer, made.model, dtype="float32")
    keys = (
        f"source={folder / 'examples.jsonl'}",
        "format=messages",
        "template=alpaca",
        f"tokenizer={corpus.tokenizer}",
        "context_length=512",
        f"out={made.train}",
        "val_fraction=0.4",
        f"val_out={made.val}",
    )
    check(run_script("convert/to_sft.py", *keys))
    return made


def test_the_script_answers_scores_and_tells(tuning: Tuning, tmp_path: Path) -> None:
    found = last_json(tuning.answer(tmp_path / "last"))
    lines = lines_of((tmp_path / "last" / PREDICTIONS).read_bytes())
    written = json.loads((tmp_path / "last/metrics.json").read_text())
    assert found == {
        "model": str(tuning.model),
        "data": str(tuning.val),
        "out": str(tmp_path / "last"),
        **written,
    }
    assert written["examples"] == len(lines) > 5
    assert written["ended"] == sum(line["ended"] for line in lines)
    pairs = [(line["predict"], line["label"]) for line in lines]
    assert written["scores"] == score(pairs)["scores"]
    answered = check(tuning.answer(tmp_path / "last"))
    assert last_json(answered) == found, "nothing is left to do"
    assert f"{len(lines)} answers, of which the model ended {written['ended']}" in answered.stdout
    assert answered.stderr == ""
    assert all(line["prompt"].endswith("### Response:\n") for line in lines)
    assert all(line["label"].endswith("\n\n") for line in lines)

    check(tuning.answer(tmp_path / "all", "turns=all"))
    every = lines_of((tmp_path / "all" / PREDICTIONS).read_bytes())
    assert {line["turn"] for line in every} == {0, 1, 2}
    assert len(every) == sum(line["turn"] + 1 for line in lines)
    assert all(line["label"].endswith(f" é {line['turn']}\n\n") for line in every)
    last = {(line["row"], line["piece"]): line for line in every}
    assert [(line["turn"], line["prompt"], line["label"]) for line in last.values()] == [
        (line["turn"], line["prompt"], line["label"]) for line in lines
    ]


def test_a_remote_dataset_is_streamed(tuning: Tuning, tmp_path: Path) -> None:
    check(tuning.answer(tmp_path / "out", "max_examples=3"))
    before = (tmp_path / "out" / PREDICTIONS).read_bytes()
    cache = tmp_path / "cache"
    remote = (f"data.local={cache}", f"data.remote={tuning.val}")
    found = last_json(tuning.answer(tmp_path / "out", "max_examples=3", *remote))
    assert (found["data"], found["examples"]) == (str(tuning.val), 3), "it is the same dataset"
    assert (tmp_path / "out" / PREDICTIONS).read_bytes() == before
    assert any(cache.rglob("*.mds"))


@pytest.mark.parametrize("keys", [(), ("temperature=1", "turns=all")])
def test_a_killed_run_goes_on_to_the_same_files(
    tuning: Tuning, tmp_path: Path, keys: tuple[str, ...]
) -> None:
    check(tuning.answer(tmp_path / "whole", *keys))
    whole = (tmp_path / "whole" / PREDICTIONS).read_bytes()
    file = tmp_path / "killed" / PREDICTIONS
    for count in (1, 4, 7):
        script = Script("recipes/predict.py", *tuning.keys(tmp_path / "killed", *keys))
        while not file.exists() or file.read_bytes().count(b"\n") < count:
            assert script.process.is_alive(), script.read("err")
            time.sleep(0.002)
        script.process.kill()
        assert script.wait().returncode == -signal.SIGKILL, "it finished before it could be killed"
        assert whole.startswith(file.read_bytes())
        assert file.stat().st_size < len(whole)
    result = check(tuning.answer(tmp_path / "killed", *keys))
    assert file.read_bytes() == whole
    assert (tmp_path / "killed/metrics.json").read_bytes() == (
        tmp_path / "whole/metrics.json"
    ).read_bytes()
    assert result.stderr == ""


def test_ctrl_c_keeps_what_was_written(tuning: Tuning, tmp_path: Path) -> None:
    script = Script("recipes/predict.py", *tuning.keys(tmp_path / "out", "max_new_tokens=200"))
    file = tmp_path / "out" / PREDICTIONS
    while not file.exists() or not file.read_bytes():
        assert script.process.is_alive(), script.read("err")
        time.sleep(0.002)
    assert script.process.pid is not None
    os.kill(script.process.pid, signal.SIGINT)
    process = script.wait()
    assert process.returncode == 130
    assert process.stderr == (
        "interrupted; what was finished is kept, and the same command goes on from there\n"
    )
    assert not (tmp_path / "out/metrics.json").exists()


def test_wrong_data_and_models(tuning: Tuning, corpus: Corpus, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    (tmp_path / "other/mine").write_text("")
    prompts_too = tmp_path / "prompts"
    check(
        run_script(
            "convert/to_sft.py",
            f"source={tuning.val.parent / 'examples.jsonl'}",
            "format=messages",
            "template=alpaca",
            f"tokenizer={corpus.tokenizer}",
            "context_length=512",
            "train_on=prompt_too",
            f"out={prompts_too}",
        )
    )
    wrong = {
        f"data.local={prompts_too}": (
            f"command line: data.local={prompts_too}: was made with train_on=prompt_too, so that"
        ),
        f"data.local={corpus.val}": f"command line: data.local={corpus.val}: must be a tuning data",
        f"data.local={tmp_path}": f"{tmp_path}: no dataset made by convert/to_",
        f"data.local={tmp_path / 'none'}": f"{tmp_path / 'none'}: no such folder",
        f"model={tmp_path / 'none'}": f"{tmp_path / 'none'}: ",
        f"model={tuning.val}": f"{tuning.val}: ",
        f"out={tmp_path / 'other'}": f"out={tmp_path / 'other'}: holds mine, but no settings.json",
        f"out={tmp_path / 'other/mine/out'}": f"out={tmp_path / 'other/mine/out'}: cannot be",
    }
    for key, message in wrong.items():
        process = tuning.answer(tmp_path / "out", key)
        assert process.returncode == 2, process.stderr
        (line,) = process.stderr.splitlines()
        assert line.startswith(f"error: {message}"), line
        assert not (tmp_path / "out").exists()


def test_a_missing_package_is_named_before_the_model_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "rouge_chinese", None)
    main = runpy.run_path(str(ROOT / "recipes/predict.py"))["main"]
    keys = [f"model={tmp_path / 'none'}", "data.local=d", f"out={tmp_path / 'out'}"]
    with pytest.raises(
        ConfigError,
        match=r"^metrics: rouge-chinese is not installed; pip install 'flame-composer\[metrics\]'$",
    ):
        main(load(PredictConfig, keys))


@pytest.mark.parametrize(
    ("key", "rule"),
    [
        (
            "out=s3://bucket/answers",
            "command line: out=s3://bucket/answers: must be a local folder",
        ),
        ("out=", "must not be empty"),
        ("turns=first", "turns=first: must be one of ['last', 'all']"),
        ("batch_size=0", "must be a positive number of prompts"),
        ("max_new_tokens=0", "must be more than 0"),
        ("temperature=-1", "must be 0 or more, and finite"),
        ("temperature=inf", "must be 0 or more, and finite"),
        ("top_p=0", "must be in (0, 1]"),
        ("top_k=-1", "must be 0 or more"),
        ("max_examples=0", "must be a positive number of answers, or null"),
        ("seed=-1", "must be in [0, 2**32)"),
        ("data.local=null", "must name a dataset folder"),
        ("data.num_workers=2", "unknown key"),
        ("max_example=3", "unknown key; did you mean max_examples?"),
    ],
)
def test_wrong_keys(tmp_path: Path, key: str, rule: str) -> None:
    with pytest.raises(ConfigError) as caught:
        config_of(tmp_path / "out", key)
    assert rule in str(caught.value)
    assert not (tmp_path / "out").exists()
