"""Who ends with whom: real processes, killed and stopped by real signals, looked for in /proc."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from flame_composer import processes
from tests.runs import ROOT

pytestmark = pytest.mark.skipif(
    sys.platform != "linux", reason="it is the kernel of Linux that ends them"
)

RANK = """
import os, sys, time
from pathlib import Path
from flame_composer import processes
if len(sys.argv) > 2:
    while os.getppid() == int(sys.argv[2]):
        time.sleep(0.01)
processes.end_with_launcher()
if "outlive" in sys.argv:
    processes.outlive_launcher()
Path(sys.argv[1]).write_text(str(os.getpid()))
time.sleep(60)
"""
LAUNCHER = """
import subprocess, sys, time
children = [subprocess.Popen([sys.executable, *sys.argv[1:]]) for _ in range(2)]
time.sleep(60)
"""
LOADERS = """
import multiprocessing, sys, time
from pathlib import Path
from flame_composer.processes import end_with_parent

def work(number):
    end_with_parent()
    Path(sys.argv[1], str(number)).write_text(str(multiprocessing.current_process().pid))
    time.sleep(60)

if __name__ == "__main__":
    if sys.argv[2] == "forkserver":
        multiprocessing.set_forkserver_preload(["flame_composer.fork_server"])
    context = multiprocessing.get_context(sys.argv[2])
    for number in range(2):
        context.Process(target=work, args=(number,)).start()
    time.sleep(60)
