"""Parts of a checkpoint's content, found by their path or reported as missing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from flame_composer.checkpoint import sharded
from flame_composer.errors import DataError

Shapes = Mapping[str, tuple[int, ...]]


class OtherRun(DataError):
    """A whole checkpoint of another run: of another model, or another optimizer."""


class Needed(NamedTuple):
    """The content of a run's checkpoints: its weights' shapes and its optimizer's state.

    A weight with several names (a tied embedding) has its state under one of them: each entry of
    `trained` is the names of one weight that is trained. `settings` are those of the optimizer's
    groups, by whether they are of matrices; settings in a checkpoint would replace a run's own.
    `kinds` are the other settings of the groups, as examples of their types.

    `skips_steps` says that the optimizer may have taken fewer steps than the clock counts,
    `other_order` that the rows may have been in another order than the checkpoint says.
    """

    weights: Shapes
    trained: Sequence[tuple[str, ...]]
    optimizer: str
    settings: Mapping[bool, Mapping[str, Any]]
    kinds: Mapping[str, Any]
    skips_steps: bool
    other_order: bool


class Lack(Exception):
    """Something that a checkpoint lacks, or that cannot be used."""


class Other(Exception):
    """A difference by which a checkpoint belongs to another run."""


def part_at(tree: Any, kind: Any, *path: str) -> Any:
    """Return what is at `path`; raise Lack if there is nothing, or it is not of the type `kind`."""
    for depth, name in enumerate(path, 1):
        if not isinstance(tree, dict) or name not in tree:
            raise Lack(f"it has no {'.'.join(path[:depth])}")
        tree = tree[name]
    if not isinstance(tree, kind) or (isinstance(tree, bool) and kind is not bool):
        raise Lack(f"its {'.'.join(path)} is a {type(tree).__name__}")
    return tree


def parts_of(content: Any) -> tuple[list[Any], list[Any]]:
    """Return the weights and the optimizer state of each piece, or of the only one."""
    if not isinstance(content, dict):
        raise Lack(f"it holds a {type(content).__name__}")
    state = part_at(content, dict, "state")
    sources = content.get("pieces", [state])
    for source in sources:
        for kind in ("model", "optimizers"):
            part_at(source, dict, kind)
    return [source["model"] for source in sources], [source["optimizers"] for source in sources]


def shapes_of(parts: list[Any], path: str) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the whole tensors that are in pieces, by name."""
    if any(part.keys() != parts[0].keys() for part in parts):
        raise Lack(f"its pieces are not of the same {path}")
    shapes = {}
    for name in parts[0]:
        shape = sharded.shape([part[name] for part in parts])
        if shape is None:
            raise Lack(f"its {path}.{name} is no whole tensor")
        shapes[name] = shape
    return shapes


NUMBER = (int, float)

PLAIN = (str, int, float, type(None))
