"""The algorithms, callbacks and loggers that a run may name, and reasons for those it may not.

This module imports neither torch nor composer, so that an unknown name is refused in well under a
second. The arguments of each are read from its class's signature (`train/extensions.py`).
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from flame_composer.config import other_names
from flame_composer.config.fields import nearest
from flame_composer.config.rules import DURATION, require

ALGORITHMS: Mapping[str, str] = MappingProxyType(
    {
        "ema": (
            "Evaluates and exports an exponential moving average of the weights instead of the"
            " weights themselves."
        ),
        "swa": (
            "Replaces the weights near the end of the run by the average of those so far"
            " (stochastic weight averaging)."
        ),
        "label_smoothing": (
            "Trains on labels mixed with the uniform distribution; evaluation uses the labels"
            " unchanged."
        ),
        "seq_length_warmup": (
            "Cuts rows to fewer tokens at the beginning of the run; num_tokens in the log counts"
            " whole rows."
        ),
        "layer_freezing": ("Stops training the first layers, and more of them as the run goes on."),
    }
)
CALLBACKS: Mapping[str, str] = MappingProxyType(
    {
        "speed_monitor": (
            "Logs batches, rows, tokens and FLOPs per second, and the share of the GPU's peak (MFU)"
            " where the peak is known or given."
        ),
        "lr_monitor": "Logs the learning rate of every parameter group.",
        "memory_monitor": "Logs the GPU's memory; refused where there is no GPU.",
        "optimizer_monitor": "Logs the gradient's norm, whole and by parameter, after clipping.",
        "runtime_estimator": "Logs the time that the run still takes.",
        "system_metrics_monitor": (
            "Logs the use of CPU, memory, disk and network, and of a GPU if there is one (needs"
            " pynvml)."
        ),
        "free_outputs": "Frees a batch's logits once its loss is known.",
        "early_stopper": (
            "Ends the run when the evaluation loss has not fallen by more than min_delta for longer"
            " than patience."
        ),
        "generate": (
            "Continues prompts now and then, into samples.jsonl in log_folder; with ema, by the"
            " averaged weights."
        ),
        "hf_export": (
            "Writes Hugging Face folders now and then and at the end, into log_folder/hf unless"
            " told otherwise."
        ),
        "scheduled_gc": (
            "Collects Python's garbage on all ranks at the same step, so that no rank waits for"
            " another."
        ),
    }
)
LOGGERS: Mapping[str, str] = MappingProxyType(
    {
        "file_logger": (
            "Writes every metric as a line of text, in log_folder; a resumed run goes on in the"
            " same file."
        ),
        "mlflow_logger": (
            "Logs metrics and settings to MLflow (extra mlflow); a resumed run, known by its"
            " run_name, goes on as the same one."
        ),
    }
)
OFFERED = MappingProxyType({"algorithms": ALGORITHMS, "callbacks": CALLBACKS, "loggers": LOGGERS})

_IMAGES = "is for images"
_ACCOUNT = (
    "needs an account of its service, and is not tested here; set wandb.project, or"
    " loggers.file_logger={}"
)
REFUSED: Mapping[str, Mapping[str, str]] = MappingProxyType(
    {
        "algorithms": {
            "gradient_clipping": "set optimizer.grad_clip_norm instead",
            **dict.fromkeys(
                (
                    "aug_mix blur_pool channels_last col_out cut_mix cut_out "
                    "ghost_batch_norm mix_up progressive_resizing rand_augment "
                    "squeeze_excite stochastic_depth weight_standardization"
                ).split(),
                _IMAGES,
            ),
            "alibi": (
                "gives positions to the attention of GPT-2 and BERT; neither GLA nor Llama has a"
                " place for it"
            ),
            "factorize": "changes layers, so that the model is none of Hugging Face's any more",
            "gated_linear_units": "is for BERT; GLA and Llama have gated linear units",
            "gyro_dropout": "replaces torch.nn.Dropout, which these models do not have",
            "low_precision_layer_norm": (
                "replaces torch.nn.LayerNorm; the norms of GLA and Llama are RMSNorm"
            ),
            "low_precision_group_norm": (
                "replaces torch.nn.GroupNorm, which these models do not have"
            ),
            "no_op_model": "replaces the model by one that does nothing",
            "sam": (
                "cannot be resumed, as Composer itself warns: what it makes of the optimizer does"
                " not fit the checkpoint"
            ),
            "selective_backprop": "is for batches of one input and one label a sample",
        },
        "callbacks": {
            "checkpoint_saver": (
                "set save_folder, save_interval and save_num_checkpoints_to_keep instead"
            ),
            "load_checkpoint": (
                "set model.pretrained to start from weights; a run goes on from its checkpoints by"
                " itself"
            ),
            "export_for_inference_callback": "set callbacks.hf_export={} instead",
            "nan_monitor": "set on_nan instead",
            "threshold_stopper": "set callbacks.early_stopper instead",
            "activation_monitor": "is not offered: it has not been tried with fla's layers",
            "image_visualizer": _IMAGES,
            "memory_snapshot": (
                "is not offered: it is for looking into PyTorch's allocator on a GPU"
            ),
            "oom_observer": "is not offered: it is for looking into PyTorch's allocator on a GPU",
            "ml_perf_callback": "is for submissions to MLPerf",
        },
        "loggers": {
            "wandb_logger": "set wandb.project instead",
            "tensorboard_logger": "set tensorboard=true instead",
            "progress_bar_logger": "set progress_bar instead",
            "console_logger": (
                "is not offered: a run prints lines of its own; set loggers.file_logger={} to have"
                " all metrics"
            ),
            "in_memory_logger": (
                "keeps every metric in memory for the whole run; set loggers.file_logger={} instead"
            ),
            "remote_uploader_downloader": "set save_folder=s3://... instead",
            **dict.fromkeys(
                ("comet_ml_logger", "neptune_logger", "slack_logger", "mosaic_ml_logger"), _ACCOUNT
            ),
        },
    }
)

# Callbacks that only hand metrics to loggers, and would do nothing without one.
ONLY_LOGS = (
    "speed_monitor lr_monitor memory_monitor "
    "optimizer_monitor runtime_estimator system_metrics_monitor"
).split()
# Extensions that need every parameter whole, and not sharded.
NEEDS_WHOLE_PARAMETERS = ("ema", "swa", "layer_freezing", "generate", "hf_export")


def spelled_alike(name: str) -> str:
    """Return a form of `name` that all its spellings share: MixUp is mixup or mix_up."""
    return name.replace("_", "").lower()


def check_names(section: str, given: Mapping[str, Any]) -> None:
    """Raise InvalidField for a name that is not offered, or holds anything but arguments."""
    for name, arguments in given.items():
        key = f"{section}.{name}"
        alike = {spelled_alike(refused): reason for refused, reason in REFUSED[section].items()}
        require(spelled_alike(name) not in alike, key, alike.get(spelled_alike(name), ""))
        require(
            name in OFFERED[section],
            key,
            f"there is no such {section[:-1]}{_remedy(section, name)}",
        )
        require(
            arguments is None or arguments is False or isinstance(arguments, dict),
            key,
            "must hold its arguments, or be null for the defaults, or false to leave it out",
        )


def _remedy(section: str, name: str) -> str:
    if meant := other_names.EXTENSIONS.get(f"{section}.{name}"):
        return f"; {meant}"
    for other, names in OFFERED.items():
        if name in names:
            return f"; did you mean {other}.{name}?"
    close = nearest(name, list(OFFERED[section])).replace("mean ", f"mean {section}.")
    return close or f"; there are {', '.join(OFFERED[section])}"


def whole_batches(name: str, text: str) -> int:
    """Return 100 for 100ba, and raise ValueError for a duration that is not in batches."""
    match = DURATION.fullmatch(text)
    count = int(match[1]) if match is not None and match[2] == "ba" else 0
    if count < 1:
        raise ValueError(f"{name}={text}: must be a whole number of batches, e.g. 100ba")
    return count


def in_use(given: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Return the arguments of each name that is not left out."""
    return {name: arguments or {} for name, arguments in given.items() if arguments is not False}