"""
ENV = {**os.environ, "PYTHONPATH": str(ROOT), "LOCAL_RANK": "0"}


def wait_until(condition, seconds: float = 20) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.01)


def runs(process: psutil.Process) -> bool:
    return process.is_running() and process.status() != psutil.STATUS_ZOMBIE


def launched(
    tmp_path: Path, name: str, *more: str
) -> tuple[subprocess.Popen[bytes], list[psutil.Process]]:
    """A launcher called `name`, or a shell, and what it has started, which is ready."""
    (tmp_path / "rank.py").write_text(RANK)
    (tmp_path / name).write_text(LAUNCHER)
    rank = [str(tmp_path / "rank.py"), str(tmp_path / "ready"), *more]
    command = [sys.executable, str(tmp_path / name), *rank]
    if name == "sh":
        command = ["sh", "-c", '"$@" & wait', "sh", sys.executable, *rank]
    launcher = subprocess.Popen(command, env=ENV, start_new_session=True)
    wait_until(lambda: (tmp_path / "ready").exists() and (tmp_path / "ready").read_text())
    time.sleep(0.3)  # the other of the two
    return launcher, psutil.Process(launcher.pid).children()


@pytest.mark.parametrize("stopped", [False, True])
@pytest.mark.parametrize("name", ["composer", "torchrun"])
def test_ranks_end_with_a_launcher_that_is_killed(tmp_path: Path, name: str, stopped: bool) -> None:
    launcher, ranks = launched(tmp_path, name)
    assert len(ranks) == 2
    assert all(map(runs, ranks))
    if stopped:
        os.killpg(launcher.pid, signal.SIGSTOP)
    launcher.kill()
    launcher.wait()
    wait_until(lambda: not any(map(runs, ranks)))


@pytest.mark.parametrize(
    ("name", "more"), [("sh", ()), ("my_script.py", ()), ("composer", ("0", "outlive"))]
)
def test_who_outlives_its_parent(tmp_path: Path, name: str, more: tuple[str, ...]) -> None:
    """What a shell or an unknown program has started, and ranks that a signal has told to save
    and end.
    """
    launcher, children = launched(tmp_path, name, *more)
    try:
        launcher.kill()
        launcher.wait()
        time.sleep(0.5)
        assert all(map(runs, children))
    finally:
        for child in children:
            child.kill()


def test_only_a_launcher_is_followed() -> None:
    """By its command line; what comes after the script's name belongs to the script."""
    for command, is_launcher in {
        ("-c", "import time; time.sleep(60)"): False,
        ("-c", "import time; time.sleep(60)", "composer"): False,
        ("-u", "-c", "import time; time.sleep(60)", "-m", "torch.distributed.run"): False,
        ("-m", "http.server", "--bind", "127.0.0.1", "0"): False,
    }.items():
        process = subprocess.Popen(
            [sys.executable, *command], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        try:
            assert processes._is_launcher(process.pid) is is_launcher, command
        finally:
            process.kill()
            process.wait()
    assert not processes._is_launcher(process.pid)  # it is gone


@pytest.mark.parametrize(
    ("command", "is_launcher"),
    [
        (["python", "/venv/bin/composer", "-n", "2", "recipes/train.py"], True),
        (["python3", "-u", "/venv/bin/torchrun", "recipes/train.py"], True),
        (["python", "-m", "torch.distributed.run", "recipes/train.py"], True),
        (["python", "-u", "-m", "composer.cli", "recipes/train.py"], True),
        (["/venv/bin/composer", "recipes/train.py"], True),
        (["bash", "run.sh", "composer"], False),
        (["bash", "-c", "composer -n 2 recipes/train.py"], False),
        (["slurmstepd: [7.0]"], False),
        ([""], False),
    ],
)
def test_command_lines_of_launchers(command: list[str], is_launcher: bool) -> None:
    """As the kernel shows them: each word with a NUL behind it."""
    assert processes.starts_ranks([*command, ""]) is is_launcher


@pytest.mark.parametrize("stopped", [False, True])
@pytest.mark.parametrize("method", ["fork", "forkserver", "spawn"])
def test_children_end_with_a_parent_that_is_killed(
    tmp_path: Path, method: str, stopped: bool
) -> None:
    """However they were started, and with the fork server between them."""
    (tmp_path / "loaders.py").write_text(LOADERS)
    parent = subprocess.Popen(
        [sys.executable, tmp_path / "loaders.py", tmp_path, method], env=ENV, start_new_session=True
    )
    wait_until(
        lambda: all(
            (tmp_path / f"{n}").exists() and (tmp_path / f"{n}").read_text() for n in range(2)
        )
    )
    tracker = [
        p
        for p in psutil.Process(parent.pid).children()
        if "resource_tracker" in " ".join(p.cmdline())
    ]
    children = [p for p in psutil.Process(parent.pid).children(recursive=True) if p not in tracker]
    assert len(children) == (3 if method == "forkserver" else 2)
    if stopped:
        os.killpg(parent.pid, signal.SIGSTOP)
    parent.kill()
    parent.wait()
    try:
        wait_until(lambda: not any(map(runs, children)), 5)
    finally:
        for left in tracker:  # is Python's own, which clears up after it is continued
            if left.is_running():
                left.resume()
    wait_until(lambda: not any(map(runs, tracker)), 5)


def test_a_child_that_has_not_begun_ends_with_its_fork_server(tmp_path: Path) -> None:
    """It imports the script first, which takes a while: who was stopped there stayed."""
    (tmp_path / "loaders.py").write_text(
        LOADERS + "else:\n"
        "    Path(sys.argv[1], str(multiprocessing.current_process().pid)).touch()\n"
        "    time.sleep(60)\n"
    )
    parent = subprocess.Popen(
        [sys.executable, tmp_path / "loaders.py", tmp_path, "forkserver"],
        env=ENV,
        start_new_session=True,
    )
    wait_until(lambda: len([path for path in tmp_path.iterdir() if path.name.isdigit()]) == 2)
    children = [
        psutil.Process(int(path.name)) for path in tmp_path.iterdir() if path.name.isdigit()
    ]
    for child in children:
        child.suspend()
    parent.kill()
    parent.wait()
    wait_until(lambda: not any(map(runs, children)), 5)


def test_what_is_no_loss_of_a_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert processes.lost_process(RuntimeError("Connection reset by peer")) is None  # of what peer?
    assert (
        processes.lost_process(
            ValueError("DataLoader worker (pid 1) is killed by signal: Killed. ")
        )
        is None
    )
    assert (
        processes.lost_process(RuntimeError("shape '[2]' is invalid for input of size 3")) is None
    )
