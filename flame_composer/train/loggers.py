"""Loggers of a run besides its own log: W&B and TensorBoard, to which no secrets are sent."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

from composer.core import State
from composer.loggers import Logger, LoggerDestination, TensorboardLogger, WandBLogger
from composer.utils import dist

from flame_composer.config.sections import WandbConfig
from flame_composer.config.train import TrainConfig
from flame_composer.errors import ConfigError, InvalidField, one_line, without_secrets
from flame_composer.lines import Lines
from flame_composer.upstream.composer import ask_wandb_for_its_address


class Discreet(LoggerDestination):
    """A logger that removes secrets from settings, including those that Composer itself logs."""

    def log_hyperparameters(self, hyperparameters: dict[str, Any]) -> None:
        super().log_hyperparameters(without_secrets(hyperparameters))


class WandB(Discreet, WandBLogger):
    """Composer's WandBLogger, with a one-line error if W&B fails, and without secrets.

    By itself W&B 0.18 records the raw command line, and what is written to stdout and stderr before
    `Lines` has removed secrets from it.
    """

    def init(self, state: State, logger: Logger) -> None:
        from wandb.errors import Error

        ask_wandb_for_its_address()
        arguments, sys.argv[1:] = sys.argv[1:], without_secrets(sys.argv[1:])
        try:
            super().init(state, logger)
        except Error as error:
            raise ConfigError(
                f"wandb: cannot be logged to: {one_line(error)}; run `wandb login`, or set"
                " WANDB_MODE=offline or wandb=null"
            ) from None
        finally:
            sys.argv[1:] = arguments
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, Lines):
                stream.clean_first()


def build_wandb_logger(config: WandbConfig, run_name: str, folder: Path) -> WandBLogger:
    """Return the W&B logger, which keeps its files in `folder`.

    The id of the W&B run is `run_name`, so that a restart goes on with the same one. With
    WANDB_MODE=offline no account is needed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    return WandB(
        project=config.project,
        group=config.group,
        name=run_name,
        entity=config.entity,
        tags=config.tags,
        init_kwargs={"id": run_name, "resume": "allow", "dir": str(folder)},
    )


class TensorBoard(Discreet, TensorboardLogger):
    """Composer's TensorboardLogger, showing every step once however often the run is restarted.

    Steps that were logged after the checkpoint are logged again by the restarted run, so their
    earlier values are marked as purged. That also purges the evaluation of the checkpoint's own
    step, because it is logged under the number of the next step's loss; it is written again.
    """

    def __init__(self, folder: Path):
        super().__init__(log_dir=str(folder))
        self.evaluation: tuple[int, dict[str, float]] | None = None

    def state_dict(self) -> dict[str, Any]:
        return {"evaluation": self.evaluation}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.evaluation = state["evaluation"]

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        super().log_metrics(metrics, step)
        values = {
            name: float(value)
            for name, value in metrics.items()
            if name.startswith("metrics/eval/")
        }
        if values and step is not None:
            same_step = self.evaluation is not None and self.evaluation[0] == step
            self.evaluation = (
                step,
                {**(self.evaluation[1] if same_step and self.evaluation else {}), **values},
            )

    def fit_start(self, state: State, logger: Logger) -> None:
        step = state.timestamp.batch.value
        if dist.get_global_rank() == 0 and step > 0:
            from torch.utils.tensorboard import SummaryWriter

            assert self.log_dir is not None
            self.writer = SummaryWriter(str(Path(self.log_dir, state.run_name)), purge_step=step)
            if self.evaluation is not None and self.evaluation[0] == step:
                super().log_metrics(self.evaluation[1], step)

    def eval_end(self, state: State, logger: Logger) -> None:
        # Composer would also write the hyperparameters here: a new run for every evaluation.
        self._flush(logger)


def build_loggers(config: TrainConfig) -> list[LoggerDestination]:
    """Return the W&B and TensorBoard loggers that `config` asks for.

    Raise ConfigError if TensorBoard is not installed.
    """
    folder = Path(config.log_folder)
    loggers: list[LoggerDestination] = []
    if config.wandb is not None:
        loggers.append(build_wandb_logger(config.wandb, config.run_name, folder))
    if config.tensorboard:
        if importlib.util.find_spec("tensorboard") is None:
            raise InvalidField(
                "tensorboard",
                "tensorboard is not installed; pip install 'flame-composer[tensorboard]'",
            )
        loggers.append(TensorBoard(folder / "tensorboard"))
    return loggers
