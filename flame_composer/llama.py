"""Llama and Mistral checkpoints on disk: what they hold, and that they are whole."""

from __future__ import annotations

import difflib
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open
from transformers import PretrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from flame_composer import cpu, storage
from flame_composer.config import ConfigError, DataError, one_line
from flame_composer.model import build_model
from flame_composer.tokenizer import may_be_hub_id

MODEL_TYPES = ("llama", "mistral")
DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(frozen=True)
class Source:
    """A Llama or Mistral checkpoint: its config, and of each tensor the file it is in, its shape and its type."""

    folder: Path
    config: PretrainedConfig
    files: dict[str, Path]
    shapes: dict[str, torch.Size]
    dtypes: dict[str, torch.dtype]

    @property
    def dtype(self) -> torch.dtype:
        return self.dtypes["model.embed_tokens.weight"]

    @property
    def is_tied(self) -> bool:
        return bool(self.config.tie_word_embeddings)

    def read(self, name: str) -> torch.Tensor:
        """A tensor, mapped from its file, which stays mapped no longer than the tensor lives."""
        with _opened(self.files[name]) as content:
            return content.get_tensor(name)


def open_source(path_or_id: str) -> Source:
    """The checkpoint in a Hugging Face folder or under a hub id; of its weights only the files' heads are read.

    Raises ConfigError for what is no Llama or Mistral in safetensors, and DataError for one that is not whole.
    """
    folder = Path(path_or_id)
    if not folder.is_dir():
        if not may_be_hub_id(path_or_id):
            raise ConfigError(f"model: {path_or_id}: no such folder; give a Hugging Face model folder or id")
        folder = _download(path_or_id)
    if not (folder / "config.json").is_file():
        raise ConfigError(f"model: {path_or_id}: not a Hugging Face model folder: it has no config.json")
    given = read_json(folder / "config.json")
    model_type = given.pop("model_type", None)
    if model_type not in MODEL_TYPES:
        raise ConfigError(f"model: {path_or_id}: is a {model_type} model; only {' and '.join(MODEL_TYPES)} ones can be "
                          "converted")
    if given.get("quantization_config"):
        raise ConfigError(f"model: {path_or_id}: its weights are quantized; give the model they were made from")
    if given.get("hidden_act", "silu") not in ("silu", "swish"):
        raise ConfigError(f"model: {path_or_id}: its MLPs have hidden_act={given['hidden_act']}, GLA's are silu ones")
    try:
        config = CONFIG_MAPPING[model_type].from_dict(given)
    except Exception as error:  # whatever wrong values make transformers raise
        raise ConfigError(f"{folder / 'config.json'}: {model_type} refuses it: {one_line(error)}") from None

    files, shapes, dtypes = {}, {}, {}
    for file, names in _weight_files(folder).items():
        with _opened(file) as content:
            for name in names or content.keys():
                if name not in content.keys():  # noqa: SIM118
                    raise DataError(f"{file}: lacks {name}, which the index says it holds; get the checkpoint again")
                view = content.get_slice(name)
                if view.get_dtype() not in DTYPES:
                    raise ConfigError(f"{file}: {name} is of type {view.get_dtype()}, must be one of {', '.join(DTYPES)}")
                files[name], shapes[name], dtypes[name] = file, torch.Size(view.get_shape()), DTYPES[view.get_dtype()]
    source = Source(folder, config, files, shapes, dtypes)
    _check_whole(source)
    return source


def _download(model_id: str) -> Path:
    try:
        # Mistral's repositories hold the weights a second time, as consolidated*.safetensors.
        return Path(snapshot_download(model_id, allow_patterns=["*.json", "tokenizer.model", "model*.safetensors"]))
    except Exception as error:  # whatever the hub or the network makes of it
        raise ConfigError(f"model: {model_id}: no such folder, and not to be had from the Hugging Face hub: "
                          f"{one_line(error)}") from None


def _weight_files(folder: Path) -> dict[Path, list[str] | None]:
    """The files of the weights, and which tensors the index says each holds (None for a file without one)."""
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.is_file():
        return {single: None}
    if not index.is_file():
        pickled = sorted(path.name for pattern in ("*.bin", "*.pth", "*.pt") for path in folder.glob(pattern))
        if pickled:
            raise ConfigError(f"model: {folder}: holds its weights as {pickled[0]}, which is refused: such a file can run code "
                              "when it is read; give a copy in safetensors")
        raise ConfigError(f"model: {folder}: has neither model.safetensors nor model.safetensors.index.json")
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise DataError(f"{index}: has no weight_map; get the checkpoint again")
    files: dict[Path, list[str] | None] = {}
    for name, file in weight_map.items():
        if not storage.is_plain_name(file):
            raise DataError(f"{index}: {name} is said to be in {file!r}, which is no file name")
        names = files.setdefault(folder / file, [])
        assert names is not None
        names.append(name)
    for path in files:
        if not path.is_file():
            raise DataError(f"{path}: is missing, though {index.name} names it; get the checkpoint again")
    return files


def _check_whole(source: Source) -> None:
    """Raises DataError unless the tensors are exactly those that the checkpoint's own config.json makes."""
    try:
        expected = {name: tensor.shape for name, tensor in meta_model(source.config).state_dict().items()}
    except ConfigError as error:
        raise DataError(f"{source.folder / 'config.json'}: {str(error).removeprefix('model.config: ')}") from None
    layers = {int(match[1]) for name in source.shapes if (match := re.match(r"model\.layers\.(\d+)\.", name))}
    if len(layers) != source.config.num_hidden_layers:
        raise DataError(f"{source.folder}: config.json says num_hidden_layers={source.config.num_hidden_layers}, its weights "
                        f"have {len(layers)} layers; get the checkpoint again")
    optional = {"lm_head.weight"} if source.is_tied else set()
    missing = [name for name in expected if name not in source.shapes and name not in optional]
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise DataError(f"{source.folder}: its weights lack {missing[0]}{more}; get the checkpoint again")
    for name, shape in source.shapes.items():
        if is_rotary_buffer(name):
            continue
        if name not in expected:
            close = difflib.get_close_matches(name, expected, n=1)
            raise DataError(f"{source.folder}: its weights hold {name}, which no {source.config.model_type} model with this "
                            f"config.json has{f'; the nearest is {close[0]}' if close else ''}")
        if shape != expected[name]:
            raise DataError(f"{source.folder}: {name} is {list(shape)}, config.json makes it {list(expected[name])}; one of "
                            "the two is of another model")


def is_rotary_buffer(name: str) -> bool:
    """Saved by old releases of transformers."""
    return name.endswith(".rotary_emb.inv_freq")


def _opened(file: Path) -> Any:
    try:
        return safe_open(file, framework="pt")
    except (SafetensorError, OSError) as error:
        raise DataError(f"{file}: damaged: {one_line(error)}; get the checkpoint again") from None


def meta_model(hf_config: PretrainedConfig) -> PreTrainedModel:
    """The model without memory for its weights: names, shapes and modules."""
    cpu.enable()
    with torch.device("meta"):
        return build_model(hf_config)


def read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: cannot be read as JSON: {one_line(error)}") from None
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: must hold keys and values (a JSON object)")
    return content
