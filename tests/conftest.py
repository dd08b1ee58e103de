"""Fixtures of several test modules: a tokenizer, small datasets made by the package itself, and
one real training run.
"""

from __future__ import annotations

import os
import resource
import shutil
import signal
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import settings
from transformers import PreTrainedTokenizerFast

from flame_composer import errors
from flame_composer.dataset.convert import convert_unit
from flame_composer.dataset.plan import Plan, plan_units
from flame_composer.dataset.writer import DatasetWriter
from flame_composer.text.sources import find_files
from flame_composer.text.tokenizer import build_encoder, fingerprint
from tests.data_fixtures import byte_tokenizer, words, write_jsonl

pytest_plugins = (
    "tests.runs",
    "tests.adapters",
    "tests.s3",
    "tests.slurm",
    "tests.hosts",
    "tests.browser",
)

# The same examples on every machine: a failure met in CI is met at home.
settings.register_profile("same", derandomize=True, deadline=None)
settings.load_profile("same")

CONTEXT_LENGTH = 32
GLA = {"model_type": "gla", "hidden_size": 32, "num_hidden_layers": 1, "num_heads": 2}
LLAMA = {
    "model_type": "llama",
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 64,
}

# What makes fla's models small beside a width of 32, where their defaults do not
_SMALL: dict[str, dict[str, int]] = {
    "hgrn2": {"expand_ratio": 16},
    "lightnet": {"expand_ratio": 16},
    "mamba2": {"head_dim": 16},
    "rwkv7": {"head_dim": 16},
    "transformer": {"num_heads": 2},
}


def small_fla(model_type: str) -> dict[str, Any]:
    """The config of a small model of fla's; of two layers, since hgrn2's first has no bounds."""
    keys = {"model_type": model_type, "vocab_size": 400, "hidden_size": 32, "num_hidden_layers": 2}
    return keys | _SMALL.get(model_type, {})


def make_dataset(
    folder: Path,
    *,
    num_documents: int,
    seed: int = 0,
    context_length: int = CONTEXT_LENGTH,
    tokenizer: PreTrainedTokenizerFast | None = None,
    shard_size: int = 1500,
) -> None:
    """A dataset in `folder`/out of documents from one word to several rows long, in shards of
    about eight rows.
    """
    folder.mkdir(parents=True)
    tokenizer = tokenizer or byte_tokenizer()
    source = write_jsonl(
        folder / "text.jsonl",
        [words(1 + i * 7 % 23, seed * 1000 + i) for i in range(num_documents)],
    )
    units = plan_units(find_files([str(source)]), 1 << 20)
    config = {
        "text_column": "text",
        "val_fraction": 0.0,
        "shard_size": shard_size,
        "max_doc_length": None,
        "min_doc_length": None,
        "seed": None,
        "max_document_bytes": 1 << 20,
    }
    writer = DatasetWriter(
        str(folder / "out"), Plan("train", fingerprint(tokenizer), context_length, config, units)
    )
    writer.begin()
    for number in range(len(units)):
        convert_unit([writer], number, build_encoder(tokenizer, add_bos=False, add_eos=True))
    writer.publish()


@pytest.fixture(autouse=True)
def no_process_group() -> Iterator[None]:
    """Is left of a recipe that ran in this process: those forked later would wait for a group
    that they are not in.
    """
    names = (
        "RANK",
        "WORLD_SIZE",
        "LOCAL_RANK",
        "LOCAL_WORLD_SIZE",
        "NODE_RANK",
        "MASTER_ADDR",
        "MASTER_PORT",
    )
    before = {name: os.environ.get(name) for name in names}
    yield
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    for name in names:
        if before[name] is None:
            os.environ.pop(name, None)


@pytest.fixture(autouse=True)
def nothing_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of what an earlier test had in its environment, which a process hides until it ends."""
    monkeypatch.setattr(errors, "_hidden", {})


@pytest.fixture(scope="session", autouse=True)
def short_wait_for_loader_processes() -> None:
    """A loader that is collected waits for each of its processes: 5 s by default, which some of
    them use up.
    """
    loading: Any = torch.utils.data._utils
    loading.MP_STATUS_CHECK_INTERVAL = 0.5


@pytest.fixture(scope="session", autouse=True)
def many_open_files() -> None:
    """A StreamingDataset keeps its shared memory, eight files, until its process ends."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


@pytest.fixture(scope="session")
def signal_handlers() -> dict[int, Any]:
    return {
        number: signal.getsignal(number)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGPIPE)
    }


@pytest.fixture(autouse=True)
def own_signal_handlers(signal_handlers: dict[int, Any]) -> Iterator[None]:
    """A run listens to signals until its process ends."""
    yield
    for number, handler in signal_handlers.items():
        signal.signal(number, handler)


