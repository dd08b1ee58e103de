"""What the processes of a run on one machine share."""

from __future__ import annotations

import dataclasses
import mmap
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from composer.utils import dist
from numpy.typing import DTypeLike, NDArray

from flame_composer.agree import agreed
from flame_composer.dataset.open import Dataset
from flame_composer.dataset.table import ShardTable
from flame_composer.errors import ConfigError
from flame_composer.storage.locks import JobFolder


class Machine(NamedTuple):
    """One of the machines of a run, which all have the same number of ranks."""

    number: int
    num_machines: int
    ranks: int  # of this machine
    together: int = 1  # consecutive ranks that read the same rows

    @property
    def places(self) -> int:
        """The number of ranks of all machines, those that read the same rows counted once."""
        # A sweep checks its trials' data in one process, which stands for all of their ranks
        return max(1, self.num_machines * self.ranks // self.together)

    def place_of(self, local_rank: int) -> int:
        """Return the place of a rank's first row in a global batch.

        The rank's other rows are every `places`-th one after it. Canonical nodes take turns in the
        order, so if there are as many as machines, each machine reads only shards of its own, if
        no ranks of different machines read the same rows.
        """
        if self.ranks % self.together:
            return (self.number * self.ranks + local_rank) // self.together
        return local_rank // self.together * self.num_machines + self.number


def this_machine(together: int = 1) -> Machine:
    """Return the machine that this rank is on, where `together` ranks read the same rows."""
    ranks = dist.get_local_world_size()
    return Machine(dist.get_node_rank(), dist.get_world_size() // ranks, ranks, together)


def enter_job_folder() -> JobFolder:
    """Return a new folder, the same one for all ranks of a machine, which must all call this."""
    folder = JobFolder() if dist.get_local_rank() == 0 else None
    path = dist.all_gather_object(str(folder.path) if folder else "")[
        dist.get_global_rank() - dist.get_local_rank()
    ]
    return folder or JobFolder(path)


def opened_once(open_one: Callable[[], Dataset]) -> Dataset:
    """Return the dataset that `open_one` returns, which is called by one rank of each machine.

    The others map the list of shards into memory that this rank wrote. Every rank must call this;
    if one raises, all do.
    """
    if dist.get_world_size() == 1:
        return open_one()
    folder = enter_job_folder()

    def open_for_all() -> Dataset | None:
        if dist.get_local_rank() != 0:
            return None
        dataset = open_one()
        dataset.files.save(folder.path)
        return dataclasses.replace(dataset, files=ShardTable.of([]))

    leaders = agreed(dist.all_gather_object, open_for_all)
    found = leaders[dist.get_global_rank() - dist.get_local_rank()]
    assert found is not None
    files = ShardTable.load(folder.path)
    dist.barrier()  # the folder goes when its maker lets go of it
    return dataclasses.replace(found, files=files)


def shared_array(path: Path, dtype: DTypeLike, shape: tuple[int, ...]) -> NDArray[Any]:
    """Return an array in the file at `path`, of zeros if that is new, which processes share.

    Raises ConfigError if there is no space for it.
    """
    size = max(1, int(np.prod(shape)) * np.dtype(dtype).itemsize)
    file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        # A full disk is an error here; later it would kill the process.
        os.posix_fallocate(file, 0, size)
        mapped = mmap.mmap(file, size)
    except OSError as error:
        raise ConfigError(
            f"{path}: cannot be made: {error.strerror}; set TMPDIR to a folder on a disk with space"
        ) from None
    finally:
        os.close(file)
    return np.frombuffer(mapped, dtype, int(np.prod(shape))).reshape(shape)
