"""Models with adapters, rebuilt from their base and a checkpoint, or peft's folder of an adapter.

What either says of itself is untrusted. Names, numbers and shapes are compared with the base's, and
the base with the hash that was taken of it when the adapter was trained. Nothing but the base's
place is looked up.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from flame_composer.config.sections import MOST_RANK
from flame_composer.errors import ConfigError, DataError, one_line
from flame_composer.model.base import Base, identify_base
from flame_composer.model.build import load_pretrained, meta_model
from flame_composer.model.foreign import count_not_finite, opened, read_json
from flame_composer.model.hf_config import read_pretrained_config
from flame_composer.model.lora import (
    NAME,
    Adapter,
    add_adapters,
    embeddings_of,
    ends_in,
    is_tied,
    passed_by_in,
    peft_defaults,
    projections,
    trained_names,
)
from flame_composer.storage.files import MAX_PATH_BYTES

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."  # of the names in peft's folders
BASE_SHA256 = "base_sha256"  # the base's hash, in the header of WEIGHTS if we wrote it

MOST_ALPHA = 1e30  # an alpha may be an integer, and larger than any float

# Keys of adapter_config.json that are taken, checked, or of no consequence for the model. All
# others must have peft's default, because they would change what the weights mean.
_KEYS = (
    "base_model_name_or_path",
    "ensure_weight_tying",
    "fan_in_fan_out",
    "inference_mode",
    "init_lora_weights",
    "lora_alpha",
    "lora_dropout",
    "modules_to_save",
    "peft_type",
    "peft_version",
    "r",
    "runtime_config",
    "target_modules",
    "task_type",
)


def adapter_in(hf_state: Any, place: str) -> Adapter | None:
    """Return the adapter that a checkpoint describes, or None if the checkpoint has whole weights.

    `hf_state` is what `CausalLM.get_metadata` returned. Raise DataError for a description that
    cannot be right.
    """
    said = hf_state.get("lora") if isinstance(hf_state, dict) else None
    if said is None:
        return None
    try:
        base = Base(said["base"]["place"], said["base"]["sha256"])
        adapter = Adapter(**{**said, "targets": tuple(said["targets"]), "base": base})
    except (TypeError, KeyError):
        raise DataError(f"{place}: its adapter (lora) is not described as one") from None
    _require_sound(adapter, place)
    return adapter


def adapter_of(content: Any, place: str) -> Adapter | None:
    """Return the adapter that the content of a checkpoint describes, or None, as `adapter_in`."""
    try:
        hf_state = content["state"]["integrations"]["huggingface"]
    except (KeyError, TypeError):
        return None  # `model_in` says what is wrong
    return adapter_in(hf_state, place)


def _require_sound(adapter: Adapter, place: str) -> None:
    """Raise DataError unless the numbers and names of an adapter can be those of one."""
    rank, alpha, dropout, targets, train_embeddings, base = adapter
    is_number, is_share = (type(each) in (int, float) for each in (alpha, dropout))
    is_place = isinstance(base.place, str) and 0 < len(base.place) <= MAX_PATH_BYTES
    for name, holds in (
        ("rank", type(rank) is int and 1 <= rank <= MOST_RANK),
        ("alpha", is_number and 0 < alpha < MOST_ALPHA),
        ("dropout", is_share and 0 <= dropout < 1),
        ("targets", bool(targets) and all(isinstance(each, str) for each in targets)),
        ("train_embeddings", isinstance(train_embeddings, bool)),
        ("base", is_place and base.place.isprintable() and isinstance(base.sha256, str)),
    ):
        if not holds:
            raise DataError(f"{place}: its adapter's {name} cannot be right; take another one")


def model_with(
    adapter: Adapter, weights: Mapping[str, torch.Tensor], place: str, base: str | None
) -> PreTrainedModel:
    """Return the base with adapters that have exactly these weights, by their names in the model.

    The base is at `base` if that is given, and otherwise where it was in training. Raise
    ConfigError if it is gone, is another one, or does not fit the adapter.
    """
    source = base or adapter.base.place
    with _base_of(place):
        found = identify_base(source)
        if adapter.base.sha256 and found.sha256 != adapter.base.sha256:
            raise ConfigError(
                f"{place}: its adapter was trained on another base than {source}, or that has"
                f" changed since: sha256 {found.sha256[:12]}... now, and then"
                f" {adapter.base.sha256[:12]!a}...; {_REMEDY}"
            )
        empty = meta_model(read_pretrained_config(source))
        _require_fit(adapter, weights, empty, place)
        model = load_pretrained(source)
    add_adapters(model, adapter)
    model.load_state_dict(dict(weights), strict=False)  # strict: the base's weights would be missed
    return model


_REMEDY = "give the model it was trained on as base=..."


@contextlib.contextmanager
def _base_of(place: str) -> Iterator[None]:
    """Say in errors of the body that they are about the base of the adapter at `place`."""
    try:
        yield
    except (ConfigError, DataError) as error:
        if str(error).startswith(f"{place}: "):
            raise
        raise ConfigError(
            f"{place}: the base of its adapter cannot be loaded: {one_line(error)}; {_REMEDY}"
        ) from None


def _require_fit(
    adapter: Adapter, weights: Mapping[str, torch.Tensor], empty: PreTrainedModel, place: str
) -> None:
    """Raise DataError unless the weights are those of the adapter, added to the model `empty`."""
    known = projections(empty)
    unknown = [name for name in adapter.targets if name not in known]
    if unknown:
        raise DataError(
            f"{place}: its adapter is for another base: that has no layer {unknown[0][:100]!a}"
        )
    if dead := sorted(passed_by_in(empty) & set(adapter.targets)):
        raise DataError(
            f"{place}: its adapter is on {dead[0]}, whose weights fla's {empty.config.model_type}"
            " reads without calling the layer, so that it would have no effect"
        )
    with torch.device("meta"):
        add_adapters(empty, adapter)
    state = empty.state_dict()
    made = {name: state[name].shape for name in state if name in trained_names(empty)}
    for name, tensor in weights.items():
        if not tensor.is_floating_point() or count_not_finite(tensor):
            raise DataError(
                f"{place}: its adapter's {str(name)[:100]!a} holds no finite numbers everywhere: it"
                " is damaged, or its training diverged; take another one"
            )
    for name in {**made, **weights}:
        has, needs = weights[name].shape if name in weights else None, made.get(name)
        if has != needs:
            raise DataError(
                f"{place}: its adapter does not fit its base: {str(name)[:100]!a} is"
                f" {'missing' if has is None else list(has)}, and must be"
                f" {'left out' if needs is None else list(needs)}"
            )


def read_adapter_folder(folder: Path, base: str | None) -> PreTrainedModel:
    """Return the model in a folder in peft's layout, with its adapters.

    The base is at `base`, or else where adapter_config.json says. Raise ConfigError if the folder
    lacks a file, is not of plain LoRA, or does not fit the base.
    """
    place = str(folder)
    said = read_json(folder / CONFIG)
    _require_plain_lora(said, str(folder / CONFIG))
    source = base or said.get("base_model_name_or_path")
    if not isinstance(source, str) or not source or not source.isprintable():
        raise ConfigError(
            f"{folder / CONFIG}: names no base_model_name_or_path; give it as base=..."
        )
    try:
        held, sha256 = _read_weights(folder / WEIGHTS)
        with _base_of(place):
            empty = meta_model(read_pretrained_config(source))
        adapter = Adapter(
            said.get("r"),  # type: ignore[arg-type]
            said.get("lora_alpha"),  # type: ignore[arg-type]
            said.get("lora_dropout", 0.0),
            _targets_in(held, said["target_modules"], empty, place),
            bool(said.get("modules_to_save")),
            Base(source, sha256),
        )
        _require_sound(adapter, str(folder / CONFIG))
        return model_with(adapter, _our_names(held, adapter, empty, place), place, base)
    except DataError as error:
        raise ConfigError(one_line(error)) from None


def _require_plain_lora(said: Mapping[str, Any], place: str) -> None:
    """Raise ConfigError for an adapter_config.json of anything but LoRA without further options."""
    if said.get("peft_type") != "LORA":
        raise ConfigError(
            f"{place}: peft_type is {str(said.get('peft_type'))[:40]!a}, and only LORA can be"
            " loaded; merge the adapter with the program that made it"
        )
    defaults = peft_defaults()
    for key, value in said.items():
        if key not in _KEYS and value != defaults.get(key) and value not in (None, False, [], {}):
            raise ConfigError(
                f"{place}: {str(key)[:40]}={str(value)[:40]}: only plain LoRA can be loaded; merge"
                " the adapter with the program that made it"
            )
    targets = said.get("target_modules")
    if not isinstance(targets, list) or not all(isinstance(each, str) for each in targets):
        raise ConfigError(f"{place}: target_modules must be a list of names; write them out")


def _read_weights(file: Path) -> tuple[dict[str, torch.Tensor], str]:
    """Return the tensors in an adapter's file, and the hash of the base, '' if it is not there."""
    if not file.is_file():
        raise ConfigError(f"{file}: no such file; get the adapter again, with safetensors")
    with opened(file) as content:
        tensors = {name: content.get_tensor(name) for name in list(content.keys())}
        sha256 = (content.metadata() or {}).get(BASE_SHA256, "")
    return tensors, sha256


