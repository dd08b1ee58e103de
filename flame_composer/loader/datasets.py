"""Datasets opened: their manifest and index read and checked, before a row of them is."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from transformers import PreTrainedTokenizerFast

from flame_composer.config.data import DataConfig
from flame_composer.dataset.open import Dataset, check_shards, check_tokenizer, open_dataset
from flame_composer.errors import ConfigError, InvalidField, one_line
from flame_composer.loader.cache import fetch_index
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
) -> Dataset:
    """Read manifest and index; refuse a dataset that is damaged, or made for another tokenizer or
    `context_length`.

    A remote dataset is cached under `local` (or ~/.cache/flame_composer), see `fetch_index`.

    Raises ConfigError or DataError.
    """
    if remote is None:
        assert local is not None
        dataset = open_dataset(local)
        check_shards(dataset)
    else:
        folder = fetch_index(remote, _cache_folder(local), exclusive=exclusive)
        dataset = open_dataset(folder, remote)
    manifest = dataset.manifest
    if context_length is not None and manifest.context_length != context_length:
        raise ConfigError(
            f"{dataset.place}: its rows are {manifest.context_length} tokens long, context_length"
            f" is {context_length}; set context_length={manifest.context_length} or convert the"
            " text again"
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


def _cache_folder(local: str | None) -> Path:
    try:
        return Path(local or CACHE).expanduser()
    except RuntimeError as error:  # a user without a name, and no HOME
        raise ConfigError(
            f"{local or CACHE}: {one_line(error)}; set local to the folder that is to hold the"
            " cache"
        ) from None


def open_train_data(
    config: DataConfig, *, tokenizer: PreTrainedTokenizerFast, context_length: int | None = None
) -> dict[str, Dataset]:
    """The datasets of every stream by name, or the only one under "", each checked as by
    `open_for_model`.
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
    """Return the tokenizer such that texts begin as the documents of `datasets` do.

    It goes into checkpoints, exports and tasks. Where their manifests do not say, it is as it was.
    Warns where the streams of a mixture differ, or where `pretrained`, the weights that training
    begins from, was trained on something else.
    """
    ends = {
        f"train_data{name and f'.streams.{name}'}": dataset.manifest.ends
        for name, dataset in datasets.items()
    }
    before = {f"model.pretrained={pretrained}": ends_in(pretrained)} if pretrained else {}
    chosen = choose_ends(ends, before)
    return tokenizer if chosen is None else with_ends(tokenizer, chosen)
