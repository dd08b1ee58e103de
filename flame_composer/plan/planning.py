"""What a training run comes to before it is started: size, steps, memory, time, cost,
checkpoints, preemption, and warnings.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from typing import Any

import torch
from streaming.base.util import bytes_to_int
from transformers import PretrainedConfig
from transformers.pytorch_utils import Conv1D

from flame_composer.config.use import PlanConfig
from flame_composer.errors import ConfigError, InvalidField, one_line
from flame_composer.model.causal_lm import (
    Work,
    build_hf_config,
    build_model,
    count_work,
    read_pretrained_config,
)
from flame_composer.plan.supply import Supply
from flame_composer.text.tokenizer import load_tokenizer


@dataclass(frozen=True)
class Device:
    """FLOPs a second in bfloat16 without sparsity, and bytes of memory, as the maker's data
    sheet has them.
    """

    peak: float
    memory: int


# NVIDIA's data sheets, which state most peaks with sparsity, twice these: A100 (312), H100 (SXM
# 1979, PCIe 1513), H200 (1979), HGX B200 (36 PFLOPS for eight), L40S (733), L4 (242); RTX 4090: the
# Ada architecture's whitepaper (165.2, fp32 accumulate).
DEVICES = {
    "a100": Device(312e12, 80_000_000_000),
    "a100_40gb": Device(312e12, 40_000_000_000),
    "h100": Device(989e12, 80_000_000_000),
    "h100_pcie": Device(756e12, 80_000_000_000),
    "h200": Device(989e12, 141_000_000_000),
    "b200": Device(2250e12, 180_000_000_000),
    "l40s": Device(362e12, 48_000_000_000),
    "l4": Device(121e12, 24_000_000_000),
    "rtx4090": Device(165e12, 24_000_000_000),
}
# CUDA's context, libraries and communication buffers: stated, not computed
GPU_PROCESS = 1_500_000_000
CPU_PROCESS = 700_000_000  # the interpreter with PyTorch, Composer and fla: measured
FILL = 0.9  # of a device's memory; the rest is lost between blocks of memory
CHECKPOINT_BYTES = 12  # a parameter: itself and AdamW's two moments, in fp32
MAX_EPOCHS = 4  # Muennighoff et al. 2023: up to there repeated text is nearly as good as new
MAX_WARMUP = 0.1


@dataclass(frozen=True)
class Size:
    """Of a model: what follows from its modules, read from one without memory for its weights."""

    parameters: int  # those that are tied count once
    work: Work  # of a token
    largest_block: int  # parameters
    in_blocks: int  # parameters
    kept: int  # values that a token leaves in all blocks until the backward pass
    kept_in_largest: int
    hidden_size: int
    vocab_size: int
    fused_loss: bool  # fla's cross-entropy
    linear_loss: bool  # computed together with the head, a part of the tokens at a time


def read_size(hf_config: PretrainedConfig) -> Size:
    """`kept` counts what every projection takes and gives and every norm gives: an estimate, see
    docs/planning.md.
    """
    with torch.device("meta"):
        model: Any = build_model(hf_config)
    names = set(model._no_split_modules or ())
    blocks = [module for module in model.modules() if type(module).__name__ in names]
    kept = [sum(map(_kept_by, block.modules())) for block in blocks] or [0]
    sizes = [_count(block) for block in blocks] or [0]
    is_fla = type(model).__module__.startswith("fla.")
    shape = hf_config.get_text_config()
    return Size(
        parameters=_count(model),
        work=count_work(model),
        largest_block=max(sizes),
        in_blocks=sum(sizes),
        kept=sum(kept),
        kept_in_largest=max(kept),
        hidden_size=shape.hidden_size,
        vocab_size=shape.vocab_size,
        fused_loss=is_fla and getattr(shape, "fuse_cross_entropy", False),
        linear_loss=is_fla and getattr(shape, "fuse_linear_cross_entropy", False),
    )


def _count(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _kept_by(module: torch.nn.Module) -> int:
    if isinstance(module, torch.nn.Linear):
        return module.in_features + module.out_features
    if isinstance(module, Conv1D):  # GPT-2's projections
        return sum(module.weight.shape)
    weight = getattr(module, "weight", None)
    return weight.numel() if weight is not None and "Norm" in type(module).__name__ else 0


def find_hf_config(config: PlanConfig, supply: Supply | None) -> PretrainedConfig:
    """The model's config, with the tokenizer's vocabulary where it has none; the tokenizer is
    read only if it must be.
    """
    keys = dict(config.model.config)
    if "model_type" not in keys:
        source = config.model.pretrained
        assert source is not None
        try:
            return read_pretrained_config(source)
        except ConfigError as error:
            raise ConfigError(
                f"model.pretrained={source}: its config cannot be read: {one_line(error)}; give "
                "model.config"
            ) from None
    tokenizer = None
    if "vocab_size" not in keys and supply is not None and supply.vocab_size is not None:
        keys["vocab_size"] = supply.vocab_size
    elif "vocab_size" not in keys:
        tokenizer = load_tokenizer(config.tokenizer)
    return build_hf_config(keys, tokenizer, config.context_length, to_run=False)


def memory(config: PlanConfig, size: Size, microbatch_size: int) -> dict[str, int]:
    """Bytes on each device by part, at their peak together: in the backward pass of the loss."""
    is_cpu = config.device == "cpu"
    fsdp = config.parallelism.fsdp if not is_cpu or config.parallelism.cpu_fsdp else None
    world = config.devices * config.nodes
    replicas = (
        (fsdp.replicas or config.nodes) if fsdp and fsdp.sharding_strategy == "HYBRID_SHARD" else 1
    )
    shards = world // replicas if fsdp else 1
    width = 4 if config.precision == "fp32" else 2
    copy_width = 4 if fsdp and fsdp.mixed_precision == "FULL" else width
    outside = size.parameters - size.in_blocks
    if fsdp and shards > 1:  # what is gathered: all, or what is in no block, and two blocks
        all_at_once = fsdp.sharding_strategy == "SHARD_GRAD_OP"
        gathered = size.parameters if all_at_once else outside + 2 * size.largest_block
        copies = gathered * copy_width
    else:  # autocast's own
        copies = size.work.multiplied * width if width < 4 else 0
    gradients = 4 * size.parameters // shards
    if shards > 1:
        gradients += size.largest_block * copy_width  # before it is spread
    elif world > 1:
        gradients *= 2  # DistributedDataParallel's buckets
    tokens = microbatch_size * config.context_length
    kept = size.kept
    work = size.work
    if is_cpu and work.softmax_heads:  # where a mask makes PyTorch compute attention step by step
        # Weights of attention before and after rows that see nothing are set to 0 (_safe_softmax),
        # scaled queries and keys.
        kept += (
            work.num_blocks * work.softmax_heads * (2 * config.context_length + 2 * work.head_dim)
        )
    largest = kept * size.kept_in_largest // max(size.kept, 1)
    if config.parallelism.activation_cpu_offload:
        kept = largest
    elif config.parallelism.activation_checkpointing:
        kept = work.num_blocks * size.hidden_size + largest
    return {
        "weights": 4 * size.parameters // shards,
        "copies for computing": copies,
        "gradients": gradients,
        "optimizer": 8 * size.parameters // shards,
        "activations": tokens * kept * width,
        "logits and loss": (
            tokens
            * size.vocab_size
            * _bytes_per_logit(size, is_cpu, width)
            // (8 if size.linear_loss else 1)
        ),
        "process": CPU_PROCESS if is_cpu else GPU_PROCESS,
    }


def _bytes_per_logit(size: Size, is_cpu: bool, width: int) -> int:
    """Four copies in fp32; in half precision the logits, their gradient and two in fp32 between;
    fla's kernel needs three.
    """
    if is_cpu or width == 4:
        return 16
    return 3 * width if size.fused_loss else 2 * width + 10


def largest_microbatch(config: PlanConfig, size: Size) -> int | None:
    """Rows at a time that fit, of the numbers that divide a device's share of the batch; None if
    not even one does.
    """
    batch, world = config.global_batch_size, config.devices * config.nodes
    divide = [rows for rows in range(1, batch // world + 1) if batch % (world * rows) == 0]
    there = FILL * device_memory(config)
    return max(
        (rows for rows in divide if sum(memory(config, size, rows).values()) <= there), default=None
    )


def device_memory(config: PlanConfig) -> int:
    if config.device == "cpu":
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // config.devices
    return DEVICES[config.device].memory


def best_interval(save: float, between: float) -> float:
    """Seconds of training between checkpoints that lose the least: Daly 2006, equation 37; about
    sqrt(2 x save x between).

    `save` is what a checkpoint takes, `between` the mean time between interruptions.
    """
    if save >= 2 * between:
        return between
    x = save / (2 * between)
    return math.sqrt(2 * save * between) * (1 + math.sqrt(x) / 3 + x / 9) - save


def goodput(interval: float, save: float, restart: float, between: float) -> float:
    """The share of time that counts when a run is killed at random: Daly 2006, equation 20."""
    exponent = (restart + interval + save) / between
    if exponent > 500:
        return 0.0
    return interval / (
        between * math.exp(restart / between) * math.expm1((interval + save) / between)
    )


def goodput_with_notice(interval: float, save: float, restart: float, between: float) -> float:
    """The share where each interruption is announced, so that it costs a save and the restart,
    and nothing is lost.
    """
    return interval / (interval + save) * between / (between + save + restart)


def draw_up(config: PlanConfig, size: Size, supply: Supply | None) -> dict[str, Any]:
    """All figures of the run; bytes, seconds, tokens. Raises InvalidField for a run in epochs of
    a dataset nobody knows.
    """
    epoch = supply.batches_per_epoch if supply else None
    steps = config.in_batches(config.max_duration, epoch)
    if steps is None:
        raise InvalidField(
            "max_duration", "is in epochs, and the dataset cannot be read; give dataset_tokens"
        )
    world = config.devices * config.nodes
    tokens_per_step = config.global_batch_size * config.context_length
    flops = size.work.flops_per_token(config.context_length)
    fits = largest_microbatch(config, size)
    microbatch = config.microbatch_size if isinstance(config.microbatch_size, int) else fits or 1
    parts = memory(config, size, microbatch)
    plan: dict[str, Any] = {
        "run_name": config.run_name,
        "devices": config.devices,
        "nodes": config.nodes,
        "device": config.device,
        "parameters": size.parameters,
        "multiplied_parameters": size.work.multiplied,
        "microbatch_size": microbatch,
        "accumulation_steps": math.ceil(config.global_batch_size / (world * microbatch)),
        "largest_microbatch_size": fits,
        "tokens_per_step": tokens_per_step,
        "steps": steps,
        "tokens": steps * tokens_per_step,
        "tokens_per_parameter": steps * tokens_per_step / size.parameters,
        "flops_per_token": flops,
        "flops": flops * steps * tokens_per_step,
        "memory": {"parts": parts, "total": sum(parts.values()), "device": device_memory(config)},
        "warmup_steps": config.in_batches(config.scheduler.warmup, epoch, steps),
        "data": None if supply is None else _data(config, supply, steps),
    }
    plan["time"] = _time(config, plan)
    plan["checkpoints"] = _checkpoints(config, plan, epoch)
    plan["preemption"] = _preemption(config, plan)
    plan["warnings"] = warnings(config, plan)
    return plan


def _data(config: PlanConfig, supply: Supply, steps: int) -> dict[str, Any]:
    epochs = steps / supply.batches_per_epoch
    limit = (
        None
        if config.train_data.cache_limit is None
        else bytes_to_int(config.train_data.cache_limit)
    )
    # Then every epoch fetches all that it reads
    again = limit is not None and limit < supply.read_by_a_node
    read = supply.read_by_a_node * (epochs if again else min(1.0, epochs))
    return {
        "tokens": supply.tokens,
        "bytes": supply.bytes,
        "steps_per_epoch": supply.batches_per_epoch,
        "epochs": epochs,
        "context_length": supply.context_length,
        "read_by_a_node_an_epoch": supply.read_by_a_node,
        "downloaded_by_a_node": round(read) if supply.is_remote else 0,
        "smallest_cache": supply.smallest_cache,
        "cache_limit": limit,
    }


def _time(config: PlanConfig, plan: dict[str, Any]) -> dict[str, Any] | None:
    world = config.devices * config.nodes
    speed = config.tokens_per_second
    if speed is None:
        if config.device == "cpu":
            return None
        speed = DEVICES[config.device].peak * config.mfu * world / plan["flops_per_token"]
    training = plan["tokens"] / speed
    cost = (
        None if config.price_per_hour is None else training / 3600 * world * config.price_per_hour
    )
    return {
        "tokens_per_second": speed,
        "seconds_per_step": plan["tokens_per_step"] / speed,
        "seconds": training,
        "cost": cost,
    }


def _checkpoints(
    config: PlanConfig, plan: dict[str, Any], epoch: int | None
) -> dict[str, Any] | None:
    if config.save_folder is None:
        return None
    size = CHECKPOINT_BYTES * plan["parameters"]
    seconds = config.save_seconds or size / bytes_to_int(config.save_bandwidth)
    times = config.plan(epoch or 1)
    every: float | None = times.save_batches
    if times.save_seconds is not None:
        every = times.save_seconds / plan["time"]["seconds_per_step"] if plan["time"] else None
    number = None if every is None else math.ceil(plan["steps"] / max(every, 1))
    keep = config.save_num_checkpoints_to_keep
    kept = number if keep == -1 else keep if number is None else min(keep, number)
    return {
        "bytes": size,
        "save_seconds": seconds,
        "every_steps": every,
        "number": number,
        "bytes_kept": None if kept is None else kept * size,
    }


def _preemption(config: PlanConfig, plan: dict[str, Any]) -> dict[str, Any] | None:
    if config.preemption_hours is None or plan["time"] is None or plan["checkpoints"] is None:
        return None
    between, restart = 3600 * config.preemption_hours, 60 * config.restart_minutes
    save, step = plan["checkpoints"]["save_seconds"], plan["time"]["seconds_per_step"]
    best = best_interval(save, between)
    every = plan["checkpoints"]["every_steps"]
    return {
        "best_save_interval": f"{max(1, round(best / step))}ba",
        "best_save_seconds": best,
        "goodput": goodput(best, save, restart, between),
        "goodput_as_configured": (
            None if every is None else goodput(every * step, save, restart, between)
        ),
        "goodput_with_notice": goodput_with_notice(best, save, restart, between),
    }


def warnings(config: PlanConfig, plan: dict[str, Any]) -> list[str]:
    """What people get wrong, a line each."""
    found = []
    total, there = plan["memory"]["total"], plan["memory"]["device"]
    if total > FILL * there:
        rows = plan["largest_microbatch_size"]
        more = ["take more or larger devices"]
        if not config.parallelism.activation_checkpointing:
            more.insert(0, "set parallelism.activation_checkpointing=true")
        if config.parallelism.fsdp is None:
            more.insert(0, "spread the model with parallelism.fsdp")
        remedy = (
            f"microbatch_size={rows} fits"
            if rows
            else f"not even one row does: {', or '.join(more)}"
        )
        found.append(
            f"{gigabytes(total)} do not fit into {gigabytes(there)} a device, of which a tenth"
            " should stay free: " + remedy
        )
    share = plan["warmup_steps"] / plan["steps"] if plan["warmup_steps"] is not None else 0
    if share > MAX_WARMUP:
        found.append(
            f"scheduler.warmup={config.scheduler.warmup} is {share:.0%} of the run; more than"
            f" {MAX_WARMUP:.0%} is seldom meant"
        )
    if config.device != "cpu" and config.precision == "fp32":
        found.append(
            "precision=fp32: the peak that time and cost go by is bfloat16's; set"
            " precision=amp_bf16"
        )
    if config.device == "cpu" and config.precision != "fp32":
        found.append(f"precision={config.precision}: CPUs compute in fp32; training refuses it")
    if plan["data"] is not None:
        found += _data_warnings(config, plan["data"])
    checkpoints, preemption = plan["checkpoints"], plan["preemption"]
    if checkpoints and checkpoints["every_steps"] and plan["time"]:
        step = plan["time"]["seconds_per_step"]
        spent = checkpoints["save_seconds"] / (
            checkpoints["save_seconds"] + checkpoints["every_steps"] * step
        )
        if spent > 0.05:
            found.append(
                f"save_interval={config.save_interval}: saving takes {spent:.0%} of the time; save"
                " less often"
            )
    if checkpoints is None and config.preemption_hours is not None:
        found.append("save_folder=null: a run that is interrupted starts from the beginning")
    if (
        preemption
        and preemption["goodput_as_configured"] is not None
        and preemption["goodput_as_configured"] < preemption["goodput"] - 0.01
    ):
        found.append(
            f"save_interval={config.save_interval}: {preemption['goodput_as_configured']:.1%} of"
            f" the time counts when killed every {config.preemption_hours:g} hours; with"
            f" {preemption['best_save_interval']} {preemption['goodput']:.1%} does"
        )
    return found


def _data_warnings(config: PlanConfig, data: dict[str, Any]) -> list[str]:
    found = []
    if data["context_length"] != config.context_length:
        found.append(
            f"context_length={config.context_length}: the dataset's rows are"
            f" {data['context_length']} tokens long; training refuses it"
        )
    if data["epochs"] > MAX_EPOCHS:
        found.append(
            f"{data['epochs']:.1f} epochs: text that is repeated more than {MAX_EPOCHS} times"
            " teaches less and less (Muennighoff et al. 2023)"
        )
    if data["cache_limit"] is not None and data["cache_limit"] < data["smallest_cache"]:
        found.append(
            f"train_data.cache_limit={config.train_data.cache_limit}:"
            f" {gigabytes(data['smallest_cache'])} are in use at once; training refuses it; raise"
            " it, or lower train_data.shuffle_block_size"
        )
    if (
        config.nodes > 1
        and config.train_data.num_canonical_nodes % config.nodes
        and data["downloaded_by_a_node"]
    ):
        found.append(
            f"train_data.num_canonical_nodes={config.train_data.num_canonical_nodes}: every node"
            f" downloads nearly all of the data; with {config.nodes} each downloads its share"
        )
    return found


def gigabytes(count: float) -> str:
    for unit, scale in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if count >= scale:
            return (
                f"{count / scale:.3g} {unit}"
                if count < 1e3 * scale
                else f"{count / scale:,.0f} {unit}"
            )
    return f"{count / 1e3:.3g} kB" if count else "0"
