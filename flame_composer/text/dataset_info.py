"""LLaMA-Factory's registry of datasets, dataset_info.json, read as it is.

It is data, not code: entries that would run a script are refused.
"""

from __future__ import annotations

import difflib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from flame_composer.errors import ConfigError, one_line
from flame_composer.storage import files
from flame_composer.storage.filesystems import is_url
from flame_composer.text.examples import TAGS, Form, FormatName, form_of
from flame_composer.text.hub import address
from flame_composer.text.tokenizer import may_be_hub_id

FORMATS: dict[str, FormatName] = {
    "alpaca": "alpaca",
    "sharegpt": "sharegpt",
    "openai": "messages",
}
DEFAULT_COLUMNS = {
    "alpaca": {"prompt": "instruction", "query": "?input", "response": "output"},
    "sharegpt": {"messages": "conversations"},
    "openai": {"messages": "conversations"},
}
OFFERED = [
    "file_name",
    "hf_hub_url",
    "cloud_file_name",
    "formatting",
    "subset",
    "split",
    "columns",
    "tags",
]
# Keys that LLaMA-Factory knows and that are not offered here, with the reason.
NOT_OFFERED = {
    "ms_hub_url": "only files and datasets of the Hugging Face hub are read",
    "om_hub_url": "only files and datasets of the Hugging Face hub are read",
    "script_url": "a script that comes with data is never run",
    "ranking": "preference data is not offered",
    "folder": "it is not offered; name the files with file_name",
    "num_samples": "it is not offered: every example is taken",
}
AFTER_HF_HUB = ("ms_hub_url", "om_hub_url", "script_url")
NOT_OFFERED_COLUMNS = {
    "tools": "tool calls are not offered",
    "images": "only text is trained on",
    "videos": "only text is trained on",
    "audios": "only text is trained on",
    "chosen": "preference data is not offered",
    "rejected": "preference data is not offered",
    "kto_tag": "preference data is not offered",
}
NOT_OFFERED_TAGS = {
    "observation": "tool calls are not offered",
    "function": "tool calls are not offered",
}


class Listed(NamedTuple):
    """A dataset that a registry lists: its file, folder or address, and the form of its records.

    `folder` is that of the registry, in which the files must lie; None if they are elsewhere.
    """

    name: str
    source: str
    is_hub: bool
    form: Form
    folder: str | None = None


