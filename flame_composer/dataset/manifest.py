"""The manifest.json and index.json of a finished dataset, which are read without being trusted."""

from __future__ import annotations

import dataclasses
import json
import os
from dataclasses import dataclass
from typing import Any, Literal, TypeGuard, TypeVar

from flame_composer.dataset.ledger import OF_TUNING, Ledger, text_counts
from flame_composer.dataset.mds import MAX_SHARD_BYTES
from flame_composer.errors import ConfigError, DataError
from flame_composer.storage import files
from flame_composer.text.encoder import HF
from flame_composer.text.ends import Ends, parse_ends
from flame_composer.text.sources import Slice, Unit, slice_json
from flame_composer.text.tokenizer import TokenizerFingerprint

Kind = Literal["text", "sft"]
# The format version of each kind of dataset. A dataset of text is written as it always was.
VERSIONS: dict[Kind, int] = {"text": 1, "sft": 2}

# The keys of a unit's record, and those of the ledger in it for text
RECORD_KEYS = {"name", "inputs", "encoder", "documents_hash", "ledger"}
TEXT_COUNTS = text_counts(vars(Ledger())).keys()

Split = Literal["train", "val"]
T = TypeVar("T")


@dataclass(frozen=True)
class UnitRecord:
    """The record of a committed work unit.

    `inputs` are the slices that it read, and `encoder` names what made its tokens (None for the
    tail unit). `documents_hash` is a hash of its documents' hashes, in order.
    """

    name: str
    inputs: Unit
    encoder: str | None
    documents_hash: str
    ledger: Ledger


@dataclass(frozen=True)
class Manifest:
    """The content of manifest.json: what a dataset was made from and how, and its token ledger."""

    version: int
    split: Split
    tokenizer: TokenizerFingerprint
    context_length: int
    token_dtype: str
    config: dict[str, Any]
    units: tuple[UnitRecord, ...]
    totals: Ledger
    index_sha256: str
    kind: Kind = "text"

    @property
    def has_loss_mask(self) -> bool:
        """Whether the rows say which tokens carry loss."""
        return self.kind == "sft"

    @property
    def template(self) -> str | None:
        """The chat template of tuning data, or None for other data."""
        return self.config["template"] if self.kind == "sft" else None

    @property
    def train_on(self) -> str | None:
        """The tokens of tuning data that carry loss (see config/sft.py), or None for other data."""
        return self.config["train_on"] if self.kind == "sft" else None

    @property
    def ends(self) -> Ends | None:
        """The tokens that documents begin and end with, or None if the settings do not say."""
        return parse_ends(self.config, bos="add_bos", eos="add_eos")


def record_json(record: UnitRecord, kind: Kind) -> dict[str, Any]:
    """Return a unit's record as JSON values, as a dataset of this kind holds it."""
    counts = vars(record.ledger)
    return {
        **vars(record),
        "inputs": [slice_json(part) for part in record.inputs],
        "ledger": text_counts(counts) if kind == "text" else counts,
    }


def current_record(content: Any, unit: Unit, kind: Kind, place: str) -> dict[str, Any] | None:
    """Return a committed unit's record as `record_json` does, or None if its inputs are not `unit`.

    `content` is that of unit.json, which is not trusted. An earlier version may have written it.
    """
    record = content.get("record") if isinstance(content, dict) else None
    inputs = [slice_json(part) for part in unit]
    # Records of this version need no parsing, which takes five times as long
    if kind == "text" and is_plain(record) and record["inputs"] == inputs:
        return {**record, "inputs": inputs}
    parsed = parse_record(record, place)
    return record_json(parsed, kind) if parsed.inputs == unit else None


def is_plain(record: Any) -> TypeGuard[dict[str, Any]]:
    """Return whether `record` is one of text, whole, with values of the right types."""
    if not isinstance(record, dict) or record.keys() != RECORD_KEYS:
        return False
    ledger, encoder = record["ledger"], record["encoder"]
    return (
        isinstance(record["name"], str)
        and isinstance(record["documents_hash"], str)
        and (encoder is None or isinstance(encoder, str))
        and isinstance(ledger, dict)
        and ledger.keys() == TEXT_COUNTS
        and all(type(count) is int and count >= 0 for count in ledger.values())
    )


