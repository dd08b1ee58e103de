"""Turn text into tokenized, packed MDS shards: python convert/to_mds.py source=DIR out=DIR tokenizer=DIR [key=value ...]

A conversion that was interrupted goes on where it stopped when the same command is given again.
"""

from __future__ import annotations

import sys
import time

from tqdm import tqdm

from flame_composer.cli import run
from flame_composer.config import ConvertConfig
from flame_composer.corpus import find_files
from flame_composer.shards import DatasetWriter, Manifest, Plan, Split, convert_unit, plan_units
from flame_composer.tokenizer import build_encoder, fingerprint, load_tokenizer

# What the files written depend on, apart from the tokenizer, the context length and the inputs themselves.
SETTINGS = ("source", "suffixes", "text_column", "add_bos", "add_eos", "val_fraction", "shard_size", "unit_size")


def main(config: ConvertConfig) -> None:
    units = plan_units(find_files(config.source, config.suffixes), config.unit_size)
    tokenizer = load_tokenizer(config.tokenizer)
    encode = build_encoder(tokenizer, add_bos=config.add_bos, add_eos=config.add_eos)

    settings = {name: getattr(config, name) for name in SETTINGS}
    outs: dict[Split, str] = {"train": config.out}
    if config.val_out is not None:
        outs["val"] = config.val_out
    datasets = [
        DatasetWriter(out, Plan(split, fingerprint(tokenizer), config.context_length, settings, units))
        for split, out in outs.items()
    ]

    unfinished: list[DatasetWriter] = []
    for dataset in datasets:
        manifest = dataset.finished()
        if manifest is None:
            unfinished.append(dataset)
        else:
            print(f"{dataset.out}: already finished, nothing to do: {summary(manifest)}")
    if not unfinished:
        return
    for dataset in unfinished:
        dataset.begin()

    import streaming  # noqa: F401  # what writes the shards; its import takes seconds that are not the conversion's

    started = time.monotonic()
    total_documents = total_tokens = 0
    total_bytes = sum(part.num_bytes for unit in units for part in unit)
    with tqdm(total=total_bytes, unit="B", unit_scale=True, disable=None) as bar:

        def on_progress(documents: int, tokens: int, num_bytes: int) -> None:
            nonlocal total_documents, total_tokens
            total_documents += documents
            total_tokens += tokens
            rate = total_tokens / (time.monotonic() - started)
            bar.set_postfix_str(f"{total_documents:,} documents, {rate:,.0f} tokens/s", refresh=False)
            bar.update(num_bytes)

        for number, unit in enumerate(units):
            if not convert_unit(unfinished, number, encode, config.on_error, on_progress):
                bar.update(sum(part.num_bytes for part in unit))  # committed before an interruption
    manifests = [dataset.publish() for dataset in unfinished]
    seconds = time.monotonic() - started

    for dataset, manifest in zip(unfinished, manifests, strict=True):
        print(f"{dataset.out}: {summary(manifest)}")
    print(f"{total_tokens:,} tokens in {seconds:.1f} s: {total_tokens / seconds:,.0f} tokens/s")


def summary(manifest: Manifest) -> str:
    totals = manifest.totals
    return (
        f"{totals.documents:,} documents ({totals.documents_skipped:,} skipped), {totals.tokens_in:,} tokens in = "
        f"{totals.tokens_out:,} out ({totals.rows:,} rows of {manifest.context_length:,}) + {totals.dropped:,} dropped; "
        f"{totals.bytes:,} bytes in {totals.shards:,} shards"
    )


if __name__ == "__main__":
    sys.exit(run(main, ConvertConfig))