def _targets_in(
    held: Collection[str], endings: Collection[str], empty: PreTrainedModel, place: str
) -> tuple[str, ...]:
    """Return the layers that an adapter's file has weights for, which must be all of `endings`."""
    there = {name.removeprefix(PREFIX).rpartition(".lora_")[0] for name in held if ".lora_" in name}
    meant = [
        name for name in projections(empty) if any(ends_in(name, ending) for ending in endings)
    ]
    for name in meant:
        if name not in there:
            raise DataError(f"{place}: {WEIGHTS} has no weights for {name}, which {CONFIG} names")
    return (*meant, *sorted(there - set(meant)))


def _our_names(
    held: Mapping[str, torch.Tensor], adapter: Adapter, empty: PreTrainedModel, place: str
) -> dict[str, torch.Tensor]:
    """Return an adapter's tensors under the names that they have in a model with adapters.

    Of a tied output layer and its embeddings, often one is stored: the other gets its weights.
    Raise DataError if both are and differ.
    """
    named = {
        name.removeprefix(PREFIX).replace(".weight", f".{NAME}.weight")
        if ".lora_" in name
        else name.removeprefix(PREFIX): tensor
        for name, tensor in held.items()
    }
    if adapter.train_embeddings and is_tied(empty):
        names = [f"{name}.weight" for name in embeddings_of(empty)]
        stored = [named[name] for name in names if name in named]
        if any(not torch.equal(tensor, stored[0]) for tensor in stored):
            raise DataError(
                f"{place}: its adapter was trained with {' and '.join(names)} apart, but its base"
                " has them tied; untie them in the base, as the program that made it did"
            )
        named |= dict.fromkeys(names, stored[0]) if stored else {}
    return named
