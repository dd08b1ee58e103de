"""Two machines imitated on one: a network namespace each, joined by a cable, with a name, memory
and processes of its own.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.runs import ROOT

# A machine's processes end with its first one, as when its plug is pulled. Streaming's find one
# another in /dev/shm.
BOOT = (
    "unshare",
    "--mount",
    "--uts",
    "--ipc",
    "--pid",
    "--fork",
    "--kill-child",
    "--mount-proc",
    "sh",
    "-c",
    (
        'mount -t tmpfs tmpfs /dev/shm && mount --bind "$1" /etc/hosts && hostname "$2" && shift 2'
        ' && exec "$@"'
    ),
    "boot",
)


class Hosts:
    """Machines node0 and node1, whose names lead to their addresses; `folder` is a disk that
    both see.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.names = [f"fc{os.getpid()}-{node}" for node in (0, 1)]
        self.started: list[subprocess.Popen[bytes]] = []
        (folder / "hosts").write_text("127.0.0.1 localhost\n10.77.0.1 node0\n10.77.0.2 node1\n")

    def connect(self) -> None:
        for name in self.names:
            _ip("netns", "add", name)
        first, second = self.names
        _ip(
            "link",
            "add",
            "eth0",
            "netns",
            first,
            "type",
            "veth",
            "peer",
            "name",
            "eth0",
            "netns",
            second,
        )
        for node, name in enumerate(self.names):
            _ip("-n", name, "addr", "add", f"10.77.0.{node + 1}/24", "dev", "eth0")
            for device in ("lo", "eth0"):
                _ip("-n", name, "link", "set", device, "up")

    def remove(self) -> None:
        for process in self.started:
            process.kill()
            process.wait()
        for name in self.names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True)

    def start(self, node: int, *command: object, **env: str) -> subprocess.Popen[bytes]:
        """Killed, all that runs on the machine is; what it says goes to `node<N>.log`."""
        temporary = self.folder / f"tmp{node}"
        temporary.mkdir(exist_ok=True)
        with (self.folder / f"node{node}.log").open("a") as log:
            self.started.append(
                subprocess.Popen(
                    [
                        "ip",
                        "netns",
                        "exec",
                        self.names[node],
                        *BOOT,
                        str(self.folder / "hosts"),
                        f"node{node}",
                        *map(str, command),
                    ],
                    cwd=ROOT,
                    env={**os.environ, "PYTHONPATH": str(ROOT), "TMPDIR": str(temporary), **env},
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    stdin=subprocess.DEVNULL,
                )
            )
        return self.started[-1]

    def log(self, node: int) -> str:
        return (self.folder / f"node{node}.log").read_text()


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True)


def no_hosts() -> str | None:
    """Why no machines can be imitated here, if they cannot."""
    if os.geteuid() != 0:
        return "it takes root"
    if not shutil.which("ip") or not shutil.which("unshare"):
        return "it takes iproute2 and util-linux"
    name = f"fc{os.getpid()}-t"
    tried = subprocess.run(["ip", "netns", "add", name], capture_output=True)
    subprocess.run(["ip", "netns", "del", name], capture_output=True)
    return None if tried.returncode == 0 else "this machine makes no network namespaces"


@pytest.fixture
def hosts(tmp_path: Path) -> Iterator[Hosts]:
    if reason := no_hosts():
        pytest.skip(f"no network namespaces: {reason}")
    made = Hosts(tmp_path)
    try:
        made.connect()
        yield made
    finally:
        made.remove()
