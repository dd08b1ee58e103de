"""recipes/launch: Slurm and Kubernetes stop a run and start it again, and it is as if they had
not.
"""

from __future__ import annotations

import contextlib
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml
from composer.cli import launcher

from flame_composer.config.load import load
from flame_composer.config.train import TrainConfig
from tests.hosts import Hosts
from tests.recipes.test_recipes import COMPOSER
from tests.runs import ROOT, Corpus, check, read_log
from tests.slurm import Slurm, missing
from tests.train.test_resume import assert_same_run

SCRIPT = ROOT / "recipes/launch/slurm.sbatch"
MANIFEST = ROOT / "recipes/launch/kubernetes.yaml"
CANONICAL = ("train_data.num_canonical_nodes=2",)  # the same order of rows on one node and on two


def faults(test: Any) -> Any:
    slow = pytest.mark.skipif(
        "FLAME_COMPOSER_FAULTS" not in os.environ, reason="takes minutes: make test-faults"
    )
    return pytest.mark.faults(slow(test))


def wait_for_step(run: Path, step: int, going: Any) -> None:
    """Until the run has logged `step`."""
    log = run / "train_log.jsonl"
    while not log.exists() or log.read_text().count("\n") < step:
        assert going()
        time.sleep(0.02)


def ranks_of(job: str) -> list[psutil.Process]:
    """The processes of a Slurm job that train."""
    found = []
    for process in psutil.process_iter():
        try:
            if (
                "recipes/train.py" in process.cmdline()[1:2]
                and process.environ().get("SLURM_JOB_ID") == job
            ):
                found.append(process)
        except (psutil.NoSuchProcess, psutil.ZombieProcess):
            continue
    return found


def start(*command: object, **env: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        list(map(str, command)),
        cwd=ROOT,
        env={**os.environ, **env},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )


def test_sigterm_to_the_launcher_stops_both_processes_after_a_checkpoint(
    corpus: Corpus, undisturbed: Path, tmp_path: Path
) -> None:
    """And one process goes on from there, with the same rows in the same batches."""
    run = tmp_path / "launched"
    with start(COMPOSER, "-n", 2, "recipes/train.py", *corpus.keys(run)) as process:
        wait_for_step(run, 12, lambda: process.poll() is None)
        ranks = psutil.Process(process.pid).children()
        assert len(ranks) == 2
        process.terminate()
        assert process.wait(timeout=120) == 143, process.stdout and process.stdout.read()
    assert not any(rank.is_running() for rank in ranks)
    rows = read_log(run)
    assert 12 <= len(rows) < 40
    assert (run / f"checkpoints/ba{len(rows)}.pt").is_file()
    corpus.train_run(run)
    assert [row["current_steps"] for row in read_log(run)] == list(range(1, 41))
    assert [row["batch_hash"] for row in read_log(run)] == [
        row["batch_hash"] for row in read_log(undisturbed)
    ]


# Whoever is killed


class Launched:
    """`composer -n 2` with a loader process or two for each rank, in a session of its own: none
    of it must be left.
    """

    def __init__(self, keys: list[str], output: Path):
        self.output = output
        with output.open("w") as out:
            self.launcher = subprocess.Popen(
                [COMPOSER, "-n", "2", "recipes/train.py", *keys],
                cwd=ROOT,
                stdout=out,
                stderr=out,
                start_new_session=True,
                env={**os.environ, "PYTHONUNBUFFERED": "1"},
            )

    @property
    def pid(self) -> int:
        return self.launcher.pid

    def ranks(self) -> list[psutil.Process]:
        """In their order; empty until both are there."""
        if self.launcher.poll() is not None:
            return []
        found = []
        for child in psutil.Process(self.pid).children():
            with contextlib.suppress(psutil.Error):  # it has just begun, or ended
                if "RANK" in child.environ():
                    found.append((int(child.environ()["RANK"]), child))
        return [child for _, child in sorted(found)] if len(found) == 2 else []

    def loaders(self) -> list[psutil.Process]:
        return [
            child
            for rank in self.ranks()
            for child in rank.children()
            if "pt_data_worker" in child.name()
        ]

    def left(self) -> list[psutil.Process]:
        """What lives of its session."""
        found = []
        for process in psutil.process_iter(["status"]):
            try:
                if (
                    os.getsid(process.pid) == self.pid
                    and process.info["status"] != psutil.STATUS_ZOMBIE
                ):
                    found.append(process)
            except ProcessLookupError:
                continue
        return found

    def wait(self) -> int:
        """The launcher's status, when nothing is left of it all: within a minute."""
        end = time.monotonic() + 60
        status = self.launcher.wait(timeout=60)
        while left := self.left():
            assert time.monotonic() < end, [process.cmdline()[:4] for process in left] + [
                self.output.read_text()
            ]
            time.sleep(0.05)
        return status

    def errors(self) -> list[str]:
        """The error lines of both ranks: one from each, at most."""
        text = self.output.read_text()
        assert "Traceback" not in text, text
        errors = [line for line in text.splitlines() if line.startswith("error: ")]
        assert len(errors) <= 2, text
        return errors


