"""The model card of an exported model, and its upload to the Hugging Face hub."""

from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import HfApi, constants, get_token
from huggingface_hub.errors import HFValidationError
from huggingface_hub.repocard_data import ModelCardData
from huggingface_hub.utils import validate_repo_id
from omegaconf.errors import OmegaConfBaseException
from transformers import PreTrainedModel

from flame_composer.checkpoint.read import Checkpoint
from flame_composer.checkpoint.to_model import average_of
from flame_composer.config.written import MAX_YAML_NODES, require_shallow
from flame_composer.dataset.index import read_header
from flame_composer.errors import ConfigError, DataError, StoreError, masked, one_line
from flame_composer.model import softcap
from flame_composer.model.lora import Adapter, endings_of
from flame_composer.model.work import count_parameters
from flame_composer.storage import files
from flame_composer.storage.filesystems import is_url
from flame_composer.upstream.omegaconf import load_yaml

CONFIG = "config.yaml"  # a run writes it beside its checkpoints, without secrets
MOST_BYTES = 1 << 20  # a larger config.yaml is not read

log = logging.getLogger(__name__)


def read_run_config(checkpoint: Checkpoint) -> str | None:
    """Return the resolved configuration beside a checkpoint, or None if there is none.

    If the file is not the configuration of a run, log a warning and return None.
    """
    path = files.join(checkpoint.place.rpartition("/")[0] or ".", CONFIG)
    there = files.stat(path)
    if there is None:
        return None
    try:
        if there.size > MOST_BYTES:
            raise ValueError(f"has {there.size:,} bytes")
        text = files.read(path, MOST_BYTES).decode()
        _recipe(text)
        return text
    except (OSError, ValueError, yaml.YAMLError, RecursionError, OmegaConfBaseException) as error:
        log.warning(
            "warning: %s: is no configuration of a run, and left out of the model card: %s",
            path,
            one_line(error),
        )
        return None


def _recipe(text: str | None) -> dict[str, Any]:
    """Return a run's configuration from its text; an empty one if the text is None.

    Raise ValueError if a section that the card needs does not hold keys and values.
    """
    # Refuse aliases that multiply: such a text is small until it is expanded.
    require_shallow(text or "")
    recipe = load_yaml(text, lambda _, value: value, MAX_YAML_NODES) if text else {}
    sections = [("the file", recipe)]
    if isinstance(recipe, dict):
        sections += [(name, recipe.get(name) or {}) for name in ("model", "train_data")]
        data = recipe.get("train_data") or {}
        streams = data.get("streams") or {} if isinstance(data, dict) else {}
        sections.append(("train_data.streams", streams))
        if isinstance(streams, dict):
            sections += [
                (f"train_data.streams.{name}", stream or {}) for name, stream in streams.items()
            ]
    for name, section in sections:
        if not isinstance(section, dict):
            raise ValueError(f"{name} must hold keys and values")
    return dict(recipe)


def _line(text: object) -> str:
    """Return a text from a checkpoint or a configuration in a form that stays on one line."""
    return " ".join(
        "".join(letter if letter.isprintable() else " " for letter in str(text)).split()
    )


def model_card(
    model: PreTrainedModel,
    content: dict[str, Any],
    run_config: str | None,
    *,
    dtype: str,
    name: str,
    which: str = "auto",
    tokenization: str | None = None,
    adapter: Adapter | None = None,
    is_merged: bool = True,
) -> str:
    """Return the README.md of a model: what it is, how to load it, and how it was trained.

    `content` is the content of the checkpoint that the model comes from. `run_config` is what
    `read_run_config` returned, and `name` the model's name if `run_config` has none. `which` says
    which weights the model has, as in `model_in`; `tokenization` says how its texts begin.
    `adapter` is the checkpoint's adapter, if it has one; without `is_merged`, the card is that of
    the adapter alone.
    """
    recipe = _recipe(run_config)
    name = _line(recipe.get("run_name") or name)
    is_fla = needs_fla(model)
    header = ModelCardData(
        library_name="transformers" if is_merged else "peft",
        pipeline_tag="text-generation",
        tags=["flame-composer", model.config.model_type],
        model_name=name,
    )
    parts = [
        f"---\n{header.to_yaml()}\n---",
        f"# {name}",
        _what_it_is(model, dtype, adapter, is_merged=is_merged),
        _how_to_load(is_fla, tokenization, None if is_merged else _load_adapter(adapter, is_fla)),
        "## Training",
        _training(content, recipe, which) + _described(adapter),
        "## Evaluation",
        _evaluation(content),
        "## Recipe",
        _fenced(run_config.strip()) if run_config else f"No {CONFIG} lay beside the checkpoint.",
    ]
    return masked("\n\n".join(parts)) + "\n"


