"""Which of fla's models run on a CPU."""

from __future__ import annotations

import os
from typing import Any

import torch

# The model types that have a CPU form of every operation, with the layers in use by default
ON_CPU = (
    "comba",
    "delta_net",
    "gated_deltanet",
    "gated_deltaproduct",
    "gla",
    "gsa",
    "hgrn2",
    "kda",
    "lightnet",
    "linear_attn",
    "mamba",
    "mamba2",
    "retnet",
    "rwkv6",
    "rwkv7",
    "transformer",
)


def interprets() -> bool:
    """Return whether Triton's interpreter runs kernels here, in place of a GPU."""
    return os.environ.get("TRITON_INTERPRET") == "1" and not torch.cuda.is_available()


def _is_flas(config_class: type) -> bool:
    return config_class.__module__.startswith("fla.")


def missing_type(config_class: Any) -> str | None:
    """Return why no model of a config class trains on a CPU, or None if some do."""
    if not _is_flas(config_class) or interprets() or config_class.model_type in ON_CPU:
        return None
    known = f"{', '.join(ON_CPU[:-1])} and {ON_CPU[-1]}"
    return (
        f"fla's {config_class.model_type} needs a GPU, and there is none here; of fla's models,"
        f" {known} train on a CPU, and so does any of transformers' own (llama, ...)"
    )


def missing(hf_config: Any) -> tuple[str, str] | None:
    """Return the config key that makes a model need a GPU, and the reason.

    Return None if the model can be trained on a CPU.
    """
    if not _is_flas(type(hf_config)) or interprets():
        return None
    if reason := missing_type(type(hf_config)):
        return "model_type", reason
    for key, has_none in (
        ("attnres_block_size", getattr(hf_config, "attnres_block_size", None) is not None),
        ("hidden_act", getattr(hf_config, "hidden_act", None) == "powglu"),
    ):
        if has_none:
            return key, "needs a GPU, and there is none here; leave it out"
    return None
