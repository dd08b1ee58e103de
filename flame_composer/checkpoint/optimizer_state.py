"""Checks of a checkpoint's optimizer state: moments, steps and settings."""

from __future__ import annotations

import math
from typing import Any

import torch

from flame_composer.checkpoint import sharded
from flame_composer.checkpoint.parts import NUMBER, PLAIN, Lack, Needed, Other, Shapes, part_at
from flame_composer.errors import DataError

# Settings of an optimizer that change how a step is computed, but not its result
_FREE = ("foreach", "fused")
# The factors of muP in a group that names none
_NO_FACTORS = {"lr_factor": 1.0, "gradient_factor": 1.0}
# The keys of the configuration that settings come from
_KEYS = {
    "betas": "optimizer.betas",
    "eps": "optimizer.eps",
    "weight_decay": "optimizer.weight_decay or optimizer.decay",
    "momentum": "optimizer.momentum",
    "update_scale": "optimizer.update_scale",
    "lr_factor": "model.mup_base_width or optimizer.adamw_lr_ratio",
    "gradient_factor": "model.mup_base_width",
}


def check_optimizer(
    optimizers: list[Any], shapes: Shapes, needed: Needed, *, all_here: bool = True
) -> None:
    """Raise Lack or Other unless this run can load the optimizer's state.

    Without `all_here`, other ranks look at the state in other pieces.
    """
    found = sorted(map(str, optimizers[0]))
    if not found:
        raise Lack("it holds no optimizer's state")
    if needed.optimizer not in found:
        raise Other(f"its optimizer is {', '.join(found)[:100]}, and this run's {needed.optimizer}")
    path = f"optimizers.{needed.optimizer}"
    states = [part_at(each, dict, needed.optimizer, "state") for each in optimizers]
    grouped: dict[str, None] = {}
    for group in part_at(optimizers[0], list, needed.optimizer, "param_groups"):
        _check_settings(group, shapes, needed)
        grouped |= dict.fromkeys(part_at(group, list, "params"))
    for names in needed.trained:
        name = next((name for name in names if name in states[0] and name in grouped), None)
        if name is None:
            raise Lack(f"it has no {path}.state.{names[0]}")
        for moment in needed.moments(name):
            parts = [
                part_at(state, dict, name)[moment]
                for state in states
                if moment in part_at(state, dict, name)
            ]
            shape = sharded.shape(parts, all_here=all_here) if len(parts) == len(states) else None
            if shape != shapes[name]:
                raise Lack(f"its {path}.state.{name}.{moment} is not of the shape of its weights")
        for state in states:
            if "step" not in state[name]:
                raise Lack(f"it has no {path}.state.{name}.step")
            # At step -1, the next update would divide by zero.
            if not 0 <= _number(state[name]["step"], f"{path}.state.{name}.step") < 2**53:
                raise Lack(f"its {path}.state.{name}.step is {state[name]['step']}")


def _number(value: Any, path: str) -> float:
    """Return a number, or a tensor without dimensions, as a float; raise Lack for all else."""
    is_tensor = isinstance(value, torch.Tensor) and sharded.shape([value]) == ()
    number = value.item() if is_tensor else value
    if isinstance(number, bool) or not isinstance(number, NUMBER):
        raise Lack(f"its {path} is {in_short(value)}")
    return number


def in_short(value: Any) -> str:
    """Return a value as text for an error, or its type if it is not a plain value."""
    return f"{value!a}"[:100] if isinstance(value, PLAIN) else f"a {type(value).__name__}"


def check_steps(state: dict[str, Any], optimizers: list[Any], needed: Needed) -> None:
    """Raise Lack unless the optimizer's step counts agree with one another and with the clock.

    A weight's count must be the same in all pieces, and the same for all weights unless some may
    have had no gradient in a step. No count may exceed the clock's, and a weight whose count is 0
    must have no moments.
    """
    path = f"optimizers.{needed.optimizer}.state"
    states = [each[needed.optimizer]["state"] for each in optimizers]
    names = [next(name for name in each if name in states[0]) for each in needed.trained]
    counted = [each[name]["step"] for name in names for each in states]
    if len({(type(step), getattr(step, "dtype", None)) for step in counted}) > 1:
        raise Lack(f"its {path} have steps of several types")
    most = max(map(float, counted), default=0)
    # Checkpoints of earlier versions do not say whether all weights had a gradient in every step.
    callbacks = state.get("callbacks")
    gradients = callbacks.get("Gradients") if isinstance(callbacks, dict) else None
    may_lag = not isinstance(gradients, dict) or gradients.get("passed_over") is not False
    batch = state["timestamp"]["Timestamp"]["batch"]
    for name in names:
        step, *others = (float(each[name]["step"]) for each in states)
        if any(other != step for other in others):
            raise Lack(f"its pieces are not of the same {path}.{name}.step")
        if step > batch or not step.is_integer():
            raise Lack(f"its clock is at step {batch}, and its {path}.{name}.step at {step:g}")
        if step < most <= batch and not may_lag:
            raise Lack(f"its {path}.{name}.step is {step:g}, and that of other weights {most:g}")
        if step == 0 and any(
            tensor.count_nonzero()
            for tensor in sharded.tensors([each[name][needed.moments(name)[0]] for each in states])
        ):
            raise Lack(f"its {path}.{name}.step is 0, and there are moments")


def check_pieces(content: dict[str, Any], place: str, *, may_be_behind: bool) -> str | None:
    """Raise DataError if the pieces of a checkpoint are of another step than its head.

    Newer checkpoints are not checked here, because their head has the fingerprints of the pieces.
    If the pieces are behind the head, and `may_be_behind` says that the optimizer may have skipped
    steps, return a line that tells so. Return None if there is nothing to tell.
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
    """Return the largest step count of any weight, or None if the optimizers have no state."""
    states = [state for optimizer in optimizers.values() for state in optimizer["state"].values()]
    return max((int(state["step"]) for state in states), default=None)


def _check_settings(group: Any, shapes: Shapes, needed: Needed) -> None:
    """Raise Lack or Other unless a parameter group of the optimizer has this run's settings."""
    path = f"optimizers.{needed.optimizer}.param_groups"
    group = {**_NO_FACTORS, **group} if isinstance(group, dict) else group
    for name in part_at(group, list, "params"):
        if name not in shapes:
            raise Lack(f"its {path} name {str(name)[:100]!a}, which it has no weights of")
        if name not in needed.settings:
            raise Lack(f"its {path} name {name!a}, which is not trained")
        for setting, value in {**_NO_FACTORS, **needed.settings[name]}.items():
            if setting not in group and value is not False:
                raise Lack(f"its {path} have no {setting}")
            found = group.get(setting, False)
            if (tuple(found) if isinstance(found, list) else found) != value:
                raise Other(
                    f"it was trained with another {_KEYS.get(setting, setting)}: its optimizer has"
                    f" {setting}={str(found)[:100]} for {name}, and this run's {setting}={value}"
                )
    for setting, value in needed.kinds.items():
        if setting in group and not _is_like(group[setting], value, is_free=setting in _FREE):
            raise Lack(f"its {path} have {setting}={in_short(group[setting])}")


def _is_like(found: Any, value: Any, *, is_free: bool) -> bool:
    """Return whether the setting `found` may replace `value`.

    A number may replace another number. A flag or None may replace only itself, unless `is_free`.
    """
    if is_free:
        return found is None or isinstance(found, bool)
    if value is None or isinstance(value, bool):
        return found is value
    return isinstance(found, NUMBER) and not isinstance(found, bool) and math.isfinite(found)
