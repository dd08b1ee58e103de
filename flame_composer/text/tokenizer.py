"""Tokenizers: loading them, telling them apart and encoding with them."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from flame_composer.errors import ConfigError, DataError, one_line
from flame_composer.text import long_texts
from flame_composer.text.steady import make_steady, mark_of, originals_of
from flame_composer.text.tokenizer_files import FILES, check_folder
from flame_composer.upstream.tokenizers import read_fast

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

_BYTE = re.compile(r"<0x[0-9A-F]{2}>")  # SentencePiece's token for a byte
_PANIC = "PanicException"  # raised by tokenizers when it gives up; not a subclass of Exception
Encoder = Callable[[Sequence[str]], tuple[NDArray[np.unsignedinteger], NDArray[np.int64]]]


@dataclass(frozen=True)
class TokenizerFingerprint:
    """The identity of a tokenizer, equal for all of its copies.

    `sha256` is that of the serialised tokenizer; the other fields depend on settings outside of it.
    `vocab_size` counts the ids from 0 to the largest one, so it is the smallest embedding that
    holds every token.
    """

    sha256: str
    vocab_size: int
    bos_token_id: int | None
    eos_token_id: int | None


@dataclass(frozen=True)
class BareTokenizer:
    """The parts of a tokenizer that an encoder needs.

    It can be sent to another process, which then need not import transformers.
    """

    serialized: str
    split_special_tokens: bool
    vocab_size: int
    bos_token_id: int | None
    eos_token_id: int | None


def bare(tokenizer: PreTrainedTokenizerFast | BareTokenizer) -> BareTokenizer:
    """Return the parts of a tokenizer that an encoder needs."""
    if isinstance(tokenizer, BareTokenizer):
        return tokenizer
    return BareTokenizer(
        serialized=tokenizer.backend_tokenizer.to_str(),
        split_special_tokens=tokenizer.split_special_tokens,
        vocab_size=vocab_size_of(tokenizer),
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )


def import_transformers_without_torch() -> None:
    """Import transformers without torch, which would take seconds and hundreds of MB.

    This is for processes that run no model. It has no effect once transformers is imported.
    """
    # Transformers reads these variables when it is imported.
    settings = {"USE_TORCH": "0", "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1"}
    before = {name: os.environ.get(name) for name in settings}
    os.environ.update(settings)
    try:
        import transformers  # noqa: F401
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def load_tokenizer(path_or_id: str) -> PreTrainedTokenizerFast:
    """Return the fast tokenizer in a Hugging Face folder or under a hub id.

    Code that comes with it is never run. Raises ConfigError if there is no tokenizer, if it has no
    fast (Rust) form, and if its files are not safe to load (`tokenizer_files`).
    """
    from huggingface_hub import snapshot_download
    from transformers.utils import logging

    is_folder = os.path.isdir(path_or_id)
    if not is_folder and not may_be_hub_id(path_or_id):
        raise ConfigError(
            f"tokenizer: {path_or_id}: no such folder; give a Hugging Face tokenizer folder or"
            " hub id"
        )
    if is_folder and not any(
        name.startswith(("token", "vocab")) for name in os.listdir(path_or_id)
    ):
        raise ConfigError(
            f"tokenizer: {path_or_id}: holds no tokenizer (tokenizer.json); give the folder or id"
            " of one"
        )
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        folder = (
            path_or_id
            if is_folder
            else snapshot_download(path_or_id, allow_patterns=[*FILES, "config.json"])
        )
        check_folder(folder, path_or_id)
        tokenizer = read_fast(str(folder))
        tokenizer.name_or_path = path_or_id
    except ConfigError:
        raise
    # A damaged folder can make transformers or tokenizers raise anything.
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != _PANIC:
            raise
        what = (
            "not a tokenizer folder"
            if is_folder
            else "no such folder, and it cannot be fetched from the Hugging Face hub"
        )
        raise ConfigError(f"tokenizer: {path_or_id}: {what}: {one_line(error)}") from None
    finally:
        logging.set_verbosity(verbosity)
    if not getattr(tokenizer, "is_fast", False):
        raise ConfigError(
            f"tokenizer: {path_or_id}: {type(tokenizer).__name__} has no fast form; "
            "convert it to one that has a tokenizer.json"
        )
    make_steady(tokenizer, path_or_id)
    return tokenizer


def may_be_hub_id(path_or_id: str) -> bool:
    """Return whether a name may be a Hugging Face hub id rather than a mistyped path.

    A path must not be looked up on the hub: without a network, a minute of retries would pass
    before an error that could be given at once. The name must not be that of a folder.
    """
    first, *rest = path_or_id.split("/")
    is_path = (
        first in ("", ".", "..", "~")
        or (rest and os.path.isdir(first))
        or os.path.exists(path_or_id)
    )
    return len(rest) <= 1 and not is_path


def fingerprint(tokenizer: PreTrainedTokenizerFast) -> TokenizerFingerprint:
    """Return the fingerprint of a tokenizer, which is the same for every copy, even if saved again.

    It does not depend on truncation and padding. If this package has changed the template or the
    dropout, it is made from the ones that the tokenizer came with (see `keep_original`).
    """
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    state["truncation"] = state["padding"] = None
    originals = originals_of(mark_of(tokenizer))
    for name, part in (("post_processor", state), ("dropout", state["model"])):
        if name in originals:
            part[name] = originals[name]
    # Older releases of tokenizers write a merge as "a b", newer ones as ["a", "b"].
    merges = state["model"].get("merges")
    if merges:
        state["model"]["merges"] = [
            merge.split(" ") if isinstance(merge, str) else merge for merge in merges
        ]
    canonical = json.dumps(state, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return TokenizerFingerprint(
        sha256=hashlib.sha256(canonical.encode()).hexdigest(),
        vocab_size=vocab_size_of(tokenizer),
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )


def vocab_size_of(tokenizer: PreTrainedTokenizerFast) -> int:
    """Return the number of ids from 0 to the largest one."""
    return max(tokenizer.get_vocab().values()) + 1


def token_bytes(tokenizer: PreTrainedTokenizerFast) -> NDArray[np.int64] | None:
    """Return how many bytes of UTF-8 each token id stands for, as an array indexed by id.

    Special tokens are not text and count 0. This works for byte-level tokenizers and those of
    SentencePiece's kind; a space that the latter put before a document counts as a byte. Returns
    None for a tokenizer whose tokens do not add up to the text, such as WordPiece's.
    """
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    decoder = state["decoder"] or {"type": None}
    kinds = {step["type"] for step in decoder.get("decoders", [decoder])}
    sizes = np.zeros(vocab_size_of(tokenizer), np.int64)
    for token, id in tokenizer.get_vocab().items():
        if "ByteLevel" in kinds:
            sizes[id] = len(token)  # a character for every byte
        elif kinds & {"ByteFallback", "Metaspace"}:
            sizes[id] = 1 if _BYTE.fullmatch(token) else len(token.replace("▁", " ").encode())
        else:
            return None
    for token in state["added_tokens"]:
        if not _BYTE.fullmatch(token["content"]):  # some tokenizers list byte tokens as special
            sizes[token["id"]] = 0 if token["special"] else len(token["content"].encode())
    sizes[tokenizer.all_special_ids] = 0
    return sizes


def token_dtype(vocab_size: int) -> type[np.unsignedinteger]:
    """Return the smallest type that holds every token id."""
    return np.uint16 if vocab_size <= 1 << 16 else np.uint32


def build_encoder(
    tokenizer: PreTrainedTokenizerFast | BareTokenizer, *, add_bos: bool, add_eos: bool
) -> Encoder:
    """Return a function that encodes texts, and counts the tokens of each.

    It returns the tokens of all texts end to end, and the number of tokens of each text. A
    document's tokens are exactly `[bos]` if `add_bos`, then
    `tokenizer(text, add_special_tokens=False).input_ids`, then `[eos]` if `add_eos`. These two
    flags alone decide which special tokens are added, whatever the tokenizer's own template; with
    the flags that mirror the template the result equals `tokenizer(text)`. Nothing is truncated. A
    long text is encoded in pieces where that is exact (`long_texts`), so that the memory needed
    does not grow with its length.

    Raises ConfigError if a token that is to be added does not exist.
    """
    tokenizer = bare(tokenizer)
    before, after = require_ends(tokenizer, add_bos=add_bos, add_eos=add_eos)
    backend = plain_copy(tokenizer)
    dtype = token_dtype(tokenizer.vocab_size)
    may_cut = long_texts.can_be_cut(tokenizer.serialized)

    def ids_of(texts: Sequence[str]) -> list[Sequence[int]]:
        with explained_failure():
            return [
                encoding.ids
                for encoding in backend.encode_batch_fast(list(texts), add_special_tokens=False)
            ]

    (line_break,) = ids_of(["\n"])

    def ids_in_pieces(text: str) -> Sequence[int]:
        first, *others = long_texts.cut(text)
        ids = [np.array(ids_of([first])[0], dtype)]
        for piece in others:
            # Encoded after the line break before it, the piece gets no space put before it.
            (of_piece,) = ids_of([f"\n{piece}"])
            assert of_piece[: len(line_break)] == line_break, piece[:40]
            ids.append(np.array(of_piece[len(line_break) :], dtype))
        return np.concatenate(ids)  # type: ignore[return-value]

    def encode(texts: Sequence[str]) -> tuple[NDArray[np.unsignedinteger], NDArray[np.int64]]:
        is_long = [may_cut and len(text) > 2 * long_texts.PIECE for text in texts]
        short = iter(ids_of([text for text, long in zip(texts, is_long, strict=True) if not long]))
        ids = [
            ids_in_pieces(text) if long else next(short)
            for text, long in zip(texts, is_long, strict=True)
        ]
        parts = (
            ids
            if not (before or after)
            else itertools.chain.from_iterable((before, each, after) for each in ids)
        )
        lengths = np.fromiter(map(len, ids), np.int64, len(ids)) + len(before) + len(after)
        return np.fromiter(itertools.chain.from_iterable(parts), dtype, int(lengths.sum())), lengths

    return encode


def require_ends(
    tokenizer: PreTrainedTokenizerFast | BareTokenizer, *, add_bos: bool, add_eos: bool
) -> tuple[list[int], list[int]]:
    """Return the ids to put before and after every document.

    Raises ConfigError if a token that is to be added does not exist.
    """
    ends: list[int | None] = [
        tokenizer.bos_token_id if add_bos else None,
        tokenizer.eos_token_id if add_eos else None,
    ]
    for wanted, end, name in zip((add_bos, add_eos), ends, ("bos", "eos"), strict=True):
        if wanted and end is None:
            raise ConfigError(
                f"add_{name}: the tokenizer has no {name} token; set add_{name}=false or give"
                " it one"
            )
    before, after = ([] if end is None else [end] for end in ends)
    return before, after


@contextlib.contextmanager
def explained_failure() -> Iterator[None]:
    """Raise DataError in place of the panic with which tokenizers gives up on a text.

    It gives up when a regular expression takes too many steps, for example. The panic it raises is
    not an Exception, so nothing that catches Exception would catch it.
    """
    try:
        yield
    except BaseException as error:
        if type(error).__name__ != _PANIC:
            raise
        raise DataError(
            f"the tokenizer gives up on a text: {' '.join(str(error).split())[:200]}; take another"
            " tokenizer, or leave that text out"
        ) from None


def plain_copy(tokenizer: PreTrainedTokenizerFast | BareTokenizer) -> Any:
    """Return a copy of the tokenizer's backend, without truncation and padding.

    Special tokens in a text are recognised as `tokenizer(text)` recognises them. Raises ConfigError
    if the tokenizer cannot be copied.
    """
    from tokenizers import Tokenizer

    tokenizer = bare(tokenizer)
    try:
        backend = Tokenizer.from_str(tokenizer.serialized)
    # The tokenizers package cannot read back all that it writes: of ids with gaps it omits some.
    except Exception as error:
        raise ConfigError(
            f"tokenizer: cannot be copied: {one_line(error)}; give one whose ids have no gaps"
        ) from None
    backend.no_truncation()
    backend.no_padding()
    backend.encode_special_tokens = tokenizer.split_special_tokens
    return backend


def special_tokens(tokenizer: PreTrainedTokenizerFast) -> dict[str, int | None]:
    """Return the ids of bos, eos and pad, under the names that generation configs use.

    A tokenizer without a pad token pads with eos.
    """
    pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    return {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": pad,
    }
