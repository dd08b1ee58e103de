"""The benchmark of quantized weights: decoding, size and loss with fp32, int8 and bf16."""

from __future__ import annotations

import copy
import json
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from flame_composer import cpu
from flame_composer.bench.decoding import decode, read_prompt
from flame_composer.bench.measure import Figure, interleaved, measure, median, ratio
from flame_composer.config.bench import QuantizeBenchmarkConfig
from flame_composer.errors import ConfigError
from flame_composer.model.build import build_model
from flame_composer.model.quantized import Dtype, QuantizedEmbedding, QuantizedLinear, quantize
from flame_composer.model.work import count_parameters
from flame_composer.serve.states import prepare_weights

EVALUATE = Path(__file__).parents[2] / "recipes" / "evaluate.py"
# What quantized weights are compared with: fp32 as generate.py runs it, and as the server does
BASES = {"fp32": "fp32", "fp32_laid_out": "fp32 laid out as by serve.py"}


def build_models(config: QuantizeBenchmarkConfig) -> dict[str, PreTrainedModel]:
    """Return a GLA model of random weights by the type of its weights: fp32, int8 and bf16.

    fp32 is there twice, as it is and with its large weights laid out for the most sequences.
    """
    cpu.enable()
    from fla.models import GLAConfig

    torch.manual_seed(0)
    model = build_model(
        GLAConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.hidden_size,
            num_hidden_layers=config.num_layers,
            num_heads=max(1, config.hidden_size // 128),
            tie_word_embeddings=True,
        )
    ).eval()
    models = {"fp32": model}
    types: tuple[Dtype, ...] = ("int8", "bf16")
    for dtype in types:
        models[dtype] = copy.deepcopy(model)
        print(quantize(models[dtype], dtype, "a GLA of random weights").line)
    models["fp32_laid_out"] = copy.deepcopy(model)
    prepare_weights(models["fp32_laid_out"], max(config.batch_sizes))
    return models


def bytes_held(model: PreTrainedModel) -> int:
    """Return the bytes of a model's weights in memory; those that are tied count once."""
    held = sum(each.nbytes for each in (*model.parameters(), *model.buffers()))
    for layer in model.modules():
        if isinstance(layer, QuantizedLinear | QuantizedEmbedding):
            held += layer.weight.numel() * layer.bytes_each
    return held


def losses(model: str, data: str) -> dict[str, float]:
    """Return the loss of a trained model on a dataset with each type of weights."""
    found = {}
    for dtype in ("fp32", "int8", "bf16"):
        keys = [f"model={model}", f"data.local={data}"]
        keys += [] if dtype == "fp32" else [f"quantize={dtype}"]
        output = measure([sys.executable, str(EVALUATE), *keys]).output
        found[dtype] = json.loads(output.splitlines()[-1])["loss"]
    return found


def quantizing(config: QuantizeBenchmarkConfig) -> tuple[dict[str, Any], list[Figure]]:
    """Time decoding with each type of weights, and take the loss of a trained model, if given.

    Raise ConfigError on a machine with a GPU, where weights are not quantized.
    """
    if torch.cuda.is_available():
        raise ConfigError(
            "quantized weights are for a CPU: hide the GPU with CUDA_VISIBLE_DEVICES="
        )
    models = build_models(config)
    rows, figures = [], []
    for batch_size in config.batch_sizes:
        what = {
            name: decode(model, read_prompt(model, 16), batch_size, config.new_tokens)
            for name, model in models.items()
        }
        found = interleaved(what, config.repeats, f"decoding {batch_size} sequences")
        speeds = {f"{name}_tokens_per_second": round(median(found[name]), 1) for name in found}
        over = {
            f"{name}_over_{base}": ratio(found[name], found[base])
            for base in BASES
            for name in ("int8", "bf16")
        }
        rows.append({"batch_size": batch_size, **speeds, **over})
        print(json.dumps(rows[-1]), flush=True)
        figures += [
            Figure(
                f"quantized: {name} over {said}, decoded tokens/s, {batch_size} sequences",
                over[f"{name}_over_{base}"],
                at_least=1.5 if (name, base, batch_size) == ("int8", "fp32", 1) else None,
            )
            for base, said in BASES.items()
            for name in ("int8", "bf16")
        ]
    result: dict[str, Any] = {
        "parameters": count_parameters(models["fp32"]),
        "bytes_held": {
            name: bytes_held(model) for name, model in models.items() if name != "fp32_laid_out"
        },
        "threads": torch.get_num_threads(),
        "results": rows,
    }
    if config.model is not None and config.data is not None:
        result["losses"] = losses(config.model, config.data)
        rise = result["losses"]["int8"] / result["losses"]["fp32"]
        figures.append(
            Figure("quantized: int8's held-out loss over fp32's", round(rise, 5), at_most=1.005)
        )
    return result, figures
