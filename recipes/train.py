"""Train a causal language model on a streamed dataset.

    composer recipes/train.py yamls/gla_tiny.yaml [key=value ...]    # every GPU; -n 2 for two
    python recipes/train.py yamls/gla_tiny.yaml [key=value ...]      # one process

The same command goes on from where the run was, however it ended.
"""

import sys

from flame_composer.config.cli import listen_to_signals, run
from flame_composer.config.train import TrainConfig


def main(config: TrainConfig) -> None:
    # Imported here, so that a mistake in the configuration is answered without waiting for them.
    from flame_composer.train.assemble import build_run, check, find_start
    from flame_composer.train.preemption import lock_folders

    listen_to_signals()  # which Composer has taken

    # What can be wrong is found out before processes meet, data is read or a model takes memory:
    # the devices, the tokenizer, the model's config, the algorithms, callbacks and loggers.
    parts = check(config)
    # No other process trains this run until this one has ended.
    locks = lock_folders(config.log_folder, config.save_folder)
    # All ranks meet, and agree on the newest checkpoint that is whole; None if the run begins.
    start = find_start(config, parts)
    # The dataset, the model and a Trainer with all that watches it, as they were at that step.
    training = build_run(config, parts, start)

    with training.going():  # a signal lets the batch in hand finish, and saves it
        training.announce()
        locks = lock_folders(config.log_folder, config.save_folder, held=locks, seconds=0)
        if training.evaluation_is_due():
            training.trainer.eval()
        if not training.is_finished():
            training.trainer.fit()
        training.print_summary()


if __name__ == "__main__":
    sys.exit(run(main, TrainConfig))
