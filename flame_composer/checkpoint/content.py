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
from flame_composer.config.extensions import spelled_alike
from flame_composer.config.sections import OptimizerConfig
from flame_composer.config.train import TrainConfig
from flame_composer.errors import DataError, one_line
from flame_composer.model.causal_lm import build_or_load
from flame_composer.model.optimizer import CLASS_NAMES, decay_of, settings_of

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
_PLAIN = (str, int, float, type(None))
_FREEZING = "layerfreezing"
# Settings of an optimizer that say how a step is computed, and not what it is.
_FREE = ("foreach", "fused")
# What decides where in the data a run goes on, by its name in the order that a checkpoint tells.
_LAYOUT = {
    "shuffle_seed": "train_data.shuffle_seed",
    "num_canonical_nodes": "train_data.num_canonical_nodes",
}
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
    place of a run's own. `kinds` are the others that its groups have, as examples of their types.

    Of `passed_over` weights the optimizer may have taken fewer steps than of the others;
    `skips_steps`: of all it may have taken fewer than the clock has. `other_order`: the rows may
    have been in another order than the checkpoint says.
    """

    weights: Shapes
    trained: Sequence[tuple[str, ...]]
    optimizer: str
    settings: Mapping[bool, Mapping[str, Any]]
    kinds: Mapping[str, Any]
    passed_over: frozenset[str]
    skips_steps: bool
    other_order: bool


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
        settings_of(config.optimizer, but=_settings(config.optimizer)[True]),
        frozenset(name for name in weights if _may_be_passed_over(name, config, model.config)),
        config.on_nan == "skip" or config.precision == "amp_fp16",
        config.allow_data_change,
    )


def _may_be_passed_over(name: str, config: TrainConfig, hf_config: PretrainedConfig) -> bool:
    """Whether there may be steps in which a weight has no gradient: of a layer that is frozen or
    left out at random, or of an expert that no token goes to.
    """
    is_frozen = any(spelled_alike(each) == _FREEZING for each in config.algorithms)
    is_dropped = any("layerdrop" in key and rate for key, rate in hf_config.to_dict().items())
    return is_frozen or is_dropped or "expert" in name


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
        check_pieces(content, place, may_be_behind=needed is None or needed.skips_steps)
        if needed is not None:
            _check_model(shapes, needed)
            _check_optimizer(optimizers, shapes, needed)
            _check_epoch(content["state"]["timestamp"]["Timestamp"])
            _check_rest(content)
            _check_steps(content["state"], optimizers, needed)
            _check_callbacks(content)
            _check_place(content["state"], needed)
            _check_numbers(weights, optimizers, needed)
            _check_averages(content["state"], weights[0], shapes)
    except DataError:
        raise
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


def _check_epoch(clock: dict[str, Any]) -> None:
    """What there was in this epoch is a part of what there was, and in the first epoch all."""
    for name in ("batch", "sample", "token"):
        of_epoch, all_of_it = clock[f"{name}_in_epoch"], clock[name]
        if of_epoch > all_of_it or (clock["epoch"] == 0 and of_epoch != all_of_it):
            raise _Lack(
                f"its clock's {name} is {all_of_it}, and its {name}_in_epoch {of_epoch} in epoch"
                f" {clock['epoch']}"
            )
    if clock["epoch"] > clock["batch"]:
        raise _Lack(f"its clock's epoch is {clock['epoch']}, after {clock['batch']} batches")


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
        for state in states:
            if "step" not in state[name]:
                raise _Lack(f"it has no {path}.state.{name}.step")
            # Below zero the next step divides by zero
            if not 0 <= _number(state[name]["step"], f"{path}.state.{name}.step") < 2**53:
                raise _Lack(f"its {path}.state.{name}.step is {state[name]['step']}")


def _number(value: Any, path: str) -> float:
    """Return the number that `value` is, or holds as a tensor without dimensions."""
    is_tensor = isinstance(value, torch.Tensor) and pieces.shape([value]) == ()
    number = value.item() if is_tensor else value
    if isinstance(number, bool) or not isinstance(number, _NUMBER):
        raise _Lack(f"its {path} is {_in_short(value)}")
    return number


def _in_short(value: Any) -> str:
    return f"{value!a}"[:100] if isinstance(value, _PLAIN) else f"a {type(value).__name__}"


def _check_steps(state: dict[str, Any], optimizers: list[Any], needed: Needed) -> None:
    """The optimizer has taken as many steps of every weight as of any other, and no more than the
    clock has; moments are kept of steps that were taken.
    """
    path = f"optimizers.{needed.optimizer}.state"
    states = [each[needed.optimizer]["state"] for each in optimizers]
    names = [next(name for name in each if name in states[0]) for each in needed.trained]
    counted = [each[name]["step"] for name in names for each in states]
    if len({(type(step), getattr(step, "dtype", None)) for step in counted}) > 1:
        raise _Lack(f"its {path} have steps of several types")
    most = max(map(float, counted), default=0)
    was_frozen = any(spelled_alike(name) == _FREEZING for name, _ in state.get("algorithms", ()))
    batch = state["timestamp"]["Timestamp"]["batch"]
    for name in names:
        step, *others = (float(each[name]["step"]) for each in states)
        may_lag = was_frozen or name in needed.passed_over
        if any(other != step for other in others):
            raise _Lack(f"its pieces are not of the same {path}.{name}.step")
        if step > batch or not step.is_integer():
            raise _Lack(f"its clock is at step {batch}, and its {path}.{name}.step at {step:g}")
        if step < most <= batch and not may_lag:
            raise _Lack(f"its {path}.{name}.step is {step:g}, and that of other weights {most:g}")
        if step == 0 and any(
            tensor.count_nonzero()
            for tensor in pieces.tensors([each[name]["exp_avg"] for each in states])
        ):
            raise _Lack(f"its {path}.{name}.step is 0, and there are moments")


def check_pieces(content: dict[str, Any], place: str, *, may_be_behind: bool) -> str | None:
    """Raise DataError for pieces of another step than their head's, in a checkpoint that does not
    say which pieces are its own.

    `may_be_behind`: the optimizer may have left out steps. Return the line that says that it did.
    """
    if "pieces" not in content or "fingerprints" in content:
        return None
    batch = content["state"]["timestamp"]["Timestamp"]["batch"]
    steps = [_most_steps(piece.get("optimizers", {})) for piece in content["pieces"]]
    if all(step == batch for step in steps) or None in steps:
        return None
    behind = f"its clock is at step {batch}, and its pieces at {', '.join(map(str, steps))}"
    if len(set(steps)) == 1 and steps[0] < batch:
        behind += "; if steps were left out (on_nan=skip), that is right"
        if may_be_behind:
            return f"{place}: {behind}"
    raise DataError(f"{place}: not a whole checkpoint: {behind}")


def _most_steps(optimizers: dict[str, Any]) -> int | None:
    """Return None for no optimizer's state."""
    states = [state for optimizer in optimizers.values() for state in optimizer["state"].values()]
    return max((int(state["step"]) for state in states), default=None)


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
    for setting, value in needed.kinds.items():
        if setting in group and not _is_like(group[setting], value, is_free=setting in _FREE):
            raise _Lack(f"its {path} have {setting}={_in_short(group[setting])}")


