"""A quantized model as a folder, which evaluate, generate, predict, chat and serve.py load."""

from __future__ import annotations

import json
from pathlib import Path

from safetensors.torch import save_file
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from flame_composer.checkpoint.to_model import complete_generation_config
from flame_composer.model.int8_folder import FILE, METHOD
from flame_composer.model.quantized import SCALE, QuantizedEmbedding, QuantizedLinear, Stored
from flame_composer.storage.folders import new_folder


def save_int8_folder(
    model: PreTrainedModel,
    stored: dict[str, Stored],
    tokenizer: PreTrainedTokenizerFast,
    out: Path,
) -> None:
    """Save a quantized model, whose int8 weights are `stored`, and its tokenizer.

    The folder appears whole or not at all. transformers refuses it, because it finds no weights of
    the name that it looks for: it would take int8 numbers for the weights themselves.
    """
    inside = tuple(
        f"{name}."
        for name, each in model.named_modules()
        if isinstance(each, QuantizedLinear | QuantizedEmbedding)
    )
    tensors = {
        name: tensor.contiguous()
        for name, tensor in model.state_dict().items()
        if not name.startswith(inside) or name.endswith(".bias")
    }
    for name, each in stored.items():
        assert each.scale is not None
        tensors |= {name: each.numbers, name + SCALE: each.scale}
    complete_generation_config(model, tokenizer)
    with new_folder(out) as folder:
        save_file(tensors, folder / FILE, metadata={"format": "pt"})
        model.config.save_pretrained(folder)
        config = folder / "config.json"
        said = json.loads(config.read_text()) | {"quantization_config": {"quant_method": METHOD}}
        config.write_text(json.dumps(said, indent=2, sort_keys=True) + "\n")
        if model.generation_config is not None:
            model.generation_config.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
