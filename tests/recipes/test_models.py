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
from tests.recipes.small import keys_of, small
from tests.runs import ROOT, Corpus, check, last_json, read_log, run_script

pytestmark = [
    pytest.mark.faults,
    pytest.mark.skipif(
        "FLAME_COMPOSER_FAULTS" not in os.environ, reason="takes minutes: make test-faults"
    ),
]


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
