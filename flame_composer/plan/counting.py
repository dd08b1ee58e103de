"""A process that counts the memory of training steps.

The counting needs a process of its own, without GPUs: in it fla runs without kernels, in a process
group of ranks that do not exist. This module imports nothing that takes time, so that the process
starts while the one that asks is still importing.
"""

from __future__ import annotations

import functools
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import IO, TYPE_CHECKING, Any

from flame_composer.config.plan import PlanConfig
from flame_composer.errors import one_line
from flame_composer.plan.figures import Memory
from flame_composer.processes import when_parent_ends

if TYPE_CHECKING:
    from transformers import PretrainedConfig

COMMAND = "from flame_composer.plan.counting import serve; serve()"


class CannotCount(Exception):
    """The reason why the steps of a model cannot be counted here, in one line."""


@contextmanager
def counting() -> Iterator[Callable[[PlanConfig, PretrainedConfig, int], Memory]]:
    """Yield a function that counts a step of a run with a number of rows at a time.

    It raises CannotCount. Its process ends with the body, or with this process.
    """
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    with (
        tempfile.TemporaryFile() as said,
        subprocess.Popen(
            [sys.executable, "-P", "-c", COMMAND],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=said,
            env=environment,
            preexec_fn=functools.partial(when_parent_ends, signal.SIGKILL),
        ) as process,
    ):
        try:
            yield functools.partial(_ask, process, said)
        finally:
            process.kill()


def _ask(
    process: subprocess.Popen[bytes],
    said: IO[bytes],
    config: PlanConfig,
    hf_config: PretrainedConfig,
    rows: int,
) -> Memory:
    assert process.stdin is not None
    assert process.stdout is not None
    question = {"config": asdict(config), "model": hf_config.to_dict(), "rows": rows}
    try:
        process.stdin.write(json.dumps(question).encode() + b"\n")
        process.stdin.flush()
    except BrokenPipeError:
        pass  # it has ended, so there is no answer
    line = process.stdout.readline()
    if not line:
        status = process.wait()
        said.seek(0)
        last = said.read().decode(errors="replace").strip().rpartition("\n")[2]
        raise CannotCount(f"its process ended with status {status}: {last}")
    answer = json.loads(line)
    if isinstance(answer, str):
        raise CannotCount(answer)
    return Memory(**answer)


def serve() -> None:
    """Answer questions on stdin, until it closes, on what stdout is; print nothing else there."""
    import logging
    import warnings

    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # whatever a library prints
    import torch
    from omegaconf import OmegaConf
    from transformers import AutoConfig

    from flame_composer import cpu
    from flame_composer.plan.step import count_step

    torch.set_num_threads(1)
    cpu.enable()  # before the config of a model of fla is read
    for line in sys.stdin:
        question = json.loads(line)
        plain = OmegaConf.merge(OmegaConf.structured(PlanConfig), question["config"])
        config: Any = OmegaConf.to_object(plain)
        try:
            hf_config = AutoConfig.for_model(**question["model"])
            answer: Any = asdict(count_step(config, hf_config, question["rows"]))
        except Exception as error:  # a model's own code may raise anything
            answer = f"{type(error).__name__}: {one_line(error)}"
        answers.write(json.dumps(answer).encode() + b"\n")
        answers.flush()
