"""Optional callbacks and loggers of ours, which a configuration can name like Composer's own."""

from __future__ import annotations

import copy
import gc
import importlib.util
import json
import os
import shutil
import urllib.parse
from pathlib import Path
from typing import Any, Literal, cast

import torch
from composer.core import Callback, State
from composer.loggers import FileLogger as ComposerFileLogger
from composer.loggers import Logger
from composer.loggers import MLFlowLogger as ComposerMLFlowLogger
from composer.utils import dist, format_name_with_dist
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerFast

from flame_composer.checkpoint.to_model import save_hf_folder
from flame_composer.config.extensions import whole_batches
from flame_composer.config.rules import expand_path
from flame_composer.errors import ConfigError, one_line
from flame_composer.model.causal_lm import causal_lm_of
from flame_composer.model.lora import merge_adapters
from flame_composer.storage.plain_http import warn_if_readable
from flame_composer.text.ends import encode_prompt
from flame_composer.train.algorithms import as_evaluated
from flame_composer.train.loggers import Discreet
from flame_composer.train.rows import appending, keep_rows, writing


class EarlyStopper(Callback):
    """A callback that ends a run whose evaluation loss has stopped falling.

    The run ends when the loss has not fallen by more than `min_delta` for more than `patience`
    batches. If it is then restarted, it ends again at once. Composer's EarlyStopper forgets the
    best loss at a restart, and would maximize the metric LanguageCrossEntropy.
    """

    def __init__(self, patience: str, min_delta: float = 0.0):
        if not min_delta >= 0:
            raise ValueError(f"min_delta={min_delta}: must be 0 or more")
        self.patience = whole_batches("patience", patience)
        self.min_delta = min_delta
        self.best: float | None = None
        self.best_batch = 0
        self.stopped = False

    def state_dict(self) -> dict[str, Any]:
        return {"best": self.best, "best_batch": self.best_batch, "stopped": self.stopped}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.best, self.best_batch, self.stopped = (
            state["best"],
            state["best_batch"],
            state["stopped"],
        )

    def after_load(self, state: State, logger: Logger) -> None:
        if self.stopped:
            state.stop_training()

    def eval_end(self, state: State, logger: Logger) -> None:
        if state.eval_timestamp.batch < state.dataloader_len:
            return  # a signal cut the evaluation short
        loss, batch = (
            float(state.eval_metric_values["LanguageCrossEntropy"]),
            state.timestamp.batch.value,
        )
        if self.best is None or loss < self.best - self.min_delta:
            self.best, self.best_batch = loss, batch
        elif batch - self.best_batch > self.patience and not self.stopped:
            self.stopped = True
            state.stop_training()
            if dist.get_global_rank() == 0:
                print(
                    f"step {batch}: eval loss {loss:.4f}; it was {self.best:.4f} at step"
                    f" {self.best_batch} and has not fallen by more than {self.min_delta:g} since:"
                    " the run ends (callbacks.early_stopper)",
                    flush=True,
                )


