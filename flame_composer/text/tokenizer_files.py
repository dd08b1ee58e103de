"""Checks of tokenizer files made by others: which files are accepted, and with what content."""

from __future__ import annotations

import base64
import binascii
import json
import logging
import math
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from flame_composer.errors import ConfigError, DataError, one_line
from flame_composer.storage import files
from flame_composer.text.counts import require_counts

# The names that transformers and tokenizers use for a tokenizer's files. None of them holds code.
FILES = frozenset(
    {
        "tokenizer.json",
        "tokenizer_config.json",
        "special_tokens_map.json",
        "added_tokens.json",
        "chat_template.jinja",
        "vocab.json",
        "merges.txt",
        "vocab.txt",
        "unigram.json",
        "tokenizer.model",
        "spiece.model",
        "sentencepiece.model",
        "sentencepiece.bpe.model",
        "spm.model",
        "tekken.json",
        "vocab.bpe",
        "encoder.json",
    }
)
# Characters. The longest tokens of known tokenizers are runs of about a hundred spaces.
LONGEST_TOKEN = 10_000
# Characters that a normalizer, pre-tokenizer or decoder may make of one. Unicode's normal forms
# make up to 18.
MOST_GROWTH = 1000
MOST_STEPS = 1000  # in a normalizer, pre-tokenizer or decoder; known tokenizers have up to about 20
# Tokens that a template may put around a text. Known tokenizers add one or two.
MOST_ADDED = 10_000
# A key that older releases of transformers wrote. Nothing reads it.
_UNREAD = "special_tokens_map_file"

log = logging.getLogger(__name__)


def check_folder(folder: str | Path, place: str) -> None:
    """Raise ConfigError if a tokenizer's folder is not safe to load.

    It is not if its files are too large or malformed, if they name files elsewhere, or if the
    tokenizer could turn a short text into an enormous one. `place` names it in the error.
    """
    for name in sorted(FILES):
        _check_file(Path(folder, name), place)
    is_named = False
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        path = Path(folder, name)
        if path.is_file():
            content = _read(path, place)
            _check_config(content, path, place)
            is_named = is_named or content.get("tokenizer_class") is not None
    path = Path(folder, "config.json")
    # Transformers looks there for the kind of tokenizer if the other files do not name it.
    if path.is_file() and not is_named:
        require_counts(_read(path, place), f"tokenizer: {place}")
    path = Path(folder, "tokenizer.json")
    if path.is_file():
        check_content(_read(path, place), place)


def _check_file(path: Path, place: str) -> None:
    """Raise ConfigError if a file is too large to be read.

    This matters also for files whose content is not checked here, since transformers reads them.
    """
    if path.is_file() and path.stat().st_size > files.MOST_JSON:
        raise ConfigError(
            f"tokenizer: {place}: {path.name} has more than {files.MOST_JSON:,} bytes; get the "
            "tokenizer again"
        )


def _read(path: Path, place: str) -> dict[str, Any]:
    try:
        content = json.loads(files.read_small(path))
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(
            f"tokenizer: {place}: not a tokenizer folder: {path.name}: {one_line(error)}"
        ) from None
    if not isinstance(content, dict):
        raise ConfigError(
            f"tokenizer: {place}: not a tokenizer folder: {path.name} must hold keys and values"
        )
    return content