@pytest.fixture(scope="module")
def sixty_steps(corpus: Corpus, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, float]:
    """The folder of a run that nothing disturbed, and the seconds to its first step."""
    run = tmp_path_factory.mktemp("runs") / "sixty_steps"
    since = time.monotonic()
    launched = Launched(sixty(corpus, run), run.with_suffix(".out"))
    wait_for_step(run, 1, lambda: launched.launcher.poll() is None)
    seconds = time.monotonic() - since
    assert launched.launcher.wait() == 0, launched.output.read_text()
    return run, seconds


def num_rows(run: Path) -> int:
    log = run / "train_log.jsonl"
    return log.read_text().count("\n") if log.exists() else 0


def sixty(corpus: Corpus, run: Path) -> list[str]:
    return corpus.keys(run, "max_duration=60ba", "save_interval=2ba", "train_data.num_workers=2")


@faults
@pytest.mark.timeout(3600)
def test_12_kills_of_whoever(
    corpus: Corpus, sixty_steps: tuple[Path, float], tmp_path: Path
) -> None:
    """The launcher, either rank or a loader process, at any instant from the start on; nothing
    is left, and it goes on.
    """
    whole, seconds = sixty_steps
    run, choose = tmp_path / "killed", random.Random(30)
    for number in range(12):
        steps = num_rows(run)
        launched = Launched(sixty(corpus, run), run.with_suffix(".out"))
        while not (ranks := launched.ranks()):
            time.sleep(0.01)
        victim = ("launcher", "rank 0", "rank 1", "loader process")[number % 4]
        if choose.random() < 0.4 and victim != "loader process":
            end = time.monotonic() + choose.random() * seconds
            while time.monotonic() < end and num_rows(run) <= steps:
                time.sleep(0.01)
        else:
            wait_for_step(run, steps + 1, lambda: launched.launcher.poll() is None)  # noqa: B023
            time.sleep(choose.random() * 0.1)
        if victim == "loader process":
            choose.choice(launched.loaders()).kill()
        else:
            {"launcher": launched.launcher, "rank 0": ranks[0], "rank 1": ranks[1]}[victim].kill()
        since = time.monotonic()
        status = launched.wait()
        print(
            f"{number}: {victim} at step {num_rows(run)}: status {status},"
            f" {time.monotonic() - since:.1f} s",
            *launched.errors(),
            sep="\n    ",
            flush=True,
        )
        assert status != 0, launched.output.read_text()
    launched = Launched(sixty(corpus, run), run.with_suffix(".out"))
    assert launched.launcher.wait(timeout=300) == 0, launched.output.read_text()
    assert_same_run(run, whole)


def is_tracker_or_gone(process: psutil.Process) -> bool:
    try:
        return "resource_tracker" in " ".join(process.cmdline())
    except psutil.NoSuchProcess:  # since it was listed; also of one that nobody has waited for yet
        return True


@faults
def test_a_launcher_that_is_killed_a_peer_and_a_loader_process(
    corpus: Corpus, tmp_path: Path
) -> None:
    """What is said, and the status, in the middle of a run."""
    run = tmp_path / "run"
    goes_on = "; the same command goes on from what was saved last"

    def started() -> Launched:
        steps = num_rows(run)
        launched = Launched(sixty(corpus, run), run.with_suffix(".out"))
        wait_for_step(run, steps + 1, lambda: launched.launcher.poll() is None)
        return launched

    launched = started()
    launched.launcher.kill()
    assert launched.wait() == -signal.SIGKILL
    assert launched.errors() == []

    launched = started()
    os.killpg(launched.pid, signal.SIGSTOP)
    time.sleep(0.5)
    launched.launcher.kill()
    launched.launcher.wait()
    end = time.monotonic() + 20
    while not all(map(is_tracker_or_gone, launched.left())):
        assert time.monotonic() < end, "who was stopped lives on"
        time.sleep(0.05)
    # Python's own resource trackers, which then clear up and end
    os.killpg(launched.pid, signal.SIGCONT)
    assert launched.wait() == -signal.SIGKILL

    launched = started()
    launched.ranks()[1].kill()
    assert launched.wait() == 1
    (line,) = launched.errors()
    assert line.startswith("error: rank 0: another rank has ended, or cannot be reached (")
    assert line.endswith(goes_on)

    launched = started()
    launched.loaders()[0].kill()  # of the first rank
    assert launched.wait() == 1
    loss = "a loader process was killed by signal: Killed (short of memory? give fewer num_workers)"
    assert launched.errors()[0] == f"error: rank 0: {loss}{goes_on}"


