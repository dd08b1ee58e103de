"""What a plan says of rows that are divided over devices, against arithmetic by hand."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack

import pytest

from flame_composer.config.plan import PlanConfig
from flame_composer.errors import ConfigError, InvalidField
from flame_composer.plan.advice import warnings
from flame_composer.plan.child import Child, child_for
from flame_composer.plan.division import smallest_division, with_division
from flame_composer.plan.figures import Memory
from flame_composer.plan.fitting import estimate
from flame_composer.plan.memory import read_size
from flame_composer.plan.planning import count_and_draw_up, find_hf_config
from flame_composer.plan.supply import find_supply
from tests.plan.test_counting import FEW, config_of
from tests.runs import ROOT, last_json, run_script

Children = Callable[[str], Child]
ROW = ("microbatch_size=1", "context_length=32768")
H, K, V = 4, 128, 256  # of gla_340m


@pytest.fixture(scope="module")
def children() -> Iterator[Children]:
    """A function that starts the process for a device, once for this module."""
    with ExitStack() as stack:
        yield functools.cache(lambda device: stack.enter_context(child_for(device)))


def counted(children: Children, config: PlanConfig) -> Memory:
    return children(config.device).count(config, find_hf_config(config, None), 1)


def test_a_part_of_a_row_takes_what_a_row_as_long_takes(children: Children) -> None:
    """And where attention looks back, the keys and values of the whole row."""
    part = (*ROW, FEW, "parallelism.context=4")
    whole = ("microbatch_size=1", "context_length=8192", FEW)
    divided = counted(children, config_of("gla_340m", *part))
    alone = counted(children, config_of("gla_340m", *whole))
    assert divided.activations == pytest.approx(alone.activations, rel=0.02)
    assert (divided.logits, divided.weights) == (alone.logits, alone.weights)
    hybrid = "model.config.attn={layers: [1], num_heads: 8, num_kv_heads: 2}"
    more = counted(children, config_of("gla_340m", *part, hybrid)).activations
    less = counted(children, config_of("gla_340m", *whole, hybrid)).activations
    gathered = 2 * (2 * 128) * 2 * 32768  # keys and values, in bf16
    assert more - less == pytest.approx(gathered, rel=0.05)


@pytest.mark.parametrize("length", [32768, 65536])
@pytest.mark.parametrize("recomputed", [False, True])
def test_what_is_sent_is_the_states_however_long_rows_are(
    children: Children, length: int, recomputed: bool
) -> None:
    """Each device sends its state and decay to three others, and so do gradients."""
    keys = ("microbatch_size=1", f"context_length={length}", "parallelism.context=4", FEW)
    again = f"parallelism.activation_checkpointing={str(recomputed).lower()}"
    config = config_of("gla_340m", *keys, again, "global_batch_size=16")
    states, decays = 4 * H * K * V, 4 * H * K
    # Gradients of states only: each device works out those of decays itself
    a_layer = (states + decays) * (2 if recomputed else 1) + states
    microbatches, layers = 16 // 2, 2
    sent = children(config.device).count_sent(config, find_hf_config(config, None))
    assert sent == {"context": microbatches * layers * 3 * a_layer, "tensor": 0}


def test_convolutions_send_their_last_inputs(children: Children) -> None:
    keys = (*ROW, "parallelism.context=2", FEW, "global_batch_size=4", "precision=fp32")
    convolution = ("model.config.use_short_conv=true", "model.config.conv_size=4")

    def sent(*more: str) -> int:
        config = config_of("gla_340m", *keys, *more)
        return children("h100").count_sent(config, find_hf_config(config, None))["context"]

    channels = 2 * H * K + H * V  # of queries, keys and values
    layers, both_ways = 2, 2
    assert sent(*convolution) - sent() == layers * both_ways * 3 * channels * 4


def test_divided_layers_send_four_sums_each(children: Children) -> None:
    """Of attention and MLP, forwards and backwards: outputs as wide as the model, in bf16."""
    keys = ("parallelism.tensor=4", "model.config.num_hidden_layers=2", "global_batch_size=32")
    config = config_of("gla_7b_tp", *keys, "parallelism.activation_checkpointing=false")
    sent = children(config.device).count_sent(config, find_hf_config(config, None))
    microbatches, layers, outputs = 32 // 2 // 8, 2, 8 * 2048 * 4096 * 2
    assert sent == {"context": 0, "tensor": microbatches * layers * 4 * outputs * 2 * 3 // 4}


def test_places_share_the_global_batch() -> None:
    config = config_of("gla_340m", *ROW, "parallelism.context=4", "nodes=2", FEW)
    supply = find_supply(config)
    assert not isinstance(supply, str)
    hf_config = find_hf_config(config, None)
    size = read_size(hf_config)

    def by_formula(config: PlanConfig, _: object, rows: int) -> Memory:
        return estimate(config, size)(rows)

    plan, reason = count_and_draw_up(config, hf_config, size, supply, by_formula)
    assert reason is None
    assert config.places == 4
    assert plan.accumulation_steps == 256 // 4
    assert (plan.microbatch_size, plan.largest_microbatch_size) == (1, 1)
    alone = find_supply(config_of("gla_340m", *ROW, "nodes=2", FEW))
    assert not isinstance(alone, str)
    assert supply.read_by_a_node == alone.read_by_a_node


LONG = ("microbatch_size=1", "context_length=262144", "global_batch_size=8")


def smallest(*keys: str, fits: bool) -> tuple[int, int] | None:
    config = config_of("gla_340m", *LONG, "device=h200", *keys)
    hf_config = find_hf_config(config, None)
    size = read_size(hf_config)
    return smallest_division(
        config, hf_config, fits=fits, of_a_row=lambda other: estimate(other, size)(1)
    )


def test_the_smallest_division_is_found_from_either_side() -> None:
    """By the formula: 65,536 tokens of a device fit, 131,072 do not."""
    assert smallest("parallelism.context=8", fits=True) == (1, 4)
    assert smallest(fits=False) == (1, 4)
    assert smallest("context_length=2048", "parallelism.context=8", fits=True) == (1, 1)
    assert smallest("context_length=16777216", fits=False) is None
    # Other models keep whole rows, and so do algorithms that need them
    assert smallest("algorithms.seq_length_warmup={}", fits=False) is None


def test_a_division_larger_than_needed_is_warned_of(children: Children) -> None:
    keys = (*LONG, "parallelism.context=8", FEW)
    config = config_of("gla_340m", *keys, "context_length=65536")
    hf_config = find_hf_config(config, None)
    size = read_size(hf_config)
    child = children(config.device)
    plan, _ = count_and_draw_up(config, hf_config, size, None, child.count)
    plan = with_division(plan, config, hf_config, size, child)
    assert plan.division is not None
    assert plan.division.smallest == {"tensor": 1, "context": 1}
    assert (
        "parallelism.context=8: a row fits on one device, too: parallelism.context=1 sends less,"
        " and leaves devices for other rows"
    ) in warnings(config, plan)


def test_a_row_that_does_not_fit_is_divided_in_the_advice(children: Children) -> None:
    config = config_of("gla_340m", "microbatch_size=1", "context_length=262144")
    hf_config = find_hf_config(config, None)
    size = read_size(hf_config)
    child = children(config.device)
    plan, _ = count_and_draw_up(config, hf_config, size, None, child.count)
    plan = with_division(plan, config, hf_config, size, child)
    (line,) = [line for line in warnings(config, plan) if "do not fit" in line]
    assert line.endswith(
        "not even one row does: set parallelism.activation_checkpointing=true, or divide it over"
        " devices with parallelism.context=4, or take more or larger devices"
    )


def test_what_training_would_refuse_is_refused() -> None:
    with pytest.raises(ConfigError, match="must divide the 8 devices"):
        config_of("gla_340m", *ROW, "parallelism.context=3")
    config = config_of("transformer_340m", *ROW, "parallelism.context=4")
    with pytest.raises(InvalidField, match=re.escape("parallelism.context: must be 1 for llama")):
        find_hf_config(config, None)


def test_the_script_shows_the_recipe_of_long_rows() -> None:
    keys = ("devices=8", "device=h100", "dataset_tokens=1_000_000_000", "kernels=none")
    process = run_script(
        "recipes/plan.py",
        f"{ROOT}/yamls/gla_340m_256k.yaml",
        *keys,
        env={"DATA_REMOTE": "/nowhere"},
    )
    plan = last_json(process)
    assert plan["division"] == {
        "tensor": 1,
        "context": 4,
        "places": 2,
        "tokens_of_a_row": 65536,
        "sent": {"context": 24 * 3 * 4 * (2 * H * K * V + H * K), "tensor": 0},
        "smallest": {"tensor": 1, "context": 4},
    }
    assert "1 rows x 1 accumulation steps x 8 devices x 1 node / (tensor 1 x context 4)\n" in (
        process.stdout
    )
    assert (
        "divided         2 x 4 devices with rows of their own; 65,536 tokens of a row on each\n"
        in (process.stdout)
    )
    assert "fits), counted by torch, for the last part of a row of one document\n" in process.stdout
