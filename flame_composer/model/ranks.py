"""The ranks of a run, and how they divide a model and its rows among themselves."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch.distributed
from composer.utils import dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from flame_composer.config.parallelism import ParallelismConfig


class Ranks(NamedTuple):
    """How many ranks work on the same rows, which are consecutive ranks.

    Of these, `tensor` consecutive ones hold parts of the same layers, and compute on the same
    tokens; `context` sets of them hold consecutive parts of every row's tokens.
    """

    tensor: int = 1
    context: int = 1

    @property
    def together(self) -> int:
        """The number of ranks that work on the same rows."""
        return self.tensor * self.context

    @property
    def places(self) -> int:
        """The number of such groups of ranks, which work on different rows."""
        return max(1, dist.get_world_size() // self.together)

    @property
    def place(self) -> int:
        """The number of this rank's group."""
        return dist.get_global_rank() // self.together

    @property
    def part(self) -> int:
        """The number of this rank's part of every row's tokens."""
        return dist.get_global_rank() // self.tensor % self.context

    @property
    def counts_rows(self) -> bool:
        """Whether this rank is the one of its group that counts rows, which all of them have."""
        return dist.get_global_rank() % self.together == 0

    @property
    def counts_tokens(self) -> bool:
        """Whether this rank is the one that counts tokens of those that compute on the same."""
        return dist.get_global_rank() % self.tensor == 0

    def mesh(self, device: str) -> DeviceMesh:
        """Return all ranks as a mesh of places x context x tensor, with these names.

        Every rank must call it, the first time: the groups of ranks meet.
        """
        return _mesh(device, self, torch.distributed.group.WORLD)


ALL_APART = Ranks()  # every rank has rows of its own


def ranks_of(config: ParallelismConfig) -> Ranks:
    """Return how a run with these settings divides its ranks."""
    return Ranks(config.tensor, config.context)


@functools.cache
def _mesh(device: str, ranks: Ranks, _: Any) -> DeviceMesh:
    """Return the mesh of the process group that is there, which is one of the keys."""
    shape = (ranks.places, ranks.context, ranks.tensor)
    return init_device_mesh(device, shape, mesh_dim_names=("places", "context", "tensor"))
