"""A base, and runs that train adapters on it. A pytest plugin."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from flame_composer.checkpoint.to_model import save_hf_folder
from flame_composer.model.build import build_model
from flame_composer.model.hf_config import build_hf_config
from flame_composer.text.tokenizer import load_tokenizer
from tests.runs import ROOT, Corpus, Script, check

GLA = {
    "model_type": "gla",
    "vocab_size": 300,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_heads": 2,
}


def make_base(
    folder: Path, tokenizer: Path, config: dict[str, Any] | None = None, *, seed: int = 0
) -> Path:
    """A model of random weights in a Hugging Face folder."""
    torch.manual_seed(seed)
    tokens = load_tokenizer(str(tokenizer))
    model = build_model(build_hf_config(config or GLA, tokens, 64))
    save_hf_folder(model, tokens, folder, dtype="float32")
    return folder


def sha256(folder: Path) -> dict[str, str]:
    """The hash of every file in a folder."""
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in folder.iterdir()}


def lora_keys(corpus: Corpus, run: Path, base: Path, *more: str) -> list[str]:
    """The arguments of recipes/train.py for a run with dropout that trains adapters on `base`."""
    file = run.with_name(f"{run.name}.yaml")
    file.parent.mkdir(parents=True, exist_ok=True)
    recipe = yaml.safe_load((ROOT / "yamls/gla_tiny.yaml").read_text())
    file.write_text(yaml.dump({**recipe, "model": {"pretrained": str(base)}}))
    return corpus.keys(
        run, str(file), "lora.targets=all", "lora.dropout=0.1", "max_duration=20ba", *more
    )


@pytest.fixture(scope="session")
def base(corpus: Corpus, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base(tmp_path_factory.mktemp("base") / "base", corpus.tokenizer)


@pytest.fixture(scope="session")
def lora_run(corpus: Corpus, base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run with adapters that nothing disturbed."""
    run = tmp_path_factory.mktemp("runs") / "lora"
    check(Script("recipes/train.py", *lora_keys(corpus, run, base)).wait())
    return run


def with_moved_base(lora_run: Path, base: Path, folder: Path) -> tuple[Path, Path]:
    """The run's checkpoints, whose base is not where it was, and where it is now."""
    checkpoints, moved = folder / "checkpoints", folder / "moved"
    shutil.copytree(base, moved)
    checkpoints.mkdir()
    content = torch.load(lora_run / "checkpoints" / "ba20.pt", weights_only=False)
    content["state"]["integrations"]["huggingface"]["lora"]["base"]["place"] = str(folder / "gone")
    torch.save(content, checkpoints / "ba20.pt")
    return checkpoints, moved
