"""States after the beginnings of prompts, so that what was read before is not read again.

A state cannot be cut back to a shorter text. What is kept are therefore the states at the ends of
the pieces in which prompts are read, which are chosen so that prompts that begin alike are read in
the same pieces: an answer has the same bits whether its prompt was read from a kept state or not.
"""

from __future__ import annotations

import copy
import hashlib
import logging
from array import array
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedModel

from flame_composer.errors import one_line
from flame_composer.serve.metrics import Metrics
from flame_composer.serve.states import Abilities, read

log = logging.getLogger(__name__)

SHORTEST_PIECE = 32  # tokens that a turn must have to end a piece: each costs a forward pass
MOST_SEEN = 20_000  # beginnings to remember the digests of
_WHOSE, _TOKEN = 32, 4  # bytes that a state's beginning takes: whose it is, and each token
MOST_KEPT = 10_000  # states, of which each takes some kilobytes besides its tensors


def ends_of_pieces(num_tokens: int, turns: Sequence[int], longest: int) -> list[int]:
    """Return where the pieces end in which a prompt is read: after turns, and of `longest` tokens.

    `turns` are the places after tokens that end a turn, in ascending order. Whether a piece ends
    at a place depends on the tokens before it alone; only the end of the prompt is one besides.
    """
    ends, start = [], 0
    for turn in (*turns, num_tokens):
        while turn - start >= longest:
            start += longest
            ends.append(start)
        if turn - start >= SHORTEST_PIECE and turn < num_tokens:
            start = turn
            ends.append(start)
    if start < num_tokens:
        ends.append(num_tokens)
    return ends


class Kept(NamedTuple):
    """The state after the beginning of a prompt."""

    beginning: bytes  # the tokens, and whose they are
    cache: Any
    num_bytes: int


class Start(NamedTuple):
    """Where the reading of a prompt starts, and where its state is to be kept."""

    position: int  # tokens that need not be read
    cache: Any  # the state after them, None at the beginning
    wanted: dict[int, bytes]  # the places where a state is worth keeping, with names for them


class Prefixes:
    """States after beginnings of prompts, up to a size; the least recently used goes first.

    A prompt leaves the states after its first piece, as a system prompt is, and after its last
    whole piece, with which the next turn of a conversation begins. A second prompt that begins
    alike leaves that at the end of what they share, too.
    """

    def __init__(self, limit: int, metrics: Metrics):
        """Keep `limit` bytes at most; 0 keeps nothing."""
        self.limit, self.metrics = limit, metrics
        self.num_bytes = 0
        self.kept: OrderedDict[bytes, Kept] = OrderedDict()
        self._seen: OrderedDict[bytes, None] = OrderedDict()

    def start(self, ids: Sequence[int], ends: Sequence[int], owner: str) -> Start:
        """Return where to start reading a prompt whose pieces end at `ends`.

        States are found by prompts of the same `owner` only. At least one token is left to read,
        since a state does not tell what comes next.
        """
        if self.limit == 0:
            return Start(0, None, {})
        whose, tokens = _digest(owner.encode()), array("i", ids)
        names: dict[int, bytes] = {}
        name, start = whose, 0
        for end in ends[:-1]:
            names[end] = name = _digest(name + tokens[start:end].tobytes())
            start = end
        position, cache = 0, None
        for end in reversed(names):
            found = self.kept.get(names[end])
            if found is not None and found.beginning == whose + tokens[:end].tobytes():
                self.kept.move_to_end(names[end])
                cache = self._copied(found.cache)
                position = 0 if cache is None else end
                break
        # Its first piece, its last, and the place at which it parts from an earlier prompt
        seen = [end for end in names if names[end] in self._seen]
        worth = {*[*names][:1], *[*names][-1:], *seen[-1:]}
        wanted = {end: names[end] for end in worth if end > position}
        for each in names.values():
            self._seen[each] = None
            self._seen.move_to_end(each)
        while len(self._seen) > MOST_SEEN:
            self._seen.popitem(last=False)
        if position:
            self.metrics.note_cached(position)
        return Start(position, cache, wanted)

    def keep(self, name: bytes, ids: Sequence[int], owner: str, cache: Any) -> None:
        """Keep a copy of the state after the tokens `ids`, under the name that `start` gave."""
        if name in self.kept:
            self.kept.move_to_end(name)
            return
        beginning = _digest(owner.encode()) + array("i", ids).tobytes()
        size = num_bytes(cache) + len(beginning)
        if size > self.limit:
            return
        while self.num_bytes + size > self.limit or len(self.kept) >= MOST_KEPT:
            self.num_bytes -= self.kept.popitem(last=False)[1].num_bytes
        copied = self._copied(cache)
        if copied is not None:
            self.kept[name] = Kept(beginning, copied, size)
            self.num_bytes += size

    def clear(self) -> None:
        """Drop all states."""
        self.kept.clear()
        self.num_bytes = 0

    def make_room(self, error: Exception) -> None:
        """Drop all states after an error for lack of memory, which on a CPU has no type."""
        text = str(error)
        lacks = isinstance(error, torch.OutOfMemoryError | MemoryError)
        if lacks or "not enough memory" in text or "DefaultCPUAllocator" in text:
            self.clear()

    def gauges(self) -> dict[str, int]:
        """Return how much is kept, by the names that Prometheus gets."""
        return {"prefixes": len(self.kept), "prefix_bytes": self.num_bytes}

    def _copied(self, cache: Any) -> Any:
        """Return a copy of a state; without memory for it, drop what is kept, and return None."""
        try:
            return copied(cache)
        except RuntimeError as error:  # of torch's allocators
            log.warning("warning: kept states are dropped: %s", one_line(error))
            self.clear()
            return None


def _digest(content: bytes) -> bytes:
    return hashlib.sha256(content).digest()


def copied(cache: Any) -> Any:
    """Return a copy of a cache, whose tensors hold nothing but themselves."""
    memo: dict[int, Any] = {id(each): each.clone() for each in _tensors(cache)}
    return copy.deepcopy(cache, memo)


def num_bytes(cache: Any) -> int:
    """Return the size of a cache's tensors."""
    return sum(each.numel() * each.element_size() for each in _tensors(cache))


def _tensors(part: Any) -> Iterator[torch.Tensor]:
    """Yield the tensors in a cache, of any kind."""
    if isinstance(part, torch.Tensor):
        yield part
    elif isinstance(part, dict):
        for each in part.values():
            yield from _tensors(each)
    elif isinstance(part, list | tuple):
        for each in part:
            yield from _tensors(each)
    elif hasattr(part, "__dict__") and not isinstance(part, type):
        yield from _tensors(vars(part))


def describe(model: PreTrainedModel, abilities: Abilities, limit: int) -> str:
    """Return a line for the user that says what is kept of prompts."""
    if limit == 0:
        return "no states of prompts are kept (prefix_cache_bytes=0)"
    if not abilities.in_pieces:
        return "no states of prompts are kept: this model reads a prompt whole"
    if not abilities.joined:
        return f"up to {limit:,} bytes of states of prompts are kept; they grow with the prompt"
    with torch.inference_mode():
        cache = read(model, torch.zeros((1, 1), dtype=torch.long, device=model.device), None)[1]
    size = num_bytes(cache)
    if size + _WHOSE + _TOKEN > limit:
        return f"no states of prompts are kept: {limit:,} bytes are too few for one of {size:,}"
    most = min(MOST_KEPT, limit // (size + _WHOSE + _TOKEN * SHORTEST_PIECE))
    return (
        f"up to {most:,} states of prompts are kept, of {size:,} bytes each and {_TOKEN} for each"
        " token before it"
    )