def read_registry(path: str, names: Sequence[str]) -> list[Listed]:
    """Return the datasets called `names` in the registry at `path`, a file or its folder.

    Raise ConfigError if there is no such registry or dataset, and for a key that is unknown or not
    offered.
    """
    file = Path(path, "dataset_info.json") if os.path.isdir(path) else Path(path)
    if not file.exists():
        raise ConfigError(
            f"registry: {file}: no such file; give LLaMA-Factory's dataset_info.json, or its folder"
        )
    try:
        content = json.loads(files.read_small(file))
    except (OSError, ValueError, RecursionError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise ConfigError(f"registry: {file}: cannot be read: {reason}") from None
    if not isinstance(content, dict):
        raise ConfigError(f"registry: {file}: must hold a JSON object with an entry per dataset")
    found = []
    for name in names:
        if name not in content:
            hint = _did_you_mean(name, content)
            raise ConfigError(f"datasets: {file} lists no {name}{hint}")
        found.append(_listed(name, content[name], file))
    return found


def _shown(value: Any) -> str:
    """Return a value of the registry as it stands there, cut where it is long."""
    return value[:100] if isinstance(value, str) else json.dumps(value)[:100]


def _did_you_mean(name: str, known: Sequence[str] | Mapping[str, Any]) -> str:
    nearest = difflib.get_close_matches(name, list(known), 1)
    listed = ", ".join(list(known)[:12])
    return f"; did you mean {nearest[0]}?" if nearest else f"; there are {listed}"


def _listed(name: str, entry: Any, file: Path) -> Listed:
    place = f"registry: {file}: {name}: "
    if not isinstance(entry, dict):
        raise ConfigError(f"{place}must be a JSON object")
    if entry.get("hf_hub_url") is not None:  # which LLaMA-Factory then takes, too
        entry = {key: value for key, value in entry.items() if key not in AFTER_HF_HUB}
    _check_keys(entry, OFFERED, NOT_OFFERED, place)
    formatting = entry.get("formatting", "alpaca")
    if not isinstance(formatting, str) or formatting not in FORMATS:
        known = " or ".join(FORMATS)
        raise ConfigError(f"{place}formatting={_shown(formatting)}: must be {known}")
    given = {kind: _section(entry, kind, place) for kind in ("columns", "tags")}
    columns = {key: value for key, value in given["columns"].items() if value is not None}
    tags = {
        key.removesuffix("_tag"): value for key, value in given["tags"].items() if value is not None
    }
    known_tags = [f"{tag}_tag" for tag in TAGS["sharegpt"]]
    for kind, refused in (("columns", NOT_OFFERED_COLUMNS), ("tags", NOT_OFFERED_TAGS)):
        for key, value in (columns if kind == "columns" else tags).items():
            if key in refused:
                full = key if kind == "columns" else f"{key}_tag"
                raise ConfigError(f"{place}{kind}.{full}={_shown(value)}: {refused[key]}")
    for key, value in given["tags"].items():
        if value is None and key.removesuffix("_tag") in NOT_OFFERED_TAGS:
            continue
        if key.removesuffix("_tag") not in TAGS["sharegpt"] or not key.endswith("_tag"):
            raise ConfigError(f"{place}tags.{key}: unknown key{_did_you_mean(key, known_tags)}")
        if value is not None and not isinstance(value, str):
            raise ConfigError(f"{place}tags.{key}={_shown(value)}: must be a string")
    # As LLaMA-Factory has it: other columns are read only if the registry names them.
    columns = columns or DEFAULT_COLUMNS[formatting]
    if formatting == "openai":
        tags = tags or TAGS["sharegpt"]
    form = form_of(FORMATS[formatting], columns, tags, place)
    source, is_hub = _source(entry, file, place)
    is_elsewhere = is_hub or is_url(source)
    return Listed(name, source, is_hub, form, None if is_elsewhere else str(file.parent))


def _check_keys(
    entry: Mapping[str, Any], offered: Sequence[str], refused: Mapping[str, str], place: str
) -> None:
    for key, value in entry.items():
        if key in refused:
            if value in (None, False):
                continue
            raise ConfigError(f"{place}{key}={_shown(value)}: {refused[key]}")
        if key not in offered:
            raise ConfigError(f"{place}{key}: unknown key{_did_you_mean(key, offered)}")


def _section(entry: Mapping[str, Any], kind: str, place: str) -> dict[str, Any]:
    section = entry.get(kind, {})
    if not isinstance(section, dict):
        raise ConfigError(f"{place}{kind}: must be a JSON object")
    return section


def _source(entry: Mapping[str, Any], file: Path, place: str) -> tuple[str, bool]:
    """Return the source of an entry, and whether it is a dataset of the Hugging Face hub."""
    for key in ("hf_hub_url", "cloud_file_name", "file_name", "subset", "split"):
        if key in entry and entry[key] is not None and not isinstance(entry[key], str):
            raise ConfigError(f"{place}{key}: must be a string")
    texts = {key: value for key, value in entry.items() if isinstance(value, str)}
    if "hf_hub_url" in texts:
        if not may_be_hub_id(texts["hf_hub_url"]):
            raise ConfigError(
                f"{place}hf_hub_url={texts['hf_hub_url']}: must be the id of a Hugging Face dataset"
            )
        subset = texts.get("subset")
        split = texts.get("split", "train")
        return address(texts["hf_hub_url"], subset, split), True
    for key in ("subset", "split"):
        if key in texts and texts[key] != "train":
            raise ConfigError(f"{place}{key}: goes with hf_hub_url; files have no {key}")
    if "cloud_file_name" in texts:
        # No path: the registry would then name files anywhere on this machine.
        if not is_url(texts["cloud_file_name"]):
            raise ConfigError(
                f"{place}cloud_file_name={texts['cloud_file_name']}: must be a URL like"
                " s3://bucket/file; files beside the registry are file_name"
            )
        return texts["cloud_file_name"], False
    if "file_name" not in texts:
        raise ConfigError(f"{place}file_name: must be set, or hf_hub_url")
    path = os.path.normpath(os.path.join(file.parent, texts["file_name"]))
    require_inside(path, str(file.parent), f"{place}file_name={texts['file_name'][:200]}")
    return path, False


def require_inside(path: str, folder: str, place: str) -> None:
    """Raise ConfigError, which begins with `place`, if a path leads out of a registry's folder."""
    try:
        is_inside = os.path.realpath(path).startswith(os.path.join(os.path.realpath(folder), ""))
    except ValueError as error:  # a name with NUL, or with half of a surrogate pair
        raise ConfigError(f"{place}: is no name of a file: {one_line(error)}") from None
    if not is_inside:
        raise ConfigError(
            f"{place}: must lie inside the registry's folder; give what lies elsewhere as source"
        )
