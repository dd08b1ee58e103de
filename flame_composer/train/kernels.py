"""The choices that kernels depend on, kept with a run, and torch's deterministic mode.

Triton times the candidates of a kernel when a process first launches it. The one that wins decides
in which order numbers are added up, and so the last bits of the result. A run therefore tunes each
kernel once: its choices are agreed on by all ranks, and kept beside the checkpoints in `KERNELS`.
"""

from __future__ import annotations

import importlib.metadata
import json
import logging
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from composer.core import Callback, State
from composer.loggers import Logger
from composer.utils import dist

from flame_composer.agree import agreed
from flame_composer.checkpoint.upload import try_for_minutes
from flame_composer.config.train import TrainConfig
from flame_composer.cpu.coverage import interprets
from flame_composer.errors import GOES_ON, ConfigError, DataError, TrainingError, one_line
from flame_composer.storage import files
from flame_composer.storage.filesystems import is_url
from flame_composer.storage.folders import flush
from flame_composer.storage.local import appearing
from flame_composer.upstream.autotuner import choose_by
from flame_composer.upstream.ranks import store_of_all_ranks

KERNELS = "kernels.json"
"""The name of the file in `save_folder` that holds a run's choices."""

FORMAT = 1
WORKSPACES = (":4096:8", ":16:8")  # of those that cuBLAS knows, the deterministic ones
WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"
# Layers of fla whose kernels add up with atomics
ADD_IN_ANY_ORDER = ("fla.layers.log_linear_mamba2", "fla.layers.nsa", "fla.layers.path_attn")
REMEDY = "restore it from a copy, or delete it: kernels are then tuned anew"

log = logging.getLogger(__name__)


class PinnedKernels(Callback):
    """A callback that tunes each kernel once in the life of a run, whatever restarts it.

    The first rank to tune a kernel decides for all, through the store that the ranks met at. What
    was decided since the last step is written before the step's row is logged, so that no restart
    tunes a kernel again that a logged loss depends on. Choices made on another device, or by other
    versions of torch, Triton or fla, are kept but not used.
    """

    def __init__(self, folder: str | None, *, resumes: bool):
        """Use the choices in `folder`, a path or URL, or none if it is None.

        `resumes`: whether the run goes on from a checkpoint, so that choices should be there. Every
        rank must call this. Raises DataError if the file with the choices is damaged.
        """
        self.place = None if folder is None else files.join(folder, KERNELS)
        self.machine = describe_machine()
        self.kept = self._read(resumes=resumes)
        self.chosen = {
            (kernel, key): config
            for machine in self.kept
            if machine["on"] == self.machine
            for kernel, key, config in machine["chosen"]
        }
        self.store = store_of_all_ranks()
        self.written = -1  # choices in the store that the file has, too; a first write is due

    def _read(self, *, resumes: bool) -> list[dict[str, Any]]:
        """Return the content of the file, the same on every rank; say so if it is of no use."""
        place = self.place if dist.get_global_rank() == 0 else None
        answers = agreed(dist.all_gather_object, lambda: _read(place) if place else None)
        kept = answers[0] or []
        others = [machine["on"] for machine in kept]
        if resumes and self.machine not in others and dist.get_global_rank() == 0:
            before = f"were tuned on {_in_words(others[-1])}" if others else "have no record here"
            log.warning(
                "warning: %s: the kernels of this run %s; on %s they are tuned anew, and losses may"
                " differ in their last bits from those of a run that was never stopped",
                self.place,
                before,
                _in_words(self.machine),
            )
        return kept

    def find(self, kernel: str, key: str) -> dict[str, Any] | None:
        return self.chosen.get((kernel, key))

    def settle(self, kernel: str, key: str, config: dict[str, Any]) -> dict[str, Any]:
        choice = json.dumps([self.machine, kernel, key, config], sort_keys=True)
        name = "kernel/" + json.dumps([self.machine, kernel, key], sort_keys=True)
        settled = self.store.compare_set(name, "", choice).decode()
        if settled == choice:  # this rank was the first, or found the same
            self.store.set(f"kernels/{self.store.add('kernels', 1)}", choice)
        self.chosen[kernel, key] = json.loads(settled)[3]
        return self.chosen[kernel, key]

    def init(self, state: State, logger: Logger) -> None:
        choose_by(self)

    def eval_end(self, state: State, logger: Logger) -> None:
        self.write()

    def batch_checkpoint(self, state: State, logger: Logger) -> None:
        self.write()

    def close(self, state: State, logger: Logger) -> None:
        choose_by(None)

    def write(self) -> None:
        """Write what was chosen since the last call, on any rank; raise TrainingError on failure.

        Only the first rank writes.
        """
        if self.place is None or dist.get_global_rank() != 0:
            return
        count = self.store.add("kernels", 0)
        if count == self.written:
            return
        self._chosen_on(self.machine)
        for number in range(max(0, self.written) + 1, count + 1):
            on, *choice = json.loads(self.store.get(f"kernels/{number}"))
            chosen = self._chosen_on(on)
            if choice not in chosen:
                chosen.append(choice)
        content = files.dump_json({"format": FORMAT, "kernels": self.kept})
        try:
            _write(self.place, content)
        except OSError as error:
            reason = error.strerror or one_line(error)
            raise TrainingError(f"{self.place}: cannot be written: {reason}; {GOES_ON}") from None
        except (ConfigError, DataError) as error:
            raise TrainingError(f"{one_line(error)}; {GOES_ON}") from None
        self.written = count

    def _chosen_on(self, on: dict[str, str]) -> list[Any]:
        """Return the list of choices made on a machine, which may be empty."""
        machine = next((each for each in self.kept if each["on"] == on), None)
        if machine is None:
            machine = {"on": on, "chosen": []}
            self.kept.append(machine)
        return machine["chosen"]


