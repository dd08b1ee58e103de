"""Batches: how rows become one, its tensors, and the labels that carry no loss."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

IGNORE = -100  # the label that carries no loss

Batch = dict[str, torch.Tensor]


def collate(rows: list[dict[str, NDArray[Any]]], *, loss_across_documents: bool = True) -> Batch:
    """Return a batch of rows: `input_ids`, `labels` and `sequence_id`, all int64 [B, T].

    `sequence_id` is the number of a token's document within its row. If the rows say which stream
    they come from, the batch also has `stream`, the number of each row's stream, int64 [B].

    Labels are the tokens themselves: the model shifts them. The first token of a row, before which
    nothing comes, is never a label. Without `loss_across_documents`, the first token of a document
    is not one either. Of a row with a `loss_mask`, only the tokens in it are labels.
    """
    shape = len(rows), len(rows[0]["input_ids"])
    tokens, sequence_id = np.empty(shape, np.int64), np.empty(shape, np.int64)
    for number, row in enumerate(rows):
        tokens[number] = row["input_ids"]
        sequence_id[number] = np.repeat(np.arange(len(row["doc_lengths"])), row["doc_lengths"])
    input_ids = torch.from_numpy(tokens)
    labels = input_ids.clone()
    labels[:, 0] = IGNORE
    if not loss_across_documents:
        labels[:, 1:][torch.from_numpy(np.diff(sequence_id) != 0)] = IGNORE
    for number, row in enumerate(rows):
        if "loss_mask" in row:
            labels[number][torch.from_numpy(~row["loss_mask"])] = IGNORE
    batch = {"input_ids": input_ids, "labels": labels, "sequence_id": torch.from_numpy(sequence_id)}
    if "stream" in rows[0]:
        batch["stream"] = torch.tensor([int(row["stream"]) for row in rows])
    return batch


def part_of_rows(length: int, part: int, parts: int) -> slice:
    """Return which tokens of rows of `length` tokens are in one of so many equal parts."""
    assert length % parts == 0, (length, parts)
    return slice(part * length // parts, (part + 1) * length // parts)


def labels_after(labels: torch.Tensor, tokens: slice) -> torch.Tensor:
    """Return the label of what follows each of these tokens of a row [B, T]: [B, tokens]."""
    after = labels[:, tokens.start + 1 : tokens.stop + 1]
    return F.pad(after, (0, tokens.stop - tokens.start - after.shape[1]), value=IGNORE)


def count_tokens(
    batch: Batch, *, part: int = 0, parts: int = 1, counts_all: bool = True
) -> dict[str, int]:
    """Return the number of all tokens of a batch, and of those that carry loss.

    Of every row only the tokens in a `part` are counted, as are those that these predict. Unless
    `counts_all`, which is for one of several ranks with the same tokens, the first number is 0.

    For a microbatch of a global batch without any such token (`is_void`), the second is 1, so that
    the loss of 0 can be divided by it.
    """
    tokens = part_of_rows(batch["input_ids"].shape[1], part, parts)
    labels = batch["labels"] if parts == 1 else labels_after(batch["labels"], tokens)
    number = int((labels != IGNORE).sum())
    return {
        "total": labels.numel() if counts_all else 0,
        "loss_generating": 1 if "is_void" in batch else number,
    }
