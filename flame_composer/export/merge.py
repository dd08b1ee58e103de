"""Adapters on their way out: merged into their base, or alone in peft's layout."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from flame_composer import cpu
from flame_composer.checkpoint.adapter import BASE_SHA256, PREFIX, WEIGHTS
from flame_composer.checkpoint.to_model import load_model
from flame_composer.errors import ConfigError, InvalidField
from flame_composer.model.lora import (
    NAME,
    Adapter,
    embeddings_of,
    endings_of,
    ends_in,
    has_adapters,
    is_tied,
    merge_adapters,
    peft_config,
)
from flame_composer.model.quantized import is_quantized
from flame_composer.storage.folders import new_folder
from flame_composer.text.ends import ends_of, with_ends

# The largest difference of logits between a merged model and one with adapters, for logits of at
# most 1, in fp32. A GPU rounds products of fp32 to fewer bits.
BOUND = {"cpu": 1e-4, "cuda": 1e-2}
NUM_ROWS, NUM_TOKENS = 4, 96  # of the fixed prompts


def merge(model: PreTrainedModel, place: str, *, dtype: str) -> list[str]:
    """Merge a model's adapters into its weights in fp32, and return lines on how exact that is.

    The model's logits for fixed prompts are compared before and after, and with those of weights
    that are rounded to `dtype`, in which they will be stored. Raise ConfigError if merging changes
    a logit by more than BOUND (times the largest logit, if that is above 1).
    """
    device = "cpu" if cpu.missing(model.config) is None else "cuda"
    model.float().to(torch.device(device)).eval()  # type: ignore[arg-type]
    adapted = _logits(model)
    merge_adapters(model)
    merged = _logits(model)
    largest = float(adapted.abs().max())
    change = float((merged - adapted).abs().max())
    bound = BOUND[device] * max(1.0, largest)
    if not change <= bound:  # NaN is refused, too
        raise ConfigError(
            f"{place}: merged, its logits differ by {change:.1e} from those with the adapter, which"
            f" is more than {bound:.1e}; nothing was written; set merge=false, or take another"
            " checkpoint"
        )
    lines = [
        f"merged: logits differ by {change:.1e} at most from those with the adapter (the largest is"
        f" {largest:.1f})"
    ]
    if dtype != "float32":
        model.to(getattr(torch, dtype)).float()  # what is stored does not change by being rounded
        rounded = float((_logits(model) - merged).abs().max())
        lines.append(f"stored as {dtype}: they differ by {rounded:.1e} at most")
    model.cpu()
    return lines


def load_merged(place: str, base: str | None) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    """Return a model to be changed and written anew, its adapter merged, and its tokenizer.

    How exact merging was is printed. Raise InvalidField for int8 weights, and ConfigError as
    `load_model` and `merge` do.
    """
    model, tokenizer = load_model(place, base=base)
    if is_quantized(model):
        raise InvalidField("model", "holds int8 weights; give the model they were made from")
    if has_adapters(model):
        print("\n".join(merge(model, place, dtype="float32")))
    ends = ends_of(tokenizer)
    return model, tokenizer if ends is None else with_ends(tokenizer, ends)


@torch.no_grad()
def _logits(model: PreTrainedModel) -> torch.Tensor:
    """Return the logits of fixed prompts, [NUM_ROWS, NUM_TOKENS, V], on the CPU."""
    count = NUM_ROWS * NUM_TOKENS
    # Multiples of a prime, so that rows differ and the whole vocabulary is drawn from.
    ids = (torch.arange(count) * 7919 % model.config.vocab_size).reshape(NUM_ROWS, NUM_TOKENS)
    logits: torch.Tensor = model(input_ids=ids.to(model.device), use_cache=False).logits
    return logits.float().cpu()


def save_adapter_folder(
    model: PreTrainedModel,
    adapter: Adapter,
    tokenizer: PreTrainedTokenizerFast,
    out: Path,
    *,
    dtype: str,
    card: str,
) -> None:
    """Save the adapters of a model in peft's layout, which appears whole or not at all.

    The folder holds adapter_config.json, adapter_model.safetensors, the tokenizer and README.md.
    The header of the weights has the base's hash.
    """
    state = model.state_dict()
    held = {
        f"{PREFIX}{name}.{matrix}.weight": state[f"{name}.{matrix}.{NAME}.weight"]
        for name in adapter.targets
        for matrix in ("lora_A", "lora_B")
    }
    embeddings = list(embeddings_of(model)) if adapter.train_embeddings else []
    for name in embeddings:
        held[f"{PREFIX}{name}.weight"] = state[f"{name}.weight"]
    # Cloned, because safetensors stores no tensor that shares another's memory.
    tensors = {
        name: tensor.to("cpu", getattr(torch, dtype), copy=True).contiguous()
        for name, tensor in held.items()
    }
    targets = _shortest(adapter, model)
    config = peft_config(adapter, model, targets, embeddings)
    config.target_modules = targets  # peft makes a set of it, whose order changes
    config.inference_mode = True
    config.ensure_weight_tying = bool(embeddings) and is_tied(model)
    with new_folder(out) as folder:
        (folder / "README.md").write_text(card, encoding="utf-8")
        config.save_pretrained(str(folder))
        metadata = {"format": "pt", BASE_SHA256: adapter.base.sha256}
        save_file(tensors, folder / WEIGHTS, metadata=metadata)
        tokenizer.save_pretrained(folder)


def _shortest(adapter: Adapter, model: PreTrainedModel) -> list[str]:
    """Return the endings of the target names if they name no other module, else the whole names."""
    endings = endings_of(adapter.targets)
    inside = tuple(f"{name}." for name in adapter.targets)  # an adapter's own modules
    meant = [
        name
        for name, _ in model.named_modules()
        if any(ends_in(name, ending) for ending in endings) and not name.startswith(inside)
    ]
    return endings if set(meant) == set(adapter.targets) else list(adapter.targets)
