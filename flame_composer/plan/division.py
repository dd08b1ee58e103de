"""Rows and layers divided over devices: what that sends, and the smallest division that will do."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace

from transformers import PretrainedConfig

from flame_composer.config.plan import PlanConfig
from flame_composer.errors import InvalidField
from flame_composer.model.context import require_divisible
from flame_composer.plan.child import CannotCount, Child
from flame_composer.plan.figures import Division, Memory, Plan
from flame_composer.plan.memory import FILL, Size, device_memory, is_sharded, memory

Shape = tuple[int, int]  # parallelism.tensor, parallelism.context


def with_division(
    plan: Plan, config: PlanConfig, hf_config: PretrainedConfig, size: Size, child: Child
) -> Plan:
    """Return the plan with what there is to say of its division, of which `child` counts steps."""

    def of_a_row(other: PlanConfig) -> Memory | None:
        if plan.memory.counted:
            with suppress(CannotCount):
                return child.count(other, hf_config, 1)
        return memory(other, size, 1) if other.parallelism.tensor == 1 else None

    settings = config.parallelism
    is_whole, fits = settings.together == 1, plan.largest_microbatch_size is not None
    if is_whole and fits:
        return plan
    smallest = smallest_division(config, hf_config, fits=fits, of_a_row=of_a_row)
    sent = None
    if plan.memory.counted and not is_whole:
        with suppress(CannotCount):
            sent = child.count_sent(config, hf_config)
    division = Division(
        tensor=settings.tensor,
        context=settings.context,
        places=config.places,
        tokens_of_a_row=config.context_length // settings.context,
        sent=sent,
        smallest=None if smallest is None else {"tensor": smallest[0], "context": smallest[1]},
    )
    return replace(plan, division=division)


def smallest_division(
    config: PlanConfig,
    hf_config: PretrainedConfig,
    *,
    fits: bool,
    of_a_row: Callable[[PlanConfig], Memory | None],
) -> Shape | None:
    """Return over how few devices rows and layers can be divided so that a row fits, or None.

    `fits` says whether it does as configured. If so, rows are divided less, as long as it fits, and
    then layers. If not, rows are divided more, and only if that is of no use, layers. `of_a_row`
    returns what a step takes, or None if that is not known, as of layers that cannot be divided so.
    """
    there = FILL * device_memory(config)
    shape = config.parallelism.tensor, config.parallelism.context
    if not fits:
        for axis in (1, 0):
            for more in _more(config, hf_config, shape, axis):
                needed = of_a_row(_divided(config, more))
                if needed is None:
                    break
                if needed.total <= there:
                    return more
                if axis and needed.total - needed.activations - needed.logits > there:
                    break  # what is not divided along with rows
        return None
    for axis in (1, 0):
        for less in _less(config, hf_config, shape, axis):
            needed = of_a_row(_divided(config, less))
            if needed is None or needed.total > there:
                break
            shape = less
    return shape


def _more(
    config: PlanConfig, hf_config: PretrainedConfig, shape: Shape, axis: int
) -> Iterator[Shape]:
    number = 2 * shape[axis]
    most = config.devices * (config.nodes if axis else 1)  # layers, in a machine
    while number <= most:
        other = _at(shape, axis, number)
        if _is_valid(config, hf_config, other):
            yield other
        number *= 2


def _less(
    config: PlanConfig, hf_config: PretrainedConfig, shape: Shape, axis: int
) -> Iterator[Shape]:
    for number in range(shape[axis] - 1, 0, -1):
        other = _at(shape, axis, number)
        if shape[axis] % number == 0 and _is_valid(config, hf_config, other):
            yield other


def _at(shape: Shape, axis: int, number: int) -> Shape:
    return (shape[0], number) if axis else (number, shape[1])


def _divided(config: PlanConfig, shape: Shape) -> PlanConfig:
    tensor, context = shape
    parallelism = replace(config.parallelism, tensor=tensor, context=context)
    other = replace(config, parallelism=parallelism)
    # No more than a row at a time is divided
    return replace(other, microbatch_size=1, eval_batch_size=None) if context > 1 else other


def _is_valid(config: PlanConfig, hf_config: PretrainedConfig, shape: Shape) -> bool:
    """Return whether training would take a division."""
    other = _divided(config, shape)
    try:
        other.validate()
        if shape[1] > 1:
            require_divisible(hf_config)
    except InvalidField:
        return False
    fsdp = config.parallelism.fsdp
    if shape[0] == 1:
        return True
    has_shards = fsdp is not None and fsdp.sharding_strategy != "HYBRID_SHARD"
    return has_shards and is_sharded(config) and config.lora is None
