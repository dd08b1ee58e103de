"""Checks that a checkpoint holds everything that a run needs to continue from it.

Everything is the weights, the optimizer's moments, the clock (Composer's Timestamp) and the state
of the callbacks. Composer itself would load what is there and ignore what is missing, so that a run
would silently continue from random weights. All of it is therefore checked before a checkpoint is
chosen.
"""

from __future__ import annotations

import datetime
import math
import random
from collections.abc import Callable, Iterator
from itertools import chain
from typing import Any

import numpy as np
import torch
from transformers import PretrainedConfig

from flame_composer.checkpoint import sharded
from flame_composer.checkpoint.optimizer_state import (
    check_optimizer,
    check_pieces,
    check_steps,
    in_short,
)
from flame_composer.checkpoint.parts import (
    NUMBER,
    Lack,
    Needed,
    Other,
    OtherRun,
    Shapes,
    part_at,
    parts_of,
    shapes_of,
)
from flame_composer.checkpoint.same_model import require_same_config
from flame_composer.config.sections import KINDS, OptimizerConfig
from flame_composer.config.train import TrainConfig
from flame_composer.errors import DataError, one_line
from flame_composer.model.base import Base
from flame_composer.model.build import build_or_load
from flame_composer.model.lora import add_adapters, build_adapter, trained_names
from flame_composer.model.optimizer import (
    CLASS_NAMES,
    decay_of,
    kinds_of,
    muon_names,
    settings_by_weight,
    settings_of,
)

_CLOCK = (
    "epoch",
    "batch",
    "sample",
    "token",
    "batch_in_epoch",
    "sample_in_epoch",
    "token_in_epoch",
)
# In Composer 0.19.1 and later
_LATER_CLOCK = ("iteration", "epoch_in_iteration", "token_in_iteration")
_WALL_CLOCK = ("total_wct", "iteration_wct", "epoch_wct", "batch_wct")
# Settings that decide where in the data a run continues: from their names in the dataset's state to
# their names in the row order that the checkpoint describes
_LAYOUT = {
    "shuffle_seed": "train_data.shuffle_seed",
    "num_canonical_nodes": "train_data.num_canonical_nodes",
}
# The state of the callbacks that every run has
_CALLBACKS: dict[str, dict[str, Any]] = {
    "JsonlLog": {"initial_evaluation": dict, "last_evaluation": dict},
    "RandomState": {"rng": list},
    "SameData": {"order": dict},
    "Schedule": {"made_from": dict, "num_used": int},
}
_MADE_FROM = {
    "optimizer.lr": NUMBER,
    "scheduler.name": str,
    "max_duration": int,
    "scheduler.warmup": int,
    "scheduler.decay": int,
    "scheduler.decay_shape": str,
    "scheduler.min_lr_ratio": NUMBER,
}


def needed_by(
    config: TrainConfig,
    hf_config: PretrainedConfig | None,
    base: Callable[[], Base] | None = None,
) -> Needed:
    """Return what a checkpoint must hold for this run.

    `hf_config` is as returned by `model.hf_config.new_hf_config`; `base` returns the model that
    adapters are trained on, and is needed only if there are any.
    """
    model = build_or_load(config.model, hf_config, empty=True)
    adapter = None
    if config.lora is not None:
        assert base is not None
        with torch.device("meta"):
            adapter = build_adapter(config.lora, model, base())
            add_adapters(model, adapter)
    prefix = "model."  # Composer's model holds ours under this name
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if parameter.requires_grad:
            names.setdefault(id(parameter), []).append(prefix + name)
    state = model.state_dict()
    held = state.keys() if adapter is None else trained_names(model)
    own = settings_by_weight(model, config.optimizer, config.model.mup_base_width)
    weights = {prefix + name: tuple(state[name].shape) for name in state if name in held}
    kinds = kinds_of(model)
    settings = {kind: _settings(config.optimizer, kind) for kind in KINDS}
    return Needed(
        weights,
        [tuple(each) for each in names.values()],
        CLASS_NAMES[config.optimizer.name],
        {prefix + name: settings[kind] | own.get(name, {}) for name, kind in kinds.items()},
        settings_of(config.optimizer, but={*settings["matrices"], *chain(*own.values())}),
        config.on_nan == "skip" or config.precision == "amp_fp16",
        config.allow_data_change,
        None if adapter is None else adapter.as_plain(),
        frozenset(prefix + name for name in muon_names(model, config.optimizer)),
        model.config.to_dict(),
    )


