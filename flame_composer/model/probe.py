"""Checks that a model computes, and that training can reach every weight that it is to change."""

from __future__ import annotations

import torch
from composer.core import Precision, get_precision_context
from transformers import PreTrainedModel

from flame_composer.batch import IGNORE
from flame_composer.config.parallelism import LEAST_TOKENS
from flame_composer.errors import ConfigError, InvalidField, one_line
from flame_composer.model.causal_lm import CausalLM
from flame_composer.model.lora import endings_of

NUM_TOKENS = 128  # fla takes other kernels for 64 and fewer


def require_forward(model: PreTrainedModel) -> None:
    """Raise ConfigError if the model cannot compute a few tokens.

    Its code may fail at numbers of a config that it has taken. What is computed changes nothing.
    """
    device = next(model.parameters()).device
    is_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            model(input_ids=torch.zeros(1, 8, dtype=torch.long, device=device), use_cache=False)
    except Exception as error:  # the model's own code may raise anything
        raise ConfigError(
            f"model.config: a {model.config.model_type} model is built from it, and fails at its"
            f" first tokens ({one_line(error)[:200]}); compare its sizes and numbers of heads with"
            " those of a recipe in yamls/"
        ) from None
    finally:
        model.train(is_training)


def require_gradients(model: CausalLM, *, context_length: int, precision: str) -> None:
    """Raise InvalidField, naming the layers, if a trained weight gets no gradient.

    One short row goes through the model and back. A weight gets no gradient if its layer is never
    called, as where a fused kernel takes the weights of the layer inside. Such an adapter would be
    counted and saved, and change nothing. Weights of experts are not asked for, because few tokens
    need not reach all of them. Gradients and the random state are left as they were. Every rank
    must call this if the model is sharded or its rows are divided.
    """
    device = next(model.parameters()).device
    parts = 1 if model.context is None else model.context.parts
    length = min(max(-(-NUM_TOKENS // parts), LEAST_TOKENS) * parts, context_length)
    input_ids = torch.arange(length, device=device)[None] % model.config.vocab_size
    labels = input_ids.clone()
    labels[:, 0] = IGNORE
    batch = {
        "input_ids": input_ids,
        "labels": labels,
        "sequence_id": torch.zeros_like(input_ids),
    }
    trained = {name: each for name, each in model.named_parameters() if each.requires_grad}
    was_training = model.training
    model.train()
    devices = [device.index or 0] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices), get_precision_context(Precision(precision)):
        loss = model(batch)["loss"]
    loss.backward()
    without = [
        name
        for name, parameter in trained.items()
        if parameter.grad is None and ".experts." not in name
    ]
    for parameter in trained.values():
        parameter.grad = None
    model.train(was_training)
    if without:
        layers = [name.partition(".lora_")[0] for name in without]
        raise InvalidField(
            "lora.targets",
            f"no gradient reaches {len(without)} of the {len(trained)} trained weights, because the"
            f" model reads the weights of their layers without calling these; leave out"
            f" {', '.join(endings_of(layers)[:10])}",
        )
