"""Train a causal language model on a dataset that is streamed from disk or an object store.

    composer recipes/train.py yamls/gla_tiny.yaml [key=value ...]    # every GPU; -n 2 for two
    python recipes/train.py yamls/gla_tiny.yaml [key=value ...]      # one process

However a run ended, the same command resumes it from its newest checkpoint.
"""

import sys

from flame_composer.config.cli import listen_to_signals, run
from flame_composer.config.train import TrainConfig


def main(config: TrainConfig) -> None:
    # The configuration has been read and checked before main is called. The slow imports are here,
    # so that a mistake in the configuration is reported at once.
    from flame_composer.train.assemble import build_run, check, find_start
    from flame_composer.train.preemption import lock_folders

    # Importing Composer replaced the signal handlers; put ours back until the run has its own.
    listen_to_signals()

    # Check what can be wrong before processes meet, data is read or a model takes up memory: the
    # devices, the tokenizer, the model's config, the algorithms, callbacks and loggers.
    parts = check(config)

    # Lock the run's folders, so that no other process can train this run until this one ends.
    locks = lock_folders(config.log_folder, config.save_folder)

    # All ranks meet and agree on the newest whole checkpoint; it is None if the run is new.
    start = find_start(config, parts)

    # Open the dataset, build the model and the optimizer, and hand them to Composer's Trainer with
    # the callbacks that log, save and guard the run. Their state is that of the checkpoint, if any.
    training = build_run(config, parts, start)

    # In this context, SIGTERM or Ctrl-C ends the run after the current batch has been saved.
    with training.going():
        # Print what is about to run, and save its configuration. This makes the folders of a new
        # run, which could not be locked before: lock them now, without waiting.
        training.announce()
        locks = lock_folders(config.log_folder, config.save_folder, held=locks, seconds=0)

        # Evaluate the untrained model, or make up for an evaluation that a signal prevented.
        if training.evaluation_is_due():
            training.trainer.eval()

        # Train. After each step, evaluate if it is due, write the step's row to the log, and save a
        # checkpoint if it is due.
        if not training.is_finished():
            training.trainer.fit()

        # End with one line of JSON: the steps, tokens, speed and evaluations of the run.
        training.print_summary()


if __name__ == "__main__":
    sys.exit(run(main, TrainConfig))
