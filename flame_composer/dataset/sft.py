"""The assembly of a conversion of examples for tuning from its configuration."""

from __future__ import annotations

import contextlib
import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from flame_composer.config.sft import SftConfig
from flame_composer.dataset.examples import Census, Hashes, find_left_out, take_census
from flame_composer.dataset.finish import finish, workers_for
from flame_composer.dataset.manifest import Split
from flame_composer.dataset.plan import Plan, plan_units
from flame_composer.dataset.totals import Progress
from flame_composer.dataset.tuning import Tuning
from flame_composer.dataset.writer import DatasetWriter
from flame_composer.errors import ConfigError
from flame_composer.text.chat import ChatTemplate, load_template, require_stop
from flame_composer.text.dataset_info import Listed, read_registry, require_inside
from flame_composer.text.encoder import choose_encoder
from flame_composer.text.ends import ends_of, template_of
from flame_composer.text.examples import Form, form_of
from flame_composer.text.formats import COMPRESSIONS
from flame_composer.text.hub import address
from flame_composer.text.records import require_records
from flame_composer.text.sources import Unit, find_files
from flame_composer.text.tokenizer import bare, fingerprint, load_tokenizer, special_tokens

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

# The endings that folders are searched for
LINES = (".jsonl", ".json-lines", ".ndjson", ".json")
FOUND = (*LINES, ".parquet", *(f"{inner}{outer}" for inner in LINES for outer in COMPRESSIONS))


class Sources(NamedTuple):
    """The work units of a conversion, the form of each unit's records, and what they are made of.

    `described` is what the manifest says about the sources, as JSON values.
    """

    units: list[Unit]
    forms: list[Form]
    described: list[dict[str, Any]]

    @property
    def num_bytes(self) -> int:
        return sum(part.num_bytes for unit in self.units for part in unit)


class Parts(NamedTuple):
    """The tokenizer and the chat template of a conversion, and the tokens that it needs.

    `stop` ends an answer, and `padding` fills up rows.
    """

    tokenizer: PreTrainedTokenizerFast
    template: ChatTemplate
    stop: int
    padding: int


def find_examples(config: SftConfig, source: Sequence[str], datasets: Sequence[str]) -> Sources:
    """Return the examples in `source`, or in these datasets of the registry, as work units.

    Raise ConfigError or DataError if there are none, or if their form is not known.
    """
    if config.registry is not None:
        listed = read_registry(config.registry, datasets)
    elif source:
        assert config.format is not None
        form = form_of(config.format, config.columns, config.tags, "")
        is_hub = config.split is not None
        listed = [Listed("", each, is_hub, form) for each in source]
        if is_hub:
            assert config.split is not None
            places = (address(each, config.name, config.split) for each in source)
            listed = [Listed("", each, is_hub, form) for each in places]
    else:
        listed = []
    found = Sources([], [], [])
    key = "source" if source is config.source else "val_source"
    seen: set[str] = set()  # of files that a folder and a glob both name, each is taken once
    for each in listed:
        with _named(f"registry: {each.name}" if each.name else key):
            files = (
                [each.source]
                if each.is_hub
                else find_files([each.source], config.suffixes, found_by=FOUND)
            )
            files = [file for file in files if each.name or file not in seen]
            if each.folder is not None:
                for file in files:  # a folder may hold links
                    require_inside(file, each.folder, f"registry: {each.name}: {file}")
            seen.update(files)
            units = plan_units(files, config.unit_size, arrays=True)
            for part in itertools.chain.from_iterable(units):
                require_records(part)
        found.units.extend(units)
        found.forms.extend([each.form] * len(units))
        found.described.append(
            {
                "name": each.name,
                "source": each.source,
                "units": len(units),
                "format": each.form.format,
                "columns": dict(each.form.columns),
                "tags": dict(each.form.tags),
            }
        )
    return found


@contextlib.contextmanager
def _named(key: str) -> Iterator[None]:
    """Have errors of the body about the key `source` name the key that was given instead."""
    try:
        yield
    except ConfigError as error:
        raise ConfigError(re.sub("^source(?=: )", key, str(error))) from None


def load_parts(config: SftConfig) -> Parts:
    """Return the tokenizer and the chat template, and the tokens that the conversion needs.

    Raise ConfigError if the template does not go with the tokenizer, or has no token that ends an
    answer.
    """
    tokenizer = load_tokenizer(config.tokenizer)
    template = load_template(
        config.template,
        tokenizer,
        add_bos=_begins_with_bos(config, tokenizer),
        default_system=config.default_system,
    )
    stop = require_stop(template, tokenizer, config.template)
    pad = special_tokens(tokenizer)["pad_token_id"]
    return Parts(tokenizer, template, stop, stop if pad is None else pad)


def _begins_with_bos(config: SftConfig, tokenizer: PreTrainedTokenizerFast) -> bool:
    """Return whether a template of this package begins examples with bos."""
    if config.add_bos is not None:
        return config.add_bos
    ends = ends_of(tokenizer)
    if ends is not None:
        return ends.bos
    return tokenizer.bos_token_id is not None and template_of(tokenizer)[0] == [
        tokenizer.bos_token_id
    ]


def hash_examples(config: SftConfig, sources: Sources) -> list[Hashes]:
    """Return the hashes of every unit's examples, or an empty list if nobody asks for them.

    Without them every example is kept, also those that occur twice.
    """
    is_asked_for = config.duplicates == "drop" or config.has_val_source
    if not sources.units or not is_asked_for:
        return []
    census = Census(sources.units, sources.forms, config.on_error, config.max_document_bytes)
    with Progress(sources.num_bytes, 0) as progress:
        return take_census(census, workers_for(config.num_workers), progress.update, config.cluster)


def convert_examples(
    config: SftConfig,
    parts: Parts,
    sources: Sources,
    hashes: Sequence[Hashes],
    outs: Mapping[Split, str],
    held_out: Sequence[Hashes] = (),
) -> None:
    """Convert the examples into a dataset for each split of `outs`.

    `hashes` are those of the examples. Examples whose prompts are in `held_out` are left out.
    """
    left_out, digest = find_left_out(hashes, held_out, duplicates=config.duplicates == "drop")
    settings = {
        **config.settings(),
        "datasets": sources.described,
        "examples": digest,
        "template": parts.template.source,
        "stop_token": parts.stop,
        "padding_token": parts.padding,
    }
    if "train" not in outs:
        settings["val_fraction"] = 0.0
    identity = fingerprint(parts.tokenizer)
    datasets = [
        DatasetWriter(
            out, Plan(split, identity, config.context_length, settings, sources.units, "sft")
        )
        for split, out in outs.items()
    ]
    begun = next((name for each in datasets if (name := each.begun_encoder()) is not None), None)
    encoder = settings["encoder"] = choose_encoder(config.encoder, parts.tokenizer, begun)

    def build_job(unfinished: tuple[DatasetWriter, ...]) -> Tuning:
        return Tuning(
            unfinished,
            sources.forms,
            left_out,
            [each.digest for each in hashes],
            bare(parts.tokenizer),
            parts.template,
            parts.stop,
            config.context_length,
            config.train_on,
            config.too_long,
            encoder,
            "redo" if config.encoder == "auto" else "fail",
            config.on_error,
        )

    finish(
        datasets,
        build_job,
        encoder=encoder,
        num_workers=config.num_workers,
        cluster=config.cluster,
    )
