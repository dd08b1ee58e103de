"""Folders with int8 weights, as convert/quantize.py writes them, read back as models.

Such a folder is a Hugging Face folder but for its weights: they are in a file of another name,
which transformers does not look for, and config.json says what they are. A name's scales are under
that name with `_scale` after it. The folder is somebody else's, like any other: names, types,
shapes and scales are checked before anything is computed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

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
# The types that weights have in such a folder, by the names that safetensors has for them
_TYPES = {"F32": torch.float32, "I8": torch.int8}


class Held(NamedTuple):
    """A tensor as the head of a file describes it."""

    dtype: torch.dtype | None  # None for one that no weight of such a folder has
    said: str
    shape: torch.Size


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
    with _told(folder / FILE), opened(folder / FILE) as file:
        header = {name: _held(file, name) for name in list(file.keys())}
        shapes = {name: held.shape for name, held in header.items()}
        require_counts(hf_config.to_dict(), place, shapes)
        empty = meta_model(hf_config)
        require_model_size(empty, sum(shape.numel() for shape in shapes.values()), place)
        _require_fit(header, empty, str(folder / FILE))
        tensors = {name: file.get_tensor(name) for name in header}
        _require_scales(tensors, str(folder / FILE))
    with without_parameters():
        model = build_model(hf_config)
    model.tie_weights()  # parameters without memory lose this
    with _told(folder / FILE):
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
    with _told(folder / FILE):
        try:
            try_out(model)
        except ReadDirectlyError as error:
            raise ConfigError(
                f"{folder / FILE}: {error} is int8, but a {hf_config.model_type} model reads its"
                f" weights without calling the layer; {_AGAIN}"
            ) from None
    return model


@contextmanager
def _told(file: Path) -> Iterator[None]:
    """Raise ConfigError for whatever the body raises while it reads `file`, or computes with it."""
    try:
        yield
    except ConfigError:
        raise
    except DataError as error:
        raise ConfigError(one_line(error)) from None
    except Exception as error:  # of safetensors, torch, or the model's code
        raise ConfigError(f"{file}: cannot be used: {one_line(error)}; {_AGAIN}") from None


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


def _held(file: Any, name: str) -> Held:
    said = file.get_slice(name)
    return Held(_TYPES.get(said.get_dtype()), said.get_dtype(), torch.Size(said.get_shape()))


def _require_fit(header: Mapping[str, Held], empty: PreTrainedModel, place: str) -> None:
    """Raise ConfigError unless the tensors are those of the model `empty`, some of them int8."""
    state = empty.state_dict()
    needed = {name for name, _ in (*empty.named_parameters(), *empty.named_buffers())} & {*state}
    may_be_int8 = {*weight_names(empty).values()}
    if missing := sorted(needed - {*header}):
        raise ConfigError(f"{place}: {missing[0]} is missing; {_AGAIN}")
    num_int8 = 0
    for name, held in header.items():
        weight = name.removesuffix(SCALE)
        shown = name[:100]
        if weight != name and weight in may_be_int8 and weight in header:
            rows = state[weight].shape[columns_of(empty, weight)]
            if held.dtype != torch.float32 or held.shape != (rows,):
                raise ConfigError(
                    f"{place}: {shown!a} must be {rows:,} finite numbers above 0, in float32;"
                    f" {_AGAIN}"
                )
            continue
        if name not in needed | may_be_int8:
            raise ConfigError(f"{place}: {shown!a} is none of the model's weights; {_AGAIN}")
        if held.shape != state[name].shape:
            raise ConfigError(
                f"{place}: {shown!a} is {list(held.shape)}, and must be"
                f" {list(state[name].shape)}; {_AGAIN}"
            )
        has_scale = name + SCALE in header
        expected = torch.int8 if has_scale and name in may_be_int8 else state[name].dtype
        if held.dtype != expected:
            raise ConfigError(
                f"{place}: {shown!a} is {held.said[:20]!a} {'with' if has_scale else 'without'}"
                f" scales, and must be {str(expected).removeprefix('torch.')}; {_AGAIN}"
            )
        num_int8 += has_scale
    if not num_int8:
        raise ConfigError(f"{place}: none of its weights are int8; {_AGAIN}")


def _require_scales(tensors: Mapping[str, Tensor], place: str) -> None:
    """Raise ConfigError for a scale that is not a finite number above 0."""
    for name, scale in tensors.items():
        if name.removesuffix(SCALE) == name or name.removesuffix(SCALE) not in tensors:
            continue
        if count_not_finite(scale) or bool((scale <= 0).any()):
            raise ConfigError(
                f"{place}: {name[:100]!a} must be {scale.numel():,} finite numbers above 0, in"
                f" float32; {_AGAIN}"
            )
