"""Runs on tuning data: examples do not see one another, and only answers are learned."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from composer.core import DataSpec
from transformers import PretrainedConfig

from flame_composer.batch import IGNORE, collate
from flame_composer.config.data import DataConfig
from flame_composer.dataset.open import open_dataset
from flame_composer.loader.batches import build_train_loader, split_noting_void
from flame_composer.loader.fetch import Shards
from flame_composer.model.build import build_model
from flame_composer.model.causal_lm import CausalLM
from flame_composer.text.tokenizer import load_tokenizer
from tests.runs import Corpus, Script, check, last_json, read_log, run_script

ROW = 96


@pytest.fixture(scope="module")
def tuning(corpus: Corpus, tmp_path_factory) -> Path:
    """A folder with tuning data, `train` and `val`, for the tokenizer of `corpus`."""
    folder = tmp_path_factory.mktemp("tuning")
    choose = random.Random(1)
    words = json.loads(corpus.text.read_text().splitlines()[0])["text"].split()
    with (folder / "examples.jsonl").open("w") as file:
        for number in range(260):
            turns = []
            for _ in range(choose.randint(1, 2)):
                question = " ".join(choose.choices(words, k=choose.randint(1, 6)))
                answer = " ".join(choose.choices(words, k=choose.randint(1, 8)))
                turns += [
                    {"role": "user", "content": f"{number} {question}"},
                    {"role": "assistant", "content": answer},
                ]
            file.write(json.dumps({"messages": turns}) + "\n")
    check(
        run_script(
            "convert/to_sft.py",
            f"source={folder}/examples.jsonl",
            "format=messages",
            "template=alpaca",
            "default_system=",
            f"tokenizer={corpus.tokenizer}",
            f"context_length={ROW}",
            "too_long=drop",
            f"out={folder}/train",
            f"val_out={folder}/val",
            "val_fraction=0.15",
        )
    )
    return folder


def keys(corpus: Corpus, tuning: Path, run: Path, *more: str) -> list[str]:
    return corpus.keys(
        run,
        f"context_length={ROW}",
        f"train_data.local={tuning}/train",
        f"eval_data.local={tuning}/val",
        "max_duration=20ba",
        "save_interval=4ba",
        *more,
    )


def shards_of(place: Path) -> Shards:
    return Shards([open_dataset(str(place))])


CONFIGS: dict[str, Any] = {
    "gla": {
        "model_type": "gla",
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_heads": 2,
        "vocab_size": 300,
    },
    "llama": {
        "model_type": "llama",
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 64,
        "vocab_size": 300,
    },
}


@pytest.fixture(scope="module", params=["gla", "llama"])
def model(request, corpus: Corpus) -> CausalLM:
    from flame_composer.config.sections import ModelConfig
    from flame_composer.model.hf_config import new_hf_config

    tokenizer = load_tokenizer(str(corpus.tokenizer))
    torch.manual_seed(0)
    config = new_hf_config(ModelConfig(config=CONFIGS[request.param]), tokenizer, ROW)
    assert isinstance(config, PretrainedConfig)
    return CausalLM(build_model(config), tokenizer, varlen=True).eval()


def losses(model: CausalLM, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """The loss of every label [B, T - 1], 0 where there is none."""
    with torch.no_grad():
        labels = batch["labels"]
        logits = model({name: each for name, each in batch.items() if name != "labels"}).logits
    return torch.nn.functional.cross_entropy(
        logits[:, :-1].transpose(1, 2), labels[:, 1:], ignore_index=IGNORE, reduction="none"
    )


def test_an_example_in_a_row_has_the_loss_it_has_alone(model: CausalLM, tuning: Path) -> None:
    shards = shards_of(tuning / "train")
    tried = 0
    for number in range(12):
        row = shards.row(number)
        together = losses(model, collate([row]))[0]
        start = 0
        for length in row["doc_lengths"].tolist():
            end = start + length
            alone = {
                "input_ids": row["input_ids"][start:end],
                "loss_mask": row["loss_mask"][start:end],
                "doc_lengths": np.array([length]),
            }
            if alone["loss_mask"].any():
                expected = losses(model, collate([alone]))[0]
                assert torch.allclose(together[start : end - 1], expected, atol=1e-5, rtol=0)
                tried += 1
            start = end
        # The first token of an example is predicted by none.
        ends = np.cumsum(row["doc_lengths"])[:-1]
        assert (collate([row])["labels"][0][ends] == IGNORE).all()
    assert tried > 10


def test_another_neighbour_changes_no_logit(model: CausalLM, tuning: Path) -> None:
    row = shards_of(tuning / "train").row(0)
    first = int(row["doc_lengths"][0])
    batch = collate([row])
    other = {name: each.clone() for name, each in batch.items()}
    other["input_ids"][0, :first] = (other["input_ids"][0, :first] + 7) % 300
    with torch.no_grad():
        logits, changed = (
            model({name: each for name, each in given.items() if name != "labels"}).logits[0]
            for given in (batch, other)
        )
    assert not torch.equal(logits[:first], changed[:first])
    assert torch.allclose(logits[first:], changed[first:], atol=1e-6, rtol=0)


def test_a_run_on_examples_learns_the_answers_alone(
    corpus: Corpus, tuning: Path, tmp_path: Path
) -> None:
    """Its loss is the mean over the answers' tokens; it is exported with template and stop ids."""
    summary = last_json(Script("recipes/train.py", *keys(corpus, tuning, tmp_path / "run")).wait())
    assert summary["eval_loss"] < summary["eval_loss_initial"] - 0.5
    check(
        run_script(
            "convert/to_hf.py",
            f"checkpoint={tmp_path}/run/checkpoints",
            f"out={tmp_path}/hf",
        )
    )
    manifest = json.loads((tuning / "train/manifest.json").read_text())
    assert (tmp_path / "hf/chat_template.jinja").read_text() == manifest["config"]["template"]
    generation = json.loads((tmp_path / "hf/generation_config.json").read_text())
    assert generation["eos_token_id"] == manifest["config"]["stop_token"]
    found = last_json(
        run_script(
            "recipes/evaluate.py",
            f"model={tmp_path}/hf",
            f"data.local={tuning}/val",
            "data.max_rows=7",
        )
    )
    assert found["loss"] == pytest.approx(summary["eval_loss"], abs=1e-5)