def header_json(manifest: Manifest) -> dict[str, Any]:
    """Return the content of manifest.json as JSON values, without its units: the list is empty."""
    content = dataclasses.asdict(dataclasses.replace(manifest, units=()))
    if manifest.kind == "text":
        del content["kind"]
        content["totals"] = text_counts(content["totals"])
    return content


def read_manifest(folder: str) -> Manifest:
    """Return the manifest of the dataset in a folder, local or in an object store.

    Raises ConfigError if the folder holds no finished dataset, DataError as `parse_manifest` does.
    """
    path = require_there(folder)
    return parse_manifest(files.read(path), path)


def require_there(folder: str) -> str:
    """Return the path of a folder's manifest. Raises ConfigError if there is none."""
    path = files.join(folder, "manifest.json")
    if files.stat(path) is None:
        what = "an unfinished conversion (run the same command of convert/ again to finish it)"
        is_folder = os.path.isdir(folder) or files.ls(folder)
        other = (
            "no dataset made by convert/to_mds.py or to_sft.py (manifest.json is missing)"
            if is_folder
            else "no such folder"
        )
        raise ConfigError(
            f"{folder}: {what if files.stat(files.join(folder, 'plan.json')) else other}"
        )
    return path


def parse_manifest(data: bytes, place: str) -> Manifest:
    """Return the manifest in `data`, which is not trusted: types and ledger are checked.

    Raises DataError, naming `place`, if the manifest is damaged or of another format version.
    """
    content = parse_json(data, place)
    return manifest_of(content, take(content, "units", list, place), place)


def manifest_of(content: Any, records: list[Any] | None, place: str) -> Manifest:
    """Return the manifest with this content and these records of units, or with no units.

    Raises DataError as `parse_manifest` does.
    """
    version = take(content, "version", int, place)
    if version not in VERSIONS.values():
        raise DataError(
            f"{place}: dataset format version {version}, but this flame_composer reads versions"
            f" {' and '.join(map(str, VERSIONS.values()))}; convert the text again or install the"
            " matching version"
        )
    kind: Kind = "text"
    if version == VERSIONS["sft"]:
        kind = _one_of(take(content, "kind", str, place), ("sft",), place)
    units = tuple(parse_record(unit, place) for unit in records or ())
    tokenizer = take(content, "tokenizer", dict, place)
    manifest = Manifest(
        version=version,
        split=_one_of(take(content, "split", str, place), ("train", "val"), place),
        tokenizer=TokenizerFingerprint(
            sha256=take(tokenizer, "sha256", str, place),
            vocab_size=take(tokenizer, "vocab_size", int, place),
            bos_token_id=_take_id(tokenizer, "bos_token_id", place),
            eos_token_id=_take_id(tokenizer, "eos_token_id", place),
        ),
        context_length=take(content, "context_length", int, place),
        token_dtype=_one_of(take(content, "token_dtype", str, place), ("uint16", "uint32"), place),
        config=take(content, "config", dict, place),
        units=units,
        totals=_ledger(take(content, "totals", dict, place), place),
        index_sha256=take(content, "index_sha256", str, place),
        kind=kind,
    )
    if not 1 <= manifest.context_length < MAX_SHARD_BYTES:
        raise damaged(
            place,
            "'context_length' must be at least 1, and small enough for a row to fit into a shard;"
            f" it is {manifest.context_length}",
        )
    whole = manifest.totals if records is None else sum((unit.ledger for unit in units), Ledger())
    if not (
        manifest.totals == whole
        and whole.balances
        and whole.carried_in == whole.carried_out
        and whole.tokens_out == whole.rows * manifest.context_length
    ):
        raise damaged(place, "its token ledger does not balance")
    if kind == "sft":
        _check_tuning(manifest, place)
    return manifest


