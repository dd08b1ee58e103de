"""The model that adapters were trained on: where it is, and a hash by which it is known again."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import NamedTuple

from flame_composer.errors import ConfigError, one_line
from flame_composer.model.foreign import INDEX, folder_of, weight_files


class Base(NamedTuple):
    """A model's place, an absolute path or a hub id, and the hash of its files."""

    place: str
    sha256: str


def _sha256(file: Path) -> str:
    """Return the hash of a file's content, of which little is in memory at a time."""
    digest = hashlib.sha256()
    with file.open("rb") as content:
        while part := content.read(1 << 20):
            digest.update(part)
    return digest.hexdigest()


def identify_base(path_or_id: str) -> Base:
    """Return the place and hash of a Hugging Face model, of which all weights are read.

    The hash is that of the lines of `sha256sum config.json *.safetensors`, in the order of names.
    It takes about a second per gigabyte or two. Raise ConfigError if there is no such model.
    """
    folder = folder_of(path_or_id, ["config.json", "model*.safetensors", INDEX])
    digest = hashlib.sha256()
    try:
        for file in sorted([folder / "config.json", *weight_files(folder)]):
            digest.update(f"{_sha256(file)}  {file.name}\n".encode())
    except OSError as error:
        raise ConfigError(f"{path_or_id}: cannot be read: {one_line(error)}") from None
    is_local = Path(path_or_id).is_dir()
    return Base(str(Path(path_or_id).resolve()) if is_local else path_or_id, digest.hexdigest())
