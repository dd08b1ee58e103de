"""The kernels that a run's model launches, noted while its steps are followed without a GPU."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import PretrainedConfig

from flame_composer.config.plan import PlanConfig
from flame_composer.errors import one_line
from flame_composer.model.causal_lm import WITHOUT_VARLEN
from flame_composer.plan.step import (
    DOCUMENT,
    as_on_device,
    build_for_run,
    build_inner,
    forward,
    longest_document,
    make_batch,
)
from flame_composer.upstream.fakes import Fakes
from flame_composer.upstream.transformers import cache_of, with_cache
from flame_composer.upstream.triton import Launch, noted_launches

PROMPTS = (100, 20)  # tokens; fla takes other kernels for few tokens than for many
BATCH = 4  # prompts that are continued together


@dataclass(frozen=True)
class Followed:
    """What came of following steps."""

    launches: list[tuple[Launch, list[str]]]  # each with the uses that make it
    failures: dict[str, str]  # the error of a use that could not be followed to its end


def follow(config: PlanConfig, hf_config: PretrainedConfig) -> Followed:
    """Return the launches of training, evaluation and generation.

    With `kernels: every`, rows are packed and not. Generation is that of recipes/generate.py:
    fp32, a single prompt or padded ones, then token by token.
    """
    uses: dict[tuple[str, ...], tuple[Launch, list[str]]] = {}
    failures: dict[str, str] = {}

    def note(use: str, step: Callable[..., None], *args: Any) -> None:
        with as_on_device(config) as fakes, noted_launches() as launches:
            try:
                step(fakes, *args)
            except Exception as error:  # fla's own code may raise anything
                failures.setdefault(use, f"{type(error).__name__}: {one_line(error)}")
        for launch in launches:
            key = tuple(sorted(variant.key for variant in launch.variants))
            _, names = uses.setdefault(key, (launch, []))
            if use not in names:
                names.append(use)

    short = _shortened(hf_config)
    both = config.kernels == "every" and short.model_type not in WITHOUT_VARLEN
    kinds = (True, False) if both else (config.varlen,)
    runs = [replace(config, varlen=varlen) for varlen in kinds]
    for run in runs:
        use = f"training, {'packed' if run.varlen else 'not packed'}"
        for document in sorted({DOCUMENT, longest_document(run)}):
            note(use, _train, run, short, document)
    for run in runs:
        note("evaluation", _evaluate, run, short)
    for rows, length in ((1, PROMPTS[0]), (1, PROMPTS[1]), (BATCH, PROMPTS[0])):
        note("generation", _generate, config, short, rows, length)
    return Followed(list(uses.values()), failures)


def _shortened(hf_config: PretrainedConfig) -> PretrainedConfig:
    """Return the model's config with two layers, which launch what all do.

    A hybrid of several kinds of layers keeps all of them.
    """
    short = copy.deepcopy(hf_config)
    if getattr(short, "attn", None) is None:
        short.num_hidden_layers = min(2, short.num_hidden_layers)
    return short


def _rows(config: PlanConfig) -> int:
    return config.microbatch_size if isinstance(config.microbatch_size, int) else 1


def _train(fakes: Fakes, config: PlanConfig, hf_config: PretrainedConfig, document: int) -> None:
    model = build_for_run(config, hf_config, fakes)
    batch = make_batch(_rows(config), config.context_length, document)
    with fakes:
        _, loss = forward(config, model, batch)
        loss.backward()


@torch.no_grad()
def _evaluate(fakes: Fakes, config: PlanConfig, hf_config: PretrainedConfig) -> None:
    model = build_for_run(config, hf_config, fakes)
    model.eval()
    batch = make_batch(_rows(config), config.context_length)
    with fakes:
        forward(config, model, batch)


@torch.no_grad()
def _generate(
    fakes: Fakes, config: PlanConfig, hf_config: PretrainedConfig, rows: int, length: int
) -> None:
    """Read prompts, which are padded on the left if there are several, and write two tokens."""
    model = build_inner(config, hf_config, fakes)
    model.eval()
    ids = torch.ones(rows, length + 2, dtype=torch.int64)
    mask = torch.ones_like(ids)
    if rows > 1:
        mask[0, : length // 2] = 0
    read, cache = 0, None
    for new in (length, 1, 1):
        with fakes:
            output = model(
                input_ids=ids[:, read : read + new],
                attention_mask=mask[:, : read + new] if rows > 1 else None,
                **with_cache(model, cache),
            )
        read, cache = read + new, cache_of(output)
