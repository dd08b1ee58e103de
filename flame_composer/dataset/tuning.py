"""The conversion of examples: those of a unit are read, masked, packed and committed."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

from flame_composer.dataset.convert import (
    SAMPLE,
    Encoders,
    check_encoder,
    discarded_on_error,
    document_hash,
    split_of,
)
from flame_composer.dataset.examples import Example, OnError, new_digest, read_examples
from flame_composer.dataset.manifest import Split
from flame_composer.dataset.plan import unit_name
from flame_composer.dataset.unit import LEFT_OUT, UnitWriter
from flame_composer.dataset.workers import OnProgress
from flame_composer.dataset.writer import DatasetWriter
from flame_composer.errors import DataError
from flame_composer.storage.folders import explained
from flame_composer.text.chat import ChatTemplate, Message
from flame_composer.text.examples import Conversation, Form, LeftOut, hash_of, prompt_of
from flame_composer.text.loss_mask import Masker, Tokens, TrainOn
from flame_composer.text.records import Record
from flame_composer.text.sources import Unit
from flame_composer.text.tokenizer import BareTokenizer, Encoder

BATCH_CHARACTERS = 1 << 20  # characters of examples that are encoded together
BEGINS = 80  # characters of a left-out example that are shown

TooLong = Literal["fail", "drop", "cut_prompt"]


class UnitInputs(NamedTuple):
    """The inputs that one unit needs.

    They are its slices of the sources, the form of its records, and the examples to leave out, by
    their number in the unit. `digest` is that of the examples that this was decided by, or None if
    they were not looked at.
    """

    unit: Unit
    form: Form
    left_out: Mapping[int, str]
    digest: str | None


@dataclass(frozen=True)
class Tuning:
    """A job that converts examples into the units of one dataset or, with a split, of two.

    `forms`, `left_out` and `digests` are by the number of a unit. `stop` is the token that ends an
    answer, and `encoder` the name that `encoder.choose_encoder` returned.
    """

    datasets: tuple[DatasetWriter, ...]
    forms: Sequence[Form]
    left_out: Mapping[int, Mapping[int, str]]
    digests: Sequence[str]
    tokenizer: BareTokenizer
    template: ChatTemplate
    stop: int
    context_length: int
    train_on: TrainOn
    too_long: TooLong
    encoder: str
    on_mismatch: Literal["fail", "redo"]
    on_error: OnError

    def settings(self) -> Tuning:
        """Return what all units share."""
        datasets = tuple(dataset.without_units() for dataset in self.datasets)
        return dataclasses.replace(self, datasets=datasets, forms=(), left_out={}, digests=())

    def inputs(self, number: int) -> UnitInputs:
        """Return what unit `number` needs besides the settings."""
        unit = self.datasets[0].plan.units[number]
        left_out = self.left_out.get(number, {})
        digest = self.digests[number] if self.digests else None
        return UnitInputs(unit, self.forms[number], left_out, digest)

    def num_bytes(self, number: int) -> int:
        """Return the size of a unit's input in bytes."""
        return sum(part.num_bytes for part in self.datasets[0].plan.units[number])

    def build_converter(self) -> TuningConverter:
        """Return a converter of units, with the encoders it needs."""
        return TuningConverter(self)


class TuningConverter:
    """A converter of units of examples in the process that makes it."""

    def __init__(self, job: Tuning):
        self.job = job
        self.encoders = Encoders(
            job.tokenizer, job.encoder, job.on_mismatch, add_bos=False, add_eos=False
        )
        self.masker = Masker(
            job.template,
            job.tokenizer,
            self.encoders.exact,
            stop=job.stop,
            train_on=job.train_on,
            longest=job.context_length,
        )

    def convert(self, inputs: UnitInputs, number: int, on_progress: OnProgress) -> str | None:
        """Convert and commit unit `number`, and return a warning or None.

        The warning says that the unit had to be converted again with the slower encoder.
        """
        place = f"{inputs.unit[0].path}, unit {unit_name(number)}"

        def convert(encode: Encoder, name: str, reference: Encoder | None) -> None:
            checked = encode if reference is None else _checked(encode, reference, place)
            self._convert(inputs, number, on_progress, checked, name)

        return self.encoders.run(convert)

    def _convert(
        self,
        inputs: UnitInputs,
        number: int,
        on_progress: OnProgress,
        encode: Encoder,
        encoder: str,
    ) -> None:
        datasets = [each.with_unit(number, inputs.unit) for each in self.job.datasets]
        outs = " and ".join(dataset.out for dataset in datasets)
        with explained(outs):
            missing = [each for each in datasets if not each.is_committed(number)]
        if not missing:
            return
        self.masker.encode = encode
        unit = _Unit(missing, number, self.masker, self.job.too_long, on_progress)
        with discarded_on_error(unit), explained(outs):
            unit.read(inputs, self.job.on_error)
            for split, writer in unit.writers.items():
                unit.write_left_out(split)
                writer.commit(encoder)


