"""The files of checkpoints: written, forced to disk, uploaded and given their names."""

from __future__ import annotations

import errno
import os
import re
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from composer.utils import dist

from flame_composer.agree import Gather, agreed
from flame_composer.checkpoint import sharded
from flame_composer.checkpoint.keep import KeptCheckpoints
from flame_composer.checkpoint.sharded import Share
from flame_composer.checkpoint.upload import upload_file
from flame_composer.errors import GOES_ON, TrainingError
from flame_composer.storage import files
from flame_composer.storage.filesystems import is_url
from flame_composer.storage.folders import flush
from flame_composer.storage.local import create
from flame_composer.storage.locks import is_own_folder

# The errors of torch (2.7) for a file that it cannot write.
_CANNOT_WRITE = re.compile(
    "PytorchStreamWriter|Parent directory .* does not exist|open file failed"
)


class CheckpointFiles:
    """The files of a run's checkpoints in a folder, local or in an object store.

    A file is written under a temporary name, forced to disk and renamed. An upload to an object
    store appears there only once it is complete. A checkpoint in pieces is a folder; it gets its
    name once all pieces are in it, and in an object store its head (`sharded.HEAD`) is uploaded
    last. So a checkpoint is whole or not there, whatever happens in between.
    """

    def __init__(
        self, folder: str, staging: Path, kept: KeptCheckpoints, train_log: Path | None = None
    ):
        """Write checkpoints to `folder`, and what is unfinished to the local folder `staging`.

        `kept` deletes old checkpoints once a new one is there. `train_log` is a file that is forced
        to disk before a checkpoint gets its name.
        """
        self.folder = folder
        self.staging = staging
        self.kept = kept
        self.train_log = train_log

    def write(self, share: Share, place: str, gather: Gather) -> None:
        """Write the checkpoint `place`, of which this rank has a share, and delete old ones.

        Every rank must call this, and all return once the checkpoint is whole. If a rank cannot do
        its part, all ranks raise its error. `gather` exchanges what they have to say.
        """
        temporary = self.staging / f"unfinished-{place.rpartition('/')[2]}"
        if share.pieces:
            self._write_pieces(share, temporary, place, gather)
        else:
            agreed(gather, lambda: self._write_file(share, temporary, place))

    def _write_file(self, share: Share, temporary: Path, place: str) -> None:
        """Write a checkpoint in one file, on the first rank."""
        if share.content is None:
            return
        with saving(place):
            self._flush_log()
            self.staging.mkdir(parents=True, exist_ok=True)
            with create(temporary) as file:
                torch.save(share.content, file)
                file.flush()
                self.kept.make_way(place)
                # Others may have put another file under its name meanwhile.
                if not os.path.samestat(os.lstat(temporary), os.fstat(file.fileno())):
                    raise OSError(
                        errno.EEXIST, f"somebody else has put another file at {temporary}"
                    )
                if is_url(place):
                    upload_file(temporary, place)
                    temporary.unlink()
                else:
                    os.fsync(file.fileno())
                    os.replace(temporary, place)
                    flush(Path(self.folder))
        self._keep(place)

    def _write_pieces(self, share: Share, temporary: Path, place: str, gather: Gather) -> None:
        """Write a checkpoint in pieces."""
        head = files.join(place, sharded.HEAD)
        written: list[Path] = []

        def write_piece() -> tuple[int, str] | None:
            with saving(place):
                temporary.mkdir(parents=True, exist_ok=True)
                if not is_own_folder(temporary):
                    raise OSError(errno.EEXIST, f"{temporary} is a link, or another user's")
                file = sharded.write_piece(share, temporary)
                if file is None:
                    return None
                written.append(file)
                return share.number, sharded.fingerprint(file)

        fingerprints = dict(each for each in agreed(gather, write_piece) if each is not None)

        def finish() -> None:
            if share.content is None:
                return
            with saving(place):
                self._flush_log()
                if not is_url(place):
                    _require_all(temporary, fingerprints, place)
                sharded.write_head(share, temporary, fingerprints)
                self.kept.make_way(place)
                if is_url(place):
                    files.delete(head)  # still there if not renamed
                else:
                    flush(temporary)
                    os.rename(temporary, place)
                    flush(Path(self.folder))
            if not is_url(place):
                self._keep(place)

        agreed(gather, finish)
        if is_url(place):
            self._upload_pieces(share, temporary, written, place, gather)

    def _upload_pieces(
        self, share: Share, temporary: Path, written: list[Path], place: str, gather: Gather
    ) -> None:
        """Upload a checkpoint in pieces, its head last, and delete the local files."""

        def upload() -> None:
            with saving(place):
                for file in written:
                    upload_file(file, files.join(place, file.name))

        def upload_head() -> None:
            if share.content is not None:
                with saving(place):
                    upload_file(temporary / sharded.HEAD, files.join(place, sharded.HEAD))
                self._keep(place)

        def clear() -> None:
            if dist.get_local_rank() == 0:
                # Machines that share this folder clear it at the same time
                shutil.rmtree(temporary, ignore_errors=True)

        for step in (upload, upload_head, clear):
            agreed(gather, step)

    def _flush_log(self) -> None:
        """Force the log to disk.

        A restart must find the row of every step up to its checkpoint, even after a power failure.
        """
        if self.train_log is not None and self.train_log.exists():
            flush(self.train_log)
            flush(self.train_log.parent)

    def _keep(self, place: str) -> None:
        """Count a checkpoint as whole, and delete those that are no longer kept because of it."""
        self.kept.note(place, True)
        self.kept.delete_old()


def _require_all(folder: Path, numbers: Iterable[int], place: str) -> None:
    """Raise TrainingError unless the pieces of all ranks are in this folder."""
    for name in map(sharded.name_of, numbers):
        if not (folder / name).exists():
            raise TrainingError(
                f"{place}: cannot be saved: {name} is on another machine; save_folder must be one"
                " that all machines share, or in an object store; or set"
                " parallelism.fsdp.state_dict_type=full"
            )


@contextmanager
def saving(place: str) -> Iterator[None]:
    """Raise TrainingError, naming the checkpoint, if the body cannot write it."""
    try:
        yield
    except (OSError, RuntimeError) as error:
        if isinstance(error, TrainingError) or not (
            isinstance(error, OSError) or _CANNOT_WRITE.search(str(error))
        ):
            raise
        disk = next(
            (each for each in (error, error.__context__) if isinstance(each, OSError)), error
        )
        reason = disk.strerror if isinstance(disk, OSError) else "is the disk full?"
        raise TrainingError(f"{place}: cannot be saved: {reason}; {GOES_ON}") from None
