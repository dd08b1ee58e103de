"""The filters that decide on a document, which are datatrove's, and the mask of personal data."""

from __future__ import annotations

import dataclasses
import hashlib
import os
from pathlib import Path
from typing import Any

import regex
from datatrove.data import Document
from datatrove.pipeline.filters.base_filter import BaseFilter
from datatrove.pipeline.filters.c4_filters import C4QualityFilter
from datatrove.pipeline.filters.gopher_quality_filter import GopherQualityFilter
from datatrove.pipeline.filters.gopher_repetition_filter import GopherRepetitionFilter
from datatrove.pipeline.filters.language_filter import LanguageFilter
from datatrove.pipeline.formatters.pii import PIIFormatter
from datatrove.utils.lid import FastTextLID
from datatrove.utils.word_tokenizers import WhitespaceTokenizer

from flame_composer.config.clean import (
    C4Config,
    CleanConfig,
    GopherQualityConfig,
    GopherRepetitionConfig,
    LanguageConfig,
)
from flame_composer.config.fields import nearest
from flame_composer.errors import ConfigError

WORDS = regex.compile(r"(?w)\b(?!\s).+?\b", regex.DOTALL)

SENTENCES = regex.compile(r"""(?:\p{Lu}\.|.)+?(?:[.?!…]+["'”’)\]]*(?=\s|$)|[。！？।]+|\n+|$)""")


class UnicodeTokenizer(WhitespaceTokenizer):
    """A splitter into words by Unicode's default rules (UAX #29), and into sentences.

    A sentence ends after certain characters. This suits any language that separates words by
    spaces, needs no model, and is 16 times as fast as the spaCy tokenizers that datatrove has for
    each language.
    """

    def word_tokenize(self, text: str) -> list[str]:
        return [word for word in WORDS.findall(text) if not word.isspace()]

    def sent_tokenize(self, text: str) -> list[str]:
        return [sentence for part in SENTENCES.findall(text) if (sentence := part.strip())]


class FastTextFile(FastTextLID):
    """A fastText model that is read from a file.

    Upstream: datatrove 0.9, `FastTextLID.model`.
    Mends: the original downloads the model from a fixed address.
    """

    def __init__(self, path: str, languages: list[str]):
        super().__init__(languages)
        self.path = path
        self._model: Any = None

    @property
    def model(self) -> Any:
        if self._model is None:
            from fasttext.FastText import _FastText

            self._model = _FastText(self.path)
        return self._model


def build_filters(config: CleanConfig) -> dict[str, BaseFilter]:
    """Return the filters of a configuration by their keys in it, in the order of their use."""
    filters: dict[str, BaseFilter] = {}
    words = UnicodeTokenizer()
    if config.language is not None:
        filters["language"] = build_language_filter(config.language)
    if config.gopher_repetition is not None:
        filters["gopher_repetition"] = build_repetition_filter(config.gopher_repetition, words)
    if config.gopher_quality is not None:
        filters["gopher_quality"] = build_quality_filter(config.gopher_quality, words)
    if config.c4 is not None:
        filters["c4"] = build_c4_filter(config.c4, words)
    return filters


def build_language_filter(section: LanguageConfig) -> LanguageFilter:
    language_filter = LanguageFilter(section.languages, section.threshold)
    language_filter.model = FastTextFile(section.model, section.languages)
    return language_filter


def build_repetition_filter(
    section: GopherRepetitionConfig, words: UnicodeTokenizer
) -> GopherRepetitionFilter:
    limits = dataclasses.asdict(section)
    for name, first in (("top_n_grams", 2), ("dup_n_grams", 5)):
        limits[name] = tuple((n, limit) for n, limit in enumerate(limits[name], first) if limit)
    return GopherRepetitionFilter(**limits, language=words)


def build_quality_filter(
    section: GopherQualityConfig, words: UnicodeTokenizer
) -> GopherQualityFilter:
    limits = dataclasses.asdict(section)
    # datatrove's name for this limit says the opposite of what it does.
    limits["max_non_alpha_words_ratio"] = limits.pop("min_alpha_words_ratio")
    return GopherQualityFilter(**limits, language=words)


def build_c4_filter(section: C4Config, words: UnicodeTokenizer) -> C4QualityFilter:
    limits = {
        name: -1 if value == 0 and value is not False else value
        for name, value in dataclasses.asdict(section).items()
    }
    return C4QualityFilter(**limits, language=words)


def judge(name: str, step: BaseFilter, document: Document) -> tuple[bool, str]:
    """Return whether a filter keeps a document, and if not, why.

    The reason is "" if the filter has only one. The filter may change the document.
    """
    result = step.filter(document)
    is_kept, reason = result if isinstance(result, tuple) else (bool(result), "")
    if name == "language" and not is_kept:
        reason = document.metadata["language"]
    if is_kept and not document.text.strip():
        return False, "no_line_left"
    return is_kept, reason


def build_mask(config: CleanConfig) -> PIIFormatter | None:
    """Return datatrove's formatter that masks addresses, or None if nothing is to be masked."""
    if config.pii is None:
        return None
    emails, ips = config.pii.emails, config.pii.ips
    return PIIFormatter(
        remove_emails=emails is not None,
        email_replacement=emails or "",
        remove_ips=ips is not None,
        ip_replacement=ips or "",
        only_remove_public_ips=config.pii.public_ips_only,
    )


def check_model(section: LanguageConfig) -> str:
    """Return a hash of the language model's file.

    Raise ConfigError if it cannot be read, or does not know one of the languages.
    """
    if not os.path.isfile(section.model):
        raise ConfigError(
            f"language.model: {section.model}: no such file; give that of a fastText model, e.g."
            " lid.176.bin"
        )
    try:
        labels = FastTextFile(section.model, []).model.get_labels()
    except (ValueError, RuntimeError) as error:
        raise ConfigError(f"language.model: {section.model}: cannot be read: {error}") from None
    known = [label.removeprefix("__label__") for label in labels]
    for language in section.languages:
        if language not in known:
            hint = nearest(language, known) or f"; it knows {', '.join(sorted(known)[:20])}"
            raise ConfigError(f"language.languages: {language}: unknown to {section.model}{hint}")
    digest = hashlib.blake2b(digest_size=8)
    with Path(section.model).open("rb") as model:
        while block := model.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
