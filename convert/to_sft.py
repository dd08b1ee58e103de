"""Turn examples of questions and answers into MDS shards of rows to tune a model on.

    python convert/to_sft.py source=FILE format=alpaca out=DIR tokenizer=DIR [key=value ...]
    python convert/to_sft.py registry=DIR/dataset_info.json datasets=[NAME] out=DIR tokenizer=DIR

If the conversion is interrupted, the same command goes on where it stopped.
"""

from __future__ import annotations

import sys

from flame_composer.config.cli import run
from flame_composer.config.sft import SftConfig
from flame_composer.dataset.manifest import Split
from flame_composer.dataset.sft import convert_examples, find_examples, hash_examples, load_parts
from flame_composer.text.tokenizer import import_transformers_without_torch


def main(config: SftConfig) -> None:
    # Find the files of the examples, and cut them into work units.
    sources = find_examples(config, config.source, config.datasets)
    val_sources = find_examples(config, config.val_source, config.val_datasets)

    # Load the tokenizer and the chat template, and find the token that ends an answer.
    import_transformers_without_torch()
    parts = load_parts(config)

    # Read all examples once, to find those that occur twice and those whose prompts are held out.
    val_hashes = hash_examples(config, val_sources)
    hashes = hash_examples(config, sources)

    # Read them again, turn each into tokens with a mask of those that carry loss, and pack them.
    outs: dict[Split, str] = {"train": config.out}
    if config.val_out is not None and config.val_fraction:
        outs["val"] = config.val_out
    convert_examples(config, parts, sources, hashes, outs, held_out=val_hashes)
    if config.val_out is not None and val_sources.units:
        convert_examples(config, parts, val_sources, val_hashes, {"val": config.val_out})


if __name__ == "__main__":
    sys.exit(run(main, SftConfig))
