"""What decides a kernel's last bits is chosen once in the life of a run, and kept with it.

There is no GPU here: Triton's interpreter runs fla's own kernels, and random numbers stand for the
times by which a GPU's candidates win.
"""

from __future__ import annotations

import errno
import inspect
import itertools
import json
import os
import shutil
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from composer.utils import dist, get_device
from transformers import AutoModelForCausalLM

from flame_composer.config.load import load
from flame_composer.config.train import TrainConfig
from flame_composer.errors import ConfigError, DataError, TrainingError
from flame_composer.storage import files
from flame_composer.train import kernels
from flame_composer.train.kernels import (
    FORMAT,
    KERNELS,
    PinnedKernels,
    build_kernels,
    describe_machine,
    make_deterministic,
    naming_what_differs,
    warn_of_layers,
)
from flame_composer.upstream.autotuner import choose_by, try_the_smallest_only
from flame_composer.upstream.ranks import store_of_all_ranks
from tests.runs import ROOT, Corpus, Ranks, Script, check, meeting, read_log, run_ranks
from tests.stack import interprets

SLOW = pytest.mark.skipif(
    "FLAME_COMPOSER_FAULTS" not in os.environ, reason="interprets kernels: make test-faults"
)


def kernel(x: Any, y: Any, SIZE: int, BLOCK: int) -> None:
    """A kernel to be tuned."""


class Launches:
    """In place of Triton's compiled function: it notes with which BLOCK it is launched."""

    fn = staticmethod(kernel)
    arg_names = list(inspect.signature(kernel).parameters)

    def __init__(self) -> None:
        self.blocks: list[int] = []

    def run(self, *_: Any, BLOCK: int, **__: Any) -> None:
        self.blocks.append(BLOCK)


def tuner(fastest: int) -> Any:
    """Triton's autotuner, of a process in which BLOCK=`fastest` is the fastest candidate."""
    from triton import Config
    from triton.runtime.autotuner import Autotuner

    candidates = [Config({"BLOCK": size}) for size in (16, 32, 64)]
    times = iter([0.0 if each.kwargs["BLOCK"] == fastest else 1.0 for each in candidates] * 9)

    def time_it(call: Callable[[], None], quantiles: Sequence[float]) -> list[float]:
        call()
        return [next(times)] * len(quantiles)

    return Autotuner(
        Launches(),
        Launches.arg_names,
        candidates,
        ["SIZE"],
        None,
        None,
        do_bench=time_it,
    )


