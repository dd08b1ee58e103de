"""The states that a model carries from token to token, as rows that join and leave.

In a linear attention model, what is kept of a text has a fixed size. The states of many texts of
any length are rows of the same tensors, and one forward pass writes a token of each.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedModel

from flame_composer.cpu.enable import find
from flame_composer.cpu.linear import pack
from flame_composer.errors import ConfigError, DataError, one_line
from flame_composer.model.quantized import is_quantized
from flame_composer.upstream.transformers import cache_of, with_cache

# How far the logits of joined rows may be from those of each row alone, in standard deviations of
# the logits. Rounding stays far below; what positions or other rows do to a row is far above.
_TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-3}
_TOLERANCE_OF_HALF = 0.1
_NOT_NUMBERS = (
    "the model's scores for the next token are not numbers: its weights are damaged, or its"
    " training diverged; take an earlier checkpoint"
)


class Abilities(NamedTuple):
    """What a model's states allow, as `probe` finds out."""

    joined: bool
    """Whether texts of different length can be rows of one batch."""
    in_pieces: bool
    """Whether a prompt can be read in pieces."""


class States:
    """The states of all texts that are being written."""

    def __init__(self, model: PreTrainedModel, *, joined: bool):
        """Begin without a row; `joined` says whether rows share a batch, or are taken in turn."""
        self.model = model
        self.joined = joined
        self._caches: list[Any] = []  # one of all rows, or one for each

    def join(self, caches: Sequence[Any]) -> None:
        """Add a row for each cache that `read` returned, after the rows that are there."""
        if not self.joined:
            self._caches += caches
        elif caches:
            self._caches = [_joined([*self._caches, *caches])]

    def keep(self, rows: Sequence[int]) -> None:
        """Drop all rows but these, which must be in ascending order."""
        if not self.joined:
            self._caches = [self._caches[row] for row in rows]
        elif not rows:
            self._caches = []
        else:
            index = torch.tensor(rows, device=self.model.device)
            for layer in self._caches[0].layers:
                layer.state = _each(layer.state, lambda tensor: tensor.index_select(0, index))

    def step(self, tokens: Sequence[int]) -> torch.Tensor:
        """Return the scores [B, V] of what follows when each row goes on with its token."""
        ids = torch.tensor(tokens, device=self.model.device)[:, None]
        if self.joined:
            scores, self._caches[0] = read(self.model, ids, self._caches[0])
            return scores[:, -1]
        found = []
        for row in range(len(tokens)):
            scores, self._caches[row] = read(self.model, ids[row : row + 1], self._caches[row])
            found.append(scores[:, -1])
        return torch.cat(found)


def read(
    model: PreTrainedModel, ids: torch.Tensor, cache: Any, *, all_scores: bool = False
) -> tuple[torch.Tensor, Any]:
    """Return the scores after reading the tokens `ids` [B, T], in fp32, and the cache with them.

    `cache` is what an earlier call returned, or None at the beginning. The scores are those after
    the last token, [B, 1, V], or with `all_scores` after each, [B, T, V].
    """
    call: Any = model
    options = {} if all_scores or not call._supports_logits_to_keep() else {"logits_to_keep": 1}
    output = call(input_ids=ids, **with_cache(model, cache), **options)
    scores = output.logits if all_scores else output.logits[:, -1:]
    return scores.float(), cache_of(output)


def copies(cache: Any, number: int) -> list[Any]:
    """Return the cache and copies of it, `number` in all."""
    return [cache, *(copy.deepcopy(cache) for _ in range(number - 1))]


def prepare_weights(model: PreTrainedModel, rows: int) -> None:
    """Lay out the weights of a model on a CPU so that it writes up to `rows` texts faster.

    A model that reads its weights in another way than linear layers do keeps them as they are.
    """
    restore = pack(model, rows)
    try:
        with torch.inference_mode():
            read(model, torch.zeros(2, 3, dtype=torch.long, device=model.device), None)
    except Exception:  # the model's code is another package's; `probe` tells what else fails
        restore()


def probe(model: PreTrainedModel) -> Abilities:
    """Return what the model's states allow, found out by reading and continuing random texts.

    Raise ConfigError if the model keeps no state that can be carried from token to token, and
    DataError if its scores are not numbers.
    """
    draw = torch.Generator().manual_seed(0)
    vocab_size = model.config.vocab_size
    texts = [torch.randint(vocab_size, (1, size), generator=draw) for size in (9, 100)]
    more = torch.randint(vocab_size, (2, 4), generator=draw)
    texts = [text.to(model.device) for text in texts]
    with torch.inference_mode():
        alone = [_continued(model, text, next, ()) for text, next in zip(texts, more, strict=True)]
        if not all(torch.isfinite(each).all() for each in alone):
            raise DataError(_NOT_NUMBERS)
        tolerance = _TOLERANCE.get(model.dtype, _TOLERANCE_OF_HALF)
        if is_quantized(model):  # its type is that of its norms; activations are rounded
            tolerance = _TOLERANCE_OF_HALF
        try:
            pieces = _continued(model, texts[1], more[1], (66, 99))
            in_pieces = _agree(pieces, alone[1], tolerance)
        except ConfigError:  # as fla's mamba, which reads whole prompts only
            in_pieces = False
        in_pieces = in_pieces and not _forgets(model)
        joined = _continued_together(model, texts, more)
    if joined is None:
        return Abilities(False, in_pieces)
    agree = all(_agree(joined[row], alone[row], tolerance) for row in range(2))
    return Abilities(agree, in_pieces)


