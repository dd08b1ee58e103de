"""Composer 0.32.1: causal models, what is in checkpoints and how they are read, device meshes."""

from __future__ import annotations

import contextlib
import functools
import typing
from collections.abc import Callable
from typing import Any

from composer.core import state
from composer.distributed import prepare_distributed
from composer.models import huggingface
from composer.utils import checkpoint
from composer.utils.parallelism import FSDP2Config
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from transformers import PretrainedConfig


@contextlib.contextmanager
def known_as_causal() -> typing.Iterator[None]:
    """Make Composer take any model for a causal language model, without checking, in the body.

    Upstream: composer 0.32.1, `composer.models.huggingface._is_registered_causal_lm`.
    Mends: to check, it imports every causal model of transformers, which takes 2 s.
    """
    asked = huggingface._is_registered_causal_lm
    huggingface._is_registered_causal_lm = lambda model: True  # noqa: ARG005
    try:
        yield
    finally:
        huggingface._is_registered_causal_lm = asked


def ask_wandb_for_its_address() -> None:
    """Let Composer ask a W&B run for its address as it used to.

    Upstream: wandb 0.31, `Run.url`, and composer 0.32.1, `WandBLogger.init`.
    Mends: Composer calls `Run.get_url`, which is gone.
    """
    from wandb.sdk.wandb_run import Run

    if not hasattr(Run, "get_url"):
        Run.get_url = lambda run: run.url  # type: ignore[assignment, method-assign]


def ask_configs_without_a_word() -> None:
    """Let Composer ask a model's config whether outputs are dictionaries, as it used to.

    Upstream: transformers 5.24, `PreTrainedConfig.use_return_dict`, and composer 0.32.1,
    `HuggingFaceModel.loss` and `eval_forward`.
    Mends: transformers 5 tells every process, in a line, that the name is deprecated.
    """

    def are_dictionaries(self: Any) -> bool:
        return bool(self.return_dict) and not getattr(self, "torchscript", False)

    PretrainedConfig.use_return_dict = property(are_dictionaries)  # type: ignore[assignment]


def load_checkpoints_with(read: Callable[..., Any]) -> None:
    """Make Composer's Trainer read checkpoints with `read`, for the rest of the process.

    Upstream: composer 0.32.1, `composer.utils.checkpoint._torch_load_with_validation`.
    Mends: it unpickles checkpoints with `weights_only=False`, which runs any code in them.
    """
    checkpoint._torch_load_with_validation = read  # type: ignore[assignment]


def remember_environment() -> None:
    """Make Composer look up the versions and devices that it saves once, not in each checkpoint.

    Upstream: composer 0.32.1, `composer.core.state.get_composer_env_dict`.
    Mends: it goes through all installed packages each time, for which training waits 20 ms or more.
    """
    given = state.get_composer_env_dict
    if not hasattr(given, "cache_info"):  # not done yet
        state.get_composer_env_dict = functools.cache(given)  # type: ignore[assignment]


class Sharding(FSDP2Config):
    """An FSDP2Config that can ask for replicas of the sharded model.

    Upstream: composer 0.32.1, `FSDP2Config.data_parallel_replicate_degree`.
    Mends: Composer builds the device mesh from this property, which is always None, whatever mesh
    the config was given. All devices then form one group of shards.
    """

    replicas: int | None = None
    split: Callable[[nn.Module], DeviceMesh] | None = None
    """Divides a model, and returns the mesh to shard it over (`split_before_sharding`)."""

    @property
    def data_parallel_replicate_degree(self) -> int | None:
        return self.replicas


def split_before_sharding() -> None:
    """Make Composer call a `Sharding`'s `split` on a model just before FSDP2 shards it.

    Upstream: composer 0.32.1, `composer.distributed.prepare_distributed.prepare_fully_shard`.
    Mends: Composer's tensor parallelism (TPConfig) is for FSDP1 and one group of parameters, and
    divides a model before the first rank has taken down the weights that it sends to the others.
    """
    given = prepare_distributed.prepare_fully_shard
    if hasattr(given, "splits"):  # done before
        return

    @functools.wraps(given)
    def prepare(model: nn.Module, config: FSDP2Config, *args: Any) -> None:
        if isinstance(config, Sharding) and config.split is not None:
            config.device_mesh = config.split(model)
        given(model, config, *args)

    prepare.splits = True  # type: ignore[attr-defined]
    prepare_distributed.prepare_fully_shard = prepare  # type: ignore[assignment]
