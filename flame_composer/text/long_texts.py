"""Long texts in pieces: where a text can be cut so that the pieces' tokens, end to end, are those
of the whole.

tokenizers keeps 80 to 180 bytes for each byte of a text that it is encoding, so that a document of
200 MB takes more memory than a machine has. A cut is exact after a line break where no token and no
rule of the tokenizer reaches across:

- byte-level BPE whose words are told apart by one of the patterns in `PATTERNS`: a single line
  break between a character
  that is no white space and a word character always ends a word;
- BPE over whole texts with `▁` for spaces (SentencePiece's kind), in whose vocabulary the line
  break is in no merge.

Every other tokenizer encodes whole texts.
"""

from __future__ import annotations

import json
import re
from typing import Any

PIECE = 1 << 20  # characters
CUT = re.compile(r"(?<=[^\s\u180e]\n)(?=\w)")  # U+180E was white space up to Unicode 6.3
_LINE_BREAKS = ("\n", "<0x0A>")  # as a token

# Each begins a word after a lone line break, has no look-behind, and lets none but white space and
# punctuation run into one.
_LLAMA_3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
PATTERNS = (
    _LLAMA_3,
    _LLAMA_3.replace("{1,3}", ""),  # Qwen 2
    # GPT-2, as ByteLevel has it built in
    r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
)


def can_be_cut(serialized: str) -> bool:
    """Whether texts may be cut at `CUT` for this tokenizer (tokenizer.json's content).

    A piece behind a cut must be encoded with the line break before it, whose tokens are then left
    out: some tokenizers put a space before a text, and would put one before the piece.
    """
    state = json.loads(serialized)
    model, before = state["model"], state["pre_tokenizer"]
    if (
        model.get("type") != "BPE"
        or model.get("dropout")
        or any(map(_reaches_out, state["added_tokens"]))
    ):
        return False
    steps = _steps(before, "pretokenizers")
    if steps and steps[-1]["type"] == "ByteLevel":
        return _is_known_byte_level(steps) and all(
            step["type"] == "NFC" for step in _steps(state["normalizer"], "normalizers")
        )
    return _is_known_spaced(state)


def cut(text: str) -> list[str]:
    """Return the text in pieces of `PIECE` characters or as few more as it takes to reach a cut."""
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
    """`▁` in place of spaces, put there by the normalizer or the pre-tokenizer, and merges that
    know no line break.
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
    """Whether an added token takes in, or looks at, what stands beside it."""
    return (
        token["lstrip"]
        or token["rstrip"]
        or token["single_word"]
        or re.search(r"\s", token["content"]) is not None
    )
