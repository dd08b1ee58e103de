"""A row divided over ranks, compared with the same row on one: prints the differences as JSON.

Run on every rank as `divided.py MODELS LENGTHS...`: the models by their names in MODELS, with
commas between them, and the lengths of the documents in the row. There is a line for each model.
"""

from __future__ import annotations

import copy
import json
import sys
from typing import Any

import torch
import torch.distributed
from composer.utils import dist

from flame_composer.batch import collate, count_tokens
from flame_composer.model.build import build_model
from flame_composer.model.causal_lm import CausalLM, cumulative_lengths
from flame_composer.model.context import Context
from flame_composer.model.hf_config import build_hf_config
from flame_composer.model.ranks import Ranks
from tests.data_fixtures import byte_tokenizer

SHAPE = {"hidden_size": 32, "num_hidden_layers": 2, "vocab_size": 400}
HEADS = {**SHAPE, "num_heads": 2}
SMALL = {**HEADS, "head_dim": 16}
ATTENTION = {"layers": [1], "num_heads": 2, "num_kv_heads": 1}
MODELS: dict[str, dict[str, Any]] = {
    "gla": {**HEADS, "model_type": "gla"},
    "gla_conv": {**HEADS, "model_type": "gla", "use_short_conv": True, "conv_size": 4},
    "gla_hybrid": {**HEADS, "model_type": "gla", "attn": ATTENTION},
    "gla_window": {**HEADS, "model_type": "gla", "attn": {**ATTENTION, "window_size": 70}},
    "gla_fused": {
        **HEADS,
        "model_type": "gla",
        "fuse_cross_entropy": False,
        "fuse_linear_cross_entropy": True,
    },
    "hgrn2": {**SHAPE, "model_type": "hgrn2", "expand_ratio": 16},
    "delta_net": {**HEADS, "model_type": "delta_net"},
    "gated_deltanet": {**SMALL, "model_type": "gated_deltanet"},
    "gated_deltanet_hybrid": {**SMALL, "model_type": "gated_deltanet", "attn": ATTENTION},
    "kda": {**SMALL, "model_type": "kda"},
    "transformer": {**HEADS, "model_type": "transformer"},
}


def compare(name: str, *lengths: int) -> dict[str, Any]:
    """Return the relative differences between the divided row and the whole one."""
    parts, fused = dist.get_world_size(), name.endswith("+fused")
    tokenizer = byte_tokenizer()
    given = MODELS[name.removesuffix("+fused")] | (
        {"fuse_linear_cross_entropy": True} if fused else {}
    )
    tokens = torch.randint(0, 64, (sum(lengths),), generator=torch.Generator().manual_seed(1))
    batch = collate([{"input_ids": tokens.numpy(), "doc_lengths": list(lengths)}])
    batch["labels"][0, 5:9] = -100

    def model_of(ranks: Ranks | None) -> CausalLM:
        torch.manual_seed(3)
        inner = build_model(build_hf_config(given, tokenizer, sum(lengths)))
        context = None if ranks is None else Context(inner, ranks, "cpu")
        return CausalLM(inner, tokenizer, varlen=True, context=context)

    whole = model_of(None)
    expected = whole.forward(batch)["loss"]
    expected.backward()
    ranks = Ranks(context=parts)
    part = model_of(ranks)
    number = count_tokens(batch, part=ranks.part, parts=parts)["loss_generating"]
    all_numbers = count_tokens(batch)["loss_generating"]
    loss = part.forward(batch)["loss"] * (number / all_numbers)
    loss.backward()
    total = loss.detach().clone()
    torch.distributed.all_reduce(total)
    worst: dict[str, float] = {}
    for (key, ours), theirs in zip(part.named_parameters(), whole.parameters(), strict=True):
        gradient = torch.zeros_like(ours) if ours.grad is None else ours.grad
        torch.distributed.all_reduce(gradient)
        assert theirs.grad is not None
        error = (gradient - theirs.grad).abs().max() / theirs.grad.abs().max()
        worst[key] = float(error)
    with torch.no_grad():
        part = copy.deepcopy(part)  # as algorithms.swa does
        own = part.eval_forward(dict(batch))
        # Without a row to enter, the model works on whole rows, and leaves the others alone.
        part.model.eval()
        offsets = cumulative_lengths(batch["sequence_id"])
        of_all = part.model(input_ids=batch["input_ids"], cu_seqlens=offsets).logits
        logits = whole.eval_forward(dict(batch))
        whole.model.eval()
        by_whole = whole.model(input_ids=batch["input_ids"], cu_seqlens=offsets).logits
        assert torch.equal(of_all, by_whole)
        assert part.context is not None
        assert whole.labels is not None
        mine = part.context.tokens_of(sum(lengths))
        difference = (own - logits[:, mine]).abs().max().item()
        assert part.labels is not None
        assert torch.equal(part.labels, whole.labels[:, mine])
    key = max(worst, key=lambda name: worst[name])
    return {
        "model": name,
        "loss": float((total - expected).abs() / expected),
        "gradient": worst[key],
        "of": key,
        "logits": difference,
    }


if __name__ == "__main__":
    dist.initialize_dist("cpu")
    for name in sys.argv[1].split(","):
        print(json.dumps(compare(name, *map(int, sys.argv[2:]))), flush=True)
