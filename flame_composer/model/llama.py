"""Llama and Mistral checkpoints on disk: their tensors, and checks that they are complete."""

from __future__ import annotations

import difflib
import logging
import re
from dataclasses import dataclass, field
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from transformers import PretrainedConfig

from flame_composer.errors import ConfigError, DataError, one_line
from flame_composer.model.build import meta_model
from flame_composer.model.foreign import opened, read_json, weight_files
from flame_composer.model.hf_config import read_back_hf_config
from flame_composer.text.counts import require_counts
from flame_composer.text.tokenizer import may_be_hub_id

MODEL_TYPES = ("llama", "mistral")
# DDP, FSDP, torch.compile and activation checkpointing put these into the names of a model's
# tensors when they wrap it.
_WRAPPERS = re.compile(
    r"(?:^|(?<=\.))(?:module|_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\."
)
DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Source:
    """A Llama or Mistral checkpoint: its config, and each tensor's file, shape and dtype."""

    folder: Path
    config: PretrainedConfig
    files: dict[str, Path]
    shapes: dict[str, torch.Size]
    dtypes: dict[str, torch.dtype]
    stored: dict[str, str] = field(default_factory=dict)
    """Name of each tensor in its file, which differs if the model was saved inside a wrapper."""

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the embeddings, which tensors that are made anew get too."""
        return self.dtypes["model.embed_tokens.weight"]

    @property
    def is_tied(self) -> bool:
        return bool(self.config.tie_word_embeddings)

    def read(self, name: str) -> torch.Tensor:
        """Return a tensor, memory-mapped from its file for as long as the tensor lives."""
        with opened(self.files[name]) as content:
            return content.get_tensor(self.stored.get(name, name))


def open_source(path_or_id: str) -> Source:
    """Return the checkpoint in a Hugging Face folder or repository.

    Of the weight files only the headers are read. Raise ConfigError if it is not a Llama or Mistral
    model in safetensors, and DataError if it is damaged or incomplete.
    """
    folder = Path(path_or_id)
    if not folder.is_dir():
        if not may_be_hub_id(path_or_id):
            raise ConfigError(
                f"model: {path_or_id}: no such folder; give a Hugging Face model folder or id"
            )
        folder = _download(path_or_id)
    if not (folder / "config.json").is_file():
        raise ConfigError(
            f"model: {path_or_id}: not a Hugging Face model folder: it has no config.json"
        )
    given = read_json(folder / "config.json")
    model_type = given.pop("model_type", None)
    if model_type not in MODEL_TYPES:
        raise ConfigError(
            f"model: {path_or_id}: is a {model_type} model; only {' and '.join(MODEL_TYPES)} ones"
            " can be converted"
        )
    if given.get("quantization_config"):
        raise ConfigError(
            f"model: {path_or_id}: its weights are quantized; give the model they were made from"
        )
    if given.get("hidden_act", "silu") not in ("silu", "swish"):
        raise ConfigError(
            f"model: {path_or_id}: its MLPs have hidden_act={given['hidden_act']}, but only silu"
            " can be converted to GLA"
        )
    source = _scan(
        folder,
        read_back_hf_config({"model_type": model_type, **given}, str(folder / "config.json")),
    )
    require_counts(given, str(folder), source.shapes)
    _check_whole(source)
    return source


def _scan(folder: Path, config: PretrainedConfig) -> Source:
    files: dict[str, Path] = {}
    shapes, dtypes, stored = dict[str, torch.Size](), dict[str, torch.dtype](), dict[str, str]()
    try:
        names_of = weight_files(folder)
    except ConfigError as error:
        raise ConfigError(f"model: {error}") from None
    for file, names in names_of.items():
        with opened(file) as content:
            held = set(content.keys())
            for name in names or sorted(held):
                if name not in held:
                    raise DataError(
                        f"{file}: lacks {name}, which the index says it holds; get the checkpoint"
                        " again"
                    )
                view = content.get_slice(name)
                if view.get_dtype() not in DTYPES:
                    raise ConfigError(
                        f"{file}: {name} is of type {view.get_dtype()}, but must be one of"
                        f" {', '.join(DTYPES)}"
                    )
                bare = _WRAPPERS.sub("", name)
                if bare in stored:
                    raise DataError(
                        f"{file}: holds {name} as well as {stored[bare]}, which name the same"
                        " tensor; keep one of them"
                    )
                stored[bare] = name
                files[bare], shapes[bare], dtypes[bare] = (
                    file,
                    torch.Size(view.get_shape()),
                    DTYPES[view.get_dtype()],
                )
    wrapped = next((name for bare, name in stored.items() if bare != name), None)
    if wrapped is not None:
        log.warning(
            "%s: its tensors have names like %s, which a wrapper (DDP, torch.compile) gave them;"
            " they are read as %s",
            folder,
            wrapped,
            _WRAPPERS.sub("", wrapped),
        )
    return Source(folder, config, files, shapes, dtypes, stored)


def _download(model_id: str) -> Path:
    try:
        # Mistral's repositories hold the weights twice, also as consolidated*.safetensors.
        return Path(
            snapshot_download(
                model_id, allow_patterns=["*.json", "tokenizer.model", "model*.safetensors"]
            )
        )
    except Exception as error:  # the hub and the network raise many kinds of errors
        raise ConfigError(
            f"model: {model_id}: no such folder, and it cannot be fetched from the Hugging Face"
            f" hub: {one_line(error)}"
        ) from None


def _check_whole(source: Source) -> None:
    """Raise DataError unless the tensors are exactly those of a model made from config.json.

    A tied `lm_head.weight` may be absent, and rotary buffers may be present.
    """
    try:
        expected = {
            name: tensor.shape for name, tensor in meta_model(source.config).state_dict().items()
        }
    except ConfigError as error:
        raise DataError(
            f"{source.folder / 'config.json'}: {str(error).removeprefix('model.config: ')}"
        ) from None
    layers = {
        int(match[1])
        for name in source.shapes
        if (match := re.match(r"model\.layers\.(\d+)\.", name))
    }
    if len(layers) != source.config.num_hidden_layers:
        raise DataError(
            f"{source.folder}: config.json says"
            f" num_hidden_layers={source.config.num_hidden_layers}, but its weights have"
            f" {len(layers)} layers; get the checkpoint again"
        )
    optional = {"lm_head.weight"} if source.is_tied else set()
    missing = [name for name in expected if name not in source.shapes and name not in optional]
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise DataError(
            f"{source.folder}: its weights lack {missing[0]}{more}; get the checkpoint again"
        )
    for name, shape in source.shapes.items():
        if is_rotary_buffer(name):
            continue
        if name not in expected:
            close = difflib.get_close_matches(name, expected, n=1)
            raise DataError(
                f"{source.folder}: its weights hold {name}, which no {source.config.model_type}"
                f" model with this config.json has{f'; the nearest is {close[0]}' if close else ''}"
            )
        if shape != expected[name]:
            raise DataError(
                f"{source.folder}: {name} is {list(shape)}, but config.json makes it"
                f" {list(expected[name])}; one of the two belongs to another model"
            )


def is_rotary_buffer(name: str) -> bool:
    """Return whether a tensor is a rotary buffer, as old releases of transformers saved them."""
    return name.endswith(".rotary_emb.inv_freq")
