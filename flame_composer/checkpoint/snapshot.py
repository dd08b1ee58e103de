"""Copies of a run's state in host memory, so that training can go on while they are written."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch

from flame_composer.errors import TrainingError, one_line
from flame_composer.quantities import format_bytes

SLAB = 1 << 30  # bytes of host memory that are allocated at once; torch rounds them up to 2^n
ALIGNMENT = 512  # bytes; for the GPU's copy engines and the CPU's vectors


class HostMemory:
    """Host memory for one copy of a state, kept from one copy to the next.

    Memory that a process touches for the first time costs several times what copying into it does,
    and pinning it even more.
    """

    def __init__(self, *, pins: bool = False):
        """Pin the memory of tensors on a GPU if `pins`: copies run at the bus's full speed then."""
        self.pins = pins
        self._sizes: list[int] = []
        self._pinned = False
        self._places: list[torch.Tensor] = []  # bytes, by tensor

    @torch.no_grad()
    def copy(self, tree: Any, constant: Any = None) -> Any:
        """Return a copy of a tree of dicts, lists and tuples that nothing else refers to.

        Its tensors lie in this memory, so the copy made before must no longer be in use. Tensors
        that share their values in the tree do so in the copy. All that is no tensor is copied as
        `copy.deepcopy` does, except for the part `constant` of the tree, which is never changed and
        may be large.
        """
        found = {id(tensor): tensor for tensor in _tensors(tree, constant)}
        distinct = {_values_of(tensor): tensor for tensor in found.values()}
        places = self._take(
            [tensor.numel() * tensor.element_size() for tensor in distinct.values()],
            pinned=self.pins and any(tensor.is_cuda for tensor in distinct.values()),
        )
        copies = {}
        for (values, tensor), place in zip(distinct.items(), places, strict=True):
            copies[values] = _laid_out_as(tensor, place)
            copies[values].copy_(tensor, non_blocking=self._pinned)
        if self._pinned:
            torch.cuda.current_stream().synchronize()  # type: ignore[no-untyped-call]
        # deepcopy takes what it finds in its memo for copies that it has made.
        known = {number: copies[_values_of(tensor)] for number, tensor in found.items()}
        return copy.deepcopy(tree, {**known, id(constant): constant})

    @property
    def size(self) -> int:
        """The bytes of the copy that was made last."""
        return sum(self._sizes)

    def _take(self, sizes: list[int], *, pinned: bool) -> list[torch.Tensor]:
        """Return room for tensors of these sizes in bytes, the same as before where they fit."""
        if sizes != self._sizes or pinned != self._pinned:
            self._places = []  # before more is allocated
            try:
                self._places = list(_carve(sizes, pinned=pinned))
            except RuntimeError as error:
                raise TrainingError(
                    f"no room for a copy of the state, {format_bytes(sum(sizes))} of host memory:"
                    f" {one_line(error)}; set save_async=false, which makes none"
                ) from None
            self._sizes, self._pinned = sizes, pinned
        return self._places


def _tensors(tree: Any, left_out: Any) -> Iterator[torch.Tensor]:
    """Yield all tensors in a tree of dicts, lists and tuples, but for a part of it."""
    if isinstance(tree, torch.Tensor):
        yield tree
    elif isinstance(tree, dict | list | tuple) and tree is not left_out:
        for value in tree.values() if isinstance(tree, dict) else tree:
            yield from _tensors(value, left_out)


def _values_of(tensor: torch.Tensor) -> tuple[Any, ...]:
    """Return a key that is the same for two tensors if they are views of the same values."""
    # Where a tensor has no values, its address says nothing.
    where = tensor.data_ptr() if tensor.numel() else id(tensor)
    return tensor.device, where, tensor.dtype, tensor.shape, tensor.stride()


def _laid_out_as(tensor: torch.Tensor, place: torch.Tensor) -> torch.Tensor:
    """Return a tensor with the shape, type and order in memory of `tensor` in the bytes `place`."""
    strides = torch.empty_like(tensor, device="meta").stride()
    return place.view(tensor.dtype).as_strided(tensor.shape, strides)


def _carve(sizes: list[int], *, pinned: bool) -> Iterator[torch.Tensor]:
    """Yield tensors of bytes of these sizes, each with a storage of its own, out of a few slabs.

    torch rounds pinned memory up to a power of two, which would waste up to half of it for tensors
    that are allocated one by one.
    """
    left = sum(map(_aligned, sizes))
    slab, used = torch.empty(0, dtype=torch.uint8).numpy(), 0
    for size in sizes:
        if not size:
            yield torch.empty(0, dtype=torch.uint8)
            continue
        if used + size > len(slab):
            length = max(size, min(left, SLAB))
            slab, used = torch.empty(length, dtype=torch.uint8, pin_memory=pinned).numpy(), 0
        # Not a slice: torch.save would write the whole slab.
        yield torch.frombuffer(slab, dtype=torch.uint8, count=size, offset=used)
        used += _aligned(size)
        left -= _aligned(size)


def _aligned(size: int) -> int:
    """Return the bytes that a tensor of `size` bytes takes in a slab."""
    return -(-size // ALIGNMENT) * ALIGNMENT
