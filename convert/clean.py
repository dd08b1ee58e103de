"""Remove duplicates and documents that are of no use for training.

    python convert/clean.py source=DIR out=DIR [key=value ...]

If cleaning is interrupted, the same command goes on where it stopped.
"""

from __future__ import annotations

import dataclasses
import sys
import time
from pathlib import Path

from filelock import Timeout
from tqdm import tqdm

from flame_composer.cleaning.parts import LOCK, PartsFolder
from flame_composer.cleaning.report import report
from flame_composer.config.clean import CleanConfig
from flame_composer.config.cli import run
from flame_composer.dataset.plan import plan_units
from flame_composer.errors import ConfigError
from flame_composer.storage.folders import file_lock
from flame_composer.text.hub import address
from flame_composer.text.sources import find_files

# Settings that do not affect the content of the files that are written.
MEANS = ("on_error", "num_workers", "executor", "slurm", "ray", "out")


def main(config: CleanConfig) -> None:
    try:
        from flame_composer.cleaning import executors, stages
        from flame_composer.cleaning.filters import check_model
    except ImportError as error:
        package = (error.name or str(error)).partition(".")[0]
        raise ConfigError(
            f"{package} is not installed; pip install 'flame-composer[clean]'"
        ) from None
    settings = {
        name: value for name, value in dataclasses.asdict(config).items() if name not in MEANS
    }
    if config.language is not None:
        settings["language"]["model_hash"] = check_model(config.language)
    if config.split is None:
        files = find_files(config.source, config.suffixes)
    else:
        files = [address(source, config.name, config.split) for source in config.source]
    units = plan_units(files, config.unit_size)
    executors.check_number(len(units))
    versions = stages.versions()
    names = {"out": config.out} | (
        {} if config.removed_out is None else {"removed_out": config.removed_out}
    )
    folders = {key: PartsFolder(key, out, settings, versions, units) for key, out in names.items()}
    folder, removed = folders["out"], folders.get("removed_out")

    manifest = folder.finished()
    if manifest is not None:
        print(f"{config.out}: already finished, nothing to do")
        print(*report(manifest), sep="\n")
        return
    if removed is not None:
        removed.finished()
    started = time.monotonic()
    Path(config.out).mkdir(parents=True, exist_ok=True)
    try:
        lock = file_lock(Path(config.out, LOCK))
        lock.acquire(timeout=0)
    except Timeout:
        raise ConfigError(
            f"out: {config.out}: another process is working in this folder; wait for it to end"
        ) from None
    except OSError as error:
        raise ConfigError(
            f"out: {Path(config.out, LOCK)}: cannot be locked: {error.strerror}; remove what lies"
            " there, or name another folder"
        ) from None
    with lock, tqdm(unit=" tasks", disable=None) as bar:

        def on_progress(stage: str, done: int, total: int) -> None:
            bar.total = total
            bar.set_description_str(stage, refresh=False)
            bar.update(done)

        submitted = executors.clean(config, folder, removed, on_progress)
    if submitted is not None:
        print(submitted)
        return
    manifest, *_ = (each.finished() for each in folders.values())
    assert manifest is not None
    print(*report(manifest, time.monotonic() - started), sep="\n")
    if manifest["counts"]["out"] == 0:
        print(f"warning: {config.out}: no document is left", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(run(main, CleanConfig))
