"""Processes that end together: a child with its parent, a rank with its launcher.

A process killed with SIGKILL can tell nobody, so the kernel ends what it leaves behind: Linux sends
a process a signal of its choice when the thread that started it ends (PR_SET_PDEATHSIG). That
signal is SIGKILL here, for it reaches processes that are stopped (SIGSTOP), too.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import re
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

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
    """Have a process that multiprocessing started end when the process that asked for it ends.

    The kernel ends it at once. If it is of a fork server, that is its parent, and a thread ends it.
    Ctrl-C, which reaches every process of a terminal, is left to the process in charge.
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
    """Kill the processes that multiprocessing starts in the body if an exception leaves it.

    They are not waited for, whatever they are doing.
    """
    others = set(multiprocessing.active_children())
    try:
        yield
    except BaseException:
        for process in set(multiprocessing.active_children()) - others:
            process.kill()
        raise


def end_with_fork_server_owner() -> None:
    """Have a fork server, and what it forks, end when the process that started it ends.

    A new process of the server takes up to seconds until it runs code of ours; if it were stopped
    (SIGSTOP) before that, it would stay for good.
    """
    when_parent_ends(signal.SIGKILL)  # if it already has, the server finds its pipe closed
    server = os.getpid()

    def follow_server() -> None:
        if os.getppid() == server:  # not in a process forked by one of the server's
            when_parent_ends(signal.SIGKILL)

    os.register_at_fork(after_in_child=follow_server)


def end_with_launcher() -> None:
    """Have a rank end when the launcher that started it ends, `composer` or torchrun.

    No other parent is followed: a shell, ssh or srun may end before what it has started.
    """
    parent = os.getppid()
    if "LOCAL_RANK" in os.environ and _is_launcher(parent):
        when_parent_ends(signal.SIGKILL)
        if os.getppid() != parent:
            os._exit(1)


def outlive_launcher() -> None:
    """Let a rank that was told to end save in peace, even if the launcher does not wait for it.

    Must be called in the main thread.
    """
    when_parent_ends(0)


def when_parent_ends(number: int) -> None:
    """Choose the signal that this process gets when its parent ends, 0 for none.

    It holds for the thread that calls it alone.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, int(number), 0, 0, 0)


def lead_session() -> None:
    """Have the descendants of the first process in a session end with it, on Linux.

    They end at SIGTERM, or when its parent ends. Those whose own parents end before become its
    children.
    """
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    signal.signal(signal.SIGTERM, lambda *_: end_session(0))
    when_parent_ends(signal.SIGTERM)


def end_session(process: int) -> None:
    """Kill the first process of a session, or this one if 0, and all that it has started."""
    os.killpg(process, signal.SIGKILL)


def _is_launcher(process: int) -> bool:
    """Return whether a process is a launcher."""
    try:
        command = Path(f"/proc/{process}/cmdline").read_bytes().decode(errors="replace")
    except OSError:  # not on Linux, or it has just ended
        return False
    return starts_ranks(command.split("\0"))


def starts_ranks(command: list[str]) -> bool:
    """Return whether a command line is that of a launcher.

    It may be the launcher itself, or Python with the launcher's script or module.
    """
    # The first word that is not an option is the script; the rest are its arguments
    script = next(
        (i for i, word in enumerate(command[1:], 1) if word == "-m" or word[:1] != "-"), 0
    )
    if command[script] == "-m":
        return command[script + 1] in LAUNCHER_MODULES
    return any(Path(command[i]).name in LAUNCHERS for i in (0, script))


def loss_of(error: BaseException) -> str | None:
    """Return one line for an error that came of the end of another process, or None.

    That process is a loader process, or another rank.
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
    """Return whether processes that wait for one another can be started.

    That takes a /dev/shm that can be written to.
    """
    try:
        multiprocessing.Lock()
    except OSError:
        return False
    return True
