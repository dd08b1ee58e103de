"""Processes that end together: a child with its parent, a rank with its launcher.

A process killed with SIGKILL can tell nobody, so the kernel ends what it leaves behind: Linux sends
a process a signal of its choice when the thread that started it ends (PR_SET_PDEATHSIG). That
signal is SIGKILL here, for it reaches processes that are stopped (SIGSTOP), too.
"""

from __future__ import annotations

import ctypes
import json
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

# linux/prctl.h
PR_SET_PDEATHSIG = 1
PR_SET_CHILD_SUBREAPER = 36
LAUNCHERS = ("composer", "torchrun")
LAUNCHER_MODULES = (
    "composer.cli",
    "composer.cli.launcher",
    "torch.distributed.run",
    "torch.distributed.launch",
)
LOADER = re.compile(
    r"DataLoader worker \(pid.*?\) (is killed by signal: [^.]*|exited unexpectedly)"
)
PEER = re.compile(r"gloo/|TCPStore|NCCL|Connection (closed|reset) by peer")
PEER_ERRORS = ("DistBackendError", "DistNetworkError", "DistStoreError")


def end_with_parent() -> None:
    """Make this process, started by multiprocessing, end when the process that asked for it ends.

    The kernel kills it at once if that process is its parent. The parent of a process from a fork
    server is the server, so a thread watches the process that asked. Ctrl-C, which reaches every
    process of a terminal, is ignored here and left to that process.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None
    threading.Thread(target=_follow, args=(parent,), daemon=True).start()
    when_parent_ends(signal.SIGKILL)
    if not parent.is_alive():  # it ended before the kernel was asked
        os._exit(1)


def _follow(parent: multiprocessing.process.BaseProcess) -> None:
    """End this process when its parent ends."""
    parent.join()
    os._exit(1)


@contextmanager
def ending_children() -> Iterator[None]:
    """Kill the processes that multiprocessing started in the body if the body raises.

    They are killed without waiting, whatever they are doing.
    """
    others = set(multiprocessing.active_children())
    try:
        yield
    except BaseException:
        for process in set(multiprocessing.active_children()) - others:
            process.kill()
        raise


def end_with_fork_server_owner() -> None:
    """Make a fork server, and the processes it forks, end when the process that started it ends.

    It may take a forked process seconds until it runs code of ours. If it were stopped (SIGSTOP)
    before that, it would never end without this.
    """
    when_parent_ends(signal.SIGKILL)  # if it has ended already, the server's pipe is closed
    server = os.getpid()

    def follow_server() -> None:
        if os.getppid() == server:  # not a process that was forked by one of these
            when_parent_ends(signal.SIGKILL)

    os.register_at_fork(after_in_child=follow_server)


def end_with_launcher() -> None:
    """Make a rank end when the launcher that started it (`composer` or torchrun) ends.

    Other parents do not count: a shell, ssh or srun may end before what it has started.
    """
    parent = os.getppid()
    if "LOCAL_RANK" in os.environ and _is_launcher(parent):
        when_parent_ends(signal.SIGKILL)
        if os.getppid() != parent:
            os._exit(1)


def outlive_launcher() -> None:
    """Let this rank finish saving even if its launcher ends without waiting for it.

    Must be called in the main thread.
    """
    when_parent_ends(0)


def when_parent_ends(number: int) -> None:
    """Set the signal that the kernel sends this process when its parent ends, 0 for none.

    On systems other than Linux, do nothing. Only the calling thread is affected.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, int(number), 0, 0, 0)


def run_and_show(*command: str) -> dict[str, Any]:
    """Run a script, showing its command and output; return the JSON object in its last line.

    Return {} if that holds none. The script gets SIGTERM if this process ends. Ctrl-C ends both; a
    failed script ends this process with its exit status.
    """
    print("\n$ python", *(f"'{part}'" if " " in part else part for part in command), flush=True)
    last = ""
    told = partial(when_parent_ends, signal.SIGTERM)
    with subprocess.Popen(
        [sys.executable, *command], stdout=subprocess.PIPE, text=True, preexec_fn=told
    ) as process:
        assert process.stdout is not None
        try:
            for line in process.stdout:
                print(line, end="", flush=True)
                last = line
        except KeyboardInterrupt:  # the script receives it, too
            sys.exit(128 + signal.SIGINT)
    if process.returncode:
        sys.exit(process.returncode)
    return json.loads(last) if last.startswith("{") else {}


def start_child(command: Sequence[str], out: BinaryIO, err: BinaryIO) -> subprocess.Popen[bytes]:
    """Start a command that gets SIGTERM when this process ends, however it ends.

    Its output goes to the two files. Call it in the main thread: the kernel's signal comes when the
    thread that started the process ends.
    """
    parent = os.getpid()

    def follow() -> None:
        when_parent_ends(signal.SIGTERM)
        if os.getppid() != parent:  # it ended before the kernel was asked
            os._exit(128 + signal.SIGTERM)

    return subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=out, stderr=err, preexec_fn=follow
    )


def lead_session() -> None:
    """Make all descendants of this process, the first one of a session, end with it (Linux only).

    They all end when it gets SIGTERM, or when its parent ends. Descendants whose own parents end
    earlier become its children.
    """
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    signal.signal(signal.SIGTERM, lambda *_: end_session(0))
    when_parent_ends(signal.SIGTERM)


def end_session(process: int) -> None:
    """Kill the process group led by `process`, or this process's own group if 0."""
    os.killpg(process, signal.SIGKILL)


def _is_launcher(process: int) -> bool:
    """Return whether the process with this id is a launcher."""
    try:
        command = Path(f"/proc/{process}/cmdline").read_bytes().decode(errors="replace")
    except OSError:  # not on Linux, or it has just ended
        return False
    return starts_ranks(command.split("\0"))


def starts_ranks(command: list[str]) -> bool:
    """Return whether a command line is that of a launcher.

    It may name the launcher itself, or Python with the launcher's script or module.
    """
    # The first word that is not an option is the script; the words after it are its arguments.
    script = next(
        (i for i, word in enumerate(command[1:], 1) if word == "-m" or word[:1] != "-"), 0
    )
    if command[script] == "-m":
        return command[script + 1] in LAUNCHER_MODULES
    return any(Path(command[i]).name in LAUNCHERS for i in (0, script))


def lost_process(error: BaseException) -> str | None:
    """Return one line for an error caused by the end of a loader process or another rank.

    Return None if the error has another cause. (The loss is that of a process.)
    """
    text = " ".join(str(error).split())
    rank = os.environ.get("RANK")
    where = "" if rank is None else f"rank {rank}: "
    loader = LOADER.search(text)
    if isinstance(error, RuntimeError) and loader is not None:
        how = (
            loader[1]
            .replace("is killed", "was killed")
            .replace("exited unexpectedly", "ended unexpectedly")
        )
        return f"{where}a loader process {how.strip()} (short of memory? give fewer num_workers)"
    is_peer = type(error).__name__ in PEER_ERRORS or (
        isinstance(error, RuntimeError) and PEER.search(text)
    )
    if is_peer and os.environ.get("WORLD_SIZE", "1") != "1":
        return f"{where}another rank has ended, or cannot be reached ({text[:200].rstrip('.')})"
    return None


def can_have_processes() -> bool:
    """Return whether this machine can start processes that share multiprocessing's locks.

    Locks need a /dev/shm that can be written to.
    """
    try:
        multiprocessing.Lock()
    except OSError:
        return False
    return True
