"""The progress and the totals of a conversion, shown to people."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence

from tqdm import tqdm

from flame_composer.dataset.manifest import Manifest
from flame_composer.quantities import align

_COLUMNS = (
    "documents",
    "documents_skipped",
    "documents_short",
    "tokens_in",
    "tokens_out",
    "dropped",
    "rows",
    "shards",
    "bytes",
)


def totals_table(manifests: Sequence[Manifest]) -> str:
    """Return a table of the totals, one row per dataset: tokens in = tokens out + dropped."""
    lines = [
        ("split", *(column.replace("documents_", "").replace("_", " ") for column in _COLUMNS))
    ]
    for manifest in manifests:
        lines.append(
            (manifest.split, *(f"{getattr(manifest.totals, column):,}" for column in _COLUMNS))
        )
    return "\n".join(align(lines))


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
