"""A step of a run without memory or devices, in which nothing is computed, and its memory.

The run's own model, optimizer and strategy take steps on tensors that have a shape but no content.
torch's `FSDPMemTracker` and `MemTracker` count what is alive at every moment.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from composer.core import Precision
from composer.distributed.fsdp2 import prepare_fully_shard
from composer.distributed.fsdp2_utils import generate_composer_model_policy
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.testing._internal.distributed.fake_pg import FakeStore
from transformers import PretrainedConfig

from flame_composer.batch import IGNORE
from flame_composer.config.plan import PlanConfig
from flame_composer.cpu.launches import code_for_gpus
from flame_composer.model.base import Base
from flame_composer.model.build import build_model
from flame_composer.model.causal_lm import CausalLM
from flame_composer.model.lora import add_adapters, build_adapter
from flame_composer.model.optimizer import build_optimizer
from flame_composer.model.sharding import recompute_blocks, sharding_of
from flame_composer.model.tensor import DATA, TENSOR, divide, mesh_of, require_even_parts
from flame_composer.plan.figures import Memory
from flame_composer.plan.kernels import GPUS
from flame_composer.plan.memory import is_sharded, process_memory
from flame_composer.upstream.books import COPIES, LOGITS, Books, ShardedBooks
from flame_composer.upstream.fakes import (
    Fakes,
    attention_as_on_gpus,
    autocast_as_on_gpus,
    fakes_as_on_gpus,
    offloading_as_on_gpus,
    recomputing_of_fakes,
)
from flame_composer.upstream.fsdp import average_on_cpus, replicate_on_cpus
from flame_composer.upstream.triton import without_launches

# Tokens of a document, no multiple of the kernels' chunks: each document ends in a short one.
DOCUMENT = 500
AUTOCAST = {"amp_bf16": torch.bfloat16, "amp_fp16": torch.float16}

# The part of the memory that each kind of torch's books belongs to; all others are activations.
PARTS = {
    "Parameter": "weights",
    "Buffer": "weights",
    "Sharded Param": "weights",
    "Unsharded Param": "copies",
    "All Gather": "copies",
    COPIES: "copies",
    "Gradient": "gradients",
    "Sharded Grad": "gradients",
    "Unsharded Grad": "gradients",
    "Reduce Scatter": "buffers",
    "Optstate": "optimizer",
    "OptState": "optimizer",
    LOGITS: "logits",
}


def count_step(config: PlanConfig, hf_config: PretrainedConfig, rows: int) -> Memory:
    """Return the bytes on each device, by part, at the peak of a step with `rows` rows at a time.

    The process must be one that trains nothing (`plan.child`). Raise whatever the model raises if
    it cannot run without a GPU, and ValueError if fla's activations are offloaded: its functions
    then seem to keep them.
    """
    if config.parallelism.activation_cpu_offload and type(hf_config).__module__.startswith("fla."):
        raise ValueError("what a model of fla offloads cannot be told from what it keeps")
    with as_on_device(config) as fakes, without_launches():
        model = build_for_run(config, hf_config, fakes)
        batch = make_batch(rows, config.context_length)
        with fakes:
            optimizer = build_optimizer(model, config.optimizer, config.model.mup_base_width)
            books = ShardedBooks(model.model, optimizer) if is_sharded(config) else Books()
            books.vocab_size = model.config.get_text_config().vocab_size
            if isinstance(books, Books):
                books.track_external(model)
            with books:
                _make_state(model, optimizer)
                _train(config, books, model, optimizer, batch)
            peak = books.peak
    return _memory(config, model, peak)


@contextmanager
def as_on_device(config: PlanConfig) -> Iterator[Fakes]:
    """Make models run in the body as on the devices of the run, on the fake tensors of the mode.

    Kernels are launched, which the caller has to see to. There is a process group, with ranks that
    do not exist.
    """
    with ExitStack() as stack:
        # The trackers warn of every module that recomputation hides from them, torch of operations
        # that are replaced.
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        if config.device != "cpu":
            stack.enter_context(code_for_gpus(GPUS[config.device].shared_memory))
            stack.enter_context(fakes_as_on_gpus())
            stack.enter_context(autocast_as_on_gpus())
            stack.enter_context(attention_as_on_gpus())
            stack.enter_context(offloading_as_on_gpus())
        stack.enter_context(_ranks(config.devices * config.nodes))
        stack.enter_context(recomputing_of_fakes())
        yield Fakes()


@contextmanager
def _ranks(number: int) -> Iterator[None]:
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=number)
    try:
        yield
    finally:
        dist.destroy_process_group()


def make_batch(rows: int, context_length: int) -> dict[str, torch.Tensor]:
    """Return a batch as `flame_composer.batch.collate` makes it, of real tensors."""
    input_ids = torch.ones(rows, context_length, dtype=torch.int64)
    labels = input_ids.clone()
    labels[:, 0] = IGNORE
    document = torch.arange(context_length).div(DOCUMENT, rounding_mode="floor")
    return {
        "input_ids": input_ids,
        "labels": labels,
        "sequence_id": document.expand(rows, -1).contiguous(),
    }


def build_inner(config: PlanConfig, hf_config: PretrainedConfig, fakes: Fakes) -> Any:
    """Return the Hugging Face model of the run, with its adapters, whose weights are fakes."""
    with fakes:
        inner: Any = build_model(hf_config)
        if config.lora is not None:
            add_adapters(inner, build_adapter(config.lora, inner, Base("", "")))
    return inner


def build_for_run(config: PlanConfig, hf_config: PretrainedConfig, fakes: Fakes) -> CausalLM:
    """Return the model as the run trains it: wrapped, sharded and recomputed."""
    tokenizer: Any = None  # it is not asked for anything
    inner = build_inner(config, hf_config, fakes)
    tensor, devices = config.parallelism.tensor, config.devices * config.nodes
    if tensor > 1:
        require_even_parts(inner, tensor=tensor, devices=devices)
    model = CausalLM(inner, tokenizer, varlen=config.varlen, z_loss=config.z_loss)
    if config.lora is not None:
        # Blocks that `recomputing_of_fakes` recomputes have gradients only if their input has one.
        inner.enable_input_require_grads()
    recompute_blocks(model, config.parallelism)
    model.train()
    if is_sharded(config):
        _shard(config, model, fakes)
    return model


def _shard(config: PlanConfig, model: CausalLM, fakes: Fakes) -> None:
    """Shard the model as Composer does, over ranks of which only this one exists."""
    assert config.parallelism.fsdp is not None
    average_on_cpus()
    replicate_on_cpus()
    sharding = sharding_of(config.parallelism.fsdp, num_nodes=config.nodes)
    world, replicas = config.devices * config.nodes, sharding.replicas
    tensor = config.parallelism.tensor
    shape = (world,) if replicas is None else (replicas, world // replicas)
    names = ("replicate", "shard")[-len(shape) :]
    whole = init_device_mesh("cpu", shape, mesh_dim_names=names)
    mesh = whole if tensor == 1 else mesh_of(tensor, "cpu")
    policy = generate_composer_model_policy(model)
    with fakes:
        if tensor > 1:
            divide(model, mesh[TENSOR])
            mesh = mesh[DATA]
        sharding.device_mesh = mesh
        prepare_fully_shard(model, sharding, Precision(config.precision), policy)


def _make_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Make the state that the optimizer has from the first step on."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def _train(
    config: PlanConfig,
    books: Books | ShardedBooks,
    model: CausalLM,
    optimizer: torch.optim.Optimizer,
    batch: dict[str, torch.Tensor],
) -> None:
    """Train on two microbatches as Composer does, of one step if it accumulates, else of two.

    As with Composer, the outputs of one are alive until those of the next take their place.
    """
    rows = batch["input_ids"].shape[0]
    accumulates = config.global_batch_size > rows * config.places
    for _ in range(2):
        _outputs, loss = forward(config, model, batch)
        (loss * 1.0).backward()
        if not accumulates:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        books.reset_mod_stats()
    optimizer.step()


def forward(
    config: PlanConfig, model: CausalLM, batch: dict[str, torch.Tensor]
) -> tuple[Any, torch.Tensor]:
    """Return the outputs and the loss of a batch, in the precision of the run."""
    # On CPUs all but the products of linear layers stays fp32 (`cpu.linear.use_bf16`)
    dtype = None if config.device == "cpu" else AUTOCAST.get(config.precision)
    with torch.autocast("cpu", dtype=dtype) if dtype else nullcontext():
        outputs = model(batch)
        return outputs, model.loss(outputs, batch)


def _memory(config: PlanConfig, model: nn.Module, peak: dict[str, int]) -> Memory:
    parts = dict.fromkeys(
        ("weights", "copies", "gradients", "buffers", "optimizer", "activations", "logits"), 0
    )
    for kind, count in peak.items():
        if kind != "Total":
            parts[PARTS.get(kind, "activations")] += count
    if not is_sharded(config) and config.devices * config.nodes > 1:
        # DistributedDataParallel copies all gradients into buckets, which it makes out of sight.
        parts["buffers"] += sum(
            each.numel() * each.element_size() for each in model.parameters() if each.requires_grad
        )
    return Memory(**parts, process=process_memory(config), counted=True)
