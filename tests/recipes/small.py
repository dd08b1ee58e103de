"""A recipe made small, and fit for a CPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

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
        "parallelism.tensor=1",
        "parallelism.context=1",
        "train_data.remote=null",
        "train_data.cache_limit=null",
        "eval_data.remote=null",
        "optimizer.lr=1e-2",
        "max_duration=30ba",
        *(["repetition_filter=null"] if "repetition_filter" in recipe else []),
    ]
