"""Cutting of long texts into pieces that are encoded separately, with exactly the same tokens.

The tokenizers package keeps 80 to 180 bytes for each byte of a text that it is encoding, so a
document of 200 MB takes more memory than a machine has. The tokens of the pieces, put end to end,
are those of the whole text if every cut is made after a line break that no token and no rule of the
tokenizer reaches across. This can be guaranteed for two kinds of tokenizer:

- byte-level BPE that splits words by one of the patterns in `PATTERNS`: a single line break between
  a character that is not white space and a word character always ends a word;
- BPE over whole texts with `▁` for spaces (SentencePiece's kind), if no merge in its vocabulary
  contains the line break.

For every other tokenizer, texts are encoded whole.
"""

from __future__ import annotations

import json
import re
from typing import Any

PIECE = 1 << 20  # characters
CUT = re.compile(r"(?<=[^\s\u180e]\n)(?=\w)")  # U+180E was white space up to Unicode 6.3
_LINE_BREAKS = ("\n", "<0x0A>")  # the tokens that may stand for a line break

# Each pattern begins a new word after a lone line break, has no look-behind, and lets only white
# space and punctuation run into a line break.
_LLAMA_3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
PATTERNS = (
    _LLAMA_3,
    _LLAMA_3.replace("{1,3}", ""),  # Qwen 2
    # GPT-2, the pattern built into ByteLevel
    r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
)


def can_be_cut(serialized: str) -> bool:
    """Return whether texts may be cut at `CUT` for a tokenizer with this tokenizer.json.

    Each piece after a cut must be encoded together with the line break before it, and the tokens of
    that line break then dropped: some tokenizers put a space before a text, and would put one
    before the piece.
    """
    state = json.loads(serialized)
    model, before = state["model"], state["pre_tokenizer"]
    is_certain_bpe = model.get("type") == "BPE" and not model.get("dropout")
    if not is_certain_bpe or any(map(_reaches_out, state["added_tokens"])):
        return False
    steps = _steps(before, "pretokenizers")
    if steps and steps[-1]["type"] == "ByteLevel":
        return _is_known_byte_level(steps) and all(
            step["type"] == "NFC" for step in _steps(state["normalizer"], "normalizers")
        )
    return _is_known_spaced(state)


def cut(text: str) -> list[str]:
    """Return the text in pieces, each ending at the first `CUT` after `PIECE` characters."""
    pieces, start = [], 0
    while (found := CUT.search(text, start + PIECE)) is not None:
        pieces.append(text[start : found.end()])
        start = found.end()
    return [*pieces, text[start:]]


def _is_known_byte_level(steps: list[dict[str, Any]]) -> bool:
    *splits, last = steps
    if last["add_prefix_space"]:
        return False
    splits = [step for step in splits if step["type"] != "Digits"]
    if last["use_regex"]:
        return not splits
    return len(splits) == 1 and _is_known_split(splits[0])


def _is_known_split(step: dict[str, Any]) -> bool:
    is_plain = step["type"] == "Split" and step["behavior"] == "Isolated" and not step["invert"]
    return is_plain and step["pattern"].get("Regex") in PATTERNS


def _is_known_spaced(state: dict[str, Any]) -> bool:
    """Return whether a tokenizer writes spaces as `▁` and has no line break in any merge.

    The normalizer or the pre-tokenizer may put the `▁` there.
    """
    model = state["model"]
    merges = (merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"])
    is_apart = not any(
        line_break in part for merge in merges for part in merge for line_break in _LINE_BREAKS
    )
    is_known = any(line_break in model["vocab"] for line_break in _LINE_BREAKS)
    normal, before = (
        _steps(state["normalizer"], "normalizers"),
        _steps(state["pre_tokenizer"], "pretokenizers"),
    )
    is_spaced = all(
        step["type"] in ("Prepend", "Replace") and r"\n" not in json.dumps(step) for step in normal
    )
    has_plain_patterns = all(
        "String" in step["pattern"] for step in normal if step["type"] == "Replace"
    )
    is_whole = all(step["type"] == "Metaspace" for step in before)
    return (
        is_apart
        and is_known
        and is_spaced
        and has_plain_patterns
        and is_whole
        and not model["ignore_merges"]
    )


def _steps(part: dict[str, Any] | None, name: str) -> list[dict[str, Any]]:
    if part is None:
        return []
    return part[name] if part["type"] == "Sequence" else [part]


def _reaches_out(token: dict[str, Any]) -> bool:
    """Return whether an added token contains white space or depends on what stands beside it."""
    return (
        token["lstrip"]
        or token["rstrip"]
        or token["single_word"]
        or re.search(r"\s", token["content"]) is not None
    )
