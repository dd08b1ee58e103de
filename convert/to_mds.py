"""Turn text into MDS shards of tokenized, packed rows.

    python convert/to_mds.py source=DIR out=DIR tokenizer=DIR [key=value ...]

If the conversion is interrupted, the same command goes on where it stopped.
"""

from __future__ import annotations

import os
import sys

from flame_composer.config.cli import run
from flame_composer.config.convert import ConvertConfig
from flame_composer.dataset.manifest import Split
from flame_composer.dataset.plan import Plan, plan_units
from flame_composer.dataset.totals import Progress, totals_table
from flame_composer.dataset.workers import Conversion, convert_units
from flame_composer.dataset.writer import DatasetWriter
from flame_composer.quantities import format_seconds
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
    settings = config.settings()
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
            print(totals_table([manifest]))
    if not unfinished:
        return
    require_installed(settings["encoder"])
    for dataset in unfinished:
        dataset.begin()

    conversion = Conversion(
        tuple(unfinished),
        bare(tokenizer),
        config.add_bos,
        config.add_eos,
        settings["encoder"],
        "redo" if config.encoder == "auto" else "fail",
        config.on_error,
    )
    to_do = sorted(set().union(*(dataset.uncommitted() for dataset in unfinished)))
    num_workers = config.num_workers or len(os.sched_getaffinity(0))
    sizes = [sum(part.num_bytes for part in unit) for unit in units]
    committed = sum(sizes) - sum(sizes[number] for number in to_do)
    with Progress(sum(sizes), committed) as progress:
        for warning in convert_units(
            conversion, to_do, num_workers, progress.update, config.cluster
        ):
            progress.warn(warning)
    manifests = [dataset.publish() for dataset in unfinished]
    seconds = progress.seconds
    print(totals_table(manifests))
    print(
        f"{progress.num_tokens:,} tokens in {format_seconds(seconds)}:"
        f" {progress.num_tokens / seconds:,.0f} tokens/s ({settings['encoder']})"
    )


if __name__ == "__main__":
    sys.exit(run(main, ConvertConfig))
