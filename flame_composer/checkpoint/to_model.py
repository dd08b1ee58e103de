"""The model and the tokenizer in a checkpoint, rebuilt from plain data.

Nothing that a checkpoint names is looked up, run or written to. Composer's own functions for this
take file names and keyword arguments out of it as they are.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from flame_composer.errors import ConfigError, DataError, one_line
from flame_composer.model.causal_lm import build_model, meta_model, read_back_hf_config
from flame_composer.model.foreign import numbers_in, require_size
from flame_composer.text.counts import require_counts
from flame_composer.text.tokenizer import load_tokenizer
from flame_composer.text.tokenizer_files import write_files

_PREFIX = "model."  # that Composer's model puts before its names


def model_from(
    hf_state: Mapping[str, Any], weights: Mapping[str, torch.Tensor], place: str
) -> PreTrainedModel:
    """Return the model whose config is in `hf_state`, with these weights, exactly.

    Raise DataError if the config is of no model that is known, or of another one than the weights.
    """
    if not all(isinstance(name, str) and _is_plain(tensor) for name, tensor in weights.items()):
        raise DataError(
            f"{place}: its weights are no plain tensors by name; take another checkpoint"
        )
    named = {name.removeprefix(_PREFIX): tensor for name, tensor in weights.items()}
    shapes = {name: tensor.shape for name, tensor in named.items()}
    try:
        content = hf_state["model"]["config"]["content"]
        hf_config = read_back_hf_config(content, place)
        require_counts(content, place, shapes)
        empty = meta_model(hf_config)
        _require_same(
            {name: tensor.shape for name, tensor in empty.state_dict().items()}, shapes, place
        )
        require_size(empty, numbers_in(named.values()), place)
        model = build_model(hf_config)
    except (KeyError, TypeError, IndexError, AttributeError):
        raise DataError(
            f"{place}: not a training checkpoint of this package: it holds no config of a model"
        ) from None
    except ConfigError as error:
        raise DataError(
            f"{place}: {one_line(error).removeprefix(f'{place}: ').removeprefix('model.config: ')}"
        ) from None
    model.load_state_dict(named)
    return model


def _is_plain(tensor: object) -> bool:
    """Whether it is a tensor whose numbers are all there: not sparse, quantized, complex or
    without memory.
    """
    return (
        isinstance(tensor, torch.Tensor)
        and tensor.layout is torch.strided
        and tensor.device.type == "cpu"
        and not tensor.is_quantized
        and not tensor.is_complex()
    )


def _require_same(
    made: Mapping[str, torch.Size], held: Mapping[str, torch.Size], place: str
) -> None:
    for name in {**made, **held}:
        if made.get(name) != held.get(name):
            has, makes = (
                list(shapes[name]) if name in shapes else "none" for shapes in (held, made)
            )
            raise DataError(
                f"{place}: its weights are not those of its config: {name} is {has}, the config"
                f" makes it {makes}; take another checkpoint"
            )


def tokenizer_from(hf_state: Mapping[str, Any], place: str) -> PreTrainedTokenizerFast:
    """Return the tokenizer saved in `hf_state`. Raise DataError if none can be made of it."""
    saved = hf_state.get("tokenizer") if isinstance(hf_state, dict) else None
    if not isinstance(saved, dict) or not saved:
        raise DataError(f"{place}: holds no tokenizer; take another checkpoint")
    with tempfile.TemporaryDirectory() as folder:
        write_files(saved, Path(folder), place)
        try:
            return load_tokenizer(folder)
        except ConfigError as error:
            raise DataError(
                f"{place}: its tokenizer: {one_line(error).removeprefix(f'tokenizer: {folder}: ')}"
            ) from None
