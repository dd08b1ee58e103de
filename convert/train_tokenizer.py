"""Learn a byte-level BPE tokenizer: python convert/train_tokenizer.py source=DIR out=DIR
vocab_size=4096 [key=value ...]
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

from tqdm import tqdm

from flame_composer.config.cli import run
from flame_composer.config.convert import TokenizerTrainConfig
from flame_composer.config.rules import ConfigError, DataError
from flame_composer.storage import files as storage
from flame_composer.text.documents import sample_texts
from flame_composer.text.sources import find_files

SETTINGS = (
    "source",
    "suffixes",
    "text_column",
    "vocab_size",
    "min_frequency",
    "max_bytes",
    "eos_token",
)


def main(config: TokenizerTrainConfig) -> None:
    files = find_files(config.source, config.suffixes)
    settings = {name: getattr(config, name) for name in SETTINGS}
    stats = dict(zip(files, storage.each(storage.stat, files), strict=True))
    sizes = {
        path: stat and ([stat.size, stat.version] if stat.version else stat.size)
        for path, stat in stats.items()
    }
    plan = json.dumps({"settings": settings, "files": sizes}, indent=1).encode() + b"\n"
    if is_finished(Path(config.out), plan):
        print(f"{config.out}: already trained, nothing to do")
        return

    from flame_composer.text.tokenizer import train_bpe

    num_documents = num_skipped = 0

    def on_damage(error: DataError) -> None:
        nonlocal num_skipped
        if config.on_error == "fail":
            raise error
        num_skipped += 1

    def texts() -> Iterator[str]:
        nonlocal num_documents
        sample = sample_texts(
            files, config.text_column, config.max_bytes, on_damage, config.max_document_bytes
        )
        for text in tqdm(sample, unit=" documents", unit_scale=True, disable=None):
            num_documents += 1
            yield text

    tokenizer = train_bpe(
        texts(),
        vocab_size=config.vocab_size,
        min_frequency=config.min_frequency,
        eos_token=config.eos_token,
    )
    if num_documents == 0:
        raise DataError(
            f"{', '.join(config.source)}: no documents ({num_skipped} skipped); check source and"
            " text_column"
        )
    save(tokenizer, Path(config.out), plan)

    print(
        f"{config.out}: {len(tokenizer):,} tokens learnt from {num_documents:,} documents"
        f" ({num_skipped:,} skipped)"
    )
    if len(tokenizer) < config.vocab_size:
        print(
            f"warning: fewer than vocab_size={config.vocab_size}: no more pairs occur"
            f" {config.min_frequency} times; give more text",
            file=sys.stderr,
        )


def is_finished(out: Path, plan: bytes) -> bool:
    """Whether `out` holds the tokenizer of this very plan. Raises ConfigError if it holds
    anything else.
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


def save(tokenizer: object, out: Path, plan: bytes) -> None:
    """Put the tokenizer folder in its place whole, or not at all."""
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
        out.rmdir()  # empty, or `is_finished` would have refused it
    os.rename(temporary, out)


if __name__ == "__main__":
    sys.exit(run(main, TokenizerTrainConfig))