def _checked(fast: Encoder, exact: Encoder, place: str) -> Encoder:
    """Return an encoder that compares `fast` with `exact` on the first text and a sample of others.

    It raises EncoderMismatch where they differ.
    """
    is_first = True

    def encode(texts: Sequence[str]) -> Any:
        nonlocal is_first
        sample = [text for text in texts if is_first or document_hash(text)[-1] % SAMPLE == 0]
        check_encoder(fast, exact, sample[:1] if is_first else sample, place)
        is_first = is_first and not texts
        return fast(texts)

    return encode


class _Unit:
    """A work unit being written to the datasets that lack it."""

    def __init__(
        self,
        datasets: Sequence[DatasetWriter],
        number: int,
        masker: Masker,
        too_long: TooLong,
        on_progress: Callable[[int, int, int], None],
    ):
        self.plan, self.out = datasets[0].plan, datasets[0].out
        self.parts = self.plan.units[number]
        self.place = f"{self.parts[0].path}, unit {unit_name(number)}"
        self.masker, self.too_long, self.on_progress = masker, too_long, on_progress
        self.writers: dict[Split, UnitWriter] = {
            each.plan.split: UnitWriter(each, number) for each in datasets
        }
        self._lines: dict[Split, list[str]] = {split: [] for split in self.writers}
        self._waiting: list[tuple[Split, Record, Conversation]] = []
        self._num_characters = 0
        self._reported = [0, 0, 0]

    def read(self, inputs: UnitInputs, on_error: OnError) -> None:
        """Read the unit's examples, and hand their tokens to the writer of each split.

        Raises DataError if they are not those of the census.
        """
        skipped = 0
        digest = new_digest()

        def skip(error: DataError) -> None:
            nonlocal skipped
            if on_error == "fail":
                raise error
            skipped += 1

        number = 0
        for example in read_examples(
            self.parts, inputs.form, skip, self.plan.config["max_document_bytes"]
        ):
            if isinstance(example.found, LeftOut):
                self._leave_out(self._rest, example.record, example.found)
                continue
            if inputs.digest is not None:
                digest.update(hash_of(example.found))
            self._take(example, inputs.left_out.get(number))
            number += 1
        self._write_batch()
        if inputs.digest not in (None, digest.hexdigest()):
            raise DataError(
                f"{self.place}: was changed while it was converted; remove the unfinished"
                f" {self.out}, and run the same command again"
            )
        self._report(0, 0, sum(part.num_bytes for part in self.parts))
        if self._rest in self.writers:
            self.writers[self._rest].counts["documents_skipped"] = skipped

    @property
    def _rest(self) -> Split:
        """The split that counts what has no conversation, and so no hash to choose a split by."""
        return "train" if self.plan.config["val_fraction"] else self.plan.split

    def _take(self, example: Example, reason: str | None) -> None:
        conversation = example.found
        assert not isinstance(conversation, LeftOut)
        fraction = self.plan.config["val_fraction"]
        split = self.plan.split
        if fraction:
            split = split_of(hash_of(prompt_of(conversation)), fraction)
        if split not in self.writers:
            return
        if reason is not None:
            self._leave_out(split, example.record, LeftOut(reason))
            return
        for message in conversation:
            if found := self.masker.special.search(message.content):
                detail = f"the {message.role}'s has {found[0]}"
                self._leave_out(split, example.record, LeftOut("special_token", detail))
                return
        self._waiting.append((split, example.record, conversation))
        self._num_characters += sum(len(message.content) for message in conversation)
        if self._num_characters >= BATCH_CHARACTERS:
            self._write_batch()

    def _write_batch(self) -> None:
        tokens = self.masker.tokens_of([conversation for _, _, conversation in self._waiting])
        num_tokens = 0
        for (split, record, conversation), found in zip(self._waiting, tokens, strict=True):
            writer, fitting = self.writers[split], found
            if isinstance(found, Tokens) and len(found.ids) > self.plan.context_length:
                fitting = self._shortened(conversation, found, record)
                if isinstance(fitting, Tokens):
                    writer.counts["documents_cut"] += 1
                else:
                    writer.counts["tokens_in"] += len(found.ids)
                    writer.counts["dropped"] += len(found.ids)
            if isinstance(fitting, LeftOut):
                self._leave_out(split, record, fitting)
                continue
            writer.hash.update(hash_of(conversation))
            writer.add_example(fitting)
            num_tokens += len(fitting.ids)
        self._report(len(self._waiting), num_tokens, 0)
        self._waiting.clear()
        self._num_characters = 0

    def _shortened(
        self, conversation: Conversation, tokens: Tokens, record: Record
    ) -> Tokens | LeftOut:
        """Return an example that is too long with its prompts cut, or why it is left out."""
        limit = self.plan.context_length
        detail = f"{len(tokens.ids):,} tokens"
        if self.too_long == "fail":
            raise DataError(
                f"{record.path}: the example at {_where(record)} has {detail}, more than"
                f" context_length={limit:,}; set too_long=drop or cut_prompt, or give longer rows,"
                f" and remove the unfinished {self.out} first"
            )
        if self.too_long == "drop":
            return LeftOut("too_long", detail)
        found = cut_prompts(conversation, limit, self.masker)
        return (
            LeftOut("too_long", f"{detail}, even with its prompts cut") if found is None else found
        )

    def _leave_out(self, split: Split, record: Record, problem: LeftOut) -> None:
        if split not in self.writers:
            return
        counts = self.writers[split].left_out
        counts[problem.reason] = (counts.get(problem.reason, 0)) + 1
        begins = json.dumps(record.values, ensure_ascii=False, default=str)[:BEGINS]
        line = {
            "path": record.path,
            "position": record.position,
            "reason": problem.reason,
            "detail": problem.detail,
            "begins": begins,
        }
        self._lines[split].append(json.dumps(line, ensure_ascii=True) + "\n")

    def write_left_out(self, split: Split) -> None:
        """Write the file of the examples that were left out beside the unit's shards."""
        path = Path(self.writers[split].temporary, LEFT_OUT)
        path.write_text("".join(self._lines[split]), encoding="utf-8")

    def discard(self) -> None:
        """Delete what was written for the unit, and take back the progress reported for it."""
        self._report(*(-count for count in self._reported))
        for writer in self.writers.values():
            writer.discard()

    def _report(self, *counts: int) -> None:
        self._reported = [sum(pair) for pair in zip(self._reported, counts, strict=True)]
        self.on_progress(*counts)


def _where(record: Record) -> str:
    """Return words for the place of a record in its file."""
    return f"position {record.position:,}"


def cut_prompts(conversation: Conversation, limit: int, masker: Masker) -> Tokens | None:
    """Return an example of at most `limit` tokens whose prompts are cut at their ends.

    All prompts are cut to the same number of characters, the largest that makes the example fit.
    System prompts and answers stay whole. None if the example does not fit even so.
    """
    longest = max(len(each.content) for each in conversation if each.role == "user")
    low, high = 0, longest  # a length that fits, or 0, and one that does not
    best: Tokens | None = None
    while high - low > 1:
        middle = (low + high) // 2
        shorter: list[Message] = [
            each._replace(content=each.content[:middle]) if each.role == "user" else each
            for each in conversation
        ]
        (found,) = masker.tokens_of([shorter])
        if isinstance(found, Tokens) and len(found.ids) <= limit:
            low, best = middle, found
        else:
            high = middle
    return best
