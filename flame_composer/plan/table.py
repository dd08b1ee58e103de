"""A plan as tables for people."""

from __future__ import annotations

from typing import Any

from flame_composer.plan.memory import gigabytes


def describe(plan: dict[str, Any]) -> list[str]:
    """The plan as tables 100 columns wide, warnings last."""
    nodes, devices = plan["nodes"], plan["devices"]
    accumulation = plan["accumulation_steps"]
    rows = [
        ("parameters", f"{plan['parameters']:,}"),
        (
            "tokens a step",
            (
                f"{plan['tokens_per_step']:,}: {plan['microbatch_size']} rows x {accumulation}"
                f" accumulation steps x {devices} devices x {nodes} node{'s' if nodes > 1 else ''}"
            ),
        ),
        ("steps", f"{plan['steps']:,}"),
        ("tokens", f"{plan['tokens']:,}, {plan['tokens_per_parameter']:.1f} a parameter"),
        ("training FLOPs", f"{plan['flops']:.3g}"),
    ]
    if data := plan["data"]:
        cache = (
            ""
            if data["cache_limit"] is None
            else f", train_data.cache_limit allows {gigabytes(data['cache_limit'])}"
        )
        rows += [
            (
                "dataset",
                (
                    f"{data['tokens']:,} tokens, {gigabytes(data['bytes'])}: {data['epochs']:.2f}"
                    f" epochs of {data['steps_per_epoch']:,} steps"
                ),
            ),
            ("downloads", f"{gigabytes(data['downloaded_by_a_node'])} to each node"),
            ("smallest cache", f"{gigabytes(data['smallest_cache'])} on each node{cache}"),
        ]
    if time := plan["time"]:
        cost = "" if time["cost"] is None else f", cost {time['cost']:,.2f}"
        speed = (
            f"{time['seconds_per_step']:.3g} s a step, {time['tokens_per_second']:,.0f} tokens/s"
        )
        rows += [("time", f"{hours(time['seconds'])}, {speed}{cost}")]
    else:
        rows += [("time", "not known: a CPU has no peak to go by; give tokens_per_second")]
    if saved := plan["checkpoints"]:
        kept = (
            ""
            if saved["bytes_kept"] is None
            else f", {gigabytes(saved['bytes_kept'])} for those that are kept"
        )
        rows += [
            (
                "checkpoint",
                f"{gigabytes(saved['bytes'])}, {saved['save_seconds']:.3g} s to save{kept}",
            )
        ]
    if preempted := plan["preemption"]:
        configured = preempted["goodput_as_configured"]
        rows += [
            (
                "save_interval",
                (
                    f"best every {hours(preempted['best_save_seconds'])}:"
                    f" {preempted['best_save_interval']}"
                ),
            ),
            (
                "goodput",
                f"{preempted['goodput']:.1%} then"
                + ("" if configured is None else f", {configured:.1%} with save_interval as it is")
                + f"; {preempted['goodput_with_notice']:.1%} with notice enough to save",
            ),
        ]
    memory = plan["memory"]
    table = [
        f"{name:16}{value:>12}"
        for name, value in [
            *((name, gigabytes(count)) for name, count in memory["parts"].items()),
            ("together", gigabytes(memory["total"])),
        ]
    ]
    largest = plan["largest_microbatch_size"]
    fits = (
        "not even one row at a time fits"
        if largest is None
        else f"up to microbatch_size={largest} fits"
    )
    return [
        f"{plan['run_name']} on {nodes} x {devices} x {plan['device']}",
        "",
        *(f"{name:16}{text}" for name, text in rows),
        "",
        f"memory of a device ({gigabytes(memory['device'])}; {fits}), estimated",
        *(f"  {line}" for line in table),
        "",
        *(f"warning: {line}" for line in plan["warnings"]),
    ]


def hours(seconds: float) -> str:
    if seconds >= 3600:
        return f"{seconds / 3600:,.1f} hours"
    return f"{seconds / 60:.1f} minutes" if seconds >= 60 else f"{seconds:.1f} s"
