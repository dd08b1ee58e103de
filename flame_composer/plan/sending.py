"""What the devices that share rows send one another in a step, noted while one is followed.

It is what a ring of them carries: of a tensor of N bytes on each of P devices, each device sends
(P - 1) N for all to have all of them, (P - 1) / P N for a sum of which each keeps a share, and
twice that for a sum that all have (Thakur et al. 2005, section 4).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch.distributed as dist
from torch import Tensor
from transformers import PretrainedConfig

from flame_composer.config.plan import PlanConfig
from flame_composer.model.ranks import ranks_of
from flame_composer.plan.step import (
    as_on_device,
    build_for_run,
    forward,
    longest_document,
    make_batch,
)
from flame_composer.upstream.triton import without_launches

_NumBytes = Callable[[int, int], float]  # of a tensor of so many bytes, and so many devices
_RINGS: dict[str, tuple[int, _NumBytes]] = {  # and the number of the argument that is sent
    "all_gather": (1, lambda count, devices: count * (devices - 1)),
    "reduce_scatter_tensor": (1, lambda count, devices: count * (devices - 1) / devices),
    "all_reduce": (0, lambda count, devices: 2 * count * (devices - 1) / devices),
}


def count_sent(config: PlanConfig, hf_config: PretrainedConfig) -> dict[str, int]:
    """Return the bytes that a device sends in a step to those that share its rows.

    They are by the axis of `model.ranks.Ranks` along which they are sent. The process must be one
    that trains nothing (`plan.child`). Raise whatever the model raises if it cannot run here.
    """
    rows = config.microbatch_size
    assert isinstance(rows, int)
    with as_on_device(config) as fakes, without_launches():
        model = build_for_run(config, hf_config, fakes)
        batch = make_batch(rows, config.context_length, longest_document(config))
        mesh = ranks_of(config.parallelism).mesh("cpu")
        groups = {axis: mesh[axis].get_group() for axis in ("context", "tensor")}
        with fakes, _noted(groups) as sent:
            _, loss = forward(config, model, batch)
            loss.backward()
    microbatches = config.global_batch_size // (config.places * rows)
    return {axis: round(count * microbatches) for axis, count in sent.items()}


def _axis_of(group: Any, groups: dict[str, Any]) -> str | None:
    """Return along which axis a group shares rows, or None if it does not."""
    if group is None or dist.get_world_size(group) == 1:
        return None
    if group == groups["context"]:  # FSDP2 may have another group of the same ranks
        return "context"
    of_tensor = dist.get_process_group_ranks(groups["tensor"])
    return "tensor" if dist.get_process_group_ranks(group) == of_tensor else None


@contextmanager
def _noted(groups: dict[str, Any]) -> Iterator[dict[str, float]]:
    """Add up, in the body, what is sent in the groups of the axes."""
    sent = dict.fromkeys(groups, 0.0)

    def noting(given: Callable[..., Any], place: int, ring: _NumBytes) -> Callable[..., Any]:
        @functools.wraps(given)
        def call(*args: Any, **kwargs: Any) -> Any:
            group = kwargs.get("group")
            axis = _axis_of(group, groups)
            if axis is not None:
                tensor: Tensor = args[place]
                count = tensor.numel() * tensor.element_size()
                sent[axis] += ring(count, dist.get_world_size(group))
            return given(*args, **kwargs)

        return call

    with ExitStack() as stack:
        for name, (place, ring) in _RINGS.items():
            wrapped = noting(getattr(dist, name), place, ring)
            stack.enter_context(patch.object(dist, name, wrapped))
        yield sent
