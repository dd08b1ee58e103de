"""Parts of a checkpoint's content: found by their path, or said to be missing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from flame_composer.checkpoint import sharded
from flame_composer.errors import DataError

Shapes = Mapping[str, tuple[int, ...]]


class OtherRun(DataError):
    """A whole checkpoint, but not of this run: of another model, or another optimizer."""


class Needed(NamedTuple):
    """What a run's checkpoints hold: the shapes of its weights, and an optimizer's state of those
    it trains.

    A weight with several names (a tied embedding) has its state under one of them. `settings` are
    those of the optimizer's groups, by whether it is of matrices: the ones in a checkpoint take the
    place of a run's own. `kinds` are the others that its groups have, as examples of their types.

    `skips_steps`: the optimizer may have taken fewer steps than the clock has. `other_order`: the
    rows may have been in another order than the checkpoint says.
    """

    weights: Shapes
    trained: Sequence[tuple[str, ...]]
    optimizer: str
    settings: Mapping[bool, Mapping[str, Any]]
    kinds: Mapping[str, Any]
    skips_steps: bool
    other_order: bool


class Lack(Exception):
    pass


class Other(Exception):
    pass


def part_at(tree: Any, kind: Any, *path: str) -> Any:
    """Return what is at `path`; raise _Lack if nothing is, or something that is no `kind`."""
    for depth, name in enumerate(path, 1):
        if not isinstance(tree, dict) or name not in tree:
            raise Lack(f"it has no {'.'.join(path[:depth])}")
        tree = tree[name]
    if not isinstance(tree, kind) or (isinstance(tree, bool) and kind is not bool):
        raise Lack(f"its {'.'.join(path)} is a {type(tree).__name__}")
    return tree


def parts_of(content: Any) -> tuple[list[Any], list[Any]]:
    """Return weights and optimizer state, each from all pieces, or of one that is not in pieces."""
    if not isinstance(content, dict):
        raise Lack(f"it holds a {type(content).__name__}")
    state = part_at(content, dict, "state")
    sources = content.get("pieces", [state])
    for source in sources:
        for kind in ("model", "optimizers"):
            part_at(source, dict, kind)
    return [source["model"] for source in sources], [source["optimizers"] for source in sources]


def shapes_of(parts: list[Any], path: str) -> dict[str, tuple[int, ...]]:
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