def _fenced(text: str) -> str:
    """Return a Markdown block of YAML, fenced so that no line of the text can end it."""
    fence = "`" * max([3, *(len(run) + 1 for run in re.findall("`+", text))])
    return f"{fence}yaml\n{text}\n{fence}"


def _what_it_is(
    model: PreTrainedModel, dtype: str, adapter: Adapter | None, *, is_merged: bool
) -> str:
    kind = model.config.model_type
    if is_merged:
        how = "pretrained" if adapter is None else "tuned"
        return (
            f"A {kind} language model of {count_parameters(model):,} parameters, stored as {dtype},"
            f" {how} with flame_composer.{_capped(model)}"
        )
    return (
        f"An adapter (LoRA) for a {kind} language model, stored as {dtype}, tuned with"
        " flame_composer."
    )


def _capped(model: PreTrainedModel) -> str:
    """Return what must be known of a model whose logits flame_composer caps, and nobody else."""
    cap = getattr(model.config, softcap.KEY, None)
    if cap is None or softcap.has_its_own(type(model.config)):
        return ""
    return (
        f" Its logits are capped: {cap:g} * tanh(logits / {cap:g}). flame_composer does so by"
        f" `{softcap.KEY}` in config.json; elsewhere it must be done by hand."
    )


def _described(adapter: Adapter | None) -> str:
    """Return lines about an adapter: its base, its numbers and what it is on."""
    if adapter is None:
        return ""
    whole = ", and the embeddings whole" if adapter.train_embeddings else ""
    return (
        f"\n- adapter (LoRA): rank {adapter.rank}, alpha {adapter.alpha:g}, dropout"
        f" {adapter.dropout:g}, on {len(adapter.targets)} projections"
        f" ({_line(', '.join(endings_of(adapter.targets)))}){whole}"
        f"\n- its base: {_line(adapter.base.place)}, sha256 {_line(adapter.base.sha256)}"
    )


def needs_fla(model: object) -> bool:
    """Return whether transformers knows the model only once fla is imported."""
    return type(model).__module__.startswith("fla.")


def _load_adapter(adapter: Adapter | None, is_fla: bool) -> str:
    """Return the lines of Python that load a model and its adapter with peft."""
    assert adapter is not None
    unfused = is_fla and "down_proj" in endings_of(adapter.targets)
    return (
        "from peft import PeftModel\n"
        "\n"
        f'model = AutoModelForCausalLM.from_pretrained("{_line(adapter.base.place)}"'
        + (", fuse_swiglu=False" if unfused else "")
        + ")"
        + ("  # fused, it would pass the adapter of down_proj by\n" if unfused else "\n")
        + 'model = PeftModel.from_pretrained(model, "FOLDER or id")\n'
    )


def _how_to_load(is_fla: bool, tokenization: str | None, loads: str | None = None) -> str:
    loads = loads or '\nmodel = AutoModelForCausalLM.from_pretrained("FOLDER or id")\n'
    first = (
        "from flame_composer import cpu; cpu.enable()  # makes fla's models known to transformers,"
        " on any machine\n"
    )
    return (
        "```python\n"
        + (first if is_fla else "")
        + "from transformers import AutoModelForCausalLM, AutoTokenizer\n"
        + loads
        + 'tokenizer = AutoTokenizer.from_pretrained("FOLDER or id")\n'
        "```"
        + ("\n\nOn a GPU `import fla` does as the first line." if is_fla else "")
        + (f"\n\nWith `tokenizer(text)`, {tokenization}." if tokenization else "")
    )


