"""The tokens that documents began and ended with in training, recorded with the tokenizer.

Evaluation and generation read this record, so that a text begins as documents did in training.
"""

from __future__ import annotations

import copy
import json
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from flame_composer.errors import ConfigError
from flame_composer.storage import files
from flame_composer.text.steady import MARK, keep_original, mark_of
from flame_composer.text.tokenizer import require_ends
from flame_composer.upstream.tokenizers import rebuilds_its_template

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

ENDS = "documents"  # key in the mark (see `steady.MARK`) in tokenizer_config.json

log = logging.getLogger(__name__)


class Ends(NamedTuple):
    """Two flags: every document had the tokenizer's bos before it, and its eos after it."""

    bos: bool
    eos: bool


def parse_ends(content: Any, *, bos: str = "bos", eos: str = "eos") -> Ends | None:
    """Return the ends found under two keys of untrusted JSON, or None if either is not a bool."""
    if not isinstance(content, dict):
        return None
    before, after = content.get(bos), content.get(eos)
    return Ends(before, after) if isinstance(before, bool) and isinstance(after, bool) else None


def ends_of(tokenizer: PreTrainedTokenizerFast) -> Ends | None:
    """Return the ends that the tokenizer records, or None if it records none (see `with_ends`)."""
    return parse_ends(mark_of(tokenizer).get(ENDS))


def ends_in(folder: str) -> Ends | None:
    """Return the ends that the tokenizer in a local folder records, or None, without loading it."""
    try:
        content = json.loads(files.read_small(Path(folder, "tokenizer_config.json")))
    except (OSError, ValueError, RecursionError):
        return None
    mark = content.get(MARK) if isinstance(content, dict) else None
    return parse_ends(mark.get(ENDS)) if isinstance(mark, dict) else None


def note_ends(tokenizer: PreTrainedTokenizerFast, ends: Ends) -> None:
    """Record in the tokenizer what documents began and ended with, leaving its template alone."""
    tokenizer.init_kwargs[MARK] = {**mark_of(tokenizer), ENDS: ends._asdict()}


def with_ends(tokenizer: PreTrainedTokenizerFast, ends: Ends) -> PreTrainedTokenizerFast:
    """Return a copy of the tokenizer whose template begins a text as documents began in training.

    `tokenizer(text)` then puts bos before the text if documents had it. It never puts anything
    after the text, because a text that is to be continued has not ended. When the copy is saved,
    its tokenizer_config.json records the ends, and also the original template, so that the copy
    has the same fingerprint as the original.

    Raises ConfigError if documents are to begin with bos and the tokenizer has none.
    """
    before, _ = require_ends(tokenizer, add_bos=ends.bos, add_eos=False)
    made = copy.deepcopy(tokenizer)
    note_ends(made, ends)
    if template_of(made) != (before, []):
        keep_original(
            made, "post_processor", json.loads(made.backend_tokenizer.to_str())["post_processor"]
        )
        _set_template(made, bos=ends.bos)
    assert template_of(made) == (before, [])
    return made


def template_of(tokenizer: PreTrainedTokenizerFast) -> tuple[list[int], list[int]]:
    """Return the ids that the tokenizer's own template puts before and after a text."""
    if not tokenizer("").input_ids:
        return [], []
    encoding = tokenizer("a").encodings[0]
    text = [place for place, part in enumerate(encoding.sequence_ids) if part is not None]
    if not text:
        return encoding.ids, []
    return encoding.ids[: text[0]], encoding.ids[text[-1] + 1 :]


def _set_template(tokenizer: PreTrainedTokenizerFast, *, bos: bool) -> None:
    if rebuilds_its_template(tokenizer):  # as Llama's does, from these flags
        tokenizer.init_kwargs |= {"add_bos_token": bos, "add_eos_token": False}
        tokenizer.add_eos_token = False
        tokenizer.add_bos_token = bos
        return
    before = json.loads(tokenizer.backend_tokenizer.to_str())["post_processor"]
    steps = before["processors"] if before and before["type"] == "Sequence" else [before]
    # A ByteLevel step only sets offsets and adds no tokens.
    kept = [step for step in steps if step and step["type"] == "ByteLevel"]
    token, id = str(tokenizer.bos_token), tokenizer.bos_token_id
    texts = [{"Sequence": {"id": name, "type_id": number}} for number, name in enumerate("AB")]
    starts = (
        [{"SpecialToken": {"id": token, "type_id": number}} for number in range(2)] if bos else []
    )
    single, pair = [*starts[:1], texts[0]], [*starts[:1], texts[0], *starts[1:], texts[1]]
    special = {token: {"id": token, "ids": [id], "tokens": [token]}} if bos else {}
    template = {
        "type": "TemplateProcessing",
        "single": single,
        "pair": pair,
        "special_tokens": special,
    }
    tokenizer.backend_tokenizer.post_processor = _processor(
        {"type": "Sequence", "processors": [*kept, template]}
    )


def _processor(content: dict[str, Any]) -> Any:
    """Return the post-processor that tokenizer.json describes as `content`.

    The tokenizers package reads whole files only, so this makes a file with nothing else in it.
    """
    from tokenizers import Tokenizer

    nothing = dict.fromkeys(("truncation", "padding", "normalizer", "pre_tokenizer", "decoder"))
    model = {"type": "WordLevel", "vocab": {}, "unk_token": ""}
    whole: dict[str, Any] = {
        "version": "1.0",
        **nothing,
        "added_tokens": [],
        "model": model,
        "post_processor": content,
    }
    return Tokenizer.from_str(json.dumps(whole)).post_processor


