"""Runs that train adapters: killed and resumed bit for bit, on any devices, on one base only."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from flame_composer.checkpoint.to_model import load_model
from flame_composer.config.load import load
from flame_composer.config.train import TrainConfig
from flame_composer.errors import ConfigError
from flame_composer.train.assemble import check as check_config
from tests.adapters import lora_keys, make_base, sha256
from tests.runs import Corpus, Ranks, Script, check, read_log, run_script


def content_of(run: Path) -> dict[str, Any]:
    newest = max((run / "checkpoints").glob("ba*.pt"), key=lambda file: int(file.stem[2:]))
    return torch.load(newest, weights_only=False)["state"]


def assert_same(run: Path, other: Path) -> None:
    assert read_log(run) == read_log(other)
    ours, theirs = content_of(run)["model"], content_of(other)["model"]
    assert list(ours) == list(theirs)
    assert [name for name, each in ours.items() if not torch.equal(each, theirs[name])] == []


def kill(script: Script, log: Path, *, after_step: int, seconds: float = 0.0) -> None:
    while not log.exists() or log.read_text().count("\n") < after_step:
        assert script.process.is_alive(), script.read("err")
        time.sleep(0.001)
    time.sleep(seconds)
    script.process.kill()
    assert script.wait().returncode == -signal.SIGKILL


def test_what_a_run_trains_and_saves(lora_run: Path, base: Path) -> None:
    """Adapters only, in checkpoints and in the optimizer, with the base's place and hash."""
    state = content_of(lora_run)
    assert len(state["model"]) == 40  # two matrices on each of ten projections in two blocks
    assert all(".lora_" in name for name in state["model"])
    optimizer = state["optimizers"]["AdamW"]
    assert optimizer["state"].keys() == state["model"].keys()
    assert all(tensor.abs().max() > 0 for tensor in state["model"].values())
    adapter = state["integrations"]["huggingface"]["lora"]
    assert adapter["base"]["place"] == str(base)
    assert (adapter["rank"], adapter["alpha"], adapter["dropout"]) == (8, 16.0, 0.1)
    assert len(adapter["targets"]) == 20
    assert not state["callbacks"]["Gradients"]["passed_over"]
    losses = [row["eval_loss"] for row in read_log(lora_run) if row.get("eval_loss")]
    assert losses[-1] < losses[0] - 0.02


def test_settings_of_a_run(corpus: Corpus, base: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    more = ("lora.rank=3", "lora.alpha=6", "lora.dropout=0.2", "lora.targets=[q_proj,up_proj]")
    keys = lora_keys(corpus, run, base, *more, "lora.train_embeddings=true", "max_duration=4ba")
    check(run_script("recipes/train.py", *keys))
    state = content_of(run)
    adapter = state["integrations"]["huggingface"]["lora"]
    assert (adapter["rank"], adapter["alpha"], adapter["dropout"]) == (3, 6.0, 0.2)
    assert {name.rpartition(".")[2] for name in adapter["targets"]} == {"q_proj", "up_proj"}
    shapes = {tuple(tensor.shape) for name, tensor in state["model"].items() if "lora_A" in name}
    assert shapes == {(3, 32)}
    whole = [name for name in state["model"] if ".lora_" not in name]
    assert whole == ["model.model.embeddings.weight", "model.lm_head.weight"]


def test_killed_twice_it_ends_bit_identical(
    corpus: Corpus, base: Path, lora_run: Path, tmp_path: Path
) -> None:
    before, run = sha256(base), tmp_path / "lora"
    keys = lora_keys(corpus, run, base)
    for step in (7, 13):
        kill(Script("recipes/train.py", *keys), run / "train_log.jsonl", after_step=step)
    check(run_script("recipes/train.py", *keys))
    assert_same(run, lora_run)
    assert sha256(base) == before


FAULTS = pytest.mark.skipif(
    "FLAME_COMPOSER_FAULTS" not in os.environ, reason="takes minutes: make test-faults"
)


@FAULTS
@pytest.mark.faults
def test_adapters_in_a_compiled_model(corpus: Corpus, tmp_path: Path) -> None:
    config = {
        "model_type": "llama",
        "vocab_size": 300,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 64,
    }
    base = make_base(tmp_path / "base", corpus.tokenizer, config)
    more = ("max_duration=6ba", "lora.dropout=0")
    for name, keys in (("plain", ()), ("compiled", ("parallelism.compile=true",))):
        env = {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path / f"{name}_code")}
        given = lora_keys(corpus, tmp_path / name, base, *more, *keys)
        check(run_script("recipes/train.py", *given, env=env))
    assert list(tmp_path.glob("compiled_code/**/*.py"))
    plain, compiled = (
        [row["loss"] for row in read_log(tmp_path / name)] for name in ("plain", "compiled")
    )
    assert compiled == pytest.approx(plain, rel=1e-4)


