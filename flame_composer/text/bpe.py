"""Training of a new tokenizer on one's own documents."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from flame_composer.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


def train_bpe(
    texts: Iterable[str], *, vocab_size: int, min_frequency: int, eos_token: str
) -> PreTrainedTokenizerFast:
    """Return a byte-level BPE tokenizer learnt from an iterable of texts.

    Every byte is a token, so the tokenizer can encode any text. The same texts in the same order
    give the same tokenizer. `eos_token` gets id 0 and also serves as bos and pad.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()  # pyright: ignore[reportAttributeAccessIssue]
    trainer = trainers.BpeTrainer(  # pyright: ignore[reportCallIssue]
        vocab_size=vocab_size,
        min_frequency=min_frequency,
        special_tokens=[eos_token],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=eos_token,
        bos_token=eos_token,
        pad_token=eos_token,
        clean_up_tokenization_spaces=False,
    )


def is_finished(out: Path, plan: bytes) -> bool:
    """Return whether `out` already holds the tokenizer made with this plan.

    False if `out` is missing or an empty folder. Raises ConfigError if it holds anything else.
    """
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return False
    record = out / "training.json"
    if not record.is_file():
        raise ConfigError(f"out: {out}: is not an empty folder; name a new one or empty it")
    if record.read_bytes() != plan:
        raise ConfigError(
            f"out: {out}: holds a tokenizer trained with other settings or text (see {record}); "
            "name another out, or remove this folder"
        )
    return True


def save(tokenizer: PreTrainedTokenizerFast, out: Path, plan: bytes) -> None:
    """Write the tokenizer and its plan to the folder `out`, which appears whole or not at all.

    Raises ConfigError if the path of the temporary folder beside it is taken and cannot be cleared.
    """
    temporary = out.with_name(f".{out.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.parent.mkdir(parents=True, exist_ok=True)
    try:
        temporary.mkdir()
    except FileExistsError:
        raise ConfigError(
            f"out: {temporary}: is in the way: a link, or another user's; remove it, or name"
            " another out"
        ) from None
    tokenizer.save_pretrained(temporary)  # pyright: ignore[reportAttributeAccessIssue]
    (temporary / "training.json").write_bytes(plan)
    if out.exists():
        out.rmdir()  # it is empty, or `is_finished` would have refused it
    os.rename(temporary, out)