def _check_tuning(manifest: Manifest, place: str) -> None:
    """Raise DataError unless the manifest says of tuning data what training needs to know."""
    take(manifest.config, "template", str, place)
    _one_of(take(manifest.config, "train_on", str, place), ("all", "last", "prompt_too"), place)
    for name in ("stop_token", "padding_token"):
        if take(manifest.config, name, int, place) >= manifest.tokenizer.vocab_size:
            raise damaged(place, f"'{name}' must be one of the tokenizer's")
    totals = manifest.totals
    if not totals.rows <= totals.loss_tokens <= totals.tokens_in - totals.dropped:
        raise damaged(place, f"{totals.loss_tokens:,} tokens with loss cannot be right")


def read_json(path: str) -> Any:
    try:
        return parse_json(files.read(path), path)
    except OSError as error:
        raise DataError(
            f"{path}: cannot be read: {error.strerror}; delete the dataset's folder and convert"
            " again"
        ) from None


def parse_json(data: bytes, place: str) -> Any:
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:
        raise damaged(place, f"not valid JSON: {error}") from None


def damaged(place: str, reason: str) -> DataError:
    return DataError(
        f"{place}: damaged: {reason}; restore it from a copy, or delete its dataset and convert"
        " again"
    )


def take(content: Any, key: str, kind: type[T], place: str) -> T:
    value = content.get(key) if isinstance(content, dict) else None
    if (
        not isinstance(value, kind)
        or isinstance(value, bool)
        or (isinstance(value, int) and value < 0)
    ):
        wanted = {
            int: "a whole number, 0 or more",
            str: "a string",
            list: "a list",
            dict: "an object",
        }[kind]
        raise damaged(place, f"'{key}' must be {wanted}")
    return value


def _take_id(content: dict[str, Any], key: str, place: str) -> int | None:
    return None if key in content and content[key] is None else take(content, key, int, place)


def _take_encoder(content: dict[str, Any], place: str) -> str | None:
    content = {"encoder": HF, **content}  # not recorded before there was a choice of encoders
    return None if content["encoder"] is None else take(content, "encoder", str, place)


def _take_compression(content: dict[str, Any], place: str) -> Any:
    """Return an input's compression, or tell it from the file's name if it is not recorded.

    Datasets made before it was recorded went by the name, and did not notice damage in bz2 and xz
    files. Those are marked as unchecked, which makes them differ from any input read now.
    """
    earlier = {".gz": "gzip", ".zst": "zstd", ".bz2": "bz2, unchecked", ".xz": "xz, unchecked"}
    if "compression" not in content:
        return earlier.get(os.path.splitext(take(content, "path", str, place))[1].lower())
    return _one_of(
        content["compression"], (None, "gzip", "zstd", "bz2", "xz", *earlier.values()), place
    )


def _one_of(value: str, allowed: tuple[Any, ...], place: str) -> Any:
    if value not in allowed:
        raise damaged(place, f"{value!r} must be one of {', '.join(map(str, allowed))}")
    return value


def _ledger(content: Any, place: str) -> Ledger:
    # Datasets made before there was min_doc_length have no such count, and only tuning data has the
    # last ones.
    counts = {"documents_short": 0, **dict.fromkeys(OF_TUNING, 0), "left_out": {}, **content}
    left_out = take(counts, "left_out", dict, place)
    return Ledger(
        **{
            field.name: take(counts, field.name, int, place)
            for field in dataclasses.fields(Ledger)
            if field.name != "left_out"
        },
        left_out={reason: take(left_out, reason, int, place) for reason in left_out},
    )


def parse_record(content: Any, place: str) -> UnitRecord:
    inputs = tuple(
        Slice(
            path=take(part, "path", str, place),
            format=_one_of(
                take(part, "format", str, place),
                ("jsonl", "json", "parquet", "text", "dataset", "tokens", "bordered", "megatron"),
                place,
            ),
            start=take(part, "start", int, place),
            end=take(part, "end", int, place),
            num_bytes=take(part, "num_bytes", int, place),
            version=None if part.get("version") is None else take(part, "version", str, place),
            compression=_take_compression(part, place),
            beside=take(part, "beside", str, place) if "beside" in part else None,
        )
        for part in take(content, "inputs", list, place)
    )
    return UnitRecord(
        take(content, "name", str, place),
        inputs,
        _take_encoder(content, place),
        take(content, "documents_hash", str, place),
        _ledger(take(content, "ledger", dict, place), place),
    )
