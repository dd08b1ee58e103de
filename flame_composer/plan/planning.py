"""The plan of a run, drawn up before it starts.

It has the run's size, steps, memory, time, cost, checkpoints and goodput when preempted.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

from streaming.base.util import bytes_to_int
from transformers import PretrainedConfig

from flame_composer.config.plan import PlanConfig
from flame_composer.errors import ConfigError, InvalidField, one_line
from flame_composer.model.hf_config import build_hf_config, read_pretrained_config
from flame_composer.model.mup import require_rules
from flame_composer.plan.child import CannotCount
from flame_composer.plan.figures import Checkpoints, Data, Memory, Plan, Preemption, Time
from flame_composer.plan.fitting import Count, estimate, largest_microbatch
from flame_composer.plan.interruptions import best_interval, goodput, goodput_with_notice
from flame_composer.plan.memory import DEVICES, Size, device_memory, moments
from flame_composer.plan.speed import assumed_mfu
from flame_composer.plan.supply import Supply
from flame_composer.text.tokenizer import load_tokenizer

COPY = 4e9  # bytes a second that a process copies into its machine's memory: an assumption


def find_hf_config(config: PlanConfig, supply: Supply | None) -> PretrainedConfig:
    """Return the config of the run's model.

    If model.config has no vocab_size, it is taken from the dataset, or else from the tokenizer,
    which is read only then. Raise ConfigError if the config of model.pretrained cannot be read.
    """
    keys = dict(config.model.config)
    if "model_type" not in keys:
        source = config.model.pretrained
        assert source is not None
        try:
            return read_pretrained_config(source)
        except ConfigError as error:
            raise ConfigError(
                f"model.pretrained={source}: its config cannot be read: {one_line(error)}; give "
                "model.config"
            ) from None
    tokenizer = None
    if "vocab_size" not in keys and supply is not None and supply.vocab_size is not None:
        keys["vocab_size"] = supply.vocab_size
    elif "vocab_size" not in keys:
        tokenizer = load_tokenizer(config.tokenizer)
    hf_config = build_hf_config(keys, tokenizer, config.context_length, to_run=False)
    require_rules(config.model, hf_config)
    return hf_config


def count_and_draw_up(
    config: PlanConfig,
    hf_config: PretrainedConfig,
    size: Size,
    supply: Supply | None,
    counter: Callable[[PlanConfig, PretrainedConfig, int], Memory],
) -> tuple[Plan, str | None]:
    """Return the figures of a run whose steps `counter` counts, and None.

    If it cannot count one of them, return figures with all memory estimated, and the reason.
    """
    count = functools.cache(functools.partial(counter, config, hf_config))
    try:
        return draw_up(config, size, supply, count), None
    except CannotCount as reason:
        if config.parallelism.tensor > 1:
            rule = f"must be 1 here: a step of divided layers could not be counted: {reason}"
            raise InvalidField("parallelism.tensor", rule) from None
        return draw_up(config, size, supply, estimate(config, size)), str(reason)


def draw_up(config: PlanConfig, size: Size, supply: Supply | None, count: Count) -> Plan:
    """Return all figures of the run of `config`, in bytes, seconds and tokens.

    `supply` is None if the datasets cannot be read. `count` returns the memory of a step with a
    number of rows at a time. Raise InvalidField if there is no supply and the run's length is given
    in epochs.
    """
    epoch = supply.batches_per_epoch if supply else None
    steps = config.in_batches(config.max_duration, epoch)
    if steps is None:
        raise InvalidField(
            "max_duration", "is in epochs, and the dataset cannot be read; give dataset_tokens"
        )
    tokens_per_step = config.global_batch_size * config.context_length
    tokens = steps * tokens_per_step
    flops_per_token = size.work.flops_per_token(config.context_length)
    fits = largest_microbatch(config, count)
    microbatch = config.microbatch_size if isinstance(config.microbatch_size, int) else fits or 1
    time = _time(config, size, steps)
    checkpoints = _checkpoints(config, size, steps, epoch, time)
    return Plan(
        run_name=config.run_name,
        devices=config.devices,
        nodes=config.nodes,
        device=config.device,
        parameters=size.parameters,
        multiplied_parameters=size.work.multiplied,
        microbatch_size=microbatch,
        accumulation_steps=math.ceil(config.global_batch_size / (config.places * microbatch)),
        largest_microbatch_size=fits,
        tokens_per_step=tokens_per_step,
        steps=steps,
        tokens=tokens,
        tokens_per_parameter=tokens / size.parameters,
        flops_per_token=flops_per_token,
        flops=flops_per_token * tokens,
        memory=count(microbatch),
        device_memory=device_memory(config),
        warmup_steps=config.in_batches(config.scheduler.warmup, epoch, steps),
        data=_data(config, supply, steps) if supply else None,
        time=time,
        checkpoints=checkpoints,
        preemption=_preemption(config, time, checkpoints),
    )


# To read a shard's entries in index.json and manifest.json: docs/benchmarks.md, Orders of rows
SHARD_SECONDS = 1e-5


def _data(config: PlanConfig, supply: Supply, steps: int) -> Data:
    epochs = steps / supply.batches_per_epoch
    limit = (
        None
        if config.train_data.cache_limit is None
        else bytes_to_int(config.train_data.cache_limit)
    )
    # With too small a cache every epoch downloads all that it reads.
    again = limit is not None and limit < supply.read_by_a_node
    read = supply.read_by_a_node * (epochs if again else min(1.0, epochs))
    return Data(
        tokens=supply.tokens,
        bytes=supply.bytes,
        steps_per_epoch=supply.batches_per_epoch,
        epochs=epochs,
        context_length=supply.context_length,
        read_by_a_node_an_epoch=supply.read_by_a_node,
        downloaded_by_a_node=round(read) if supply.is_remote else 0,
        smallest_cache=supply.smallest_cache,
        cache_limit=limit,
        shards=supply.shards,
        mixed_rows=supply.mixed_rows,
        mixed_shards=round(supply.mixed_rows * supply.shards / supply.rows, 1),
        start_seconds=round(supply.shards * SHARD_SECONDS, 3),
    )


def _time(config: PlanConfig, size: Size, steps: int) -> Time | None:
    world = config.devices * config.nodes
    tokens_per_step = config.global_batch_size * config.context_length
    speed, mfu, source = config.tokens_per_second, None, None
    if speed is None:
        if config.device == "cpu":
            return None
        mfu = config.mfu
        if mfu is None:
            mfu, source = assumed_mfu(size.model_type, size.work)
        peak = DEVICES[config.device].peak * world
        speed = peak * mfu / size.work.flops_per_token(config.context_length)
    seconds = steps * tokens_per_step / speed
    price = config.price_per_hour
    return Time(
        tokens_per_second=speed,
        seconds_per_step=tokens_per_step / speed,
        seconds=seconds,
        cost=None if price is None else seconds / 3600 * world * price,
        mfu=mfu,
        mfu_source=source,
    )


def _checkpoints(
    config: PlanConfig, size: Size, steps: int, epoch: int | None, time: Time | None
) -> Checkpoints | None:
    if config.save_folder is None:
        return None
    num_bytes = 4 * size.trained + moments(config, size)  # the weights are saved in fp32, too
    times = config.plan(epoch or 1)
    every: float | None = times.save_batches
    if times.save_seconds is not None:
        every = times.save_seconds / time.seconds_per_step if time else None
    number = None if every is None else math.ceil(steps / max(every, 1))
    keep = config.save_num_checkpoints_to_keep
    kept = number if keep == -1 else keep if number is None else min(keep, number)
    # A save may have begun just before SIGTERM, and the current step is saved after it.
    seconds = config.save_seconds or num_bytes / bytes_to_int(config.save_bandwidth)
    return Checkpoints(
        bytes=num_bytes,
        save_seconds=seconds,
        wait_seconds=(
            min(seconds, _copied(config, num_bytes) / COPY) if config.save_async else seconds
        ),
        every_steps=every,
        number=number,
        bytes_kept=None if kept is None else kept * num_bytes,
        host_bytes=_host_bytes(config, num_bytes),
        notice_seconds=(
            None if time is None else time.seconds_per_step + (1 + config.save_async) * seconds
        ),
    )


def _copied(config: PlanConfig, num_bytes: int) -> int:
    """Return the bytes that one process copies for a save in the background."""
    fsdp = config.parallelism.fsdp
    held = _host_bytes(config, num_bytes)
    is_whole = fsdp is None or fsdp.state_dict_type == "full"
    return held if is_whole else held // config.devices


def _host_bytes(config: PlanConfig, num_bytes: int) -> int:
    """Return the bytes of a machine's memory that hold its share of a checkpoint's `num_bytes`."""
    if not config.save_async:
        return 0
    fsdp = config.parallelism.fsdp
    is_sharded = config.device != "cpu" or config.parallelism.cpu_fsdp
    if fsdp is None or not is_sharded:
        return num_bytes
    if fsdp.state_dict_type == "full":
        return 2 * num_bytes  # gathered, and copied
    replicas = 1
    if fsdp.sharding_strategy == "HYBRID_SHARD":
        replicas = fsdp.replicas or config.nodes
    # Only the first replica saves.
    return num_bytes // max(1, config.nodes // replicas)


def _preemption(
    config: PlanConfig, time: Time | None, checkpoints: Checkpoints | None
) -> Preemption | None:
    if config.preemption_hours is None or time is None or checkpoints is None:
        return None
    between, restart = 3600 * config.preemption_hours, 60 * config.restart_minutes
    wait, step = checkpoints.wait_seconds, time.seconds_per_step
    behind = checkpoints.save_seconds - wait
    best = max(best_interval(wait, between), behind)  # one save at a time
    every = checkpoints.every_steps

    def share(interval: float) -> float:
        waits = max(wait, checkpoints.save_seconds - interval)  # for the save before it, too
        return goodput(interval, waits, restart, between, behind)

    return Preemption(
        best_save_interval=f"{max(1, round(best / step))}ba",
        best_save_seconds=best,
        goodput=share(best),
        goodput_as_configured=None if every is None else share(every * step),
        goodput_with_notice=goodput_with_notice(best, wait, restart, between, behind),
    )
