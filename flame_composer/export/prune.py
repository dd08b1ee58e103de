"""Magnitude pruning: the smallest weights of linear layers become zero (Han et al. 2015).

An experiment (docs/pruning.md): the model keeps its shape and its dense kernels, and no mask is
kept, so that training on fills the zeros in again.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from flame_composer.errors import ConfigError, InvalidField
from flame_composer.model.lora import embeddings_of, endings_of, is_tied, projections
from flame_composer.model.work import count_parameters
from flame_composer.quantities import align, plural


class Pruned(NamedTuple):
    """A layer that was pruned: its name, the number of its weights, and of those that are zero."""

    name: str
    num_weights: int
    num_zeros: int


class Report(NamedTuple):
    """What pruning did to a model.

    `uneven` are the layers that 2:4 left out, with the size of their rows; `left_out` are the names
    of all parameters that stayed as they were, with `num_left_out` weights. `is_tied` says whether
    the output layer has the weights of the embeddings.
    """

    layers: list[Pruned]
    uneven: dict[str, int]
    left_out: list[str]
    num_left_out: int
    is_tied: bool


def prune_smallest(weight: Tensor, sparsity: float) -> Tensor:
    """Return a copy of a weight whose smallest elements by magnitude are zero.

    Exactly the fraction `sparsity` of them, to the nearest whole number, is chosen: of equal
    magnitudes at the border, those that come first.
    """
    pruned = weight.clone(memory_format=torch.contiguous_format)
    order = pruned.abs().flatten().argsort(stable=True)
    pruned.view(-1)[order[: round(sparsity * weight.numel())]] = 0
    return pruned


def prune_two_of_four(weight: Tensor) -> Tensor:
    """Return a copy of a weight `[O, I]` in which the two smallest of each four are zero.

    Fours lie side by side in a row, which is the dimension that a product sums over: the pattern of
    NVIDIA's sparse tensor cores (Mishra et al. 2021). Of equal magnitudes, the first are chosen. I
    must be a multiple of 4.
    """
    fours = weight.reshape(-1, 4)
    smallest = fours.abs().argsort(dim=1, stable=True)[:, :2]
    return fours.scatter(1, smallest, 0.0).view(weight.shape)


@torch.no_grad()
def prune_model(model: PreTrainedModel, place: str, sparsity: float | None) -> Report:
    """Prune the linear layers of a model without adapters in place; 2:4 if `sparsity` is None.

    Embeddings, the output layer (tied to them or not) and all that is no linear layer stay as they
    are. Each layer has its own threshold: layers differ in the scale of their weights, and a common
    threshold would empty those of small ones. Raise InvalidField if no weight was pruned, and
    ConfigError, before anything is, if a layer holds numbers that are not finite.
    """
    kept = {id(layer.weight) for layer in embeddings_of(model).values()}
    named = {}
    for name, layer in projections(model).items():
        if id(layer.weight) not in kept:
            named[name] = layer
            kept.add(id(layer.weight))  # so that a weight of two layers is pruned once
    for name, layer in named.items():
        if not torch.isfinite(layer.weight).all():  # type: ignore[arg-type]
            raise ConfigError(f"{place}: {name} holds no finite numbers everywhere; it is damaged")
    layers, uneven = [], {}
    for name, layer in named.items():
        weight: Tensor = layer.weight  # type: ignore[assignment]
        rows = weight.t() if isinstance(layer, Conv1D) else weight
        if sparsity is None and rows.shape[1] % 4:
            uneven[name] = rows.shape[1]
            continue
        rows.copy_(prune_two_of_four(rows) if sparsity is None else prune_smallest(rows, sparsity))
        layers.append(Pruned(name, weight.numel(), int((weight == 0).sum())))
    chosen = 0.5 if sparsity is None else sparsity
    if not any(round(chosen * layer.num_weights) for layer in layers):
        raise _nothing(place, sparsity, is_any=bool(named))
    changed = {id(named[layer.name].weight) for layer in layers}
    every = model.named_parameters(remove_duplicate=False)  # tied ones by all their names
    left_out = [name for name, each in every if id(each) not in changed]
    rest = count_parameters(model) - sum(layer.num_weights for layer in layers)
    return Report(layers, uneven, left_out, rest, is_tied(model))


def _nothing(place: str, sparsity: float | None, *, is_any: bool) -> InvalidField:
    key = "pattern" if sparsity is None else "sparsity"
    if not is_any:
        return InvalidField("model", f"must have linear layers to prune; {place} has none")
    if sparsity is None:
        return InvalidField(
            key, f"needs a layer whose rows are a multiple of 4 long; {place} has none"
        )
    return InvalidField(key, f"must be larger: it is no whole weight of any layer of {place}")


def describe(report: Report) -> list[str]:
    """Return lines about what was pruned, by the endings of the layers' names, and what was not."""
    rows = [("layers", "number", "weights", "zero", "")]
    groups: dict[str, list[Pruned]] = {}
    for layer in report.layers:
        groups.setdefault(endings_of([layer.name])[0], []).append(layer)
    for ending, layers in {**groups, "all": report.layers}.items():
        weights = sum(layer.num_weights for layer in layers)
        zeros = sum(layer.num_zeros for layer in layers)
        share = f"{100 * zeros / weights:.2f} %"
        rows.append((ending, str(len(layers)), f"{weights:,}", f"{zeros:,}", share))
    lines = align(rows, left=1)
    if report.uneven:
        names = {
            f"{endings_of([name])[0]} (of {size})": None for name, size in report.uneven.items()
        }
        number = plural(len(report.uneven), "layer")
        lines.append(f"left out, {number} of rows that fours do not divide: {', '.join(names)}")
    rest = endings_of(name.removesuffix(".weight") for name in report.left_out)
    tied = " (embeddings and output layer are tied, and count once)" if report.is_tied else ""
    lines.append(f"left out: {report.num_left_out:,} weights, of {', '.join(rest)}{tied}")
    return lines