@pytest.mark.parametrize("mixed", [False, True])
def test_a_killed_run_on_examples_goes_on_bit_for_bit(
    corpus: Corpus, tuning: Path, tmp_path: Path, mixed: bool
) -> None:
    """Also of a mixture with text, whose rows are of another kind but of one length."""
    streams: tuple[str, ...] = ()
    if mixed:
        check(
            run_script(
                "convert/to_mds.py",
                f"source={corpus.text}",
                f"tokenizer={corpus.tokenizer}",
                f"context_length={ROW}",
                f"out={tmp_path}/text",
            )
        )
        streams = (
            "train_data.local=null",
            f"train_data.streams.text.local={tmp_path}/text",
            f"train_data.streams.answers.local={tuning}/train",
        )
    whole = keys(corpus, tuning, tmp_path / "whole", *streams)
    check(Script("recipes/train.py", *whole).wait())
    killed = keys(corpus, tuning, tmp_path / "killed", *streams)
    script = Script("recipes/train.py", *killed)
    corpus.wait_for_step(script, tmp_path / "killed", 9)
    script.process.kill()
    script.wait()
    check(Script("recipes/train.py", *killed).wait())
    assert read_log(tmp_path / "whole") == read_log(tmp_path / "killed")
    if mixed:
        assert len(read_log(tmp_path / "whole")[-1]["streams"]) == 2


def test_a_global_batch_without_a_token_of_loss_changes_no_number(
    corpus: Corpus, tuning: Path, tmp_path: Path
) -> None:
    """Sequence length warmup cuts rows before their answers: the loss of such a step is 0."""
    more = ("algorithms.seq_length_warmup.duration=0.5", "max_duration=8ba")
    warm = ("algorithms.seq_length_warmup.min_seq_length=8", "eval_data=null", "save_folder=null")
    run = Script("recipes/train.py", *keys(corpus, tuning, tmp_path / "run", *more, *warm)).wait()
    check(run)
    steps = read_log(tmp_path / "run")
    assert len(steps) == 8
    assert (steps[0]["loss"], steps[0]["grad_norm"]) == (0, 0)
    assert steps[-1]["loss"] > 0


def test_microbatches_of_a_void_batch_say_so(tuning: Path) -> None:
    shards = shards_of(tuning / "train")
    batch = collate([shards.row(0), shards.row(1)])
    parts = split_noting_void(batch, 1)
    assert all("is_void" not in part for part in parts)
    batch["labels"][:] = IGNORE
    parts = split_noting_void(batch, 1)
    assert all(part["is_void"].all() for part in parts)
    loader = build_train_loader(
        {"": open_dataset(str(tuning / "train"))},
        DataConfig(local=str(tuning / "train"), num_workers=0),
        global_batch_size=2,
        seed=0,
    )
    assert isinstance(loader, DataSpec)
    assert loader.split_batch.func is split_noting_void
    assert loader.get_num_tokens_in_batch(parts[0], token_type="loss_generating") == 1


def test_evaluation_keeps_examples_apart(corpus: Corpus, tuning: Path, tmp_path: Path) -> None:
    """The loss of examples that see one another is a wrong number: it is refused."""
    run = tmp_path / "run"
    more = ("max_duration=1ba", "scheduler.warmup=0ba", "eval_data=null")
    check(Script("recipes/train.py", *keys(corpus, tuning, run, *more)).wait())
    result = run_script(
        "recipes/evaluate.py",
        f"model={run}/checkpoints",
        f"data.local={tuning}/val",
        "varlen=false",
    )
    assert result.returncode == 2
    assert result.stderr.endswith(
        f"varlen=false: must be true: {tuning}/val holds examples to tune on, which must not see"
        " one another\n"
    )


@pytest.mark.parametrize("where", ["train_data", "eval_data"])
def test_examples_that_would_see_one_another_are_refused(
    corpus: Corpus, tuning: Path, tmp_path: Path, where: str
) -> None:
    more = ["varlen=false"]
    if where == "eval_data":
        check(
            run_script(
                "convert/to_mds.py",
                f"source={corpus.text}",
                f"tokenizer={corpus.tokenizer}",
                f"context_length={ROW}",
                f"out={tmp_path}/text",
            )
        )
        more.append(f"train_data.local={tmp_path}/text")
    result = Script("recipes/train.py", *keys(corpus, tuning, tmp_path / "run", *more)).wait()
    place = tuning / ("train" if where == "train_data" else "val")
    assert (result.returncode, result.stderr.strip().splitlines()[-1]) == (
        2,
        f"error: command line: varlen=false: must be true: {place} holds examples to tune on, which"
        " must not see one another",
    )
