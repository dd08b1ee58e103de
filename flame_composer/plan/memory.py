"""What a training step takes of a device: the bytes of each part, by the model and the batch."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PretrainedConfig
from transformers.pytorch_utils import Conv1D

from flame_composer.config.plan import PlanConfig
from flame_composer.model.build import build_model
from flame_composer.model.work import Work, count_parameters, count_work
from flame_composer.plan.figures import Memory


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
    sizes = [count_parameters(block) for block in blocks] or [0]
    is_fla = type(model).__module__.startswith("fla.")
    shape = hf_config.get_text_config()
    return Size(
        parameters=count_parameters(model),
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


def _kept_by(module: torch.nn.Module) -> int:
    if isinstance(module, torch.nn.Linear):
        return module.in_features + module.out_features
    if isinstance(module, Conv1D):  # GPT-2's projections
        return sum(module.weight.shape)
    weight = getattr(module, "weight", None)
    return weight.numel() if weight is not None and "Norm" in type(module).__name__ else 0


def memory(config: PlanConfig, size: Size, microbatch_size: int) -> Memory:
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
    return Memory(
        weights=4 * size.parameters // shards,
        copies=copies,
        gradients=gradients,
        optimizer=8 * size.parameters // shards,
        activations=tokens * kept * width,
        logits=(
            tokens
            * size.vocab_size
            * _bytes_per_logit(size, is_cpu, width)
            // (8 if size.linear_loss else 1)
        ),
        process=CPU_PROCESS if is_cpu else GPU_PROCESS,
    )


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
    return max((rows for rows in divide if memory(config, size, rows).total <= there), default=None)


def device_memory(config: PlanConfig) -> int:
    if config.device == "cpu":
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // config.devices
    return DEVICES[config.device].memory
