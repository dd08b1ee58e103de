"""Tensor parallelism: the heads and hidden channels of each layer, divided over a group of ranks.

As in Megatron-LM (Shoeybi et al. 2019, arXiv:1909.08053): the first projections of a layer are
divided by their output channels, its last one by its input channels. A layer's input is the same
on all ranks of the group, and so is its output, a sum over the group. Backwards, the gradient of
the input is the sum. What is not in LAYERS is computed by every rank of the group.

Parameters are DTensors over the group, which FSDP2 shards further, over the other axis of a mesh.
Layers compute with the local parts, plain tensors, so that every kernel takes them.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import (
    DTensor,
    Partial,
    Placement,
    Replicate,
    Shard,
)
from transformers import PreTrainedModel

from flame_composer.errors import InvalidField

DATA, TENSOR = "data", "tensor"
"""The axes of a run's mesh; ranks along `tensor` are consecutive and share their rows."""


class Layer(NamedTuple):
    """How a layer is divided: names of modules and parameters in it, which it may lack."""

    columns: tuple[str, ...]
    """Modules whose weights and biases are divided by output channels."""
    rows: tuple[str, ...]
    """Linear layers whose weights are divided by input channels, and whose outputs are summed."""
    by_head: tuple[str, ...] = ()
    """Small parameters, a row for each head, which every rank has whole; it uses its heads'."""
    sizes: tuple[str, ...] = ()
    """Numbers of heads or channels that the layer computes with."""


_CONVOLUTIONS = ("q_conv1d", "k_conv1d", "v_conv1d")
_MLP = Layer(columns=("gate_proj", "up_proj"), rows=("down_proj",))

LAYERS: Mapping[str, Layer] = MappingProxyType(
    {
        "GatedLinearAttention": Layer(
            columns=("q_proj", "k_proj", "v_proj", "g_proj", "gk_proj.1", *_CONVOLUTIONS),
            rows=("o_proj",),
            sizes=("num_heads", "num_kv_heads", "key_dim", "value_dim"),
        ),
        "GatedDeltaNet": Layer(
            columns=("q_proj", "k_proj", "v_proj", "g_proj", *_CONVOLUTIONS),
            rows=("o_proj",),
            by_head=("a_proj.weight", "b_proj.weight", "A_log", "dt_bias"),
            sizes=("num_heads", "num_v_heads", "key_dim", "value_dim"),
        ),
        "Attention": Layer(columns=("q_proj", "k_proj", "v_proj"), rows=("o_proj",)),  # fla's
        "LlamaAttention": Layer(columns=("q_proj", "k_proj", "v_proj"), rows=("o_proj",)),
        "GatedMLP": _MLP,
        "LlamaMLP": _MLP,
    }
)
HEADS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "gla": ("num_heads", "num_kv_heads"),
        "gated_deltanet": ("num_heads", "num_v_heads"),
        "llama": ("num_attention_heads", "num_key_value_heads"),
        "transformer": ("num_heads", "num_kv_heads"),
    }
)
"""The model types that can be divided, and what in their configs counts heads."""


