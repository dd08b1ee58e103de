"""The memory that a training step needs on a device: bytes by part, for a model and a batch."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PretrainedConfig
from transformers.pytorch_utils import Conv1D

from flame_composer.config.plan import PlanConfig
from flame_composer.config.sections import LoraConfig
from flame_composer.model.base import Base
from flame_composer.model.build import build_model
from flame_composer.model.lora import add_adapters, build_adapter
from flame_composer.model.muon import weights_in_blocks
from flame_composer.model.work import Work, count_parameters, count_trained, count_work
from flame_composer.plan.figures import Memory
from flame_composer.upstream.transformers import block_names


@dataclass(frozen=True)
class Device:
    """A kind of GPU, as its maker's data sheet describes it."""

    peak: float  # FLOP/s in bfloat16, without sparsity
    memory: int  # bytes


# From NVIDIA's data sheets, in TFLOPS: A100 (312); and with sparsity, which doubles the peak: H100
# (SXM 1979, PCIe 1513), H200 (1979), HGX B200 (36 PFLOPS for eight), L40S (733), L4 (242), A10
# (250). Of RTX cards from the whitepapers of their architectures, accumulating in fp32: RTX 4090
# (165.2), 5090 (209.5).
DEVICES = {
    "a100": Device(312e12, 80_000_000_000),
    "a100_40gb": Device(312e12, 40_000_000_000),
    "h100": Device(989e12, 80_000_000_000),
    "h100_pcie": Device(756e12, 80_000_000_000),
    "h200": Device(989e12, 141_000_000_000),
    "b200": Device(2250e12, 180_000_000_000),
    "l40s": Device(362e12, 48_000_000_000),
    "l4": Device(121e12, 24_000_000_000),
    "a10": Device(125e12, 24_000_000_000),
    "rtx4090": Device(165e12, 24_000_000_000),
    "rtx5090": Device(209.5e12, 32_000_000_000),
}

# Bytes of CUDA's context, libraries and communication buffers: assumed, not computed.
GPU_PROCESS = 1_500_000_000

CPU_PROCESS = 700_000_000  # bytes of Python with PyTorch, Composer and fla: measured

FILL = 0.9  # share of a device's memory that can be used; the rest is lost to fragmentation


@dataclass(frozen=True)
class Size:
    """The sizes of a model that follow from its modules, read without memory for its weights."""

    model_type: str
    parameters: int  # tied ones count once
    trained: int  # parameters
    work: Work  # for one token
    largest_block: int  # parameters
    in_blocks: int  # parameters
    for_muon: int  # parameters that the optimizer muon would keep one moment of, and not two
    kept: int  # values of one token that all blocks keep for the backward pass
    kept_in_largest: int  # values of one token that the largest block keeps
    hidden_size: int
    vocab_size: int
    fused_loss: bool  # the loss is fla's cross-entropy
    linear_loss: bool  # head and loss are computed together, for a part of the tokens at a time


