"""The ledger of a dataset: counts that account for every token and every document."""

from __future__ import annotations

import dataclasses
from collections import Counter
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Ledger:
    """Counts that account for every token of a work unit or of a dataset.

    tokens_in + carried_in + padding == tokens_out + carried_out + dropped, always exactly.

    - `carried_out`: tokens that did not fill a row of their unit. The tail unit counts them as
      `carried_in`.
    - `dropped`: the tokens of the `documents_short`, and the last tokens of the dataset, which are
      too few for a row.
    - `documents_short`: those of the `documents` that are shorter than `min_doc_length`.
    - `documents_skipped`: documents that could not be read (`on_error=skip`); they have no tokens.
      Where there are two splits, the train split counts them.
    - `bytes`: the size of the shards.

    Only tuning data has the other counts. There `documents` are the examples in the rows, and
    `dropped` the tokens of those that are too long for a row.

    - `padding`: the tokens that fill up rows behind the examples.
    - `loss_tokens`: the tokens that carry loss.
    - `documents_cut`: the examples whose prompts were cut to fit into a row.
    - `left_out`: the number of examples that were left out, by the reason (`examples.REASONS`).
    """

    documents: int = 0
    documents_skipped: int = 0
    documents_short: int = 0
    tokens_in: int = 0
    carried_in: int = 0
    tokens_out: int = 0
    carried_out: int = 0
    dropped: int = 0
    rows: int = 0
    shards: int = 0
    bytes: int = 0
    padding: int = 0
    loss_tokens: int = 0
    documents_cut: int = 0
    left_out: dict[str, int] = dataclasses.field(default_factory=dict)

    def __add__(self, other: Ledger) -> Ledger:
        left_out = Counter(self.left_out) + Counter(other.left_out)
        counts = {
            name: count + getattr(other, name)
            for name, count in vars(self).items()
            if name != "left_out"
        }
        return Ledger(**counts, left_out=dict(sorted(left_out.items())))

    @property
    def balances(self) -> bool:
        given = self.tokens_in + self.carried_in + self.padding
        return given == self.tokens_out + self.carried_out + self.dropped


OF_TUNING = ("padding", "loss_tokens", "documents_cut", "left_out")  # counts of tuning data alone


def text_counts(ledger: dict[str, Any]) -> dict[str, Any]:
    """Return the counts of a ledger, by name, without those that only tuning data has."""
    return {name: count for name, count in ledger.items() if name not in OF_TUNING}