def _settings(config: OptimizerConfig, kind: str) -> dict[str, Any]:
    """Return the settings of the optimizer's group of parameters of a kind (`kinds_of`)."""
    common = {"betas": tuple(config.betas), "eps": config.eps, "amsgrad": False, "maximize": False}
    return {**common, "weight_decay": decay_of(config, kind)}


def check_content(
    content: Any, place: str, *, step: int | None, needed: Needed | None, all_here: bool = True
) -> None:
    """Raise DataError, saying what is wrong, unless `content` is that of a training checkpoint.

    `step` is the step in the checkpoint's name. `needed` is what the checkpoint must hold for a run
    to continue from it; if None, it is enough that the checkpoint holds a model. Without
    `all_here`, `content` has some of the pieces, and other ranks look at the others. Raise OtherRun
    if it belongs to another model.
    """
    try:
        weights, optimizers = parts_of(content)
        shapes = shapes_of(weights, "model", all_here=all_here)
        if not shapes:
            raise Lack("it holds no weights")
        _check_clock(part_at(content, dict, "state", "timestamp", "Timestamp"), step)
        part_at(content, dict, "state", "integrations", "huggingface")
        check_pieces(content, place, may_be_behind=needed is None or needed.skips_steps)
        if needed is not None:
            _check_adapter(content["state"]["integrations"]["huggingface"], needed)
            _check_model(shapes, needed)
            require_same_config(content["state"]["integrations"]["huggingface"], needed)
            check_optimizer(optimizers, shapes, needed, all_here=all_here)
            _check_epoch(content["state"]["timestamp"]["Timestamp"])
            _check_rest(content)
            check_steps(content["state"], optimizers, needed)
            _check_callbacks(content)
            _check_place(content["state"], needed)
            _check_numbers(weights, optimizers, needed)
            _check_averages(content["state"], weights[0], shapes)
    except DataError:
        raise
    except Other as error:
        raise OtherRun(f"{place}: {error}") from None
    except Lack as error:
        raise DataError(f"{place}: not a checkpoint that can be used: {error}") from None
    except Exception as error:  # the content is untrusted: it can make the checks raise anything
        raise DataError(f"{place}: not a checkpoint that can be used: {one_line(error)}") from None


def _check_clock(clock: dict[str, Any], step: int | None) -> None:
    """Raise Lack unless the clock has all counts of Composer's Timestamp, and is at `step`."""
    counts = [*_CLOCK, *(name for name in _LATER_CLOCK if name in clock)]
    for name in counts:
        if not 0 <= part_at(clock, int, name) < 2**63:
            raise Lack(f"its clock's {name} is {clock[name]}")
    for name in _WALL_CLOCK:
        if not isinstance(clock.get(name), datetime.timedelta | None) or (
            name == "total_wct" and clock.get(name) is None
        ):
            raise Lack(f"its clock's {name} is a {type(clock.get(name)).__name__}")
    if step is not None and clock["batch"] != step:
        raise Lack(f"it is of step {clock['batch']}, and not of the {step} in its name")


def _check_epoch(clock: dict[str, Any]) -> None:
    """Raise Lack if the clock counts more within the epoch than within the whole run.

    In the first epoch the two counts must be equal.
    """
    for name in ("batch", "sample", "token"):
        of_epoch, all_of_it = clock[f"{name}_in_epoch"], clock[name]
        if of_epoch > all_of_it or (clock["epoch"] == 0 and of_epoch != all_of_it):
            raise Lack(
                f"its clock's {name} is {all_of_it}, and its {name}_in_epoch {of_epoch} in epoch"
                f" {clock['epoch']}"
            )
    if clock["epoch"] > clock["batch"]:
        raise Lack(f"its clock's epoch is {clock['epoch']}, after {clock['batch']} batches")


