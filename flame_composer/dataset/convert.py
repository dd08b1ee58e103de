"""The conversion of text: a unit's documents are read once, split, encoded and committed."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from flame_composer.dataset.manifest import Split, UnitRecord
from flame_composer.dataset.plan import unit_name
from flame_composer.dataset.unit import UnitWriter
from flame_composer.dataset.writer import DatasetWriter
from flame_composer.errors import DataError
from flame_composer.storage.folders import explained
from flame_composer.text.documents import read_documents
from flame_composer.text.encoder import (
    GIVEN,
    HF,
    build_fast_encoder,
    join_given,
    require_installed,
)
from flame_composer.text.given_tokens import Vocabulary, bos_of
from flame_composer.text.sources import Slice, Unit
from flame_composer.text.token_files import read_tokens
from flame_composer.text.tokenizer import BareTokenizer, Encoder, build_encoder

HASH_KEY = b"flame_composer document"
# Characters of text encoded in one call: enough to keep every core busy, without using much memory
BATCH_CHARACTERS = 4 << 20
OnProgress = Callable[[int, int, int], None]
SAMPLE = 256  # one document in this many is also encoded by the reference


class EncoderMismatch(Exception):
    """A document whose tokens differ between the fast encoder and the reference.

    The message names the first token that differs.
    """


@dataclass(frozen=True)
class Conversion:
    """The datasets to write, and how text is encoded for them.

    `encoder` is the name that `encoder.choose_encoder` returned.
    """

    datasets: tuple[DatasetWriter, ...]
    tokenizer: BareTokenizer
    add_bos: bool
    add_eos: bool
    encoder: str
    on_mismatch: Literal["fail", "redo"]
    on_error: Literal["fail", "skip"]

    def settings(self) -> Conversion:
        """Return what all units share: everything but the units of the datasets.

        What one unit needs of them comes from `inputs`.
        """
        return dataclasses.replace(
            self, datasets=tuple(dataset.without_units() for dataset in self.datasets)
        )

    def inputs(self, number: int) -> Unit:
        """Return the inputs of unit `number`, which are the same for all datasets."""
        return self.datasets[0].plan.units[number]

    def num_bytes(self, number: int) -> int:
        """Return the size of a unit's input in bytes."""
        return sum(part.num_bytes for part in self.datasets[0].plan.units[number])

    def build_converter(self) -> UnitConverter:
        """Return a converter of units, with the encoders it needs."""
        return UnitConverter(self)


class Encoders:
    """The encoders of a conversion: the tokenizer's own and, if there is one, a faster one."""

    def __init__(
        self,
        tokenizer: BareTokenizer,
        encoder: str,
        on_mismatch: Literal["fail", "redo"],
        *,
        add_bos: bool,
        add_eos: bool,
    ):
        ends: dict[str, bool] = {"add_bos": add_bos, "add_eos": add_eos}
        self.encoder, self.on_mismatch = encoder, on_mismatch
        self.fast: Encoder | None = None
        if encoder == GIVEN:
            self.exact: Any = join_given(tokenizer, **ends)
            return
        self.exact = build_encoder(tokenizer, **ends)
        require_installed(encoder)
        if encoder != HF:
            self.fast = build_fast_encoder(tokenizer, self.exact, **ends)

    def run(self, convert: Callable[[Encoder, str, Encoder | None], object]) -> str | None:
        """Call `convert` with an encoder, its name and a reference, and return a warning or None.

        It is called with the fast encoder, which it compares with the reference, if there is one.
        If that raises EncoderMismatch, it is called again with the exact one, which the warning
        says.
        """
        if self.fast is None:
            convert(self.exact, self.encoder, None)
            return None
        try:
            convert(self.fast, self.encoder, self.exact)
        except EncoderMismatch as mismatch:
            found = f"{mismatch} between {self.encoder} and {HF}"
            if self.on_mismatch == "fail":
                raise DataError(f"{found}; set encoder=auto or hf") from None
            convert(self.exact, HF, None)
            return f"{found}; this unit was encoded with {HF}"
        return None


class UnitConverter:
    """A converter of units in the process that makes it, where it builds the encoders once."""

    def __init__(self, conversion: Conversion):
        self.datasets = conversion.datasets
        self.on_error = conversion.on_error
        self.encoders = Encoders(
            conversion.tokenizer,
            conversion.encoder,
            conversion.on_mismatch,
            add_bos=conversion.add_bos,
            add_eos=conversion.add_eos,
        )

    def convert(self, inputs: Unit, number: int, on_progress: OnProgress) -> str | None:
        """Convert and commit unit `number`, and return a warning or None.

        The warning says that the unit had to be converted again with the slower encoder.
        """
        datasets = [dataset.with_unit(number, inputs) for dataset in self.datasets]
        return self.encoders.run(
            lambda encode, name, reference: convert_unit(
                datasets,
                number,
                encode,
                self.on_error,
                on_progress,
                encoder=name,
                reference=reference,
            )
        )


class Discardable(Protocol):
    """A unit being written, which can be discarded; `place` names it in errors."""

    place: str

    def discard(self) -> None:
        """Delete what was written."""


@contextmanager
def discarded_on_error(unit: Discardable) -> Iterator[None]:
    """Discard the unit if the body raises. Raises DataError if there is too little memory."""
    try:
        yield
    except BaseException as error:
        unit.discard()
        if isinstance(error, MemoryError):
            raise DataError(
                f"{unit.place}: there is not enough memory to encode it; give fewer num_workers or"
                " a smaller unit_size, and run the same command again"
            ) from None
        raise


