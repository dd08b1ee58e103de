"""Train a causal language model on a streamed dataset.

composer recipes/train.py yamls/gla_tiny.yaml [key=value ...] # every GPU of the machine; -n 2 for
two processes python recipes/train.py yamls/gla_tiny.yaml [key=value ...] # one process
"""

import json
import sys
from pathlib import Path

from flame_composer.config.cli import listen_to_signals, run
from flame_composer.config.train import TrainConfig


def main(config: TrainConfig) -> None:
    # Imported here, so that a mistake in the configuration is answered without waiting for them.
    from composer import Trainer
    from composer.utils import dist, get_device, reproducibility

    from flame_composer.checkpoint import save as checkpoint
    from flame_composer.loader import batches as data
    from flame_composer.model import causal_lm as model
    from flame_composer.text.tokenizer import load_tokenizer
    from flame_composer.train import gradients, optim, parallelism
    from flame_composer.train import guards as watch
    from flame_composer.train import log as callbacks
    from flame_composer.train.extensions import build_extensions
    from flame_composer.train.mixture import build_mixture
    from flame_composer.train.preemption import Preemption, lock_folders
    from flame_composer.train.tasks import build_tasks

    listen_to_signals()  # which Composer has taken
    # What can be wrong is found out first: before processes meet, data is read or a model takes
    # memory.
    parallelism.check_devices(config.parallelism, precision=config.precision)
    model.check_microbatch_size(config.microbatch_size)
    tokenizer = load_tokenizer(config.tokenizer)
    hf_config = model.new_hf_config(config.model, tokenizer, config.context_length)
    named = build_extensions(config)
    log_folder, save_folder, staging = (
        Path(config.log_folder),
        config.save_folder,
        Path(config.log_folder, "staging"),
    )
    locks = lock_folders(config.log_folder, save_folder)

    # The watchdog says more
    dist.initialize_dist(device := get_device(), timeout=(config.stall_timeout or 86400) + 60)
    start, needed = checkpoint.find_start_of(config, staging, hf_config)  # the same on every rank
    reproducibility.seed_all(config.seed)

    made_for = {"tokenizer": tokenizer, "context_length": config.context_length}
    order = {"global_batch_size": config.global_batch_size, "seed": config.seed}
    train_sets = data.open_train_data(config.train_data, **made_for)
    tokenizer = made_for["tokenizer"] = data.begin_as_documents(
        tokenizer, train_sets, pretrained=config.model.pretrained
    )
    train_loader = data.build_train_loader(train_sets, config.train_data, **order)
    plan = config.plan(epoch_batches=train_loader.dataloader.dataset.batches_per_epoch)

    saver = checkpoint.build_saver(config, staging, plan, start, needed)
    stop = Preemption(saver)
    evaluators, eval_due = [], callbacks.every(plan.eval_interval, plan.total)
    if config.eval_data:
        eval_set = data.open_dataset(config.eval_data.local, config.eval_data.remote, **made_for)
        batch_size = config.eval_batch_size or config.microbatch_size
        options = {
            "batch_size": batch_size,
            "eval_interval": stop.unless_stopping(eval_due),
            "until": stop.until_asked,
        }
        evaluators.append(data.build_evaluator(eval_set, config.eval_data, **options))
    show_bar = config.progress_bar and sys.stderr.isatty()
    log = callbacks.build_log(
        config, plan, print_lines=not show_bar, eval_due=eval_due if evaluators else None
    )

    hf_model = model.build_or_load(
        config.model, hf_config, empty=parallelism.gets_weights(config.parallelism)
    )
    order = data.describe_order(train_sets, config.train_data, **order)
    trainer = Trainer(
        run_name=config.run_name,
        seed=config.seed,
        model=parallelism.recompute_blocks(
            model.CausalLM(hf_model, tokenizer, varlen=config.varlen), config.parallelism
        ),
        train_dataloader=train_loader,
        eval_dataloader=evaluators,
        max_duration=f"{plan.total}ba",
        optimizers=optim.build_optimizer(hf_model, config.optimizer),
        algorithms=named.algorithms,
        callbacks=[
            *build_mixture(train_loader, train_sets, log),
            *build_tasks(config, hf_model, tokenizer, log, stop),
            callbacks.RandomState(),
            callbacks.SameData(order, allow_change=config.allow_data_change),
            optim.build_schedule(config, plan, named.algorithms),
            gradients.build_gradients(config, log),
            *watch.build_watchers(config),
            *named.callbacks,
            # In this order: a checkpoint finds the row of its step in the log, and stopping finds
            # the checkpoint.
            log,
            *([saver] if saver else []),
            stop,
        ],
        loggers=named.loggers,
        device=device,
        precision=config.precision,
        parallelism_config=parallelism.build(config.parallelism),
        compile_config={} if config.parallelism.compile else None,
        device_train_microbatch_size=config.microbatch_size,
        accumulate_train_batch_on_tokens=True,
        load_path=str(start.file) if start else None,
        load_exclude_algorithms=checkpoint.NEVER_EVALUATED,
        progress_bar=show_bar,
    )
    with stop.running(trainer), watch.explained_memory(config):
        callbacks.announce(
            trainer,
            config.resolved_yaml,
            log_folder,
            save_folder,
            resumed_from=start and start.place,
        )
        locks = lock_folders(config.log_folder, save_folder, held=locks, seconds=0)
        step = trainer.state.timestamp.batch.value
        if evaluators and (step == 0 or log.eval_missing):
            trainer.eval()
        if trainer.state.timestamp < trainer.state.max_duration:
            trainer.fit()
        if dist.get_global_rank() == 0:
            print(
                json.dumps({**log.summary(trainer.state), "checkpoint_folder": config.save_folder})
            )


if __name__ == "__main__":
    sys.exit(run(main, TrainConfig))
