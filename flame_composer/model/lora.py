"""Low-rank adapters (LoRA) in a model: which layers get one, adding them, and merging them.

From Hu et al. 2021; the layers are peft's. They are put into the model itself, which keeps its
class: everything that works with a Hugging Face model works with one that has adapters. (peft's own
wrapper, PeftModel, hides the class, and with it which package a model is from.)
"""

from __future__ import annotations

import difflib
import importlib.util
import warnings
from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from flame_composer.config.sections import LoraConfig
from flame_composer.cpu.linear import through_onednn
from flame_composer.errors import ConfigError, InvalidField
from flame_composer.model.base import Base
from flame_composer.upstream.transformers import block_names

NAME = "default"  # peft's name for the only adapter

# Names of a block's part that mixes tokens, in the models of fla and transformers.
_MIXERS = (
    "attn",
    "self_attn",
    "attention",
    "self_attention",
    "linear_attn",
    "mixer",
    "mamba",
    "temporal_block",
)
# Layers whose weights fla (0.5.2) reads without calling the layer, by model type: it would pass an
# adapter by. (fla's MLPs do the same to down_proj, but can be told not to: see `add_adapters`.)
_PASSED_BY: Mapping[str, Sequence[str]] = MappingProxyType(
    {
        "gsa": ("o_proj",),
        "hgrn2": ("o_proj",),
        "lightnet": ("o_proj",),
        "raven": ("o_proj",),
        "mamba": ("x_proj", "dt_proj", "out_proj"),
        "samba": ("x_proj", "dt_proj", "out_proj"),
        "mamba2": ("out_proj",),
        "log_linear_mamba2": ("out_proj",),
        "rodimus": ("g_gate_proj", "tau_gate_proj"),
    }
)


class Adapter(NamedTuple):
    """All that decides what an adapter's weights mean; `targets` are full names of layers."""

    rank: int
    alpha: float
    dropout: float
    targets: tuple[str, ...]
    train_embeddings: bool
    base: Base

    def as_plain(self) -> dict[str, Any]:
        """Return the adapter as plain values, as a checkpoint holds it."""
        return {
            **self._asdict(),
            "targets": list(self.targets),
            "base": self.base._asdict(),
        }


def build_adapter(config: LoraConfig, model: PreTrainedModel, base: Base) -> Adapter:
    """Return the adapter that `config` describes for this model, which has none yet.

    Raise InvalidField for targets that the model does not have, or that fla passes by.
    """
    targets = _targets_of(config.targets, model)
    return Adapter(
        config.rank, config.alpha, config.dropout, targets, config.train_embeddings, base
    )


def projections(model: PreTrainedModel) -> dict[str, nn.Module]:
    """Return the layers that can have an adapter by name: all linear ones but the output layer."""
    output = model.get_output_embeddings()
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and module is not output
    }


def _targets_of(chosen: Sequence[str], model: PreTrainedModel) -> tuple[str, ...]:
    names = list(projections(model))
    passed_by = passed_by_in(model)
    if list(chosen) == ["all"]:
        return tuple(name for name in names if name not in passed_by)
    if list(chosen) == ["default"]:
        found = [name for name in _in_mixers(model, names) if name not in passed_by]
        if found:
            return tuple(found)
        raise InvalidField(
            "lora.targets",
            f"default is not known for a {model.config.model_type} model; give all, or some of"
            f" {_listed(endings_of(names))}",
        )
    for ending in chosen:
        _require_known(ending, names, passed_by, model)
    return tuple(name for name in names if any(ends_in(name, ending) for ending in chosen))


def _require_known(
    ending: str, names: Sequence[str], passed_by: Iterable[str], model: PreTrainedModel
) -> None:
    """Raise InvalidField unless `ending` is that of layers which can have an adapter."""
    found = [name for name in names if ends_in(name, ending)]
    if set(found) & set(passed_by):
        raise InvalidField(
            "lora.targets",
            f"fla's {model.config.model_type} reads the weights of {ending} without calling it, so"
            " that an adapter on it would have no effect; leave it out",
        )
    if found:
        return
    output = next(
        (name for name, module in model.named_modules() if module is model.get_output_embeddings()),
        "",
    )
    if ends_in(output, ending):
        raise InvalidField(
            "lora.targets",
            f"{ending} is the output layer, which gets no adapter; leave it out, or train it whole"
            " with lora.train_embeddings=true",
        )
    known = endings_of(names)
    close = difflib.get_close_matches(ending, known, n=1, cutoff=0.6)
    rest = f"did you mean {close[0]}?" if close else f"there are {_listed(known)}"
    raise InvalidField(
        "lora.targets", f"no projection of this model is named {ending[:80]!r}; {rest}"
    )


def ends_in(name: str, ending: str) -> bool:
    """Return whether the dotted name is `ending`, or its last parts are."""
    return name == ending or name.endswith(f".{ending}")


def endings_of(names: Iterable[str]) -> list[str]:
    """Return the different last parts of names; a number comes with the part before it."""
    endings: dict[str, None] = {}
    for name in names:
        *_, before, last = ["", *name.split(".")]
        endings[f"{before}.{last}" if last.isdigit() and before else last] = None
    return list(endings)


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:20]) + (", ..." if len(names) > 20 else "")


