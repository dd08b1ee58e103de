"""Parallelism over devices, GPUs or CPUs: plain data parallelism, or sharding by torch's FSDP2."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from composer.utils import dist
from transformers import PretrainedConfig, PreTrainedModel

from flame_composer.config.extensions import in_use
from flame_composer.config.parallelism import ParallelismConfig
from flame_composer.config.train import TrainConfig
from flame_composer.cpu.allocator import keep_freed_memory
from flame_composer.cpu.linear import multiplies_bf16, use_bf16
from flame_composer.errors import InvalidField
from flame_composer.model.build import build_or_load
from flame_composer.model.context import Context, require_divisible
from flame_composer.model.hf_config import read_pretrained_config
from flame_composer.model.ranks import ranks_of
from flame_composer.model.sharding import sharding_of
from flame_composer.model.tensor import require_even_parts, split
from flame_composer.upstream.composer import split_before_sharding
from flame_composer.upstream.fsdp import average_on_cpus, replicate_on_cpus
from flame_composer.upstream.inductor import compile_in_private


def check_devices(config: ParallelismConfig, *, precision: str) -> None:
    """Raise InvalidField for a setting that this machine cannot carry out.

    Otherwise make this process compute as they say, where Composer does not.
    """
    if config.compile:
        compile_in_private()
    if torch.cuda.is_available():
        return
    _compute_on_cpu(config, precision)
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
            "there is no GPU here whose memory it could save; set it to false",
        )


def _compute_on_cpu(config: ParallelismConfig, precision: str) -> None:
    """Set the precision of linear layers on a CPU; raise InvalidField if there is none such."""
    if precision == "amp_fp16":
        raise InvalidField(
            "precision", "there is no GPU here, and CPUs do not train in fp16; set precision=fp32"
        )
    if precision == "amp_bf16":
        if not multiplies_bf16():
            raise InvalidField(
                "precision",
                "there is no GPU here, and this CPU has neither AVX512_BF16 nor AMX, without which"
                " bf16 is slower than fp32; set precision=fp32",
            )
        for key, is_on in (("compile", config.compile), ("cpu_fsdp", config.cpu_fsdp)):
            if is_on:
                raise InvalidField(
                    "precision",
                    f"on a CPU parallelism.{key} computes in fp32; set precision=fp32, or"
                    f" parallelism.{key}=false",
                )
    use_bf16(precision == "amp_bf16")
    keep_freed_memory()


def autocast_of(precision: str) -> str:
    """Return the precision that Composer casts to: none on a CPU, where linear layers see to it."""
    return precision if torch.cuda.is_available() else "fp32"


def is_sharded(config: ParallelismConfig) -> bool:
    """Return whether FSDP2 shards the model: it is set, and there is a GPU or `cpu_fsdp` is on."""
    return config.fsdp is not None and (torch.cuda.is_available() or config.cpu_fsdp)


def gets_weights(config: ParallelismConfig) -> bool:
    """Return whether rank 0 sends this rank its weights, so that it need not make any itself.

    Rank 0 initializes or reads all weights of a sharded model, so that training starts from the
    same weights on any number of devices.
    """
    return is_sharded(config) and dist.get_global_rank() > 0


def build(config: ParallelismConfig) -> dict[str, Any] | None:
    """Return the `parallelism_config` for Composer's Trainer, or None for plain data parallelism.

    Call it after `dist.initialize_dist`: the number of replicas depends on the world size.
    """
    if not is_sharded(config):
        return None
    assert config.fsdp is not None
    if not torch.cuda.is_available():
        average_on_cpus()
        replicate_on_cpus()
    nodes = dist.get_world_size() // dist.get_local_world_size()
    sharding = sharding_of(config.fsdp, num_nodes=nodes)
    if config.tensor > 1:
        split_before_sharding()
        sharding.split = partial(split, tensor=config.tensor)
    return {"fsdp": sharding}


def check_tensor(config: TrainConfig, hf_config: PretrainedConfig | None) -> None:
    """Raise InvalidField for what layers divided over devices do not go together with."""
    settings, key = config.parallelism, "parallelism.tensor"
    if not is_sharded(settings):
        rule = f"must be true with {key}={settings.tensor}, where there is no GPU"
        raise InvalidField("parallelism.cpu_fsdp", rule)
    assert settings.fsdp is not None
    has_replicas = settings.fsdp.sharding_strategy == "HYBRID_SHARD"
    for field, refused, remedy in (
        ("parallelism.fsdp.sharding_strategy", has_replicas, "FULL_SHARD or SHARD_GRAD_OP"),
        ("parallelism.compile", settings.compile, "false"),
        ("parallelism.activation_cpu_offload", settings.activation_cpu_offload, "false"),
        ("lora", config.lora is not None, "null"),
        # What all devices of a group compute must be the same to the last bit, or weights drift.
        ("deterministic", not config.deterministic, "true"),
        ("optimizer.name", config.optimizer.name == "lamb", "adamw, decoupled_adamw or muon"),
        ("callbacks.optimizer_monitor", "optimizer_monitor" in in_use(config.callbacks), "false"),
    ):
        if refused:
            raise InvalidField(field, f"must be {remedy} with {key}={settings.tensor}")
    model = build_or_load(config.model, hf_config, empty=True)
    devices = int(config.world_size())
    require_even_parts(model, tensor=settings.tensor, devices=devices)


def check_model(config: TrainConfig, hf_config: PretrainedConfig | None) -> None:
    """Raise InvalidField if the run's model cannot be divided as its settings say.

    `hf_config` is as returned by `model.hf_config.new_hf_config`.
    """
    if config.parallelism.tensor > 1:
        check_tensor(config, hf_config)
    if config.parallelism.context > 1:
        if hf_config is None:
            assert config.model.pretrained is not None
            hf_config = read_pretrained_config(config.model.pretrained)
        require_divisible(hf_config)


def divide_rows(config: ParallelismConfig, model: PreTrainedModel) -> Context | None:
    """Return what divides the rows of a run's model, or None; every rank must call it."""
    if config.context == 1:
        return None
    return Context(model, ranks_of(config), "cuda" if torch.cuda.is_available() else "cpu")
