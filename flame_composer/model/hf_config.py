"""Model configs: built from keys, or read back from a checkpoint or a folder, and checked."""

from __future__ import annotations

import copy
import inspect
import math
import re
import types
import typing
from collections.abc import Callable
from typing import Any

import torch
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, PretrainedConfig, PreTrainedTokenizerFast
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from flame_composer import cpu
from flame_composer.config.fields import nearest
from flame_composer.config.sections import ModelConfig
from flame_composer.config.written import quote_it
from flame_composer.errors import ConfigError, InvalidField, one_line
from flame_composer.model import softcap
from flame_composer.model.foreign import folder_of, plain_keys, read_json, warn_left_out
from flame_composer.model.heads import require_heads
from flame_composer.model.mup import require_rules
from flame_composer.text.counts import MOST_PARTS, is_beyond_any_model, require_counts
from flame_composer.upstream.hf_configs import (
    as_known_here,
    has_value,
    hints_of,
    parameters_of,
    value_of,
)

# Keys that every model understands, even if its config class leaves them to the base class.
_COMMON_KEYS = (
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
    "tie_word_embeddings",
    "use_cache",
    softcap.KEY,
)

# Rules for numbers, by the names of their keys: not every model checks them before it computes.
_RULES: tuple[tuple[str, Callable[[float], bool], str], ...] = (
    (
        r"(hidden|intermediate|vocab)_size|num_(\w+_)?(heads|layers|slots)|conv_size"
        r"|(\w+_)?low_rank_dim|expand_ratio|expand"
        r"|n_(embd|head|inner|layer|positions)|sliding_window",
        lambda value: value >= 1,
        "must be 1 or more",
    ),
    (
        r"(\w+_)?(eps|epsilon)|rope_theta|(expand|exapnd)_[kv]|hidden_ratio|gate_logit_normalizer",
        lambda value: value > 0,
        "must be more than 0",
    ),
    (r"(\w+_)?(dropout|pdrop)", lambda value: 0 <= value < 1, "must be in [0, 1)"),
    (
        r"clamp_min",
        lambda value: value <= 0,
        "must be 0 or less: it is the lower bound for the logarithm of a gate",
    ),
)

# Values that fla's config classes take and its models then refuse, or fail at, in the first step:
# model types, key, whether it is such a value, rule
_CHUNK_ONLY = ("comba", "gated_deltanet", "gated_deltaproduct", "gdn2", "kda", "mom")
_UNUSABLE: tuple[tuple[tuple[str, ...], str, Callable[[Any], bool], str], ...] = (
    (
        ("delta_net", "gla", "hgrn2", "lightnet", "rodimus"),
        "attn_mode",
        lambda value: value == "fused_chunk",
        "must not be fused_chunk, which fla has given up; give chunk",
    ),
    (
        _CHUNK_ONLY,
        "attn_mode",
        lambda value: value == "fused_recurrent",
        "must be chunk: fla trains this model in no other mode",
    ),
    (
        ("rwkv7",),
        "attn",
        lambda value: value is not None,
        "must be null: fla 0.5.2 fails at layers of softmax attention in RWKV-7",
    ),
    (
        ("kda",),
        "lower_bound",
        lambda value: value is not None and not value < 0,
        "must be below 0: it is the lower bound for the logarithm of a gate; fla recommends -5",
    ),
)
# What fla reads in `attn`, where hybrids have layers of softmax attention; the rest it ignores
_ATTN_KEYS = ("layers", "num_heads", "num_kv_heads", "qkv_bias", "window_size", "rope_theta")
_OTHER_ATTN = ("rodimus", "yoco")  # read more


def build_hf_config(
    model_config: dict[str, Any],
    tokenizer: PreTrainedTokenizerFast | None,
    context_length: int | None,
    *,
    to_run: bool = True,
    read_back: bool = False,
) -> PretrainedConfig:
    """Return a Hugging Face config with the keys in `model_config`, after checking them.

    Vocabulary size, special tokens and context length are filled in if not given. Without a
    tokenizer `vocab_size` must be given.

    Transformers accepts any key. This raises InvalidField for a key that the model's config class
    does not have, a value of another type, a number that no model has, a vocabulary smaller than
    the tokenizer's and, with `to_run`, a model that this machine cannot run.

    `read_back` is for keys that transformers wrote. Some of these are null where the class has a
    number by default. Their numbers are not checked here, because they are compared with the
    weights later.
    """
    cpu.enable()
    keys = copy.deepcopy(model_config)  # transformers 5 adds to what it is given
    model_type = keys.pop("model_type")
    config_class = _config_class(model_type, to_run=to_run)
    parameters = parameters_of(config_class)
    _check_keys(config_class, keys, read_back=read_back)
    if tokenizer is not None:
        keys.setdefault("vocab_size", len(tokenizer))
        keys.setdefault("bos_token_id", tokenizer.bos_token_id)
        keys.setdefault("eos_token_id", tokenizer.eos_token_id)
    # The context length has another name in some classes, for example n_positions in GPT-2.
    positions = config_class.attribute_map.get("max_position_embeddings", "max_position_embeddings")
    if positions in parameters and context_length is not None:
        keys.setdefault(positions, context_length)
    if not read_back:
        _check_numbers(keys)
        _check_usable(model_type, keys)
    if tokenizer is not None and keys["vocab_size"] < len(tokenizer):
        raise InvalidField(
            "model.config.vocab_size", f"must be at least the tokenizer's {len(tokenizer)} tokens"
        )
    try:
        hf_config = config_class(**keys)
    except Exception as error:  # the class's own code may raise anything for odd values
        raise ConfigError(
            f"model.config: {config_class.__name__} refuses it: {in_one_line(error)}"
        ) from None
    _check_built(hf_config, to_run=to_run)
    return hf_config