def build_kernels(
    config: TrainConfig, model: torch.nn.Module, *, resumes: bool
) -> list[PinnedKernels]:
    """Return the callback that keeps the choices of kernels, if there are any to keep.

    Say which layers of the model cannot be deterministic here. `resumes`: whether the run goes on
    from a checkpoint. Every rank must call this after `dist.initialize_dist`.
    """
    if not config.deterministic:
        return []
    if torch.cuda.is_available() and dist.get_global_rank() == 0:
        warn_of_layers(model)
    if torch.cuda.is_available() or interprets():
        return [PinnedKernels(config.save_folder, resumes=resumes)]
    return []


def describe_machine() -> dict[str, str]:
    """Return what decides which candidates a kernel has and what they compute."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "Triton's interpreter"
    packages = {"triton": "triton", "fla": "fla-core"}
    versions = {name: importlib.metadata.version(of) for name, of in packages.items()}
    return {"device": device, "torch": torch.__version__, **versions}


def make_deterministic() -> None:
    """Make cuBLAS, cuDNN and torch's own operations repeat their results to the last bit.

    Call it before anything runs on a GPU; without one it does nothing. Raise ConfigError if the
    environment gives cuBLAS a workspace with which it cannot.
    """
    if not torch.cuda.is_available():
        return
    given = os.environ.setdefault(WORKSPACE, WORKSPACES[0])
    if given not in WORKSPACES:
        raise ConfigError(
            f"environment: {WORKSPACE}={given}: must be {' or '.join(WORKSPACES)} with"
            " deterministic=true; unset it"
        )
    torch.use_deterministic_algorithms(True, warn_only=True)
    # Else torch fills every new tensor before a kernel fills it
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    torch.backends.cudnn.benchmark = False


def warn_of_layers(model: torch.nn.Module) -> None:
    """Say which layers of fla add up numbers in an order that changes from run to run on a GPU."""
    layers = {type(module).__name__: type(module).__module__ for module in model.modules()}
    for name, module in sorted(layers.items()):
        uses_flash = getattr(sys.modules.get(module), "flash_attn_func", None) is not None
        if module in ADD_IN_ANY_ORDER or (module.startswith("fla.") and uses_flash):
            _warn_of(f"the backward pass of {name}")


def _warn_of(operation: str) -> None:
    log.warning(
        "warning: %s has no deterministic form on this device: a run that is stopped and restarted"
        " may differ in its last bits from one that was not",
        operation,
    )


@contextmanager
def naming_what_differs() -> Iterator[None]:
    """Say in one line, once each, which operations of the body torch cannot make deterministic."""
    with warnings.catch_warnings():
        show = warnings.showwarning
        named = set()

        def in_one_line(message: Any, *args: Any, **kwargs: Any) -> None:
            operation, is_it, _ = str(message).partition(" does not have a deterministic")
            if not is_it:
                show(message, *args, **kwargs)
            elif operation not in named:
                named.add(operation)
                _warn_of(operation)

        warnings.showwarning = in_one_line
        warnings.filterwarnings("always", ".* does not have a deterministic", UserWarning)
        yield


def _in_words(machine: dict[str, str]) -> str:
    versions = [f"{name} {machine[name]}" for name in sorted(machine) if name != "device"]
    return f"{machine['device']} ({', '.join(versions)})"


def _write(place: str, content: bytes) -> None:
    """Write a file, whole or not at all, and force it to disk; in a store, try for minutes."""
    if is_url(place):
        try_for_minutes(partial(files.write, place, content), place)
        return
    with appearing(place) as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    flush(Path(place).parent)


def _read(place: str) -> list[dict[str, Any]] | None:
    """Return what a file of choices holds, or None if there is none."""
    try:
        if files.stat(place) is None:
            return None
        content = json.loads(files.read(place))
    except OSError as error:
        raise DataError(f"{place}: cannot be read: {error.strerror}; {REMEDY}") from None
    except (ConfigError, DataError):  # of the store
        raise
    except (ValueError, RecursionError):
        raise DataError(f"{place}: damaged: it is not JSON; {REMEDY}") from None
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise DataError(f"{place}: it is not of format {FORMAT}; {REMEDY}")
    kernels = content.get("kernels")
    if not isinstance(kernels, list) or not all(map(_is_machine, kernels)):
        raise DataError(f"{place}: damaged: kernels must be choices of machines; {REMEDY}")
    return kernels


def _is_machine(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and isinstance(value.get("on"), dict)
        and {"device"} <= set(value["on"])
        and all(isinstance(part, str) for part in value["on"].values())
        and isinstance(value.get("chosen"), list)
        and all(map(_is_choice, value["chosen"]))
    )


def _is_choice(value: Any) -> bool:
    kinds = [str, str, dict]
    return isinstance(value, list) and [type(part) for part in value] == kinds
