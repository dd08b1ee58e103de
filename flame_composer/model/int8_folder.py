"""Folders with int8 weights, as convert/quantize.py writes them, read back as models.

Such a folder is a Hugging Face folder but for its weights: they are in a file of another name,
which transformers does not look for, and config.json says what they are. A name's scales are under
that name with `_scale` after it. The folder is somebody else's, like any other: names, types,
shapes and scales are checked before anything is computed.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel

from flame_composer.errors import ConfigError, DataError, one_line
from flame_composer.model.build import build_model, meta_model
from flame_composer.model.foreign import count_not_finite, folder_of, opened, read_json
from flame_composer.model.foreign import require_size as require_model_size
from flame_composer.model.hf_config import check_runs_here, read_back_hf_config
from flame_composer.model.quantized import (
    SCALE,
    ReadDirectlyError,
    Stored,
    columns_of,
    put_in,
    try_out,
    weight_names,
)
from flame_composer.text.counts import require_counts
from flame_composer.upstream.transformers import without_parameters

FILE = "model-int8.safetensors"
METHOD = "flame_composer_int8"  # quant_method of quantization_config, in config.json
_AGAIN = "write the folder again with convert/quantize.py"


def holds_int8(path_or_id: str) -> bool:
    """Return whether a Hugging Face folder or repository holds weights of convert/quantize.py.

    Raise ConfigError if there is no such folder, or if its config.json cannot be read.
    """
    return is_int8_config(read_json(folder_of(path_or_id, ["config.json"]) / "config.json"))


def is_int8_config(content: Mapping[str, Any]) -> bool:
    """Return whether the content of a config.json says that the weights are of this form."""
    said = content.get("quantization_config")
    return isinstance(said, dict) and said.get("quant_method") == METHOD


def read_int8_folder(path_or_id: str) -> PreTrainedModel:
    """Load the model of a folder or repository for which `holds_int8` is true.

    Raise ConfigError if its weights are damaged, or do not fit its config.
    """
    folder = folder_of(path_or_id, ["config.json", "generation_config.json", FILE])
    content = read_json(folder / "config.json")
    place = str(folder / "config.json")
    hf_config = read_back_hf_config(
        {key: value for key, value in content.items() if key != "quantization_config"}, place
    )
    check_runs_here(hf_config, path_or_id)
    if not (folder / FILE).is_file():
        raise ConfigError(f"{folder / FILE}: is missing; {_AGAIN}")
    try:
        with opened(folder / FILE) as file:
            names = list(file.keys())
            shapes = {name: torch.Size(file.get_slice(name).get_shape()) for name in names}
            require_counts(hf_config.to_dict(), place, shapes)
            empty = meta_model(hf_config)
            require_model_size(empty, sum(shape.numel() for shape in shapes.values()), place)
            tensors = {name: file.get_tensor(name) for name in names}
    except DataError as error:
        raise ConfigError(one_line(error)) from None
    _require_fit(tensors, empty, str(folder / FILE))
    with without_parameters():
        model = build_model(hf_config)
    model.tie_weights()  # parameters without memory lose this
    put_in(model, lambda name: _stored(tensors, name))
    scaled = {name for name in tensors if name + SCALE in tensors}
    plain = {
        name: tensor
        for name, tensor in tensors.items()
        if name not in scaled and name.removesuffix(SCALE) not in scaled
    }
    model.load_state_dict(plain, strict=False, assign=True)
    model.requires_grad_(False)
    if (folder / "generation_config.json").is_file():
        model.generation_config = _generation_config(folder)
    lacking = [
        name for name, each in (*model.named_parameters(), *model.named_buffers()) if each.is_meta
    ]
    if lacking:
        raise ConfigError(f"{folder / FILE}: has no {lacking[0]}; {_AGAIN}")
    try:
        try_out(model)
    except ReadDirectlyError as error:
        raise ConfigError(
            f"{folder / FILE}: {error} is int8, but a {hf_config.model_type} model reads its"
            f" weights without calling the layer; {_AGAIN}"
        ) from None
    return model


def _generation_config(folder: Path) -> GenerationConfig:
    try:
        return GenerationConfig.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # transformers raises many kinds for a damaged file
        raise ConfigError(
            f"{folder / 'generation_config.json'}: cannot be read: {one_line(error)}"
        ) from None


def _stored(tensors: Mapping[str, Tensor], name: str) -> Stored | None:
    scale = tensors.get(name + SCALE)
    return None if scale is None else Stored(tensors[name], scale)


def _require_fit(tensors: Mapping[str, Tensor], empty: PreTrainedModel, place: str) -> None:
    """Raise ConfigError unless the tensors are those of the model `empty`, some of them int8."""
    state = empty.state_dict()
    needed = {name for name, _ in (*empty.named_parameters(), *empty.named_buffers())} & {*state}
    may_be_int8 = {*weight_names(empty).values()}
    if missing := sorted(needed - {*tensors}):
        raise ConfigError(f"{place}: {missing[0]} is missing; {_AGAIN}")
    num_int8 = 0
    for name, tensor in tensors.items():
        weight = name.removesuffix(SCALE)
        shown = name[:100]
        if weight != name and weight in may_be_int8 and weight in tensors:
            rows = state[weight].shape[columns_of(empty, weight)]
            is_sound = tensor.dtype == torch.float32 and tensor.shape == (rows,)
            if not is_sound or count_not_finite(tensor) or bool((tensor <= 0).any()):
                raise ConfigError(
                    f"{place}: {shown!a} must be {rows:,} finite numbers above 0, in float32;"
                    f" {_AGAIN}"
                )
            continue
        if name not in needed | may_be_int8:
            raise ConfigError(f"{place}: {shown!a} is none of the model's weights; {_AGAIN}")
        if tensor.shape != state[name].shape:
            raise ConfigError(
                f"{place}: {shown!a} is {list(tensor.shape)}, and must be"
                f" {list(state[name].shape)}; {_AGAIN}"
            )
        is_int8, has_scale = tensor.dtype == torch.int8, name + SCALE in tensors
        if is_int8 != has_scale or (is_int8 and name not in may_be_int8):
            raise ConfigError(
                f"{place}: {shown!a} is {str(tensor.dtype).removeprefix('torch.')}"
                f" {'with' if has_scale else 'without'} scales; {_AGAIN}"
            )
        num_int8 += is_int8
    if not num_int8:
        raise ConfigError(f"{place}: none of its weights are int8; {_AGAIN}")
