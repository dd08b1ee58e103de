"""torch 2.7.0's books of the memory of a step, kept quickly and with an entry for the logits."""

from __future__ import annotations

from contextlib import AbstractContextManager, ExitStack
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.distributed._tools.fsdp2_mem_tracker import FSDPMemTracker
from torch.distributed._tools.mem_tracker import MemTracker
from torch.distributed.tensor._sharding_prop import ShardingPropagator
from torch.utils._python_dispatch import _disable_current_modes

COPIES = "Copies"  # of weights, cast by autocast
LOGITS = "Logits"  # with their gradients and copies
TOTAL = "Total"


class _Peak:
    """What is the same for a sharded model and another: one peak, with two more kinds of bytes."""

    vocab_size: int | None = None  # the last dimension of logits

    @property
    def peak(self: Any) -> dict[str, int]:
        """The bytes at the peak by the names of torch's kinds of references, COPIES and LOGITS."""
        snapshot = self.get_tracker_snapshot("peak")[torch.device("cpu")]
        return {getattr(kind, "value", kind): count for kind, count in snapshot.items()}

    def _update_peak_stats(self: Any, peak_state: Any) -> None:  # noqa: ARG002
        for device, snapshot in self._curr_mem_snap.items():
            if snapshot[TOTAL] > self._peak_mem.get(device, 0):
                self._peak_mem[device] = snapshot[TOTAL]
                self._peak_mem_snap[device] = dict(snapshot)

    def _update_snap(self: Any, u_type: Any, winfo: Any, *args: Any, **kwargs: Any) -> None:
        if winfo.device not in self._curr_mem_snap:
            kinds = (*self._ref_class, COPIES, LOGITS, TOTAL)
            self._curr_mem_snap[winfo.device] = dict.fromkeys(kinds, 0)
        super()._update_snap(u_type, winfo, *args, **kwargs)  # type: ignore[misc]

    def _track(self: Any, reftype: Any, t: Tensor) -> None:
        is_row = t.ndim > 1 and t.shape[-1] == self.vocab_size and t.is_floating_point()
        super()._track(LOGITS if is_row and not self._in_opt else reftype, t)  # type: ignore[misc]

    def __torch_dispatch__(
        self: Any, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        result = super().__torch_dispatch__(func, types, args, kwargs)  # type: ignore[misc]
        if func is torch.ops.aten._to_copy.default and isinstance(args[0], nn.Parameter):
            self._update_and_maybe_create_winfos(result, COPIES)
        return result


class Books(_Peak, MemTracker):
    """A MemTracker that keeps the peak of the whole model only, and tells what logits take of it.

    Upstream: torch 2.7.0, `torch.distributed._tools.mem_tracker.MemTracker`.
    Mends: it also keeps the peak of each module, for which it goes through all of them after every
    operation: minutes instead of seconds. It knows neither logits nor autocast's copies of weights.
    """


class ShardedBooks(_Peak, FSDPMemTracker):
    """A FSDPMemTracker that keeps the peak of the whole model only, as `Books` does.

    Upstream: torch 2.7.0, `torch.distributed._tools.fsdp2_mem_tracker.FSDPMemTracker`.
    Mends: what `Books` mends, for a model that FSDP2 shards. In torch 2.15 DTensor works out shapes
    with whole tensors of the mode that is active, which it would count; it is given none.
    """

    def __enter__(self) -> Any:
        self._kept = ExitStack()
        if hasattr(ShardingPropagator, "_fake_mode_lock"):  # held while shapes are worked out
            lock = patch.object(ShardingPropagator, "_fake_mode_lock", _WithoutModes())
            self._kept.enter_context(lock)
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._kept.close()


class _WithoutModes:
    """A context manager, used again and again, whose body has no modes of fake tensors or books."""

    def __init__(self) -> None:
        self._left: list[AbstractContextManager[Any]] = []

    def __enter__(self) -> None:
        self._left.append(_disable_current_modes())
        self._left[-1].__enter__()

    def __exit__(self, *error: Any) -> None:
        self._left.pop().__exit__(*error)
