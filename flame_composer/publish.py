"""A model that leaves the run it was trained in: the card that says what it is, and its upload to the Hugging Face hub."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import HfApi, constants, get_token
from huggingface_hub.errors import HFValidationError
from huggingface_hub.repocard_data import ModelCardData
from huggingface_hub.utils import validate_repo_id
from transformers import PreTrainedModel

from flame_composer import storage
from flame_composer.checkpoint import average_of
from flame_composer.checkpoint_read import Checkpoint
from flame_composer.config import ConfigError, DataError, StoreError, masked, one_line
from flame_composer.manifest import read_manifest

CONFIG = "config.yaml"  # of the run, beside its checkpoints; without secrets


def read_run_config(checkpoint: Checkpoint) -> str | None:
    """The resolved configuration that lies beside a checkpoint; None where it was moved away from there."""
    folder = checkpoint.place.rpartition("/")[0] or "."
    try:
        return storage.read(storage.join(folder, CONFIG)).decode()
    except FileNotFoundError:
        return None


def model_card(
    model: PreTrainedModel, content: dict[str, Any], run_config: str | None, *, dtype: str, name: str, which: str = "auto",
    tokenization: str | None = None,
) -> str:
    """README.md of a model in `content`, a checkpoint's: what it is, how to load it, what it was trained on and how.

    `run_config` is what `read_run_config` found; `name` stands for the run's where that found nothing; `which` are the
    weights, as in `model_in`; `tokenization` says what texts begin with.
    """
    recipe = yaml.safe_load(run_config) if run_config else {}
    name = recipe.get("run_name", name)
    is_fla = type(model).__module__.startswith("fla.")
    header = ModelCardData(
        library_name="transformers", pipeline_tag="text-generation", tags=["flame-composer", model.config.model_type],
        model_name=name,
    )
    parameters = sum(parameter.numel() for parameter in model.parameters())
    parts = [
        f"---\n{header.to_yaml()}\n---", f"# {name}",
        f"A {model.config.model_type} language model of {parameters:,} parameters, stored as {dtype}, pretrained with "
        "flame_composer.", _how_to_load(is_fla, tokenization),
        "## Training", _training(content, recipe, which), "## Evaluation", _evaluation(content), "## Recipe",
        f"```yaml\n{run_config.strip()}\n```" if run_config else f"No {CONFIG} lay beside the checkpoint.",
    ]
    return masked("\n\n".join(parts)) + "\n"


def _how_to_load(is_fla: bool, tokenization: str | None) -> str:
    first = "from flame_composer import cpu; cpu.enable()  # makes fla's models known to transformers, on any machine\n"
    return (
        "```python\n" + (first if is_fla else "")
        + "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        'model = AutoModelForCausalLM.from_pretrained("FOLDER or id")\n'
        'tokenizer = AutoTokenizer.from_pretrained("FOLDER or id")\n```'
        + ("\n\nOn a GPU `import fla` does as the first line." if is_fla else "")
        + (f"\n\nWith `tokenizer(text)`, {tokenization}." if tokenization else "")
    )


def _training(content: dict[str, Any], recipe: dict[str, Any], which: str) -> str:
    time = content["state"]["timestamp"]["Timestamp"]
    lines = [f"- steps: {time['batch']:,}", f"- tokens: {time['token']:,} ({time['sample']:,} rows)"]
    if average_of(content["state"]):
        lines.append("- weights: those that training went on with; what was evaluated is their exponential moving average"
                     if which == "model" else "- weights: their exponential moving average, which is what was evaluated")
    start = (recipe.get("model") or {}).get("pretrained")
    if start:
        lines.append(f"- began from the weights of: {start}")
    order = content["state"]["callbacks"].get("SameData", {}).get("order", {})
    data = recipe.get("train_data") or {}
    for key, index_sha256 in order.items():
        if not key.endswith("(index.json)"):
            continue
        stream = key.partition(".streams.")[2].removesuffix(" (index.json)")
        source = (data.get("streams") or {}).get(stream, {}) if stream else data
        place = source.get("remote") or source.get("local")
        lines.append(f"- data{stream and f' {stream}'}: {place or 'see below'}, sha256 of its index {index_sha256}"
                     + _size_of(place, index_sha256))
    return "\n".join(lines)


def _size_of(place: str | None, index_sha256: str) -> str:
    """What the dataset's manifest says, if it is still there and of this dataset."""
    if place is None or storage.is_url(place):
        return ""
    try:
        manifest = read_manifest(place)
    except (ConfigError, DataError):
        return ""
    if manifest.index_sha256 != index_sha256:
        return ""
    totals = manifest.totals
    return f" ({totals.documents:,} documents, {totals.tokens_out:,} tokens in rows of {manifest.context_length})"


def _evaluation(content: dict[str, Any]) -> str:
    """Of the run's last evaluation before the checkpoint, and the last scores in tasks."""
    callbacks = content["state"]["callbacks"]
    values = dict(callbacks.get("JsonlLog", {}).get("last_evaluation", {}))
    for task, scores in callbacks.get("TaskScores", {}).get("last", {}).items():
        values |= {f"{task} {metric}": value for metric, value in scores.items()}
    if not values:
        return "The run evaluated nothing before this checkpoint."
    return "\n".join(["Last in training:\n", *(f"- {name}: {value:.4f}" for name, value in values.items())])


def check_hub(repo: str) -> None:
    """Raises ConfigError if nothing could be uploaded to `repo`, before any work is done for it."""
    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise ConfigError(f"push_to_hub={repo}: {one_line(error)}") from None
    if not re.fullmatch(r"[^/]+/[^/]+", repo):
        raise ConfigError(f"push_to_hub={repo}: must be USER/NAME or ORGANIZATION/NAME")
    if constants.HF_HUB_OFFLINE:
        raise ConfigError(f"push_to_hub={repo}: HF_HUB_OFFLINE is set; unset it")
    if get_token() is None:
        raise ConfigError(f"push_to_hub={repo}: there is no token; run `hf auth login`, or set HF_TOKEN")
    try:
        HfApi().whoami()
    except Exception as error:  # whatever the hub or the network makes of it
        raise ConfigError(f"push_to_hub={repo}: {constants.ENDPOINT} does not take the token: {one_line(error)}") from None


def push_folder(folder: Path, repo: str, *, private: bool) -> str:
    """Uploads a folder as one commit, and returns its address. The repository is made if it is not there.

    Raises ConfigError for one that everybody can read if it is to be `private`, StoreError if the upload fails; the folder
    stays as it is.
    """
    api = HfApi()
    try:
        api.create_repo(repo, private=private, exist_ok=True)
        if private and not api.model_info(repo).private:
            raise ConfigError(f"push_to_hub={repo}: is there and public; set hub_private=false, or name another")
        commit = api.upload_folder(repo_id=repo, folder_path=folder, commit_message="Upload model")
    except ConfigError:
        raise
    except Exception as error:  # whatever the hub or the network makes of it
        raise StoreError(f"push_to_hub={repo}: {one_line(error)}; {folder} is whole: hf upload {repo} {folder}") from None
    return str(commit.commit_url)