def _forgets(model: PreTrainedModel) -> bool:
    """Return whether fla keeps a sliding window of a text only, of any length.

    The first tokens of a further piece then lack the tokens before them that have been dropped,
    which short texts do not show.
    """
    return any(
        type(module).__module__ == "fla.layers.attn" and module.window_size is not None
        for module in model.modules()
    )


def describe(abilities: Abilities, max_rows: int) -> str:
    """Return a line for the user that says how requests share the model."""
    how = (
        f"up to {max_rows} answers are written together (this model's states can be joined), each"
        " step a token of all"
    )
    if not abilities.joined:
        how = (
            "this model's states cannot be rows of one batch (they grow, or depend on positions):"
            f" up to {max_rows} answers take turns, token by token"
        )
    if not abilities.in_pieces:
        how += "; it reads a prompt whole, so that a long one holds up the others"
    return how


def _agree(found: torch.Tensor, expected: torch.Tensor, tolerance: float) -> bool:
    return bool((found - expected).abs().max() <= tolerance * expected.std())


def _continued(
    model: PreTrainedModel, text: torch.Tensor, more: torch.Tensor, borders: tuple[int, ...]
) -> torch.Tensor:
    """Return the scores [T, V] while `text` is continued with `more`, read in pieces or whole."""
    cache, edges = None, [0, *borders, text.shape[1]]
    try:
        for start, end in itertools.pairwise(edges):
            scores, cache = read(model, text[:, start:end], cache)
    except Exception as error:  # the model's code is another package's
        raise ConfigError(
            f"model: {model.config.model_type}: cannot be served: it does not go on from a state"
            f" as other models do ({one_line(error)}); recipes/generate.py may run it"
        ) from None
    if cache is None:
        raise ConfigError(
            f"model: {model.config.model_type}: cannot be served: it returns no state that is"
            " carried from token to token; recipes/generate.py may run it"
        )
    found, states = [scores[0, -1]], States(model, joined=False)
    states.join([cache])
    found += [states.step([token])[0] for token in more.tolist()]
    return torch.stack(found)


def _continued_together(
    model: PreTrainedModel, texts: Sequence[torch.Tensor], more: torch.Tensor
) -> list[torch.Tensor] | None:
    """Return the scores [T, V] of each text, continued together, or None if they cannot be.

    A third row leaves after the first token.
    """
    began = [read(model, text, None) for text in (*texts, texts[0])]
    found = [[scores[0, -1]] for scores, _ in began[:2]]
    states = States(model, joined=True)
    try:
        states.join([began[2][1], began[0][1]])
        states.join([began[1][1]])
    except (TypeError, RuntimeError):  # states of other kinds or sizes
        return None
    for number, tokens in enumerate(more.T.tolist()):
        scores = states.step([0, *tokens] if number == 0 else tokens)
        if number == 0:
            states.keep([1, 2])
        for row in range(2):
            found[row].append(scores[row - 2])
    return [torch.stack(each) for each in found]


def _joined(caches: Sequence[Any]) -> Any:
    """Return one cache whose rows are those of all `caches`.

    Raise TypeError if they hold anything else than tensors of one row a text.
    """
    Cache = find("fla.models.utils", "Cache").Cache

    for cache in caches:
        if not isinstance(cache, Cache):
            raise TypeError(f"{type(cache).__name__} holds no states of a fixed size")
        for layer in cache.layers:
            if layer.state is None or layer.state["attn_state"] is not None:
                raise TypeError("attention has a state that grows")
    made = Cache()
    for layers in zip(*(cache.layers for cache in caches), strict=True):
        layer = layers[0]
        layer.state = _cat([each.state for each in layers])
        made.layers.append(layer)
    return made


def _cat(parts: Sequence[Any]) -> Any:
    """Return the tensors in `parts`, which have the same form, put together row by row."""
    first = parts[0]
    if first is None and all(part is None for part in parts):
        return None
    if isinstance(first, torch.Tensor):
        return torch.cat(list(parts))
    if isinstance(first, dict):
        return {name: _cat([part[name] for part in parts]) for name in first}
    if isinstance(first, list | tuple):
        return tuple(_cat(list(each)) for each in zip(*parts, strict=True))
    raise TypeError(f"{type(first).__name__} is no tensor of one row a text")


def _each(part: Any, change: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """Return `part` with every tensor in it changed."""
    if part is None or isinstance(part, torch.Tensor):
        return None if part is None else change(part)
    if isinstance(part, dict):
        return {name: _each(each, change) for name, each in part.items()}
    return tuple(_each(each, change) for each in part)
