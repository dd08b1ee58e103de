"""Conversion of Llama weights to a GLA model: which tensors are copied, dropped or made anew."""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import shutil
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import save_file
from transformers import (
    GenerationConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from flame_composer.config.convert import PROJECTIONS
from flame_composer.config.load import load
from flame_composer.config.train import TrainConfig
from flame_composer.errors import ConfigError, InvalidField
from flame_composer.model.build import meta_model
from flame_composer.model.foreign import count_not_finite, read_json, warn_not_finite
from flame_composer.model.hf_config import build_hf_config
from flame_composer.model.llama import Source, is_rotary_buffer
from flame_composer.quantities import align, format_bytes
from flame_composer.text.tokenizer import vocab_size_of
from flame_composer.upstream.transformers import initialize, tied_names

# Names of Llama's modules and, for each, of the GLA module that gets its tensors. `*` is the number
# of a layer; the tensor's own name (weight, bias) is the same in both. The table is used in both
# directions.
MODULES = {
    "model.embed_tokens": "model.embeddings",
    **{f"model.layers.*.self_attn.{name}": f"model.layers.*.attn.{name}" for name in PROJECTIONS},
    **{
        f"model.layers.*.mlp.{name}": f"model.layers.*.mlp.{name}"
        for name in ("gate_proj", "up_proj", "down_proj")
    },
    "model.layers.*.input_layernorm": "model.layers.*.attn_norm",
    "model.layers.*.post_attention_layernorm": "model.layers.*.mlp_norm",
    "model.norm": "model.norm",
    "lm_head": "lm_head",
}
SOURCE_MODULES = {target: source for source, target in MODULES.items()}

# The key of GLA's config that decides each projection's width, which may differ from the source's.
WIDTH_KEYS = {
    "q_proj": "expand_k",
    "k_proj": "expand_k",
    "v_proj": "expand_v",
    "o_proj": "expand_v",
}

FATES = ("copied", "fresh", "dropped")


@dataclass(frozen=True)
class Target:
    """The GLA model to make: its config keys, the file they are in, and their prefix there."""

    place: str
    prefix: str
    keys: dict[str, Any]
    context_length: int | None


class Entry(NamedTuple):
    """The fate of one tensor, with its names in the Llama (`source`) and the GLA model (`target`).

    `source` is None for a tensor that is made anew, `target` for one that is dropped.
    """

    fate: Literal["copied", "fresh", "dropped"]
    source: str | None
    target: str | None
    shape: torch.Size
    dtype: torch.dtype
    reason: str = ""


def read_target(path: str) -> Target:
    """Return the target that is written in a recipe (*.yaml) or a Hugging Face config (*.json)."""
    if not path.endswith(".json"):
        recipe = load(TrainConfig, [path])
        return Target(path, "model.config.", recipe.model.config, recipe.context_length)
    if not Path(path).is_file():
        raise ConfigError(f"config: {path}: no such file")
    # Keys that transformers writes into every config.json, but that no model's config class takes.
    housekeeping = {
        *PretrainedConfig().to_dict(),
        "architectures",
        "_name_or_path",
        "torch_dtype",
        "dtype",
    } - {"model_type", "bos_token_id", "eos_token_id", "pad_token_id", "tie_word_embeddings"}
    return Target(
        path,
        "",
        {key: value for key, value in read_json(Path(path)).items() if key not in housekeeping},
        None,
    )


def plan_conversion(
    target: Target, source: Source, tokenizer: PreTrainedTokenizerFast, fresh: Collection[str] = ()
) -> tuple[PreTrainedModel, list[Entry]]:
    """Return the GLA model, on the meta device, and an entry for each tensor of either model.

    The model's config has the keys of `target` and all keys that follow from the source. The
    projections in `fresh` are initialised anew although the source has them. Raise ConfigError for
    a key that contradicts the source, for a tensor that does not fit, and for a tokenizer with more
    tokens than the source's vocabulary.
    """
    has = vocab_size_of(tokenizer)
    if has > source.config.vocab_size:
        raise ConfigError(
            f"tokenizer: has {has} tokens, but {source.folder} has only {source.config.vocab_size};"
            " give the model's own"
        )
    try:
        model = meta_model(_gla_config(target, source, tokenizer, fresh))
        plan = _entries(source, model, fresh)
    except InvalidField as problem:
        key = problem.name.removeprefix("model.config.")
        value = f"={target.keys[key]}" if key in target.keys else ""
        rule = problem.rule.replace("model.config.", target.prefix)
        raise ConfigError(f"{target.place}: {target.prefix}{key}{value}: {rule}") from None
    except ConfigError as error:
        raise ConfigError(f"{target.place}: {error}") from None
    model.config.architectures, model.config.dtype = [type(model).__name__], source.dtype
    return model, plan


def _gla_config(
    target: Target, source: Source, tokenizer: PreTrainedTokenizerFast, fresh: Collection[str]
) -> PretrainedConfig:
    keys, llama = dict(target.keys), source.config
    if keys.get("model_type") != "gla":
        raise InvalidField("model_type", "must be gla")
    if keys.get("attn"):
        raise InvalidField("attn", "layers of softmax attention cannot be converted; leave it out")
    if keys.get("hidden_act", "swish") != "swish":
        raise InvalidField("hidden_act", "must be swish, which is the source's silu")
    follows = {
        "vocab_size": ("vocab_size", llama.vocab_size),
        "hidden_size": ("hidden_size", llama.hidden_size),
        "num_hidden_layers": ("num_hidden_layers", llama.num_hidden_layers),
        "intermediate_size": ("intermediate_size", llama.intermediate_size),
        "norm_eps": ("rms_norm_eps", llama.rms_norm_eps),
    }
    # With other numbers of heads the tensors would still fit, but a head would get the channels of
    # another.
    if not set(PROJECTIONS) <= set(fresh):
        follows["num_heads"] = ("num_attention_heads", llama.num_attention_heads)
        follows["num_kv_heads"] = ("num_key_value_heads", llama.num_key_value_heads)
    for key, (source_key, value) in follows.items():
        if keys.get(key) is None:
            keys[key] = value
        elif keys[key] != value:
            raise InvalidField(
                key, f"the source has {source_key}={value}; leave it out, or set {value}"
            )
    keys.setdefault("tie_word_embeddings", source.is_tied)
    if keys["tie_word_embeddings"] and not source.is_tied:
        raise InvalidField(
            "tie_word_embeddings",
            "the source's embeddings are not tied; leave it out, or set false",
        )
    width = llama.num_attention_heads * (
        getattr(llama, "head_dim", None) or llama.hidden_size // llama.num_attention_heads
    )
    for key in ("expand_k", "expand_v"):
        keys.setdefault(key, _ratio(width, llama.hidden_size))
    for key, ours in (
        ("bos_token_id", tokenizer.bos_token_id),
        ("eos_token_id", tokenizer.eos_token_id),
    ):
        token = getattr(llama, key)
        if isinstance(token, list):  # several eos tokens: the generation config keeps them all
            token = ours if ours in token else token[0]
        if token is not None:
            keys.setdefault(key, token)
    # The source's pad token is not carried over: it may be eos, and the embedding of a pad token is
    # never trained.
    return build_hf_config(keys, tokenizer, target.context_length or llama.max_position_embeddings)


def _ratio(width: int, hidden_size: int) -> float:
    """Return the factor by which GLA multiplies hidden_size, then rounds down, to get `width`."""
    ratio = width / hidden_size
    return ratio if int(hidden_size * ratio) == width else math.nextafter(ratio, math.inf)


def _entries(source: Source, model: PreTrainedModel, fresh: Collection[str]) -> list[Entry]:
    """Return an entry for each tensor of `model`, in its order, then for those that are dropped."""
    tied = tied_names(model)
    copied, plan = set(), []
    for target, tensor in model.state_dict().items():
        if target in tied:
            continue
        name = _translate(target, SOURCE_MODULES)
        if name == "lm_head.weight" and source.is_tied:
            name = "model.embed_tokens.weight"
        shape = tensor.shape
        if name is None or name not in source.shapes:
            plan.append(Entry("fresh", None, target, shape, source.dtype, "a Llama has none"))
        elif _last(target) in fresh:
            plan.append(Entry("fresh", None, target, shape, source.dtype, f"fresh={_last(target)}"))
        elif shape != source.shapes[name]:
            key = WIDTH_KEYS[_last(target)]
            same = ",".join(
                projection for projection in PROJECTIONS if WIDTH_KEYS[projection] == key
            )
            raise InvalidField(
                key,
                f"makes {target} {list(shape)}, but the source's {name} is"
                f" {list(source.shapes[name])}; leave it out, or make the projections anew with"
                f" fresh={same}",
            )
        else:
            plan.append(Entry("copied", name, target, shape, source.dtypes[name]))
            copied.add(name)
    for name in (name for name in source.shapes if name not in copied):
        plan.append(
            Entry(
                "dropped",
                name,
                None,
                source.shapes[name],
                source.dtypes[name],
                _why_dropped(name, fresh),
            )
        )
    return plan


def _why_dropped(name: str, fresh: Collection[str]) -> str:
    target = _translate(name, MODULES)
    if is_rotary_buffer(name):
        return "GLA has no position embedding"
    assert target is not None, name
    if _last(target) in fresh:
        return f"fresh={_last(target)}"
    if name == "lm_head.weight":
        return "the embeddings take its place (tie_word_embeddings)"
    assert name.endswith(".bias"), name
    return f"GLA's {_last(target)} has no bias"


def _translate(name: str, table: dict[str, str]) -> str | None:
    """Return a tensor's name in the other model, or None if its module is not in the table."""
    module, _, kind = name.rpartition(".")
    match = re.match(r"model\.layers\.(\d+)\.", module)
    other = table.get(module if match is None else f"model.layers.*.{module[match.end() :]}")
    return None if other is None else f"{other.replace('*', match[1]) if match else other}.{kind}"


def _last(name: str) -> str:
    return name.split(".")[-2]


def describe(plan: list[Entry]) -> Iterator[str]:
    """Yield the lines of a table of the plan, one for all layers' tensors of the same kind."""
    kinds: Counter[tuple[str, ...]] = Counter()
    for entry in plan:
        source, target = (
            re.sub(r"\.layers\.\d+\.", ".layers.*.", name or "")
            for name in (entry.source, entry.target)
        )
        kinds[entry.fate, source, target, str(list(entry.shape)), entry.reason] += 1
    rows = [
        (fate, source, "->" if source and target else "", target, f"{count} x {shape}", reason)
        for (fate, source, target, shape, reason), count in kinds.items()
    ]
    yield from align(rows, left=len(rows[0]))


def write_weights(
    plan: list[Entry],
    source: Source,
    model: PreTrainedModel,
    folder: Path,
    *,
    seed: int,
    max_shard_size: int,
    on_progress: Callable[[int], object],
) -> None:
    """Write the weights to safetensors files of at most `max_shard_size` bytes.

    Several files get an index. Copied tensors are memory-mapped from the source, and only the
    tensors of one file are in memory at a time. `on_progress` is called after each file with its
    bytes. Tensors with infinite or NaN values are named in a warning.
    """
    entries = {entry.target: entry for entry in plan if entry.target is not None}
    shapes = {
        name: torch.empty(entry.shape, dtype=entry.dtype, device="meta")
        for name, entry in entries.items()
    }
    shards = split_torch_state_dict_into_shards(
        shapes, filename_pattern="model{suffix}.safetensors", max_shard_size=max_shard_size
    )
    not_finite = {}
    for file, names in shards.filename_to_tensors.items():
        tensors = {name: _tensor(entries[name], source, model, seed) for name in names}
        not_finite.update(
            {entries[name].source or name: count_not_finite(tensors[name]) for name in names}
        )
        save_file(tensors, folder / file, metadata={"format": "pt"})
        on_progress(sum(tensor.nbytes for tensor in tensors.values()))
        del tensors  # free them before the next file's are made
    warn_not_finite(str(source.folder), not_finite)
    if shards.is_sharded:
        index = {"metadata": shards.metadata, "weight_map": shards.tensor_to_filename}
        (folder / "model.safetensors.index.json").write_text(
            json.dumps(index, indent=2, sort_keys=True) + "\n"
        )


def _tensor(entry: Entry, source: Source, model: PreTrainedModel, seed: int) -> torch.Tensor:
    if entry.source is None:
        assert entry.target is not None
        return make_fresh(model, entry.target, seed).to(entry.dtype)
    return source.read(entry.source)


def make_fresh(model: PreTrainedModel, name: str, seed: int) -> torch.Tensor:
    """Return a tensor of a `meta_model`, initialised by that model's own code.

    Its values depend only on `seed` and `name`.
    """
    owner, _, kind = name.rpartition(".")
    module = model.get_submodule(owner)
    module.to_empty(device="cpu", recurse=False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(
            int.from_bytes(hashlib.sha256(f"{seed} {name}".encode()).digest()[:8], "big")
        )
        initialize(model, module)
    tensor = getattr(module, kind).detach()
    module.to_empty(device="meta", recurse=False)
    return tensor


def build_generation_config(source: Source, hf_config: PretrainedConfig) -> GenerationConfig:
    """Return a generation config with the source's special tokens and sampling settings.

    The sampling settings are taken only if the source samples. Its cache settings are never taken,
    because GLA has another kind of cache.
    """
    settings = {
        key: getattr(hf_config, key) for key in ("bos_token_id", "eos_token_id", "pad_token_id")
    }
    if isinstance(source.config.eos_token_id, list):
        settings["eos_token_id"] = source.config.eos_token_id
    path = source.folder / "generation_config.json"
    given = read_json(path) if path.is_file() else {}
    taken = [*settings]
    if given.get("do_sample"):
        taken += ["do_sample", "temperature", "top_p", "top_k", "repetition_penalty"]
    return GenerationConfig(**settings | {key: given[key] for key in taken if key in given})


def require_space(plan: list[Entry], out: Path) -> None:
    """Raise ConfigError if the disk has no room for the weights."""
    needed = sum(
        entry.shape.numel() * entry.dtype.itemsize for entry in plan if entry.target is not None
    )
    parent = next(path for path in Path(os.path.realpath(out)).parents if path.is_dir())
    free = shutil.disk_usage(parent).free
    if free < needed:
        raise ConfigError(
            f"out={out}: needs {format_bytes(needed)} of disk, but only {format_bytes(free)}"
            " are free; name another folder"
        )