def require_even_parts(model: PreTrainedModel, *, tensor: int, devices: int) -> None:
    """Raise InvalidField unless the model can be divided over groups of `tensor` ranks.

    `devices` is the number of all ranks: FSDP2 divides the rows of each rank's part further, and
    cannot divide them unevenly.
    """
    hf_config, key = model.config, "parallelism.tensor"
    if hf_config.model_type not in HEADS:
        known = ", ".join(HEADS)
        raise InvalidField(key, f"must be 1 with a {hf_config.model_type} model; it is for {known}")
    counts = {name: getattr(hf_config, name, None) for name in HEADS[hf_config.model_type]}
    hybrid = getattr(hf_config, "attn", None) or {}  # its layers of softmax attention
    counts |= {f"attn.{name}": hybrid.get(name) for name in ("num_heads", "num_kv_heads")}
    for name, heads in counts.items():
        if heads is not None and heads % tensor:
            raise InvalidField(key, f"must divide model.config.{name}={heads}")
    for name in ("attention_bias", "mlp_bias", "attnres_block_size"):
        if getattr(hf_config, name, None):
            raise InvalidField(key, f"must be 1 with model.config.{name}")
    for name, layer in model.named_modules():
        plan = LAYERS.get(type(layer).__name__)
        for path in plan.columns if plan else ():
            for parameter in _module(layer, path).parameters():
                if len(parameter) % devices:
                    raise InvalidField(
                        key,
                        f"cannot divide {name}.{path}, whose {len(parameter)} output channels are"
                        f" not a multiple of the {devices} devices",
                    )
        for path in plan.rows if plan else ():
            channels = layer.get_submodule(path).weight.shape[1]  # type: ignore[union-attr]
            if channels % tensor:
                raise InvalidField(
                    key, f"must divide the {channels} input channels of {name}.{path}"
                )


def split(model: nn.Module, *, tensor: int) -> DeviceMesh:
    """Divide a model over groups of `tensor` consecutive ranks; return the mesh of the other axis.

    FSDP2 is to shard the model over that. Every rank must call this. Weights need not be the same
    on all ranks, and may be on the meta device: each rank keeps a part of its own.
    """
    mesh = mesh_of(tensor, "cuda" if torch.cuda.is_available() else "cpu")
    divide(model, mesh[TENSOR])
    return mesh[DATA]