def _check_adapter(held: dict[str, Any], needed: Needed) -> None:
    """Raise Other unless the checkpoint has an adapter like this run's, or neither has one."""
    ours, theirs = needed.adapter, held.get("lora")
    if ours is None and theirs is None:
        return
    if ours is None or theirs is None:
        has, trains = ("whole weights", "an adapter (lora)")[:: 1 if theirs is None else -1]
        raise Other(f"it holds {has}, and this run trains {trains}")
    base = {name: part_at(theirs, str, "base", name) for name in ("place", "sha256")}
    if base["sha256"] != ours["base"]["sha256"]:
        raise Other(
            f"its adapter was trained on another base: {base['place'][:200]!a}, sha256"
            f" {base['sha256'][:12]!a}..., and this run's model.pretrained={ours['base']['place']}"
            f" has {ours['base']['sha256'][:12]!a}..."
        )
    for name, value in ours.items():
        if name != "base" and theirs.get(name) != value:
            found, own = in_short(theirs.get(name)), in_short(value)
            is_list = isinstance(value, list)
            raise Other(
                f"its lora.{name} are others than this run's"
                if is_list
                else f"its lora.{name} is {found}, and this run's {own}"
            )


def _check_model(shapes: Shapes, needed: Needed) -> None:
    """Raise Other unless the weights have the names and shapes of this run's model."""
    for name, shape in needed.weights.items():
        if name not in shapes:
            raise Other(f"it has no weights {name}, which this run's model has")
        if shapes[name] != shape:
            raise Other(
                f"its weights {name} have the shape {list(shapes[name])}, and {list(shape)} in this"
                " run's model"
            )
    more = next((name for name in shapes if name not in needed.weights), None)
    if more is not None:
        raise Other(f"it has weights {more!a}, which this run's model lacks")


def _check_numbers(weights: list[Any], optimizers: list[Any], needed: Needed) -> None:
    """Raise Lack for weights or moments that are infinite or not a number.

    A run that continued from them would save further damaged checkpoints before it ended.
    """
    states = [each[needed.optimizer]["state"] for each in optimizers]
    for names in needed.trained:
        for name in names:
            _require_numbers(f"model.{name}", [each[name] for each in weights])
        name = next(name for name in names if name in states[0])
        for moment in needed.moments(name):
            path = f"optimizers.{needed.optimizer}.state.{name}.{moment}"
            _require_numbers(
                path, [each[name][moment] for each in states], squared=moment == "exp_avg_sq"
            )


def _require_numbers(path: str, parts: list[Any], *, squared: bool = False) -> None:
    """Raise Lack unless all values of the tensors are finite real numbers.

    With `squared` they may be infinite, as the square of a finite gradient can be, but not
    negative, because the optimizer takes their square root.
    """
    for tensor in sharded.tensors(parts):
        if not tensor.is_floating_point():
            raise Lack(f"its {path} is of type {str(tensor.dtype).removeprefix('torch.')}")
        if not tensor.numel():
            continue
        least, most = (bound.item() for bound in tensor.aminmax())  # both are NaN if any value is
        if squared and least < 0:
            raise Lack(f"its {path} has values below zero")
        if not (least >= 0 if squared else math.isfinite(least) and math.isfinite(most)):
            raise Lack(f"its {path} has values that are infinite or not a number")


def _check_rest(content: dict[str, Any]) -> None:
    """Raise Lack unless the place in the data, random state and other parts can be loaded."""
    for name in ("epoch", "sample_in_epoch"):
        if part_at(content, int, "state", "dataset_state", "train", name) < 0:
            raise Lack(f"its place in the data is {content['state']['dataset_state']['train']}")
    # These decide the order of the rows.
    for name, least in (("shuffle_seed", 0), ("num_canonical_nodes", 1)):
        if part_at(content, int, "state", "dataset_state", "train", name) < least:
            raise Lack(
                f"its state.dataset_state.train.{name} is"
                f" {content['state']['dataset_state']['train'][name]}"
            )
    _check_random(part_at(content, list, "rng"), "rng")
    for pair in (
        part_at(content, list, "state", "algorithms") if "algorithms" in content["state"] else ()
    ):
        if not (isinstance(pair, tuple | list) and len(pair) == 2 and isinstance(pair[1], dict)):
            raise Lack("its state.algorithms are not names with a state each")
    for name, kind in (
        ("rank_zero_seed", int),
        ("run_name", str),
        ("schedulers", dict),
        ("scaler", dict),
        ("train_metrics", dict),
        ("eval_metrics", dict),
    ):
        if name in content["state"]:
            part_at(content, kind, "state", name)


