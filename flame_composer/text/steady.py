"""Switching off tokenizer settings that make tokens depend on chance or on other texts."""

from __future__ import annotations

import json
import logging
import os
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

log = logging.getLogger(__name__)
MARK = "flame_composer"  # key of this package's mark in tokenizer_config.json

_ORIGINALS = "tokenizer_json"  # key in the mark: the original values of what was changed


def make_steady(tokenizer: PreTrainedTokenizerFast, place: str) -> None:
    """Switch off dropout, truncation and padding in a tokenizer, with a warning.

    These make the tokens of a text depend on chance or on other texts. Of all the settings in the
    tokenizers package only BPE's dropout draws random numbers. A dropout of 1 does not, since it
    always leaves out all merges, and so it stays.
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
    """Return the mark that this package keeps in the tokenizer's configuration, or {} if none.

    A tokenizer may come from anywhere, so its content must not be trusted.
    """
    mark = tokenizer.init_kwargs.get(MARK)
    return mark if isinstance(mark, dict) else {}


def keep_original(
    tokenizer: PreTrainedTokenizerFast, name: Literal["post_processor", "dropout"], value: Any
) -> None:
    """Record the original value of `name` in tokenizer.json, which is about to be changed.

    A value recorded earlier stays. The fingerprint is made from the original values, so it does not
    change, and datasets still recognise the tokenizer they were made with.
    """
    mark = mark_of(tokenizer)
    tokenizer.init_kwargs[MARK] = {**mark, _ORIGINALS: {name: value, **originals_of(mark)}}


def originals_of(mark: dict[str, Any]) -> dict[str, Any]:
    """Return the original values that a mark records by name, or {} if it records none."""
    originals = mark.get(_ORIGINALS)
    return originals if isinstance(originals, dict) else {}