def _check_config(content: dict[str, Any], path: Path, place: str) -> None:
    """Raise ConfigError for keys of a tokenizer's configuration that are not safe.

    The keys become arguments of the tokenizer's class, and some of them are paths that it reads.
    """
    inside = os.path.realpath(path.parent)
    for key, value in content.items():
        is_elsewhere = isinstance(value, str) and os.path.dirname(os.path.realpath(value)) != inside
        is_read = key.endswith("_file") and key != _UNREAD
        if is_read and is_elsewhere and os.path.exists(value):
            raise ConfigError(
                f"tokenizer: {place}: {path.name} names a file elsewhere, {key}={value}; take that"
                " key out"
            )
    length = content.get("model_max_length")
    if not isinstance(length, int | float | None):
        raise ConfigError(
            f"tokenizer: {place}: {path.name} has model_max_length={str(length)[:40]!r}, must be a"
            " number; correct it, or take that key out"
        )
    if content.get("init_inputs"):
        raise ConfigError(
            f"tokenizer: {place}: {path.name} has init_inputs, which may name files elsewhere; take"
            " that key out"
        )
    _require_plain(content.get("fast_tokenizer_files"), "fast_tokenizer_files", place)
    templates = content.get("chat_template")
    if isinstance(templates, list):
        templates = [each.get("name") if isinstance(each, dict) else each for each in templates]
    _require_plain(templates, "chat_template", place)
    if (
        _longest({key: value for key, value in content.items() if key != "chat_template"})
        > LONGEST_TOKEN
    ):
        raise ConfigError(
            f"tokenizer: {place}: {path.name} has a text of more than {LONGEST_TOKEN:,} "
            "characters, which no token is; get the tokenizer again"
        )


def _require_plain(names: object, key: str, place: str) -> None:
    """Raise ConfigError for a name that becomes a file name but could lead to another folder.

    Files of these names are read when the tokenizer is loaded, or written when it is saved.
    """
    for name in names if isinstance(names, list | dict) else ():
        if not files.is_plain_name(name):
            raise ConfigError(
                f"tokenizer: {place}: its {key} has {str(name)[:100]!r} for a name, which would"
                " lead to another folder; rename it"
            )


def _longest(content: Any) -> int:
    longest, nested = 0, [content]
    while nested:
        each = nested.pop()
        if isinstance(each, str):
            longest = max(longest, len(each))
        elif isinstance(each, dict):
            nested += [*each, *each.values()]
        elif isinstance(each, list):
            nested += each
    return longest


def check_content(content: dict[str, Any], place: str) -> None:
    """Raise ConfigError for a `tokenizer.json` that could make an enormous text of a short one.

    Limits apply to the length of tokens, the number and the growth of the steps, and the tokens
    that its template adds.
    """
    model = content.get("model")
    vocabulary = model.get("vocab") if isinstance(model, dict) else None
    tokens: Iterable[Any] = vocabulary if isinstance(vocabulary, dict) else _firsts(vocabulary)
    longest = max((len(token) for token in tokens if isinstance(token, str)), default=0)
    others = (
        {key: value for key, value in model.items() if key not in ("vocab", "merges")}
        if isinstance(model, dict)
        else {}
    )
    # A model's other settings hold prefixes and suffixes of tokens.
    longest = max(longest, _longest(content.get("added_tokens")), _longest(others))
    if longest > LONGEST_TOKEN:
        raise ConfigError(
            f"tokenizer: {place}: has a token of {longest:,} characters, more than"
            f" {LONGEST_TOKEN:,}; get the tokenizer again, or take that token out"
        )
    for part in ("normalizer", "pre_tokenizer", "decoder"):
        try:
            steps, growth = _count(content.get(part)), _growth(content.get(part))
        except RecursionError:
            steps, growth = 0, math.inf
        if steps > MOST_STEPS:
            raise ConfigError(
                f"tokenizer: {place}: its {part} has {steps:,} steps, more than {MOST_STEPS:,}; get"
                " the tokenizer again, or take those steps out"
            )
        if growth > MOST_GROWTH:
            raise ConfigError(
                f"tokenizer: {place}: its {part} can make {growth:.3g} characters of one, more than"
                f" {MOST_GROWTH:,}; get the tokenizer again, or take those steps out"
            )

    added = _added(content.get("post_processor"))
    if added > MOST_ADDED:
        raise ConfigError(
            f"tokenizer: {place}: its template puts up to {added:,} tokens around a text, more than"
            f" {MOST_ADDED:,}; get the tokenizer again, or correct its post_processor"
        )


def _count(step: Any) -> int:
    """Return the number of steps inside a step, itself included."""
    if not isinstance(step, dict):
        return 0
    return 1 + sum(
        _count(each) for value in step.values() if isinstance(value, list) for each in value
    )


