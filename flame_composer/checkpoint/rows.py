"""Tensors that are divided over two axes of ranks, as rows divided over all ranks.

Pieces of a checkpoint hold rows, and those of a tensor-parallel run are what FSDP2 alone would save
on as many ranks. So any number of ranks reads them, divided in any way.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from composer.utils import dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor import empty as empty_dtensor

from flame_composer.upstream.fsdp import first_row_of, part_of


@torch.no_grad()
def own_rows(tensor: DTensor) -> tuple[int, torch.Tensor]:
    """Return this rank's rows of a tensor, after the number of the first; all ranks must call it.

    Meanwhile the rank holds the whole tensor.
    """
    rows = rows_of(tensor)
    first, part = first_row_of(rows), rows.to_local()
    part.copy_(tensor.full_tensor()[first : first + len(part)])
    return first, part


@torch.no_grad()
def rows_of(tensor: DTensor) -> DTensor:
    """Return a tensor of the same shape whose rows are divided over all ranks, without values."""
    mesh = _all_ranks(tensor.device_mesh.device_type, dist.get_world_size())
    return empty_dtensor(*tensor.shape, dtype=tensor.dtype, device_mesh=mesh, placements=[Shard(0)])


@torch.no_grad()
def fill(tensor: DTensor, rows: DTensor) -> None:
    """Fill this rank's part of a tensor from one as `rows_of` returns; all ranks must call it."""
    whole: Any = rows.full_tensor()
    tensor.to_local().copy_(whole[part_of(tensor)])


@functools.cache
def _all_ranks(device: str, number: int) -> DeviceMesh:
    return init_device_mesh(device, (number,))
