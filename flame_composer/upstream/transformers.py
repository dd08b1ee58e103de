"""transformers 4.57.6 and 5.24: facts about its models and configs that have no public names."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from transformers import GenerationConfig, GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

_OUTPUT_KEYS = {field.name for field in dataclasses.fields(CausalLMOutputWithPast)}


def with_cache(model: PreTrainedModel, cache: Any) -> dict[str, Any]:
    """Return the arguments by which a model goes on from a cache, or None, and gives the next one.

    Upstream: transformers 5.24, `PreTrainedModel.forward`.
    Mends: it calls `past_key_values` `cache`, and warns of the old name; models of fla know that
        one only.
    """
    knows_new = "cache" in inspect.signature(model.forward).parameters
    return {"cache" if knows_new else "past_key_values": cache, "use_cache": True}


def cache_of(output: Any) -> Any:
    """Return the cache in a model's output, or None.

    Upstream: transformers 5.24, `ModelOutput.past_key_values`.
    Mends: as `with_cache`.
    """
    return output.get("cache" if "cache" in _OUTPUT_KEYS else "past_key_values")


def block_names(model: PreTrainedModel) -> set[str]:
    """Return the names of the classes of a model's blocks, its repeated layers.

    Upstream: transformers 4.57.6, `PreTrainedModel._no_split_modules`.
    Mends: a model has no public way to tell which of its modules are blocks.
    """
    return set(model._no_split_modules or ())


def tied_names(model: PreTrainedModel) -> set[str]:
    """Return the names of the tensors that share another tensor's memory; empty if none is tied.

    Upstream: transformers 4.57.6, `PreTrainedModel._tied_weights_keys`.
    Mends: a model has no public way to tell which of its tensors are tied, before transformers 5.
    """
    known: dict[str, str] | None = getattr(model, "all_tied_weights_keys", None)
    if known is not None:
        return set(known)
    return set(model._tied_weights_keys or ()) if model.config.tie_word_embeddings else set()


def initialize(model: PreTrainedModel, module: nn.Module) -> None:
    """Initialise the parameters of one module as in a new model, without its children.

    Upstream: transformers 4.57.6, `PreTrainedModel._init_weights`.
    Mends: the public `init_weights` initialises a whole model.
    """
    model._init_weights(module)  # type: ignore[no-untyped-call]


def generation_keys() -> set[str]:
    """Return the keys of the sampling settings that a model's config may hold, as old ones do.

    Upstream: transformers 4.57.6, `PretrainedConfig._get_global_generation_defaults`, which is
    `GenerationConfig._get_default_generation_params` in 5.
    Mends: these keys are not arguments of the config's class, and have no public list.
    """
    owner: Any = PretrainedConfig
    if hasattr(owner, "_get_global_generation_defaults"):
        return set(owner._get_global_generation_defaults())
    owner = GenerationConfig
    return set(owner._get_default_generation_params())


@contextmanager
def without_parameters() -> Iterator[None]:
    """Give no memory to the parameters of models built in the body; their buffers are as usual.

    Upstream: torch 2.7.0, `torch.device("meta")` as a context.
    Mends: a model built on the meta device has no buffers, of which some are stored nowhere.
    """
    register: Any = nn.Module.register_parameter

    def register_empty(module: nn.Module, name: str, param: nn.Parameter | None) -> None:
        if param is not None and not param.is_meta:
            empty = nn.Parameter(param.to("meta"), requires_grad=param.requires_grad)
            vars(empty).update(vars(param))
            param = empty
        register(module, name, param)

    nn.Module.register_parameter = register_empty  # type: ignore[assignment, method-assign]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]


@contextmanager
def without_model_defaults(model: Any) -> Iterator[dict[str, Any]]:
    """Give the arguments by which `generate` takes only tokens from the model's generation config.

    Upstream: transformers 5.24, `GenerationMixin._prepare_generation_config`.
    Mends: all that the given config leaves open is taken from the model's, such as a penalty;
        transformers 4 has `use_model_defaults`, by which bos, eos and pad are.
    """
    if "use_model_defaults" in inspect.signature(GenerationMixin.generate).parameters:
        yield {"use_model_defaults": False}
        return
    given = model.generation_config
    names = ("bos_token_id", "eos_token_id", "pad_token_id")
    model.generation_config = GenerationConfig(**{name: getattr(given, name) for name in names})
    try:
        yield {}
    finally:
        model.generation_config = given


def keep_generation_config(model: Any) -> None:
    """Keep transformers from replacing a model's generation config, even after it is reloaded.

    Upstream: transformers 4.57.6, `GenerationConfig._from_model_config`.
    Mends: `generate` rebuilds the generation config of a new model and drops what was set in it.
    Version 5 does not, but writes in its folders that it should be done.
    """
    model.generation_config._from_model_config = False
