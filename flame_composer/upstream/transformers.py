"""transformers 4.57.6: what its models and configs know of themselves, but do not say publicly."""

from __future__ import annotations

from typing import Any

import torch
from transformers import PretrainedConfig, PreTrainedModel


def block_names(model: PreTrainedModel) -> set[str]:
    """Return the names of the classes of a model's blocks, its repeated layers.

    Upstream: transformers 4.57.6, `PreTrainedModel._no_split_modules`.
    Mends: a model has no public name for which of its modules are blocks.
    """
    return set(model._no_split_modules or ())


def tied_names(model: PreTrainedModel) -> set[str]:
    """Return the names of the tensors that are other tensors of the model; empty if none is tied.

    Upstream: transformers 4.57.6, `PreTrainedModel._tied_weights_keys`.
    Mends: a model has no public name for them.
    """
    return set(model._tied_weights_keys or ()) if model.config.tie_word_embeddings else set()


def initialize(model: PreTrainedModel, module: torch.nn.Module) -> None:
    """Fill the parameters of one of a model's modules as a new model's are, without its children.

    Upstream: transformers 4.57.6, `PreTrainedModel._init_weights`.
    Mends: the public `init_weights` fills all of a model.
    """
    model._init_weights(module)  # type: ignore[no-untyped-call]


def generation_keys() -> set[str]:
    """Return the keys of sampling settings that any model's config may hold, as old ones do.

    Upstream: transformers 4.57.6, `PretrainedConfig._get_global_generation_defaults`.
    Mends: they are no arguments of the config's class, and have no public name.
    """
    return set(PretrainedConfig._get_global_generation_defaults())


def keep_generation_config(model: Any) -> None:
    """Have a model's generation config stay what it is, also when it is saved and read.

    Upstream: transformers 4.57.6, `GenerationConfig._from_model_config`.
    Mends: `generate` makes one that came with a new model anew, without what was set in it.
    """
    model.generation_config._from_model_config = False
