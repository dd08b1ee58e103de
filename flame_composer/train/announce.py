"""The start of a run, announced and recorded: its configuration and where it resumes."""

from __future__ import annotations

import datetime
import json
import logging
from pathlib import Path
from typing import Any

import torch
import yaml
from composer import Trainer
from composer.core import State
from composer.loggers import ProgressBarLogger
from composer.utils import dist

from flame_composer.errors import ConfigError, masked
from flame_composer.model.muon import Muon
from flame_composer.model.work import count_parameters, count_trained
from flame_composer.storage import files
from flame_composer.storage.filesystems import is_url
from flame_composer.train.rows import appending, is_cut_short, writing

STARTS = "starts.jsonl"

log = logging.getLogger(__name__)


def announce(
    trainer: Trainer,
    resolved_yaml: str,
    log_folder: Path,
    save_folder: str | None,
    *,
    resumed_from: str | None,
) -> None:
    """Announce the run, write its configuration, and append this start to `starts.jsonl`.

    The configuration goes to both folders and to every logger. `starts.jsonl` is in the log folder.

    Writing to `save_folder` now shows whether it is writable before hours of training are at stake.
    Raise ConfigError if either folder is not.
    """
    for destination in trainer.logger.destinations:
        if isinstance(destination, ProgressBarLogger):
            # Otherwise the progress bar prints about sixty lines of settings above itself.
            destination.hparams_already_logged_to_console = True
    trainer.logger.log_hyperparameters(yaml.safe_load(resolved_yaml))
    if dist.get_global_rank() != 0:
        return
    for folder in filter(None, (str(log_folder), save_folder)):
        try:
            if not is_url(folder):
                Path(folder).mkdir(parents=True, exist_ok=True)
            files.write(files.join(folder, "config.yaml"), resolved_yaml.encode())
        except OSError as error:
            raise ConfigError(
                f"{folder}: cannot be written to: {error.strerror}; set log_folder and save_folder"
                " to writable folders"
            ) from None
    state = trainer.state
    assert state.max_duration is not None
    if state.timestamp < state.max_duration:
        shown = resumed_from and masked(resumed_from)
        start = {
            "step": state.timestamp.batch.value,
            "resumed_from": shown,
            "devices": dist.get_world_size(),
            "time": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        }
        path = log_folder / STARTS
        with writing(path), appending(path) as starts:
            starts.write(("\n" if is_cut_short(path) else "") + json.dumps(start) + "\n")
    _print_model(state, log_folder)
    _warn_of_padding(state.model)
    if resumed_from is not None:
        time = state.timestamp
        print(
            f"resuming from {resumed_from}: step {time.batch.value:,}, epoch {time.epoch.value},"
            f" row {time.sample_in_epoch.value:,} of it, {time.token.value:,} tokens seen",
            flush=True,
        )


def _print_model(state: State, log_folder: Path) -> None:
    """Print what trains, on how many devices, and for how long."""
    assert state.max_duration is not None
    parameters, trained = count_parameters(state.model), count_trained(state.model)
    of_which = "" if trained == parameters else f" ({trained / 1e6:.2f} M of them trained)"
    print(
        f"{state.run_name}: {parameters / 1e6:.1f} M parameters{of_which} on"
        f" {dist.get_world_size()} x {state.device.name}, {state.max_duration.value:,} steps;"
        f" logs in {log_folder}",
        flush=True,
    )
    factors = {group.get("lr_factor", 1.0) for group in state.optimizers[0].param_groups}
    is_muon = isinstance(state.optimizers[0], Muon)
    who = "Muon: all but matrices in layers train" if is_muon else "muP: matrices in layers train"
    for factor in sorted(factors - {1.0}):
        print(f"{who} at {factor:.4g} times the learning rate that is logged", flush=True)


def _warn_of_padding(model: Any) -> None:
    """Warn of a token that the model takes for padding, and the tokenizer does not.

    An embedding gives its padding token no gradient. Many of transformers' config classes name one
    by default, which in another tokenizer is an ordinary token.
    """
    for module in model.modules():
        if not isinstance(module, torch.nn.Embedding) or not module.weight.requires_grad:
            continue
        token = module.padding_idx
        if token is not None and token != model.tokenizer.pad_token_id:
            log.warning(
                "warning: model.config.pad_token_id: the model takes token %s (%r) for padding, and"
                " the tokenizer does not: its embedding is never trained; for a new run, set"
                " model.config.pad_token_id=null",
                token,
                model.tokenizer.convert_ids_to_tokens(token),
            )
            return
