"""The fast encoder, gigatoken: the choice between it and tokenizers, and encoding with it."""

from __future__ import annotations

import importlib.metadata
import re
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from flame_composer.errors import ConfigError, one_line
from flame_composer.text.tokenizer import (
    BareTokenizer,
    Encoder,
    bare,
    plain_copy,
    require_ends,
    token_dtype,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

# Characters new in Unicode 17: gigatoken 0.10 takes them for letters and digits, tokenizers 0.22
# does not yet (found by encoding every code point with both). A text with one goes to tokenizers.
NEW_CHARACTERS = re.compile(
    "[\u088f\u0c5c\u0cdc\ua7ce\ua7cf\ua7d2\ua7d4\ua7f1\U00010940-\U00010959"
    "\U00010ec5-\U00010ec7\U00011db0-\U00011ddb\U00011de0-\U00011de9\U00016ea0-\U00016eb8"
    "\U00016ebb-\U00016ed3\U00016ff2-\U00016ff6\U000187f8-\U000187ff\U00018d09-\U00018d1e"
    "\U00018d80-\U00018df2\U0001e6c0-\U0001e6ff\U0002b73a-\U0002b73f\U0002cea2-\U0002cead"
    "\U000323b0-\U00033479]"
)
# How these characters begin in UTF-8: the first byte, and the first two. Searching for these first
# is forty and six times as fast as searching for the characters.
NEW_BYTES = (b"\xe0", b"\xea", b"\xf0")
NEW_STARTS = re.compile(rb"\xe0[\xa2\xb1\xb3]|\xea\x9f|\xf0[\x90\x91\x96\x98\x9e\xab\xac\xb2\xb3]")
PROBES = (
    "",
    " ",
    "The quick  brown fox,\n\n\tdon't jump 1234567 times.\r\n",
    " leading and trailing ",
    "x" * 300,
    "\x00\x7f\x85",
    "Größe — naïve e\u0301 数据 在 磁盘 上。 🔥👩‍🚀 \u200b\u00a0\u2028\ufeff",
    "def f(x):\n        return {'a': [x ** 2]}  # ok\n",
    "İſﬁⅧ ١٢٣ ñ'LL 'Re 's",
    "▁under▁ <0x0A> <s> </s> <unk> <pad> <|endoftext|> [CLS] [UNK]",
)


def join_given(
    tokenizer: PreTrainedTokenizerFast | BareTokenizer, *, add_bos: bool, add_eos: bool
) -> Callable[[Sequence[NDArray[Any]]], tuple[NDArray[np.unsignedinteger], NDArray[np.int64]]]:
    """Return what `tokenizer.build_encoder` returns, but for documents that are tokens already."""
    tokenizer = bare(tokenizer)
    before, after = require_ends(tokenizer, add_bos=add_bos, add_eos=add_eos)
    dtype = token_dtype(tokenizer.vocab_size)
    ends = np.array(before, dtype), np.array(after, dtype)

    def join(documents: Sequence[NDArray[Any]]) -> Any:
        parts = [np.zeros(0, dtype)]
        for each in documents:
            parts += (ends[0], each, ends[1])
        lengths = np.fromiter(map(len, documents), np.int64, len(documents))
        joined = np.concatenate(parts, dtype=dtype, casting="unsafe")
        return joined, lengths + len(before) + len(after)

    return join


def choose_encoder(
    wanted: Literal["auto", "gigatoken", "hf"],
    tokenizer: PreTrainedTokenizerFast,
    begun: str | None = None,
) -> str:
    """Return the name of the encoder for a conversion: "hf", or "gigatoken" and its version.

    With "auto", that is the encoder that the conversion was `begun` with. A new conversion uses
    gigatoken if it is installed and encodes some awkward texts to the tokenizer's own tokens, and
    "hf" otherwise. Raises ConfigError if `wanted` is "gigatoken" and it cannot be used.
    """
    if wanted == "hf":
        return HF
    if wanted == "auto" and begun is not None:
        return begun
    installed = _installed()
    reason = (
        "gigatoken is not installed; pip install 'flame-composer[fast]'"
        if installed is None
        else _trouble(tokenizer)
    )
    if reason is None:
        assert installed is not None
        return installed
    if wanted == "gigatoken":
        raise ConfigError(f"encoder: {reason}, or set encoder=auto")
    return HF


def require_installed(name: str) -> None:
    """Raise ConfigError if this encoder is a version of gigatoken that is not the one installed."""
    if name not in (HF, GIVEN, _installed()):
        raise ConfigError(
            f"encoder: this conversion was begun with {name}, and {_installed() or 'none'} is"
            f" installed; pip install {name.replace(' ', '==')}, or remove the folder"
        )


def build_fast_encoder(
    tokenizer: PreTrainedTokenizerFast | BareTokenizer,
    exact: Encoder,
    *,
    add_bos: bool,
    add_eos: bool,
) -> Encoder:
    """Return a gigatoken encoder that gives the same tokens as `exact`.

    `exact` is the encoder that `tokenizer.build_encoder` returns for the same flags. It encodes the
    texts that gigatoken would encode differently.
    """
    tokenizer = bare(tokenizer)
    fast = _gigatoken(tokenizer)
    before, after = require_ends(tokenizer, add_bos=add_bos, add_eos=add_eos)
    dtype = token_dtype(tokenizer.vocab_size)
    ends = np.array(before, dtype), np.array(after, dtype)

    def encode(texts: Sequence[str]) -> Any:
        parts = [np.zeros(0, dtype)]
        lengths = np.zeros(len(texts), np.int64)
        for i, text in enumerate(texts):
            if not text.isascii() and _may_be_new(text.encode()) and NEW_CHARACTERS.search(text):
                parts.append(exact([text])[0])
                lengths[i] = len(parts[-1])
            else:
                ids = fast(text)
                parts += (ends[0], ids, ends[1])
                lengths[i] = len(ids) + len(before) + len(after)
        return np.concatenate(parts, dtype=dtype, casting="unsafe"), lengths

    return encode


def _may_be_new(data: bytes) -> bool:
    return any(first in data for first in NEW_BYTES) and NEW_STARTS.search(data) is not None


def _installed() -> str | None:
    try:
        return f"gigatoken {importlib.metadata.version('gigatoken')}"
    except importlib.metadata.PackageNotFoundError:
        return None


def _gigatoken(tokenizer: PreTrainedTokenizerFast | BareTokenizer) -> Callable[[str], Any]:
    """Return gigatoken's function that encodes one text, on the calling thread.

    This is as fast as encoding in batches, and needs none of the awkward arrays that batches use.
    """
    import gigatoken

    return gigatoken.Tokenizer(plain_copy(tokenizer)).encode


def _trouble(tokenizer: PreTrainedTokenizerFast) -> str | None:
    """Return why gigatoken cannot encode for this tokenizer, or None if it can."""
    if tokenizer.split_special_tokens:
        return (
            "gigatoken does not split special tokens found in a text, as split_special_tokens asks;"
            " set encoder=hf"
        )
    try:
        fast = _gigatoken(tokenizer)
    except Exception as error:  # gigatoken may raise anything for a kind of tokenizer it lacks
        return f"gigatoken does not handle this tokenizer: {one_line(error)}; set encoder=hf"
    added = " ".join(f"a{token}b {token}" for token in list(tokenizer.get_added_vocab())[:100])
    for text in (*PROBES, added):
        if fast(text).tolist() != tokenizer(text, add_special_tokens=False).input_ids:
            return f"gigatoken's tokens of {text[:60]!r} are not this tokenizer's; set encoder=hf"
    return None


HF = "hf"  # the encoder of the tokenizers package, which every other encoder must agree with
GIVEN = "given"  # no encoder: the source has tokens that others have made