@FAULTS
@pytest.mark.faults
def test_10_kills(corpus: Corpus, base: Path, tmp_path: Path) -> None:
    """With dropout, an average of the weights and trained embeddings, at random instants."""
    before = sha256(base)
    more = (
        "max_duration=40ba",
        "save_interval=2ba",
        "lora.train_embeddings=true",
        "algorithms.ema.half_life=5ba",
        "train_data.num_workers=2",
    )
    whole, run = tmp_path / "whole" / "run", tmp_path / "killed" / "run"
    check(run_script("recipes/train.py", *lora_keys(corpus, whole, base, *more)))
    choose, keys, log = (
        random.Random(10),
        lora_keys(corpus, run, base, *more),
        run / "train_log.jsonl",
    )
    for _ in range(10):
        done = log.read_text().count("\n") if log.exists() else 0
        script = Script("recipes/train.py", *keys)
        kill(script, log, after_step=done + choose.randint(1, 2), seconds=choose.random() * 0.1)
    check(run_script("recipes/train.py", *keys))
    assert_same(run, whole)
    assert sha256(base) == before


@pytest.mark.parametrize(
    "more",
    [
        ("algorithms.ema.half_life=5ba", "lora.train_embeddings=true"),
        (
            "algorithms.swa.swa_start=5ba",
            "algorithms.swa.swa_end=12ba",
            "algorithms.swa.update_interval=2ba",
            "algorithms.label_smoothing.smoothing=0.1",
            "parallelism.activation_checkpointing=true",
        ),
    ],
    ids=["ema", "swa"],
)
def test_averages_go_on(corpus: Corpus, base: Path, tmp_path: Path, more: tuple[str, ...]) -> None:
    """They are of what is trained, and of nothing else."""
    runs = [tmp_path / name / "run" for name in ("whole", "killed")]
    for run in runs:
        keys = lora_keys(corpus, run, base, "max_duration=15ba", *more)
        if run is runs[1]:
            kill(Script("recipes/train.py", *keys), run / "train_log.jsonl", after_step=8)
        check(run_script("recipes/train.py", *keys))
    assert_same(*runs)
    state = content_of(runs[0])
    for name, kept in state["algorithms"]:
        if name == "EMA":
            assert kept["average"].keys() == state["model"].keys()


SHARDED = ("parallelism.cpu_fsdp=true", "parallelism.fsdp.state_dict_type=sharded")


@pytest.mark.parametrize(
    "more",
    [
        (),
        ("parallelism.cpu_fsdp=true", "parallelism.fsdp.state_dict_type=full"),
        (*SHARDED, "lora.train_embeddings=true"),
        (
            *SHARDED,
            "parallelism.fsdp.sharding_strategy=HYBRID_SHARD",
            "parallelism.fsdp.replicas=2",
            "parallelism.activation_checkpointing=true",
        ),
    ],
    ids=["ddp", "full", "sharded", "replicas"],
)
def test_two_ranks(corpus: Corpus, base: Path, tmp_path: Path, more: tuple[str, ...]) -> None:
    """They compute what one computes, and a killed run of two goes on bit for bit."""
    one, two, killed = (tmp_path / name / "run" for name in ("one", "two", "killed"))
    few = ("max_duration=10ba", "microbatch_size=1", "lora.dropout=0", *more)

    def keys(run: Path, *changed: str) -> list[str]:
        return lora_keys(corpus, run, base, *few, *changed)

    check(run_script("recipes/train.py", *keys(one, "parallelism.fsdp=null")))
    Ranks(2, *keys(two)).finish()
    for ours, theirs in zip(read_log(two), read_log(one), strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], abs=1e-5)
        assert ours["batch_hash"] == theirs["batch_hash"]
    Ranks(2, *keys(killed)).kill_after(killed / "train_log.jsonl", 7)
    Ranks(2, *keys(killed)).finish()
    assert read_log(killed) == read_log(two)
    newest = two / "checkpoints" / ("ba10" if SHARDED[1] in more else "ba10.pt")
    ours, theirs = (
        load_model(str(place))[0].state_dict() for place in (newest, one / "checkpoints")
    )
    for name, tensor in ours.items():
        assert torch.allclose(tensor, theirs[name], rtol=0, atol=2e-4), name


def test_a_damaged_checkpoint_is_passed_over(
    corpus: Corpus, base: Path, lora_run: Path, tmp_path: Path
) -> None:
    """One that lacks a matrix, or has it in another shape, is not gone on from."""
    run = tmp_path / "lora"
    shutil.copytree(lora_run, run)
    newest = run / "checkpoints" / "ba20.pt"
    content = torch.load(newest, weights_only=False)
    del content["state"]["model"][next(iter(content["state"]["model"]))]
    torch.save(content, newest)
    result = check(run_script("recipes/train.py", *lora_keys(corpus, run, base)))
    assert re.search(r"warning: .*ba20\.pt: it has no weights .*lora_A.*; trying", result.stderr)
    assert "resuming from" in result.stdout
    assert_same(run, lora_run)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (["lora.rank=4"], "its lora.rank is 8, and this run's 4"),
        (["lora.alpha=8"], "its lora.alpha is 16.0, and this run's 8.0"),
        (["lora.dropout=0.2"], "its lora.dropout is 0.1, and this run's 0.2"),
        (["lora.targets=default"], "its lora.targets are others than this run's"),
        (["lora.train_embeddings=true"], "its lora.train_embeddings is False, and this run's True"),
        (["lora=null"], "it holds an adapter (lora), and this run trains whole weights"),
    ],
)
def test_another_adapter_is_not_gone_on_from(
    corpus: Corpus, base: Path, lora_run: Path, changed: list[str], message: str
) -> None:
    result = run_script("recipes/train.py", *lora_keys(corpus, lora_run, base, *changed))
    assert result.returncode == 2
    assert message in result.stderr.splitlines()[-1]
    assert result.stderr.splitlines()[-1].startswith(f"error: {lora_run}/checkpoints: none of its")


