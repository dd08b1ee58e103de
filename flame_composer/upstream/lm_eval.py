"""lm-evaluation-harness 0.4: no code in others' tasks is run, no progress bar goes to a file."""

from __future__ import annotations

import contextlib
import functools
import importlib
import logging
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest.mock import patch

import datasets
import lm_eval.api.metrics
import lm_eval.api.model
import lm_eval.api.task
import lm_eval.models.huggingface
import lm_eval.tasks._factory
import lm_eval.utils
import tqdm
from datasets.packaged_modules.pandas import pandas as pickled_frames
from jinja2 import BaseLoader, StrictUndefined, Template
from jinja2.sandbox import SandboxedEnvironment
from lm_eval.api.task import ConfigurableTask, TaskConfig
from lm_eval.tasks import TaskManager, _yaml_loader

from flame_composer.errors import ConfigError
from flame_composer.upstream.jinja import template_limits

# The generation settings that a task may have. transformers has more, some of which lead to code.
WRITING = frozenset(
    {
        "until",
        "max_gen_toks",
        "max_new_tokens",
        "max_tokens",
        "max_completion_tokens",
        "max_length",
        "min_length",
        "do_sample",
        "temperature",
        "top_p",
        "top_k",
        "min_p",
        "typical_p",
        "num_beams",
        "early_stopping",
        "length_penalty",
        "repetition_penalty",
        "no_repeat_ngram_size",
    }
)


@contextlib.contextmanager
def no_foreign_code(
    task_code: bool = False, load: Callable[..., Any] | None = None
) -> Iterator[None]:
    """Keep the harness, in the body, from running anything in a task's file or data as code.

    With `load`, tasks get their data from it instead of `datasets.load_dataset`.

    Functions of the harness itself are always run, other functions only if `task_code` is set.
    Templates run in a sandbox that gives them no more of Python than they need. Metrics that are
    code, on the hub or beside a task, are not loaded. The only code in a dataset that this release
    of `datasets` would run is that in pickles, which are not read.

    Upstream: lm_eval 0.4, `_yaml_loader._import_func_in_yml`, `utils.env`; evaluate, `load`;
    datasets, `load_dataset` and its reader of pickled frames.
    Mends: all functions, metrics, templates and pickles that a task's YAML names are run.
    """
    templates = SandboxedEnvironment(
        loader=BaseLoader(), undefined=StrictUndefined, keep_trailing_newline=True
    )
    templates.template_class = _Template
    templates.filters.update(lm_eval.utils.env.filters)
    import_function = _yaml_loader._import_func_in_yml

    def own_function(name: str, folder: Path) -> Any:
        if not (
            task_code
            or folder.resolve().is_relative_to(Path(_yaml_loader.__file__).parent.resolve())
        ):
            raise ConfigError(
                f"task_path: a task in {folder} runs Python code (!function {name}); set"
                " task_code=true if you trust it"
            )
        return import_function(name, folder)

    load_dataset = load or datasets.load_dataset

    def load_into_own_cache(*args: Any, **options: Any) -> Any:
        if options.get("cache_dir") is not None:
            raise ConfigError(
                f"task_path: a task's dataset_kwargs have cache_dir={options['cache_dir']}, and no"
                " task decides where files are written; take that key out, and set"
                " HF_DATASETS_CACHE"
            )
        return load_dataset(*args, **options)

    datasets.disable_progress_bars()
    try:
        with ExitStack() as stack:
            for owner, name, value in (
                (import_evaluate(), "load", _no_metric),
                (lm_eval.utils, "env", templates),
                (_yaml_loader, "_import_func_in_yml", own_function),
                (datasets, "load_dataset", load_into_own_cache),
                (pickled_frames.Pandas, "_info", _no_pickle),
            ):
                stack.enter_context(patch.object(owner, name, value))
            yield
    finally:
        datasets.enable_progress_bars()


def _no_metric(name: str, *_: Any, **__: Any) -> Any:
    raise ValueError(f"{name}: is code")


