"""What a model does with a token: the numbers that plans and benchmarks go by."""

from __future__ import annotations

import typing
from typing import NamedTuple

import torch
from transformers import PreTrainedModel


class Work(NamedTuple):
    """What a model does with a token."""

    multiplied: int  # parameters: all but an input embedding that is not the output's as well
    # Of attention with scores between all tokens, in each block; 0 where there is none
    softmax_heads: int
    head_dim: int
    num_blocks: int

    def flops_per_token(self, context_length: int) -> int:
        """Forward and backward: six for each parameter that is multiplied, twelve for each of the
        scores' channels.

        Chowdhery et al. 2022, appendix B. What linear attention does beside its projections is left
        out, as is what activation checkpointing computes twice: MFU counts neither.
        """
        return (
            6 * self.multiplied
            + 12 * self.num_blocks * self.softmax_heads * self.head_dim * context_length
        )


def count_work(model: PreTrainedModel) -> Work:
    embedding, output = model.get_input_embeddings(), model.get_output_embeddings()
    is_shared = output is not None and embedding.weight is output.weight  # type: ignore[union-attr]
    unused = 0 if is_shared else typing.cast(torch.Tensor, embedding.weight).numel()
    shape = model.config.get_text_config()
    heads = getattr(
        shape, "num_heads" if shape.model_type == "transformer" else "num_attention_heads", 0
    )
    blocks = set(model._no_split_modules or ())
    return Work(
        multiplied=sum(parameter.numel() for parameter in model.parameters()) - unused,
        softmax_heads=heads,
        head_dim=(getattr(shape, "head_dim", None) or shape.hidden_size // heads) if heads else 0,
        num_blocks=sum(type(module).__name__ in blocks for module in model.modules()),
    )
