"""FSDP2: means of gradients and replicas on CPUs, rows of tensors, names of modules."""

from __future__ import annotations

import copy
import math
import typing
from typing import Any

import torch
from torch import nn
from torch.distributed import ReduceOp
from torch.distributed.fsdp._fully_shard import _fsdp_collectives, _fsdp_param_group
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset


def average_on_cpus() -> None:
    """Make FSDP2 divide gradients itself on CPUs, as torch does for fp16.

    Upstream: torch 2.7.0, `_fsdp_collectives._get_gradient_divide_factors`.
    Mends: it asks gloo for the mean (ReduceOp.AVG), and silently gets the sum. gloo is right in
    torch 2.15.
    """
    if torch.__version__ >= "2.15":  # compared as versions
        return
    given = _fsdp_collectives._get_gradient_divide_factors

    def divide_factors(
        shards: Any, replicas: Any, reduce_dtype: torch.dtype, device_type: str = "", *more: Any
    ) -> Any:
        answer = given(shards, replicas, reduce_dtype, device_type, *more)
        if device_type != "cpu":
            return answer
        ranks = math.prod(group.size() for group in (shards, replicas) if group is not None)
        # Later versions of torch also return how to reduce, in the two steps
        return 1.0, float(ranks), *(ReduceOp.SUM for _ in answer[2:])

    if given.__module__ == _fsdp_collectives.__name__:  # not done yet
        _fsdp_collectives._get_gradient_divide_factors = divide_factors  # type: ignore[assignment]


def replicate_on_cpus() -> None:
    """Make FSDP2 work with replicas on CPUs, where streams have no events.

    Upstream: torch 2.7.0, `_fsdp_param_group.foreach_reduce`, which post_backward calls.
    Mends: it keeps reduced gradients until an event has passed, and fails on CPUs, which have no
    events. torch 2.15 does without.
    """
    kept_with = typing.get_type_hints(_fsdp_param_group.AllReduceState)
    if type(None) in typing.get_args(kept_with["event"]):
        return
    given = _fsdp_param_group.foreach_reduce

    def reduced(*args: Any) -> Any:
        *before, kept, event, partial = given(*args)
        return (*before, kept if event is not None else None, event, partial)

    if given.__module__ == _fsdp_collectives.__name__:  # not done yet
        _fsdp_param_group.foreach_reduce = reduced  # type: ignore[assignment]


def name_modules_once(model: nn.Module) -> None:
    """Give every module of a model one name: others get a copy, if it holds no tensor.

    Upstream: mosaicml 0.32.1, `composer.distributed.prepare_distributed._check_duplicate_modules`.
    Mends: it refuses models in which an activation has two names, as in fla's RWKV-7.
    """
    seen: set[int] = set()
    for name, _ in list(model.named_modules(remove_duplicate=False)):
        module = model.get_submodule(name)
        holds_tensors = any(True for _ in (*module.parameters(), *module.buffers()))
        if id(module) in seen and not holds_tensors:
            module = copy.deepcopy(module)
            model.set_submodule(name, module)
        seen.add(id(module))


def first_row_of(tensor: DTensor) -> int:
    """Return the index of the first row of a sharded tensor that this rank holds.

    Upstream: torch 2.7.0, `torch.distributed.tensor._utils.compute_local_shape_and_global_offset`.
    Mends: DTensor has no public way to get this index.
    """
    _, offsets = compute_local_shape_and_global_offset(
        tensor.shape, tensor.device_mesh, tensor.placements
    )
    return offsets[0]


def part_of(tensor: DTensor) -> tuple[slice, ...]:
    """Return which part of a tensor this rank holds, as an index of the whole.

    Upstream: torch 2.7.0, `torch.distributed.tensor._utils.compute_local_shape_and_global_offset`.
    Mends: as `first_row_of`.
    """
    shape, offsets = compute_local_shape_and_global_offset(
        tensor.shape, tensor.device_mesh, tensor.placements
    )
    return tuple(slice(start, start + size) for start, size in zip(offsets, shape, strict=True))
