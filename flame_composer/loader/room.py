"""The limited space for a machine's fetched shards, and which of them may go."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flame_composer.loader.machine import shared_array

PATIENCE = 5.0  # seconds until a shard goes that will be needed again


class Room:
    """The space for a machine's fetched shards.

    Every process that reads rows looks ahead in the order, further than a shard's rows are spread,
    and notes for each shard the last batch that it is needed for. It also says which batch it is
    at. What is not needed from the batch of the slowest on may be deleted.

    Batches are numbered from 1 on over all epochs. The processes share what is noted; for most of
    what is done here they must take turns.
    """

    def __init__(self, folder: Path, sizes: NDArray[np.int64], limit: int, places: int):
        """Keep shards of `sizes` bytes [shards] within `limit` bytes; 0 for those not fetched.

        `places` processes read rows.
        """
        self.folder, self.sizes, self.limit, self.places = folder, sizes, limit, places
        shape = (len(sizes),)
        self.there: NDArray[np.uint8] = shared_array(folder / "there", np.uint8, shape)
        self.needed: NDArray[np.int64] = shared_array(folder / "needed", np.int64, shape)
        # 0 until a process has noted what it needs: until all have, nothing may go
        self.at: NDArray[np.int64] = shared_array(folder / "at", np.int64, (places,))

    def __reduce__(self) -> tuple[Any, ...]:
        """Let a process that is not forked open the same arrays, not copies of them."""
        return type(self), (self.folder, self.sizes, self.limit, self.places)

    def note(self, shards: NDArray[np.int64], batch: int) -> None:
        """Note that these shards [N] are needed for a batch."""
        self.needed[shards] = np.maximum(self.needed[shards], batch)

    def take(self, shard: int, delete: Callable[[int], bool], *, seconds: float) -> bool:
        """Make room for a shard, deleting others, and note that it is there; return False if not.

        `delete` says whether it could. `seconds` is for how long there has been no room: when it is
        too long, what is needed last of all goes, or processes would wait for one another forever.
        """
        free = self.limit - int(self.sizes[self.there > 0].sum())
        lacking = int(self.sizes[shard]) - free
        if lacking > 0:
            there = np.flatnonzero((self.there > 0) & (self.sizes > 0))
            there = there[np.argsort(self.needed[there], kind="stable")]
            is_over = self.needed[there] < self.at.min()
            may_go = there[is_over]
            if seconds > PATIENCE:
                may_go = np.concatenate([may_go, there[~is_over][::-1]])
            for other in may_go.tolist():
                if lacking <= 0:
                    break
                if other != shard and delete(other):
                    self.there[other] = 0
                    lacking -= int(self.sizes[other])
        if lacking <= 0:
            self.there[shard] = 1
        return lacking <= 0