def read_size(hf_config: PretrainedConfig, lora: LoraConfig | None = None) -> Size:
    """Return the sizes of the model that a config describes.

    `kept` is an estimate (docs/planning.md): it counts the inputs and outputs of every projection
    and the outputs of every norm. Raise InvalidField if the model lacks the targets of `lora`.
    """
    with torch.device("meta"):
        model: Any = build_model(hf_config)
        if lora is not None:
            add_adapters(model, build_adapter(lora, model, Base("", "")))
    names, matrices = block_names(model), weights_in_blocks(model)
    blocks = [module for module in model.modules() if type(module).__name__ in names]
    kept = [sum(map(_kept_by, block.modules())) for block in blocks] or [0]
    sizes = [count_parameters(block) for block in blocks] or [0]
    is_fla = type(model).__module__.startswith("fla.")
    shape = hf_config.get_text_config()
    return Size(
        model_type=hf_config.model_type,
        parameters=count_parameters(model),
        trained=count_trained(model),
        work=count_work(model),
        largest_block=max(sizes),
        in_blocks=sum(sizes),
        for_muon=sum(each.numel() for each in model.parameters() if id(each) in matrices),
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
    """Return the bytes used on each device, by part, at the peak of a training step, by formula.

    It is for a model whose steps torch cannot count here (`plan.step`).
    """
    is_cpu = config.device == "cpu"
    fsdp = config.parallelism.fsdp if is_sharded(config) else None
    world = config.devices * config.nodes
    replicas = (
        (fsdp.replicas or config.nodes) if fsdp and fsdp.sharding_strategy == "HYBRID_SHARD" else 1
    )
    shards = world // replicas if fsdp else 1
    width = 4 if is_cpu or config.precision == "fp32" else 2  # CPUs keep activations in fp32
    copy_width = 4 if fsdp and fsdp.mixed_precision == "FULL" else width
    outside = size.parameters - size.in_blocks
    if fsdp and shards > 1:
        # Gathered at once: everything, or what is outside the blocks and two of the blocks.
        all_at_once = fsdp.sharding_strategy == "SHARD_GRAD_OP"
        gathered = size.parameters if all_at_once else outside + 2 * size.largest_block
        copies = gathered * copy_width
    else:  # autocast keeps copies of its own
        copies = size.work.multiplied * width if width < 4 else 0
    gradients = 4 * size.trained // shards
    buffers = 0
    if shards > 1:
        buffers = size.largest_block * copy_width  # of a block, before they are sharded
    elif world > 1:
        buffers = gradients  # DistributedDataParallel copies them into buckets
    tokens = microbatch_size * config.context_length // config.parallelism.context
    kept = size.kept
    work = size.work
    if is_cpu and work.softmax_heads:
        # With a mask PyTorch computes attention step by step on a CPU. It keeps scaled queries and
        # keys, and the attention weights twice: before and after _safe_softmax sets rows that see
        # nothing to 0.
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
        buffers=buffers,
        optimizer=moments(config, size) // shards,
        activations=(tokens * kept + _gathered(config, size)) * width,
        logits=(
            tokens
            * size.vocab_size
            * _bytes_per_logit(size, is_cpu, width)
            // (8 if size.linear_loss else 1)
        ),
        process=process_memory(config),
        counted=False,
    )


def _gathered(config: PlanConfig, size: Size) -> int:
    """Return how many keys and values of a whole row, gathered, softmax layers keep."""
    if config.parallelism.context == 1:
        return 0
    width = size.work.softmax_heads * size.work.head_dim
    return 2 * size.work.num_blocks * width * config.context_length


def moments(config: PlanConfig, size: Size) -> int:
    """Return the bytes of the optimizer's moments, in fp32: of most weights two, of Muon's one."""
    return 8 * size.trained - (4 * size.for_muon if config.optimizer.name == "muon" else 0)


def is_sharded(config: PlanConfig) -> bool:
    """Return whether FSDP2 shards the model on these devices."""
    on_cpu = config.device == "cpu" and not config.parallelism.cpu_fsdp
    return config.parallelism.fsdp is not None and not on_cpu


def process_memory(config: PlanConfig) -> int:
    """Return the bytes that a process takes beside tensors: a constant for each kind of device."""
    return CPU_PROCESS if config.device == "cpu" else GPU_PROCESS


def _bytes_per_logit(size: Size, is_cpu: bool, width: int) -> int:
    """Return the bytes of all copies of a logit that the loss keeps at its peak.

    In fp32 there are four copies. In half precision there are the logits, their gradient and fp32
    copies in between; fla's kernel needs only three in half precision.
    """
    if is_cpu or width == 4:
        return 16
    return 3 * width if size.fused_loss else 2 * width + 10


def device_memory(config: PlanConfig) -> int:
    """Return the memory of one device in bytes; on CPUs, one process's share of this machine's."""
    if config.device == "cpu":
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // config.devices
    return DEVICES[config.device].memory
