"""A real Slurm on this machine: its daemons with files of their own, two nodes of two processors
each. A pytest plugin.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.runs import ROOT

CONF = """
ClusterName=tests
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller_port}
SlurmUser=root
SlurmdUser=root
CommunicationParameters=NoCtldInAddrAny,NoInAddrAny
AuthType=auth/munge
CryptoType=crypto/munge
AuthInfo=socket={folder}/munge.sock,cred_expire=5
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmdSpoolDir={folder}/spool-%n
StateSaveLocation={folder}/state
ProctrackType=proctrack/pgid
TaskPlugin=task/none
MpiDefault=none
SwitchType=switch/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SlurmdParameters=config_overrides
ReturnToService=2
KillWait=30
GresTypes=gpu
SchedulerParameters=batch_sched_delay=1,sched_interval=2
NodeName=node0 NodeHostname={host} NodeAddr=127.0.0.1 Port={port0} CPUs=2 RealMemory=1000 Gres=gpu:8
NodeName=node1 NodeHostname={host} NodeAddr=127.0.0.1 Port={port1} CPUs=2 RealMemory=1000 Gres=gpu:8
PartitionName=main Nodes=node0,node1 Default=YES DefaultTime=10 MaxTime=60 State=UP
"""
# Streaming's loaders find one another by names in /dev/shm, of which every node has its own.
OWN_SHM = ("unshare", "--mount", "sh", "-c", 'mount -t tmpfs tmpfs /dev/shm && exec "$@"', "node")
# The script asks for GPUs; no process looks at these files.
GRES = "NodeName=node[0-1] Name=gpu File=/dev/tty[0-7]\n"


@dataclass(frozen=True)
class Slurm:
    """A cluster that runs; `env` leads Slurm's commands to it."""

    folder: Path
    env: dict[str, str]

    def command(self, *command: object) -> str:
        process = subprocess.run(
            list(map(str, command)),
            env=self.env,
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert process.returncode == 0, (command, process.stdout, process.stderr)
        return process.stdout.strip()

    def state(self, job: str) -> dict[str, str]:
        fields = self.command("scontrol", "--oneliner", "show", "job", job).split()
        return dict(field.partition("=")[::2] for field in fields)

    def wait_for(self, job: str, *states: str, seconds: float = 240) -> dict[str, str]:
        end = time.monotonic() + seconds
        while (state := self.state(job))["JobState"] not in states:
            assert time.monotonic() < end, state
            time.sleep(0.2)
        return state


def missing() -> str | None:
    """Why there can be no Slurm here."""
    programs = ("munged", "slurmctld", "slurmd", "sbatch")
    absent = [
        name
        for name in programs
        if shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin") is None
    ]
    if absent:
        return f"{', '.join(absent)} not installed (Debian: slurm-wlm munge)"
    return None if os.geteuid() == 0 else "slurmd needs root"


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@pytest.fixture(scope="session")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Slurm]:
    if reason := missing():
        pytest.skip(reason)
    folder = tmp_path_factory.mktemp("slurm")
    conf = CONF.format(
        folder=folder,
        host=socket.gethostname(),
        controller_port=_free_port(),
        port0=_free_port(),
        port1=_free_port(),
    )
    (folder / "slurm.conf").write_text(conf)
    (folder / "gres.conf").write_text(GRES)
    for name in ("state", "spool-node0", "spool-node1"):
        (folder / name).mkdir()
    key = folder / "munge.key"
    key.write_bytes(os.urandom(128))
    key.chmod(0o600)
    for parent in (folder, *folder.parents[:-2]):
        parent.chmod(0o755)  # munged insists on it
    env = {
        **os.environ,
        "SLURM_CONF": f"{folder}/slurm.conf",
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}:/usr/sbin",
    }
    daemons = [
        [
            "munged",
            "--foreground",
            f"--key-file={key}",
            f"--socket={folder}/munge.sock",
            f"--pid-file={folder}/munge.pid",
            f"--seed-file={folder}/munge.seed",
            f"--log-file={folder}/munge.log",
        ],
        ["slurmctld", "-D", "-i", "-f", f"{folder}/slurm.conf"],
        *(
            [*OWN_SHM, "slurmd", "-D", "-N", node, "-f", f"{folder}/slurm.conf"]
            for node in ("node0", "node1")
        ),
    ]
    started = []
    try:
        for number, daemon in enumerate(daemons):
            with (folder / f"{number}-{daemon[0]}.log").open("w") as log:
                started.append(subprocess.Popen(daemon, env=env, stdout=log, stderr=log))
            time.sleep(0.5)
        cluster = Slurm(folder, env)
        end = time.monotonic() + 60
        while cluster.command("sinfo", "--noheader", "--format=%T") != "idle":
            assert time.monotonic() < end, [
                path.read_text()[-2000:] for path in sorted(folder.glob("*.log"))
            ]
            time.sleep(0.3)
        yield cluster
    finally:
        for process in reversed(started):
            process.terminate()
            process.wait(timeout=60)
