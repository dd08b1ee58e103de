"""The model: any fla or Hugging Face causal language model, as Composer trains it."""

from __future__ import annotations

import contextlib
import copy
import functools
import inspect
import math
import re
import types
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from composer.metrics.nlp import LanguageCrossEntropy, LanguagePerplexity
from composer.models import HuggingFaceModel, huggingface
from huggingface_hub import snapshot_download
from transformers import (
    AutoModelForCausalLM,
    GenerationMixin,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.utils import logging as hf_logging

from flame_composer import cpu
from flame_composer.batch import IGNORE
from flame_composer.config.fields import nearest
from flame_composer.config.sections import ModelConfig
from flame_composer.config.written import quote_it
from flame_composer.cpu.linear import through_onednn
from flame_composer.errors import ConfigError, InvalidField, one_line
from flame_composer.model.foreign import (
    INDEX,
    plain_keys,
    read_json,
    require_size,
    stored_shapes,
    warn_left_out,
)
from flame_composer.text.counts import MOST_PARTS, is_beyond_any_model, require_counts
from flame_composer.text.tokenizer import may_be_hub_id

# Keys every model understands, though its own signature may leave them to the base class.
_COMMON_KEYS = ("bos_token_id", "eos_token_id", "pad_token_id", "tie_word_embeddings", "use_cache")

# What numbers must be, by the names of their keys: not every model looks at them before it
# computes.
_RULES: tuple[tuple[str, Callable[[float], bool], str], ...] = (
    (
        r"(hidden|intermediate|vocab)_size|num_(\w+_)?(heads|layers)|n_(embd|head|inner|layer|positions)|sliding_window",
        lambda value: value >= 1,
        "must be 1 or more",
    ),
    (
        r"(\w+_)?(eps|epsilon)|rope_theta|expand_[kv]|hidden_ratio",
        lambda value: value > 0,
        "must be more than 0",
    ),
    (r"(\w+_)?(dropout|pdrop)", lambda value: 0 <= value < 1, "must be in [0, 1)"),
    (
        r"clamp_min",
        lambda value: value <= 0,
        "must be 0 or less: it is the least logarithm of a gate",
    ),
)

# fla models whose layers take no borders of documents: their state runs on across them, most
# without a word.
_WITHOUT_VARLEN = ("abc", "lightnet", "linear_attn", "mamba", "mamba2", "samba")


def build_hf_config(
    model_config: dict[str, Any],
    tokenizer: PreTrainedTokenizerFast | None,
    context_length: int | None,
    *,
    to_run: bool = True,
    read_back: bool = False,
) -> PretrainedConfig:
    """The Hugging Face config with these keys; vocabulary, special tokens and context length are
    filled in if not given.

    Unlike transformers, which takes any key, this raises InvalidField for one the model's config
    class does not have, for a value of another type, for a vocabulary smaller than the tokenizer's,
    and, unless the model is only to be looked at, for one that this machine cannot run. Without a
    tokenizer `vocab_size` must be given.

    `read_back`: transformers wrote these keys, some of which hold null where the class has a number
    by default. Whether its numbers are sensible is then seen by the weights.
    """
    cpu.enable()
    keys = dict(model_config)
    model_type = keys.pop("model_type")
    if not isinstance(model_type, str) or model_type not in CONFIG_MAPPING:
        close = (
            nearest(str(model_type), sorted(CONFIG_MAPPING))
            if model_type
            else "; give gla, for example"
        )
        raise InvalidField(
            "model.config.model_type", f"neither fla nor transformers has such a model{close}"
        )
    config_class = CONFIG_MAPPING[model_type]
    parameters = inspect.signature(config_class.__init__).parameters
    known = known_keys(config_class)
    hints = typing.get_type_hints(config_class.__init__)
    for key, value in keys.items():
        # Which may be lists, whatever the hint says
        if read_back and (key not in hints or key.endswith("_token_id")):
            continue
        if key not in known:
            close = nearest(key, known).replace("mean ", "mean model.config.")
            raise InvalidField(
                f"model.config.{key}", f"unknown key of {config_class.__name__}{close}"
            )
        hint = hints.get(key) or _type_of_default(parameters.get(key))
        if not _is_a(value, hint):
            raise InvalidField(
                f"model.config.{key}",
                f"must be {_type_name(hint)}{quote_it(value, _is_a('text', hint))}",
            )
    if tokenizer is not None:
        keys.setdefault("vocab_size", len(tokenizer))
        keys.setdefault("bos_token_id", tokenizer.bos_token_id)
        keys.setdefault("eos_token_id", tokenizer.eos_token_id)
    # GPT-2: n_positions
    positions = config_class.attribute_map.get("max_position_embeddings", "max_position_embeddings")
    if positions in parameters and context_length is not None:
        keys.setdefault(positions, context_length)
    for key, value in () if read_back else keys.items():
        for pattern, holds, message in _RULES:
            is_number = isinstance(value, int | float) and re.fullmatch(pattern, key)
            if is_number and not (abs(value) < math.inf and holds(value)):
                raise InvalidField(f"model.config.{key}", message)
    for key, value in () if read_back else keys.items():
        if is_beyond_any_model({key: value}):
            raise InvalidField(
                f"model.config.{key}", f"must be {MOST_PARTS:,} at most: no model has more"
            )
    if tokenizer is not None and keys["vocab_size"] < len(tokenizer):
        raise InvalidField(
            "model.config.vocab_size", f"must be at least the tokenizer's {len(tokenizer)} tokens"
        )
    try:
        hf_config = config_class(**keys)
    except Exception as error:  # whatever the numbers make that class's own code raise
        raise ConfigError(
            f"model.config: {config_class.__name__} refuses it: {_in_one_line(error)}"
        ) from None
    if to_run and (missing := _missing_here(hf_config)):
        raise InvalidField(f"model.config.{missing[0]}", missing[1])
    return hf_config


def known_keys(config_class: type[PretrainedConfig]) -> list[str]:
    """Return the keys that a model's config class and this package know of."""
    return sorted(
        {*inspect.signature(config_class.__init__).parameters, *_COMMON_KEYS} - {"self", "kwargs"}
    )


def read_back_hf_config(content: Any, place: str) -> PretrainedConfig:
    """Return the config that transformers once wrote to `place`, a checkpoint or a config.json, of
    known plain keys only.

    Nothing that it names is looked up or run: code, kernels, another repository, other files of
    weights. Raise ConfigError if it is of no causal language model that fla or transformers has, or
    if its weights are quantized.
    """
    cpu.enable()
    model_type = content.get("model_type") if isinstance(content, dict) else None
    config_class: Any = (
        CONFIG_MAPPING[model_type]
        if isinstance(model_type, str) and model_type in CONFIG_MAPPING
        else None
    )
    if config_class not in AutoModelForCausalLM._model_mapping:
        raise ConfigError(
            f"{place}: its model_type {str(model_type)[:60]!r} is that of no causal language model"
            " of fla or transformers, and no code that comes with a model is run; convert it to"
            " one that is"
        )
    assert isinstance(content, dict)
    if content.get("quantization_config"):
        raise ConfigError(f"{place}: its weights are quantized; give the model they were made from")
    require_counts(content, place)
    try:
        known = [*known_keys(config_class), *config_class.attribute_map]
        keys = {"model_type": model_type, **plain_keys(content, known)}
        hf_config = build_hf_config(keys, None, None, to_run=False, read_back=True)
    except (ConfigError, RecursionError) as error:
        raise ConfigError(f"{place}: {one_line(error).removeprefix('model.config: ')}") from None
    warn_left_out(content, hf_config, place)
    return hf_config


def _missing_here(hf_config: PretrainedConfig) -> tuple[str, str] | None:
    return None if torch.cuda.is_available() else cpu.missing(hf_config)


def check_runs_here(hf_config: PretrainedConfig, place: str) -> None:
    """Raises ConfigError for weights, at `place`, of a model that this machine cannot run."""
    if missing := _missing_here(hf_config):
        raise ConfigError(f"{place}: {missing[0]} of its config: {missing[1]}")


def new_hf_config(
    config: ModelConfig, tokenizer: PreTrainedTokenizerFast, context_length: int
) -> PretrainedConfig | None:
    """That of a new model; None for one that comes with its own, from `config.pretrained`."""
    return None if config.pretrained else build_hf_config(config.config, tokenizer, context_length)


def build_model(hf_config: PretrainedConfig) -> PreTrainedModel:
    """A freshly initialised causal language model; seed torch first.

    Raises ConfigError if the config's numbers do not make a model (head counts that do not divide,
    say).
    """
    cpu.enable()
    heads, kv_heads = (
        getattr(hf_config, f"num_{name}_heads", None) for name in ("attention", "key_value")
    )
    if heads and kv_heads and heads % kv_heads:  # not seen by transformers until the first batch
        raise InvalidField(
            "model.config.num_key_value_heads", f"must divide num_attention_heads={heads}"
        )
    # Nor this
    if (
        heads
        and hasattr(hf_config, "rope_theta")
        and getattr(hf_config, "partial_rotary_factor", 1) == 1
    ):
        size = getattr(hf_config, "head_dim", None) or hf_config.hidden_size // heads
        if size % 2:
            raise InvalidField(
                "model.config.num_attention_heads",
                f"makes heads of {size}, which is odd: RoPE turns pairs",
            )
    try:
        model = AutoModelForCausalLM.from_config(hf_config, trust_remote_code=False)
        through_onednn(model)
        return model
    except Exception as error:  # whatever the config's values make the model's own code raise
        raise ConfigError(
            f"model.config: no {hf_config.model_type} model can be built from it:"
            f" {_in_one_line(error)}"
        ) from None


def meta_model(hf_config: PretrainedConfig) -> PreTrainedModel:
    """The model without memory for its weights: names, shapes and modules."""
    cpu.enable()
    with torch.device("meta"):
        return build_model(hf_config)


def read_pretrained_config(path_or_id: str) -> PretrainedConfig:
    """Return the config in a Hugging Face folder or under a hub id, as `read_back_hf_config`
    takes it.
    """
    folder = _folder_of(path_or_id, ["config.json"])
    return read_back_hf_config(read_json(folder / "config.json"), str(folder / "config.json"))


def load_pretrained(path_or_id: str) -> PreTrainedModel:
    """A causal language model with its weights, in fp32, from a Hugging Face folder or id; no code
    of its is run.

    Raises ConfigError if there is none, or if its weights do not fill the model exactly.
    """
    try:
        folder = _folder_of(
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
    except Exception as error:  # whatever a damaged folder makes transformers or safetensors raise
        raise _not_loaded(path_or_id, error) from None
    model, report = loaded
    wrong = {kind: sorted(map(str, names)) for kind, names in report.items() if names}
    if wrong:
        listed = "; ".join(
            f"{kind.replace('_', ' ')}: {', '.join(names[:3])}{' ...' if len(names) > 3 else ''}"
            for kind, names in wrong.items()
        )
        raise ConfigError(
            f"{path_or_id}: its weights are not those of a {model.config.model_type} model:"
            f" {listed}"
        )
    through_onednn(model)
    return model


@contextlib.contextmanager
def _no_code_of_its_own() -> typing.Iterator[None]:
    """Keep transformers from running `custom_generate/generate.py` of a model's folder.

    Up to 4.57 at least, it trusts what lies in a local folder, `trust_remote_code=False` or not.
    """

    def none(*_: Any, **__: Any) -> None:
        raise OSError("code that comes with a model is never run")

    loads = GenerationMixin.load_custom_generate
    GenerationMixin.load_custom_generate = none  # type: ignore[method-assign,assignment]
    try:
        yield
    finally:
        GenerationMixin.load_custom_generate = loads  # type: ignore[method-assign]


def _folder_of(path_or_id: str, files: list[str]) -> Path:
    """Return a model's folder, or one with those `files` out of the hub's repository of that id."""
    folder = Path(path_or_id)
    if not folder.is_dir():
        if not may_be_hub_id(path_or_id):
            raise ConfigError(
                f"{path_or_id}: no such folder; give a Hugging Face model folder or id"
            )
        try:
            folder = Path(snapshot_download(path_or_id, allow_patterns=files))
        except Exception as error:  # whatever the hub or the network makes of it
            raise ConfigError(
                f"no such folder, and not to be had from the Hugging Face hub: {one_line(error)}"
            ) from None
    if not (folder / "config.json").is_file():
        raise ConfigError(f"{path_or_id}: not a Hugging Face model folder: it has no config.json")
    if (folder / "adapter_config.json").exists():
        raise ConfigError(
            f"{path_or_id}: holds an adapter (adapter_config.json), for which another "
            "model would be loaded; merge it into its model, or take that file away"
        )
    return folder


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
    """A new model of `hf_config`, or without one `config.pretrained` with its weights.

    `empty`: without memory for weights (on the meta device), for a rank that gets its share of them
    from the first.
    """
    if hf_config is None:
        assert config.pretrained is not None
        if not empty:
            model = load_pretrained(config.pretrained)
            check_agrees(model.config, config.config)
            return model
        hf_config = read_pretrained_config(config.pretrained)
    with torch.device("meta") if empty else contextlib.nullcontext():
        return build_model(hf_config)


def check_agrees(hf_config: PretrainedConfig, model_config: dict[str, Any]) -> None:
    """Raises InvalidField where `model_config` says something else than the config of the
    weights that were loaded.
    """
    for key, value in model_config.items():
        has = getattr(hf_config, key, None)
        if has != value:
            raise InvalidField(
                f"model.config.{key}",
                f"model.pretrained has {has}; leave the key out, or give that value",
            )


class CausalLM(HuggingFaceModel):
    """A causal language model under Composer, fed with batches of
    `flame_composer.batch.collate`.

    With `varlen`, attention state never crosses documents: an fla model gets the rows end to end as
    [1, B * T] with the documents' borders as `cu_seqlens` (its kernels take those for batch 1
    only); another model gets `position_ids` that start anew at every document, from which
    transformers derives a block-diagonal mask.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, *, varlen: bool):
        """Raises InvalidField for `varlen` with a model that cannot keep documents apart."""
        self.is_fla = type(model).__module__.startswith("fla.")
        if varlen and self.is_fla and model.config.model_type in _WITHOUT_VARLEN:
            raise InvalidField(
                "varlen",
                f"fla's {model.config.model_type} cannot keep documents apart; set varlen=false to "
                "let its state run on across the documents of a row",
            )
        with _known_as_causal():
            super().__init__(
                model=model,
                tokenizer=tokenizer,
                use_logits=True,
                shift_labels=True,
                eval_metrics=[LanguageCrossEntropy(), LanguagePerplexity()],
            )
        blocks = set(model._no_split_modules or ())
        # Composer asks the model's direct children: each block is gathered, and recomputed, by
        # itself.
        is_block: Any = lambda module: type(module).__name__ in blocks  # noqa: E731
        model.fsdp_wrap_fn = model.activation_checkpointing_fn = is_block
        self.varlen = varlen
        self.label_smoothing = 0.0  # of the loss that is trained on; see algorithms.LabelSmoothing
        self.work = count_work(model)

    def get_metadata(self) -> dict[str, Any]:
        """Return the config and the tokenizer's files, as a checkpoint holds them.

        Of several chat templates transformers makes a folder, which Composer 0.32 refuses: they go
        into the tokenizer's config instead, where both find them again.
        """
        tokenizer: Any = self.tokenizer
        if not isinstance(tokenizer.chat_template, dict):
            return super().get_metadata()
        saved: Any = copy.copy(tokenizer)
        saved.save_pretrained = functools.partial(tokenizer.save_pretrained, save_jinja_files=False)
        self.tokenizer = saved
        try:
            return super().get_metadata()
        finally:
            self.tokenizer = tokenizer

    def flops_per_batch(self, batch: dict[str, torch.Tensor]) -> int:
        """Of a training step on this batch: what utilisation (MFU) goes by, as does
        recipes/plan.py.
        """
        return self.work.flops_per_token(batch["input_ids"].shape[1]) * batch["input_ids"].numel()

    def forward(self, batch: dict[str, torch.Tensor]) -> Any:
        """Logits [B, T, V], and the mean loss over labels that are not -100 if the batch has
        labels; 0 if all of them are.

        `input_ids`, `labels` and `sequence_id` (the document's number in its row) are [B, T]. A
        row's first label is always -100, so that no row is asked to predict the next one's first
        token when rows are laid end to end.
        """
        input_ids, labels = batch["input_ids"], batch.get("labels")
        smoothing = self.label_smoothing if self.training else 0.0
        is_void = labels is not None and not (labels[:, 1:] != IGNORE).any()
        # The mean over nothing is no number, and nor is its gradient
        if labels is not None and is_void:
            labels = torch.cat([labels[:, :-1], input_ids[:, -1:]], dim=1)
        inputs: dict[str, Any] = {
            "input_ids": input_ids,
            "labels": None if smoothing else labels,
            "use_cache": False,
        }
        if self.varlen and self.is_fla:
            inputs["input_ids"] = input_ids.reshape(1, -1)
            inputs["labels"] = None if inputs["labels"] is None else inputs["labels"].reshape(1, -1)
            inputs["cu_seqlens"] = cumulative_lengths(batch["sequence_id"])
        elif self.varlen:
            inputs["position_ids"] = positions(batch["sequence_id"])
        outputs = self.model(**inputs)
        if outputs.logits is not None:
            outputs.logits = outputs.logits.reshape(*input_ids.shape, -1)
        if smoothing and labels is not None:
            assert outputs.logits is not None
            outputs["loss"] = F.cross_entropy(
                outputs.logits[:, :-1].flatten(0, 1),
                labels[:, 1:].flatten(),
                ignore_index=IGNORE,
                label_smoothing=smoothing,
            )
        if is_void:
            outputs["loss"] = typing.cast(torch.Tensor, outputs["loss"]) * 0
        return outputs


@contextlib.contextmanager
def _known_as_causal() -> typing.Iterator[None]:
    """Composer asks of every model whether transformers knows its class, and imports the 139 it
    knows to find out: 2 s.
    """
    asked = huggingface._is_registered_causal_lm
    huggingface._is_registered_causal_lm = lambda model: True  # noqa: ARG005
    try:
        yield
    finally:
        huggingface._is_registered_causal_lm = asked


class Work(NamedTuple):
    """What a model does with a token."""

    multiplied: int  # parameters: all but an input embedding that is not the output's as well
    # Of attention with scores between all tokens, in each block; 0 where there is none
    softmax_heads: int
    head_dim: int
    num_blocks: int

    def flops_per_token(self, context_length: int) -> int:
        """Forward and backward: six for each parameter that is multiplied, twelve for each of the
        scores' channels.

        Chowdhery et al. 2022, appendix B. What linear attention does beside its projections is left
        out, as is what activation checkpointing computes twice: MFU counts neither.
        """
        return (
            6 * self.multiplied
            + 12 * self.num_blocks * self.softmax_heads * self.head_dim * context_length
        )


def count_work(model: PreTrainedModel) -> Work:
    embedding, output = model.get_input_embeddings(), model.get_output_embeddings()
    is_shared = output is not None and embedding.weight is output.weight  # type: ignore[union-attr]
    unused = 0 if is_shared else typing.cast(torch.Tensor, embedding.weight).numel()
    shape = model.config.get_text_config()
    heads = getattr(
        shape, "num_heads" if shape.model_type == "transformer" else "num_attention_heads", 0
    )
    blocks = set(model._no_split_modules or ())
    return Work(
        multiplied=sum(parameter.numel() for parameter in model.parameters()) - unused,
        softmax_heads=heads,
        head_dim=(getattr(shape, "head_dim", None) or shape.hidden_size // heads) if heads else 0,
        num_blocks=sum(type(module).__name__ in blocks for module in model.modules()),
    )


def check_microbatch_size(size: int | str) -> None:
    """Raises InvalidField for `auto` on a machine without a GPU, where lack of memory ends the
    process.
    """
    if size == "auto" and not torch.cuda.is_available():
        raise InvalidField(
            "microbatch_size",
            "there is no GPU here, whose memory could be tried out; give a number of rows",
        )


def _starts(sequence_id: torch.Tensor) -> torch.Tensor:
    starts = torch.ones_like(sequence_id, dtype=torch.bool)
    starts[:, 1:] = sequence_id[:, 1:] != sequence_id[:, :-1]
    return starts


def cumulative_lengths(sequence_id: torch.Tensor) -> torch.Tensor:
    """Offsets [num_documents + 1] of the documents when the rows of `sequence_id` [B, T] are
    laid end to end.
    """
    offsets = _starts(sequence_id).flatten().nonzero().flatten()
    return torch.cat([offsets, offsets.new_tensor([sequence_id.numel()])])


def positions(sequence_id: torch.Tensor) -> torch.Tensor:
    """Each token's place in its document, [B, T]."""
    index = torch.arange(sequence_id.shape[1], device=sequence_id.device).expand_as(sequence_id)
    return index - torch.where(_starts(sequence_id), index, 0).cummax(dim=1).values


@contextlib.contextmanager
def quiet() -> typing.Iterator[None]:
    """Without transformers' own warnings, where ours say what is to be said."""
    level = hf_logging.get_verbosity()
    hf_logging.set_verbosity_error()
    try:
        yield
    finally:
        hf_logging.set_verbosity(level)


def _in_one_line(error: Exception) -> str:
    return f"unknown value {one_line(error)}" if isinstance(error, KeyError) else one_line(error)


def _type_of_default(parameter: inspect.Parameter | None) -> type | None:
    """The type a parameter without annotation must have: its default's, but for token ids, which
    may be null or lists.
    """
    if (
        parameter is None
        or parameter.name.endswith("_token_id")
        or type(parameter.default) not in (int, float, bool, str)
    ):
        return None
    return type(parameter.default)


def _is_a(value: Any, hint: Any) -> bool:
    """Whether `value` is of a plain annotated type; anything more intricate passes."""
    plain = _plain_types(hint)
    if plain is None:
        return True
    if isinstance(value, bool):
        return bool in plain
    return isinstance(value, tuple(plain)) or (float in plain and isinstance(value, int))


def _plain_types(hint: Any) -> list[type] | None:
    options = (
        typing.get_args(hint)
        if isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union
        else (hint,)
    )
    plain = [option for option in options if option in (int, float, bool, str, type(None))]
    return plain if len(plain) == len(options) else None


def _type_name(hint: Any) -> str:
    return (hint.__name__ if isinstance(hint, type) else str(hint)).replace("None", "null")