@faults
def test_ctrl_c_at_the_launcher(corpus: Corpus, tmp_path: Path) -> None:
    """A terminal sends it to launcher, ranks and loader processes; the launcher sends SIGTERM to
    its ranks then.
    """
    run = tmp_path / "interrupted"
    launched = Launched(sixty(corpus, run), run.with_suffix(".out"))
    wait_for_step(run, 12, lambda: launched.launcher.poll() is None)
    os.killpg(launched.pid, signal.SIGINT)
    assert launched.wait() == 130, launched.output.read_text()
    assert "\nerror: " not in launched.output.read_text()
    assert (run / f"checkpoints/ba{len(read_log(run))}.pt").is_file()


# Slurm


def test_the_slurm_script_is_sound() -> None:
    check(subprocess.run(["bash", "-n", SCRIPT], capture_output=True, text=True))
    if shutil.which("shellcheck"):
        check(subprocess.run(["shellcheck", SCRIPT], capture_output=True, text=True))
    example = re.search(r"sbatch .*slurm\.sbatch (.*)", SCRIPT.read_text())
    assert example
    assert load(TrainConfig, example[1].split()).save_folder == "s3://my-bucket/gla_340m"


def test_the_slurm_script_says_where_to_submit_it(tmp_path: Path) -> None:
    env = {"SLURM_JOB_ID": "7", "PATH": os.environ["PATH"]}
    process = subprocess.run(
        ["bash", SCRIPT, "a.yaml"], cwd=tmp_path, env=env, capture_output=True, text=True
    )
    assert process.returncode == 2
    assert process.stderr.endswith(
        f"{tmp_path} has no recipes/train.py; submit from the root of the repository\n"
    )


class Job:
    """Jobs of the Slurm script that train one run, on two CPU processes in all."""

    def __init__(self, slurm: Slurm, corpus: Corpus, run: Path, nodes: int):
        self.slurm, self.run, self.nodes, self.id = slurm, run, nodes, ""
        self.log = run.with_suffix(".log")
        # The nodes are one machine, on which a folder of shards is for one of them.
        for node in range(nodes):
            shutil.copytree(corpus.train, f"{run}-train{node}")
            shutil.copytree(corpus.val, f"{run}-val{node}")
        self.keys = corpus.keys(
            run,
            f"train_data.local={run}-train${{oc.env:SLURM_NODEID}}",
            f"eval_data.local={run}-val${{oc.env:SLURM_NODEID}}",
            *CANONICAL,
        )

    def submit(self, *more: str, export: str = "ALL") -> None:
        self.id = self.slurm.command(
            "sbatch",
            "--parsable",
            f"--nodes={self.nodes}",
            f"--ntasks-per-node={2 // self.nodes}",
            "--cpus-per-task=1",
            f"--output={self.log}",
            f"--export={export}",
            SCRIPT,
            *self.keys,
            *more,
        )

    def reach(self, step: int) -> None:
        wait_for_step(
            self.run,
            step,
            lambda: self.slurm.state(self.id)["JobState"] in ("PENDING", "RUNNING", "COMPLETING"),
        )

    def begin_again(self, restarts: int) -> None:
        """Wait until it has ended and is pending, and let it start now and not in some seconds,
        with the usual time.
        """
        assert self.slurm.wait_for(self.id, "PENDING")["Restarts"] == str(restarts)
        self.check_saved()
        self.slurm.command(
            "scontrol", "update", f"jobid={self.id}", "StartTime=now", "TimeLimit=10"
        )

    def check_saved(self) -> int:
        step = len(read_log(self.run))
        assert step < 40
        assert (self.run / f"checkpoints/ba{step}.pt").is_file(), (
            "steps that were computed are lost"
        )
        return step


