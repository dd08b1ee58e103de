"""Show the contents of a dataset, and check that it is whole.

    python convert/inspect_mds.py data=DIR [tokenizer=DIR] [verify=true]

With a tokenizer, sample rows are shown as text. With verify=true every shard is read and hashed.
"""

from __future__ import annotations

import json
import signal
import sys
from functools import partial
from pathlib import Path

from tqdm import tqdm

from flame_composer.config.cli import run
from flame_composer.config.convert import InspectConfig
from flame_composer.dataset import report, sample_row
from flame_composer.dataset.open import check_tokenizer, open_at
from flame_composer.dataset.survey import choose_shards, spread, survey
from flame_composer.errors import ConfigError, DataError
from flame_composer.text.tokenizer import fingerprint, load_tokenizer


def main(config: InspectConfig) -> None:
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # so that `| head` ends the script quietly
    # Replace characters that the terminal cannot show, rather than fail.
    sys.stdout.reconfigure(errors="replace")
    if config.plot is not None and not Path(config.plot).parent.is_dir():
        raise ConfigError(
            f"plot: {config.plot}: its folder does not exist; make it or name another"
        )

    dataset = open_at(config.data)
    totals = dataset.manifest.totals
    for number in config.row_numbers:
        if number >= totals.rows:
            raise ConfigError(
                f"row_numbers: {number}: {config.data} has rows 0 to {totals.rows - 1}"
            )
    rows = config.row_numbers or spread(config.rows, totals.rows)

    decode = None
    if config.tokenizer is not None:
        tokenizer = load_tokenizer(config.tokenizer)
        check_tokenizer(dataset, fingerprint(tokenizer), config.tokenizer)
        decode = partial(
            tokenizer.decode, skip_special_tokens=False, clean_up_tokenization_spaces=False
        )

    show(report.describe(dataset, config.tokenizer))
    show(report.ledger_table(dataset))

    shards = choose_shards(dataset.files, None if config.verify else config.max_bytes)
    shards |= {dataset.locate(row)[0] for row in rows}
    num_bytes = sum(dataset.files[number].bytes for number in shards)
    with tqdm(total=num_bytes, unit="B", unit_scale=True, disable=None, leave=False) as bar:

        def on_bad(name: str, problem: str) -> None:
            tqdm.write(f"bad shard: {report.visible(name)}: {problem}", file=sys.stderr)

        found = survey(
            dataset, shards, rows=rows, hash=config.verify, on_progress=bar.update, on_bad=on_bad
        )

    if found.num_read:
        show(report.histograms(dataset, found))
    for row in found.rows:
        show(sample_row.show_row(row, decode, whole=config.whole_rows))
    if config.plot is not None and found.num_read:
        report.draw(dataset, found, config.plot)
        show([f"{config.plot}: the lengths of document pieces"])
    show([report.verdict(dataset, found)])
    print(json.dumps(report.summary(dataset, found)), flush=True)
    if found.bad:
        raise DataError(
            f"{config.data}: {report.verdict(dataset, found)}; restore the bad shards from a copy,"
            " or delete the dataset and convert again"
        )


def show(lines: list[str]) -> None:
    print(*lines, "", sep="\n", flush=True)


if __name__ == "__main__":
    sys.exit(run(main, InspectConfig))
