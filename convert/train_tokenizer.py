"""Train a byte-level BPE tokenizer on text.

    python convert/train_tokenizer.py source=DIR out=DIR vocab_size=4096 [key=value ...]

A tokenizer that the same command has already trained is left as it is.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

from tqdm import tqdm

from flame_composer.config.cli import run
from flame_composer.config.convert import TokenizerTrainConfig
from flame_composer.errors import DataError
from flame_composer.storage.files import each, stat
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
    from flame_composer.text.bpe import is_finished, save, train_bpe

    files = find_files(config.source, config.suffixes)
    settings = {name: getattr(config, name) for name in SETTINGS}
    stats = dict(zip(files, each(stat, files), strict=True))
    sizes = {
        path: stat and ([stat.size, stat.version] if stat.version else stat.size)
        for path, stat in stats.items()
    }
    plan = json.dumps({"settings": settings, "files": sizes}, indent=1).encode() + b"\n"
    if is_finished(Path(config.out), plan):
        print(f"{config.out}: already trained, nothing to do")
        return

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


if __name__ == "__main__":
    sys.exit(run(main, TokenizerTrainConfig))
