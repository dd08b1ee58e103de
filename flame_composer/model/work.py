"""The size of a model and its FLOPs per token, from which plans and benchmarks are computed."""

from __future__ import annotations

import typing
from typing import NamedTuple

import torch
from transformers import PreTrainedModel

from flame_composer.upstream.transformers import block_names


class Work(NamedTuple):
    """The numbers of a model that decide its FLOPs per token."""

    multiplied: int  # parameters, without an input embedding that is not used for the output too
    softmax_heads: int  # heads of softmax attention in each block, 0 if there are none
    head_dim: int
    num_blocks: int
    frozen: int = 0  # of those multiplied, the parameters that are not trained

    def flops_per_token(self, context_length: int) -> int:
        """Return the FLOPs of the forward and backward pass for one token.

        These are 6 for each multiplied parameter and, for softmax attention, 12 x blocks x heads x
        head_dim x context length (Chowdhery et al. 2022, appendix B). A parameter that is not
        trained takes 4, because it needs no gradient of its own. The work of linear attention
        besides its projections, and what activation checkpointing recomputes, are left out: MFU
        counts neither.
        """
        return (
            6 * self.multiplied
            - 2 * self.frozen
            + 12 * self.num_blocks * self.softmax_heads * self.head_dim * context_length
        )


def count_parameters(module: torch.nn.Module) -> int:
    """Return how many numbers a module's parameters hold; those that are tied count once."""
    return sum(parameter.numel() for parameter in module.parameters())


def count_trained(module: torch.nn.Module) -> int:
    """Return how many numbers are trained in a module's parameters."""
    return sum(each.numel() for each in module.parameters() if each.requires_grad)


def count_work(model: PreTrainedModel) -> Work:
    """Return the numbers that decide a model's FLOPs per token."""
    embedding, output = model.get_input_embeddings(), model.get_output_embeddings()
    is_shared = output is not None and embedding.weight is output.weight  # type: ignore[union-attr]
    unused = 0 if is_shared else typing.cast(torch.Tensor, embedding.weight).numel()
    shape = model.config.get_text_config()
    heads = getattr(
        shape, "num_heads" if shape.model_type == "transformer" else "num_attention_heads", 0
    )
    blocks = block_names(model)
    multiplied = count_parameters(model) - unused
    is_unused_trained = bool(unused) and embedding.weight.requires_grad
    trained = count_trained(model) - (unused if is_unused_trained else 0)
    return Work(
        multiplied=multiplied,
        softmax_heads=heads,
        head_dim=(getattr(shape, "head_dim", None) or shape.hidden_size // heads) if heads else 0,
        num_blocks=sum(type(module).__name__ in blocks for module in model.modules()),
        frozen=multiplied - trained,
    )
