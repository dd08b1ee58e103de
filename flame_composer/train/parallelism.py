"""How a model is spread over devices: plain data parallelism, or torch's FSDP2, on GPUs as on
CPUs.
"""

from __future__ import annotations

import os
import warnings
from typing import Any

import torch
from composer.distributed.activation_checkpointing import apply_ac, generate_composer_model_check_fn
from composer.models import ComposerModel
from composer.utils import dist
from composer.utils.parallelism import FSDP2Config
from torch._inductor.runtime.cache_dir_utils import default_cache_dir

from flame_composer.config.sections import ParallelismConfig
from flame_composer.errors import InvalidField
from flame_composer.storage.folders import private_folder
from flame_composer.upstream.fsdp import average_on_cpus, replicate_on_cpus


def check_devices(config: ParallelismConfig, *, precision: str) -> None:
    """Raises InvalidField for what this machine cannot do."""
    if config.compile:
        _compile_in_private()
    if torch.cuda.is_available():
        return
    if precision != "fp32":
        raise InvalidField(
            "precision", "there is no GPU here, and CPUs compute in fp32; set precision=fp32"
        )
    if config.fsdp and not (config.cpu_fallback or config.cpu_fsdp):
        raise InvalidField(
            "parallelism.fsdp",
            "there is no GPU here; set parallelism.cpu_fallback=true to train with plain data"
            " parallelism, parallelism.cpu_fsdp=true to shard over processes, or"
            " parallelism.fsdp=null",
        )
    if config.activation_cpu_offload:
        raise InvalidField(
            "parallelism.activation_cpu_offload",
            "there is no GPU here whose memory it could spare; set it to false",
        )


def _compile_in_private() -> None:
    """Have torch (2.7.0) keep what it compiles in this user's private folder, unless
    TORCHINDUCTOR_CACHE_DIR says where.

    It runs what it finds there, and by default that is a folder in TMPDIR whose name can be
    guessed: another user could have put it there.
    """
    if os.environ.get("TORCHINDUCTOR_CACHE_DIR") in (None, default_cache_dir()):
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(private_folder() / "torchinductor")


def is_sharded(config: ParallelismConfig) -> bool:
    return config.fsdp is not None and (torch.cuda.is_available() or config.cpu_fsdp)


def gets_weights(config: ParallelismConfig) -> bool:
    """Whether this rank's share of the weights comes from the first rank, so that it need not make
    any.

    All are made, or read, by the first: a model begins with the same weights on any number of
    devices.
    """
    return is_sharded(config) and dist.get_global_rank() > 0


class Sharding(FSDP2Config):
    """Composer lays the devices out itself, and FSDP2Config tells it of no replicas: one mesh
    over all of them, whatever mesh it was given.
    """

    replicas: int | None = None

    @property
    def data_parallel_replicate_degree(self) -> int | None:
        return self.replicas


def build(config: ParallelismConfig) -> dict[str, Any] | None:
    """As Composer's Trainer takes it; None for plain data parallelism. Processes must have met
    (dist.initialize_dist).
    """
    if not is_sharded(config):
        return None
    assert config.fsdp is not None
    if not torch.cuda.is_available():
        average_on_cpus()
        replicate_on_cpus()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "FSDP2 Config/APIs are experimental", UserWarning)
        sharding = Sharding(
            reshard_after_forward=config.fsdp.sharding_strategy != "SHARD_GRAD_OP",
            mixed_precision=config.fsdp.mixed_precision,
            # What Composer loads; pieces are ours (flame_composer.checkpoint.sharded)
            state_dict_type="full",
        )
    if config.fsdp.sharding_strategy == "HYBRID_SHARD":
        sharding.replicas = (
            config.fsdp.replicas or dist.get_world_size() // dist.get_local_world_size()
        )
    return {"fsdp": sharding}


def recompute_blocks(model: ComposerModel, config: ParallelismConfig) -> ComposerModel:
    """The model, each of its blocks recomputed or offloaded as `config` says. Names of its
    weights stay as they are.
    """
    if config.activation_checkpointing or config.activation_cpu_offload:
        chosen = generate_composer_model_check_fn(model)
        apply_ac(model, config.activation_checkpointing, config.activation_cpu_offload, chosen)
    return model
