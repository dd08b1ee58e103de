"""Train a causal language model on a streamed dataset.

    composer recipes/train.py yamls/gla_tiny.yaml [key=value ...]    # every GPU of the machine; -n 2 for two processes
    python recipes/train.py yamls/gla_tiny.yaml [key=value ...]      # one process
"""

import json
import sys
from pathlib import Path
from typing import Any

from flame_composer.config import InvalidField, TrainConfig, duration_in_batches, run


def main(config: TrainConfig) -> None:
    # Imported here, so that a mistake in the configuration is answered without waiting for them.
    from composer import Trainer
    from composer.algorithms import GradientClipping
    from composer.loggers import WandBLogger
    from composer.utils import dist, get_device, reproducibility

    from flame_composer.callbacks import JsonlLog, RandomState
    from flame_composer.checkpoint import SaveCheckpoints, find_newest, refuse_existing
    from flame_composer.data import build_evaluator, build_train_loader, open_dataset
    from flame_composer.model import CausalLM, build_hf_config, build_model, check_agrees, load_pretrained
    from flame_composer.optim import build_optimizer, build_scheduler
    from flame_composer.tokenizer import load_tokenizer

    # What can be wrong is found out first: before processes meet, data is read or a model takes memory.
    parallelism = parallelism_config(config)
    tokenizer = load_tokenizer(config.tokenizer)
    hf_config = None
    if config.model.pretrained is None:
        hf_config = build_hf_config(config.model.config, tokenizer, config.context_length)
    save_folder, log_folder = config.save_folder and Path(config.save_folder), Path(config.log_folder)
    if save_folder and not config.autoresume:
        refuse_existing(save_folder)
    checkpoint = find_newest(save_folder) if save_folder and config.autoresume else None

    device = get_device()
    dist.initialize_dist(device)
    reproducibility.seed_all(config.seed)

    expected: dict[str, Any] = {"tokenizer": tokenizer, "context_length": config.context_length}
    data = config.train_data
    train_set = open_dataset(local=data.local, remote=data.remote, **expected)
    train_loader = build_train_loader(
        train_set, global_batch_size=config.global_batch_size, num_workers=data.num_workers,
        prefetch_factor=data.prefetch_factor, shuffle=data.shuffle, shuffle_algo=data.shuffle_algo,
        shuffle_seed=config.seed if data.shuffle_seed is None else data.shuffle_seed,
        shuffle_block_size=data.shuffle_block_size, num_canonical_nodes=data.num_canonical_nodes,
        predownload=data.predownload, cache_limit=data.cache_limit,
    )
    epoch_batches = train_loader.dataloader.dataset.batches_per_epoch

    def batches(duration: str, run_batches: int | None = None) -> int:
        count = duration_in_batches(
            duration, global_batch_size=config.global_batch_size, context_length=config.context_length,
            epoch_batches=epoch_batches, run_batches=run_batches,
        )
        assert count is not None
        return count

    total = batches(config.max_duration)
    evaluators = []
    if config.eval_data is not None:
        eval_set = open_dataset(local=config.eval_data.local, remote=config.eval_data.remote, **expected)
        evaluators = [build_evaluator(
            eval_set, batch_size=config.eval_batch_size or config.microbatch_size,
            num_workers=config.eval_data.num_workers, max_rows=config.eval_data.max_rows,
            eval_interval=every(batches(config.eval_interval, total), total),
        )]

    model = load_pretrained(config.model.pretrained) if config.model.pretrained else build_model(hf_config)
    check_agrees(model.config, config.model.config)
    optimizer = build_optimizer(
        model, lr=config.optimizer.lr, betas=config.optimizer.betas, eps=config.optimizer.eps,
        weight_decay=config.optimizer.weight_decay,
    )
    scheduler = build_scheduler(
        config.scheduler.name, warmup_batches=batches(config.scheduler.warmup, total), total_batches=total,
        min_lr_ratio=config.scheduler.min_lr_ratio,
    )
    log = JsonlLog(log_folder, total_batches=total, batches_per_epoch=epoch_batches, log_batch_hash=config.log_batch_hash)
    callbacks = [RandomState(), log]
    if save_folder:
        interval = batches(config.save_interval, total)
        callbacks.append(SaveCheckpoints(save_folder, interval=interval, num_to_keep=config.save_num_checkpoints_to_keep))
    clip = config.optimizer.grad_clip_norm
    wandb = config.wandb

    trainer = Trainer(
        run_name=config.run_name,
        seed=config.seed,
        model=CausalLM(model, tokenizer, varlen=config.varlen),
        train_dataloader=train_loader,
        eval_dataloader=evaluators,
        max_duration=f"{total}ba",
        optimizers=optimizer,
        schedulers=scheduler,
        algorithms=[GradientClipping("norm", clip)] if clip else [],
        callbacks=callbacks,
        loggers=[WandBLogger(wandb.project, wandb.group, config.run_name, wandb.entity, wandb.tags, init_kwargs={
            "id": config.run_name, "resume": "allow", "dir": str(log_folder)})] if wandb else [],
        device=device,
        precision=config.precision,
        parallelism_config=parallelism,
        device_train_microbatch_size=config.microbatch_size,
        accumulate_train_batch_on_tokens=True,
        load_path=str(checkpoint) if checkpoint else None,
        progress_bar=config.progress_bar,
    )
    if dist.get_global_rank() == 0:
        for folder in filter(None, (log_folder, save_folder)):
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "config.yaml").write_text(config.resolved_yaml)
    step = trainer.state.timestamp.batch.value
    if step == 0 and evaluators:
        trainer.eval()
    if step < total:
        trainer.fit()
    if dist.get_global_rank() == 0:
        print(json.dumps({"run_name": config.run_name, **log.summary(trainer.state), "checkpoint_folder": config.save_folder}))
    trainer.close()


def every(interval: int, total: int) -> Any:
    """Composer's form of "after every so many batches, and after the last"."""
    from composer.core import Event, State

    def due(state: State, event: Event) -> bool:
        batch = state.timestamp.batch.value
        return event == Event.BATCH_END and (batch % interval == 0 or batch == total)

    return due


def parallelism_config(config: TrainConfig) -> dict[str, Any] | None:
    """What Composer's Trainer takes; raises InvalidField for what this machine cannot do."""
    import torch

    fsdp = config.parallelism.fsdp
    if torch.cuda.is_available():
        return {"fsdp": vars(fsdp)} if fsdp else None
    if config.precision != "fp32":
        raise InvalidField("precision", "there is no GPU here, and CPUs train in fp32; set precision=fp32")
    if fsdp and not config.parallelism.cpu_fallback:
        raise InvalidField("parallelism.fsdp", "there is no GPU here; set parallelism.cpu_fallback=true to train with plain "
                           "data parallelism, or parallelism.fsdp=null")
    return None


if __name__ == "__main__":
    sys.exit(run(main, TrainConfig))