class Generate(Callback):
    """A callback that continues `prompts` every `interval` and at the end of the run.

    The texts go into samples.jsonl, and as a table to every logger that takes tables. The model has
    the weights that evaluation uses, e.g. their average. Random numbers come from a separate
    generator state, so that training is not affected.
    """

    def __init__(
        self,
        log_folder: Path,
        prompts: list[str],
        interval: str = "1000ba",
        max_new_tokens: int = 64,
        temperature: float = 0.8,
        top_p: float = 0.95,
    ):
        if not prompts or not all(prompts):
            raise ValueError("prompts: must be one or more, and none of them empty")
        if max_new_tokens < 1 or temperature < 0 or not 0 < top_p <= 1:
            raise ValueError(
                "max_new_tokens must be 1 or more, temperature 0 or more, top_p in (0, 1]"
            )
        self.path = log_folder / "samples.jsonl"
        self.prompts = prompts
        self.interval = whole_batches("interval", interval)
        self.options: dict[str, Any] = {
            "max_new_tokens": max_new_tokens,
            "do_sample": temperature > 0,
        }
        if temperature > 0:
            self.options |= {"temperature": temperature, "top_p": top_p, "top_k": 0}

    def fit_start(self, state: State, logger: Logger) -> None:
        if dist.get_global_rank() == 0:
            with writing(self.path):
                keep_rows(self.path, last_step=state.timestamp.batch.value, several=True)

    def batch_checkpoint(self, state: State, logger: Logger) -> None:
        batch = state.timestamp.batch.value
        assert state.max_duration is not None
        if dist.get_global_rank() != 0 or (
            batch % self.interval and state.timestamp < state.max_duration
        ):
            return
        composer_model = causal_lm_of(state.model)
        tokenizer = cast(PreTrainedTokenizerFast, composer_model.tokenizer)
        composer_model.eval()
        with torch.random.fork_rng(), as_evaluated(state, logger):
            torch.manual_seed(batch)
            texts = [
                self._continued(prompt, cast(PreTrainedModel, composer_model.model), tokenizer)
                for prompt in self.prompts
            ]
        composer_model.train()
        with writing(self.path), appending(self.path) as samples:
            for prompt, text in zip(self.prompts, texts, strict=True):
                samples.write(
                    json.dumps(
                        {"current_steps": batch, "prompt": prompt, "text": text}, ensure_ascii=False
                    )
                    + "\n"
                )
        logger.log_table(
            ["prompt", "text"],
            [list(pair) for pair in zip(self.prompts, texts, strict=True)],
            name="samples",
        )

    def _continued(
        self, prompt: str, model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast
    ) -> str:
        ids = torch.tensor([encode_prompt(tokenizer, prompt)], device=model.device)
        eos, pad = tokenizer.eos_token_id, tokenizer.pad_token_id
        generation = GenerationConfig(
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=eos,
            pad_token_id=eos if pad is None else pad,
            **self.options,
        )
        output = model.generate(
            ids, attention_mask=torch.ones_like(ids), generation_config=generation
        )  # type: ignore[operator]
        return tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True)


class HfExport(Callback):
    """A callback that exports the model as Hugging Face folders named `ba<batch>`.

    They hold the weights that evaluation uses: their average, if there is one. Adapters are merged
    into them. Each folder appears only once it is complete.
    """

    def __init__(
        self,
        log_folder: Path,
        folder: str | None = None,
        interval: str = "1000ba",
        dtype: Literal["float32", "bfloat16", "float16"] = "float32",
    ):
        if folder is not None and (not folder or "://" in folder):
            raise ValueError(f"folder={folder}: must be a local folder")
        self.folder = Path(expand_path(folder, "folder")) if folder else log_folder / "hf"
        self.interval = whole_batches("interval", interval)
        self.dtype = dtype

    def fit_start(self, state: State, logger: Logger) -> None:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(
                f"{self.folder}: cannot be written to: {error.strerror}; set"
                " callbacks.hf_export.folder to a writable folder"
            ) from None

    def batch_checkpoint(self, state: State, logger: Logger) -> None:
        batch = state.timestamp.batch.value
        assert state.max_duration is not None
        if dist.get_global_rank() != 0 or (
            batch % self.interval and state.timestamp < state.max_duration
        ):
            return
        out = self.folder / f"ba{batch}"
        # An export of this step exists already, from before a restart or from another run.
        if (out / "config.json").is_file():
            shutil.rmtree(out)
        composer_model = causal_lm_of(state.model)
        with as_evaluated(state, logger):
            model = copy.deepcopy(cast(PreTrainedModel, composer_model.model))
        if composer_model.adapter is not None:
            merge_adapters(model)
        save_hf_folder(
            model, cast(PreTrainedTokenizerFast, composer_model.tokenizer), out, dtype=self.dtype
        )


class ScheduledGC(Callback):
    """A callback that runs Python's garbage collector every `interval`, and never in between.

    All ranks then collect at the same step, instead of each holding up the others at its own time.
    """

    def __init__(self, interval: str = "1000ba"):
        self.interval = whole_batches("interval", interval)

    def fit_start(self, state: State, logger: Logger) -> None:
        gc.disable()
        gc.collect()

    def batch_end(self, state: State, logger: Logger) -> None:
        if state.timestamp.batch.value % self.interval == 0:
            gc.collect()

    def fit_end(self, state: State, logger: Logger) -> None:
        gc.enable()

    def close(self, state: State, logger: Logger) -> None:
        gc.enable()


