"""Turn text, or tokens that others have made, into MDS shards of tokenized, packed rows.

    python convert/to_mds.py source=DIR out=DIR tokenizer=DIR [key=value ...]

If the conversion is interrupted, the same command goes on where it stopped.
"""

from __future__ import annotations

import sys

from flame_composer.config.cli import run
from flame_composer.config.convert import ConvertConfig
from flame_composer.dataset.convert import Conversion
from flame_composer.dataset.finish import finish
from flame_composer.dataset.manifest import Split
from flame_composer.dataset.plan import Plan, group, plan_units
from flame_composer.dataset.writer import DatasetWriter
from flame_composer.text import token_files
from flame_composer.text.encoder import GIVEN, choose_encoder
from flame_composer.text.given_tokens import vocabulary_of
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
    if config.split is not None:
        files = [address(source, config.name, config.split) for source in config.source]
    elif config.token_dtype is None:
        files = find_files(config.source, config.suffixes)
    else:
        files = find_files(config.source, config.suffixes, found_by=token_files.FOUND)
    units = plan_units(files, config.unit_size) if config.token_dtype is None else ()
    import_transformers_without_torch()
    tokenizer = load_tokenizer(config.tokenizer)
    require_ends(tokenizer, add_bos=config.add_bos, add_eos=config.add_eos)
    if config.token_dtype is not None:
        vocabulary = vocabulary_of(tokenizer, config.token_dtype)
        parts = token_files.slice_tokens(files, vocabulary, config.unit_size, config.token_borders)
        units = group(parts, config.unit_size)
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
    settings["encoder"] = (
        GIVEN if config.token_dtype else choose_encoder(config.encoder, tokenizer, begun)
    )

    def build_job(unfinished: tuple[DatasetWriter, ...]) -> Conversion:
        return Conversion(
            unfinished,
            bare(tokenizer),
            config.add_bos,
            config.add_eos,
            settings["encoder"],
            "redo" if config.encoder == "auto" else "fail",
            config.on_error,
        )

    finish(
        datasets,
        build_job,
        encoder=settings["encoder"],
        num_workers=config.num_workers,
        cluster=config.cluster,
    )


if __name__ == "__main__":
    sys.exit(run(main, ConvertConfig))
