"""Models, built from a config or loaded from a Hugging Face folder or id."""

from __future__ import annotations

import contextlib
import os
import sys
import typing
from typing import Any

import torch
from transformers import AutoModelForCausalLM, GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.utils import logging as hf_logging

from flame_composer import cpu
from flame_composer.config.sections import ModelConfig
from flame_composer.cpu.linear import through_onednn
from flame_composer.errors import ConfigError, one_line
from flame_composer.model.foreign import INDEX, folder_of, require_size, stored_shapes
from flame_composer.model.heads import require_heads
from flame_composer.model.hf_config import (
    check_agrees,
    check_runs_here,
    in_one_line,
    read_pretrained_config,
)
from flame_composer.model.mup import scale_weights
from flame_composer.model.softcap import cap_logits
from flame_composer.text.counts import require_counts
from flame_composer.upstream.triton import compile_candidates_together, drives_gpu


def enable_kernels() -> None:
    """Make fla's models run here, and their kernels compile on all cores where there is a GPU.

    Ranks of one machine share its cores. Calling it again changes nothing.
    """
    cpu.enable()
    if drives_gpu():
        ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        compile_candidates_together(max(1, len(os.sched_getaffinity(0)) // ranks))


def build_model(hf_config: PretrainedConfig) -> PreTrainedModel:
    """Return a freshly initialised causal language model; seed torch first.

    Raise ConfigError if the config's numbers do not make a model, for example if the number of
    heads is not a multiple of the number of key and value heads.
    """
    enable_kernels()
    require_heads(hf_config)
    try:
        model = AutoModelForCausalLM.from_config(hf_config, trust_remote_code=False)
        through_onednn(model)
        cap_logits(model)
        return model
    except Exception as error:  # the model's own code may raise anything for odd values
        raise ConfigError(
            f"model.config: no {hf_config.model_type} model can be built from it:"
            f" {in_one_line(error)}"
        ) from None


def meta_model(hf_config: PretrainedConfig) -> PreTrainedModel:
    """Return the model on the meta device: names, shapes and modules, but no memory for weights."""
    cpu.enable()
    with torch.device("meta"):
        return build_model(hf_config)


def load_pretrained(path_or_id: str) -> PreTrainedModel:
    """Load a causal language model, in fp32, from a Hugging Face folder or id.

    Code that comes with the model is never run. Raise ConfigError if there is no such model, or if
    its weights do not fill it exactly.
    """
    try:
        folder = folder_of(
            path_or_id, ["config.json", "generation_config.json", "model*.safetensors", INDEX]
        )
        hf_config = read_pretrained_config(str(folder))
    except ConfigError as error:
        raise _not_loaded(path_or_id, error) from None
    check_runs_here(hf_config, path_or_id)
    try:
        weights = stored_shapes(folder)
        require_counts(hf_config.to_dict(), str(folder / "config.json"), weights)
        with quiet(), _no_code_of_its_own():
            held = sum(shape.numel() for shape in weights.values())
            require_size(meta_model(hf_config), held, str(folder / "config.json"))
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                folder,
                config=hf_config,
                trust_remote_code=False,
                use_safetensors=True,
                dtype=torch.float32,
                local_files_only=True,
                output_loading_info=True,
            )
    except Exception as error:  # transformers and safetensors raise many kinds for a damaged folder
        raise _not_loaded(path_or_id, error) from None
    model, report = loaded
    wrong = {kind: sorted(map(str, names)) for kind, names in report.items() if names}
    if wrong:
        listed = "; ".join(
            f"{kind.replace('_', ' ')}: {', '.join(names[:3])}{' ...' if len(names) > 3 else ''}"
            for kind, names in wrong.items()
        )
        raise ConfigError(
            f"{path_or_id}: its weights do not fit a {model.config.model_type} model with its"
            f" config: {listed}"
        )
    through_onednn(model)
    cap_logits(model)
    return model


@contextlib.contextmanager
def _no_code_of_its_own() -> typing.Iterator[None]:
    """Keep transformers from running the `custom_generate/generate.py` in a model's folder.

    transformers (up to 4.57 at least) trusts such code even with `trust_remote_code=False`.
    """

    def none(*_: Any, **__: Any) -> None:
        raise OSError("code that comes with a model is never run")

    loads = GenerationMixin.load_custom_generate
    GenerationMixin.load_custom_generate = none  # type: ignore[method-assign,assignment]
    try:
        yield
    finally:
        GenerationMixin.load_custom_generate = loads  # type: ignore[method-assign]


def _not_loaded(path_or_id: str, error: Exception) -> ConfigError:
    reason = one_line(error)
    if reason.startswith(
        (f"{path_or_id}: no such", f"{path_or_id}: not a", f"{path_or_id}: holds an adapter")
    ):
        return ConfigError(reason)
    return ConfigError(f"{path_or_id}: cannot be loaded as a causal language model: {reason}")


def build_or_load(
    config: ModelConfig, hf_config: PretrainedConfig | None, *, empty: bool = False
) -> PreTrainedModel:
    """Build a new model from `hf_config`, or load `config.pretrained` if `hf_config` is None.

    With `empty`, the model is on the meta device and has no memory for weights: for a rank that
    receives its share of them from rank 0. The weights of a new model are scaled if
    `config.mup_base_width` is set.
    """
    if hf_config is None:
        assert config.pretrained is not None
        if not empty:
            model = load_pretrained(config.pretrained)
            check_agrees(model.config, config.config)
            return model
        hf_config = read_pretrained_config(config.pretrained)
    with torch.device("meta") if empty else contextlib.nullcontext():
        model = build_model(hf_config)
    if config.mup_base_width is not None:
        scale_weights(model, config.mup_base_width)
    return model


@contextlib.contextmanager
def quiet() -> typing.Iterator[None]:
    """Silence transformers' own warnings in the body, where our messages say what matters.

    Its progress bars, of which version 5 has one for every model, are for terminals only.
    """
    level, had_bars = hf_logging.get_verbosity(), hf_logging.is_progress_bar_enabled()
    hf_logging.set_verbosity_error()
    if not sys.stderr.isatty():
        hf_logging.disable_progress_bar()
    try:
        yield
    finally:
        hf_logging.set_verbosity(level)
        if had_bars:
            hf_logging.enable_progress_bar()
