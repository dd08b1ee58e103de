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


def missing(hf_config: Any) -> tuple[str, str] | None:
    """Return the config key that makes a model need a GPU, and the reason.

    Return None if the model can be trained on a CPU.
    """
    is_fla = type(hf_config).__module__.startswith("fla.")
    if not is_fla or interprets():
        return None
    if hf_config.model_type not in ON_CPU:
        known = f"{', '.join(ON_CPU[:-1])} and {ON_CPU[-1]}"
        return (
            "model_type",
            (
                f"fla's {hf_config.model_type} needs a GPU, and there is none here; of fla's"
                f" models, {known} train on a CPU, and so does any of transformers' own (llama,"
                " ...)"
            ),
        )
    for key, has_none in (
        ("attnres_block_size", getattr(hf_config, "attnres_block_size", None) is not None),
        ("hidden_act", getattr(hf_config, "hidden_act", None) == "powglu"),
    ):
        if has_none:
            return key, "needs a GPU, and there is none here; leave it out"
    return None
