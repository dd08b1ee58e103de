"""A process that follows a run's steps as on its devices: it counts memory, and compiles kernels.

It takes a process of its own, without GPUs: in it fla runs on tensors that have no memory, in a
process group of ranks that do not exist, and believes in the run's GPU. This module imports nothing
that takes time, so that the process starts while the one that asks is still importing.
"""

from __future__ import annotations

import functools
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict
from typing import IO, TYPE_CHECKING, Any

from tqdm import tqdm

from flame_composer.config.plan import PlanConfig
from flame_composer.errors import ConfigError, one_line
from flame_composer.plan.figures import Memory
from flame_composer.plan.kernels import GPUS, Checked
from flame_composer.processes import when_parent_ends

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from flame_composer.plan.compiling import Verdict

COMMAND = "import sys; from flame_composer.plan.child import serve; serve(sys.argv[1])"
# Variables of the environment that would change what is followed
NOT_OF_A_PLAN = ("TRITON_INTERPRET", "FLA_CACHE_MODE", "FLA_CONFIG_DIR")


class CannotCount(Exception):
    """The reason why the steps of a model cannot be counted here, in one line."""


class _Ended(Exception):
    """How the process ended, and the last that it said."""


@contextmanager
def child_for(device: str) -> Iterator[Child]:
    """Start the process that follows steps on `device`; it ends with the body, or with this one."""
    with tempfile.TemporaryFile() as said:
        child = Child(device, said)
        try:
            yield child
        finally:
            child.end()


class Child:
    """The process that follows steps; one that has ended is started again by the next question."""

    def __init__(self, device: str, said: IO[bytes]):
        self.device, self.said = device, said
        self.start()

    def start(self) -> None:
        """Start the process, whose stderr goes to `said`."""
        self.said.truncate(0)
        inherited = {name: each for name, each in os.environ.items() if name not in NOT_OF_A_PLAN}
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-c", COMMAND, self.device],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.said,
            env={**inherited, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"},
            preexec_fn=functools.partial(when_parent_ends, signal.SIGKILL),
        )

    def end(self) -> None:
        """End the process."""
        self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            assert pipe is not None
            with suppress(BrokenPipeError):  # closing writes what was not taken
                pipe.close()

    def count(self, config: PlanConfig, hf_config: PretrainedConfig, rows: int) -> Memory:
        """Return the memory of a step with `rows` rows at a time; raise CannotCount."""
        return Memory(**self._counted("memory", config, hf_config, rows))

    def count_sent(self, config: PlanConfig, hf_config: PretrainedConfig) -> dict[str, int]:
        """Return what a device sends in a step (`plan.sending`); raise CannotCount."""
        return self._counted("sent", config, hf_config)

    def _counted(self, what: str, *of: Any) -> dict[str, Any]:
        try:
            answer = next(self._ask(what, *of))
        except _Ended as reason:
            raise CannotCount(f"its process {reason}") from None
        if "error" in answer:
            raise CannotCount(answer["error"])
        return answer

    def check(self, config: PlanConfig, hf_config: PretrainedConfig) -> Checked | None:
        """Return the verdicts on all launches of the run, its evaluation and generation.

        Return None if there is nothing to compile: on CPUs, with `kernels: none`, and for a model
        that is not one of fla's. Show a progress bar in a terminal. Raise ConfigError if the
        process ends early.
        """
        from flame_composer.plan.compiling import Verdict

        is_fla = type(hf_config).__module__.startswith("fla.")
        if self.device not in GPUS or config.kernels == "none" or not is_fla:
            return None
        verdicts: list[Verdict] = []
        with tqdm(desc="compiling", unit="kernel", disable=None) as bar:
            try:
                for answer in self._ask("kernels", config, hf_config):
                    if "failures" in answer:
                        return Checked(GPUS[self.device], verdicts, answer["failures"])
                    if "launches" in answer:
                        bar.reset(answer["launches"])
                    else:
                        verdicts.append(Verdict(**answer))
                        bar.update()
            except _Ended as reason:
                error = str(reason)
        raise ConfigError(
            f"kernels={config.kernels}: the process that compiles them {error[:300]};"
            " give kernels=none to plan without them"
        )

    def _ask(
        self, what: str, config: PlanConfig, hf_config: PretrainedConfig, rows: int | None = None
    ) -> Iterator[dict[str, Any]]:
        """Yield the answers, without an end; raise _Ended."""
        if self.process.poll() is not None:
            self.end()
            self.start()
        process = self.process
        assert process.stdin is not None
        assert process.stdout is not None
        model = json.loads(hf_config.to_json_string(use_diff=False))
        question = {"what": what, "config": asdict(config), "model": model, "rows": rows}
        with suppress(BrokenPipeError):  # it has ended, so there is no answer
            process.stdin.write(json.dumps(question).encode() + b"\n")
            process.stdin.flush()
        while (line := process.stdout.readline()).endswith(b"\n"):
            yield json.loads(line)
        status = process.wait()
        self.said.seek(0)
        last = self.said.read().decode(errors="replace").strip().rpartition("\n")[2]
        raise _Ended(f"ended with status {status}: {last or 'it gave no reason'}")


def serve(device: str) -> None:
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

    torch.set_num_threads(1)
    import_fla(device)  # before the config of a model of fla is read
    from flame_composer.plan.sending import count_sent
    from flame_composer.plan.step import count_step

    def answer(content: Mapping[str, Any]) -> None:
        answers.write(json.dumps(content).encode() + b"\n")
        answers.flush()

    for line in sys.stdin:
        question = json.loads(line)
        plain = OmegaConf.merge(OmegaConf.structured(PlanConfig), question["config"])
        config: Any = OmegaConf.to_object(plain)
        hf_config = AutoConfig.for_model(**question["model"])
        if question["what"] == "kernels":
            _compile(config, hf_config, answer)
            continue
        try:
            if question["what"] == "sent":
                answer(count_sent(config, hf_config))
            else:
                answer(asdict(count_step(config, hf_config, question["rows"])))
        except Exception as error:  # a model's own code may raise anything
            answer({"error": f"{type(error).__name__}: {one_line(error)}"})


def import_fla(device: str) -> None:
    """Import fla in a process that passes for one on `device` from then on.

    fla decides at import, by the GPU, which kernels and configurations there are.
    """
    from flame_composer import cpu

    if device not in GPUS:
        cpu.enable()
        return
    from flame_composer.upstream.cuda import claimed_device
    from flame_composer.upstream.triton import claim_gpu

    gpu = GPUS[device]
    claim_gpu(gpu.capability, gpu.shared_memory, gpu.multiprocessors)
    with claimed_device(gpu.capability):
        cpu.enable()


def _compile(
    config: PlanConfig, hf_config: PretrainedConfig, answer: Callable[[Mapping[str, Any]], None]
) -> None:
    from flame_composer.plan.compiling import judge
    from flame_composer.plan.launches import follow

    followed = follow(config, hf_config)
    answer({"launches": len(followed.launches)})
    judge(
        followed.launches,
        GPUS[config.device].shared_memory,
        every=config.kernels == "every",
        report=lambda verdict: answer(asdict(verdict)),
    )
    answer({"failures": followed.failures})
