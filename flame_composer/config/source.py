"""The keys that name the text to read, shared by train_tokenizer.py, to_mds.py and clean.py."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import Literal

from omegaconf import MISSING

from flame_composer.config.rules import ScriptConfig, require, require_text
from flame_composer.storage.filesystems import is_url


@dataclass
class SourceConfig(ScriptConfig):
    """The keys that name files of text."""

    source: list[str] = MISSING
    """Files, folders or globs of JSONL, Parquet or plain text; URLs (s3://bucket/folder) are taken,
    too.
    """
    text_column: str = "text"
    """Field of JSONL and Parquet records that holds the text."""
    suffixes: list[str] = field(default_factory=list)
    """Endings of the files to take from a folder, e.g. [.py,.md]; if not set, .jsonl, .json-lines,
    .ndjson, .parquet and .txt, compressed or not. Of files with other endings, .json is read as
    JSON lines, Parquet and compressed files are recognized by their first bytes, and any other is
    plain text with one document per file.
    """
    on_error: Literal["fail", "skip"] = "fail"
    """Answer to a document that cannot be read: fail stops, skip leaves it out and counts it."""
    max_document_bytes: int = 67108864
    """Size of the longest document, or of the longest line of JSON lines, bytes of UTF-8; a longer
    one counts as a document that cannot be read.
    """

    def validate(self) -> None:
        require(len(self.source) > 0, "source", "must name at least one file, folder or glob")
        require_text(self, "source", "text_column")
        require(self.max_document_bytes > 0, "max_document_bytes", "must be more than 0 bytes")


@dataclass
class HubSourceConfig(SourceConfig):
    """The keys that name files of text or Hugging Face datasets."""

    source: list[str] = MISSING
    """Files, folders or globs of JSONL or plain text, compressed (.gz, .zst, .bz2, .xz) or not, or
    of Parquet; URLs (s3://bucket/folder) are taken, too. With `split`, Hugging Face datasets by id
    or folder.
    """
    split: str | None = None
    """Split of the Hugging Face dataset to read, e.g. train."""
    name: str | None = None
    """Configuration of the Hugging Face dataset, e.g. sample-10BT; its default configuration if not
    set.
    """

    def validate(self) -> None:
        super().validate()
        require_text(self, "split", "name")
        require(
            self.name is None or self.split is not None,
            "split",
            "must be set together with name, e.g. split=train",
        )
        require(
            self.split is None or not self.suffixes,
            "suffixes",
            "must not be set together with split",
        )

    def require_absolute(self, *outs: str) -> None:
        """Raise InvalidField for a relative path in `source` or in one of the keys `outs`."""
        require_absolute(self, *(outs if self.split is not None else ("source", *outs)))


def require_absolute(config: object, *names: str) -> None:
    """Raise InvalidField for a relative path in one of these keys, for workers of a cluster."""
    for name in names:
        value = getattr(config, name) or []
        for path in [value] if isinstance(value, str) else value:
            require(
                os.path.isabs(path) or is_url(path),
                name,
                "must be absolute where there is a cluster, whose workers have working folders of"
                " their own",
            )


def require_apart(out: str, other: str, name: str) -> None:
    """Raise InvalidField for the key `name` unless its folder `other` lies beside `out`."""
    places = [place if is_url(place) else os.path.realpath(place) for place in (out, other)]
    first, second = (f"{place.rstrip('/')}/" for place in places)
    require(
        not first.startswith(second) and not second.startswith(first),
        name,
        f"must be a folder beside out={out}, neither the same nor inside the other",
    )