def mesh_of(tensor: int, device: str) -> DeviceMesh:
    """Return all ranks as a mesh with the axes DATA and TENSOR; every rank must call this."""
    shape = (torch.distributed.get_world_size() // tensor, tensor)
    return init_device_mesh(device, shape, mesh_dim_names=(DATA, TENSOR))


class _Use(NamedTuple):
    """How a parameter is placed on a group, and what of it a layer computes with."""

    placement: Placement = Replicate()
    is_partial: bool = False  # its gradient on a rank is that of the rank's heads only
    by_head: bool = False


def divide(model: nn.Module, mesh: DeviceMesh) -> None:
    """Divide a model over the ranks of a one-dimensional mesh."""
    uses: dict[tuple[int, str], _Use] = {}
    for layer in list(model.modules()):
        plan = LAYERS.get(type(layer).__name__)
        if plan is not None:
            uses |= _uses(layer, plan)
            _connect(layer, plan, mesh)
    made: dict[int, nn.Parameter] = {}  # by the ids of those they take the place of: some are tied
    before = list(model.parameters())  # alive, so that no id is given twice
    for module in list(model.modules()):
        own: dict[str, _Use] = {}
        for name, parameter in list(module.named_parameters(recurse=False)):
            own[name] = use = uses.get((id(module), name), _Use())
            if id(parameter) not in made:
                made[id(parameter)] = _placed(parameter, mesh, use.placement)
            module._parameters[name] = made[id(parameter)]
        if own:
            rank, size = mesh.get_local_rank(), mesh.size()
            kind: Any = type(module)
            module.__class__ = _with_local(kind, tuple(own.items()), rank, size)
    del before


def _uses(layer: nn.Module, plan: Layer) -> dict[tuple[int, str], _Use]:
    """Return the uses of a divided layer's parameters, by the id of the module and the name."""
    uses = {
        (id(module), name): _Use(is_partial=True)
        for module in layer.modules()
        for name, _ in module.named_parameters(recurse=False)
    }
    for path in plan.columns:
        module = _module(layer, path)
        uses |= {(id(module), name): _Use(Shard(0)) for name, _ in module.named_parameters()}
    for path in plan.rows:
        uses[id(layer.get_submodule(path)), "weight"] = _Use(Shard(1))
    for path in plan.by_head:
        owner, _, name = path.rpartition(".")
        uses[id(layer.get_submodule(owner)), name] = _Use(is_partial=True, by_head=True)
    return uses


def _module(layer: nn.Module, path: str) -> nn.Module:
    """Return a module in a layer, or one without parameters if the layer lacks it."""
    has_it = hasattr(layer, path.partition(".")[0])
    return layer.get_submodule(path) if has_it else nn.Identity()


def _placed(parameter: nn.Parameter, mesh: DeviceMesh, placement: Placement) -> nn.Parameter:
    """Return a parameter placed on a mesh, of which this rank has its part of its own values."""
    whole = local = parameter.detach()
    if isinstance(placement, Shard):
        local = whole.chunk(mesh.size(), placement.dim)[mesh.get_local_rank()]
        # Copied before it moves to a device, where the whole model may have no room
        local = local.clone(memory_format=torch.contiguous_format)
    layout: Any = {"shape": whole.shape, "stride": whole.stride()}
    placed = DTensor.from_local(local, mesh, [placement], run_check=False, **layout)
    return nn.Parameter(placed, requires_grad=parameter.requires_grad)


@functools.cache
def _with_local(
    kind: Any, uses: tuple[tuple[str, _Use], ...], rank: int, size: int
) -> type[nn.Module]:
    """Return a class like `kind`, whose parameters are plain tensors where the module reads them.

    They are the module's parameters under the same names as before.
    """
    properties = {name: _local_part(name, use, rank, size) for name, use in uses}
    return type(kind.__name__, (kind,), {"__module__": kind.__module__, **properties})


def _local_part(name: str, use: _Use, rank: int, size: int) -> property:
    """Return a property that reads a module's parameter as the module computes with it."""

    def read(module: nn.Module) -> Tensor:
        parameter: Any = module._parameters[name]
        if parameter.device_mesh.ndim > 1:  # sharded further: for FSDP2, not to compute with
            return parameter
        # A sum over the group of the gradients of each rank's heads is left to FSDP2.
        local = parameter.to_local(grad_placements=[Partial()] if use.is_partial else None)
        if not use.by_head:
            return local
        heads = len(local) // size
        return local[rank * heads : (rank + 1) * heads]

    return property(read)


def _connect(layer: nn.Module, plan: Layer, mesh: DeviceMesh) -> None:
    """Let a layer compute with its part of the heads, and pass on sums over the group."""
    group = mesh.get_group()

    def enter(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if args:
            return (_Copied.apply(args[0], group), *args[1:]), kwargs
        x = kwargs["hidden_states"]
        return args, {**kwargs, "hidden_states": _Copied.apply(x, group)}

    def leave(_: nn.Module, __: tuple[Any, ...], output: Tensor) -> Any:
        return _Summed.apply(output, group)

    layer.register_forward_pre_hook(enter, with_kwargs=True)
    for path in plan.rows:
        layer.get_submodule(path).register_forward_hook(leave)
    for name in plan.sizes:
        setattr(layer, name, getattr(layer, name) // mesh.size())
    if hasattr(layer, "fuse_swiglu"):  # fused, it reads the weight of its last layer
        layer.fuse_swiglu = False  # type: ignore[assignment]


class _Copied(torch.autograd.Function):
    """A tensor that all ranks of a group have, for each to use: its gradient is the sum."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: ProcessGroup) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return _sum(gradients[0], ctx.group), None


class _Summed(torch.autograd.Function):
    """The sum of a tensor over a group, which all of its ranks then have."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: ProcessGroup) -> Tensor:  # noqa: ARG004
        return _sum(x, group)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:  # noqa: ARG004
        return gradients[0], None


def _sum(x: Tensor, group: ProcessGroup) -> Tensor:
    """Return the sum of a tensor over a group."""
    result = x.detach().clone(memory_format=torch.contiguous_format)
    torch.distributed.all_reduce(result, group=group)
    return result


def is_split(tensor: Any) -> bool:
    """Return whether a tensor is one of a model that `split` has divided."""
    return isinstance(tensor, DTensor) and TENSOR in (tensor.device_mesh.mesh_dim_names or ())
