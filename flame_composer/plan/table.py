"""A plan, as tables for people to read."""

from __future__ import annotations

from flame_composer.plan.figures import Checkpoints, Data, Division, Plan, Preemption, Time
from flame_composer.quantities import format_bytes, format_seconds

Rows = list[tuple[str, str]]


def describe(plan: Plan, warnings: list[str]) -> list[str]:
    """Return the lines that show a plan: a table of figures, a table of memory, the warnings."""
    step = (
        f"{plan.tokens_per_step:,}: {plan.microbatch_size} rows x {plan.accumulation_steps}"
        f" accumulation steps x {plan.devices} devices x {plan.nodes} node"
    )
    if plan.nodes > 1:
        step += "s"
    division = plan.division
    if division is not None and division.together > 1:
        step += f" / (tensor {division.tensor} x context {division.context})"
    rows = [
        ("parameters", f"{plan.parameters:,}"),
        ("tokens a step", step),
        *(_division_rows(division) if division else []),
        ("steps", f"{plan.steps:,}"),
        ("tokens", f"{plan.tokens:,}, {plan.tokens_per_parameter:.1f} a parameter"),
        ("training FLOPs", f"{plan.flops:.3g}"),
        *(_data_rows(plan.data) if plan.data else []),
        ("time", _time(plan.time)),
        *(_mfu_rows(plan.time) if plan.time else []),
        *(_checkpoint_rows(plan.checkpoints) if plan.checkpoints else []),
        *(_preemption_rows(plan.preemption) if plan.preemption else []),
    ]
    return [
        f"{plan.run_name} on {plan.nodes} x {plan.devices} x {plan.device}",
        "",
        *(f"{name:16}{text}" for name, text in rows),
        "",
        *_memory_lines(plan),
        "",
        *(f"warning: {line}" for line in warnings),
    ]


def _division_rows(division: Division) -> Rows:
    if division.together == 1:
        return []
    groups = f"{division.places:,} x {division.together} devices with rows of their own"
    rows = [("divided", f"{groups}; {division.tokens_of_a_row:,} tokens of a row on each")]
    sent = {axis: count for axis, count in (division.sent or {}).items() if count}
    whats = {"context": "states, and what layers look back at", "tensor": "sums of outputs"}
    for axis, count in sent.items():
        each = f"{format_bytes(count)} a step by each device: {whats[axis]} ({axis})"
        rows.append(("sent", each))
    return rows


def _data_rows(data: Data) -> Rows:
    limit = data.cache_limit
    cache = "" if limit is None else f", train_data.cache_limit allows {format_bytes(limit)}"
    size = f"{data.tokens:,} tokens, {format_bytes(data.bytes)}"
    epochs = f"{data.epochs:.2f} epochs of {data.steps_per_epoch:,} steps"
    return [
        ("dataset", f"{size}: {epochs}"),
        ("downloads", f"{format_bytes(data.downloaded_by_a_node)} to each node"),
        ("smallest cache", f"{format_bytes(data.smallest_cache)} on each node{cache}"),
        (
            "rows mixed",
            f"{data.mixed_rows:,} with one another, of some {data.mixed_shards:,.0f} shards",
        ),
        (
            "start, resume",
            f"{format_seconds(data.start_seconds)} of a core of each node to find the place among"
            f" {data.shards:,} shards",
        ),
    ]


def _time(time: Time | None) -> str:
    if time is None:
        return "not known: a CPU has no peak to go by; give tokens_per_second"
    cost = "" if time.cost is None else f", cost {time.cost:,.2f}"
    speed = f"{time.seconds_per_step:.3g} s a step, {time.tokens_per_second:,.0f} tokens/s"
    return f"{format_seconds(time.seconds)}, {speed}{cost}"


def _mfu_rows(time: Time) -> Rows:
    if time.mfu_source is None or time.mfu is None:
        return []
    return [
        ("assumed", f"{time.mfu:.0%} of the peak (mfu), until you have measured it:"),
        ("", time.mfu_source),
    ]


def _checkpoint_rows(saved: Checkpoints) -> Rows:
    kept = saved.bytes_kept
    more = "" if kept is None else f", {format_bytes(kept)} for those that are kept"
    each = f"{format_bytes(saved.bytes)}, {saved.save_seconds:.3g} s to save"
    rows = [("checkpoint", each + more)]
    if saved.wait_seconds < saved.save_seconds:
        rows.append(("training waits", f"{saved.wait_seconds:.2g} s for each, while it is copied"))
    if saved.host_bytes:
        copy = f"{format_bytes(saved.host_bytes)} of each machine's memory, to write it from"
        rows.append(("copy in memory", copy))
    if saved.notice_seconds is not None:
        until = f"{format_seconds(saved.notice_seconds)} from SIGTERM until all is saved, at most"
        rows.append(("notice needed", until))
    return rows


def _preemption_rows(preempted: Preemption) -> Rows:
    best = (
        f"best every {format_seconds(preempted.best_save_seconds)}: {preempted.best_save_interval}"
    )
    configured = preempted.goodput_as_configured
    goodput = f"{preempted.goodput:.1%} then"
    if configured is not None:
        goodput += f", {configured:.1%} with save_interval as it is"
    goodput += f"; {preempted.goodput_with_notice:.1%} with notice enough to save"
    return [("save_interval", best), ("goodput", goodput)]


def _memory_lines(plan: Plan) -> list[str]:
    fits = "not even one row at a time fits"
    if plan.largest_microbatch_size is not None:
        fits = f"up to microbatch_size={plan.largest_microbatch_size} fits"
    parts = {**plan.memory.parts(), "together": plan.memory.total}
    how = "counted by torch" if plan.memory.counted else "estimated by formula"
    if plan.memory.counted and plan.division is not None and plan.division.context > 1:
        how += ", for the last part of a row of one document"
    return [
        f"memory of a device ({format_bytes(plan.device_memory)}; {fits}), {how}",
        *(f"  {name:20}{format_bytes(count):>12}" for name, count in parts.items()),
    ]
