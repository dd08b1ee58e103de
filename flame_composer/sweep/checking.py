"""A check of every trial's model, tokenizer, data and devices, before the first trial starts.

It needs what a run imports, hundreds of megabytes, so it is done in a process that then ends: the
sweep's own stays small beside its trials.
"""

from __future__ import annotations

import dataclasses
import multiprocessing
from collections.abc import Mapping
from multiprocessing.connection import Connection

from flame_composer import processes
from flame_composer.config.messages import explain
from flame_composer.config.sweep import SweepConfig
from flame_composer.errors import ConfigError, DataError, InvalidField, TrainingError


def check_trials(configs: Mapping[str, SweepConfig]) -> None:
    """Check the configurations as recipes/train.py does before it trains.

    Raise ConfigError for the first that is wrong, with the name of its trial.
    """
    forks = multiprocessing.get_context("fork")
    ours, theirs = forks.Pipe(duplex=False)
    with processes.ending_children():
        process = forks.Process(target=_check, args=(configs, theirs))
        process.start()
        theirs.close()
        try:
            problem: str | None = ours.recv()
        except EOFError:
            process.join()
            how = f"it ended with status {process.exitcode}"
            raise TrainingError(f"the check of the trials did not finish: {how}") from None
        process.join()
    if problem is not None:
        raise ConfigError(problem)


def _check(configs: Mapping[str, SweepConfig], theirs: Connection) -> None:
    processes.end_with_parent()
    # Slow, and large
    from flame_composer.loader.datasets import open_for_model
    from flame_composer.model.build import build_or_load
    from flame_composer.train.assemble import build_data, check

    for name, config in configs.items():
        try:
            parts = check(config)
            # Some sizes that do not fit together are found only when a model is built.
            build_or_load(config.model, parts.hf_config, empty=True)
            # Trials take turns with a cache that has a limit: only one at a time may have it open.
            train_data = dataclasses.replace(config.train_data, cache_limit=None)
            data = build_data(dataclasses.replace(config, train_data=train_data), parts.tokenizer)
            if config.eval_data is not None:
                open_for_model(
                    config.eval_data.local,
                    config.eval_data.remote,
                    tokenizer=data.tokenizer,
                    context_length=config.context_length,
                    varlen=config.varlen,
                )
        except (ConfigError, DataError) as error:
            said = explain(config, error) if isinstance(error, InvalidField) else str(error)
            theirs.send(f"trial {name}: {said}")
            return
    theirs.send(None)
