"""Scores of a model on a dataset: loss, bits per byte, and perplexity by length of context."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from composer.core import Evaluator, Precision, get_precision_context
from composer.utils import dist, get_device
from numpy.typing import NDArray
from tqdm import tqdm

from flame_composer.errors import DataError
from flame_composer.model.causal_lm import CausalLM, positions

if TYPE_CHECKING:
    pass


class Scores(NamedTuple):
    """Scores over some of a dataset's predicted tokens.

    These are the number of tokens, the bytes of text that they stand for, and their mean loss in
    nats. `bytes` is None for a tokenizer whose tokens do not stand for bytes.
    """

    tokens: int
    bytes: int | None
    loss: float

    def describe(self) -> dict[str, Any]:
        """Return the scores by name, with perplexity and bits per byte added."""
        # Unlike math.exp, this gives infinity for a large loss instead of raising.
        perplexity = torch.tensor(self.loss, dtype=torch.float64).exp().item()
        bits = self.loss * self.tokens / math.log(2)
        return {
            "loss": self.loss,
            "perplexity": perplexity,
            "bits_per_byte": bits / self.bytes if self.bytes else None,
            "tokens": self.tokens,
            "bytes": self.bytes,
        }


def evaluate(
    model: CausalLM,
    evaluator: Evaluator,
    *,
    precision: str,
    token_bytes: NDArray[np.int64] | None,
    block_size: int | None = None,
) -> dict[str, Any]:
    """Return `Scores.describe()` over all predicted tokens of all ranks.

    With `block_size`, the key `by_context` lists the scores of tokens with a context of 1 to
    `block_size` tokens, those with the next `block_size` lengths of context, and so on.

    A token's context is the text that the model had read when it predicted the token: at least one
    token and, with `varlen`, only tokens of the same document. A document's first token is the
    exception: it is predicted from the last token of the document before, with that one's context.
    A row's first token is predicted from nothing, so it is not counted. `token_bytes` comes from
    `tokenizer.token_bytes`.
    """
    device = get_device()
    model = device.module_to_device(model).eval()
    sizes = None if token_bytes is None else device.tensor_to_device(torch.from_numpy(token_bytes))
    is_first = dist.get_global_rank() == 0
    sums = None  # loss, tokens and bytes by block
    for batch in tqdm(
        evaluator.dataloader.dataloader, unit="batch", disable=None if is_first else True
    ):
        batch = device.batch_to_device(batch)
        length = batch["labels"].shape[1]
        block, values = _by_token(model, batch, precision, sizes, block_size or length)
        if sums is None:
            num_blocks = math.ceil((length - 1) / (block_size or length))
            sums = torch.zeros(3, num_blocks, dtype=torch.float64, device=block.device)
        for total, value in zip(sums, values, strict=True):
            total.index_add_(0, block, value.double())
    assert sums is not None
    dist.all_reduce(sums)

    def describe(total: torch.Tensor) -> dict[str, Any]:
        loss, tokens, num_bytes = total.tolist()
        return Scores(
            int(tokens), None if sizes is None else int(num_bytes), loss / tokens
        ).describe()

    result = describe(sums.sum(1))
    if block_size is not None:
        result["by_context"] = [
            {
                "from": 1 + number * block_size,
                "to": min((number + 1) * block_size, length - 1),
                **describe(total),
            }
            for number, total in enumerate(sums.T)
            if total[1] > 0
        ]
    return result


@torch.no_grad()
def _by_token(
    model: CausalLM,
    batch: dict[str, torch.Tensor],
    precision: str,
    sizes: torch.Tensor | None,
    block_size: int,
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Return the block of every predicted token's context, and the token's loss, count and bytes.

    Each is `[B * (T - 1)]`. The loss, count and bytes of tokens without a loss are 0.
    """
    with get_precision_context(Precision(precision)):
        logits_BTV = model({name: batch[name] for name in ("input_ids", "sequence_id")}).logits
    targets = batch["labels"][:, 1:].flatten()
    # Ignored tokens have a loss of 0.
    losses = F.cross_entropy(logits_BTV[:, :-1].flatten(0, 1).float(), targets, reduction="none")
    document = batch["sequence_id"]
    if not model.varlen:
        document = torch.zeros_like(document)
    block = positions(document)[:, :-1].flatten() // block_size
    counted = targets >= 0
    num_bytes = torch.zeros_like(losses)
    if sizes is not None:
        num_bytes = sizes[targets.clamp(min=0)] * counted
    return block, [losses, counted, num_bytes]


def plot_by_context(results: dict[str, dict[str, Any]], path: str) -> None:
    """Write a PNG that plots perplexity over length of context, with a line for each dataset."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.add_subplot(xlabel="tokens of context", ylabel="perplexity")
    for name, result in results.items():
        ends, perplexities = zip(
            *((block["to"], block["perplexity"]) for block in result["by_context"]), strict=True
        )
        axes.plot(ends, perplexities, marker=".", label=name)
    axes.grid(alpha=0.3)
    if len(results) > 1:
        axes.legend(frameon=False)
    try:
        figure.savefig(path, dpi=120, format="png")
    except OSError as error:
        raise DataError(f"plot={path}: cannot be written: {error.strerror}") from None


def print_result(name: str, result: dict[str, Any]) -> None:
    """Print the result of `evaluate` on the dataset `name` in readable form."""
    bits = (
        "" if result["bits_per_byte"] is None else f", {result['bits_per_byte']:.4f} bits per byte"
    )
    print(
        f"{name}{': ' if name else ''}loss {result['loss']:.4f}, perplexity"
        f" {result['perplexity']:.2f}{bits} over {result['tokens']:,} tokens",
        flush=True,
    )
    for block in result.get("by_context", []):
        print(
            f"  {block['from']:>7,} to {block['to']:>7,} tokens of context: perplexity"
            f" {block['perplexity']:10.2f} over {block['tokens']:,} tokens"
        )
