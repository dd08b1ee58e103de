"""Processes that end together: a child with its parent, a rank with its launcher; what the loss of
one is called.

Who is killed with SIGKILL can tell nobody. So it is the kernel that ends what they leave behind:
Linux sends a process a signal of its choice when the thread that started it ends
(PR_SET_PDEATHSIG). As that signal is SIGKILL here, it reaches processes that are stopped (SIGSTOP),
too.
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
    """In a process that multiprocessing has started: end it when the process that asked for it
    ends, and at nothing that a terminal sends.

    Ctrl-C reaches every process of a terminal; the one in charge sees to the others. The kernel
    ends this one at once; for a process of a fork server, whose parent that is, a thread does.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None
    threading.Thread(target=_follow, args=(parent,), daemon=True).start()
    when_parent_ends(signal.SIGKILL)
    if not parent.is_alive():  # before the kernel was asked
        os._exit(1)


def _follow(parent: multiprocessing.process.BaseProcess) -> None:
    parent.join()
    os._exit(1)


@contextmanager
def ending_children() -> Iterator[None]:
    """Kill the processes that multiprocessing has started in the body if an exception leaves it.

    What they are in the middle of is not waited for.
    """
    others = set(multiprocessing.active_children())
    try:
        yield
    except BaseException:
        for process in set(multiprocessing.active_children()) - others:
            process.kill()
        raise


def end_with_fork_server_owner() -> None:
    """In a fork server: end it when the process that started it ends, and what it forks with it.

    A new process of the server takes up to seconds until it runs code of ours; who stops it
    (SIGSTOP) before that would keep it for good.
    """
    when_parent_ends(signal.SIGKILL)  # if that has ended already, the server finds its pipe closed
    server = os.getpid()

    def follow_server() -> None:
        if os.getppid() == server:  # not in what such a process forks itself
            when_parent_ends(signal.SIGKILL)

    os.register_at_fork(after_in_child=follow_server)


def end_with_launcher() -> None:
    """In a rank: end it when the launcher that started it ends, `composer` or torchrun, whatever
    ended that.

    Nobody else is followed: a shell, ssh or srun may end before what it has started.
    """
    parent = os.getppid()
    if "LOCAL_RANK" in os.environ and _is_launcher(parent):
        when_parent_ends(signal.SIGKILL)
        if os.getppid() != parent:
            os._exit(1)


def outlive_launcher() -> None:
    """In a rank that has been told to end: save in peace even if the launcher does not wait for
    it. Main thread only.
    """
    when_parent_ends(0)


def when_parent_ends(number: int) -> None:
    """Choose the signal that this process gets when its parent ends, 0 for none. For each thread
    apart.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, int(number), 0, 0, 0)


def lead_session() -> None:
    """In the first process of a session on Linux: have its descendants end with it, at SIGTERM or
    when its parent ends, and become its children if their own parents end before.
    """
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    signal.signal(signal.SIGTERM, lambda *_: end_session(0))
    when_parent_ends(signal.SIGTERM)


def end_session(process: int) -> None:
    """Kill the first process of a session, this one if 0, with all that it has started."""
    os.killpg(process, signal.SIGKILL)


def _is_launcher(process: int) -> bool:
    try:
        command = Path(f"/proc/{process}/cmdline").read_bytes().decode(errors="replace")
    except OSError:  # not Linux, or it has just ended
        return False
    return starts_ranks(command.split("\0"))


def starts_ranks(command: list[str]) -> bool:
    """Whether a command line is that of a launcher: itself, or Python's with its script or
    module.
    """
    # What follows the first word that is no option belongs to the script.
    script = next(
        (i for i, word in enumerate(command[1:], 1) if word == "-m" or word[:1] != "-"), 0
    )
    if command[script] == "-m":
        return command[script + 1] in LAUNCHER_MODULES
    return any(Path(command[i]).name in LAUNCHERS for i in (0, script))


def loss_of(error: BaseException) -> str | None:
    """Return one line for an error that came of another process's end: a loader process, or
    another rank. None for others.
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
    """Whether processes can be started that wait for one another, which takes a /dev/shm that
    can be written to.
    """
    try:
        multiprocessing.Lock()
    except OSError:
        return False
    return True
