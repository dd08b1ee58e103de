"""The model and the tokenizer in a checkpoint, rebuilt from plain data.

Nothing that a checkpoint names is looked up, run or written to, except that the base of an adapter
is looked up (`checkpoint.adapter`). Composer's own functions for this would use file names and
keyword arguments in the checkpoint unchecked.
"""

from __future__ import annotations

import logging
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from flame_composer.checkpoint import adapter as adapters
from flame_composer.checkpoint import sharded
from flame_composer.checkpoint.find import find_checkpoint
from flame_composer.checkpoint.optimizer_state import check_pieces
from flame_composer.checkpoint.read import Checkpoint, read_checkpoint
from flame_composer.errors import ConfigError, DataError, InvalidField, one_line
from flame_composer.model.build import build_model, load_pretrained, meta_model, quiet
from flame_composer.model.foreign import count_not_finite, numbers_in, require_size, warn_not_finite
from flame_composer.model.hf_config import check_runs_here, read_back_hf_config
from flame_composer.model.int8_folder import holds_int8, read_int8_folder
from flame_composer.model.lora import merge_adapters
from flame_composer.model.quantized import Dtype, is_quantized
from flame_composer.model.quantized import quantize as quantize_model
from flame_composer.storage.filesystems import is_url
from flame_composer.storage.folders import new_folder
from flame_composer.text.chat import stop_ids
from flame_composer.text.counts import require_counts
from flame_composer.text.ends import ends_in, ends_of, note_ends, start_of
from flame_composer.text.tokenizer import load_tokenizer, special_tokens, vocab_size_of
from flame_composer.text.tokenizer_files import write_files
from flame_composer.upstream.transformers import keep_generation_config

log = logging.getLogger(__name__)

_PREFIX = "model."  # the prefix of our names within Composer's model


def model_from(
    hf_state: Mapping[str, Any],
    weights: Mapping[str, torch.Tensor],
    place: str,
    base: str | None = None,
) -> PreTrainedModel:
    """Return the model whose config is in `hf_state`, with exactly these weights.

    If they are an adapter's, the model is its base (at `base`, if that is given) with the adapter.
    Raise DataError if the config is not of a known model, or does not match the weights.
    """
    if not all(isinstance(name, str) and _is_plain(tensor) for name, tensor in weights.items()):
        raise DataError(
            f"{place}: its weights are not plain tensors by name; take another checkpoint"
        )
    named = {name.removeprefix(_PREFIX): tensor for name, tensor in weights.items()}
    adapter = adapters.adapter_in(hf_state, place)
    if adapter is not None:
        return adapters.model_with(adapter, named, place, base)
    if base is not None:
        raise _no_adapter(place)
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


def _no_adapter(place: str) -> InvalidField:
    return InvalidField("base", f"must be null: {place} holds a whole model, and no adapter")


