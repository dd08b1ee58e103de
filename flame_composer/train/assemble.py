"""The assembly of a run from its data, its model and its callbacks, in an order that works."""

from __future__ import annotations

import contextlib
import functools
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from composer import Trainer
from composer.core import Callback, DataSpec, Evaluator
from composer.utils import dist, get_device, reproducibility
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerFast

from flame_composer.checkpoint.content import needed_by
from flame_composer.checkpoint.parts import Needed
from flame_composer.checkpoint.read import Checkpoint
from flame_composer.checkpoint.save import (
    ALL_ALGORITHMS,
    SaveCheckpoints,
    build_saver,
    find_start_of,
)
from flame_composer.config.train import RunPlan, TrainConfig
from flame_composer.dataset.open import Dataset
from flame_composer.loader.batches import build_evaluator, build_train_loader, describe_order
from flame_composer.loader.datasets import (
    begin_as_documents,
    open_for_model,
    open_train_data,
)
from flame_composer.model.base import Base, identify_base
from flame_composer.model.build import build_or_load
from flame_composer.model.causal_lm import CausalLM, causal_lm_of, check_microbatch_size
from flame_composer.model.hf_config import new_hf_config
from flame_composer.model.lora import Adapter, add_adapters, build_adapter
from flame_composer.model.optimizer import build_optimizer
from flame_composer.model.probe import require_forward, require_gradients
from flame_composer.model.ranks import ranks_of
from flame_composer.model.sharding import recompute_blocks
from flame_composer.text.tokenizer import load_tokenizer
from flame_composer.train import parallelism
from flame_composer.train.announce import announce
from flame_composer.train.extensions import Extensions, build_extensions
from flame_composer.train.gradients import Gradients, build_gradients
from flame_composer.train.guards import build_watchers, explained_memory
from flame_composer.train.kernels import (
    PinnedKernels,
    build_kernels,
    make_deterministic,
    naming_what_differs,
)
from flame_composer.train.log import JsonlLog, build_log, every
from flame_composer.train.mixture import LeftOut, Mixture, build_left_out, build_mixture
from flame_composer.train.optim import build_schedule
from flame_composer.train.preemption import Preemption
from flame_composer.train.resume import RandomState, SameData, as_begun, build_same_loss
from flame_composer.train.sums import StepSums
from flame_composer.train.tasks import TaskScores, build_tasks
from flame_composer.upstream.fsdp import name_modules_once

DAY = 86400  # seconds

# Pairs of callbacks whose order matters: at the same event, the first class must be called before
# the second, for the reason given.
ORDER: tuple[tuple[type[Callback], type[Callback], str], ...] = (
    (PinnedKernels, JsonlLog, "the choices behind a row are on disk before it"),
    (Mixture, JsonlLog, "a row of the log contains its step's counts of each stream"),
    (LeftOut, JsonlLog, "a row of the log contains its step's count of rows left out"),
    (TaskScores, JsonlLog, "a row of the log contains its step's scores"),
    (Gradients, JsonlLog, "a row of the log contains its step's gradient norm"),
    (JsonlLog, SaveCheckpoints, "the row of a step is on disk before its checkpoint"),
    (JsonlLog, Preemption, "the last row is written before the run stops"),
    (SaveCheckpoints, Preemption, "a run that stops must know what was saved at this step"),
)


class Parts(NamedTuple):
    """The parts of a run that are built from its configuration before anything is started."""

    tokenizer: PreTrainedTokenizerFast
    hf_config: PretrainedConfig | None
    extensions: Extensions
    base: Callable[[], Base]
    """Return the place and hash of model.pretrained; its files are read at the first call only."""
    needed: Callable[[], Needed]
    """Return what a checkpoint must hold for this run; it is computed at the first call only."""


class Data(NamedTuple):
    """The data that a run trains on, and its plan of steps."""

    sets: dict[str, Dataset]
    loader: DataSpec
    tokenizer: PreTrainedTokenizerFast
    order: dict[str, Any]
    plan: RunPlan


@dataclass(frozen=True)
class Run:
    """A run that is ready to train, with the operations that recipes/train.py needs."""

    config: TrainConfig
    trainer: Trainer
    log: JsonlLog
    order: dict[str, Any]
    stop: Preemption
    start: Checkpoint | None

    @contextmanager
    def going(self) -> Iterator[None]:
        """Guard the training in the body: a signal ends it cleanly, after saving.

        Running out of memory becomes a one-line error that names the keys to change.
        """
        with (
            self.stop.running(self.trainer),
            explained_memory(self.config),
            naming_what_differs(),
        ):
            yield

    def announce(self) -> None:
        """Print what is about to run, and save its configuration with the log and checkpoints."""
        announce(
            self.trainer,
            self.config.resolved_yaml,
            Path(self.config.log_folder),
            self.config.save_folder,
            resumed_from=None if self.start is None else self.start.place,
        )

    def evaluation_is_due(self) -> bool:
        """Return whether to evaluate before the next step.

        It is due before the first step, and after a signal prevented the last evaluation.
        """
        is_first = self.trainer.state.timestamp.batch.value == 0
        return bool(self.trainer.state.evaluators) and (is_first or self.log.eval_missing)

    def is_finished(self) -> bool:
        """Return whether the run has taken all of its steps."""
        state = self.trainer.state
        assert state.max_duration is not None
        return state.timestamp >= state.max_duration

    def print_summary(self) -> None:
        """Print the results of the run as one line of JSON."""
        if dist.get_global_rank() == 0:
            summary = self.log.summary(self.trainer.state)
            print(json.dumps({**summary, "checkpoint_folder": self.config.save_folder}))


