"""How the next token of one text is chosen and scored, whatever texts are written beside it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import (
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from flame_composer.errors import DataError
from flame_composer.serve.writing import TokenScore


@dataclass(frozen=True)
class Settings:
    """What a request says about the choice of tokens."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)

    @property
    def is_plain(self) -> bool:
        """Whether the next token is the likeliest one, whatever came before."""
        penalties = (self.repetition_penalty, self.presence_penalty, self.frequency_penalty)
        return self.temperature == 0 and not self.logit_bias and penalties == (1.0, 0.0, 0.0)


class Sampler:
    """The choice of one text's tokens, with random numbers of its own.

    It makes the choices of transformers' `generate` for a single text after
    `torch.manual_seed(seed)`: the same steps in the same order.
    """

    def __init__(self, settings: Settings, prompt: Iterable[int], seed: int, device: torch.device):
        """Begin after the tokens of the `prompt`."""
        self.settings = settings
        self.is_plain = settings.is_plain
        self.random = torch.Generator(device).manual_seed(seed)
        self.counts: Counter[int] = Counter()  # of the tokens written
        self.seen: dict[int, None] = {}  # what the repetition penalty is for
        if settings.repetition_penalty != 1:
            self.seen = dict.fromkeys(prompt)
        self.penalty = RepetitionPenaltyLogitsProcessor(settings.repetition_penalty)
        self.warpers: list[Any] = []
        if settings.temperature not in (0, 1):
            self.warpers.append(TemperatureLogitsWarper(float(settings.temperature)))
        if settings.temperature and settings.top_k:
            self.warpers.append(TopKLogitsWarper(settings.top_k))
        if settings.temperature and settings.top_p < 1:
            self.warpers.append(TopPLogitsWarper(float(settings.top_p)))
        ids = list(settings.logit_bias)
        self.bias_ids = torch.tensor(ids, dtype=torch.long, device=device)
        self.bias = torch.tensor([settings.logit_bias[id] for id in ids], device=device)

    def choose(self, scores: torch.Tensor) -> int:
        """Return the next token, given the model's scores [1, V] for it.

        Raise DataError if the settings make scores that are not numbers.
        """
        scores = self._penalized(scores)
        if self.settings.temperature == 0:
            return int(scores.argmax(-1))
        for warp in self.warpers:
            scores = warp(None, scores)
        chances = torch.softmax(scores, dim=-1)
        if not torch.isfinite(chances).all():
            raise DataError("the sampling settings make scores that are not numbers")
        return int(torch.multinomial(chances, num_samples=1, generator=self.random))

    def note(self, token: int) -> None:
        """Take the token that was chosen into account from now on."""
        if self.is_plain:
            return
        self.counts[token] += 1
        self.seen[token] = None

    def _penalized(self, scores: torch.Tensor) -> torch.Tensor:
        settings, device = self.settings, scores.device
        if settings.logit_bias:
            scores = scores.index_add(1, self.bias_ids, self.bias[None])
        if self.counts and (settings.presence_penalty or settings.frequency_penalty):
            ids = torch.tensor(list(self.counts), device=device)
            numbers = torch.tensor([*self.counts.values()], dtype=scores.dtype, device=device)
            less = settings.presence_penalty + settings.frequency_penalty * numbers
            scores = scores.index_add(1, ids, -less[None])
        if settings.repetition_penalty != 1:
            seen: Any = torch.tensor([[*self.seen]], device=device)
            scores = self.penalty(seen, scores)
        return scores


def are_numbers(scores: torch.Tensor) -> list[bool]:
    """Return for each row of [B, V] whether its scores are numbers, or minus infinity."""
    found: list[bool] = (scores < torch.inf).all(-1).tolist()
    return found


def score(scores: torch.Tensor, tokens: Sequence[int], num_top: int) -> list[TokenScore]:
    """Return the log probabilities of `tokens`, each given its scores, the rows of [T, V].

    They are the model's own, before temperature and penalties. `num_top` is how many of the
    likeliest tokens are reported beside each.
    """
    if not tokens:
        return []
    logprobs = torch.log_softmax(scores, dim=-1)
    ids = torch.tensor(tokens, device=scores.device)[:, None]
    chosen = logprobs.gather(1, ids)[:, 0].tolist()
    top = logprobs.topk(min(num_top, logprobs.shape[-1]), dim=-1)
    likeliest = [
        list(zip(*each, strict=True))
        for each in zip(top.indices.tolist(), top.values.tolist(), strict=True)
    ]
    return [
        TokenScore(token, 0, logprob, tops)
        for token, logprob, tops in zip(tokens, chosen, likeliest, strict=True)
    ]
