"""What makes a tokenizer's answer depend on chance or on other texts, switched off and noted."""

from __future__ import annotations

import json
import logging
import os
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

log = logging.getLogger(__name__)
MARK = "flame_composer"  # what we keep in tokenizer_config.json

_ORIGINALS = "tokenizer_json"  # of the mark: what was changed in tokenizer.json, as it was


def make_steady(tokenizer: PreTrainedTokenizerFast, place: str) -> None:
    """Switch off what makes the tokens of a text depend on chance or on other texts, and say so.

    Of the settings that tokenizers knows, only BPE's dropout draws random numbers, unless it is 1:
    then all merges are left out, always.
    """
    backend = tokenizer.backend_tokenizer
    found = []
    dropout = getattr(backend.model, "dropout", None)
    if dropout is not None and 0 < dropout < 1:
        found.append("dropout of merges (BPE: other tokens for the same text each time)")
        keep_original(tokenizer, "dropout", json.loads(backend.to_str())["model"]["dropout"])
        backend.model.dropout = None
    if backend.truncation is not None:
        found.append(f"truncation to {backend.truncation['max_length']} tokens")
        backend.no_truncation()
    if backend.padding is not None:
        found.append("padding")
        backend.no_padding()
    if found and os.environ.get("RANK", "0") == "0":
        verb = "are" if len(found) > 1 else "is"
        log.warning(
            "warning: tokenizer: %s: its tokenizer.json has %s switched on, which %s switched off"
            " here",
            place,
            " and ".join(found),
            verb,
        )


def mark_of(tokenizer: PreTrainedTokenizerFast) -> dict[str, Any]:
    """Return what this package has kept in the tokenizer's configuration.

    It may come from elsewhere and is not to be trusted.
    """
    mark = tokenizer.init_kwargs.get(MARK)
    return mark if isinstance(mark, dict) else {}


def keep_original(
    tokenizer: PreTrainedTokenizerFast, name: Literal["post_processor", "dropout"], value: Any
) -> None:
    """Keep what tokenizer.json has under `name`, which is about to be changed.

    If that was done before, the first one stays. With it the fingerprint stays what it was, so that
    datasets know the tokenizer they were made with.
    """
    mark = mark_of(tokenizer)
    tokenizer.init_kwargs[MARK] = {**mark, _ORIGINALS: {name: value, **originals_of(mark)}}


def originals_of(mark: dict[str, Any]) -> dict[str, Any]:
    originals = mark.get(_ORIGINALS)
    return originals if isinstance(originals, dict) else {}