def check(config: TrainConfig) -> Parts:
    """Check the configuration against this machine, and return the parts built while doing so.

    This happens before processes meet, data is read or a model takes up memory. It covers the
    devices, the tokenizer, the model's config, and the algorithms, callbacks and loggers. Raise
    ConfigError for the first problem found.
    """
    parallelism.check_devices(config.parallelism, precision=config.precision)
    if config.deterministic:
        make_deterministic()
    check_microbatch_size(config.microbatch_size)
    tokenizer = load_tokenizer(config.tokenizer)
    hf_config = new_hf_config(config.model, tokenizer, config.context_length)
    parallelism.check_model(config, hf_config)
    if config.lora is not None:  # the targets, before the base is hashed and loaded
        build_adapter(config.lora, build_or_load(config.model, hf_config, empty=True), Base("", ""))
    base = functools.cache(functools.partial(identify_base, config.model.pretrained or ""))
    needed = functools.cache(functools.partial(needed_by, config, hf_config, base))
    return Parts(tokenizer, hf_config, build_extensions(config), base, needed)


def find_start(config: TrainConfig, parts: Parts) -> Checkpoint | None:
    """Wait for all ranks to meet, and return the checkpoint to resume from, or None for a new run.

    It is the newest whole checkpoint in save_folder, the same on every rank.
    """
    # Time out later than the stall watchdog, because its message says more.
    dist.initialize_dist(get_device(), timeout=(config.stall_timeout or DAY) + 60)
    return find_start_of(config, staging_of(config), parts.needed)


def build_run(config: TrainConfig, parts: Parts, start: Checkpoint | None) -> Run:
    """Return the run of `config`, ready to resume from `start`, or to begin if that is None.

    Raise ConfigError or DataError if the data, the model or the checkpoint does not fit.
    """
    reproducibility.seed_all(config.seed)
    data = build_data(config, parts.tokenizer, start)
    saver = build_saver(config, staging_of(config), data.plan, start, parts.needed)
    sums = StepSums(ranks_of(config.parallelism))
    stop = Preemption(saver, sums)
    evaluators = build_evaluators(config, data, stop)
    show_bar = config.progress_bar and sys.stderr.isatty()
    hf_model = build_inner(config, parts)
    adapter = build_adapters(config, hf_model, parts)
    model = wrap(config, hf_model, data.tokenizer, adapter)
    counters = build_counters(config, data, hf_model, stop, sums)
    kernels = build_kernels(config, hf_model, resumes=start is not None)
    gradients = build_gradients(config, sums)
    log = build_log(
        config,
        data.plan,
        [*counters, gradients],
        sums,
        print_lines=not show_bar,
        eval_due=every(data.plan.eval_interval, data.plan.total) if evaluators else None,
    )
    trainer = Trainer(
        run_name=config.run_name,
        seed=config.seed,
        model=recompute_blocks(model, config.parallelism),
        train_dataloader=data.loader,
        eval_dataloader=evaluators,
        max_duration=f"{data.plan.total}ba",
        optimizers=build_optimizer(hf_model, config.optimizer, config.model.mup_base_width),
        algorithms=parts.extensions.algorithms,
        callbacks=build_callbacks(
            config, parts.extensions, data, [*kernels, *counters], gradients, log, saver, stop
        ),
        loggers=parts.extensions.loggers,
        device=get_device(),
        precision=parallelism.autocast_of(config.precision),
        parallelism_config=parallelism.build(config.parallelism),
        compile_config={} if config.parallelism.compile else None,
        device_train_microbatch_size=config.microbatch_size,
        accumulate_train_batch_on_tokens=True,
        load_path=str(start.file) if start else None,
        load_strict_model_weights=adapter is None,  # a checkpoint of adapters lacks the base
        load_exclude_algorithms=ALL_ALGORITHMS,
        progress_bar=show_bar,
    )
    if adapter is not None:
        require_gradients(
            causal_lm_of(trainer.state.model),
            context_length=config.context_length,
            precision=config.precision,
        )
    return Run(config, trainer, log, data.order, stop, start)


def build_inner(config: TrainConfig, parts: Parts) -> PreTrainedModel:
    """Return the run's model, new or loaded, fit to be sharded or, on a CPU, to compute."""
    empty = parallelism.gets_weights(config.parallelism)
    model = build_or_load(config.model, parts.hf_config, empty=empty)
    if parallelism.is_sharded(config.parallelism):
        name_modules_once(model)
    elif not torch.cuda.is_available():
        require_forward(model)
    return model