def _is_plain(tensor: object) -> bool:
    """Return whether `tensor` is an ordinary tensor with all its numbers in memory.

    Sparse, quantized, complex and meta tensors are not.
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
    """Raise DataError unless the weights `held` have the names and shapes of the model `made`."""
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
    """Return the tokenizer saved in `hf_state`; raise DataError if none can be made of it."""
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


def load_model(
    place_or_id: str,
    tokenizer: str | None = None,
    base: str | None = None,
    quantize: Dtype | None = None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    """Return a model and its tokenizer, ready to be run.

    They come from a Hugging Face folder or id, a folder of an adapter in peft's layout, a
    checkpoint, or the newest checkpoint in a folder. `tokenizer` is the folder or id of another
    tokenizer to use instead, and `base` that of an adapter's base, if it has moved. With `quantize`
    the model gets weights of that type, after an adapter is merged, and stderr a line on how many.
    Raise ConfigError if the tokenizer has more tokens than the model, or for quantized weights
    where there is a GPU.
    """
    if quantize is not None:
        _require_cpu(f"quantize={quantize}")
    path = Path(place_or_id)
    if (path / adapters.CONFIG).is_file() and not (path / "config.json").is_file():
        model = adapters.read_adapter_folder(path, base)
        check_runs_here(model.config, place_or_id)
        found, known = load_tokenizer(tokenizer or place_or_id), ends_in(place_or_id)
    elif (
        is_url(place_or_id)
        or path.is_file()
        or (path.is_dir() and not (path / "config.json").is_file())
    ):
        with tempfile.TemporaryDirectory() as staging:
            model, its_own = load_from_checkpoint(find_checkpoint(place_or_id, Path(staging)), base)
            check_runs_here(model.config, place_or_id)
            found = its_own if tokenizer is None else load_tokenizer(tokenizer)
            known = ends_of(its_own)
    elif base is not None:
        raise _no_adapter(place_or_id)
    else:
        if is_int8 := holds_int8(place_or_id):
            _require_cpu(place_or_id)
        model = (read_int8_folder if is_int8 else load_pretrained)(place_or_id)
        found, known = load_tokenizer(tokenizer or place_or_id), ends_in(place_or_id)
    if tokenizer is not None and known is not None:
        note_ends(found, known)  # how documents began in training, whatever tokenizer is used now
    if vocab_size_of(found) > model.config.vocab_size:
        raise ConfigError(
            f"{tokenizer or place_or_id}: its tokenizer has {vocab_size_of(found)} tokens, the"
            f" model only {model.config.vocab_size}; give the one it was trained with"
        )
    if quantize is not None:
        _quantize(model, quantize, place_or_id)
    return model, found


def _require_cpu(what: str) -> None:
    """Raise ConfigError where there is a GPU, since quantized layers compute on a CPU."""
    if torch.cuda.is_available():
        raise ConfigError(
            f"{what}: quantized weights are for a CPU, and there is a GPU here; give the model"
            " as it was trained, or hide the GPU with CUDA_VISIBLE_DEVICES="
        )


def _quantize(model: PreTrainedModel, dtype: Dtype, place: str) -> None:
    """Quantize a model that was loaded from `place`, unless its folder has these weights already.

    Raise InvalidField if the folder has others.
    """
    if is_quantized(model):
        if dtype != "int8":
            raise InvalidField("quantize", f"must be null or int8: {place} holds int8 weights")
        return
    merge_adapters(model)
    print(quantize_model(model, dtype, place).line, file=sys.stderr)


def load_from_checkpoint(
    checkpoint: Checkpoint, base: str | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    """Return the Hugging Face model and tokenizer that a training checkpoint holds.

    The weights are exactly those of the checkpoint, or their average if there is one. `base` is
    the base of its adapter, if that has moved.
    """
    return model_in(read_checkpoint(checkpoint), checkpoint, base=base)


def model_in(
    content: dict[str, Any],
    checkpoint: Checkpoint,
    which: Literal["auto", "model", "ema"] = "auto",
    base: str | None = None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    """Return the model and tokenizer in the `content` of a checkpoint that was already read.

    `which` selects the weights: `model` for those that training continues with, `ema` for their
    exponential moving average, which evaluation used, and `auto` for the average if the run has
    one. `base` is as in `load_model`. Raise ConfigError for `ema` if it has none.
    """
    try:
        hf_state = content["state"]["integrations"]["huggingface"]
        average = average_of(content["state"])
        weights = (
            sharded.weights(content["pieces"]) if "pieces" in content else content["state"]["model"]
        )
        weights = dict(weights) | ({} if which == "model" else average)
        behind = check_pieces(content, checkpoint.place, may_be_behind=True)
    except DataError:
        raise
    except Exception:  # the content is untrusted: it can make this raise anything
        raise DataError(
            f"{checkpoint.place}: not a training checkpoint of this package: it holds no Hugging"
            " Face model"
        ) from None
    if behind is not None:
        log.warning("warning: %s", behind)
    if which == "ema" and not average:
        raise ConfigError(
            f"weights=ema: {checkpoint.place}: holds no average of the weights; set weights=model"
        )
    model = model_from(hf_state, weights, checkpoint.place, base)
    return model, tokenizer_from(hf_state, checkpoint.place)


def average_of(state: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Return the exponential moving average of the weights; empty if the run has none.

    Evaluation used these weights.
    """
    return next(
        (kept["average"] or {} for name, kept in state.get("algorithms", ()) if name == "EMA"), {}
    )


def complete_generation_config(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
    """Put the tokenizer's special tokens into the generation config where it names none."""
    if model.generation_config is None:
        return
    for name, token in special_tokens(tokenizer).items():
        if getattr(model.generation_config, name) is None:
            setattr(model.generation_config, name, token)
    if tokenizer.chat_template is not None:
        known: Any = model.generation_config.eos_token_id
        before = known if isinstance(known, list) else [] if known is None else [known]
        ids = list(dict.fromkeys([*stop_ids(tokenizer), *before]))
        model.generation_config.eos_token_id = ids if len(ids) > 1 else ids[0] if ids else None
    if ends_of(tokenizer) is not None:
        # transformers begins a text with this token if there is no prompt.
        model.generation_config.bos_token_id = start_of(tokenizer)
    keep_generation_config(model)


def save_hf_folder(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    out: Path,
    *,
    dtype: str,
    max_shard_size: int = 5_000_000_000,
    card: str | None = None,
) -> None:
    """Save a model and its tokenizer as a Hugging Face folder.

    The folder appears whole or not at all (`new_folder`). It holds the config, safetensors files of
    at most `max_shard_size` bytes, the generation config and the tokenizer. Where the model names
    no special tokens, the generation config gets the tokenizer's. `card` becomes README.md. Weights
    that are infinite or not a number, or become so in `dtype`, are named in a warning.
    """
    complete_generation_config(model, tokenizer)
    with new_folder(out) as folder:
        if card is not None:
            (folder / "README.md").write_text(card, encoding="utf-8")
        model.to(getattr(torch, dtype))
        warn_not_finite(
            f"{out} ({dtype})",
            {name: count_not_finite(each) for name, each in model.state_dict().items()},
        )
        with quiet():
            model.save_pretrained(folder, safe_serialization=True, max_shard_size=max_shard_size)
        tokenizer.save_pretrained(folder)
