"""Writing of one work unit's shards and record, which are then committed or discarded."""

from __future__ import annotations

import dataclasses
import hashlib
import shutil
import uuid
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from flame_composer.dataset.ledger import Ledger
from flame_composer.dataset.manifest import Kind, UnitRecord, damaged, record_json
from flame_composer.dataset.mds import ShardWriter
from flame_composer.dataset.packing import Pieces, cut, no_pieces, pack, pack_whole, shuffled
from flame_composer.dataset.plan import TAIL, unit_name
from flame_composer.storage import files
from flame_composer.storage.files import dump_json
from flame_composer.storage.filesystems import Stat
from flame_composer.text.loss_mask import Tokens
from flame_composer.text.tokenizer import token_dtype

if TYPE_CHECKING:
    from flame_composer.dataset.writer import DatasetWriter


LEFT_OUT = "left_out.jsonl"


def is_whole(content: Any, there: Mapping[str, Stat], kind: Kind, place: str) -> bool:
    """Return whether a unit's files are there, and its shards have their sizes.

    `content` is that of its unit.json, and `there` are the files in its folder, `place`. Raises
    DataError if the content lists no shards.
    """
    try:
        sizes = {
            shard["raw_data"]["basename"]: shard["raw_data"]["bytes"] for shard in content["shards"]
        }
    except (KeyError, TypeError):
        raise damaged(files.join(place, "unit.json"), "it lists no shards") from None
    others = ("tail.npy", LEFT_OUT) if kind == "sft" else ("tail.npy",)
    return all(name in there for name in others) and all(
        name in there and there[name].size == size for name, size in sizes.items()
    )


class UnitWriter:
    """A writer of one work unit, or of the tail unit (`number` is None).

    It writes into a temporary folder, which `commit` moves into place by one rename, or uploads.
    """

    def __init__(self, dataset: DatasetWriter, number: int | None):
        self.plan, self.number = dataset.plan, number
        self.name = TAIL if number is None else unit_name(number)
        # A unique name: no other process that works on this unit may write into the same folder.
        self.temporary = dataset.staging / f"{self.name}.{uuid.uuid4().hex}"
        self.final = files.join(dataset.out, "units", self.name)
        dtype = token_dtype(self.plan.tokenizer.vocab_size)
        self.dtype = dtype
        self.tail = no_pieces(dtype)
        self.waiting = [no_pieces(dtype)]  # the unit's documents if a seed is to shuffle them
        self.examples: list[Tokens] = []
        self.counts = {
            field.name: 0 for field in dataclasses.fields(Ledger) if field.name != "left_out"
        }
        self.left_out: dict[str, int] = {}
        self.hash = hashlib.blake2b(digest_size=16)
        self.mds = ShardWriter(
            self.temporary,
            dtype,
            self.plan.context_length,
            self.plan.config["shard_size"],
            has_loss_mask=self.plan.kind == "sft",
        )

    def write(self, tokens: NDArray[np.unsignedinteger], doc_lengths: NDArray[np.int64]) -> None:
        """Add documents, given their tokens, end to end, and the number of tokens of each."""
        self.counts["documents"] += len(doc_lengths)
        self.counts["tokens_in"] += len(tokens)
        minimum = self.plan.config["min_doc_length"]
        if minimum is not None:
            is_kept = doc_lengths >= minimum
            self.counts["documents_short"] += int((~is_kept).sum())
            self.counts["dropped"] += int(doc_lengths[~is_kept].sum())
            tokens, doc_lengths = tokens[np.repeat(is_kept, doc_lengths)], doc_lengths[is_kept]
        if self.plan.config["seed"] is None:
            self._pack(tokens, doc_lengths)
        else:
            self.waiting.append(Pieces(tokens, doc_lengths))

    def carry(self, tail: Pieces) -> None:
        """Append the tail of another unit, which has already counted its documents and tokens."""
        self.counts["carried_in"] += len(tail.tokens)
        self._pack(tail.tokens, tail.doc_lengths)

    def _pack(self, tokens: NDArray[np.unsignedinteger], doc_lengths: NDArray[np.int64]) -> None:
        longest = self.plan.config["max_doc_length"]
        pieces = doc_lengths if longest is None else cut(doc_lengths, longest)
        rows, self.tail = pack(tokens, pieces, self.plan.context_length, self.tail)
        self.mds.write(rows)
        self.counts["rows"] += len(rows)

    def add_example(self, example: Tokens) -> None:
        """Add an example, which is packed together with the others of the unit on `commit`."""
        self.counts["documents"] += 1
        self.counts["tokens_in"] += len(example.ids)
        self.counts["loss_tokens"] += int(example.has_loss.sum())
        self.examples.append(example)

    def _pack_examples(self) -> None:
        tokens = [example.ids for example in self.examples]
        flags = [example.has_loss for example in self.examples]
        padding = self.plan.config["padding_token"]
        rows, self.counts["padding"] = pack_whole(
            tokens, flags, self.plan.context_length, padding, self.dtype
        )
        self.mds.write(rows)
        self.counts["rows"] += len(rows)

    def commit(self, encoder: str | None) -> UnitRecord:
        """Put the unit in its place, and return its record.

        `encoder` is the name of the encoder that made its tokens, None for the tail unit.
        """
        if self.plan.kind == "sft":
            self._pack_examples()
        elif self.number is not None and self.plan.config["seed"] is not None:
            documents = shuffled(self.waiting, [self.plan.config["seed"], self.number])
            self._pack(documents.tokens, documents.doc_lengths)
        self.mds.flush()
        shards = self.mds.shards
        self.counts["dropped" if self.number is None else "carried_out"] += len(self.tail.tokens)
        self.counts["tokens_out"] = self.counts["rows"] * self.plan.context_length
        self.counts["shards"] = len(shards)
        self.counts["bytes"] = sum(shard["raw_data"]["bytes"] for shard in shards)
        inputs = () if self.number is None else self.plan.units[self.number]
        record = UnitRecord(
            self.name,
            inputs,
            encoder,
            self.hash.hexdigest(),
            Ledger(**self.counts, left_out=dict(sorted(self.left_out.items()))),
        )
        assert record.ledger.balances, record
        if self.number is not None:
            np.save(self.temporary / "tail.npy", self.tail.tokens)
        (self.temporary / "unit.json").write_bytes(
            dump_json(
                {
                    "record": record_json(record, self.plan.kind),
                    "shards": shards,
                    "tail_doc_lengths": (
                        [] if self.number is None else self.tail.doc_lengths.tolist()
                    ),
                }
            )
        )
        try:
            files.put_folder(self.temporary, self.final, "unit.json")
        except FileExistsError:
            # Another process has committed this unit, from the same plan and so with the same bytes
            self.discard()
        return record

    def discard(self) -> None:
        """Delete what has been written and is not committed."""
        shutil.rmtree(self.temporary, ignore_errors=True)
