"""Real runs of the scripts in processes of their own, on a model and a corpus that take seconds.
A pytest plugin.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import multiprocessing
import os
import random
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

ROOT = Path(__file__).parent.parent

# yamls/gla_tiny.yaml made smaller still; an epoch is 15 steps, so 40 steps are two epochs and two
# thirds.
TINY = (
    "max_duration=40ba",
    "global_batch_size=4",
    "microbatch_size=2",
    "context_length=64",
    "scheduler.warmup=4ba",
    "save_interval=5ba",
    "eval_interval=10ba",
    "eval_data.max_rows=7",
    "log_batch_hash=true",
    "train_data.num_workers=0",
)
TINY_GLA = (
    "model.config.vocab_size=300",
    "model.config.hidden_size=32",
    "model.config.num_hidden_layers=2",
    "model.config.num_heads=2",
)
WANDB = (
    "wandb.project=tests",
    "wandb.entity=testers",
    "wandb.group=ours",
    "wandb.tags=[still,whole]",
)
# Rows and tokens per second depend on the machine, all else must not.
TIMINGS = ("throughput",)


# A process that has imported what the scripts import, and forks for each of them: the import takes
# longer than a run.
_FORKS = multiprocessing.get_context("forkserver")
_FORKS.set_forkserver_preload(["tests.warm"])


def _run(
    command: list[str], output: str, env: dict[str, str], folder: Path, stdin: str | None
) -> None:
    """In the forked process: what `python command...` does."""
    os.setpgid(0, 0)  # so that a signal to the whole group spares the tests
    # As for `python`; a process of a fork server has another default
    multiprocessing.set_start_method("fork", force=True)
    os.environ.update(env)
    for name, number in (("out", 1), ("err", 2)):
        os.dup2(os.open(f"{output}.{name}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    if stdin is not None:
        os.dup2(os.open(stdin, os.O_RDONLY), 0)
        sys.stdin = open(0)  # noqa: SIM115
    sys.stdout = open(1, "w", buffering=1)  # noqa: SIM115
    sys.stderr = open(2, "w", buffering=1)  # noqa: SIM115
    os.chdir(folder)
    sys.argv = command
    try:
        runpy.run_path(command[0], run_name="__main__")
    finally:
        atexit._run_exitfuncs()  # a forked process leaves them out


_started: list[Script] = []  # in this process, in their order


class Script:
    """A script that runs in a process of its own, with the file `stdin` as its standard input."""

    def __init__(
        self,
        *command: object,
        env: dict[str, str] | None = None,
        folder: Path = ROOT,
        stdin: Path | None = None,
    ):
        self.folder = tempfile.TemporaryDirectory()
        self.output = str(Path(self.folder.name, "std"))
        self.process = _FORKS.Process(
            target=_run,
            args=(
                list(map(str, command)),
                self.output,
                env or {},
                folder,
                None if stdin is None else str(stdin),
            ),
        )
        self.process.start()
        _started.append(self)

    def wait(self) -> subprocess.CompletedProcess[str]:
        self.process.join(timeout=500)
        assert self.process.exitcode is not None, self.read("err")
        with self.folder:
            return subprocess.CompletedProcess(
                [], self.process.exitcode, self.read("out"), self.read("err")
            )

    def kill(self) -> None:
        """Kill it, if it runs, with what it started; its group is its own once it has begun."""
        pid = self.process.pid
        if self.process.is_alive() and pid is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(pid, signal.SIGKILL)
            self.process.kill()
            self.process.join()
        self.folder.cleanup()

    def read(self, name: str) -> str:
        path = Path(f"{self.output}.{name}")
        return path.read_text() if path.exists() else ""  # it has just been forked


class Ranks:
    """recipes/train.py, or `command`, on `number` ranks, as the launcher starts them, but of
    processes that have imported everything.
    """

    def __init__(
        self,
        number: int,
        *keys: str,
        env: dict[str, str] | None = None,
        folder: Path = ROOT,
        command: tuple[object, ...] = (ROOT / "recipes/train.py",),
    ):
        env = {**(env or {}), **meeting(number)}
        self.scripts = [
            Script(
                *command,
                *keys,
                env=env | {"RANK": f"{rank}", "LOCAL_RANK": f"{rank}"},
                folder=folder,
            )
            for rank in range(number)
        ]

    def kill_after(self, log: Path, step: int) -> None:
        while not log.exists() or log.read_text().count("\n") < step:
            assert all(script.process.is_alive() for script in self.scripts), self.scripts[0].read(
                "err"
            )
            time.sleep(0.002)
        for script in self.scripts:
            script.process.kill()
        for script in self.scripts:
            script.wait()

    def finish(self) -> None:
        for script in self.scripts:
            check(script.wait())


def run_script(
    *command: object,
    folder: Path = ROOT,
    env: dict[str, str] | None = None,
    stdin: Path | None = None,
) -> subprocess.CompletedProcess[str]:
    return Script(*command, folder=folder, env=env, stdin=stdin).wait()


def two_ranks(*command: object) -> list[subprocess.CompletedProcess[str]]:
    """What each of two processes that work together comes to, first rank first."""
    return run_ranks(2, *command)


def run_ranks(number: int, *command: object) -> list[subprocess.CompletedProcess[str]]:
    """What each of `number` processes that work together comes to, first rank first."""
    env = meeting(number)
    ranks = [
        Script(*command, env={**env, "RANK": f"{rank}", "LOCAL_RANK": f"{rank}"})
        for rank in range(number)
    ]
    return [check(rank.wait()) for rank in ranks]


def meeting(ranks: int) -> dict[str, str]:
    """The environment in which that many ranks meet; RANK and LOCAL_RANK are to be added."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return {
        "WORLD_SIZE": f"{ranks}",
        "LOCAL_WORLD_SIZE": f"{ranks}",
        "NODE_RANK": "0",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": f"{port}",
    }