def wrap(
    config: TrainConfig,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    adapter: Adapter | None,
) -> CausalLM:
    """Return the model as Composer trains it. Every rank must call this."""
    context = parallelism.divide_rows(config.parallelism, model)
    ranks = ranks_of(config.parallelism)
    divided: Any = {"context": context, "ranks": ranks}
    return CausalLM(
        model, tokenizer, varlen=config.varlen, adapter=adapter, z_loss=config.z_loss, **divided
    )


def build_adapters(config: TrainConfig, model: PreTrainedModel, parts: Parts) -> Adapter | None:
    """Add the adapters of `config.lora` to the model, and return them; None if there are none.

    The first rank hashes the base for all. Every rank must call this.
    """
    if config.lora is None:
        return None
    base = [parts.base() if dist.get_global_rank() == 0 else None]
    dist.broadcast_object_list(base, src=0)
    assert base[0] is not None
    adapter = build_adapter(config.lora, model, base[0])
    on_meta = next(model.parameters()).is_meta
    with torch.device("meta") if on_meta else contextlib.nullcontext():
        add_adapters(model, adapter)
    return adapter


def build_data(
    config: TrainConfig, tokenizer: PreTrainedTokenizerFast, start: Checkpoint | None = None
) -> Data:
    """Return the training data of `config`, with its loader and its plan of steps.

    Unless the configuration says which order the rows have, it is that of the checkpoint `start`.
    The tokenizer in the result begins texts as the documents of this data begin.
    """
    sets = open_train_data(
        config.train_data,
        tokenizer=tokenizer,
        context_length=config.context_length,
        varlen=config.varlen,
    )
    tokenizer = begin_as_documents(tokenizer, sets, pretrained=config.model.pretrained)
    batches: Any = {"global_batch_size": config.global_batch_size, "seed": config.seed}
    train_data = config.train_data if start is None else as_begun(config.train_data, start)
    ranks = ranks_of(config.parallelism)
    loader = build_train_loader(
        sets, train_data, repetition=config.repetition_filter, ranks=ranks, **batches
    )
    order = describe_order(sets, train_data, **batches)
    rows: Any = loader.dataloader
    return Data(
        sets, loader, tokenizer, order, config.plan(epoch_batches=rows.dataset.batches_per_epoch)
    )


def build_evaluators(config: TrainConfig, data: Data, stop: Preemption) -> list[Evaluator]:
    """Return the evaluator for eval_data, or an empty list if there is none."""
    if config.eval_data is None:
        return []
    rows = open_for_model(
        config.eval_data.local,
        config.eval_data.remote,
        tokenizer=data.tokenizer,
        context_length=config.context_length,
        varlen=config.varlen,
    )
    due = every(data.plan.eval_interval, data.plan.total)
    batch_size = config.eval_batch_size or config.microbatch_size
    assert isinstance(batch_size, int)  # the configuration requires it
    return [
        build_evaluator(
            rows,
            config.eval_data,
            batch_size=batch_size,
            eval_interval=stop.unless_stopping(due),
            until=stop.until_asked,
            ranks=ranks_of(config.parallelism),
        )
    ]


def build_counters(
    config: TrainConfig, data: Data, model: PreTrainedModel, stop: Preemption, sums: StepSums
) -> list[Mixture | LeftOut | TaskScores]:
    """Return the callbacks that add to every row of the log, besides the gradients'."""
    return [
        *build_mixture(data.loader, data.sets, sums),
        *build_left_out(config, sums),
        *build_tasks(config, data.plan, model, data.tokenizer, stop),
    ]


def build_callbacks(
    config: TrainConfig,
    extensions: Extensions,
    data: Data,
    counters: list[Callback],
    gradients: Gradients,
    log: JsonlLog,
    saver: SaveCheckpoints | None,
    stop: Preemption,
) -> list[Callback]:
    """Return all callbacks of a run, in the order in which every event calls them."""
    callbacks = [
        *counters,
        RandomState(),
        SameData(data.order, allow_change=config.allow_data_change),
        build_same_loss(config, extensions.algorithms),
        build_schedule(config, data.plan, extensions.algorithms),
        gradients,
        *build_watchers(config),
        *extensions.callbacks,
        log,
        *([saver] if saver else []),
        stop,
    ]
    require_order(callbacks)
    return callbacks


def require_order(callbacks: Sequence[Callback]) -> None:
    """Assert that the callbacks of a run are in an order that ORDER allows."""
    for earlier, later, why in ORDER:
        firsts = [i for i, each in enumerate(callbacks) if isinstance(each, earlier)]
        lasts = [i for i, each in enumerate(callbacks) if isinstance(each, later)]
        assert all(i < j for i in firsts for j in lasts), (
            f"{earlier.__name__} comes before {later.__name__}: {why}"
        )


def staging_of(config: TrainConfig) -> Path:
    """Return the folder in which checkpoints are assembled, or to which they are downloaded."""
    return Path(config.log_folder, "staging")