def test_another_base_is_not_gone_on_from(
    corpus: Corpus, base: Path, lora_run: Path, tmp_path: Path
) -> None:
    """It is known by its content: the same model elsewhere is the same base."""
    other = make_base(tmp_path / "other", corpus.tokenizer, seed=1)
    result = run_script("recipes/train.py", *lora_keys(corpus, lora_run, other))
    assert result.returncode == 2
    (line,) = [each for each in result.stderr.splitlines() if each.startswith("error: ")]
    assert f"its adapter was trained on another base: '{base}', sha256 " in line
    assert f"this run's model.pretrained={other} has " in line
    copy, run = tmp_path / "copy", tmp_path / "lora"
    shutil.copytree(base, copy)
    shutil.copytree(lora_run, run)
    again = check(run_script("recipes/train.py", *lora_keys(corpus, run, copy)))
    assert "resuming from" in again.stdout


def test_a_run_of_whole_weights_is_not_gone_on_from(
    corpus: Corpus, base: Path, undisturbed: Path
) -> None:
    result = run_script("recipes/train.py", *lora_keys(corpus, undisturbed, base))
    assert result.returncode == 2
    message = "it holds whole weights, and this run trains an adapter (lora)"
    assert message in result.stderr.splitlines()[-1]


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (["lora.rank=0"], "lora.rank=0: must be in [1, 65536]"),
        (["lora.rank=100000"], "lora.rank=100000: must be in [1, 65536]"),
        (["lora.alpha=0"], "lora.alpha=0: must be more than 0, and finite"),
        (["lora.alpha=.inf"], "lora.alpha=inf: must be more than 0, and finite"),
        (["lora.dropout=1"], "lora.dropout=1: must be in [0, 1)"),
        (["lora.targets=[]"], "lora.targets=[]: must name a projection"),
        (["lora.targets=[q_proj,q_proj]"], "must not name one of them twice"),
        (["lora.targets=[all,q_proj]"], "must be default or all alone, or names only"),
        (["lora.tragets=all"], "lora.tragets: unknown key; did you mean lora.targets?"),
        (["model.pretrained=null"], "model.pretrained: must be set with lora"),
        (
            ["algorithms.layer_freezing={}"],
            "algorithms.layer_freezing={}: must not be set together with lora",
        ),
    ],
)
def test_wrong_keys(
    corpus: Corpus, base: Path, tmp_path: Path, keys: list[str], message: str
) -> None:
    arguments = lora_keys(corpus, tmp_path / "run", base)
    if keys == ["model.pretrained=null"]:
        keys = [*keys, "model.config.model_type=gla"]
    with pytest.raises(ConfigError) as error:
        load(TrainConfig, [*arguments, *keys])
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("lora.targets=[q_prj]", "named 'q_prj'; did you mean q_proj?"),
        ("lora.targets=[lm_head]", "lm_head is the output layer, which gets no adapter"),
        ("model.pretrained=/nowhere", "/nowhere: no such folder"),
    ],
)
def test_wrong_targets_are_found_before_anything_is_loaded(
    corpus: Corpus, base: Path, tmp_path: Path, key: str, message: str
) -> None:
    config = load(TrainConfig, lora_keys(corpus, tmp_path / "run", base, key))
    with pytest.raises(ConfigError, match=re.escape(message)):
        check_config(config)
    result = run_script("recipes/train.py", *lora_keys(corpus, tmp_path / "run", base, key))
    assert result.returncode == 2
    assert result.stderr.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_the_announcement_says_what_is_trained(corpus: Corpus, base: Path, tmp_path: Path) -> None:
    """And callbacks work: an export is the merged model, and prompts are continued."""
    run = tmp_path / "run"
    keys = lora_keys(
        corpus,
        run,
        base,
        "max_duration=4ba",
        "callbacks.hf_export.interval=4ba",
        "callbacks.generate={prompts: [ka], interval: 4ba, max_new_tokens: 4}",
    )
    result = check(run_script("recipes/train.py", *keys))
    assert re.search(r"^run: 0\.1 M parameters \(0\.02 M of them trained\) on", result.stdout, re.M)
    assert json.loads((run / "samples.jsonl").read_text())["prompt"] == "ka"
    exported, _ = load_model(str(run / "hf" / "ba4"))
    adapted, _ = load_model(str(run / "checkpoints"))
    ids = torch.arange(120)[None]
    with torch.no_grad():
        difference = exported(input_ids=ids).logits - adapted(input_ids=ids).logits
    assert difference.abs().max() <= 1e-4