def check(process: subprocess.CompletedProcess[str]) -> subprocess.CompletedProcess[str]:
    assert process.returncode == 0, process.stdout[-2000:] + process.stderr[-4000:]
    return process


def last_json(process: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    return json.loads(check(process).stdout.splitlines()[-1])


def read_log(run: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (run / "train_log.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if key not in TIMINGS} for row in rows]


class Corpus:
    """A tokenizer and a dataset with its held-out part, made by the convert scripts."""

    def __init__(self, folder: Path):
        self.text = folder / "corpus.jsonl"
        self.tokenizer, self.train, self.val = (
            folder / "tokenizer",
            folder / "train",
            folder / "val",
        )
        words = [
            f"{a}{b}"
            for a in ("ka", "lo", "mi", "ne", "pu", "ra", "si")
            for b in ("t", "man", "ro", "vel", "sh")
        ]
        choose = random.Random(0)
        with self.text.open("w") as corpus:
            for _ in range(116):
                corpus.write(
                    json.dumps({"text": " ".join(choose.choices(words, k=choose.randint(1, 60)))})
                    + "\n"
                )

    def convert(self) -> None:
        source, tokenizer = f"source={self.text}", self.tokenizer
        check(
            run_script("convert/train_tokenizer.py", source, f"out={tokenizer}", "vocab_size=300")
        )
        check(
            run_script(
                "convert/to_mds.py",
                source,
                f"tokenizer={tokenizer}",
                "context_length=64",
                f"out={self.train}",
                "val_fraction=0.15",
                f"val_out={self.val}",
            )
        )

    def keys(self, run: Path, *more: str) -> list[str]:
        """The arguments of recipes/train.py for a run in folder `run`; `more` may begin with a
        YAML file.
        """
        file = (
            (more[0],) if more and more[0].endswith(".yaml") else ("yamls/gla_tiny.yaml", *TINY_GLA)
        )
        more = more if len(file) > 1 else more[1:]
        return [
            *file,
            *TINY,
            f"tokenizer={self.tokenizer}",
            f"train_data.local={self.train}",
            f"eval_data.local={self.val}",
            f"run_name={run.name}",
            f"log_folder={run}",
            f"save_folder={run / 'checkpoints'}",
            *more,
        ]

    def yaml_with(self, model: dict[str, Any]) -> str:
        """yamls/gla_tiny.yaml with another model."""
        content = yaml.safe_load((ROOT / "yamls/gla_tiny.yaml").read_text())
        file = self.text.with_name(f"{model['model_type']}.yaml")
        file.write_text(yaml.dump({**content, "model": {"config": model}}))
        return str(file)

    def train_run(self, run: Path, *more: str, env: dict[str, str] | None = None) -> dict[str, Any]:
        return last_json(Script("recipes/train.py", *self.keys(run, *more), env=env).wait())

    def stopped_run(
        self,
        run: Path,
        *more: str,
        after_step: int,
        group: bool = False,
        env: dict[str, str] | None = None,
    ) -> subprocess.CompletedProcess[str]:
        """Start a run and send it (or its whole group) SIGTERM, three times, some instant after it
        has logged `after_step`.

        `args` of what is returned is the number of steps that were logged at the first.
        """
        script = Script("recipes/train.py", *self.keys(run, *more), env=env)
        self.wait_for_step(script, run, after_step)
        pid = script.process.pid
        assert pid is not None
        # It trains on while a busy machine runs others than this process
        os.kill(pid, signal.SIGSTOP)
        logged = (run / "train_log.jsonl").read_text().count("\n")
        with contextlib.suppress(ProcessLookupError):  # the second or third may come too late
            for _ in range(3):
                (os.killpg if group else os.kill)(pid, signal.SIGTERM)
                os.kill(pid, signal.SIGCONT)
                time.sleep(0.05)
        result = script.wait()
        result.args = logged
        return result

    def wait_for_step(self, script: Script, run: Path, step: int) -> None:
        """Until some instant after the run has logged `step`."""
        log = run / "train_log.jsonl"
        while not log.exists() or log.read_text().count("\n") < step:
            assert script.process.is_alive(), script.read("err")
            time.sleep(0.002)
        time.sleep(random.Random(step).random() * 0.05)

    def killed_run(
        self, run: Path, *more: str, after_step: int, env: dict[str, str] | None = None
    ) -> None:
        """Start a run and kill it with SIGKILL some instant after it has logged `after_step`."""
        script = Script("recipes/train.py", *self.keys(run, *more), env=env)
        self.wait_for_step(script, run, after_step)
        loaders = psutil.Process(script.process.pid).children(recursive=True)
        script.process.kill()
        assert script.wait().returncode == -signal.SIGKILL, "it finished before it could be killed"
        assert psutil.wait_procs(loaders, timeout=30)[1] == [], "loader processes outlive the run"


@pytest.fixture(autouse=True)
def nothing_left_running() -> Iterator[None]:
    """A test that fails ends no server that it started, and pytest would wait for it in the end.

    What fixtures of whole modules start is begun before this one.
    """
    before = len(_started)
    yield
    for script in _started[before:]:
        script.kill()
    del _started[before:]


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish() -> None:
    """Kill what a fixture of a module has left, having failed halfway."""
    for script in _started:
        script.kill()


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    made = Corpus(tmp_path_factory.mktemp("corpus"))
    made.convert()
    return made


@pytest.fixture(scope="session")
def undisturbed(corpus: Corpus, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that nothing disturbed."""
    run = tmp_path_factory.mktemp("runs") / "undisturbed"
    summary = corpus.train_run(run, *WANDB, env={"WANDB_MODE": "offline"})
    (run / "summary.json").write_text(json.dumps(summary))
    return run
