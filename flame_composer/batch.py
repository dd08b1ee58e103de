"""What a batch is: its tensors, the labels that carry no loss, and how rows become one."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

IGNORE = -100  # the label that carries no loss

Batch = dict[str, torch.Tensor]


def collate(rows: list[dict[str, NDArray[Any]]], *, loss_across_documents: bool = True) -> Batch:
    """`input_ids`, `labels` and `sequence_id` (the number of the token's document within its row),
    all int64 [B, T]; `stream` (the number of the row's stream, int64 [B]) where the rows say so.

    Labels are the tokens themselves: the model shifts them. The first one of a row, which nothing
    comes before, is never a label; without `loss_across_documents` the first one of a document is
    none, either.
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
    batch = {"input_ids": input_ids, "labels": labels, "sequence_id": torch.from_numpy(sequence_id)}
    if "stream" in rows[0]:
        batch["stream"] = torch.tensor([int(row["stream"]) for row in rows])
    return batch


def count_tokens(batch: Batch) -> dict[str, int]:
    """All tokens of a batch, and those that carry loss."""
    return {
        "total": batch["input_ids"].numel(),
        "loss_generating": int((batch["labels"] != IGNORE).sum()),
    }