def _check_place(state: dict[str, Any], needed: Needed) -> None:
    """Raise Lack unless the dataset's place in the data agrees with the clock.

    The settings of the dataset's row order must also be those that the checkpoint says it was
    trained with.
    """
    train, clock = state["dataset_state"]["train"], state["timestamp"]["Timestamp"]
    for name in ("epoch", "sample_in_epoch"):
        if train[name] != clock[name]:
            raise Lack(f"its clock's {name} is {clock[name]}, but its rows' is {train[name]}")
    order = state["callbacks"]["SameData"]["order"]
    for name, key in _LAYOUT.items():
        is_known = order.get(key) is not None
        if is_known and train[name] != order[key] and not needed.other_order:
            raise Lack(
                f"its rows have the {name} {train[name]}, and it was trained with {key}="
                f"{in_short(order[key])}; if that was changed on the way, set allow_data_change"
            )
    nodes = train.get("initial_physical_nodes")
    if nodes is not None and not (type(nodes) is int and 0 < nodes < 2**31):
        raise Lack(f"its state.dataset_state.train.initial_physical_nodes is {in_short(nodes)}")


def _check_random(ranks: list[Any], path: str) -> None:
    """Raise Lack unless each rank's random state can be loaded.

    It is loaded into generators that nothing else uses.
    """
    for state in ranks:
        try:
            random.Random().setstate(state["python"])
            np.random.RandomState().set_state(state["numpy"])
            torch.Generator().set_state(state["torch"])
        except Exception as error:  # the state is untrusted: loading it can raise anything
            raise Lack(f"its {path} is not a random state: {one_line(error)}") from None


def _check_callbacks(content: dict[str, Any]) -> None:
    """Raise Lack unless each callback in `_CALLBACKS` left a state that can be loaded."""
    for callback, parts in _CALLBACKS.items():
        for name, kind in parts.items():
            part_at(content, kind, "state", "callbacks", callback, name)
    callbacks = content["state"]["callbacks"]
    for name, kind in _MADE_FROM.items():
        part_at(callbacks["Schedule"]["made_from"], kind, name)
    # Absent from checkpoints up to 2026-11-29
    if callbacks["Schedule"]["made_from"].get("scheduler.t_max") is not None:
        part_at(callbacks["Schedule"]["made_from"], int, "scheduler.t_max")
    if "SameLoss" in callbacks:
        part_at(callbacks["SameLoss"], dict, "settings")
    if "LeftOut" in callbacks:
        for name in ("left_out", "seen"):
            part_at(callbacks["LeftOut"], int, name)
    step, num_used = (
        content["state"]["timestamp"]["Timestamp"]["batch"],
        callbacks["Schedule"]["num_used"],
    )
    if num_used != step:
        raise Lack(f"its clock is at step {step}, and its schedule at {num_used}")
    _check_random(callbacks["RandomState"]["rng"], "state.callbacks.RandomState.rng")
    for callback, state in callbacks.items():
        if not isinstance(state, dict):
            raise Lack(f"its state.callbacks.{callback} is a {type(state).__name__}")


def _averages(state: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the name and the averaged weights of each algorithm that keeps an average."""
    for name, kept in state.get("algorithms", ()):
        if name in ("EMA", "SWA") and kept.get("average") is not None:
            yield name, part_at(kept, dict, "average")


def _check_averages(state: dict[str, Any], weights: dict[str, Any], shapes: Shapes) -> None:
    """Raise Lack unless every average has the names and shapes of the weights that it averages."""
    tensors = {
        name: part["part"] if isinstance(part, dict) else part for name, part in weights.items()
    }
    averaged = {
        name: shapes[name] for name, tensor in tensors.items() if tensor.is_floating_point()
    }
    for algorithm, average in _averages(state):
        if {name: sharded.shape([tensor]) for name, tensor in average.items()} != averaged:
            raise Lack(f"its average of {algorithm} lacks the names and shapes of its weights")