@pytest.fixture(scope="session")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dataset to read, not to change: StreamingDataset refuses two readers of one folder, so
    copy it (`copy_of`).
    """
    folder = tmp_path_factory.mktemp("data") / "train"
    make_dataset(folder, num_documents=60)
    return folder / "out"


@pytest.fixture(scope="session")
def eval_dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "eval"
    make_dataset(folder, num_documents=10, seed=1)
    return folder / "out"


@pytest.fixture
def copy_of(tmp_path: Path) -> Callable[[Path], Path]:
    """Copies a folder to a new place, so that the copy can be read by a dataset of its own, or
    damaged.
    """
    count = 0

    def copy(folder: Path) -> Path:
        nonlocal count
        count += 1
        return Path(shutil.copytree(folder, tmp_path / f"copy{count}"))

    return copy


@dataclass(frozen=True)
class Run:
    """A training run of a few batches: its folders, its trainer and its log callback."""

    folder: Path
    trainer: Any
    log: Any
    order: dict[str, Any]

    @property
    def checkpoints(self) -> Path:
        return self.folder / "checkpoints"

    @property
    def log_folder(self) -> Path:
        return self.folder / "log"

    @property
    def batches_per_epoch(self) -> int:
        return self.log.plan.per_epoch

    @property
    def weights(self) -> dict[str, torch.Tensor]:
        return {
            name: parameter.detach().clone()
            for name, parameter in self.trainer.state.model.model.state_dict().items()
        }


def make_run(
    folder: Path,
    dataset: Path,
    eval_dataset: Path,
    *,
    total: int = 3,
    eval_interval: int = 2,
    load_path: Path | None = None,
    watchers: tuple[Any, ...] = (),
    lr: float = 1e-2,
    microbatch_size: int = 2,
    algorithms: tuple[Any, ...] = (),
    schedule: str = "cosine",
    loss_across_documents: bool = True,
    on_nan: str = "stop",
    max_norm: float | None = None,
) -> Run:
    """A real Trainer put together as recipes/train.py does; saves a checkpoint after each batch.
    Not started.
    """
    from flame_composer.checkpoint.read import Checkpoint
    from flame_composer.config.load import load
    from flame_composer.config.train import TrainConfig
    from flame_composer.train.assemble import build_run, check
    from flame_composer.train.gradients import Gradients

    copies = [Path(tempfile.mkdtemp(dir=folder)) / name for name in ("train", "eval", "tokenizer")]
    shutil.copytree(dataset, copies[0])
    shutil.copytree(eval_dataset, copies[1])
    byte_tokenizer().save_pretrained(copies[2])
    (folder / "log").mkdir(exist_ok=True)
    keys = {
        "run_name": "tiny",
        "seed": 7,
        "max_duration": f"{total}ba",
        "global_batch_size": 4,
        "microbatch_size": microbatch_size,
        "eval_batch_size": 4,
        "precision": "fp32",
        "context_length": CONTEXT_LENGTH,
        "tokenizer": copies[2],
        "train_data.local": copies[0],
        "train_data.num_workers": 0,
        "train_data.loss_across_documents": str(loss_across_documents).lower(),
        "eval_data.local": copies[1],
        "eval_interval": f"{eval_interval}ba",
        "save_interval": "1ba",
        "save_num_checkpoints_to_keep": -1,
        "log_batch_hash": "true",
        "optimizer.lr": lr,
        "optimizer.grad_clip_norm": "null" if max_norm is None else max_norm,
        "scheduler.name": schedule,
        "scheduler.warmup": "1ba",
        "on_nan": on_nan,
        "log_folder": folder / "log",
        "save_folder": folder / "checkpoints",
        "progress_bar": "false",
        **{f"model.config.{key}": value for key, value in GLA.items()},
    }
    config = load(TrainConfig, [f"{key}={value}" for key, value in keys.items()])
    parts = check(config)
    parts.extensions.algorithms[:] = algorithms
    parts.extensions.callbacks[:] = watchers
    config.algorithms = {type(each).__name__: None for each in algorithms}
    start = Checkpoint(str(load_path), load_path) if load_path else None
    run = build_run(config, parts, start)
    # Before the gradient is looked at, which they may change.
    callbacks = [each for each in run.trainer.state.callbacks if each not in watchers]
    place = next(i for i, each in enumerate(callbacks) if isinstance(each, Gradients))
    run.trainer.state.callbacks = [*callbacks[:place], *watchers, *callbacks[place:]]
    return Run(folder, run.trainer, run.log, run.order)


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory, dataset: Path, eval_dataset: Path) -> Run:
    """Three batches, with a checkpoint after each."""
    run = make_run(tmp_path_factory.mktemp("run"), dataset, eval_dataset)
    run.trainer.eval()
    run.trainer.fit()
    run.trainer.close()
    return run


@pytest.fixture
def state_at(trained: Run) -> Iterator[Callable[[int], Any]]:
    """The state of a real run, with its clock and its schedule set to a step."""
    state, before = trained.trainer.state, trained.trainer.state.timestamp
    (schedule,) = (
        callback for callback in state.callbacks if type(callback).__name__ == "Schedule"
    )
    num_used = schedule.num_used

    def at(step: int) -> Any:
        state.timestamp, schedule.num_used = before.copy(batch=step, batch_in_epoch=step), step
        return state

    yield at
    state.timestamp, schedule.num_used = before, num_used
