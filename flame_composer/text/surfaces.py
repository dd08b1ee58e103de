"""The bytes of a text that a tokenizer's tokens stand for."""

from __future__ import annotations

import json
import re
from typing import Any

from flame_composer.text.tokenizer import BareTokenizer

BYTE = re.compile(r"<0x[0-9A-F]{2}>")  # SentencePiece's token for a byte


def is_lossless(state: dict[str, Any]) -> bool:
    """Return whether a tokenizer, given as its JSON, drops and changes no part of a text.

    Its tokens then have the bytes of a text if they have as many. It may put a space before a text.
    """
    normalizer, splitter = state["normalizer"], state["pre_tokenizer"]
    steps = (normalizer or {}).get("normalizers", [normalizer] if normalizer else [])
    for step in steps:
        is_space = step.get("pattern") == {"String": " "} and step.get("content") == "▁"
        if step["type"] != "Prepend" and not (step["type"] == "Replace" and is_space):
            return False
    splits = (splitter or {}).get("pretokenizers", [splitter] if splitter else [])
    for step in splits:
        if step["type"] == "Split" and step["behavior"] == "Removed":
            return False
        if step["type"] not in ("ByteLevel", "Split", "Metaspace", "Digits"):
            return False
    return True


def surfaces_of(tokenizer: BareTokenizer) -> list[bytes] | None:
    """Return the bytes that each token stands for, indexed by id.

    They are right for byte-level tokenizers and those of SentencePiece's kind; who uses them
    compares them with a text. None for a tokenizer whose vocabulary is of another form.
    """
    state = json.loads(tokenizer.serialized)
    decoder = state["decoder"] or {"type": None}
    kinds = {step["type"] for step in decoder.get("decoders", [decoder])}
    vocabulary = state["model"].get("vocab")
    if not isinstance(vocabulary, dict):
        return None
    bytes_of = _bytes_by_character()
    found = [b""] * tokenizer.vocab_size
    for token, id in vocabulary.items():
        if "ByteLevel" in kinds:
            found[id] = bytes(bytes_of.get(character, 0) for character in token)
        elif BYTE.fullmatch(token):
            found[id] = bytes([int(token[3:5], 16)])
        else:
            found[id] = token.replace("▁", " ").encode()
    for added in state["added_tokens"]:
        if not BYTE.fullmatch(added["content"]):  # some tokenizers list byte tokens, too
            found[added["id"]] = added["content"].encode()
    unknown = vocabulary.get(state["model"].get("unk_token"))
    if unknown is not None:
        found[unknown] = b""  # it stands for any character: such a text is looked at by offsets
    return found


def _bytes_by_character() -> dict[str, int]:
    """Return the byte that each character of a byte-level vocabulary stands for.

    Source: GPT-2's `bytes_to_unicode`: printable bytes stand for themselves, and the others are the
    characters from 256 on, in order.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {
        chr(256 + number): byte for number, byte in enumerate(others)
    }
