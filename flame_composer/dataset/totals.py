"""The progress and the totals of a conversion, shown to people."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence

from tqdm import tqdm

from flame_composer.dataset.ledger import Ledger
from flame_composer.dataset.manifest import Kind, Split
from flame_composer.quantities import align
from flame_composer.text.examples import REASONS

# The counts of a table, by the headings over them
_TEXT = {
    "documents": "documents",
    "skipped": "documents_skipped",
    "short": "documents_short",
    "tokens in": "tokens_in",
    "tokens out": "tokens_out",
    "dropped": "dropped",
    "rows": "rows",
    "shards": "shards",
    "bytes": "bytes",
}
_TUNING = {
    "examples": "documents",
    "skipped": "documents_skipped",
    "cut": "documents_cut",
    "tokens in": "tokens_in",
    "with loss": "loss_tokens",
    "padding": "padding",
    "tokens out": "tokens_out",
    "dropped": "dropped",
    "rows": "rows",
    "shards": "shards",
    "bytes": "bytes",
}


def totals_table(kind: Kind, datasets: Sequence[tuple[Split, Ledger]]) -> str:
    """Return a table of the totals of datasets of the same kind, one row for each.

    Tokens in and padding are tokens out and dropped. Of tuning data, the examples that were left
    out follow, with the reasons.
    """
    columns = _TEXT if kind == "text" else _TUNING
    lines = [("split", *columns)]
    for split, totals in datasets:
        counts = (getattr(totals, name) for name in columns.values())
        lines.append((split, *(f"{count:,}" for count in counts)))
    left_out = (left_out_line(split, totals) for split, totals in datasets)
    return "\n".join([*align(lines), *left_out]).rstrip()


def left_out_line(split: Split, totals: Ledger) -> str:
    """Return a line on the examples that were left out, or "" if there are none."""
    left_out = totals.left_out
    if not left_out:
        return ""
    reasons = (f"{count:,}: {reason_in_words(reason)}" for reason, count in left_out.items())
    return f"left out of {split} (see left_out.jsonl): {'; '.join(reasons)}"


def reason_in_words(reason: str) -> str:
    """Return what is said of an example that is left out for this reason."""
    return REASONS.get(reason, reason)  # a manifest may come from a later version


class Progress:
    """A count of what a conversion has done, shown as a progress bar where there is a terminal."""

    def __init__(self, num_bytes: int, done: int):
        """Begin at `done` of `num_bytes` input bytes, the part that earlier attempts committed."""
        self.num_documents = self.num_tokens = 0
        self._started = time.monotonic()
        self._bar = tqdm(total=num_bytes, initial=done, unit="B", unit_scale=True, disable=None)

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    @property
    def seconds(self) -> float:
        """The time in seconds since this object was made."""
        return time.monotonic() - self._started

    def update(self, documents: int, tokens: int, num_bytes: int) -> None:
        """Add what was done since the last call."""
        self.num_documents += documents
        self.num_tokens += tokens
        rate = f"{self.num_tokens / self.seconds:,.0f} tokens/s"
        self._bar.set_postfix_str(f"{self.num_documents:,} documents, {rate}", refresh=False)
        self._bar.update(num_bytes)

    def warn(self, warning: str) -> None:
        """Print a warning above the bar."""
        self._bar.write(f"warning: {warning}", file=sys.stderr)
