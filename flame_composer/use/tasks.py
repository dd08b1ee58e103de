"""Tasks of lm-evaluation-harness, or of a local folder: found, loaded with their data, checked.

Importing this module needs lm-evaluation-harness (extra `eval`).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lm_eval.tasks
from lm_eval.tasks import TaskManager

from flame_composer.config.fields import nearest
from flame_composer.config.suites import FOLDERS
from flame_composer.config.written import require_shallow
from flame_composer.errors import ConfigError, DataError, one_line
from flame_composer.upstream.lm_eval import (
    WRITING,
    no_foreign_code,
    only_errors,
    read_task,
    settings_of,
)
from flame_composer.use.task_data import TaskData, splits_of

TASKS = Path(lm_eval.tasks.__file__).parent


def load_tasks(
    names: list[str],
    folder: str | None,
    *,
    num_fewshot: int | None,
    task_code: bool = False,
    shots: Mapping[str, int] | None = None,
    data: TaskData | None = None,
) -> dict[str, Any]:
    """Load tasks, groups or tags with their data; return them as the harness's TaskDict.

    Tasks in `folder` take precedence over the harness's own. `num_fewshot`, if set, is the number
    of examples before each question; otherwise it is what `shots` has for one of the names, or else
    the task's own. With `data`, all data is read from there.

    Raise ConfigError if a task does not exist or cannot be loaded, if files are missing in `data`,
    and for tasks that run the model's output as code, need code from the hub or, without
    `task_code`, name Python functions outside the harness. Raise DataError for damaged files.
    """
    manager = find(names, folder)
    for name in names:
        entry = manager.task_index[name]
        if (entry.cfg or {}).get("unsafe_code"):
            raise ConfigError(
                f"tasks: {name}: runs what the model writes as code, which is refused here"
            )
    loaded: Any = {}
    try:
        if data is not None:
            wanted = [
                split
                for name in names
                for settings in settings_of(manager, [name], task_code).values()
                for split in splits_of(settings, _shots(name, settings, num_fewshot, shots))
            ]
            data.find(wanted)
        with no_foreign_code(task_code, data.load if data else None), only_errors():
            loaded = manager.load(list(names))
    except (ConfigError, DataError):
        raise
    # A task's own code, its data, the hub and the network may raise anything.
    except Exception as error:
        remedy = "; without a network, set data_root to a folder that has the data"
        raise ConfigError(
            f"tasks: {', '.join(names)}: cannot be loaded: {one_line(error)}"
            f"{remedy if isinstance(error, ConnectionError) else ''}"
        ) from None
    asked_as = {
        task.task_name: name
        for name in names
        if name in loaded["groups"]
        for task in loaded["groups"][name].get_all_tasks()
    }
    for name, task in loaded["tasks"].items():
        _check(name, task)
        count = _shots(asked_as.get(name, name), task.config, num_fewshot, shots)
        task.set_config(key="num_fewshot", value=count)
    return loaded


def _shots(
    name: str, settings: Any, num_fewshot: int | None, shots: Mapping[str, int] | None
) -> int:
    """Return the number of examples before a question of a task that was asked for as `name`.

    As in the harness, a task that sets num_fewshot to 0 keeps it.
    """
    if settings.num_fewshot == 0:
        return 0
    if num_fewshot is not None:
        return num_fewshot
    return (shots or {}).get(name, settings.num_fewshot or 0)


def _check(name: str, task: Any) -> None:
    """Raise ConfigError for a task that would run code, or has a metric that is not there."""
    if getattr(task, "UNSAFE_CODE", False):
        raise ConfigError(
            f"tasks: {name}: runs what the model writes as code, which is refused here"
        )
    for key in task.get_config("generation_kwargs") or {}:
        if key not in WRITING:
            raise ConfigError(
                f"tasks: {name}: its generation_kwargs have {str(key)[:60]!r}, which is not"
                f" allowed; only {', '.join(sorted(WRITING))} are"
            )
    for metric, function in getattr(task, "_metric_fn_list", {}).items():
        # A task with its own process_results computes its metrics itself.
        if function is None and task.config.process_results is None:
            raise ConfigError(
                f"tasks: {name}: the harness has no metric {metric}, and code for it is never"
                " downloaded"
            )


def find(names: list[str], folder: str | None) -> TaskManager:
    """Return a task manager that knows all `names`. Raise ConfigError if one does not exist.

    If `folder` has all of them, the harness's own tasks are not read, which would take seconds; of
    the harness's, only those of our suites are, if these are all.
    """
    manager = None
    if folder is not None:
        if not Path(folder).is_dir():
            raise ConfigError(f"task_path={folder}: no such folder")
        for file in sorted(Path(folder).rglob("*.yaml")):
            if not file.is_file():  # opening a pipe would wait for a writer
                raise ConfigError(f"{file}: cannot be read as a task: it is not a file")
            try:
                require_shallow(file.read_text(encoding="utf-8"))
                read_task(file)
            except Exception as error:  # the harness would skip such a file silently
                raise ConfigError(f"{file}: cannot be read as a task: {one_line(error)}") from None
        with only_errors():
            manager = TaskManager(include_path=folder, include_defaults=False)
    elif set(names) <= FOLDERS.keys():
        places = [TASKS / place for place in dict.fromkeys(FOLDERS[name] for name in names)]
        with only_errors():
            manager = TaskManager(include_path=places, include_defaults=False)
    if manager is None or not set(names) <= set(manager.all_tasks):
        with only_errors():
            manager = TaskManager(include_path=folder)
    for name in names:
        if name not in manager.task_index:
            where = "the harness" if folder is None else f"{folder} and the harness"
            raise ConfigError(
                f"tasks: {name}: no such task in {where}{nearest(name, manager.all_tasks)}"
            )
    return manager
