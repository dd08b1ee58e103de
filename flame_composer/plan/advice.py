"""Warnings about what looks wrong in a plan."""

from __future__ import annotations

from flame_composer.config.plan import PlanConfig
from flame_composer.plan.figures import Data, Division, Plan
from flame_composer.plan.memory import FILL
from flame_composer.quantities import format_bytes

MAX_EPOCHS = 4  # repeated text is nearly as good as new up to here (Muennighoff et al. 2023)
MAX_WARMUP = 0.1  # share of the steps
MAX_SAVING = 0.05  # share of the time
MAX_LOST = 0.01  # goodput given up for want of the best interval


def warnings(config: PlanConfig, plan: Plan) -> list[str]:
    """Return a warning, of one line, for each common mistake that is in the plan."""
    return [
        *_memory_warnings(config, plan),
        *(_division_warnings(plan.division) if plan.division else []),
        *_training_warnings(config, plan),
        *(_data_warnings(config, plan.data) if plan.data else []),
        *_checkpoint_warnings(config, plan),
    ]


def _memory_warnings(config: PlanConfig, plan: Plan) -> list[str]:
    needed, there = plan.memory.total, plan.device_memory
    if needed <= FILL * there:
        return []
    rows = plan.largest_microbatch_size
    if rows is not None:
        remedy = f"microbatch_size={rows} fits"
    else:
        more = []
        if config.parallelism.fsdp is None:
            more.append("spread the model with parallelism.fsdp")
        if not config.parallelism.activation_checkpointing:
            more.append("set parallelism.activation_checkpointing=true")
        if plan.division is not None and plan.division.smallest is not None:
            more.append(f"divide it over devices with {_keys(plan.division.smallest)}")
        more.append("take more or larger devices")
        remedy = f"not even one row does: {', or '.join(more)}"
    return [
        f"{format_bytes(needed)} do not fit into {format_bytes(there)} a device, of which a tenth"
        f" should stay free: {remedy}"
    ]


def _division_warnings(division: Division) -> list[str]:
    found = []
    for axis, number in (("tensor", division.tensor), ("context", division.context)):
        least = number if division.smallest is None else division.smallest[axis]
        if least < number:
            fewer = "one device" if least == 1 else f"{least} devices"
            found.append(
                f"parallelism.{axis}={number}: a row fits on {fewer}, too: parallelism.{axis}="
                f"{least} sends less, and leaves devices for other rows"
            )
    return found


def _keys(division: dict[str, int]) -> str:
    divided = {axis: number for axis, number in division.items() if number > 1}
    return " ".join(f"parallelism.{axis}={number}" for axis, number in divided.items())


def _training_warnings(config: PlanConfig, plan: Plan) -> list[str]:
    found = []
    share = 0 if plan.warmup_steps is None else plan.warmup_steps / plan.steps
    if share > MAX_WARMUP:
        found.append(
            f"scheduler.warmup={config.scheduler.warmup} is {share:.0%} of the run; more than"
            f" {MAX_WARMUP:.0%} is seldom meant"
        )
    if config.device != "cpu" and config.precision == "fp32":
        found.append(
            "precision=fp32: the peak that time and cost go by is bfloat16's; set"
            " precision=amp_bf16"
        )
    if config.device == "cpu" and config.precision == "amp_fp16":
        found.append("precision=amp_fp16: CPUs do not train in fp16; training refuses it")
    if config.device == "cpu" and config.precision == "amp_bf16":
        found.append(
            "precision=amp_bf16: only for CPUs with AVX512_BF16 or AMX; training refuses it on"
            " others"
        )
    return found


def _data_warnings(config: PlanConfig, data: Data) -> list[str]:
    found = []
    if data.context_length != config.context_length:
        found.append(
            f"context_length={config.context_length}: the dataset's rows are"
            f" {data.context_length} tokens long; training refuses it"
        )
    if data.epochs > MAX_EPOCHS:
        found.append(
            f"{data.epochs:.1f} epochs: text that is repeated more than {MAX_EPOCHS} times"
            " teaches less and less (Muennighoff et al. 2023)"
        )
    if data.cache_limit is not None and data.cache_limit < data.smallest_cache:
        found.append(
            f"train_data.cache_limit={config.train_data.cache_limit}:"
            f" {format_bytes(data.smallest_cache)} are in use at once; training refuses it; raise"
            " it, or lower train_data.shuffle_block_size"
        )
    is_divided = config.train_data.num_canonical_nodes % config.nodes == 0
    if not is_divided and data.downloaded_by_a_node:
        found.append(
            f"train_data.num_canonical_nodes={config.train_data.num_canonical_nodes}: every node"
            f" downloads nearly all of the data; with {config.nodes} each downloads its share"
        )
    return found


def _checkpoint_warnings(config: PlanConfig, plan: Plan) -> list[str]:
    saved = plan.checkpoints
    if saved is None:
        if config.preemption_hours is None:
            return []
        return ["save_folder=null: a run that is interrupted starts from the beginning"]
    found = []
    if saved.every_steps and plan.time:
        between = saved.every_steps * plan.time.seconds_per_step
        spent = saved.save_seconds / (saved.save_seconds + between)
        # In the background, saving holds up training only if the next save has to wait for it.
        if spent > (0.5 if config.save_async else MAX_SAVING):
            found.append(
                f"save_interval={config.save_interval}: saving takes {spent:.0%} of the time; save"
                " less often"
            )
    preempted = plan.preemption
    configured = preempted.goodput_as_configured if preempted else None
    if preempted and configured is not None and configured < preempted.goodput - MAX_LOST:
        found.append(
            f"save_interval={config.save_interval}: {configured:.1%} of the time counts when"
            f" killed every {config.preemption_hours:g} hours; with"
            f" {preempted.best_save_interval} {preempted.goodput:.1%} does"
        )
    return found
