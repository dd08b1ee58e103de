"""Turn text into tokenized, packed MDS shards: python convert/to_mds.py source=DIR out=DIR
tokenizer=DIR [key=value ...]

A conversion that was interrupted goes on where it stopped when the same command is given again.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Sequence

from tqdm import tqdm

from flame_composer.config.cli import run
from flame_composer.config.convert import ConvertConfig
from flame_composer.dataset.manifest import Manifest, Split
from flame_composer.dataset.plan import Plan, plan_units
from flame_composer.dataset.workers import Conversion, convert_units
from flame_composer.dataset.writer import DatasetWriter
from flame_composer.text.encoder import choose_encoder, require_installed
from flame_composer.text.hub import address
from flame_composer.text.sources import find_files
from flame_composer.text.tokenizer import (
    bare,
    fingerprint,
    import_transformers_without_torch,
    load_tokenizer,
    require_ends,
)

# What the files written depend on, apart from the tokenizer, the encoder, the context length and
# the inputs themselves.
SETTINGS = (
    "source",
    "name",
    "split",
    "suffixes",
    "text_column",
    "add_bos",
    "add_eos",
    "max_document_bytes",
    "max_doc_length",
    "min_doc_length",
    "seed",
    "val_fraction",
    "shard_size",
    "unit_size",
)
COLUMNS = (
    "documents",
    "documents_skipped",
    "documents_short",
    "tokens_in",
    "tokens_out",
    "dropped",
    "rows",
    "shards",
    "bytes",
)


def main(config: ConvertConfig) -> None:
    if config.split is None:
        files = find_files(config.source, config.suffixes)
    else:
        files = [address(source, config.name, config.split) for source in config.source]
    units = plan_units(files, config.unit_size)
    import_transformers_without_torch()
    tokenizer = load_tokenizer(config.tokenizer)
    require_ends(tokenizer, add_bos=config.add_bos, add_eos=config.add_eos)
    outs: dict[Split, str] = {"train": config.out} | (
        {} if config.val_out is None else {"val": config.val_out}
    )
    settings = {name: getattr(config, name) for name in SETTINGS}
    identity = fingerprint(tokenizer)
    plans = {split: Plan(split, identity, config.context_length, settings, units) for split in outs}
    datasets = [DatasetWriter(out, plans[split]) for split, out in outs.items()]
    begun = next(
        (name for dataset in datasets if (name := dataset.begun_encoder()) is not None), None
    )
    settings["encoder"] = choose_encoder(config.encoder, tokenizer, begun)

    unfinished: list[DatasetWriter] = []
    for dataset in datasets:
        manifest = dataset.finished()
        if manifest is None:
            unfinished.append(dataset)
        else:
            print(f"{dataset.out}: already finished, nothing to do")
            print(table([manifest]))
    if not unfinished:
        return
    require_installed(settings["encoder"])
    for dataset in unfinished:
        dataset.begin()

    started = time.monotonic()
    total_documents = total_tokens = 0
    to_do = sorted(set().union(*(dataset.uncommitted() for dataset in unfinished)))
    conversion = Conversion(
        tuple(unfinished),
        bare(tokenizer),
        config.add_bos,
        config.add_eos,
        settings["encoder"],
        "redo" if config.encoder == "auto" else "fail",
        config.on_error,
    )
    sizes = [sum(part.num_bytes for part in unit) for unit in units]
    with tqdm(total=sum(sizes), unit="B", unit_scale=True, disable=None) as bar:
        # Committed before an interruption
        bar.initial = bar.n = sum(sizes) - sum(sizes[number] for number in to_do)

        def on_progress(documents: int, tokens: int, num_bytes: int) -> None:
            nonlocal total_documents, total_tokens
            total_documents += documents
            total_tokens += tokens
            rate = total_tokens / (time.monotonic() - started)
            bar.set_postfix_str(
                f"{total_documents:,} documents, {rate:,.0f} tokens/s", refresh=False
            )
            bar.update(num_bytes)

        num_workers = config.num_workers or len(os.sched_getaffinity(0))
        for warning in convert_units(conversion, to_do, num_workers, on_progress, config.cluster):
            bar.write(f"warning: {warning}", file=sys.stderr)
    manifests = [dataset.publish() for dataset in unfinished]
    seconds = time.monotonic() - started
    print(table(manifests))
    print(
        f"{total_tokens:,} tokens in {seconds:.1f} s: {total_tokens / seconds:,.0f} tokens/s"
        f" ({settings['encoder']})"
    )


def table(manifests: Sequence[Manifest]) -> str:
    """One row a dataset: tokens in = tokens out + dropped."""
    lines = [("split", *(column.replace("documents_", "").replace("_", " ") for column in COLUMNS))]
    for manifest in manifests:
        lines.append(
            (manifest.split, *(f"{getattr(manifest.totals, column):,}" for column in COLUMNS))
        )
    widths = [max(map(len, cells)) for cells in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True))
        for line in lines
    )


if __name__ == "__main__":
    sys.exit(run(main, ConvertConfig))