class FileLogger(Discreet, ComposerFileLogger):
    """Composer's FileLogger, except that a restarted run appends to its file."""

    def __init__(
        self, log_folder: Path, filename: str = "logs-rank{rank}.txt", flush_interval: int = 100
    ):
        """Log to `filename` within `log_folder`; the name must contain `{rank}`."""
        if "{rank}" not in filename:
            raise ValueError(
                f"filename={filename}: must hold {{rank}}, or ranks would write over one another"
            )
        if Path(filename).is_absolute() or ".." in Path(filename).parts or filename.startswith("~"):
            raise ValueError(f"filename={filename}: must lie within log_folder")
        try:
            format_name_with_dist(filename, run_name="run_name")
        except (ValueError, AttributeError):
            raise ValueError(
                f"filename={filename}: must have nothing in braces but names such as {{rank}}, "
                "{local_rank}, {node_rank}, {world_size} or {run_name}"
            ) from None
        if flush_interval < 1:
            raise ValueError(f"flush_interval={flush_interval}: must be 1 or more batches")
        super().__init__(
            str(log_folder / filename),
            capture_stdout=False,
            capture_stderr=False,
            log_traces=False,
            flush_interval=flush_interval,
        )

    def init(self, state: State, logger: Logger) -> None:
        self._run_name = state.run_name  # type: ignore[assignment]
        try:
            Path(self.filename).parent.mkdir(parents=True, exist_ok=True)
            path = Path(self.filename)
            self.file = path.open("a", buffering=self.buffer_size, encoding="utf-8")
        except OSError as error:
            raise ConfigError(
                f"{self.filename}: cannot be written to: {error.strerror}; set log_folder, or "
                "loggers.file_logger.filename, to a place that is writable"
            ) from None
        self._flush_queue()


class MLFlowLogger(Discreet, ComposerMLFlowLogger):
    """Composer's MLFlowLogger, except that a restarted run goes on as the same MLflow run."""

    def __init__(
        self,
        experiment_name: str = "flame_composer",
        tracking_uri: str | None = None,
        run_name: str | None = None,
        run_group: str | None = None,
        ignore_metrics: list[str] | None = None,
    ):
        """Log to `tracking_uri`; if it is None, MLflow's environment variables decide.

        The user and password are read only from MLflow's environment variables: an address with a
        password raises ValueError.
        """
        if importlib.util.find_spec("mlflow") is None:
            raise ValueError("mlflow is not installed; pip install 'flame-composer[mlflow]'")
        if tracking_uri is not None and "@" in urllib.parse.urlsplit(tracking_uri).netloc:
            raise ValueError(
                "tracking_uri: must hold no password; set MLFLOW_TRACKING_USERNAME and"
                " MLFLOW_TRACKING_PASSWORD"
            )
        tracking_uri = expand_path(tracking_uri, "tracking_uri") if tracking_uri else tracking_uri
        from mlflow import MlflowException

        warn_if_readable(tracking_uri or os.environ.get("MLFLOW_TRACKING_URI", ""))
        # MLflow's default of seven retries takes minutes, during which a checkpoint would have to
        # wait for a server that is down.
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
        try:
            super().__init__(
                experiment_name=experiment_name,
                tracking_uri=tracking_uri,
                run_name=run_name,
                run_group=run_group,
                ignore_metrics=ignore_metrics,
                resume=True,
                log_system_metrics=False,
            )
        except MlflowException as error:
            raise ValueError(
                f"{tracking_uri or 'the tracking server'}: {one_line(error)}"
            ) from None
        self.state: State | None = None

    def init(self, state: State, logger: Logger) -> None:
        self.state = state
        super().init(state, logger)

    def state_dict(self) -> dict[str, Any]:
        """Send everything that is still queued to MLflow, and return an empty state.

        MLflow then has every step up to this checkpoint. If the run is killed, only later steps can
        be missing, and the restarted run takes those again.
        """
        if self._enabled:
            import mlflow

            mlflow.flush_async_logging()
        return {}

    def post_close(self) -> None:
        """End the MLflow run as KILLED if it stopped early, where Composer says FINISHED."""
        if not self._enabled or self.state is None:
            return
        import mlflow

        mlflow.flush_async_logging()
        longest = self.state.max_duration
        mlflow.end_run(
            "FINISHED" if longest is not None and self.state.timestamp >= longest else "KILLED"
        )
