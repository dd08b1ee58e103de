"""The ranks of torch 2.7.0: the store they meet at, and how they add up gradients."""

from __future__ import annotations

import torch
from torch.distributed import Store, distributed_c10d
from torch.nn.parallel import DistributedDataParallel


def settle_buckets(model: torch.nn.Module) -> None:
    """Lay out the gradients of plain data parallelism for good, before the first step.

    Every rank must call this, once the model is wrapped. A model that is not wrapped in
    DistributedDataParallel is left alone, and so is one in which DistributedDataParallel looks for
    idle weights (as with layer_freezing): it never lays its gradients out anew.

    Upstream: torch 2.7.0, `Reducer._rebuild_buckets`, which DistributedDataParallel calls.
    Mends: after a process's first step, it lays out gradients anew, in the order in which they
    arrived. Where a gradient lies decides in which order three or more ranks add it up, so that the
    first step after a restart differed in its last bits from the same step of a run that went on.
    Here a step whose gradients are zero comes first, so that every real step has the same layout.
    """
    if not isinstance(model, DistributedDataParallel) or model.find_unused_parameters:
        return
    trained = [each for each in model.parameters() if each.requires_grad]
    # What is added last is differentiated first: gradients arrive from the last layer to the first
    nothing = sum((each * 0).sum() for each in trained)
    assert isinstance(nothing, torch.Tensor)
    model.reducer.prepare_for_forward()
    model.reducer.prepare_for_backward([])
    nothing.backward()
    for each in trained:
        each.grad = None
    is_laid_out = model.reducer._rebuild_buckets()
    assert is_laid_out


def store_of_all_ranks() -> Store:
    """Return the store through which the ranks have met, for small values under keys.

    Upstream: torch 2.7.0, `torch.distributed.distributed_c10d._get_default_store`.
    Mends: torch has no public way to get this store, and Composer, which makes it, keeps none.
    """
    return distributed_c10d._get_default_store()