@pytest.fixture(scope="module")
def two_ranks(corpus: Corpus, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of two processes that nothing disturbed."""
    run = tmp_path_factory.mktemp("runs") / "two_ranks"
    with start(COMPOSER, "-n", 2, "recipes/train.py", *corpus.keys(run, *CANONICAL)) as process:
        output, _ = process.communicate(timeout=500)
    assert process.returncode == 0, output
    return run


@faults
@pytest.mark.skipif(missing() is not None, reason=f"no Slurm: {missing()}")
def test_a_job_that_slurm_requeues_twice_ends_bit_identical(
    slurm: Slurm, corpus: Corpus, two_ranks: Path, tmp_path: Path
) -> None:
    """Once as by preemption, once at its time limit; and no step is computed twice."""
    job = Job(slurm, corpus, tmp_path / "requeued", nodes=1)
    job.submit()
    job.reach(7)
    slurm.command("scontrol", "requeue", job.id)
    job.begin_again(1)

    job.reach(14)
    # Slurm looks at time limits twice a minute, longer than these steps take: they have to wait for
    # it.
    ranks = ranks_of(job.id)
    assert len(ranks) == 2
    for rank in ranks:
        rank.suspend()
    minutes = (
        int(
            time.time()
            - time.mktime(time.strptime(slurm.state(job.id)["StartTime"], "%Y-%m-%dT%H:%M:%S"))
        )
        // 60
    )
    slurm.command("scontrol", "update", f"jobid={job.id}", f"TimeLimit={minutes + 2}")
    end = time.monotonic() + 90
    while "close to the time limit" not in job.log.read_text():
        assert time.monotonic() < end
        time.sleep(0.1)
    for rank in ranks:
        rank.resume()
    job.begin_again(2)

    state = slurm.wait_for(job.id, "COMPLETED", "FAILED", "TIMEOUT", "CANCELLED")
    log = job.log.read_text()
    assert (state["JobState"], state["ExitCode"], state["Restarts"]) == (
        "COMPLETED",
        "0:0",
        "2",
    ), log
    assert_same_run(job.run, two_ranks)
    stops = [int(step) for step in re.findall(r"stopped after step (\d+); saved", log)]
    assert [f"step {step}," in log for step in stops] == [True, True]
    assert re.findall(r"resuming from .*: step (\d+),", log) == [str(step) for step in stops]


@faults
@pytest.mark.skipif(missing() is not None, reason=f"no Slurm: {missing()}")
def test_jobs_that_must_not_come_back(
    slurm: Slurm, corpus: Corpus, two_ranks: Path, tmp_path: Path
) -> None:
    """A failed one, one that was requeued too often, a cancelled one; the run they left is
    finished by another job.
    """
    job = Job(slurm, corpus, tmp_path / "resubmitted", nodes=1)
    job.submit("optimizer.lr=-1")
    state = slurm.wait_for(job.id, "FAILED")
    assert (state["ExitCode"], state["Restarts"]) == ("2:0", "0")
    assert "optimizer.lr=-1: must be more than 0, and finite" in job.log.read_text()

    job.submit(export="ALL,MAX_RESTARTS=0")
    job.reach(7)
    # As Slurm does before the time limit
    slurm.command("scancel", "--batch", "--signal=USR1", job.id)
    state = slurm.wait_for(job.id, "FAILED")
    assert (state["ExitCode"], state["Restarts"]) == ("143:0", "0")
    step = job.check_saved()
    assert "not requeued: MAX_RESTARTS=0; submit it again to go on" in job.log.read_text()

    job.submit()
    job.reach(step + 5)
    slurm.command("scancel", job.id)
    state = slurm.wait_for(job.id, "CANCELLED")
    while "ended with status 143" not in job.log.read_text().rpartition(f"slurm job {job.id}")[2]:
        time.sleep(0.1)
    job.check_saved()
    time.sleep(10)  # longer than a requeued job waits
    state = slurm.state(job.id)
    assert (state["JobState"], state["Restarts"]) == ("CANCELLED", "0")

    job.submit()
    assert slurm.wait_for(job.id, "COMPLETED", "FAILED")["ExitCode"] == "0:0", job.log.read_text()
    assert "2 processes on node0" in job.log.read_text()
    assert_same_run(job.run, two_ranks)


# Several machines


LAUNCHERS = {
    "composer": (
        "composer --nproc 1 --world_size 2 --node_rank NODE --master_addr ADDRESS --master_port"
        " 29500"
    ),
    "torchrun": (
        "torchrun --nnodes 2 --nproc-per-node 1 --node-rank NODE --master-addr ADDRESS"
        " --master-port 29500"
    ),
}


def on_two_machines(
    hosts: Hosts, corpus: Corpus, run: Path, command: str, *more: str
) -> list[subprocess.Popen[bytes]]:
    """The launcher's command on each of them, which has the data on a disk of its own."""
    started = []
    for node in (0, 1):
        data = hosts.folder / f"disk{node}"
        if not data.exists():
            shutil.copytree(corpus.train, data / "train")
            shutil.copytree(corpus.val, data / "val")
        name, *arguments = command.replace("NODE", f"{node}").replace("ADDRESS", "node0").split()
        keys = corpus.keys(
            run, *CANONICAL, f"train_data.local={data}/train", f"eval_data.local={data}/val", *more
        )
        launched = (sys.executable, COMPOSER.with_name(name), *arguments, "recipes/train.py", *keys)
        started.append(hosts.start(node, *launched, NODE_RANK=f"{node}"))
    return started


@faults
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_a_machine_that_is_lost(
    hosts: Hosts, corpus: Corpus, two_ranks: Path, tmp_path: Path, launcher: str
) -> None:
    """One of two goes down; the other ends by itself, and the same commands go on as if nothing
    had been.
    """
    run = tmp_path / "machines"
    machines = on_two_machines(hosts, corpus, run, LAUNCHERS[launcher])
    wait_for_step(run, 12, lambda: all(machine.poll() is None for machine in machines))
    machines[1].kill()
    assert machines[0].wait(timeout=120) != 0, "it does not wait for the one that is gone"
    assert len(read_log(run)) < 40
    for machine in on_two_machines(hosts, corpus, run, LAUNCHERS[launcher]):
        assert machine.wait(timeout=300) == 0, hosts.log(0) + hosts.log(1)
    assert_same_run(run, two_ranks)
    assert "resuming from" in hosts.log(0)


@faults
def test_a_copy_of_the_model_on_each_machine(
    hosts: Hosts, corpus: Corpus, two_ranks: Path, tmp_path: Path
) -> None:
    """HYBRID_SHARD on two machines of two ranks: each machine holds a whole model, and one of
    them saves its.
    """
    run, command = (
        tmp_path / "hybrid",
        LAUNCHERS["composer"].replace("--nproc 1 --world_size 2", "--nproc 2 --world_size 4"),
    )
    hybrid = (
        "parallelism.fsdp={sharding_strategy: HYBRID_SHARD, state_dict_type: sharded}",
        "parallelism.cpu_fsdp=true",
        "max_duration=6ba",
        "microbatch_size=1",
    )
    for machine in on_two_machines(hosts, corpus, run, command, *hybrid):
        assert machine.wait(timeout=300) == 0, hosts.log(0) + hosts.log(1)
    assert sorted(path.name for path in (run / "checkpoints/ba6").glob("piece*")) == [
        "piece0.pt",
        "piece1.pt",
    ]
    losses = [[row["loss"] for row in read_log(each)[:3]] for each in (run, two_ranks)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_the_commands_for_several_machines_are_those_in_the_documentation() -> None:
    documented = (ROOT / "docs/migrating-from-flame.md").read_text()
    for command in LAUNCHERS.values():
        eight = re.sub(r"(--nproc(?:-per-node)?) 1\b", r"\1 8", command).replace(
            "--world_size 2", "--world_size 16"
        )
        assert f"{eight} recipes/train.py FILE.yaml" in documented


# Kubernetes


def manifest() -> tuple[dict[str, Any], dict[str, Any]]:
    service, job = yaml.safe_load_all(MANIFEST.read_text())
    assert (service["kind"], job["kind"]) == ("Service", "Job")
    return service, job


def container(job: dict[str, Any]) -> dict[str, Any]:
    (only,) = job["spec"]["template"]["spec"]["containers"]
    return only


def plain_env(job: dict[str, Any]) -> dict[str, str]:
    return {each["name"]: each["value"] for each in container(job)["env"] if "value" in each}


@pytest.mark.parametrize("node", [0, 1])
def test_the_launcher_understands_a_pod(node: int, monkeypatch: pytest.MonkeyPatch) -> None:
    service, job = manifest()
    spec, env, command = (
        job["spec"],
        plain_env(job),
        container(job)["command"] + container(job)["args"],
    )
    for name, value in {**env, "NODE_RANK": str(node)}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "argv", command)
    asked = launcher._parse_args()
    assert (asked.nproc, asked.world_size, asked.node_rank, asked.base_rank) == (
        8,
        16,
        node,
        node * 8,
    )
    assert asked.world_size == asked.nproc * spec["completions"]
    assert (asked.master_addr, asked.master_port) == (
        f"{job['metadata']['name']}-0.{service['metadata']['name']}",
        29500,
    )
    assert asked.training_script == "recipes/train.py"

    config = load(TrainConfig, asked.training_script_args)
    assert config.run_name == "gla_340m"
    assert config.save_folder == "s3://my-bucket/runs/gla_340m"
    assert config.train_data.remote == f"{env['DATA_REMOTE']}/train"
    mounts = {each["mountPath"]: each["name"] for each in container(job)["volumeMounts"]}
    volumes = {each["name"]: each for each in spec["template"]["spec"]["volumes"]}
    assert config.train_data.local in mounts
    assert volumes[mounts["/dev/shm"]]["emptyDir"]["medium"] == "Memory"
    assert f"{container(job)['workingDir']}/{Path(config.log_folder).parent}" in mounts
    assert container(job)["resources"]["limits"]["nvidia.com/gpu"] == asked.nproc


def test_a_preempted_pod_is_no_failure_and_no_secret_is_in_the_manifest() -> None:
    service, job = manifest()
    pod = job["spec"]["template"]["spec"]
    assert (job["spec"]["completionMode"], pod["restartPolicy"]) == ("Indexed", "Never")
    assert job["spec"]["completions"] == job["spec"]["parallelism"]
    assert pod["subdomain"] == service["metadata"]["name"]
    assert (
        service["spec"] | {"selector": {"job-name": job["metadata"]["name"]}, "clusterIP": "None"}
        == service["spec"]
    )
    rules = job["spec"]["podFailurePolicy"]["rules"]
    exits = {
        tuple(rule["onExitCodes"]["values"]): rule["action"]
        for rule in rules
        if "onExitCodes" in rule
    }
    assert exits == {(143,): "Ignore", (2,): "FailJob"}
    assert {rule["onExitCodes"]["containerName"] for rule in rules if "onExitCodes" in rule} == {
        container(job)["name"]
    }
    assert [each["type"] for rule in rules for each in rule.get("onPodConditions", [])] == [
        "DisruptionTarget"
    ]
    assert "AWS_SECRET_ACCESS_KEY" not in plain_env(job)
    assert container(job)["envFrom"] == [{"secretRef": {"name": "flame-composer"}}]


@faults
@pytest.mark.skipif(os.geteuid() != 0, reason="a process namespace needs root")
def test_a_pod_that_is_deleted_saves_before_its_launcher_hears_of_it(
    corpus: Corpus, two_ranks: Path, tmp_path: Path
) -> None:
    """Not a cluster: the manifest's command as process 1 of a namespace, stopped by the
    manifest's hook.
    """
    _, job = manifest()
    run = tmp_path / "pod"
    env = plain_env(job) | {
        "LOCAL_WORLD_SIZE": "2",
        "WORLD_SIZE": "2",
        "NODE_RANK": "0",
        "MASTER_ADDR": "127.0.0.1",
    }
    command = (COMPOSER, *container(job)["command"][1:], *corpus.keys(run, *CANONICAL))
    with start("unshare", "--pid", "--fork", "--mount-proc", *command, **env) as pod:
        wait_for_step(run, 12, lambda: pod.poll() is None)
        (launching,) = psutil.Process(pod.pid).children()
        ranks = launching.children()
        assert len(ranks) == 2
        for rank in ranks:
            rank.suspend()  # as if they saved for longer than the launcher's 30 s
        hook = start(
            "nsenter",
            "-t",
            launching.pid,
            "-p",
            "-m",
            *container(job)["lifecycle"]["preStop"]["exec"]["command"],
        )
        time.sleep(35)
        assert pod.poll() is None
        assert hook.poll() is None
        for rank in ranks:
            rank.resume()
        assert pod.wait(timeout=120) == 143
        hook.communicate()
    step = len(read_log(run))
    assert 12 <= step < 40
    assert (run / f"checkpoints/ba{step}.pt").is_file()
    with start(COMPOSER, "-n", 2, "recipes/train.py", *corpus.keys(run, *CANONICAL)) as process:
        output, _ = process.communicate(timeout=500)
    assert process.returncode == 0, output
    assert_same_run(run, two_ranks)
