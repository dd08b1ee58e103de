"""Running the stages of a cleaning with datatrove's executors: on this machine, Slurm or Ray."""

from __future__ import annotations

import contextlib
import copy
import multiprocessing
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import TypeAlias

import loguru
from datatrove.executor.local import LocalPipelineExecutor
from datatrove.executor.ray import RayPipelineExecutor
from datatrove.executor.slurm import SlurmPipelineExecutor

from flame_composer.cleaning.parts import PartsFolder, publish_file, read_json
from flame_composer.cleaning.stages import (
    EXACT_HASHES,
    FINDINGS,
    MAX_TASKS,
    Stage,
    build_stages,
    counts_path,
)
from flame_composer.config.clean import CleanConfig
from flame_composer.errors import ConfigError, DataError
from flame_composer.lines import Lines, clean_streams
from flame_composer.processes import can_have_processes, end_with_parent, ending_children
from flame_composer.storage.folders import explained
from flame_composer.text.sources import slice_json

JOBS = "slurm_jobs.json"

Executor: TypeAlias = LocalPipelineExecutor | SlurmPipelineExecutor | RayPipelineExecutor


def forget_changed(folder: PartsFolder, stages: Sequence[Stage]) -> None:
    """Forget the results for units whose files have changed, so that they are made again.

    If any unit has changed or is not finished, the results of all later stages are forgotten, too.
    """
    first, *later = (log_folder(folder, stage) for stage in stages)
    is_changed = False
    for number, unit in enumerate(folder.units):
        done, record = first / "completions" / f"{number:05}", counts_path(folder, "filter", number)
        if done.exists():
            same = read_json(record)["inputs"] == [slice_json(part) for part in unit]
            # Datasets are left out: their paths are addresses.
            files = [part.path for part in unit if os.path.exists(part.path)]
            if same and not any(os.stat(path).st_mtime > record.stat().st_mtime for path in files):
                continue
            done.unlink()
        is_changed = True
        for path in (folder.work / EXACT_HASHES).glob(f"*/{number:05}.*"):
            path.unlink()
    if is_changed:
        for path in (path for logs in later for path in logs.glob("completions/*")):
            path.unlink()
        for name in FINDINGS:
            shutil.rmtree(folder.work / name, ignore_errors=True)


def log_folder(folder: PartsFolder, stage: Stage) -> Path:
    """Return the folder of a stage's logs, in which datatrove notes the tasks that are done."""
    return folder.work / "logs" / stage.name.replace(" ", "_")


def build_executor(
    config: CleanConfig, folder: PartsFolder, stage: Stage, before: Executor | None
) -> Executor:
    """Return datatrove's executor for a stage, to run after the executor `before`, if any."""
    logs = str(log_folder(folder, stage))
    workers = config.num_workers or -1
    if config.executor == "ray":
        return RayPipelineExecutor(
            stage.pipeline,
            stage.tasks,
            workers,
            depends=before,
            logging_dir=logs,
            mem_per_cpu_gb=config.ray.mem_per_cpu_gb,
        )
    if config.slurm is not None:
        activate = Path(sys.prefix, "bin", "activate")
        section = config.slurm
        return SlurmPipelineExecutor(
            stage.pipeline,
            stage.tasks,
            section.time,
            section.partition,
            workers=workers,
            logging_dir=logs,
            depends=before,
            job_name=f"clean-{stage.name.replace(' ', '-')}",
            mem_per_cpu_gb=section.mem_per_cpu_gb,
            qos=section.qos,
            venv_path=section.activate or (str(activate) if activate.exists() else None),
            max_array_size=section.max_array_size,
            sbatch_args={"kill-on-invalid-dep": "yes"},
        )
    return LocalPipelineExecutor(stage.pipeline, stage.tasks, logging_dir=logs)


def clean(
    config: CleanConfig,
    folder: PartsFolder,
    removed: PartsFolder | None,
    on_progress: Callable[[str, int, int], None],
) -> str | None:
    """Run all stages, or submit them to Slurm.

    Return None once the documents are published. If there are jobs in Slurm's queue instead,
    return a sentence that says so.

    `on_progress` is called with the stage's name, the number of tasks finished since the last call,
    and the number of all tasks.

    Raise DataError if documents cannot be read, or a process dies; finished tasks are kept.
    """
    waiting = jobs_in_queue(folder)
    if waiting:
        return (
            f"jobs {', '.join(waiting)} are in the queue still; run the same command again when"
            " they are done"
        )
    if folder.finished() is not None:  # another process has just finished it
        return None
    for each in (folder, removed):
        if each is not None and each.finished() is None:
            each.begin()
    loguru.logger.remove()  # datatrove's logs go to the folder, one file for each task
    stages = build_stages(config, folder, removed)
    forget_changed(folder, stages)
    if config.executor == "slurm":
        return submit(config, folder, stages)
    if config.executor == "ray":
        connect_to_ray(config.ray.address)
    total = sum(stage.tasks for stage in stages)
    for stage in stages:
        executor = build_executor(config, folder, stage, None)
        logs = log_folder(folder, stage)
        logs.mkdir(parents=True, exist_ok=True)
        to_do = executor.get_incomplete_ranks()
        on_progress(stage.name, stage.tasks - len(to_do), total)
        if isinstance(executor, LocalPipelineExecutor):
            num_workers = min(config.num_workers or len(os.sched_getaffinity(0)), len(to_do))
            for _ in run_local(executor, to_do, num_workers, logs / "log.txt", folder.out):
                on_progress(stage.name, 1, total)
            continue
        with Path(logs, "log.txt").open("a") as log, contextlib.redirect_stderr(Lines(log, "log")):
            executor.run()
        missing = executor.get_incomplete_ranks()
        if missing:
            raise DataError(
                f"{folder.out}: {len(missing)} of {stage.tasks} tasks of '{stage.name}' failed, the"
                f" first of them {missing[0]}: see {logs}; run the same command again to go on"
            )
        on_progress(stage.name, len(to_do), total)
    return None