def launch(tuner: Any, size: int = 8, dtype: type = np.float32) -> int:
    """Launch the kernel, and return with which BLOCK it was."""
    array = np.zeros(size, dtype)
    tuner.run(array, array, size)
    return tuner.fn.blocks[-1]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A save_folder; the store is that of a process of its own."""
    restart(monkeypatch)
    yield tmp_path
    choose_by(None)


def begin(folder: Path | None, *, resumes: bool = False) -> PinnedKernels:
    pins = PinnedKernels(None if folder is None else str(folder), resumes=resumes)
    choose_by(pins)
    return pins


def restart(monkeypatch: pytest.MonkeyPatch) -> None:
    store = torch.distributed.HashStore()
    monkeypatch.setattr(kernels, "store_of_all_ranks", lambda: store)


def test_without_pins_another_process_chooses_otherwise():
    assert launch(tuner(32)) == 32
    assert launch(tuner(64)) == 64


def test_the_smallest_is_taken_where_any_will_do(monkeypatch: pytest.MonkeyPatch) -> None:
    from triton.runtime.autotuner import Autotuner

    monkeypatch.setattr(Autotuner, "prune_configs", Autotuner.prune_configs)  # restored at the end
    for _ in range(2):
        try_the_smallest_only()
    candidates = tuner(64)
    assert launch(candidates) == 16
    assert set(candidates.fn.blocks) == {16}, "no other is timed"


def test_a_restart_takes_what_was_chosen(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    earlier = tuner(32)  # made before choices are kept
    pins = begin(folder)
    assert [launch(earlier), launch(earlier, 9), launch(earlier, 8, np.float64)] == [32] * 3
    assert not (folder / KERNELS).exists()
    pins.write()
    content = json.loads((folder / KERNELS).read_text())
    assert content["format"] == FORMAT
    (machine,) = content["kernels"]
    assert machine["on"] == describe_machine()
    assert [key for _, key, _ in machine["chosen"]] == [
        "(8, 'float32', 'float32')",
        "(9, 'float32', 'float32')",
        "(8, 'float64', 'float64')",
    ]
    assert {name for name, _, _ in machine["chosen"]} == {f"{__name__}.kernel"}

    restart(monkeypatch)
    pins = begin(folder, resumes=True)
    later = tuner(64)
    assert [launch(later), launch(later, 9), launch(later, 8, np.float64)] == [32] * 3
    assert launch(later, 10) == 64, "a new shape is tuned"
    pins.write()
    restart(monkeypatch)
    begin(folder, resumes=True)
    assert [launch(tuner(16), size) for size in (8, 9, 10)] == [32, 32, 64]
    choose_by(None)
    assert launch(later) == 64, "as if nothing had been kept"


def test_a_run_without_tuned_kernels_has_a_record(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    begin(folder).write()
    restart(monkeypatch)
    begin(folder, resumes=True)
    assert not caplog.messages


def test_the_first_rank_to_tune_decides(folder: Path) -> None:
    first, second = tuner(32), tuner(64)
    pins = begin(folder)
    other = PinnedKernels(None, resumes=False)  # of another rank, at the same store
    assert launch(first) == 32
    choose_by(other)
    assert launch(second) == 32
    assert launch(second, 9) == 64
    choose_by(pins)
    assert launch(first, 9) == 64
    pins.write()
    (machine,) = json.loads((folder / KERNELS).read_text())["kernels"]
    assert [config["BLOCK"] for _, _, config in machine["chosen"]] == [32, 64], "each of them once"


def test_a_choice_that_is_no_candidate_is_tuned_anew(folder: Path) -> None:
    pins = begin(folder)
    pins.chosen[f"{__name__}.kernel", "(8, 'float32', 'float32')"] = {"BLOCK": 128}
    assert launch(tuner(64)) == 64


def test_choices_of_another_device_are_kept_and_said(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    pins = begin(folder)
    launch(tuner(32))
    pins.write()
    other = {**describe_machine(), "device": "NVIDIA H100 80GB HBM3", "triton": "3.4.0"}
    monkeypatch.setattr(kernels, "describe_machine", lambda: other)
    restart(monkeypatch)
    pins = begin(folder, resumes=True)
    (line,) = caplog.messages
    here = describe_machine()
    assert line == (
        f"warning: {folder / KERNELS}: the kernels of this run were tuned on"
        f" {here['device']} (fla {here['fla']}, torch {here['torch']}, triton {here['triton']});"
        f" on NVIDIA H100 80GB HBM3 (fla {here['fla']}, torch {here['torch']}, triton 3.4.0) they"
        " are tuned anew, and losses may differ in their last bits from those of a run that was"
        " never stopped"
    )
    assert launch(tuner(64)) == 64
    pins.write()
    monkeypatch.undo()
    restart(monkeypatch)
    begin(folder, resumes=True)
    assert launch(tuner(16)) == 32, "back on the first device"
    assert len(caplog.messages) == 1


def test_a_run_without_a_record_says_so(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    begin(folder)
    assert not caplog.messages
    begin(folder, resumes=True)
    assert "the kernels of this run have no record here; on" in caplog.messages[0]


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ("{", "damaged: it is not JSON"),
        ("[" * 100_000, "damaged: it is not JSON"),
        ("[]", "it is not of format 1"),
        ('{"format": 2, "kernels": []}', "it is not of format 1"),
        ('{"format": 1}', "damaged: kernels must be choices of machines"),
        ('{"format": 1, "kernels": [{"on": {}, "chosen": []}]}', "damaged: kernels must be"),
        (
            '{"format": 1, "kernels": [{"on": {"device": "A"}, "chosen": [["k", 1, {}]]}]}',
            "damaged: kernels must be",
        ),
    ],
)
def test_a_damaged_record_is_named(folder: Path, content: str, problem: str) -> None:
    (folder / KERNELS).write_text(content)
    with pytest.raises(DataError) as caught:
        begin(folder, resumes=True)
    line = str(caught.value)
    assert line.startswith(f"{folder / KERNELS}: {problem}")
    assert line.endswith("; restore it from a copy, or delete it: kernels are then tuned anew")


def test_a_record_that_cannot_be_read_is_named(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def denied(_: str) -> bytes:  # as for a user who is not root
        raise PermissionError(errno.EACCES, "Permission denied")

    (folder / KERNELS).write_text("{}")
    monkeypatch.setattr(files, "read", denied)
    with pytest.raises(DataError, match=r"kernels.json: cannot be read: Permission denied; restor"):
        begin(folder, resumes=True)


def test_a_record_that_cannot_be_written_ends_the_run(folder: Path) -> None:
    pins = begin(folder / "missing")
    launch(tuner(32))
    with pytest.raises(TrainingError, match=r"kernels.json: cannot be written: No such file"):
        pins.write()


def test_a_workspace_that_is_not_deterministic_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":0:0")
    with pytest.raises(ConfigError) as caught:
        make_deterministic()
    assert str(caught.value) == (
        "environment: CUBLAS_WORKSPACE_CONFIG=:0:0: must be :4096:8 or :16:8 with"
        " deterministic=true; unset it"
    )


def test_layers_that_cannot_repeat_are_named(caplog: pytest.LogCaptureFixture) -> None:
    from flame_composer import cpu

    cpu.enable()
    from fla.models import GLAConfig, LogLinearMamba2Config

    sizes = {"hidden_size": 32, "num_heads": 2, "num_hidden_layers": 2, "vocab_size": 64}
    other = LogLinearMamba2Config(**sizes, head_dim=32)
    warn_of_layers(AutoModelForCausalLM.from_config(other))
    ours = [each.getMessage() for each in caplog.records if each.name == kernels.__name__]
    assert ours == [
        "warning: the backward pass of LogLinearMamba2 has no deterministic form on this device: a"
        " run that is stopped and restarted may differ in its last bits from one that was not"
    ]
    caplog.clear()
    warn_of_layers(AutoModelForCausalLM.from_config(GLAConfig(**sizes)))
    assert not caplog.messages


def test_what_cannot_repeat_is_named_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    try:
        make_deterministic()
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
        assert torch.are_deterministic_algorithms_enabled()
        with naming_what_differs():
            for _ in range(2):
                torch.zeros(3).put_(torch.tensor([1, 1]), torch.ones(2))
            with pytest.warns(UserWarning, match="another warning"):
                warnings.warn("another warning", UserWarning, stacklevel=1)
    finally:
        torch.use_deterministic_algorithms(False)
        monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    assert caplog.messages == [
        "warning: put_ has no deterministic form on this device: a run that is stopped and"
        " restarted may differ in its last bits from one that was not"
    ]


def test_nothing_is_kept_where_nothing_is_to_repeat(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = ["yamls/gla_tiny.yaml", f"save_folder={folder}"]
    model = torch.nn.Linear(1, 1)

    def kept(*more: str) -> list[PinnedKernels]:
        return build_kernels(load(TrainConfig, [*keys, *more]), model, resumes=False)

    assert kept() == [], "a CPU has no choices"
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    (pins,) = kept()
    assert pins.place == str(folder / KERNELS)
    assert kept("deterministic=false") == []


def test_every_rank_meets_at_one_store() -> None:
    dist.initialize_dist(get_device())
    store_of_all_ranks().set("here", "yes")
    assert store_of_all_ranks().get("here") == b"yes"


@pytest.mark.parametrize(
    "more",
    [
        (),
        (
            "algorithms.layer_freezing.freeze_start=0.6",
            "algorithms.layer_freezing.freeze_level=0.5",
        ),
    ],
    ids=["all", "freezing"],
)
def test_three_ranks_go_on_bit_for_bit(
    corpus: Corpus, tmp_path: Path, more: tuple[str, ...]
) -> None:
    """With plain data parallelism, whose sums over three ranks depend on how gradients lie."""
    keys = ("global_batch_size=6", "microbatch_size=1", "max_duration=8ba", "save_interval=3ba")
    keys += more
    env = {"OMP_NUM_THREADS": "1"}
    whole, run = tmp_path / "whole", tmp_path / "run"
    Ranks(3, *corpus.keys(whole, *keys), env=env).finish()
    Ranks(3, *corpus.keys(run, *keys), env=env).kill_after(run / "train_log.jsonl", 4)
    Ranks(3, *corpus.keys(run, *keys), env=env).finish()
    assert read_log(run) == read_log(whole)


SETTLED = """
import torch
import torch.distributed as dist
from flame_composer.upstream.ranks import settle_buckets