def _config_class(model_type: Any, *, to_run: bool) -> type[PretrainedConfig]:
    """Return the config class of a model type; raise InvalidField if there is none, or none here.

    Whether a model runs here is said before its other keys are, which it need not share with the
    model that a configuration was written for.
    """
    if not isinstance(model_type, str) or model_type not in CONFIG_MAPPING:
        close = (
            nearest(str(model_type), sorted(CONFIG_MAPPING))
            if model_type
            else "; give gla, for example"
        )
        raise InvalidField(
            "model.config.model_type", f"neither fla nor transformers has such a model{close}"
        )
    config_class: type[PretrainedConfig] = CONFIG_MAPPING[model_type]
    reason = cpu.missing_type(config_class) if to_run and not torch.cuda.is_available() else None
    if reason:
        raise InvalidField("model.config.model_type", reason)
    return config_class


def _check_keys(
    config_class: type[PretrainedConfig], keys: dict[str, Any], *, read_back: bool
) -> None:
    """Raise InvalidField for a key that the class does not have or a value of the wrong type."""
    parameters = parameters_of(config_class)
    known = known_keys(config_class)
    hints = hints_of(config_class)
    for key, value in keys.items():
        # A token id may be a list, even if its annotation says int.
        if read_back and (key not in hints or key.endswith("_token_id")):
            continue
        if key not in known:
            close = nearest(key, known).replace("mean ", "mean model.config.")
            raise InvalidField(
                f"model.config.{key}", f"unknown key of {config_class.__name__}{close}"
            )
        hint = hints.get(key) or _type_of_default(parameters.get(key))
        if not _is_a(value, hint):
            raise InvalidField(
                f"model.config.{key}",
                f"must be {_type_name(hint)}{quote_it(value, _is_a('text', hint))}",
            )


def _check_numbers(keys: dict[str, Any]) -> None:
    """Raise InvalidField for a number that no model can have."""
    for key, value in keys.items():
        for pattern, holds, message in _RULES:
            is_number = isinstance(value, int | float) and re.fullmatch(pattern, key)
            if is_number and not (abs(value) < math.inf and holds(value)):
                raise InvalidField(f"model.config.{key}", message)
        if is_beyond_any_model({key: value}):
            raise InvalidField(
                f"model.config.{key}", f"must be {MOST_PARTS:,} at most: no model has more"
            )


def _check_usable(model_type: str, keys: dict[str, Any]) -> None:
    """Raise InvalidField for a value with which fla builds a model that cannot be trained."""
    for model_types, key, is_unusable, rule in _UNUSABLE:
        if model_type in model_types and key in keys and is_unusable(keys[key]):
            raise InvalidField(f"model.config.{key}", rule)
    attn = keys.get("attn")
    if not isinstance(attn, dict) or model_type in _OTHER_ATTN:
        return
    for key in attn:
        if key not in _ATTN_KEYS:
            close = nearest(str(key), [*_ATTN_KEYS]).replace("mean ", "mean model.config.attn.")
            raise InvalidField(f"model.config.attn.{key}", f"fla reads no such key{close}")
    if attn.get("layers") == []:
        raise InvalidField(
            "model.config.attn.layers", "must name a layer; leave attn out for a model without any"
        )


def known_keys(config_class: type[PretrainedConfig]) -> list[str]:
    """Return the keys that a model may be given: those of its config class and the common ones."""
    return sorted({*parameters_of(config_class), *_COMMON_KEYS})