def run_local(
    executor: LocalPipelineExecutor, ranks: Sequence[int], num_workers: int, log: Path, out: str
) -> Iterator[int]:
    """Run tasks of the executor on processes of this machine, and yield each once it is done.

    Raise DataError if a process dies.

    Upstream: datatrove 0.9, `LocalPipelineExecutor.run`, whose `_run_for_rank` is called here.
    Mends: it waits forever for a process that was killed, and prints all of its log.
    """
    if num_workers <= 1 or not can_have_processes():
        for rank in ranks:
            with log.open("a") as file, contextlib.redirect_stderr(Lines(file, "log")):
                run_task(copy.deepcopy(executor), rank, out)
            loguru.logger.remove()  # it writes to the file that is now closed
            yield rank
        return
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["flame_composer.fork_server", "flame_composer.cleaning.stages"])
    pool = ProcessPoolExecutor(num_workers, context, start_process, (log,))
    try:
        with ending_children():
            tasks = {pool.submit(run_task, executor, rank, out): rank for rank in ranks}
            for task in as_completed(tasks):
                task.result()
                yield tasks[task]
    except BrokenProcessPool:
        raise DataError(
            f"{out}: a worker process died (short of memory? give fewer num_workers, or a"
            " smaller unit_size); run the same command again: it goes on from the last"
            " finished unit"
        ) from None
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def start_process(log: Path) -> None:
    """Set up a worker process: it ends with its parent, and its stderr goes to `log`."""
    end_with_parent()
    sys.stderr = log.open("a", buffering=1)
    clean_streams()


def run_task(executor: LocalPipelineExecutor, rank: int, out: str) -> None:
    """Run one task of the executor in this process."""
    allow_many_files()
    with explained(out):
        executor._run_for_rank(rank, local_rank=1)


def allow_many_files() -> int:
    """Raise this process's limit of open files as far as the system allows, and return it.

    datatrove opens the hashes of all units at once.
    """
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    return most


def check_number(num_units: int) -> None:
    """Raise ConfigError for more units than datatrove can tell apart, or have open at once."""
    most = min(MAX_TASKS, allow_many_files() - 64)
    if num_units > most:
        raise ConfigError(
            f"unit_size: the source makes {num_units} units, and there can be {most} (as many files"
            " are open at once); raise unit_size, or the limit of ulimit -n"
        )


def connect_to_ray(address: str) -> None:
    """Connect to a Ray cluster. Raise ConfigError if Ray is not installed, or not reached."""
    try:
        import ray
    except ImportError:
        raise ConfigError("executor=ray: ray is not installed; pip install ray") from None
    try:
        ray.init(address=address, ignore_reinit_error=True, log_to_driver=False)
    except ConnectionError as error:
        reason = str(error).splitlines()[0].rstrip(".")
        raise ConfigError(
            f"ray.address: {address}: cannot be reached: {reason}; give a Ray cluster's address"
        ) from None


def jobs_in_queue(folder: PartsFolder) -> list[str]:
    """Return the Slurm jobs submitted for this folder, or [] if all of them have ended.

    Until then, nothing in the folder may be touched. Raise ConfigError if jobs were submitted but
    this machine has no squeue to ask about them.
    """
    record = folder.work / JOBS
    if not record.exists():
        return []
    jobs: list[str] = read_json(record)["jobs"]
    try:
        queue = subprocess.run(
            ["squeue", "--noheader", "--jobs", ",".join(jobs)], capture_output=True, text=True
        )
    except OSError:
        raise ConfigError(
            f"{folder.out}: Slurm jobs {', '.join(jobs)} were submitted for it, and there is no"
            " squeue here to ask about them; run the command where they were submitted, or remove"
            f" {record}"
        ) from None
    # squeue fails once Slurm has forgotten the jobs.
    return jobs if queue.returncode == 0 and queue.stdout.strip() else []


def submit(config: CleanConfig, folder: PartsFolder, stages: Sequence[Stage]) -> str:
    """Submit every stage to Slurm, each to start once the one before has finished.

    Return a sentence that says what was submitted. Raise ConfigError if Slurm does not take it.
    """
    record = folder.work / JOBS
    before = ""
    if record.exists():
        before = (
            f"jobs {', '.join(read_json(record)['jobs'])} did not finish, see"
            f" {folder.work / 'logs'}; "
        )
    last: Executor | None = None
    executors = [last := build_executor(config, folder, stage, last) for stage in stages]
    try:
        executors[-1].run()
    except OSError as error:
        raise ConfigError(
            f"executor=slurm: {error.filename}: no such command; submit from a machine of the"
            " cluster"
        ) from None
    except subprocess.CalledProcessError as error:
        raise ConfigError(
            f"slurm: sbatch refused a job (exit status {error.returncode}) for what it says above"
        ) from None
    jobs = [str(executor.job_id) for executor in executors if executor.job_id not in (None, -1)]
    publish_file(record, {"jobs": jobs})
    return (
        f"{before}submitted jobs {', '.join(jobs)}; run the same command again when they are done"
    )
