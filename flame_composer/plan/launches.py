"""The kernels that a recipe's model launches: followed on a claimed GPU, without computing."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from flame_composer.config.sections import LoraConfig
from flame_composer.errors import one_line
from flame_composer.model.base import Base
from flame_composer.model.build import build_model
from flame_composer.model.lora import add_adapters, build_adapter
from flame_composer.upstream.cuda import PretendedCuda
from flame_composer.upstream.triton import Launch, noted_launches

DOCUMENT = 700  # tokens of a document in packed rows; any length that is no multiple of a chunk
PROMPTS = (100, 20)  # tokens; fla takes other kernels for few tokens than for many
BATCH = 4  # prompts that are continued together


@dataclass(frozen=True)
class Steps:
    """The steps to follow, in values that JSON has."""

    model: dict[str, Any]  # the Hugging Face config, with its model_type
    rows: int  # of a microbatch
    context_length: int
    packed: tuple[bool, ...]  # with documents kept apart, without, or both
    autocast: str | None  # bfloat16 or float16; None for fp32
    weights: str  # dtype that a step computes with: FSDP2 casts them, autocast does not
    lora: dict[str, Any] | None


@dataclass(frozen=True)
class Followed:
    """What came of following steps."""

    launches: list[tuple[Launch, list[str]]]  # each with the uses that make it
    failures: dict[str, str]  # the error of a use that could not be followed to its end


def follow(steps: Steps) -> Followed:
    """Return the launches of training, evaluation and generation.

    Packed rows are laid end to end, as `CausalLM.forward` does. Generation is that of
    recipes/generate.py: fp32, a single prompt or padded ones, then token by token.
    """
    uses: dict[tuple[str, ...], tuple[Launch, list[str]]] = {}
    failures: dict[str, str] = {}

    def note(use: str, step: Callable[..., None], *args: Any) -> None:
        with noted_launches() as launches, PretendedCuda():
            try:
                step(*args)
            except Exception as error:  # fla's own code may raise anything
                failures.setdefault(use, f"{type(error).__name__}: {one_line(error)}")
        for launch in launches:
            key = tuple(sorted(variant.key for variant in launch.variants))
            _, names = uses.setdefault(key, (launch, []))
            if use not in names:
                names.append(use)

    with PretendedCuda(), torch.device("cuda"):
        model: Any = build_model(_shortened(steps.model))
        if steps.lora is not None:
            add_adapters(model, build_adapter(LoraConfig(**steps.lora), model, Base("", "")))
    _cast(model, steps.weights)
    for packed in steps.packed:
        kind = "packed" if packed else "not packed"
        note(f"training, {kind}", _train, model, steps, packed)
    for packed in steps.packed:
        note("evaluation", _evaluate, model, steps, packed)
    _cast(model, "float32")
    for rows, length in ((1, PROMPTS[0]), (1, PROMPTS[1]), (BATCH, PROMPTS[0])):
        note("generation", _generate, model, rows, length)
    return Followed(list(uses.values()), failures)


def _cast(model: Any, dtype: str) -> None:
    """Cast the parameters, but not the buffers, as FSDP2 does."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(getattr(torch, dtype))


def _shortened(keys: dict[str, Any]) -> Any:
    """Return the model's config with two layers, which launch what all do.

    A hybrid of several kinds of layers keeps all of them.
    """
    given = dict(keys)
    hf_config = CONFIG_MAPPING[given.pop("model_type")](**given)
    if getattr(hf_config, "attn", None) is None:
        hf_config.num_hidden_layers = min(2, hf_config.num_hidden_layers)
    return hf_config


@contextmanager
def _precision(dtype: str | None) -> Iterator[None]:
    if dtype is None:
        yield
        return
    with torch.autocast("cuda", getattr(torch, dtype)):
        yield


def _batch(steps: Steps, packed: bool) -> dict[str, torch.Tensor]:
    shape, tokens = (steps.rows, steps.context_length), steps.rows * steps.context_length
    if not packed:
        return {"input_ids": torch.empty(shape, dtype=torch.int64, device="cuda")}
    starts = {*range(0, tokens, DOCUMENT), *range(0, tokens, steps.context_length), tokens}
    return {
        "input_ids": torch.empty(1, tokens, dtype=torch.int64, device="cuda"),
        "cu_seqlens": torch.tensor(sorted(starts)),  # values that kernels' indices are made from
    }


def _train(model: Any, steps: Steps, packed: bool) -> None:
    model.train()
    batch = _batch(steps, packed)
    with _precision(steps.autocast):
        loss = model(**batch, labels=batch["input_ids"], use_cache=False).loss
    # Not loss.backward(), in which the mode would be off.
    torch.autograd.backward([loss])
    model.zero_grad()


@torch.no_grad()
def _evaluate(model: Any, steps: Steps, packed: bool) -> None:
    model.eval()
    batch = _batch(steps, packed)
    with _precision(steps.autocast):
        model(**batch, labels=batch["input_ids"], use_cache=False)


@torch.no_grad()
def _generate(model: Any, rows: int, length: int) -> None:
    """Read prompts, which are padded on the left if there are several, and write two tokens."""
    model.eval()
    mask = torch.ones(rows, length + 2, dtype=torch.int64)
    if rows > 1:
        mask[0, : length // 2] = 0
    read, cache = 0, None
    for new in (length, 1, 1):
        output = model(
            input_ids=torch.empty(rows, new, dtype=torch.int64, device="cuda"),
            attention_mask=mask[:, : read + new] if rows > 1 else None,
            past_key_values=cache,
            use_cache=True,
        )
        read, cache = read + new, output.past_key_values
