"""mosaicml-streaming 0.13.0: its shared memory and file locks, in a folder of the job's own."""

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
    """Memory that the processes of a job share, by a file in its folder, in place of streaming's
    SharedMemory (0.13.0).

    Upstream takes names in /dev/shm that can be guessed. Another user can take them first, in
    containers there may be next to no room or no such place at all, and what killed jobs leave
    stays.
    """

    def __init__(
        self,
        name: str,
        create: bool | None = None,
        size: int = 0,
        auto_cleanup: bool = True,  # noqa: ARG002
    ):
        """`name` is the file's path. `create` as upstream: it must not be there (True), must be
        (False), or may be (None).
        """
        self.name = name
        if create:
            Path(name).unlink(missing_ok=True)
        new = os.O_CREAT if create is not False else 0
        file = os.open(name, os.O_RDWR | new | os.O_CLOEXEC, 0o600)
        try:
            if create is not False:
                # A full disk is an error here, and would be a dead process later
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
    """In place of streaming's _get_path: shared memory and file locks are files in the job's
    folder.
    """
    return os.path.join(folder, name)


def claim_shared_memory(
    _streams_local: Any, _streams_remote: Any, world: World
) -> tuple[str, JobFolder]:
    """In place of streaming's get_shm_prefix: the folder of this dataset's shared memory, the same
    for all ranks of a machine.

    Upstream takes the first number that nothing has, which two jobs can do at once; it keeps all
    that it has looked at open, and never removes what killed jobs left, so that after some hundred
    of them no file can be opened any more.
    """
    folder = JobFolder() if world.is_local_leader else None
    path = dist.all_gather_object(str(folder.path) if folder else "")[
        dist.get_global_rank() - dist.get_local_rank()
    ]
    return path, folder or JobFolder(path)


@contextlib.contextmanager
def own_shared_memory() -> Iterator[None]:
    """Have StreamingDataset's shared memory and file locks be files in the job's own folder.

    Upstream: mosaicml-streaming 0.13.0, `get_shm_prefix`, `_get_path` and `SharedMemory` of
    streaming.base.dataset.
    Mends: their names are small numbers in /dev/shm and /tmp, which other users can take, two jobs
    can take at once, and killed jobs leave for good.
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
