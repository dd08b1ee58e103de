"""Benchmarks of what training waits for while checkpoints are saved in the background."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from composer.core import State

from flame_composer.bench.measure import Figure, interleaved, median, ratio
from flame_composer.bench.models import seconds
from flame_composer.checkpoint.save import SaveCheckpoints
from flame_composer.errors import DataError
from flame_composer.model.causal_lm import CausalLM
from flame_composer.processes import when_parent_ends
from flame_composer.upstream.composer import remember_environment

STORE_SECONDS = 30  # for the S3 server to start
BUCKET = "checkpoints"
TOKENS = 512  # of the step that is timed while a checkpoint is written


def stalls(state: State, folder: Path, repeats: int) -> tuple[dict[str, Any], list[Figure]]:
    """Time what training waits for at a save, against copying the state in memory.

    The state is saved to a folder and to an S3 server on this machine, if JuiceFS is installed. A
    training step is timed alone and while a checkpoint is written to the folder.
    """
    remember_environment()
    has_store = Path(sys.executable).with_name("juicefs").exists()
    with s3_server(folder / "s3") if has_store else nullcontext():
        places = {"folder": str(folder / "there")}
        if has_store:
            places["s3"] = f"s3://{BUCKET}/there"
        savers = {
            name: SaveCheckpoints(
                place, folder / f"staging-{name}", batches=1, num_to_keep=1, in_background=True
            )
            for name, place in places.items()
        }
        step = partial(train, state)
        calls: dict[str, Callable[[], float]] = {
            "copy": partial(seconds, copier(state)),
            **{f"stall_{name}": partial(stall, saver, state) for name, saver in savers.items()},
            "step": partial(seconds, step),
            "step_meanwhile": partial(step_meanwhile, savers["folder"], state, step),
        }
        found = interleaved(calls, repeats, "saving in the background", warm=2)
    figures = [
        Figure(
            f"checkpoint: training waits, over copying the state, {where}",
            ratio(found[f"stall_{name}"], found["copy"]) if name in savers else None,
            at_most=1.5,
        )
        for name, where in (("folder", "folder"), ("s3", "S3"))
    ]
    slower = ratio(found["step_meanwhile"], found["step"])
    name = "checkpoint: a step while one is written, over a step alone"
    return {f"{name}_seconds": round(median(values), 4) for name, values in found.items()}, [
        *figures,
        Figure(name, slower),
    ]


def copier(state: State) -> Callable[[], None]:
    """Return a function that copies all tensors of a state to host memory that is already there.

    The memory is pinned for tensors of a GPU.
    """
    (optimizer,) = state.optimizers
    model = cast(CausalLM, state.model).model
    there = [*model.state_dict().values()]
    there += [each for values in optimizer.state.values() for each in values.values()]
    copies = [torch.empty(each.shape, dtype=each.dtype, pin_memory=each.is_cuda) for each in there]

    def copy() -> None:
        for tensor, to in zip(there, copies, strict=True):
            to.copy_(tensor, non_blocking=True)

    return copy


def stall(saver: SaveCheckpoints, state: State) -> float:
    """Return the seconds that training waits for a checkpoint; return once it is whole."""
    saver.saved = None
    waited = seconds(partial(saver.save, state))
    saver.wait()
    return waited


def step_meanwhile(saver: SaveCheckpoints, state: State, step: Callable[[], None]) -> float:
    """Return the median seconds of the training steps that begin while a checkpoint is written."""
    saver.saved = None
    saver.save(state)
    took: list[float] = []
    while not took or saver.is_saving():
        took.append(seconds(step))
    saver.wait()
    return median(took)


def train(state: State) -> None:
    """Compute the gradients of one row of random tokens."""
    model = cast(CausalLM, state.model)
    device = next(model.parameters()).device
    ids = torch.randint(0, model.model.config.vocab_size, (1, TOKENS), device=device)
    labels = ids.clone()
    labels[:, 0] = -100
    model({"input_ids": ids, "labels": labels})["loss"].backward()


@contextmanager
def s3_server(folder: Path) -> Iterator[None]:
    """Run an S3 server on this machine in the body, JuiceFS's gateway, which keeps files here.

    The environment leads to it, and to an empty bucket `BUCKET`. Raise DataError if it does not
    start.
    """
    import boto3

    folder.mkdir()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = "{}:{}".format(*free.getsockname())
    juicefs = str(Path(sys.executable).with_name("juicefs"))
    meta = f"sqlite3://{folder}/meta.db"
    keys = {"MINIO_ROOT_USER": "benchmark", "MINIO_ROOT_PASSWORD": "benchmark"}
    env = {**keys, "HOME": str(folder), "PATH": os.environ["PATH"]}
    quiet: Any = {"env": env, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    kept = ("--storage", "file", "--bucket", f"{folder}/bucket/")
    subprocess.run([juicefs, "format", meta, "benchmark", *kept], check=True, **quiet)
    server = subprocess.Popen(
        [juicefs, "gateway", "--no-banner", "--multi-buckets", "--keep-etag", meta, address],
        preexec_fn=partial(when_parent_ends, signal.SIGKILL),
        **quiet,
    )
    variables = {
        "S3_ENDPOINT_URL": f"http://{address}",
        "AWS_ACCESS_KEY_ID": keys["MINIO_ROOT_USER"],
        "AWS_SECRET_ACCESS_KEY": keys["MINIO_ROOT_PASSWORD"],
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    before = {name: os.environ.get(name) for name in variables}
    try:
        _wait_for(address)
        os.environ.update(variables)
        boto3.client("s3", endpoint_url=f"http://{address}").create_bucket(Bucket=BUCKET)
        yield
    finally:
        server.terminate()
        server.wait()
        for name, value in before.items():
            os.environ.pop(name, None)
            os.environ.update({} if value is None else {name: value})


def _wait_for(address: str) -> None:
    """Return once a server accepts connections; raise DataError if it takes too long."""
    host, port = address.split(":")
    until = time.monotonic() + STORE_SECONDS
    while True:
        try:
            socket.create_connection((host, int(port))).close()
            return
        except OSError as error:
            if time.monotonic() > until:
                raise DataError(f"JuiceFS's gateway does not start: {error}") from None
            time.sleep(0.05)