def _is_like(found: Any, value: Any, *, is_free: bool) -> bool:
    """Whether a setting can take the place of `value`: a flag of it, another number of a number."""
    if is_free:
        return found is None or isinstance(found, bool)
    if value is None or isinstance(value, bool):
        return found is value
    return isinstance(found, _NUMBER) and not isinstance(found, bool) and math.isfinite(found)


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


def _check_place(state: dict[str, Any], needed: Needed) -> None:
    """The place in the data is the clock's, in the order that the checkpoint says its rows had."""
    train, clock = state["dataset_state"]["train"], state["timestamp"]["Timestamp"]
    for name in ("epoch", "sample_in_epoch"):
        if train[name] != clock[name]:
            raise _Lack(f"its clock's {name} is {clock[name]}, and {train[name]} its rows'")
    order = state["callbacks"]["SameData"]["order"]
    for name, key in _LAYOUT.items():
        is_known = order.get(key) is not None
        if is_known and train[name] != order[key] and not needed.other_order:
            raise _Lack(
                f"its rows have the {name} {train[name]}, and it was trained with {key}="
                f"{_in_short(order[key])}; if that was changed on the way, set allow_data_change"
            )
    nodes = train.get("initial_physical_nodes")
    if nodes is not None and not (type(nodes) is int and 0 < nodes < 2**31):
        raise _Lack(f"its state.dataset_state.train.initial_physical_nodes is {_in_short(nodes)}")


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