def read_back_hf_config(content: Any, place: str) -> PretrainedConfig:
    """Return a config that transformers wrote to `place`, a checkpoint or a config.json.

    Only known keys that hold plain data are taken. Nothing that the config names is looked up or
    run: no code, kernels, other repository or other weight files. Raise ConfigError if its model is
    not a causal language model of fla or transformers, or if its weights are quantized.
    """
    cpu.enable()
    model_type = content.get("model_type") if isinstance(content, dict) else None
    config_class: Any = (
        CONFIG_MAPPING[model_type]
        if isinstance(model_type, str) and model_type in CONFIG_MAPPING
        else None
    )
    if config_class not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise ConfigError(
            f"{place}: its model_type {str(model_type)[:60]!r} is not a causal language model of"
            " fla or transformers, and code that comes with a model is never run; convert it to"
            " one of theirs"
        )
    assert isinstance(content, dict)
    if content.get("quantization_config"):
        raise ConfigError(f"{place}: its weights are quantized; give the model they were made from")
    require_counts(content, place)
    try:
        content = as_known_here(content, config_class)
        known = [*known_keys(config_class), *config_class.attribute_map]
        keys = {"model_type": model_type, **plain_keys(content, known)}
        hf_config = build_hf_config(keys, None, None, to_run=False, read_back=True)
    except (ConfigError, RecursionError) as error:
        raise ConfigError(f"{place}: {one_line(error).removeprefix('model.config: ')}") from None
    warn_left_out(content, hf_config, place)
    return hf_config


def new_hf_config(
    config: ModelConfig, tokenizer: PreTrainedTokenizerFast, context_length: int
) -> PretrainedConfig | None:
    """Return the config of a new model, or None if `config.pretrained` brings its own."""
    if config.pretrained:
        return None
    hf_config = build_hf_config(config.config, tokenizer, context_length)
    require_rules(config, hf_config)
    return hf_config


def read_pretrained_config(path_or_id: str) -> PretrainedConfig:
    """Return the config in a Hugging Face folder or repository, read by `read_back_hf_config`."""
    folder = folder_of(path_or_id, ["config.json"])
    return read_back_hf_config(read_json(folder / "config.json"), str(folder / "config.json"))


def check_agrees(hf_config: PretrainedConfig, model_config: dict[str, Any]) -> None:
    """Raise InvalidField if `model_config` contradicts the config of the loaded weights."""
    for key, value in model_config.items():
        if not has_value(hf_config, key, value):
            has = value_of(hf_config, key)
            raise InvalidField(
                f"model.config.{key}",
                f"model.pretrained has {has}; leave the key out, or give that value",
            )


def in_one_line(error: Exception) -> str:
    """Return the error's text in one line; a KeyError's bare key is named an unknown value."""
    return f"unknown value {one_line(error)}" if isinstance(error, KeyError) else one_line(error)


def _type_of_default(parameter: inspect.Parameter | None) -> type | None:
    """Return the type of a parameter's default, or None if values of any type are allowed.

    It serves where there is no annotation. Token ids may be null or lists, whatever the default.
    """
    if (
        parameter is None
        or parameter.name.endswith("_token_id")
        or type(parameter.default) not in (int, float, bool, str)
    ):
        return None
    return type(parameter.default)


def _is_a(value: Any, hint: Any) -> bool:
    """Return whether `value` has the annotated type; always True if that is no plain type."""
    plain = _plain_types(hint)
    if plain is None:
        return True
    if isinstance(value, bool):
        return bool in plain
    return isinstance(value, tuple(plain)) or (float in plain and isinstance(value, int))


def _plain_types(hint: Any) -> list[type] | None:
    options = (
        typing.get_args(hint)
        if isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union
        else (hint,)
    )
    plain = [option for option in options if option in (int, float, bool, str, type(None))]
    return plain if len(plain) == len(options) else None


def _type_name(hint: Any) -> str:
    return (hint.__name__ if isinstance(hint, type) else str(hint)).replace("None", "null")


def _missing_here(hf_config: PretrainedConfig) -> tuple[str, str] | None:
    return None if torch.cuda.is_available() else cpu.missing(hf_config)


def _check_built(hf_config: PretrainedConfig, *, to_run: bool) -> None:
    """Raise InvalidField for a cap that no model has.

    With `to_run`, also for heads that none has, and for what cannot run here. Heads of a config
    that was read back are looked at when its model is built.
    """
    softcap.require_cap(hf_config)
    if to_run:
        require_heads(hf_config)
    if to_run and (missing := _missing_here(hf_config)):
        raise InvalidField(f"model.config.{missing[0]}", missing[1])


def check_runs_here(hf_config: PretrainedConfig, place: str) -> None:
    """Raise ConfigError if this machine cannot run the model whose weights are at `place`."""
    if missing := _missing_here(hf_config):
        raise ConfigError(f"{place}: {missing[0]} of its config: {missing[1]}")