def _added(step: Any) -> int:
    """Return an upper bound on the tokens that a post-processor's templates put around a text."""
    steps, added = [step], 0
    while steps:
        each = steps.pop()
        if not isinstance(each, dict):
            continue
        processors, special = each.get("processors"), each.get("special_tokens")
        steps += processors if isinstance(processors, list) else []
        pieces = [each[name] for name in ("single", "pair") if isinstance(each.get(name), list)]
        ids = (
            [token.get("ids") for token in special.values() if isinstance(token, dict)]
            if isinstance(special, dict)
            else []
        )
        longest = max((len(each) for each in ids if isinstance(each, list)), default=0)
        added += max(map(len, pieces), default=0) * longest
    return added


def _firsts(pairs: object) -> Iterable[Any]:
    return (
        [pair[0] for pair in pairs if isinstance(pair, list) and pair]
        if isinstance(pairs, list)
        else ()
    )


def _growth(step: Any) -> float:
    """Return an upper bound on the characters that a step, with those in it, makes of one."""
    if not isinstance(step, dict):
        return 1
    steps = [each for value in step.values() if isinstance(value, list) for each in value]
    growth = math.prod(map(_growth, steps), start=1.0)
    kind = step.get("type")
    if kind == "Replace":
        content, pattern = step.get("content"), step.get("pattern")
        text = pattern.get("String") if isinstance(pattern, dict) else None
        # A regular expression can match between characters, so it may add text to each.
        length = len(content) if isinstance(content, str) else 0
        return growth * (
            max(1, length / len(text)) if isinstance(text, str) and text else 1 + length
        )
    if kind == "Prepend":
        return growth * (1 + len(str(step.get("prepend"))))
    return growth * (
        _longest_replacement(step.get("precompiled_charsmap")) if kind == "Precompiled" else 1
    )


def _longest_replacement(charsmap: object) -> int:
    """Return the length of the longest text in SentencePiece's table of replacements.

    The table holds the size of a trie, the trie, and the texts it leads to, each followed by a zero
    byte.
    """
    try:
        table = base64.b64decode(charsmap) if isinstance(charsmap, str) else b""
    except binascii.Error:  # the tokenizers package reports what is wrong with it
        return 1
    texts = table[4 + int.from_bytes(table[:4], "little") :].split(b"\0")
    return max(1, *(len(text.decode(errors="replace")) for text in texts))


def write_files(saved: Mapping[str, Any], folder: Path, place: str) -> None:
    """Write the tokenizer files that `HuggingFaceModel.get_metadata` put in a checkpoint.

    Raises DataError before anything is written if a file name is that of code or leads out of the
    folder. Files that are not known are left out, with a warning. Raises DataError as well if the
    content of a file is damaged.
    """
    wanted = {}
    for name, each in saved.items():
        ending = each.get("file_extension") if isinstance(each, dict) else None
        # Composer's first releases left the ending off.
        file = (
            name if not isinstance(ending, str) or str(name).endswith(ending) else f"{name}{ending}"
        )
        if not files.is_plain_name(file) or file.endswith(".py") or ending == ".py":
            raise DataError(
                f"{place}: refused: its tokenizer has a file {str(file)[:100]!r}, which is "
                "not the name of a tokenizer's file"
            )
        if file in FILES:
            wanted[file] = each
        else:
            log.warning(
                "warning: %s: its tokenizer has a file %r, which is not known and was left out",
                place,
                file,
            )
    for file, each in wanted.items():
        try:
            (folder / file).write_bytes(_encoded(file, each["content"]))
        except (KeyError, TypeError, ValueError, RecursionError) as error:
            raise DataError(
                f"{place}: {file} of its tokenizer is damaged: {one_line(error)}"
            ) from None


def _encoded(file: str, content: Any) -> bytes:
    if file.endswith(".json"):
        return json.dumps(content).encode()
    if file.endswith(".model"):
        return bytes(memoryview(content))
    if file.endswith(".txt"):
        return "".join(f"{line}\n" for line in content).encode()
    return str(content).encode()
