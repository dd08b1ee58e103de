"""The ranks of torch 2.7.0: the store they meet at, and how they add up gradients."""

from __future__ import annotations

from torch.distributed import Reducer, Store, distributed_c10d


def keep_buckets() -> None:
    """Make plain data parallelism keep the buckets of gradients that it begins with.

    Upstream: torch 2.7.0, `Reducer._rebuild_buckets`, which DistributedDataParallel calls.
    Mends: after a process's first step, it lays out gradients anew in the order in which they
    arrived. Where a gradient lies decides in which order three or more ranks add it up, so that the
    first step after a restart differed in its last bits from the same step of a run that went on.
    """
    Reducer._rebuild_buckets = lambda _: False  # type: ignore[method-assign,assignment]


def store_of_all_ranks() -> Store:
    """Return the store through which the ranks have met, for small values under keys.

    Upstream: torch 2.7.0, `torch.distributed.distributed_c10d._get_default_store`.
    Mends: torch has no public way to get this store, and Composer, which makes it, keeps none.
    """
    return distributed_c10d._get_default_store()
