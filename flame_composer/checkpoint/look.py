"""A look at one checkpoint: by each rank alone, or by all together, each at some of its pieces."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from composer.utils import dist

from flame_composer.agree import agreed
from flame_composer.checkpoint import sharded
from flame_composer.checkpoint.content import check_content
from flame_composer.checkpoint.fetch import fetch, fetch_but_pieces, fetch_piece, file_of
from flame_composer.checkpoint.names import step_of
from flame_composer.checkpoint.parts import Needed
from flame_composer.checkpoint.pieces import describe, require_one, template_of
from flame_composer.checkpoint.read import Checkpoint, read_checkpoint, read_content, read_head
from flame_composer.checkpoint.sharded import Piece, Pieces
from flame_composer.errors import DataError, StoreError
from flame_composer.storage.filesystems import is_url

WHOLE, GONE = "whole", "gone"  # what a rank may find, besides a damaged checkpoint
NOT_SHARED = "{place}: is not there for every rank; save_folder must be one that all machines share"

T = TypeVar("T")


class _Head(NamedTuple):
    """The head of a checkpoint in pieces: its hash, and how many pieces there are."""

    fingerprint: str
    num_pieces: int


def look_at(
    place: str, staging: Path, needed: Callable[[], Needed] | None = None
) -> Checkpoint | None:
    """Return the checkpoint at `place` after reading and checking it, or None if it is gone.

    A checkpoint in an object store is first copied, anew, to the local folder `staging`. `needed`
    returns what a checkpoint must hold for a run to continue from it. Raise DataError if it is
    damaged or is not of the step in its name, and StoreError or ConfigError if the store fails.
    """
    checkpoint = fetch(place, staging)
    if checkpoint is not None:
        _check(checkpoint, needed)
    return checkpoint


def _check(checkpoint: Checkpoint, needed: Callable[[], Needed] | None) -> None:
    """Read and check a checkpoint whose files are all here."""
    content, place = read_checkpoint(checkpoint), checkpoint.place
    check_content(content, place, step=step_of(place), needed=needed and needed())


def look_alone(
    place: str, staging: Path, needed: Callable[[], Needed] | None
) -> list[DataError | str]:
    """Return what each rank finds when it looks at all of a checkpoint.

    That is `WHOLE`, `GONE` or the DataError that says what is wrong. Every rank must call this.
    """

    def look() -> str:
        return GONE if look_at(place, staging, needed) is None else WHOLE

    return agreed(dist.all_gather_object, partial(_or_problem, look))


def look_together(
    place: str, staging: Path, needed: Callable[[], Needed] | None, num_shards: int
) -> tuple[list[DataError | str], Pieces | None]:
    """Return what `look_alone` returns, after looking at each piece of a checkpoint only once.

    Also return the pieces of one that is whole; None if it is in one file, which the first rank of
    each machine looks at. The ranks of a machine have the same `staging`. The first `num_shards`
    ranks hold a model, and each looks at the pieces around its own share of that.
    """
    first = partial(_look_first, place, staging, needed)
    is_first = dist.get_local_rank() == 0
    heads = [
        each
        for each in agreed(
            dist.all_gather_object, partial(_or_problem, first) if is_first else lambda: None
        )
        if each is not None
    ]
    head = next((each for each in heads if isinstance(each, _Head)), None)
    problems: list[DataError | str] = [each for each in heads if isinstance(each, DataError)]
    if head is None or problems:
        return problems or [each for each in heads if isinstance(each, str)], None
    if any(each != head for each in heads):
        return [DataError(NOT_SHARED.format(place=place))], None

    numbers = own_pieces(head.num_pieces, dist.get_global_rank(), num_shards)
    share = _Share(Checkpoint(place, file_of(place, staging)), numbers)
    # All read first: damage to a file is told before what may come of it.
    pieces: list[Piece] = []
    for step in (share.read, partial(share.check, needed)):
        seen = agreed(dist.all_gather_object, partial(_or_problem, step))
        if problems := [each for each in seen if isinstance(each, DataError)]:
            return [*problems], None
        pieces = [piece for each in seen if isinstance(each, list) for piece in each]
    try:
        require_one(place, pieces)
    except DataError as error:
        return [error], None
    # By one message: in a gather, each rank would hold a copy for every other.
    template = [share.template()]
    dist.broadcast_object_list(template, src=0)
    assert template[0] is not None
    return [WHOLE], Pieces(template[0], tuple(pieces))


def own_pieces(num_pieces: int, rank: int, num_shards: int) -> range:
    """Return the numbers of the pieces that a rank looks at.

    With as many shards of the model as pieces, it is the piece that the rank loads; else they are
    those around the rows that it loads. A rank looks at none if others hold the same shard.
    """
    first, end = (-(-each * num_pieces // num_shards) for each in (rank, rank + 1))
    return range(first, end) if rank < num_shards else range(0)


def _or_problem(look: Callable[[], T]) -> T | DataError:
    """Return what `look` returns, or the DataError that it raises if the store is not to blame."""
    try:
        return look()
    except StoreError:
        raise
    except DataError as error:
        return error


def _look_first(place: str, staging: Path, needed: Callable[[], Needed] | None) -> _Head | str:
    """Return the head of a checkpoint in pieces, fetched and checked.

    Of one in a single file, look at all of it, and return `WHOLE` or `GONE`.
    """
    checkpoint = fetch_but_pieces(place, staging)
    if checkpoint is None:
        return GONE
    if checkpoint.file.name != sharded.HEAD:
        _check(checkpoint, needed)
        return WHOLE
    num_pieces = read_head(place, checkpoint.file)
    return _Head(sharded.fingerprint(checkpoint.file), num_pieces)


class _Share:
    """The pieces of a checkpoint that this rank looks at; the head is here."""

    def __init__(self, checkpoint: Checkpoint, numbers: range):
        self.checkpoint = checkpoint
        self.numbers = numbers
        self.versions: list[str | None] = []
        self.content: dict[str, Any] = {}

    def read(self) -> list[Piece]:
        """Fetch the pieces and check that they are undamaged; return an empty list."""
        if not self.numbers:
            return []
        place = self.checkpoint.place
        try:
            for number in self.numbers:
                self.versions.append(
                    fetch_piece(self.checkpoint, number) if is_url(place) else None
                )
        except FileNotFoundError:
            raise DataError(f"{place}: not a whole checkpoint: it is being deleted") from None
        self.content = read_content(self.checkpoint, verify=True, numbers=self.numbers)
        return []

    def check(self, needed: Callable[[], Needed] | None) -> list[Piece]:
        """Check the content of the pieces, and return where everything lies in them."""
        if not self.numbers:
            return []
        place = self.checkpoint.place
        check_content(
            self.content,
            place,
            step=step_of(place),
            needed=needed and needed(),
            all_here=False,
        )
        contents = self.content["pieces"]
        return list(map(partial(describe, self.checkpoint), self.numbers, contents, self.versions))

    def template(self) -> Any:
        """Return the template of the first piece, or None if this rank does not look at it."""
        return template_of(self.content["pieces"][0]) if 0 in self.numbers else None
