"""Checks of a config and weights that somebody else wrote, made before a model is built.

A config decides what is imported, downloaded and allocated. Therefore only keys that are known to
be plain data are taken from it, and the size of the model that it describes is compared with the
weights that came with it.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open
from transformers import PretrainedConfig, PreTrainedModel

from flame_composer.errors import ConfigError, DataError, one_line
from flame_composer.model.work import count_parameters
from flame_composer.quantities import format_bytes
from flame_composer.storage.files import is_plain_name, read_small
from flame_composer.text.tokenizer import may_be_hub_id
from flame_composer.upstream.hf_configs import base_keys, value_of
from flame_composer.upstream.transformers import generation_keys

INDEX = "model.safetensors.index.json"
SPARE_BYTES = 1 << 30  # buffers may take this much even if the weights are small
Shapes = Mapping[str, torch.Size]

# Keys that decide where code, kernels or weights come from. They are removed at any depth.
STEERING = frozenset(
    {
        "auto_map",
        "trust_remote_code",
        "custom_pipelines",
        "name_or_path",
        "_name_or_path",
        "attn_implementation",
        "_attn_implementation",
        "_attn_implementation_internal",
        "_experts_implementation",
        "_commit_hash",
        "transformers_weights",
        "quantization_config",
        "compression_config",
        "base_model_tp_plan",
        "base_model_pp_plan",
        "distributed_config",
        "gguf_file",
    }
)

# Keys that models read, although not every config class lists them as its own.
DATA = frozenset(
    {
        "head_dim",
        "partial_rotary_factor",
        "rope_theta",
        "rope_scaling",
        "sliding_window",
        "original_max_position_embeddings",
        "attention_chunk_size",
        "layer_types",
        "use_cache",
        "num_kv_shared_layers",
        "alibi",
        "use_alibi",
        "swiglu_limit",
        "bos_token_id",
        "eos_token_id",
        "pad_token_id",
        "tie_word_embeddings",
        "transformers_version",
    }
)
# Keys never copied as they are: those that steer loading, the types of model and weights, and the
# number of labels, of which a language model has none.
_APART = STEERING | {"num_labels", "torch_dtype", "dtype", "model_type"}
_DTYPES = ("float64", "float32", "bfloat16", "float16")

log = logging.getLogger(__name__)


def plain_keys(content: Mapping[str, Any], known: Iterable[str]) -> dict[str, Any]:
    """Return the keys of a config that are plain data, with their values.

    `known` are the keys of its own config class; those that all configs share are taken as well.
    """
    allowed = {*known, *base_keys(), *DATA, *generation_keys()} - _APART
    keys = {key: _without_steering(value) for key, value in content.items() if key in allowed}
    dtype = content.get("dtype") or content.get("torch_dtype")
    return {**keys, "dtype": dtype} if dtype in _DTYPES else keys


def warn_left_out(content: Mapping[str, Any], hf_config: PretrainedConfig, place: str) -> None:
    """Warn about config keys that were left out, except those that steer loading."""
    left_out = [
        str(key)
        for key in content
        if key not in _APART | generation_keys()
        and not hasattr(hf_config, str(key))
        and value_of(hf_config, str(key)) is None
    ]
    if left_out:
        names = ", ".join(repr(name)[:40] for name in left_out[:5]) + (
            " ..." if len(left_out) > 5 else ""
        )
        log.warning(
            "warning: %s: its config has keys that a %s model does not know; they are ignored: %s",
            place,
            hf_config.model_type,
            names,
        )


def _without_steering(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_steering(each) for key, each in value.items() if key not in STEERING}
    return [_without_steering(each) for each in value] if isinstance(value, list) else value


def numbers_in(tensors: Iterable[torch.Tensor]) -> int:
    """Return how many numbers the tensors hold in memory, counting shared memory once.

    A tensor's shape does not tell, because a tensor of any shape can be a view of a few bytes.
    """
    storages = {}
    for tensor in tensors:
        storage_of = tensor.untyped_storage()
        storages[storage_of.data_ptr()] = storage_of.nbytes() // tensor.element_size()
    return sum(storages.values())


def require_size(model: PreTrainedModel, held: int, place: str) -> None:
    """Raise ConfigError if an empty model would take far more memory than its weights.

    `held` is how many numbers the weights hold.
    """
    made = count_parameters(model)
    buffers = sum(buffer.numel() * buffer.element_size() for buffer in model.buffers())
    if made > 2 * held:
        raise ConfigError(
            f"{place}: its config makes a model of {made:,} parameters, but its weights "
            f"hold {held:,} numbers; get the model again, or correct the config"
        )
    if buffers > max(SPARE_BYTES, 4 * held):
        raise ConfigError(
            f"{place}: its config makes a model that takes {format_bytes(buffers)} besides its"
            " weights; correct its max_position_embeddings and other sizes"
        )


def read_json(path: Path) -> dict[str, Any]:
    """Return the JSON object in a small file. Raise ConfigError if there is none."""
    try:
        content = json.loads(read_small(path))
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: cannot be read as JSON: {one_line(error)}") from None
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: must hold keys and values (a JSON object)")
    return content


def weight_files(folder: Path) -> dict[Path, list[str] | None]:
    """Return the weight files of a folder, each with the names of its tensors.

    The names come from the index; they are None for a single file, which needs no index. Raise
    ConfigError if there are no weights in safetensors, and DataError if the index is damaged or a
    file that it names is missing.
    """
    single, index = folder / "model.safetensors", folder / INDEX
    if single.is_file():
        return {single: None}
    if not index.is_file():
        pickled = sorted(
            path.name for pattern in ("*.bin", "*.pth", "*.pt") for path in folder.glob(pattern)
        )
        if pickled:
            raise ConfigError(
                f"{folder}: holds its weights as {pickled[0]}, which is refused, because such a"
                " file can run code when it is read; give a copy in safetensors"
            )
        raise ConfigError(f"{folder}: has neither model.safetensors nor {INDEX}")
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise DataError(f"{index}: has no weight_map; get the checkpoint again")
    files: dict[Path, list[str] | None] = {}
    for name, file in weight_map.items():
        if not is_plain_name(file) or not file.endswith(".safetensors"):
            raise DataError(
                f"{index}: {name} is said to be in {file!r}, which is not the name of a safetensors"
                " file"
            )
        names = files.setdefault(folder / file, [])
        assert names is not None
        names.append(name)
    for path in files:
        if not path.is_file():
            raise DataError(
                f"{path}: is missing, though {index.name} names it; get the checkpoint again"
            )
    return files


def opened(file: Path) -> Any:
    """Open a safetensors file with `safe_open`. Raise DataError if it is damaged."""
    try:
        return safe_open(file, framework="pt")
    except (SafetensorError, OSError) as error:
        raise DataError(f"{file}: damaged: {one_line(error)}; get the checkpoint again") from None


def stored_shapes(folder: Path) -> dict[str, torch.Size]:
    """Return the shapes of the tensors in a Hugging Face folder; only file headers are read."""
    shapes = {}
    for file in weight_files(folder):
        with opened(file) as content:
            for name in list(content.keys()):
                shapes[name] = torch.Size(content.get_slice(name).get_shape())
    return shapes


def count_not_finite(tensor: torch.Tensor) -> int:
    """Return how many of a tensor's values are infinite or not a number."""
    if not tensor.is_floating_point():
        return 0
    # Part by part, because torch.isfinite takes several times the tensor's memory.
    return sum(int((~torch.isfinite(part)).sum()) for part in tensor.reshape(-1).split(1 << 20))


