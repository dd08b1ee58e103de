"""Suites and tasks as one: what is asked for, loaded before the model, scored, and summed up.

Importing this module needs lm-evaluation-harness (extra `eval`).
"""

from __future__ import annotations

import math
import sys
from typing import Any, NamedTuple

from composer.utils import dist
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from flame_composer import cpu
from flame_composer.config.suites import STEREOSET, SUITES, shots_of, tasks_of
from flame_composer.config.use import EvaluateConfig
from flame_composer.quantities import align
from flame_composer.text.ends import begin_as_in_training
from flame_composer.use import harness, stereoset, tasks
from flame_composer.use.stereoset_data import Example, read_examples, wanted_of
from flame_composer.use.task_data import TaskData

HEAD = ("benchmark", "metric", "score", "stderr", "chance", "shots")


class Asked(NamedTuple):
    """What a model is to be scored on: the harness's tasks, and StereoSet's examples."""

    tasks: dict[str, Any] | None
    examples: list[Example] | None


def load(config: EvaluateConfig) -> Asked:
    """Load the tasks of `config` and of its suite, with their data.

    Raise ConfigError or DataError for tasks and data that cannot be used, before there is a model.
    """
    cpu.enable()
    names = list(dict.fromkeys([*tasks_of(config.suite), *config.tasks]))
    data = None if config.data_root is None else TaskData(config.data_root)
    with_stereoset = STEREOSET in names
    names = [name for name in names if name != STEREOSET]
    if data is not None and with_stereoset and names:
        data.also = wanted_of(data)
    loaded = None
    if names:
        loaded = tasks.load_tasks(
            names,
            config.task_path,
            num_fewshot=config.num_fewshot,
            task_code=config.task_code,
            shots=shots_of(config.suite),
            data=data,
        )
    return Asked(loaded, read_examples(data, config.task_limit) if with_stereoset else None)


def build_adapter(
    config: EvaluateConfig,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    asked: Asked,
    to_device: Any,
) -> harness.HarnessModel:
    """Return the model as the harness takes it, on its device.

    Texts begin as documents did in training. Raise ConfigError if a task does not fit the model.
    """
    reader, otherwise = tokenizer, "texts of tasks begin as its tokenizer's template has it"
    if not config.apply_chat_template:
        reader = begin_as_in_training(
            tokenizer, config.model, add_bos=config.add_bos, otherwise=otherwise
        )
    placed: Any = to_device(model)
    adapter = harness.HarnessModel(
        placed.eval(),
        reader,
        batch_size=config.batch_size,
        precision=config.precision,
        max_length=config.max_length,
        chat=harness.build_chat(config),
    )
    if asked.tasks is not None:
        harness.check_fits(adapter, asked.tasks)
    return adapter


def score(config: EvaluateConfig, model: harness.HarnessModel, asked: Asked) -> dict[str, Any]:
    """Score a model, print tables on rank 0, and return what the last line of output says of it.

    It is empty on other ranks. Of a suite that is asked for alone, only its own table is printed.
    """
    in_full = config.suite is None or bool(config.tasks)
    scores: dict[str, dict[str, float]] = {}
    tables: list[str] = []
    shots = {}
    if asked.tasks is not None:
        found = harness.score(
            model, asked.tasks, limit=config.task_limit, show_bars=sys.stderr.isatty()
        )
        if found is not None:
            scores |= harness.scores(found)
            if in_full:
                tables.append(harness.table(found))
            shots = found["n-shot"]
    if asked.examples is not None:
        scores[STEREOSET] = stereoset.score(model, asked.examples)
        if in_full:
            tables.append(stereoset_table(scores[STEREOSET]))
    if dist.get_global_rank() != 0:
        return {}
    line, facts = harness.describe_texts(model, config.add_bos)
    summary: dict[str, Any] = {"tasks": scores}
    if config.suite is not None:
        rows = rows_of(config.suite, scores, shots, asked)
        summary["suite"], summary["benchmarks"] = config.suite, rows
        tables.append(summary_table(rows))
        tables += _remarks(config)
    print("\n".join([*tables, line]))
    return {**summary, **facts}


def rows_of(
    suite: str, scores: dict[str, dict[str, float]], shots: dict[str, int], asked: Asked
) -> list[dict[str, Any]]:
    """Return a row for each metric by which a suite's benchmarks are quoted.

    It has a benchmark, metric, score, stderr, chance and shots; None where there is no such figure.
    """
    return [
        {
            "benchmark": benchmark.name,
            "metric": metric,
            "score": scores[benchmark.task].get(metric),
            "stderr": scores[benchmark.task].get(f"{metric}_stderr"),
            "chance": chance,
            "shots": _shots(benchmark.task, shots, asked),
        }
        for benchmark in SUITES[suite]
        for metric, chance in benchmark.metrics.items()
    ]


def _shots(task: str, shots: dict[str, int], asked: Asked) -> int:
    """Return the number of examples before a question of a task, or of a group's tasks."""
    if task == STEREOSET:
        return 0
    assert asked.tasks is not None
    group = asked.tasks["groups"].get(task)
    names = [task] if group is None else [each.task_name for each in group.get_all_tasks()]
    return max(shots[name] for name in names)


def summary_table(rows: list[dict[str, Any]]) -> str:
    """Return rows from `rows_of` as a table for people."""
    lines = [[_shown(row[name]) for name in HEAD] for row in rows]
    return "\n".join(align([HEAD, *lines], left=2))


def _shown(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        size = math.fabs(value)
        return f"{value:.4f}" if size < 10 else f"{value:.2f}" if size < 1e5 else f"{value:.3g}"
    return str(value)


def stereoset_table(scores: dict[str, float]) -> str:
    """Return the scores of StereoSet as a table with a line for each kind and domain."""
    prefixes = [name.removesuffix("lms") for name in scores if name.endswith("lms")]
    lines = [
        [prefix.rstrip("_").replace("_", " ") or "overall"]
        + [f"{scores[prefix + name]:.2f}" for name in stereoset.METRICS]
        for prefix in prefixes
    ]
    return "\n".join(align([["stereoset", *stereoset.METRICS], *lines], left=1))


def _remarks(config: EvaluateConfig) -> list[str]:
    """Return lines on why the scores of a suite are not those that people quote."""
    lines = []
    if config.num_fewshot is not None:
        lines.append(
            f"num_fewshot={config.num_fewshot} takes the place of the numbers of examples with"
            " which these benchmarks are quoted"
        )
    if config.task_limit is not None:
        lines.append(f"task_limit={config.task_limit}: only the first questions of each task count")
    return lines
