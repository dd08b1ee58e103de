"""Configs of models in transformers 4, whose constructors list their keys, and 5: dataclasses."""

from __future__ import annotations

import dataclasses
import inspect
import typing
from collections.abc import Mapping
from inspect import Parameter
from typing import Any

import torch
from transformers import PretrainedConfig

# Keys that all configs of transformers 4 have, of which those of 5 have few
_BASE_OF_4 = (
    *("output_hidden_states", "output_attentions", "return_dict", "torchscript", "dtype"),
    *("pruned_heads", "tie_word_embeddings", "chunk_size_feed_forward", "is_encoder_decoder"),
    *("is_decoder", "cross_attention_hidden_size", "add_cross_attention", "tie_encoder_decoder"),
    *(
        "architectures",
        "finetuning_task",
        "id2label",
        "label2id",
        "num_labels",
        "task_specific_params",
    ),
    *("problem_type", "tokenizer_class", "prefix", "bos_token_id", "pad_token_id", "eos_token_id"),
    *("sep_token_id", "decoder_start_token_id"),
)
_ROPE = "rope_parameters"  # in transformers 5, for what 4 has as rope_theta and rope_scaling
_ROPE_OF_4 = {"rope_theta": (float, 10000.0), "rope_scaling": (dict | None, None)}
# Keys that only some models had in transformers 4, and their names in rope_parameters
_ROPE_OF_SOME = {
    "partial_rotary_factor": "partial_rotary_factor",
    "rotary_pct": "partial_rotary_factor",
    "rotary_emb_base": "rope_theta",
}


def base_keys() -> set[str]:
    """Return the keys that all configs have.

    Upstream: transformers 4.57.6, `PretrainedConfig.__init__`; 5, the fields of the dataclass.
    Mends: these keys have no public list.
    """
    return {*_BASE_OF_4, *_fields_of_base()}


def parameters_of(config_class: type[PretrainedConfig]) -> dict[str, Parameter]:
    """Return the keys of a config class that not all configs have.

    Upstream: transformers 5.24, `PreTrainedConfig`, a dataclass.
    Mends: its constructor also has the keys of all configs, and none for rope_theta, rope_scaling
        and, in some, partial_rotary_factor, rotary_pct and rotary_emb_base, which it still takes.
    """
    known = dict(inspect.signature(config_class.__init__).parameters)
    for name in ("self", "kwargs", *_fields_of_base()):
        known.pop(name, None)
    if _ROPE in known:
        for name, (hint, default) in _ROPE_OF_4.items():
            kind = Parameter.KEYWORD_ONLY
            known[name] = Parameter(name, kind, annotation=hint, default=default)
        source = inspect.getsource(config_class)
        for name in _ROPE_OF_SOME:
            if f'"{name}"' in source and name not in known:
                known[name] = Parameter(name, Parameter.KEYWORD_ONLY, annotation=float)
    return known


def hints_of(config_class: type[PretrainedConfig]) -> dict[str, Any]:
    """Return the types of a config class's keys.

    Upstream: transformers 5.24, `PreTrainedConfig`.
    Mends: names in the annotations of keys that all configs have are not found in other modules.
    """
    names = {**vars(typing), "torch": torch}
    hints = typing.get_type_hints(config_class.__init__, localns=names)
    if _ROPE in hints:
        hints = dict.fromkeys(_ROPE_OF_SOME, float) | hints
        hints |= {name: hint for name, (hint, _) in _ROPE_OF_4.items()}
    return {name: hints[name] for name in parameters_of(config_class) if name in hints}


def rotates(hf_config: PretrainedConfig) -> bool:
    """Return whether a model of transformers has rotary embeddings.

    Upstream: transformers 5.24, `PreTrainedConfig.rope_parameters`.
    Mends: it has no rope_theta any more.
    """
    return hasattr(hf_config, "rope_theta") or bool(getattr(hf_config, _ROPE, None))


def has_value(hf_config: PretrainedConfig, key: str, value: Any) -> bool:
    """Return whether a config's key has a value, under the names of either transformers.

    Upstream: transformers 5.24, `PreTrainedConfig.rope_parameters`.
    Mends: the keys of rotary embeddings in transformers 4 are in this one key only, and it is
        unknown to transformers 4.
    """
    has = value_of(hf_config, key)
    if key == _ROPE and isinstance(value, Mapping) and isinstance(has, Mapping):
        return all(has.get(name) == each for name, each in value.items())
    return bool(has == value)


def value_of(hf_config: PretrainedConfig, key: str) -> Any:
    """Return the value of a config's key, under the names of either transformers, or None.

    Upstream: transformers 5.24, `PreTrainedConfig.rope_parameters`.
    Mends: as `has_value`.
    """
    parameters = getattr(hf_config, _ROPE, None)
    if not isinstance(parameters, Mapping):  # transformers 4, or a model without rotary embeddings
        if key != _ROPE or not hasattr(hf_config, "rope_theta"):
            return getattr(hf_config, key, None)
        scaling = getattr(hf_config, "rope_scaling", None) or {"rope_type": "default"}
        partial = getattr(hf_config, "partial_rotary_factor", None)
        found = {**scaling, "rope_theta": hf_config.rope_theta}
        return found if partial is None else found | {"partial_rotary_factor": partial}
    if key == "rope_scaling":
        scaling = {name: value for name, value in parameters.items() if name != "rope_theta"}
        return None if scaling.get("rope_type", "default") == "default" else scaling
    name = "rope_theta" if key == "rope_theta" else _ROPE_OF_SOME.get(key)
    return getattr(hf_config, key, None) if name is None else parameters.get(name)


def as_known_here(
    content: Mapping[str, Any], config_class: type[PretrainedConfig]
) -> dict[str, Any]:
    """Return a written config with the keys and values that this transformers reads.

    Upstream: transformers 5.24, `PreTrainedConfig.rope_parameters`, `_encode_special_floats`.
    Mends: transformers 4 does not know this key, and would take its own default instead; numbers
        that JSON lacks, as in Mamba-2's dt_limit, are written as objects.
    """
    found: dict[str, Any] = _with_special_floats(dict(content))
    parameters = found.get(_ROPE)
    known = parameters_of(config_class)
    if not isinstance(parameters, dict) or _ROPE in known or "rope_theta" not in known:
        return found
    if any(isinstance(each, dict) for each in parameters.values()):
        return found  # one embedding for each kind of layer: the key is named as left out
    del found[_ROPE]
    scaling = dict(parameters)
    found.setdefault("rope_theta", scaling.pop("rope_theta", 10000.0))
    if "partial_rotary_factor" in scaling:
        found.setdefault("partial_rotary_factor", scaling.pop("partial_rotary_factor"))
    if scaling.get("rope_type", "default") != "default":
        found.setdefault("rope_scaling", scaling)
    return found


_SPECIAL_FLOATS = {name: float(name) for name in ("NaN", "Infinity", "-Infinity")}


def _with_special_floats(value: Any) -> Any:
    """Return a JSON value in which `{"__float__": "Infinity"}` and the like are numbers."""
    if isinstance(value, dict):
        tag = value.get("__float__")
        if len(value) == 1 and isinstance(tag, str) and tag in _SPECIAL_FLOATS:
            return _SPECIAL_FLOATS[tag]
        return {key: _with_special_floats(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_with_special_floats(each) for each in value]
    return value


def _fields_of_base() -> set[str]:
    base: Any = PretrainedConfig
    is_dataclass = dataclasses.is_dataclass(base)
    return {each.name for each in dataclasses.fields(base)} if is_dataclass else set()
