"""What a checkpoint has to hold before a run goes on from it: weights, moments, the clock,
callbacks' state.

Composer takes what is there and leaves out what is not, with status 0: a run would go on from
random weights. All is looked at here before a checkpoint is chosen.
"""

from __future__ import annotations

import datetime
import math
import random
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from transformers import PretrainedConfig

from flame_composer.checkpoint import sharded as pieces
from flame_composer.config.sections import CLASS_NAMES, OptimizerConfig, decay_of
from flame_composer.config.train import TrainConfig
from flame_composer.errors import DataError, one_line
from flame_composer.model.causal_lm import build_or_load

Shapes = Mapping[str, tuple[int, ...]]

_CLOCK = (
    "epoch",
    "batch",
    "sample",
    "token",
    "batch_in_epoch",
    "sample_in_epoch",
    "token_in_epoch",
)
# Composer 0.19.1 and after
_LATER_CLOCK = ("iteration", "epoch_in_iteration", "token_in_iteration")
_WALL_CLOCK = ("total_wct", "iteration_wct", "epoch_wct", "batch_wct")
_NUMBER = (int, float)
# The state of the callbacks that every run has.
_CALLBACKS: dict[str, dict[str, Any]] = {
    "JsonlLog": {"initial_evaluation": dict, "last_evaluation": dict},
    "RandomState": {"rng": list},
    "SameData": {"order": dict},
    "Schedule": {"made_from": dict, "num_used": int},
}
_MADE_FROM = {
    "optimizer.lr": _NUMBER,
    "scheduler.name": str,
    "max_duration": int,
    "scheduler.warmup": int,
    "scheduler.decay": int,
    "scheduler.decay_shape": str,
    "scheduler.min_lr_ratio": _NUMBER,
}


class OtherRun(DataError):
    """A whole checkpoint, but not of this run: of another model, or another optimizer."""


class Needed(NamedTuple):
    """What a run's checkpoints hold: the shapes of its weights, and an optimizer's state of those
    it trains.

    A weight with several names (a tied embedding) has its state under one of them. `settings` are
    those of the optimizer's groups, by whether it is of matrices: the ones in a checkpoint take the
    place of a run's own.
    """

    weights: Shapes
    trained: Sequence[tuple[str, ...]]
    optimizer: str
    settings: Mapping[bool, Mapping[str, Any]]


