"""Composer 0.32.1: what it asks of every model, how it reads checkpoints and spreads a model."""

from __future__ import annotations

import contextlib
import typing
from collections.abc import Callable
from typing import Any

from composer.models import huggingface
from composer.utils import checkpoint
from composer.utils.parallelism import FSDP2Config


@contextlib.contextmanager
def known_as_causal() -> typing.Iterator[None]:
    """Have Composer take a model for a causal one without looking.

    Upstream: composer 0.32.1, `composer.models.huggingface._is_registered_causal_lm`.
    Mends: it imports every causal model of transformers to find out, which takes 2 s.
    """
    asked = huggingface._is_registered_causal_lm
    huggingface._is_registered_causal_lm = lambda model: True  # noqa: ARG005
    try:
        yield
    finally:
        huggingface._is_registered_causal_lm = asked


def load_checkpoints_with(read: Callable[..., Any]) -> None:
    """Have Composer's Trainer read checkpoints by `read`, for the rest of the process.

    Upstream: composer 0.32.1, `composer.utils.checkpoint._torch_load_with_validation`.
    Mends: it unpickles a checkpoint with `weights_only=False`, which runs code in it.
    """
    checkpoint._torch_load_with_validation = read  # type: ignore[assignment]


class Sharding(FSDP2Config):
    """An FSDP2Config that can ask for replicas of the sharded model.

    Upstream: composer 0.32.1, `FSDP2Config.data_parallel_replicate_degree`.
    Mends: Composer builds the device mesh from it, and it is always None, whatever mesh the config
    was given: all devices form one group of shards.
    """

    replicas: int | None = None

    @property
    def data_parallel_replicate_degree(self) -> int | None:
        return self.replicas