def _training(content: dict[str, Any], recipe: dict[str, Any], which: str) -> str:
    try:
        time = content["state"]["timestamp"]["Timestamp"]
        lines = [
            f"- steps: {time['batch']:,}",
            f"- tokens: {time['token']:,} ({time['sample']:,} rows)",
        ]
    except (KeyError, TypeError, ValueError):
        raise DataError(
            "the checkpoint holds no steps and tokens of a run (its timestamp); take another one"
        ) from None
    if average_of(content["state"]):
        lines.append(
            "- weights: those that training went on with; what was evaluated is their exponential"
            " moving average"
            if which == "model"
            else "- weights: their exponential moving average, which is what was evaluated"
        )
    start = (recipe.get("model") or {}).get("pretrained")
    if start:
        lines.append(f"- began from the weights of: {_line(start)}")
    data = recipe.get("train_data") or {}
    for key, index_sha256 in _kept(content, "SameData", "order").items():
        if not str(key).endswith("(index.json)"):
            continue
        stream = key.partition(".streams.")[2].removesuffix(" (index.json)")
        source = ((data.get("streams") or {}).get(stream) or {}) if stream else data
        place = source.get("remote") or source.get("local")
        place = None if place is None else str(place)
        lines.append(
            _line(
                f"- data{stream and f' {stream}'}: {place or 'see below'}, sha256 of its index"
                f" {index_sha256}"
            )
            + _size_of(place, index_sha256)
        )
    return "\n".join(lines)


def _size_of(place: str | None, index_sha256: str) -> str:
    """Return the size of a dataset from its manifest, or "" if that is gone or another's."""
    if place is None or is_url(place):
        return ""
    try:
        manifest = read_header(place)
    except (ConfigError, DataError):
        return ""
    if manifest.index_sha256 != index_sha256:
        return ""
    totals = manifest.totals
    return (
        f" ({totals.documents:,} documents, {totals.tokens_out:,} tokens in rows of"
        f" {manifest.context_length})"
    )


def _evaluation(content: dict[str, Any]) -> str:
    """Return the metrics of the last evaluation before the checkpoint, and the last task scores."""
    values = _kept(content, "JsonlLog", "last_evaluation")
    for task, scores in _kept(content, "TaskScores", "last").items():
        values |= {
            f"{task} {metric}": value
            for metric, value in (scores.items() if isinstance(scores, dict) else ())
        }
    lines = [
        f"- {_line(name)}: {value:.4f}"
        for name, value in values.items()
        if isinstance(value, int | float)
    ]
    return (
        "\n".join(["Last in training:\n", *lines])
        if lines
        else "The run evaluated nothing before this checkpoint."
    )


def _kept(content: dict[str, Any], callback: str, name: str) -> dict[Any, Any]:
    """Return what a callback kept under `name` in a checkpoint; empty if it kept nothing."""
    for key in ("state", "callbacks", callback, name):
        content = content.get(key) or {} if isinstance(content, dict) else {}
    return dict(content) if isinstance(content, dict) else {}


def check_hub(repo: str) -> None:
    """Raise ConfigError if an upload to `repo` could not work; call it before the work for one."""
    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise ConfigError(f"push_to_hub={repo}: {one_line(error)}") from None
    if not re.fullmatch(r"[^/]+/[^/]+", repo):
        raise ConfigError(f"push_to_hub={repo}: must be USER/NAME or ORGANIZATION/NAME")
    if constants.HF_HUB_OFFLINE:
        raise ConfigError(f"push_to_hub={repo}: HF_HUB_OFFLINE is set; unset it")
    if get_token() is None:
        raise ConfigError(
            f"push_to_hub={repo}: there is no token; run `hf auth login`, or set HF_TOKEN"
        )
    try:
        HfApi().whoami()
    except Exception as error:  # the hub and the network raise errors of any kind
        raise ConfigError(
            f"push_to_hub={repo}: {constants.ENDPOINT} does not take the token: {one_line(error)}"
        ) from None


def push_folder(folder: Path, repo: str, *, private: bool) -> str:
    """Upload a folder as one commit, and return the commit's address.

    The repository is made if it does not exist. Raise ConfigError if it is to be `private` and is
    public, and StoreError if the upload fails; the folder is kept.
    """
    api = HfApi()
    try:
        api.create_repo(repo, private=private, exist_ok=True)
        if private and not api.model_info(repo).private:
            raise ConfigError(
                f"push_to_hub={repo}: exists and is public; set hub_private=false, or name another"
            )
        commit = api.upload_folder(repo_id=repo, folder_path=folder, commit_message="Upload model")
    except ConfigError:
        raise
    except Exception as error:  # the hub and the network raise errors of any kind
        raise StoreError(
            f"push_to_hub={repo}: {one_line(error)}; {folder} is whole: hf upload {repo} {folder}"
        ) from None
    return str(commit.commit_url)
