"""Parts of a checkpoint's content, looked up by path, and the errors for missing ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from flame_composer.checkpoint import sharded
from flame_composer.errors import DataError

Shapes = Mapping[str, tuple[int, ...]]


class OtherRun(DataError):
    """The error for a whole checkpoint of another run: its model or optimizer is another."""


class Needed(NamedTuple):
    """The content that a run needs to find in a checkpoint.

    `weights` holds the shapes of the weights by name, and `optimizer` the class name of the
    optimizer. Each entry of `trained` is the names of one trained weight: one with several names (a
    tied embedding) has its optimizer state under one of them. `settings` holds, by a parameter's
    name, the settings that the optimizer's group of it must have, because settings in a checkpoint
    would replace the run's own. `kinds` holds the groups' other settings, as examples of their
    types.

    `adapter` describes the run's adapter (`model.lora.Adapter.as_plain`); None if it trains whole
    weights. `by_muon` holds the names of the weights that Muon trains. `config` is the Hugging Face
    config of the run's model; without one, that in a checkpoint is not compared.

    `skips_steps` says that the optimizer may have taken fewer steps than the clock counts,
    `other_order` that the rows may have been in another order than the checkpoint says.
    """

    weights: Shapes
    trained: Sequence[tuple[str, ...]]
    optimizer: str
    settings: Mapping[str, Mapping[str, Any]]
    kinds: Mapping[str, Any]
    skips_steps: bool
    other_order: bool
    adapter: Mapping[str, Any] | None = None
    by_muon: frozenset[str] = frozenset()
    config: Mapping[str, Any] | None = None

    def moments(self, name: str) -> tuple[str, ...]:
        """Return the names of what the optimizer keeps of a weight's gradients."""
        return ("momentum_buffer",) if name in self.by_muon else ("exp_avg", "exp_avg_sq")


class Lack(Exception):
    """The error for a part of a checkpoint that is missing or cannot be used."""


class Other(Exception):
    """The error for a difference that shows that a checkpoint belongs to another run."""


def part_at(tree: Any, kind: Any, *path: str) -> Any:
    """Return the value at `path`; raise Lack if there is none or it is not of the type `kind`."""
    for depth, name in enumerate(path, 1):
        if not isinstance(tree, dict) or name not in tree:
            raise Lack(f"it has no {'.'.join(path[:depth])}")
        tree = tree[name]
    if not isinstance(tree, kind) or (isinstance(tree, bool) and kind is not bool):
        raise Lack(f"its {'.'.join(path)} is a {type(tree).__name__}")
    return tree


def parts_of(content: Any) -> tuple[list[Any], list[Any]]:
    """Return two lists: the weights and the optimizer states, one of each for every piece.

    A checkpoint in one file counts as one piece.
    """
    if not isinstance(content, dict):
        raise Lack(f"it holds a {type(content).__name__}")
    state = part_at(content, dict, "state")
    sources = content.get("pieces", [state])
    for source in sources:
        for kind in ("model", "optimizers"):
            part_at(source, dict, kind)
    return [source["model"] for source in sources], [source["optimizers"] for source in sources]


def shapes_of(parts: list[Any], path: str, *, all_here: bool = True) -> dict[str, tuple[int, ...]]:
    """Return the shape of each whole tensor by name; raise Lack if the pieces do not make it.

    Without `all_here`, other ranks look at the other pieces.
    """
    if any(part.keys() != parts[0].keys() for part in parts):
        raise Lack(f"its pieces are not of the same {path}")
    shapes = {}
    for name in parts[0]:
        shape = sharded.shape([part[name] for part in parts], all_here=all_here)
        if shape is None:
            raise Lack(f"its {path}.{name} is not a whole tensor")
        shapes[name] = shape
    return shapes


NUMBER = (int, float)

PLAIN = (str, int, float, type(None))