def document_hash(document: str | NDArray[np.integer]) -> bytes:
    """Return a hash of 16 bytes that depends on a document's text alone, or on its tokens."""
    data = document.encode() if isinstance(document, str) else document.astype("<u4").tobytes()
    return hashlib.blake2b(data, digest_size=16, key=HASH_KEY).digest()


def split_of(digest: bytes, val_fraction: float) -> Split:
    """Return the split of the document with this hash.

    Equal documents are in the same split, whatever their order or source.
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
    """Convert work unit `number`, commit it where it is missing, and return the records committed.

    The unit is read once, for all those of `datasets` (one for each split) that lack it.

    `on_progress` is called after every batch with the number of documents, tokens and input bytes
    since the last call. With `on_error="skip"`, a document that cannot be read is left out and
    counted, without effect on the others. With "fail", it raises DataError, and nothing of the
    unit is committed.

    `encoder` is the name that the manifest records for `encode`. With `reference`, the first
    document of the unit and one in `SAMPLE` of the others, chosen by their hashes, are encoded by
    both. EncoderMismatch is raised if their tokens differ.
    """
    with explained(" and ".join(dataset.out for dataset in datasets)):
        missing = [dataset for dataset in datasets if not dataset.is_committed(number)]
    if not missing:
        return []
    unit = _Unit(missing, number, encode, reference, on_progress)
    with discarded_on_error(unit), explained(" and ".join(dataset.out for dataset in missing)):
        unit.read(on_error)
        return [writer.commit(encoder) for writer in unit.writers.values()]


class _Unit:
    """A work unit being written, one batch of texts at a time, to the datasets that lack it."""

    def __init__(
        self,
        datasets: Sequence[DatasetWriter],
        number: int,
        encode: Encoder,
        reference: Encoder | None,
        on_progress: Callable[[int, int, int], None] | None,
    ):
        """Take the arguments of `convert_unit`, with only those `datasets` that lack the unit."""
        self.plan = datasets[0].plan
        self.parts = self.plan.units[number]
        self.place = f"{self.parts[0].path}, unit {unit_name(number)}"
        self.encode, self.reference, self.on_progress = encode, reference, on_progress
        self.writers = {each.plan.split: UnitWriter(each, number) for each in datasets}
        self._texts: dict[Split, list[Any]] = {split: [] for split in self.writers}
        self._sample: list[str] = []  # texts to be encoded by the reference as well
        self._is_first = True
        self._num_characters = self._num_bytes = 0  # in the current batch
        self._reported = [0, 0, 0]  # documents, tokens, bytes

    def read(self, on_error: Literal["fail", "skip"]) -> None:
        """Read the unit's documents and write their tokens to each split."""
        skipped = 0

        def skip(error: DataError) -> None:
            nonlocal skipped
            if on_error == "fail":
                raise error
            skipped += 1

        for part in self.parts:
            for document in self._documents(part, skip):
                self._take(document)
            self._num_bytes += part.num_bytes
        self._write_batch()
        if "train" in self.writers:
            self.writers["train"].counts["documents_skipped"] = skipped

    def _documents(
        self, part: Slice, skip: Callable[[DataError], None]
    ) -> Iterator[str | NDArray[np.integer]]:
        """Yield the texts of a slice's documents, or their tokens if it has those."""
        config = self.plan.config
        most = config["max_document_bytes"]
        if "token_dtype" in config:
            tokenizer = self.plan.tokenizer
            eos = tokenizer.eos_token_id
            assert eos is not None
            bos = bos_of(tokenizer.bos_token_id, eos)
            known = Vocabulary(config["token_dtype"], tokenizer.vocab_size, eos, bos)
            for tokens in read_tokens(part, known, skip, most):
                yield tokens.tokens
            return
        for document in read_documents(part, config["text_column"], skip, most):
            yield document.text

    def discard(self) -> None:
        """Delete what was written for the unit, and take back the progress reported for it."""
        self._report(*(-count for count in self._reported))
        for writer in self.writers.values():
            writer.discard()

    def _take(self, text: str | NDArray[np.integer]) -> None:
        digest = document_hash(text)
        # Choose the sample before the split is known: which documents are checked must not depend
        # on which splits are committed already.
        if self.reference is not None and (self._is_first or digest[-1] % SAMPLE == 0):
            assert isinstance(text, str)
            self._sample.append(text)
        self._is_first = False
        split = split_of(digest, self.plan.config["val_fraction"])
        if split not in self.writers:
            return
        self.writers[split].hash.update(digest)
        self._texts[split].append(text)
        self._num_characters += len(text)
        if self._num_characters >= BATCH_CHARACTERS:
            self._write_batch()

    def _write_batch(self) -> None:
        if self.reference is not None:
            check_encoder(self.encode, self.reference, self._sample, self.place)
            self._sample.clear()
        num_documents = num_tokens = 0
        for split, texts in self._texts.items():
            if texts:
                tokens, doc_lengths = self.encode(texts)
                self.writers[split].write(tokens, doc_lengths)
                num_documents += len(texts)
                num_tokens += len(tokens)
                texts.clear()
        self._report(num_documents, num_tokens, self._num_bytes)
        self._num_characters = self._num_bytes = 0

    def _report(self, *counts: int) -> None:
        self._reported = [sum(pair) for pair in zip(self._reported, counts, strict=True)]
        if self.on_progress is not None:
            self.on_progress(*counts)


def check_encoder(encode: Encoder, reference: Encoder, sample: Sequence[str], place: str) -> None:
    """Raise EncoderMismatch, which names `place`, if two encoders differ on one of these texts."""
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
                f"{place}: token {same} of the document that begins {text[:40]!r} differs"
            )
