"""What looks wrong in a plan, a line each."""

from __future__ import annotations

from typing import Any

from flame_composer.config.plan import PlanConfig
from flame_composer.plan.memory import FILL, gigabytes

MAX_EPOCHS = 4  # Muennighoff et al. 2023: up to there repeated text is nearly as good as new

MAX_WARMUP = 0.1


def warnings(config: PlanConfig, plan: dict[str, Any]) -> list[str]:
    """What people get wrong, a line each."""
    found = []
    total, there = plan["memory"]["total"], plan["memory"]["device"]
    if total > FILL * there:
        rows = plan["largest_microbatch_size"]
        more = ["take more or larger devices"]
        if not config.parallelism.activation_checkpointing:
            more.insert(0, "set parallelism.activation_checkpointing=true")
        if config.parallelism.fsdp is None:
            more.insert(0, "spread the model with parallelism.fsdp")
        remedy = (
            f"microbatch_size={rows} fits"
            if rows
            else f"not even one row does: {', or '.join(more)}"
        )
        found.append(
            f"{gigabytes(total)} do not fit into {gigabytes(there)} a device, of which a tenth"
            " should stay free: " + remedy
        )
    share = plan["warmup_steps"] / plan["steps"] if plan["warmup_steps"] is not None else 0
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
    if config.device == "cpu" and config.precision != "fp32":
        found.append(f"precision={config.precision}: CPUs compute in fp32; training refuses it")
    if plan["data"] is not None:
        found += _data_warnings(config, plan["data"])
    checkpoints, preemption = plan["checkpoints"], plan["preemption"]
    if checkpoints and checkpoints["every_steps"] and plan["time"]:
        step = plan["time"]["seconds_per_step"]
        spent = checkpoints["save_seconds"] / (
            checkpoints["save_seconds"] + checkpoints["every_steps"] * step
        )
        if spent > 0.05:
            found.append(
                f"save_interval={config.save_interval}: saving takes {spent:.0%} of the time; save"
                " less often"
            )
    if checkpoints is None and config.preemption_hours is not None:
        found.append("save_folder=null: a run that is interrupted starts from the beginning")
    if (
        preemption
        and preemption["goodput_as_configured"] is not None
        and preemption["goodput_as_configured"] < preemption["goodput"] - 0.01
    ):
        found.append(
            f"save_interval={config.save_interval}: {preemption['goodput_as_configured']:.1%} of"
            f" the time counts when killed every {config.preemption_hours:g} hours; with"
            f" {preemption['best_save_interval']} {preemption['goodput']:.1%} does"
        )
    return found


def _data_warnings(config: PlanConfig, data: dict[str, Any]) -> list[str]:
    found = []
    if data["context_length"] != config.context_length:
        found.append(
            f"context_length={config.context_length}: the dataset's rows are"
            f" {data['context_length']} tokens long; training refuses it"
        )
    if data["epochs"] > MAX_EPOCHS:
        found.append(
            f"{data['epochs']:.1f} epochs: text that is repeated more than {MAX_EPOCHS} times"
            " teaches less and less (Muennighoff et al. 2023)"
        )
    if data["cache_limit"] is not None and data["cache_limit"] < data["smallest_cache"]:
        found.append(
            f"train_data.cache_limit={config.train_data.cache_limit}:"
            f" {gigabytes(data['smallest_cache'])} are in use at once; training refuses it; raise"
            " it, or lower train_data.shuffle_block_size"
        )
    if (
        config.nodes > 1
        and config.train_data.num_canonical_nodes % config.nodes
        and data["downloaded_by_a_node"]
    ):
        found.append(
            f"train_data.num_canonical_nodes={config.train_data.num_canonical_nodes}: every node"
            f" downloads nearly all of the data; with {config.nodes} each downloads its share"
        )
    return found
