"""Loading of a checkpoint in pieces into a run's state, of which every rank reads its own part."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from composer.core import State
from composer.utils import dist
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.tensor import DTensor

from flame_composer.agree import agreed
from flame_composer.checkpoint.ranges import read_rows
from flame_composer.checkpoint.rows import fill, rows_of
from flame_composer.checkpoint.sharded import Part, Pieces
from flame_composer.errors import DataError
from flame_composer.model.tensor import is_split


def load(state: State, pieces: Pieces, folder: Path) -> None:
    """Load a checkpoint into `state`, which may be sharded or not. Every rank must call this.

    Each rank reads its own rows of the weights and of the optimizer's state, from pieces in the
    local folder `folder` or else where they are. Of ranks that hold the same rows, as replicas do,
    the first one reads them for all. Raise DataError, on all ranks, if the pieces are of another
    model.
    """
    with _sharded(state):
        # The current state is the template: its tensors are filled in place, all else is replaced.
        there = {"model": state.get_model_state_dict(), "optimizers": state.get_optim_state_dict()}
    try:
        tensors: dict[str, torch.Tensor] = {}
        there = _filled(there, pieces.template, (), tensors)
        _read(tensors, pieces, folder)
        (optimizer_state,) = there["optimizers"].values()
        # A checkpoint of adapters lacks the base's weights.
        is_whole = getattr(state.model, "adapter", None) is None
        set_model_state_dict(state.model, there["model"], options=StateDictOptions(strict=is_whole))
        set_optimizer_state_dict(
            state.model, state.optimizers[0], optimizer_state, options=StateDictOptions(strict=True)
        )
    except (KeyError, IndexError, TypeError, ValueError, RuntimeError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"the checkpoint's pieces are not those of this model: {error}") from None


@contextlib.contextmanager
def _sharded(state: State) -> Iterator[None]:
    """Make Composer's state dicts contain only this rank's part of each tensor, in the body."""
    if state.fsdp_config is None:
        yield
        return
    state.fsdp_config.state_dict_type = "sharded"
    try:
        yield
    finally:
        state.fsdp_config.state_dict_type = "full"


def _filled(
    there: Any, template: Any, path: tuple[str, ...], tensors: dict[str, torch.Tensor]
) -> Any:
    """Return `there` with all but its divided tensors replaced by what is in the template.

    Those tensors are added to `tensors`, by their paths.
    """
    if isinstance(template, Part):
        if not isinstance(there, torch.Tensor) or tuple(there.shape) != template.shape:
            raise TypeError(
                f"a tensor of shape {list(template.shape)} where"
                f" {list(getattr(there, 'shape', []))} is needed"
            )
        tensors[".".join(path)] = there
        return there
    if isinstance(there, dict):
        return {
            key: _filled(value, template[key], (*path, str(key)), tensors)
            for key, value in there.items()
        }
    if isinstance(there, list):
        return [
            _filled(value, template[number], (*path, str(number)), tensors)
            for number, value in enumerate(there)
        ]
    return template


def _read(tensors: dict[str, torch.Tensor], pieces: Pieces, folder: Path) -> None:
    """Fill the tensors: what this rank is the first to hold from the pieces, all else from ranks.

    If a rank cannot read its rows, all ranks raise its error.
    """
    split: dict[str, Any] = {name: each for name, each in tensors.items() if is_split(each)}
    rows = {name: rows_of(tensor) for name, tensor in split.items()}
    tensors = {**tensors, **rows}
    sources = {name: _source_of(tensor) for name, tensor in tensors.items()}
    rank = dist.get_global_rank()
    own = {name: tensor for name, tensor in tensors.items() if sources[name].rank == rank}
    agreed(dist.all_gather_object, partial(read_rows, own, pieces, folder))
    for name, (source, group, is_alone) in sources.items():
        if not is_alone:
            tensor = tensors[name]
            mine = tensor.to_local() if isinstance(tensor, DTensor) else tensor
            if mine.numel():
                dist.broadcast(mine.detach(), source, group)
    for name, tensor in split.items():
        fill(tensor, rows[name])


class _Source(NamedTuple):
    """The rank that reads a tensor's rows for all ranks of a group, which hold the same rows."""

    rank: int
    group: Any
    is_alone: bool


def _source_of(tensor: torch.Tensor) -> _Source:
    """Return which rank reads the rows of a tensor that this rank holds."""
    if not isinstance(tensor, DTensor):
        return _Source(0, None, dist.get_world_size() == 1)
    if tensor.device_mesh.ndim == 1:
        return _Source(dist.get_global_rank(), None, is_alone=True)
    group = tensor.device_mesh.get_group(0)
    first = torch.distributed.get_global_rank(group, 0)
    return _Source(first, group, is_alone=torch.distributed.get_world_size(group) == 1)