def warn_not_finite(place: str, counts: Mapping[str, int]) -> None:
    """Warn about tensors that hold values which are infinite or not a number.

    `counts` says how many such values each tensor holds; those with 0 are not named.
    """
    named = {name: count for name, count in counts.items() if count}
    if named:
        first = ", ".join(f"{name} ({count:,})" for name, count in list(named.items())[:5])
        more = f" and {len(named) - 5:,} more tensors" if len(named) > 5 else ""
        log.warning(
            "warning: %s: values that are infinite or not a number in %s%s", place, first, more
        )


def folder_of(path_or_id: str, files: list[str]) -> Path:
    """Return a model's folder; for an id, download `files` from the Hugging Face hub into one.

    `files` may be patterns. Raise ConfigError if there is no such folder or repository, if it has
    no config.json, or if it holds an adapter.
    """
    folder = Path(path_or_id)
    if not os.path.isdir(path_or_id):  # Path's own raises for a name that is too long
        if not may_be_hub_id(path_or_id):
            raise ConfigError(
                f"{path_or_id}: no such folder; give a Hugging Face model folder or id"
            )
        try:
            folder = Path(snapshot_download(path_or_id, allow_patterns=files))
        except Exception as error:  # the hub and the network raise many kinds of errors
            raise ConfigError(
                "no such folder, and it cannot be fetched from the Hugging Face hub:"
                f" {one_line(error)}"
            ) from None
    if (folder / "adapter_config.json").exists():
        raise ConfigError(
            f"{path_or_id}: holds an adapter (adapter_config.json), for which another "
            "model would be loaded; merge it into its model, or delete that file"
        )
    if not (folder / "config.json").is_file():
        raise ConfigError(f"{path_or_id}: not a Hugging Face model folder: it has no config.json")
    return folder