def start_of(tokenizer: PreTrainedTokenizerFast) -> int | None:
    """Return the id of the token from which a document's first token is predicted.

    This is the eos of the document before it if documents in training ended with eos and began
    without bos. In every other case it is bos, or eos if the tokenizer has no bos. None if the
    tokenizer has neither.
    """
    ends, bos, eos = ends_of(tokenizer), tokenizer.bos_token_id, tokenizer.eos_token_id
    if ends is not None and ends.eos and not ends.bos:
        return eos
    return eos if bos is None else bos


def encode_prompt(tokenizer: PreTrainedTokenizerFast, text: str) -> list[int]:
    """Return the tokens of a text that a model is to continue.

    Bos comes first if documents began with it in training, unless the text already begins with it.
    Nothing is added if the tokenizer does not record how documents began. An empty text becomes the
    one token `start_of` returns; if there is none, ConfigError is raised.
    """
    ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False).input_ids
    ends, bos = ends_of(tokenizer), tokenizer.bos_token_id
    is_begun = bos is None or ids[:1] == [bos]
    if ends is not None and ends.bos and not is_begun:
        ids = [bos, *ids]
    if ids:
        return ids
    start = start_of(tokenizer)
    if start is None:
        raise ConfigError(
            "prompt: is empty, and the tokenizer has neither bos nor eos to begin with; "
            "give it some text"
        )
    return [start]


def choose_ends(ends: Mapping[str, Ends | None], before: Mapping[str, Ends | None]) -> Ends | None:
    """Return the ends of the first dataset that a model is trained on.

    `ends` maps each dataset's name to the ends it records. `before` maps each place that records
    earlier training of the model to the ends in it. Warns if the datasets differ, if one records
    nothing, and if earlier training used another beginning.
    """
    first = next(iter(ends))
    for name, each in ends.items():
        if each is None:
            warn(
                f"{name}: its manifest does not say what documents begin and end with; the "
                "tokenizer is saved as it is, and texts of tasks begin as its template has it"
            )
        elif each != ends[first] and ends[first] is not None:
            warn(
                f"{name}: its documents {describe(each)}, those of {first} "
                f"{describe(ends[first])}; texts of tasks and prompts will begin as in {first}"
            )
    chosen = ends[first]
    for name, each in before.items():
        if each is not None and chosen is not None and each.bos != chosen.bos:
            warn(
                f"{name}: was trained on documents that {describe(each)}; those of {first} "
                f"{describe(chosen)}"
            )
    return chosen


def begin_as_in_training(
    tokenizer: PreTrainedTokenizerFast, place: str, *, add_bos: bool | None, otherwise: str
) -> PreTrainedTokenizerFast:
    """Return a copy of the tokenizer with which texts begin as documents did in training.

    `place` names the model. `add_bos`, if set, takes precedence over how documents began. If
    neither is known, the tokenizer itself is returned with a warning, in which the text `otherwise`
    says how texts then begin. Another warning is logged if `add_bos` or the tokenizer's template
    contradicts training.

    Raises ConfigError if bos is to be added and the tokenizer has none.
    """
    known, template = ends_of(tokenizer), template_of(tokenizer)
    if known is None and add_bos is None:
        warn(
            f"{place}: does not say what documents began with in training; {otherwise}; its "
            f"tokenizer's template puts {_named(tokenizer, template[0])} before a text; "
            "set add_bos=true or add_bos=false to say it"
        )
        return tokenizer
    if known is not None and add_bos not in (None, known.bos):
        warn(
            f"add_bos={str(add_bos).lower()}: {place} was trained on documents that "
            f"{describe(known)}"
        )
    elif known is not None and template != ([tokenizer.bos_token_id] if known.bos else [], []):
        warn(
            f"{place}: the tokenizer's template puts {_named(tokenizer, template[0])} before a "
            f"text and {_named(tokenizer, template[1])} after it, but documents in training "
            f"{describe(known)}: texts begin as they did"
        )
    # Without a record, assume an eos: convert/to_mds.py adds one unless told otherwise.
    ends = known or Ends(bos=False, eos=tokenizer.eos_token_id is not None)
    return with_ends(tokenizer, ends if add_bos is None else ends._replace(bos=add_bos))


def describe(ends: Ends | None) -> str:
    """Return the ends as words that complete a sentence about documents."""
    assert ends is not None
    bos, eos = ("with" if end else "without" for end in ends)
    return f"begin {bos} bos and end {eos} eos"


def describe_start(tokenizer: PreTrainedTokenizerFast, add_bos: bool | None = None) -> str:
    """Return a line for the user that says what texts begin with, and why.

    `add_bos` is what the user set, or None.
    """
    why = (
        "as documents in training did"
        if ends_of(tokenizer) is not None
        else "as the tokenizer's template has it"
    )
    if add_bos is not None:
        why = f"as add_bos={str(add_bos).lower()} says"
    return f"texts begin with {_named(tokenizer, template_of(tokenizer)[0])}, {why}"


def _named(tokenizer: PreTrainedTokenizerFast, ids: list[int]) -> str:
    names = "".join(tokenizer.convert_ids_to_tokens(ids)) or "nothing"
    return names if names.isprintable() else ascii(names)  # token names are untrusted input


def warn(message: str) -> None:
    """Log a warning, on rank 0 only."""
    if os.environ.get("RANK", "0") == "0":
        log.warning("warning: %s", message)