def _in_mixers(model: PreTrainedModel, names: Iterable[str]) -> list[str]:
    """Return the names of layers that lie in a part of a block that mixes tokens."""
    classes = block_names(model)
    blocks = [name for name, part in model.named_modules() if type(part).__name__ in classes]
    prefixes = tuple(f"{block}.{mixer}." for block in blocks for mixer in _MIXERS)
    return [name for name in names if name.startswith(prefixes)]


def passed_by_in(model: PreTrainedModel) -> set[str]:
    """Return the names of layers whose weights fla reads without calling the layer."""
    endings = (
        _PASSED_BY.get(model.config.model_type, ())
        if type(model).__module__.startswith("fla.")
        else ()
    )
    mixers = _in_mixers(model, projections(model))
    return {name for name in mixers if any(ends_in(name, ending) for ending in endings)}


def add_adapters(model: PreTrainedModel, adapter: Adapter) -> None:
    """Add adapters to the layers `adapter.targets`, and freeze all else but trained embeddings.

    The adapters change nothing yet: the second matrix of each is 0, the first is drawn at random.
    fla's MLPs are told to call `down_proj` if that has an adapter, instead of computing it together
    with the activation. Raise ConfigError if peft is not installed.
    """
    config = peft_config(adapter, model, adapter.targets)
    with warnings.catch_warnings():
        # Of layers that are set otherwise, in a model that has both kinds: peft corrects that.
        warnings.filterwarnings("ignore", "fan_in_fan_out is set to", UserWarning)
        _peft().inject_adapter_in_model(config, model)
    matrices = tuple(f".{matrix}.{NAME}.weight" for matrix in ("lora_A", "lora_B"))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.endswith(matrices))
    if adapter.train_embeddings:
        for layer in embeddings_of(model).values():
            layer.requires_grad_(True)
    for module in model.modules():
        if getattr(module, "fuse_swiglu", False) and _has_adapter(module, "down_proj"):
            module.fuse_swiglu = False  # type: ignore[assignment]
    through_onednn(model)
    model.train(model.training)  # the adapters, too, whose dropout would otherwise be on


def _has_adapter(module: nn.Module, name: str) -> bool:
    return hasattr(getattr(module, name, None), "lora_A")


def _peft() -> Any:
    if importlib.util.find_spec("peft") is None:
        raise ConfigError(
            "peft, which makes adapters, is not installed; pip install 'flame-composer[tune]'"
        )
    import peft

    return peft


def peft_config(
    adapter: Adapter,
    model: PreTrainedModel,
    targets: Sequence[str],
    whole: Sequence[str] = (),
) -> Any:
    """Return the adapter as peft's LoraConfig.

    `targets` are names of layers, or their endings; `whole` are those that are trained whole.
    """
    layers: list[Any] = [model.get_submodule(name) for name in adapter.targets]
    kinds = [type(getattr(layer, "base_layer", layer)) for layer in layers]
    return _peft().LoraConfig(
        task_type="CAUSAL_LM",
        base_model_name_or_path=adapter.base.place,
        r=adapter.rank,
        lora_alpha=adapter.alpha,
        lora_dropout=adapter.dropout,
        target_modules=list(targets),
        modules_to_save=endings_of(whole) or None,
        fan_in_fan_out=Conv1D in kinds,
    )


def peft_defaults() -> dict[str, Any]:
    """Return the keys of peft's adapter_config.json with their defaults."""
    return dict(_peft().LoraConfig().to_dict())


def embeddings_of(model: PreTrainedModel) -> dict[str, nn.Module]:
    """Return the input embeddings and the output layer by name; they may be tied."""
    layers = (model.get_input_embeddings(), model.get_output_embeddings())
    return {name: module for name, module in model.named_modules() if module in layers}


def is_tied(model: PreTrainedModel) -> bool:
    """Return whether the output layer has the weights of the input embeddings."""
    return len({id(layer.weight) for layer in embeddings_of(model).values()}) == 1


def trained_names(model: nn.Module) -> set[str]:
    """Return the names of the parameters that are trained; tied ones have several."""
    return {
        name
        for name, parameter in model.named_parameters(remove_duplicate=False)
        if parameter.requires_grad
    }


def has_adapters(model: nn.Module) -> bool:
    """Return whether any layer of a model has an adapter that is not merged."""
    return any(hasattr(layer, "lora_A") for layer in model.modules())


@torch.no_grad()
def merge_adapters(model: PreTrainedModel) -> None:
    """Add each adapter's product to the weights of its layer, and remove the adapters.

    The model then has the layers, names and number of weights of the base.
    """
    for name, layer in list(model.named_modules()):
        if not hasattr(layer, "lora_A"):
            continue
        inner: Any = layer.base_layer
        delta = layer.get_delta_weight(NAME)  # type: ignore[operator]
        inner.weight += delta.to(inner.weight.dtype)
        parent, _, last = name.rpartition(".")
        setattr(model.get_submodule(parent), last, inner)
    if hasattr(model, "peft_config"):
        del model.peft_config
    model.requires_grad_(True)
