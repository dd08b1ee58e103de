"""One work unit: its documents are read once, told apart by split, encoded, checked and
committed.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from typing import Literal

from flame_composer.dataset.manifest import Split, UnitRecord
from flame_composer.dataset.plan import unit_name
from flame_composer.dataset.writer import DatasetWriter, UnitWriter
from flame_composer.errors import DataError
from flame_composer.storage.folders import explained
from flame_composer.text.documents import read_documents
from flame_composer.text.encoder import HF
from flame_composer.text.tokenizer import Encoder

HASH_KEY = b"flame_composer document"
# Texts encoded in one call: enough to keep every core busy, little enough memory
BATCH_CHARACTERS = 4 << 20
SAMPLE = 256  # one document in so many is encoded by the reference too


class EncoderMismatch(Exception):
    """The fast encoder's tokens of a document are not the reference's; says where."""


def document_hash(text: str) -> bytes:
    """16 bytes that depend on the text alone."""
    return hashlib.blake2b(text.encode(), digest_size=16, key=HASH_KEY).digest()


def split_of(digest: bytes, val_fraction: float) -> Split:
    """The side a document is on, by its hash: equal documents are on the same side, whatever
    their order or source.
    """
    return "val" if int.from_bytes(digest[:8], "big") < round(val_fraction * 2**64) else "train"


def convert_unit(
    datasets: Sequence[DatasetWriter],
    number: int,
    encode: Encoder,
    on_error: Literal["fail", "skip"] = "fail",
    on_progress: Callable[[int, int, int], None] | None = None,
    *,
    encoder: str = HF,
    reference: Encoder | None = None,
) -> list[UnitRecord]:
    """Read work unit `number` once and commit it to each of `datasets` (one a split) that does not
    have it yet.

    `on_progress` is called after every batch with the documents, tokens and input bytes done with
    since the last call. A document that cannot be read is left out and counted with
    `on_error="skip"`, which changes nothing for the others, and raises DataError with "fail";
    nothing of this unit is committed then.

    `encoder` is what the manifest is to call `encode`. With `reference`, the first document of the
    unit and one in `SAMPLE` of the others, chosen by their hashes, must have the same tokens by
    both; EncoderMismatch otherwise.
    """
    with explained(" and ".join(dataset.out for dataset in datasets)):
        missing = [dataset for dataset in datasets if not dataset.is_committed(number)]
    if not missing:
        return []
    plan = missing[0].plan
    writers = {dataset.plan.split: UnitWriter(dataset, number) for dataset in missing}
    texts: dict[Split, list[str]] = {split: [] for split in writers}
    sample: list[str] = []
    done = [0, 0, 0]  # documents, tokens, bytes
    skipped = num_bytes = 0

    def report(*counts: int) -> None:
        done[:] = (total + count for total, count in zip(done, counts, strict=True))
        if on_progress is not None:
            on_progress(*counts)

    def flush() -> None:
        nonlocal num_bytes
        if reference is not None and sample:
            _check(
                encode, reference, sample, f"{plan.units[number][0].path}, unit {unit_name(number)}"
            )
            sample.clear()
        documents = num_tokens = 0
        for split, batch in texts.items():
            if batch:
                tokens, doc_lengths = encode(batch)
                writers[split].write(tokens, doc_lengths)
                documents += len(batch)
                num_tokens += len(tokens)
                batch.clear()
        report(documents, num_tokens, num_bytes)
        num_bytes = 0

    def skip(error: DataError) -> None:
        nonlocal skipped
        if on_error == "fail":
            raise error
        skipped += 1

    try:
        with explained(" and ".join(dataset.out for dataset in missing)):
            characters = 0
            is_first = True
            for part in plan.units[number]:
                for document in read_documents(
                    part, plan.config["text_column"], skip, plan.config["max_document_bytes"]
                ):
                    digest = document_hash(document.text)
                    # Before the split is looked at: what is checked must not depend on what is
                    # committed already.
                    if reference is not None and (is_first or digest[-1] % SAMPLE == 0):
                        sample.append(document.text)
                    is_first = False
                    split = split_of(digest, plan.config["val_fraction"])
                    if split not in writers:
                        continue
                    writers[split].hash.update(digest)
                    texts[split].append(document.text)
                    characters += len(document.text)
                    if characters >= BATCH_CHARACTERS:
                        flush()
                        characters = 0
                num_bytes += part.num_bytes
            flush()
            if "train" in writers:
                writers["train"].counts["documents_skipped"] = skipped
            return [writer.commit(encoder) for writer in writers.values()]
    except BaseException as error:
        report(*(-count for count in done))
        for writer in writers.values():
            writer.discard()
        if isinstance(error, MemoryError):
            raise DataError(
                f"{plan.units[number][0].path}, unit {unit_name(number)}: there is not enough"
                " memory to encode it; give fewer num_workers or a smaller unit_size, and run the"
                " same command again"
            ) from None
        raise


def _check(encode: Encoder, reference: Encoder, sample: Sequence[str], place: str) -> None:
    for text in sample:
        found, expected = encode([text])[0].tolist(), reference([text])[0].tolist()
        if found != expected:
            same = next(
                (
                    i
                    for i, pair in enumerate(zip(found, expected, strict=False))
                    if pair[0] != pair[1]
                ),
                len(found),
            )
            raise EncoderMismatch(
                f"{place}: token {same} of the document that begins {text[:40]!r} is another one"
            )
