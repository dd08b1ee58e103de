"""Batches: how rows become one, its tensors, and the labels that carry no loss."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
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


def count_tokens(batch: Batch) -> dict[str, int]:
    """Return the number of all tokens of a batch, and of those that carry loss.

    For a microbatch of a global batch without any such token (`is_void`), it is 1, so that the loss
    of 0 can be divided by it.
    """
    number = int((batch["labels"] != IGNORE).sum())
    return {
        "total": batch["input_ids"].numel(),
        "loss_generating": 1 if "is_void" in batch else number,
    }
