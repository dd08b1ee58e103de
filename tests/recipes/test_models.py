"""Every recipe whose model has a CPU form, made small: it learns, is killed and goes on bit for
bit, is evaluated, exported and loaded again, and continues a text.
"""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

import pytest
import yaml

from flame_composer import cpu
from flame_composer.model.hf_config import build_hf_config
from tests.runs import ROOT, Corpus, check, last_json, read_log, run_script

pytestmark = [
    pytest.mark.faults,
    pytest.mark.skipif(
        "FLAME_COMPOSER_FAULTS" not in os.environ, reason="takes minutes: make test-faults"
    ),
]
# What makes a model small, where its config has the key. Of a hybrid, one layer of each kind is
# left, and what holds of its head dimensions and shares of channels is left as it is.
SMALL: dict[str, Any] = {
    "vocab_size": 300,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_heads": 2,
    "num_kv_heads": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "state_size": 16,
    "num_slots": 16,
    "expand_ratio": 32,
    "intermediate_size": 96,
    "attn": {"layers": [1], "num_heads": 2},
    "max_position_embeddings": 64,
    "eos_token_id": None,
    "pad_token_id": None,
}


def small(path: Path) -> dict[str, Any]:
    config = yaml.safe_load(path.read_text())["model"].get("config", {})
    return {**config, **{key: value for key, value in SMALL.items() if key in config}}


def models() -> dict[str, tuple[Path, dict[str, Any]]]:
    """The recipes by their names, one of those that are the same model once they are small."""
    found: dict[str, tuple[Path, dict[str, Any]]] = {}
    for path in sorted((ROOT / "yamls").glob("*.yaml")):
        config = small(path)
        if not config or any(config == other for _, other in found.values()):
            continue
        cpu.enable()
        if cpu.missing(build_hf_config(config, None, 64, to_run=False)) is None:
            found[path.stem] = (path, config)
    return found


MODELS = models()


def keys_of(path: Path, config: dict[str, Any]) -> list[str]:
    """The arguments that make a recipe small, and fit for a CPU."""
    recipe = yaml.safe_load(path.read_text())
    changed = {key: value for key, value in config.items() if key in SMALL}
    return [
        str(path),
        "model.pretrained=null",
        *(
            f"model.config.{key}={'null' if value is None else value}".replace("'", "")
            for key, value in changed.items()
        ),
        "precision=fp32",
        "parallelism.fsdp=null",
        "train_data.remote=null",
        "train_data.cache_limit=null",
        "eval_data.remote=null",
        "optimizer.lr=1e-2",
        "max_duration=30ba",
        *(["repetition_filter=null"] if "repetition_filter" in recipe else []),
    ]


@pytest.mark.parametrize("name", MODELS)
def test_a_recipe_made_small_does_all_that_the_first_does(
    name: str, corpus: Corpus, tmp_path: Path
) -> None:
    path, config = MODELS[name]
    keys = keys_of(path, config)
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    summary = corpus.train_run(whole, *keys)
    log = read_log(whole)
    assert summary["steps"] == len(log) == 30
    assert log[0]["loss"] == pytest.approx(math.log(300), rel=0.15)
    assert log[-1]["loss"] < log[0]["loss"] - 0.5

    corpus.killed_run(killed, *keys, after_step=12)
    corpus.train_run(killed, *keys)
    assert read_log(killed) == log

    out = tmp_path / "hf"
    check(run_script("convert/to_hf.py", f"checkpoint={killed / 'checkpoints'}", f"out={out}"))
    varlen = str(yaml.safe_load(path.read_text()).get("varlen", True)).lower()
    data = (f"data.local={corpus.val}", "data.max_rows=7", "batch_size=3", f"varlen={varlen}")
    scores = last_json(run_script("recipes/evaluate.py", f"model={out}", *data))
    assert scores["loss"] == pytest.approx(summary["eval_loss"], abs=1e-5)

    prompt = ("prompt=kat loman: ra", "max_new_tokens=8")
    texts = [
        check(run_script("recipes/generate.py", f"model={model}", *prompt)).stdout
        for model in (out, whole / "checkpoints")
    ]
    assert texts[0] == texts[1]
    assert texts[0].startswith("kat loman: ra")
    assert len(texts[0]) > len("kat loman: ra\n")