def _no_pickle(*_: Any) -> Any:
    raise ConfigError(
        "task_path: a task's dataset_path is pandas, which reads pickles, and those can run code;"
        " give its data as JSON lines or Parquet (dataset_path: json or parquet)"
    )


class _Template(Template):
    """A template that gives up on a text that takes too much time or memory."""

    def render(self, *args: Any, **values: Any) -> str:
        with template_limits():
            return super().render(*args, **values)


def import_evaluate() -> Any:
    """Return Hugging Face's package `evaluate`, which tasks import.

    Upstream: Python 3.11 puts a script's folder first in `sys.path`.
    Mends: `import evaluate` in recipes/evaluate.py would import the script, not the package.
    """
    before = sys.path[:]
    sys.path[:] = [folder for folder in before if not Path(folder, "evaluate.py").is_file()]
    try:
        return importlib.import_module("evaluate")
    finally:
        sys.path[:] = before


@contextlib.contextmanager
def bars(show: bool) -> Iterator[None]:
    """Make the harness draw progress bars only if `show` is set, and not say when it resamples.

    Upstream: lm_eval 0.4, `tqdm` in its modules, `print` in `api.metrics`.
    Mends: it draws progress bars into files, too, and puts notes between results.
    """

    def bar(
        items: Any = None,
        *,
        disable: bool = False,
        total: int | None = None,
        desc: str | None = None,
    ) -> Any:
        return draw(items, disable=disable or not show, total=total, desc=desc)

    draw = tqdm.tqdm
    with ExitStack() as stack:
        # What resamples imports it from `tqdm` itself, each time.
        for module in (tqdm, lm_eval.api.task, lm_eval.api.model, lm_eval.models.huggingface):
            stack.enter_context(patch.object(module, "tqdm", bar))
        stack.enter_context(patch.object(lm_eval.api.metrics, "print", lambda *_: None))
        yield


_children_end = False  # whether SIGTERM ends children at once


@contextlib.contextmanager
def ending_pools() -> Iterator[None]:
    """Have SIGTERM end the processes that the body forks at once, without a handler of ours.

    Upstream: lm-eval 0.4.13, `api.metrics.bootstrap_stderr`.
    Mends: it ends a pool of processes by SIGTERM, and then waits for them. With a handler in
        Python, a process can miss the signal just before it waits for a lock, and never ends.
    """
    global _children_end
    _reset_in_children()
    _children_end = True
    try:
        yield
    finally:
        _children_end = False


@functools.cache
def _reset_in_children() -> None:
    os.register_at_fork(after_in_child=_end_at_once)


def _end_at_once() -> None:
    if _children_end:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


@contextlib.contextmanager
def only_errors() -> Iterator[None]:
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def read_task(file: Any) -> dict[str, Any]:
    """Return the content of a task's file, without looking up the functions that it names.

    Upstream: lm_eval 0.4.13, `lm_eval.tasks._yaml_loader.load_yaml`.
    Mends: the harness has no public reader of a task's file and of the files it includes.
    """
    return _yaml_loader.load_yaml(file, resolve_func=False)


class _Planned(ConfigurableTask):
    """A task that has its settings and no data."""

    def __init__(self, config: dict[str, Any]) -> None:
        self._config = TaskConfig(**config)


def settings_of(manager: TaskManager, names: list[str], task_code: bool) -> dict[str, Any]:
    """Return the settings of the tasks of these names, groups and tags, by the tasks' names.

    Their data is not read. Tasks that are classes in Python are built as always.

    Upstream: lm_eval 0.4.13, `lm_eval.tasks._factory.ConfigurableTask`.
    Mends: the harness reads a task's data when it builds the task, so that it stops at the first
        file that is missing.
    """
    with (
        no_foreign_code(task_code, _no_data),
        only_errors(),
        patch.object(lm_eval.tasks._factory, "ConfigurableTask", _Planned),
    ):
        tasks = manager.load(names)["tasks"]
    return {name: task.config for name, task in tasks.items()}


def _no_data(path: str, *_: Any, **__: Any) -> Any:
    raise ConfigError(
        f"data_root: a task is Python code that reads {path} by itself; leave out the task, or"
        " data_root"
    )
