"""mosaicml-streaming 0.13.0: shared memory and file locks in a folder of the job's own."""

from __future__ import annotations

import contextlib
import mmap
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import streaming.base.dataset
import streaming.base.shared.array
from composer.utils import dist
from streaming.base.world import World

from flame_composer.errors import ConfigError
from flame_composer.storage.locks import JobFolder


class Memory:
    """Memory that a job's processes share through a file, in place of streaming's SharedMemory.

    Streaming 0.13.0 uses names in /dev/shm that can be guessed, so that another user can take them
    first. Containers may have little space there, or no such folder, and whatever a killed job
    leaves there stays.
    """

    def __init__(
        self,
        name: str,
        create: bool | None = None,
        size: int = 0,
        auto_cleanup: bool = True,  # noqa: ARG002
    ):
        """Open the file `name` of `size` bytes and map it into memory.

        `create` is as in streaming: the file is made anew (True), must exist (False) or may exist
        (None).
        """
        self.name = name
        if create:
            Path(name).unlink(missing_ok=True)
        new = os.O_CREAT if create is not False else 0
        file = os.open(name, os.O_RDWR | new | os.O_CLOEXEC, 0o600)
        try:
            if create is not False:
                # A full disk is an error here; later it would kill the process.
                os.posix_fallocate(file, 0, size)
            self.mapped = mmap.mmap(file, 0)
        except OSError as error:
            raise ConfigError(
                f"{name}: cannot be made: {error.strerror}; set TMPDIR to a folder on a disk with "
                "space"
            ) from None
        finally:
            os.close(file)
        self.buf = memoryview(self.mapped)
        self.is_new = bool(create)

    def cleanup(self) -> None:
        if self.is_new:
            Path(self.name).unlink(missing_ok=True)


def path_in(folder: str, name: str) -> str:
    """Return the path of shared memory or a file lock, in place of streaming's `_get_path`."""
    return os.path.join(folder, name)


def claim_shared_memory(
    _streams_local: Any, _streams_remote: Any, world: World
) -> tuple[str, JobFolder]:
    """Return the folder of this dataset's shared memory, the same for all ranks of a machine.

    It replaces streaming's `get_shm_prefix`, which uses the first free number, so that two jobs can
    choose the same one at once. Streaming also keeps open everything that it looked at, and never
    removes what killed jobs left, so that after a few hundred of them no file can be opened.
    """
    folder = JobFolder() if world.is_local_leader else None
    path = dist.all_gather_object(str(folder.path) if folder else "")[
        dist.get_global_rank() - dist.get_local_rank()
    ]
    return path, folder or JobFolder(path)


@contextlib.contextmanager
def own_shared_memory() -> Iterator[None]:
    """Make StreamingDataset keep its shared memory and file locks in the job's own folder.

    Upstream: mosaicml-streaming 0.13.0, `get_shm_prefix`, `_get_path` and `SharedMemory` of
    streaming.base.dataset.
    Mends: shared memory and locks have small numbers for names in /dev/shm and /tmp. Other users
    can take them, two jobs can take the same one at once, and killed jobs leave them for good.
    """
    dataset, array = streaming.base.dataset, streaming.base.shared.array
    ours = [
        (dataset, "get_shm_prefix", claim_shared_memory),
        (dataset, "_get_path", path_in),
        (dataset, "SharedMemory", Memory),
        (array, "SharedMemory", Memory),
    ]
    upstream = [(module, name, getattr(module, name)) for module, name, _ in ours]
    try:
        for module, name, value in ours:
            setattr(module, name, value)
        yield
    finally:
        for module, name, value in upstream:
            setattr(module, name, value)
