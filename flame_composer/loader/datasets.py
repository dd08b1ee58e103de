"""The opening of a run's datasets, which are checked before any row of them is read."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path

from transformers import PreTrainedTokenizerFast

from flame_composer.config.data import DataConfig
from flame_composer.dataset.open import Dataset, check_shards, check_tokenizer, open_dataset
from flame_composer.errors import ConfigError, InvalidField, one_line
from flame_composer.loader.cache import fetch_index
from flame_composer.loader.machine import opened_once
from flame_composer.text.chat import with_template
from flame_composer.text.ends import choose_ends, describe, ends_in, ends_of, warn, with_ends
from flame_composer.text.tokenizer import fingerprint

CACHE = Path("~/.cache/flame_composer")


def open_for_model(
    local: str | None,
    remote: str | None,
    *,
    tokenizer: PreTrainedTokenizerFast,
    context_length: int | None = None,
    exclusive: bool = False,
    varlen: bool = True,
) -> Dataset:
    """Return the dataset in `local`, or under `remote`, after checking that it fits the model.

    One rank of each machine opens it for all, which must all call this. A remote dataset is cached
    under `local` (or ~/.cache/flame_composer); see `fetch_index`, also for `exclusive`. A warning
    is given if the model was trained on documents that began or ended differently.

    Raises ConfigError or DataError if the dataset is damaged, or was made for another tokenizer or
    `context_length`, and InvalidField for examples to tune on unless `varlen` keeps them apart.
    """
    dataset = opened_once(functools.partial(_open, local, remote, exclusive=exclusive))
    manifest = dataset.manifest
    if context_length is not None and manifest.context_length != context_length:
        raise ConfigError(
            f"{dataset.place}: its rows are {manifest.context_length} tokens long, but"
            f" context_length is {context_length}; set context_length={manifest.context_length} or"
            " convert the text again"
        )
    if manifest.kind == "sft" and not varlen:
        raise InvalidField(
            "varlen",
            f"must be true: {dataset.place} holds examples to tune on, which must not see one"
            " another",
        )
    check_tokenizer(dataset, fingerprint(tokenizer), tokenizer.name_or_path)
    known = ends_of(tokenizer)
    if known is not None and manifest.ends not in (None, known):
        model = tokenizer.name_or_path or "the model"
        warn(
            f"{dataset.place}: its documents {describe(manifest.ends)}; those that {model}"
            f" was trained on {describe(known)}"
        )
    return dataset


def _open(local: str | None, remote: str | None, *, exclusive: bool) -> Dataset:
    if remote is not None:
        return fetch_index(remote, _cache_folder(local), exclusive=exclusive)
    assert local is not None
    dataset = open_dataset(local, with_units=False)
    check_shards(dataset)
    return dataset


def _cache_folder(local: str | None) -> Path:
    try:
        return Path(local or CACHE).expanduser()
    except RuntimeError as error:  # HOME is not set, and the user has no name to look it up by
        raise ConfigError(
            f"{local or CACHE}: {one_line(error)}; set local to the folder that is to hold the"
            " cache"
        ) from None


def open_train_data(
    config: DataConfig,
    *,
    tokenizer: PreTrainedTokenizerFast,
    context_length: int | None = None,
    varlen: bool = True,
) -> dict[str, Dataset]:
    """Return the dataset of each stream by the stream's name, or the only dataset under "".

    Each is opened and checked by `open_for_model`. Raises InvalidField if two are the same.
    """
    sources = {name: (stream.local, stream.remote) for name, stream in config.streams.items()}
    datasets: dict[str, Dataset] = {}
    for name, (local, remote) in (sources or {"": (config.local, config.remote)}).items():
        dataset = open_for_model(
            local,
            remote,
            tokenizer=tokenizer,
            context_length=context_length,
            exclusive=config.cache_limit is not None,
            varlen=varlen,
        )
        for other, before in datasets.items():
            if before.manifest.index_sha256 == dataset.manifest.index_sha256:
                raise InvalidField(
                    f"train_data.streams.{name}",
                    f"must be another dataset than train_data.streams.{other}; "
                    "give one of them a larger proportion, repeat or choose instead",
                )
        datasets[name] = dataset
    return datasets


def begin_as_documents(
    tokenizer: PreTrainedTokenizerFast,
    datasets: Mapping[str, Dataset],
    *,
    pretrained: str | None = None,
) -> PreTrainedTokenizerFast:
    """Return a tokenizer that begins texts as the documents of `datasets` begin.

    Checkpoints, exports and tasks use this tokenizer. If the manifests do not say how documents
    begin, `tokenizer` is returned unchanged. A warning is logged if the streams of a mixture
    differ, or if documents began otherwise when `pretrained`, the model to start from, was trained.

    Tuning data says nothing about documents: they begin as when `pretrained` was trained. But the
    tokenizer gets the chat template of its examples.
    """
    ends = {
        f"train_data{name and f'.streams.{name}'}": dataset.manifest.ends
        for name, dataset in datasets.items()
        if dataset.manifest.kind == "text"
    }
    before = {f"model.pretrained={pretrained}": ends_in(pretrained)} if pretrained else {}
    chosen = (
        choose_ends(ends, before)
        if ends
        else next(filter(None, (*before.values(), ends_of(tokenizer))), None)
    )
    made = tokenizer if chosen is None else with_ends(tokenizer, chosen)
    templates = {
        f"train_data{name and f'.streams.{name}'}": dataset.manifest.template
        for name, dataset in datasets.items()
        if dataset.manifest.template is not None
    }
    return with_template(made, templates) if templates else made