dist.init_process_group("gloo")
torch.manual_seed(0)
layers = torch.nn.ModuleList([torch.nn.Linear(512, 512) for _ in range(40)])

class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = layers

    def forward(self, x, depth):
        for layer in self.layers[:depth]:
            x = layer(x)
        return x.square().mean()

ranks = torch.nn.parallel.DistributedDataParallel(Model())
settle_buckets(ranks)
assert all(each.grad is None for each in layers.parameters())
torch.manual_seed(dist.get_rank())
batch = torch.randn(4, 512)
steps = []
for _ in range(2):
    ranks.zero_grad()
    ranks(batch, 40).backward()
    steps.append(torch.cat([each.grad.flatten() for each in layers.parameters()]))
print(torch.equal(*steps), len(ranks._get_ddp_logging_data()["rebuilt_bucket_sizes"].split(",")))
try:
    for _ in range(2):
        ranks(batch, 39).backward()
except RuntimeError as error:
    print("finished reduction in the prior iteration" in str(error))
"""


def test_gradients_are_laid_out_before_the_first_step(tmp_path: Path) -> None:
    """In several buckets, whose sums begin before the last gradient is there; and an idle weight,
    which torch would not add up, is still an error.
    """
    (tmp_path / "code.py").write_text(SETTLED)
    for rank in run_ranks(3, tmp_path / "code.py"):
        assert rank.stdout.split() == ["True", "3", "True"]


class Interpreted:
    """recipes/train.py on fla's own kernels, interpreted and tuned by noise, on some ranks.

    The first candidates are the fastest for one start and rank, and the last for the next.
    """

    starts: Iterator[int] = itertools.count()

    def __init__(self, ranks: int, *keys: str):
        start = next(self.starts)
        env = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
        if ranks > 1:
            env |= meeting(ranks)
        self.processes = [
            subprocess.Popen(
                [sys.executable, "-m", "tests.train.noisy_kernels", *keys],
                cwd=ROOT,
                env=env
                | {"NOISE": f"{(start + rank) % 2}"}
                | ({"RANK": f"{rank}", "LOCAL_RANK": f"{rank}"} if ranks > 1 else {}),
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            for rank in range(ranks)
        ]

    def finish(self) -> str:
        """What all ranks print to stderr when they have ended well."""
        try:
            said = [process.communicate(timeout=900)[1] for process in self.processes]
        finally:
            for process in self.processes:
                process.kill()
        assert [process.returncode for process in self.processes] == [0] * len(said), said
        return "".join(said)

    def kill_after(self, log: Path, step: int) -> None:
        while not log.exists() or log.read_text().count("\n") < step:
            assert all(process.poll() is None for process in self.processes)
            time.sleep(0.01)
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.communicate()


# A head is wider than a tile, so that a tile's size decides how sums are split. A microbatch has
# more than 64 tokens, for which fla takes chunks.
SMALL = (
    "model.config.num_hidden_layers=1",
    "model.config.hidden_size=64",
    "model.config.num_heads=1",
    "model.config.expand_k=1.0",
    "global_batch_size=4",
    "microbatch_size=2",
    "max_duration=4ba",
    "scheduler.warmup=0ba",
    "save_interval=2ba",
    "eval_interval=4ba",
    "eval_data.max_rows=1",
)


@pytest.mark.faults
@pytest.mark.timeout(1800)
@SLOW
@interprets
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_killed_run_of_genuine_kernels_goes_on_bit_for_bit(
    corpus: Corpus, tmp_path: Path, ranks: int
) -> None:
    """It is killed before the evaluation of step 4, whose batch has a shape of its own."""
    run, whole, *unpinned = (tmp_path / name for name in ("run", "whole", "free", "free_again"))
    log = run / "train_log.jsonl"
    Interpreted.starts = itertools.count()
    Interpreted(ranks, *corpus.keys(run, *SMALL)).kill_after(log, 3)
    before = read_log(run)
    assert "tuned anew" not in Interpreted(ranks, *corpus.keys(run, *SMALL)).finish()
    assert read_log(run)[: len(before)] == before
    # The choices of that run, from the start of one that nothing disturbs
    (whole / "checkpoints").mkdir(parents=True)
    shutil.copy(run / "checkpoints" / KERNELS, whole / "checkpoints")
    Interpreted(ranks, *corpus.keys(whole, *SMALL)).finish()
    assert read_log(run) == read_log(whole)
    assert (run / "checkpoints" / KERNELS).read_bytes() == (
        whole / "checkpoints" / KERNELS
    ).read_bytes()
    # Without them, another start logs other bits. (Which rank's choices a run with them has is a
    # race, in which those that matter may be what a rank would have chosen alone.)
    for each in unpinned:
        Interpreted(ranks, *corpus.keys(each, *SMALL, "deterministic=false")).finish()
        assert not (each / "checkpoints" / KERNELS).exists()
    assert read_log(unpinned[0]) != read_log(unpinned[1])


@pytest.mark.faults
@pytest.mark.timeout(1800)
@SLOW
@interprets
def test_genuine_kernels_and_those_of_a_cpu_train_alike(corpus: Corpus, tmp_path: Path) -> None:
    """Packed documents, microbatches, evaluation, checkpoints either way, and generation."""
    keys = (*SMALL, "eval_interval=2ba", "varlen=true")
    genuine, ours = tmp_path / "genuine", tmp_path / "ours"
    started = Interpreted(1, *corpus.keys(genuine, *keys))
    check(Script("recipes/train.py", *corpus.keys(ours, *keys)).wait())
    started.finish()
    assert_alike(genuine, ours)
    crossed = {}
    for run, other in ((tmp_path / "genuine_on", ours), (tmp_path / "ours_on", genuine)):
        (run / "checkpoints").mkdir(parents=True)
        shutil.copy(other / "checkpoints" / "ba2.pt", run / "checkpoints")
        shutil.copy(other / "train_log.jsonl", run)
        crossed[run.name] = run
    started = Interpreted(1, *corpus.keys(crossed["genuine_on"], *keys))
    check(Script("recipes/train.py", *corpus.keys(crossed["ours_on"], *keys)).wait())
    assert "the kernels of this run have no record here" in started.finish()
    assert_alike(crossed["genuine_on"], genuine)
    assert_alike(crossed["ours_on"], ours)
    command = [
        "recipes/generate.py",
        f"model={genuine}/checkpoints/ba4.pt",
        "prompt=kat loman",
        "temperature=0",
        "max_new_tokens=12",
    ]
    written = check(
        subprocess.run(
            [sys.executable, *command],
            cwd=ROOT,
            env={**os.environ, "TRITON_INTERPRET": "1"},
            capture_output=True,
            text=True,
            timeout=500,
        )
    )
    assert written.stdout == check(Script(*command).wait()).stdout


def assert_alike(run: Path, other: Path) -> None:
    ours, theirs = read_log(run), read_log(other)
    assert len(ours) == len(theirs) == 4
    for mine, yours in zip(ours, theirs, strict=True):
        for key in ("loss", "eval_loss", "grad_norm"):
            assert (mine.get(key) is None) == (yours.get(key) is None)
            if mine.get(key) is not None:
                assert mine[key] == pytest.approx(yours[key], rel=1e-5), key
        assert mine["batch_hash"] == yours["batch_hash"]
    assert any("eval_loss" in row for row in ours)
