"""Train a causal language model on a streamed dataset.

    composer recipes/train.py yamls/gla_tiny.yaml [key=value ...]    # every GPU of the machine; -n 2 for two processes
    python recipes/train.py yamls/gla_tiny.yaml [key=value ...]      # one process
"""

import json
import sys
from pathlib import Path

from flame_composer.cli import run
from flame_composer.train_config import TrainConfig


def main(config: TrainConfig) -> None:
    # Imported here, so that a mistake in the configuration is answered without waiting for them.
    from composer import Trainer, algorithms
    from composer.utils import dist, get_device, reproducibility

    from flame_composer import callbacks, checkpoint, data, model, optim
    from flame_composer.tokenizer import load_tokenizer

    # What can be wrong is found out first: before processes meet, data is read or a model takes memory.
    parallelism = model.build_parallelism(config.parallelism, precision=config.precision)
    tokenizer = load_tokenizer(config.tokenizer)
    if not config.model.pretrained:
        hf_config = model.build_hf_config(config.model.config, tokenizer, config.context_length)
    log_folder, save_folder = Path(config.log_folder), config.save_folder and Path(config.save_folder)
    resume_from = checkpoint.find_start(save_folder, autoresume=config.autoresume) if save_folder else None

    dist.initialize_dist(device := get_device())
    reproducibility.seed_all(config.seed)

    made_for = {"tokenizer": tokenizer, "context_length": config.context_length}
    order = {"global_batch_size": config.global_batch_size, "seed": config.seed}
    train_sets = data.open_train_data(config.train_data, **made_for)
    train_loader = data.build_train_loader(train_sets, config.train_data, **order)
    epoch_batches = train_loader.dataloader.dataset.batches_per_epoch
    total_batches = config.in_batches(config.max_duration, epoch_batches)
    warmup_batches, eval_interval, save_interval = (
        config.in_batches(duration, epoch_batches, total_batches)
        for duration in (config.scheduler.warmup, config.eval_interval, config.save_interval)
    )
    evaluators = []
    if config.eval_data:
        eval_set = data.open_dataset(config.eval_data.local, config.eval_data.remote, **made_for)
        evaluators.append(data.build_evaluator(
            eval_set, config.eval_data, batch_size=config.eval_batch_size or config.microbatch_size,
            eval_interval=callbacks.every(eval_interval, total_batches),
        ))

    pretrained = config.model.pretrained
    hf_model = model.load_pretrained(pretrained) if pretrained else model.build_model(hf_config)
    model.check_agrees(hf_model.config, config.model.config)
    show_bar = config.progress_bar and sys.stderr.isatty()
    log = callbacks.JsonlLog(
        log_folder, total_batches, epoch_batches, log_batch_hash=config.log_batch_hash, print_lines=not show_bar
    )
    order = data.describe_order(train_sets, config.train_data, **order)
    watchers = data.build_mixture(train_loader, train_sets, log)
    watchers += [callbacks.SameData(order, allow_change=config.allow_data_change), callbacks.RandomState()]
    lr, clip, keep = config.optimizer.lr, config.optimizer.grad_clip_norm, config.save_num_checkpoints_to_keep
    watchers += [optim.Schedule(config.scheduler, lr, warmup_batches, total_batches), log]
    if save_folder:
        watchers.append(checkpoint.SaveCheckpoints(save_folder, interval=save_interval, num_to_keep=keep))

    trainer = Trainer(
        run_name=config.run_name,
        seed=config.seed,
        model=model.CausalLM(hf_model, tokenizer, varlen=config.varlen),
        train_dataloader=train_loader,
        eval_dataloader=evaluators,
        max_duration=f"{total_batches}ba",
        optimizers=optim.build_optimizer(hf_model, config.optimizer),
        algorithms=[algorithms.GradientClipping("norm", clip)] if clip else [],
        callbacks=watchers,
        loggers=[callbacks.build_wandb_logger(config.wandb, config.run_name, log_folder)] if config.wandb else [],
        device=device,
        precision=config.precision,
        parallelism_config=parallelism,
        device_train_microbatch_size=config.microbatch_size,
        accumulate_train_batch_on_tokens=True,
        load_path=str(resume_from) if resume_from else None,
        load_exclude_algorithms=algorithms.__all__,  # Composer would evaluate their text from the checkpoint
        progress_bar=show_bar,
    )
    callbacks.announce(trainer, config.resolved_yaml, folders=[log_folder, save_folder], resumed_from=resume_from)
    step = trainer.state.timestamp.batch.value
    if step == 0 and evaluators:
        trainer.eval()
    if step < total_batches:
        trainer.fit()
    if dist.get_global_rank() == 0:
        print(json.dumps({**log.summary(trainer.state), "checkpoint_folder": config.save_folder}))
    trainer.close()


if __name__ == "__main__":
    sys.exit(run(main, TrainConfig))