def needed_by(config: TrainConfig, hf_config: PretrainedConfig | None) -> Needed:
    """Return what a checkpoint must hold for this run; `hf_config` as from
    `model.new_hf_config`.
    """
    model = build_or_load(config.model, hf_config, empty=True)
    prefix = "model."  # of the model within Composer's
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if parameter.requires_grad:
            names.setdefault(id(parameter), []).append(prefix + name)
    weights = {prefix + name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    return Needed(
        weights,
        [tuple(each) for each in names.values()],
        CLASS_NAMES[config.optimizer.name],
        _settings(config.optimizer),
    )


def _settings(config: OptimizerConfig) -> dict[bool, dict[str, Any]]:
    common = {"betas": tuple(config.betas), "eps": config.eps, "amsgrad": False, "maximize": False}
    return {
        is_matrix: {**common, "weight_decay": decay_of(config, is_matrix=is_matrix)}
        for is_matrix in (True, False)
    }


def check_content(content: Any, place: str, *, step: int | None, needed: Needed | None) -> None:
    """Raise DataError, naming what is wrong, if `content` is not a training checkpoint's of this
    package.

    `step`: which its name says it is of. `needed`: what a run has to find in it to go on from
    there; without, it is enough that it holds a model. Raise OtherRun if it is one of another
    model.
    """
    try:
        weights, optimizers = _parts(content)
        shapes = _shapes(weights, "model")
        if not shapes:
            raise _Lack("it holds no weights")
        _check_clock(_part(content, dict, "state", "timestamp", "Timestamp"), step)
        _part(content, dict, "state", "integrations", "huggingface")
        if needed is not None:
            _check_model(shapes, needed)
            _check_optimizer(optimizers, shapes, needed)
            _check_rest(content)
            _check_callbacks(content)
            _check_numbers(weights, optimizers, needed)
            _check_averages(content["state"], weights[0], shapes)
    except _Other as error:
        raise OtherRun(f"{place}: {error}") from None
    except _Lack as error:
        raise DataError(f"{place}: not a checkpoint that can be used: {error}") from None
    except Exception as error:  # whatever a content of any kind makes of what looks at it
        raise DataError(f"{place}: not a checkpoint that can be used: {one_line(error)}") from None


class _Lack(Exception):
    pass


class _Other(Exception):
    pass


def _part(tree: Any, kind: Any, *path: str) -> Any:
    """Return what is at `path`; raise _Lack if nothing is, or something that is no `kind`."""
    for depth, name in enumerate(path, 1):
        if not isinstance(tree, dict) or name not in tree:
            raise _Lack(f"it has no {'.'.join(path[:depth])}")
        tree = tree[name]
    if not isinstance(tree, kind) or (isinstance(tree, bool) and kind is not bool):
        raise _Lack(f"its {'.'.join(path)} is a {type(tree).__name__}")
    return tree


def _parts(content: Any) -> tuple[list[Any], list[Any]]:
    """Return weights and optimizer state, each from all pieces, or of one that is not in pieces."""
    if not isinstance(content, dict):
        raise _Lack(f"it holds a {type(content).__name__}")
    state = _part(content, dict, "state")
    sources = content.get("pieces", [state])
    for source in sources:
        for kind in ("model", "optimizers"):
            _part(source, dict, kind)
    return [source["model"] for source in sources], [source["optimizers"] for source in sources]


def _shapes(parts: list[Any], path: str) -> dict[str, tuple[int, ...]]:
    if any(part.keys() != parts[0].keys() for part in parts):
        raise _Lack(f"its pieces are not of the same {path}")
    shapes = {}
    for name in parts[0]:
        shape = pieces.shape([part[name] for part in parts])
        if shape is None:
            raise _Lack(f"its {path}.{name} is no whole tensor")
        shapes[name] = shape
    return shapes


def _check_clock(clock: dict[str, Any], step: int | None) -> None:
    counts = [*_CLOCK, *(name for name in _LATER_CLOCK if name in clock)]
    for name in counts:
        if not 0 <= _part(clock, int, name) < 2**63:
            raise _Lack(f"its clock's {name} is {clock[name]}")
    for name in _WALL_CLOCK:
        if not isinstance(clock.get(name), datetime.timedelta | None) or (
            name == "total_wct" and clock.get(name) is None
        ):
            raise _Lack(f"its clock's {name} is a {type(clock.get(name)).__name__}")
    if step is not None and clock["batch"] != step:
        raise _Lack(f"it is of step {clock['batch']}, and not of the {step} in its name")


def _check_model(shapes: Shapes, needed: Needed) -> None:
    for name, shape in needed.weights.items():
        if name not in shapes:
            raise _Other(f"it has no weights {name}, which this run's model has")
        if shapes[name] != shape:
            raise _Other(
                f"its weights {name} have the shape {list(shapes[name])}, and {list(shape)} in this"
                " run's model"
            )
    more = next((name for name in shapes if name not in needed.weights), None)
    if more is not None:
        raise _Other(f"it has weights {more!a}, which this run's model has not")


def _check_optimizer(optimizers: list[Any], shapes: Shapes, needed: Needed) -> None:
    found = sorted(map(str, optimizers[0]))
    if not found:
        raise _Lack("it holds no optimizer's state")
    if needed.optimizer not in found:
        raise _Other(
            f"its optimizer is {', '.join(found)[:100]}, and this run's {needed.optimizer}"
        )
    path = f"optimizers.{needed.optimizer}"
    states = [_part(each, dict, needed.optimizer, "state") for each in optimizers]
    grouped: dict[str, None] = {}
    for group in _part(optimizers[0], list, needed.optimizer, "param_groups"):
        _check_settings(group, shapes, needed)
        grouped |= dict.fromkeys(_part(group, list, "params"))
    for names in needed.trained:
        name = next((name for name in names if name in states[0] and name in grouped), None)
        if name is None:
            raise _Lack(f"it has no {path}.state.{names[0]}")
        for moment in ("exp_avg", "exp_avg_sq"):
            parts = [
                _part(state, dict, name)[moment]
                for state in states
                if moment in _part(state, dict, name)
            ]
            if len(parts) != len(states) or pieces.shape(parts) != shapes[name]:
                raise _Lack(f"its {path}.state.{name}.{moment} is not of the shape of its weights")
        if "step" not in states[0][name]:
            raise _Lack(f"it has no {path}.state.{name}.step")
        if not 0 <= float(states[0][name]["step"]) < 2**53:  # below, the next step divides by zero
            raise _Lack(f"its {path}.state.{name}.step is {states[0][name]['step']}")


def _check_settings(group: Any, shapes: Shapes, needed: Needed) -> None:
    path = f"optimizers.{needed.optimizer}.param_groups"
    for name in _part(group, list, "params"):
        if name not in shapes:
            raise _Lack(f"its {path} name {str(name)[:100]!a}, which it has no weights of")
        for setting, value in needed.settings[len(shapes[name]) >= 2].items():
            if setting not in group and value is not False:
                raise _Lack(f"its {path} have no {setting}")
            found = group.get(setting, False)
            if (tuple(found) if isinstance(found, list) else found) != value:
                raise _Other(
                    f"its optimizer has {setting}={str(found)[:100]} for {name}, and this run's"
                    f" {setting}={value}"
                )


def _check_numbers(weights: list[Any], optimizers: list[Any], needed: Needed) -> None:
    """No training goes on from weights or moments that are no real numbers: it would save what
    it makes of them first.
    """
    states = [each[needed.optimizer]["state"] for each in optimizers]
    for names in needed.trained:
        for name in names:
            _require_numbers(f"model.{name}", [each[name] for each in weights])
        name = next(name for name in names if name in states[0])
        for moment in ("exp_avg", "exp_avg_sq"):
            path = f"optimizers.{needed.optimizer}.state.{name}.{moment}"
            _require_numbers(
                path, [each[name][moment] for each in states], squared=moment == "exp_avg_sq"
            )


def _require_numbers(path: str, parts: list[Any], *, squared: bool = False) -> None:
    """A square may be infinite, as that of a finite gradient can be, but not below zero: its
    root is taken.
    """
    for tensor in pieces.tensors(parts):
        if not tensor.is_floating_point():
            raise _Lack(f"its {path} is of type {str(tensor.dtype).removeprefix('torch.')}")
        if not tensor.numel():
            continue
        least, most = (bound.item() for bound in tensor.aminmax())  # both NaN if there is one
        if squared and least < 0:
            raise _Lack(f"its {path} has values below zero")
        if not (least >= 0 if squared else math.isfinite(least) and math.isfinite(most)):
            raise _Lack(f"its {path} has values that are infinite or not a number")


def _check_rest(content: dict[str, Any]) -> None:
    """Where the rows go on, random state, and what Composer takes whatever it is."""
    for name in ("epoch", "sample_in_epoch"):
        if _part(content, int, "state", "dataset_state", "train", name) < 0:
            raise _Lack(f"its place in the data is {content['state']['dataset_state']['train']}")
    for name, least in (("shuffle_seed", 0), ("num_canonical_nodes", 1)):  # which lay out the rows
        if _part(content, int, "state", "dataset_state", "train", name) < least:
            raise _Lack(
                f"its state.dataset_state.train.{name} is"
                f" {content['state']['dataset_state']['train'][name]}"
            )
    _check_random(_part(content, list, "rng"), "rng")
    for pair in (
        _part(content, list, "state", "algorithms") if "algorithms" in content["state"] else ()
    ):
        if not (isinstance(pair, tuple | list) and len(pair) == 2 and isinstance(pair[1], dict)):
            raise _Lack("its state.algorithms are not names with a state each")
    for name, kind in (
        ("rank_zero_seed", int),
        ("run_name", str),
        ("schedulers", dict),
        ("scaler", dict),
        ("train_metrics", dict),
        ("eval_metrics", dict),
    ):
        if name in content["state"]:
            _part(content, kind, "state", name)


def _check_random(ranks: list[Any], path: str) -> None:
    """Each rank's random state can be taken up: tried on generators that nobody draws from."""
    for state in ranks:
        try:
            random.Random().setstate(state["python"])
            np.random.RandomState().set_state(state["numpy"])
            torch.Generator().set_state(state["torch"])
        except Exception as error:  # whatever a state of any kind makes them raise
            raise _Lack(f"its {path} is no random state: {one_line(error)}") from None


def _check_callbacks(content: dict[str, Any]) -> None:
    for callback, parts in _CALLBACKS.items():
        for name, kind in parts.items():
            _part(content, kind, "state", "callbacks", callback, name)
    callbacks = content["state"]["callbacks"]
    for name, kind in _MADE_FROM.items():
        _part(callbacks["Schedule"]["made_from"], kind, name)
    step, num_used = (
        content["state"]["timestamp"]["Timestamp"]["batch"],
        callbacks["Schedule"]["num_used"],
    )
    if num_used != step:
        raise _Lack(f"its clock is at step {step}, and its schedule at {num_used}")
    _check_random(callbacks["RandomState"]["rng"], "state.callbacks.RandomState.rng")
    for callback, state in callbacks.items():
        if not isinstance(state, dict):
            raise _Lack(f"its state.callbacks.{callback} is a {type(state).__name__}")


def _averages(state: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    for name, kept in state.get("algorithms", ()):
        if name in ("EMA", "SWA") and kept.get("average") is not None:
            yield name, _part(kept, dict, "average")


def _check_averages(state: dict[str, Any], weights: dict[str, Any], shapes: Shapes) -> None:
    tensors = {
        name: part["part"] if isinstance(part, dict) else part for name, part in weights.items()
    }
    averaged = {
        name: shapes[name] for name, tensor in tensors.items() if tensor.is_floating_point()
    }
    for algorithm, average in _averages(state):
        if {name: pieces.shape([tensor]) for name, tensor in average.items()} != averaged:
            raise _Lack(f"its average of {algorithm} has not the names and shapes of its weights")
