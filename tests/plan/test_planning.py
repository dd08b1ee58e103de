"""What a plan says, against built models, real runs, real datasets and arithmetic by hand."""

from __future__ import annotations

import dataclasses
import json
import os
import random
import re
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from flame_composer.config.data import StreamConfig
from flame_composer.config.load import load
from flame_composer.config.plan import PlanConfig
from flame_composer.config.sections import LoraConfig
from flame_composer.errors import ConfigError, InvalidField
from flame_composer.loader.batches import build_train_loader
from flame_composer.loader.datasets import open_for_model
from flame_composer.model.build import build_model
from flame_composer.model.causal_lm import CausalLM
from flame_composer.model.hf_config import build_hf_config
from flame_composer.model.work import Work
from flame_composer.plan import planning
from flame_composer.plan.advice import warnings
from flame_composer.plan.figures import Memory
from flame_composer.plan.fitting import estimate, largest_microbatch
from flame_composer.plan.interruptions import best_interval, goodput, goodput_with_notice
from flame_composer.plan.memory import (
    CPU_PROCESS,
    DEVICES,
    Size,
    memory,
    read_size,
)
from flame_composer.plan.speed import assumed_mfu
from flame_composer.plan.supply import Supply, find_supply
from flame_composer.plan.table import describe
from tests.conftest import CONTEXT_LENGTH, GLA, LLAMA, make_dataset
from tests.data_fixtures import byte_tokenizer
from tests.runs import ROOT, Corpus, Script, check, last_json, run_script


@pytest.fixture(autouse=True)
def one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.delenv("DATA_REMOTE", raising=False)


def plan_config(name: str, *keys: str, device: str = "h100", devices: int = 8) -> PlanConfig:
    return load(
        PlanConfig, [f"{ROOT}/yamls/{name}.yaml", f"devices={devices}", f"device={device}", *keys]
    )


def size_of(config: PlanConfig) -> Size:
    return read_size(planning.find_hf_config(config, None))


def drawn_up(name: str, *keys: str, **where: Any) -> Any:
    config = plan_config(name, *keys, **where)
    found = find_supply(config)
    assert not isinstance(found, str), found
    size = size_of(config)
    return planning.draw_up(config, size, found, estimate(config, size))


def warned_of(config: PlanConfig, found: Supply) -> list[str]:
    size = size_of(config)
    return warnings(config, planning.draw_up(config, size, found, estimate(config, size)))


# The model


@pytest.mark.parametrize("model", [GLA, LLAMA], ids=["gla", "llama"])
@pytest.mark.parametrize("tied", [True, False])
def test_parameters_are_those_of_the_built_model(model: dict[str, Any], tied: bool) -> None:
    hf_config = build_hf_config(
        {**model, "tie_word_embeddings": tied}, byte_tokenizer(), CONTEXT_LENGTH
    )
    built = build_model(hf_config)
    size = read_size(hf_config)
    embedding = built.get_input_embeddings().weight.numel()
    assert size.parameters == sum(parameter.numel() for parameter in built.parameters())
    assert size.work.multiplied == size.parameters - (0 if tied else embedding)
    # The last norm
    assert (
        size.in_blocks
        == size.largest_block
        == size.parameters - embedding * (1 if tied else 2) - 32
    )
    assert (size.work.num_blocks, size.vocab_size, size.work.softmax_heads) == (
        1,
        400,
        0 if model is GLA else 2,
    )


def test_what_a_token_leaves_is_what_projections_take_and_give_and_norms_give() -> None:
    config = plan_config("transformer_tiny", "parallelism.fsdp=null", device="cpu", devices=1)
    attention = 4 * (256 + 256)
    mlp = 3 * (256 + 768)
    assert size_of(config).kept == 4 * (attention + mlp + 2 * 256)


@pytest.mark.parametrize(
    "model",
    [
        {"model_type": "gpt2", "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64},
        {"model_type": "mamba", "hidden_size": 32, "num_hidden_layers": 1},
        {
            "model_type": "gemma3_text",
            "hidden_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "head_dim": 32,
        },
    ],
    ids=lambda model: model["model_type"],
)
def test_models_of_other_makers(model: dict[str, Any]) -> None:
    hf_config = build_hf_config(model, byte_tokenizer(), CONTEXT_LENGTH)
    size = read_size(hf_config)
    assert size.parameters == sum(
        parameter.numel() for parameter in build_model(hf_config).parameters()
    )
    assert size.kept > 3 * size.work.num_blocks * size.hidden_size > 0


def test_flops() -> None:
    gla, llama = size_of(plan_config("gla_340m")), size_of(plan_config("transformer_340m"))
    assert gla.work.flops_per_token(2048) == 6 * 341_707_776
    assert llama.work.flops_per_token(2048) == 6 * 341_099_520 + 12 * 24 * 1024 * 2048


@pytest.mark.parametrize("model", [GLA, LLAMA], ids=["gla", "llama"])
def test_a_plan_counts_what_utilisation_goes_by(model: dict[str, Any]) -> None:
    hf_config = build_hf_config(model, byte_tokenizer(), CONTEXT_LENGTH)
    trained = CausalLM(build_model(hf_config), byte_tokenizer(), varlen=True)
    batch = {"input_ids": torch.zeros(3, CONTEXT_LENGTH, dtype=torch.int64)}
    assert trained.flops_per_batch(batch) == 3 * CONTEXT_LENGTH * read_size(
        hf_config
    ).work.flops_per_token(CONTEXT_LENGTH)


def test_vocabulary_from_the_datasets_tokenizer(dataset: Path) -> None:
    config = load(
        PlanConfig,
        [
            "run_name=r",
            "max_duration=1ep",
            "global_batch_size=4",
            "microbatch_size=1",
            f"context_length={CONTEXT_LENGTH}",
            "tokenizer=/there/is/none",
            "model.config.model_type=gla",
            "model.config.hidden_size=32",
            "model.config.num_hidden_layers=1",
            "model.config.num_heads=2",
            f"train_data.local={dataset}",
            "devices=1",
            "device=cpu",
        ],
    )
    found = find_supply(config)
    assert isinstance(found, Supply)
    assert planning.find_hf_config(config, found).vocab_size == 400
    with pytest.raises(ConfigError, match="/there/is/none"):
        planning.find_hf_config(config, None)


# Steps, time, cost


def test_the_340m_recipe_by_hand() -> None:
    plan = drawn_up("gla_340m", "dataset_tokens=2_000_000_000", "price_per_hour=2", "mfu=0.5")
    assert plan.tokens_per_step == 256 * 2048 == 524_288
    assert (plan.steps, plan.tokens) == (20480, 20480 * 524_288)
    assert (plan.microbatch_size, plan.accumulation_steps) == (8, 4)
    assert plan.data.tokens == 2_000_000_000 // 2048 * 2048
    assert plan.data.steps_per_epoch == 2_000_000_000 // 524_288
    assert plan.data.epochs == pytest.approx(20480 / 3814)
    speed = 8 * 989e12 * 0.5 / (6 * 341_707_776)
    assert plan.time.tokens_per_second == pytest.approx(speed)
    assert plan.time.seconds == pytest.approx(20480 * 524_288 / speed)
    assert plan.time.cost == pytest.approx(plan.time.seconds / 3600 * 8 * 2)
    assert plan.checkpoints.bytes == 12 * 341_707_776
    assert (plan.checkpoints.number, plan.checkpoints.bytes_kept) == (
        41,
        3 * 12 * 341_707_776,
    )
    assert plan.preemption is None
    measured = drawn_up(
        "gla_340m", "dataset_tokens=2_000_000_000", "tokens_per_second=1000", "nodes=2"
    )
    assert measured.time.seconds == pytest.approx(20480 * 524_288 / 1000)
    assert measured.accumulation_steps == 2


def test_what_is_assumed_of_speed_says_where_it_is_from() -> None:
    """What was measured, for the models that it was measured with, else what was published."""
    gla = drawn_up("gla_340m", "dataset_tokens=2_000_000_000", "device=h200").time
    assert gla.tokens_per_second == pytest.approx(8 * 49_697, rel=0.04)
    assert (gla.mfu, gla.mfu_source.endswith("docs/gpu.md")) == (0.1, True)
    llama = drawn_up("transformer_340m", "dataset_tokens=2_000_000_000", "device=h200").time
    assert llama.tokens_per_second == pytest.approx(8 * 76_102, rel=0.04)
    assert (llama.mfu, llama.mfu_source.endswith("docs/gpu.md")) == (0.2, True)
    larger = drawn_up("gla_1b", "dataset_tokens=2_000_000_000").time
    assert (larger.mfu, larger.mfu_source.endswith("/issues/94")) == (0.18, True)
    softmax = assumed_mfu("llama", Work(7_000_000_000, 32, 128, 32))
    assert (softmax.mfu, "llm-foundry" in softmax.source) == (0.4, True)
    given = drawn_up("gla_340m", "dataset_tokens=2_000_000_000", "mfu=0.3").time
    assert (given.mfu, given.mfu_source) == (0.3, None)
    work = size_of(plan_config("gla_340m")).work
    others = {kind: assumed_mfu(kind, work) for kind in ("hgrn2", "gsa", "mamba2", "rwkv7")}
    assert all(0 < each.mfu < 0.25 and each.source for each in others.values())


def test_every_device_has_its_figures() -> None:
    hints = typing.get_type_hints(PlanConfig)["device"]
    assert set(typing.get_args(hints)) == {*DEVICES, "cpu"}


# Memory


def parts_of(*keys: str, name: str = "gla_340m", **where: Any) -> Memory:
    config = plan_config(name, *keys, **where)
    return memory(config, size_of(config), config.microbatch_size)


def test_sharding_spreads_what_it_says() -> None:
    N = 341_707_776
    outside = 32000 * 1024 + 1024
    block = (N - outside) // 24
    grad_op = parts_of()
    assert (grad_op.weights, grad_op.optimizer) == (4 * N // 8, 8 * N // 8)
    assert (grad_op.gradients, grad_op.buffers) == (4 * N // 8, 2 * block)
    assert grad_op.copies == 2 * N
    full = parts_of("parallelism.fsdp.sharding_strategy=FULL_SHARD", "nodes=2")
    assert (full.weights, full.copies) == (
        4 * N // 16,
        2 * (outside + 2 * block),
    )
    hybrid = parts_of("parallelism.fsdp.sharding_strategy=HYBRID_SHARD", "nodes=2")
    assert hybrid.weights == 4 * N // 8
    halves = parts_of(
        "parallelism.fsdp.sharding_strategy=HYBRID_SHARD", "parallelism.fsdp.replicas=2"
    )
    assert halves.weights == 4 * N // 4
    assert parts_of("precision=fp32", device="cpu").weights == 4 * N
    assert (
        parts_of("precision=fp32", "parallelism.cpu_fsdp=true", device="cpu").weights == 4 * N // 8
    )
    in_fp32 = parts_of("parallelism.fsdp.mixed_precision=FULL")
    assert in_fp32.copies == 4 * N
    none = parts_of("parallelism.fsdp=null")
    assert (none.weights, none.gradients, none.optimizer) == (4 * N, 4 * N, 8 * N)
    assert none.buffers == 4 * N
    assert parts_of("parallelism.fsdp=null", devices=1).buffers == 0


def test_activations_follow_tokens_and_what_is_kept_of_them() -> None:
    plain = parts_of()
    twice = parts_of("microbatch_size=16")
    assert twice.activations == 2 * plain.activations
    assert twice.logits == 2 * plain.logits == 2 * 6 * 8 * 2048 * 32000
    again = parts_of("parallelism.activation_checkpointing=true")
    config = plan_config("gla_340m")
    size = size_of(config)
    assert again.activations == 2 * 8 * 2048 * (24 * 1024 + size.kept // 24)
    assert (
        parts_of("parallelism.activation_cpu_offload=true").activations == plain.activations // 24
    )
    assert parts_of("precision=fp32").activations == 2 * plain.activations
    assert parts_of(name="transformer_340m").logits == 14 * 8 * 2048 * 32000


def test_largest_microbatch_is_the_largest_that_fits_and_divides() -> None:
    config = plan_config("gla_340m")
    size = size_of(config)
    rows = largest_microbatch(config, estimate(config, size))
    assert rows is not None
    assert 256 // 8 % rows == 0
    assert memory(config, size, rows).total <= 0.9 * 80e9 < memory(config, size, 2 * rows).total
    seven = plan_config("gla_7b_continual", device="l4", devices=1)
    assert largest_microbatch(seven, estimate(seven, size_of(seven))) is None


MEASURE = """import resource, runpy, sys
out, sys.argv = sys.argv[1], sys.argv[2:]
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
finally:
    with open(out, "w") as file:
        file.write(str(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10))
"""


@pytest.mark.faults
@pytest.mark.skipif(
    "FLAME_COMPOSER_FAULTS" not in os.environ, reason="takes a minute: make test-faults"
)
def test_memory_and_checkpoints_of_a_run_on_a_cpu(tmp_path: Path) -> None:
    """The peak of a real run, less that of one that is next to nothing: what the process takes
    by itself.
    """
    script = tmp_path / "measure.py"
    script.write_text(MEASURE)
    byte_tokenizer().save_pretrained(tmp_path / "tokenizer")
    make_dataset(tmp_path / "data", num_documents=2500, context_length=512, shard_size=200_000)

    def peak(name: str, *keys: str) -> tuple[int, PlanConfig, Path]:
        run = tmp_path / f"run{len(list(tmp_path.iterdir()))}"
        keys = (
            f"{ROOT}/yamls/{name}.yaml",
            f"tokenizer={tmp_path / 'tokenizer'}",
            f"train_data.local={tmp_path / 'data/out'}",
            "train_data.num_workers=0",
            "eval_data=null",
            f"log_folder={run}",
            f"save_folder={run / 'checkpoints'}",
            "max_duration=2ba",
            "scheduler.warmup=0ba",
            *keys,
        )
        check(Script(script, tmp_path / "peak", "recipes/train.py", *keys).wait())
        return (
            int((tmp_path / "peak").read_text()),
            load(PlanConfig, [*keys, "devices=1", "device=cpu"]),
            run,
        )

    shape = {"hidden_size": 32, "num_hidden_layers": 1, "num_heads": 1, "vocab_size": 512}
    nothing = [f"model.config.{key}={value}" for key, value in shape.items()]
    base, config, _ = peak("gla_tiny", *nothing, "global_batch_size=1", "microbatch_size=1")
    assert memory(config, size_of(config), 1).total - CPU_PROCESS < 10e6
    assert pytest.approx(base, rel=0.25) == CPU_PROCESS
    seen = {}
    for name in ("gla_tiny", "transformer_tiny"):
        for keys in ((), ("model.config.num_hidden_layers=8",), ("model.config.vocab_size=16384",)):
            measured, config, run = peak(name, *keys)
            size = size_of(config)
            estimate = memory(config, size, config.microbatch_size).total - CPU_PROCESS
            seen[f"{name} {' '.join(keys)}"] = (
                estimate,
                measured - base,
                estimate / (measured - base),
            )
            checkpoint = (run / "checkpoints/ba2.pt").stat().st_size
            assert 12 * size.parameters == pytest.approx(checkpoint, rel=0.02)
    print(json.dumps(seen, indent=1))
    assert all(0.75 < ratio < 1.25 for _, _, ratio in seen.values()), seen


# The data


def small(dataset: Path, *keys: str, devices: int = 1) -> PlanConfig:
    return load(
        PlanConfig,
        [
            f"{ROOT}/yamls/gla_tiny.yaml",
            f"context_length={CONTEXT_LENGTH}",
            "global_batch_size=4",
            "microbatch_size=1",
            f"train_data.local={dataset}",
            "train_data.shuffle_block_size=20",
            "train_data.predownload=4",
            f"devices={devices}",
            "device=cpu",
            *keys,
        ],
    )


def test_a_dataset_as_training_finds_it(dataset: Path, copy_of: Callable[[Path], Path]) -> None:
    config = small(dataset)
    found = find_supply(config)
    assert isinstance(found, Supply)
    opened = open_for_model(str(copy_of(dataset)), None, tokenizer=byte_tokenizer())

    def loader(**options: Any) -> Any:
        data = dataclasses.replace(config.train_data, **options)
        return build_train_loader(
            {"": opened}, data, global_batch_size=4, seed=config.seed
        ).dataloader

    assert found.batches_per_epoch == loader().dataset.batches_per_epoch
    assert (found.tokens, found.bytes) == (
        opened.manifest.totals.tokens_out,
        opened.manifest.totals.bytes,
    )
    assert (found.context_length, found.vocab_size, found.is_remote) == (CONTEXT_LENGTH, 400, False)
    loader(cache_limit=str(found.smallest_cache))
    with pytest.raises(InvalidField, match=f"must be at least {found.smallest_cache} bytes"):
        loader(cache_limit=str(found.smallest_cache - 1))


def test_what_each_of_two_nodes_reads(dataset: Path) -> None:
    def read(canonical: int, nodes: int) -> Supply:
        found = find_supply(
            small(dataset, f"train_data.num_canonical_nodes={canonical}", f"nodes={nodes}")
        )
        assert isinstance(found, Supply)
        return found

    alone, apart, together = read(2, 1), read(2, 2), read(1, 2)
    assert alone.read_by_a_node == alone.bytes == apart.bytes
    assert apart.read_by_a_node < 0.6 * apart.bytes
    assert together.read_by_a_node > 0.9 * together.bytes


def test_a_remote_dataset_is_downloaded(dataset: Path, tmp_path: Path) -> None:
    keys = (
        f"train_data.local={tmp_path}/cache",
        f"train_data.remote={dataset}",
        "max_duration=2ep",
        "scheduler.warmup=1ba",
    )
    config = small(dataset, *keys)
    found = find_supply(config)
    assert isinstance(found, Supply)
    size = size_of(config)
    count = estimate(config, size)
    plan = planning.draw_up(config, size, found, count)
    assert plan.data.downloaded_by_a_node == found.bytes
    assert not (tmp_path / "cache").exists(), "a plan leaves nothing behind"
    plan = planning.draw_up(
        small(dataset, *keys, "train_data.cache_limit=10kb"), size, found, count
    )
    assert plan.data.downloaded_by_a_node == 2 * found.bytes, (
        "what was deleted is fetched again in the next epoch"
    )
    assert plan.data.epochs == 2
    local = planning.draw_up(
        small(dataset), size, dataclasses.replace(found, is_remote=False), count
    )
    assert local.data.downloaded_by_a_node == 0


def test_streams_are_weighed_as_in_training(dataset: Path, eval_dataset: Path) -> None:
    config = small(dataset)
    config.train_data.local = None
    config.train_data.streams = {
        "a": StreamConfig(str(dataset), repeat=2.0),
        "b": StreamConfig(str(eval_dataset), repeat=1.0),
    }
    found = find_supply(config)
    assert isinstance(found, Supply)
    one, other = (find_supply(small(folder)) for folder in (dataset, eval_dataset))
    assert isinstance(one, Supply)
    assert isinstance(other, Supply)
    assert found.tokens == one.tokens + other.tokens
    rows = 2 * one.tokens // CONTEXT_LENGTH + other.tokens // CONTEXT_LENGTH
    assert found.batches_per_epoch == rows // 4


def test_a_dataset_that_is_only_known_by_its_size() -> None:
    """Of a hundred shards."""
    keys = ("dataset_tokens=3_000_000_000", "train_data.shuffle_block_size=100_000")
    whole = drawn_up("gla_340m", *keys).data
    assert whole.bytes == pytest.approx(2 * 3e9, rel=0.01)
    assert whole.downloaded_by_a_node == pytest.approx(whole.bytes, rel=0.02)
    assert 100_000 * 4096 / 2 < whole.smallest_cache < 3 * 100_000 * 4096


def test_fifteen_trillion_tokens_on_many_nodes() -> None:
    """Every node has its own shards, and a window of them at once."""
    keys = ("dataset_tokens=15e12", "nodes=128", "devices=8", "global_batch_size=8192")
    config = plan_config("gla_340m", *keys, "train_data.num_canonical_nodes=128")
    found = find_supply(config)
    assert isinstance(found, Supply)
    assert found.tokens == 15 * 10**12
    assert found.read_by_a_node == pytest.approx(found.bytes / 128, rel=0.01)
    assert 4 << 30 < found.smallest_cache < 8 << 30
    size = size_of(config)
    data = planning.draw_up(config, size, found, estimate(config, size)).data
    assert data is not None
    assert (data.shards, data.mixed_rows) == (894_070, (4 << 30) // 4096)
    assert data.mixed_shards == 128
    assert 4 < data.start_seconds < 20


def test_an_order_that_is_laid_out_row_by_row_is_not_planned_for_too_many() -> None:
    keys = ("dataset_tokens=100_000_000_000", "train_data.shuffle_algo=py1e")
    rule = "must be null or spread to plan for 48,828,125 rows: the others are laid out row by row"
    with pytest.raises(InvalidField, match=f"^train_data.shuffle_algo: {rule}"):
        find_supply(plan_config("gla_340m", *keys))


def test_less_than_a_batch() -> None:
    with pytest.raises(InvalidField) as caught:
        find_supply(plan_config("gla_340m", "dataset_tokens=100"))
    assert (caught.value.name, caught.value.rule) == (
        "dataset_tokens",
        "must be a global batch of 256 x 2048 tokens or more",
    )


# Preemption


@pytest.mark.parametrize(("save", "between"), [(5.0, 3600.0), (60.0, 14400.0), (300.0, 3600.0)])
def test_the_best_interval_is_the_best(save: float, between: float) -> None:
    best = best_interval(save, between)
    expected = goodput(best, save, 600, between)
    tried = [goodput(best * factor, save, 600, between) for factor in (0.5, 0.9, 1.1, 2)]
    assert max(tried) < expected < 1
    assert best == pytest.approx((2 * save * between) ** 0.5, rel=0.2), "Young 1974"
    assert expected < goodput_with_notice(best, save, 600, between) < 1


@pytest.mark.parametrize("behind", [0.0, 400.0])
def test_goodput_is_what_a_simulation_comes_to(behind: float) -> None:
    """An hour between kills, 2 minutes to save, 5 to come back; also kills while it is saving or
    coming back. A checkpoint counts once it is whole, some time after training went on.
    """
    interval, save, restart, between = 600.0, 120.0, 300.0, 3600.0
    chance = random.Random(0)
    clock = done = 0.0
    for _ in range(60_000):
        left = chance.expovariate(1 / between)
        clock += left
        if left < restart:
            continue
        whole = (left - restart - behind) // (interval + save)
        done += max(0.0, whole) * interval
    expected = goodput(interval, save, restart, between, behind)
    assert expected == pytest.approx(done / clock, rel=0.02)


def test_hopeless_preemption() -> None:
    assert best_interval(7200, 3600) == 3600
    assert goodput(1e9, 1, 1, 1) == 0


def test_preemption_in_a_plan() -> None:
    keys = (
        "dataset_tokens=2_000_000_000",
        "preemption_hours=2",
        "save_seconds=30",
        "tokens_per_second=524288",
    )
    plan = drawn_up("gla_340m", *keys, "save_interval=5000ba")
    preempted = plan.preemption
    assert plan.time.seconds_per_step == 1
    wait = plan.checkpoints.bytes / 8 / 4e9  # each of 8 devices copies its share
    assert plan.checkpoints.wait_seconds == pytest.approx(wait)
    assert preempted.best_save_interval == f"{round(best_interval(wait, 7200))}ba"
    as_configured = goodput(5000, wait, 600, 7200, 30 - wait)
    assert preempted.goodput_as_configured == pytest.approx(as_configured)
    assert as_configured < preempted.goodput
    by_clock = drawn_up("gla_340m", *keys, "save_interval=10min", "restart_minutes=5")
    as_configured = goodput(600, wait, 300, 7200, 30 - wait)
    assert by_clock.preemption.goodput_as_configured == pytest.approx(as_configured)
    slow = drawn_up("gla_340m", *keys, "save_interval=10ba").preemption
    assert slow.goodput_as_configured == pytest.approx(goodput(10, 20, 600, 7200, 30 - wait))


def test_preemption_in_a_plan_that_waits_for_saves() -> None:
    keys = ("preemption_hours=2", "save_seconds=30", "tokens_per_second=524288", "save_async=false")
    plan = drawn_up("gla_340m", "dataset_tokens=2_000_000_000", *keys, "save_interval=5000ba")
    assert plan.checkpoints.wait_seconds == 30
    assert plan.preemption.best_save_interval == f"{round(best_interval(30, 7200))}ba"
    assert plan.preemption.goodput_as_configured == goodput(5000, 30, 600, 7200)


def test_what_checkpoints_take() -> None:
    keys = (
        "dataset_tokens=2_000_000_000",
        "save_bandwidth=512mb",
        "save_num_checkpoints_to_keep=2",
    )
    saved = drawn_up("gla_340m", *keys).checkpoints
    assert saved.save_seconds == saved.bytes / 2**29
    assert saved.bytes_kept == 2 * saved.bytes


def test_what_saving_in_the_background_takes() -> None:
    """Of the memory of each machine, and of the notice: a save may have just begun."""

    def saved(*more: str) -> Any:
        keys = ("dataset_tokens=2_000_000_000", "save_seconds=30", "tokens_per_second=524288")
        return drawn_up("gla_340m", *keys, "global_batch_size=256", *more).checkpoints

    whole = saved()
    assert (whole.host_bytes, whole.notice_seconds) == (whole.bytes, 61)
    waited_for = saved("save_async=false")
    assert (waited_for.host_bytes, waited_for.notice_seconds) == (0, 31)
    sharded = ("nodes=4", "parallelism.fsdp={}")
    assert saved(*sharded).host_bytes == whole.bytes // 4
    assert saved(*sharded, "parallelism.fsdp.state_dict_type=full").host_bytes == 2 * whole.bytes
    hybrid = ("parallelism.fsdp.sharding_strategy=HYBRID_SHARD",)
    assert saved(*sharded, *hybrid).host_bytes == whole.bytes
    assert saved(*sharded, *hybrid, "parallelism.fsdp.replicas=2").host_bytes == whole.bytes // 2
    lines = describe(drawn_up("gla_340m", "dataset_tokens=2_000_000_000"), [])
    assert sum(line.startswith(("copy in memory  ", "notice needed   ")) for line in lines) == 2


# Warnings

WARNINGS = [
    ((), []),
    (
        ("microbatch_size=32",),
        [
            r"[\d.]+ GB do not fit into 80 GB a device, of which a tenth should stay free:"
            r" microbatch_size="
            "16 fits"
        ],
    ),
    (
        ("model.config.hidden_size=65536",),
        [
            r".* TB do not fit into 80 GB a device, .*: not even one row does: set"
            r" parallelism.activation_checkpointing=true, or "
            "take more or larger devices$"
        ],
    ),
    (
        ("scheduler.warmup=0.2dur",),
        ["scheduler.warmup=0.2dur is 20% of the run; more than 10% is seldom meant"],
    ),
    (("dataset_tokens=2_000_000_000",), [r"5.4 epochs: text that is repeated more than 4 times"]),
    (("precision=fp32",), ["precision=fp32: the peak"]),
    (
        ("train_data.cache_limit=1gb",),
        [r"train_data.cache_limit=1gb: 19.4 GB are in use at once; training refuses it"],
    ),
    (
        ("nodes=2",),
        [
            "train_data.num_canonical_nodes=1: every node downloads nearly all of the data; with 2"
            " each"
        ],
    ),
    (("nodes=2", "train_data.num_canonical_nodes=2"), []),
    (
        ("save_interval=1ba",),
        ["save_interval=1ba: saving takes [78][0-9]% of the time; save less often"],
    ),
    (
        ("save_folder=null", "preemption_hours=1"),
        ["save_folder=null: a run that is interrupted starts from the beginning"],
    ),
    (
        ("save_interval=20000ba", "preemption_hours=1"),
        [r"save_interval=20000ba: \d+.\d% of the time counts when killed every"],
    ),
]


@pytest.fixture(scope="module")
def supplies() -> dict[Any, Supply]:
    return {}


@pytest.mark.parametrize(
    ("keys", "expected"), WARNINGS, ids=lambda value: " ".join(value)[:40] or "nothing"
)
def test_warnings(keys: tuple[str, ...], expected: list[str], supplies: dict[Any, Supply]) -> None:
    config = plan_config("gla_340m", "dataset_tokens=10_000_000_000", *keys)
    what = config.dataset_tokens, config.nodes, config.train_data.num_canonical_nodes
    if what not in supplies:  # a second each
        supplies[what] = typing.cast(Supply, find_supply(config))
    found = warned_of(config, supplies[what])
    assert len(found) == len(expected), found
    for warning, pattern in zip(found, expected, strict=True):
        assert re.match(pattern, warning), warning


@pytest.mark.parametrize(
    ("precision", "warning"),
    [
        ("amp_fp16", "CPUs do not train in fp16; training refuses it"),
        ("amp_bf16", "only for CPUs with AVX512_BF16 or AMX; training refuses it on others"),
    ],
)
def test_half_precision_on_a_cpu(precision: str, warning: str) -> None:
    """It takes as much memory as fp32, since only products are computed in it."""
    where: dict[str, Any] = {"device": "cpu", "devices": 1}
    keys = (f"precision={precision}", "dataset_tokens=1_000_000")
    config = plan_config("gla_tiny", *keys, **where)
    found = find_supply(config)
    assert isinstance(found, Supply)
    assert warned_of(config, found) == [f"precision={precision}: {warning}"]
    assert parts_of(*keys, name="gla_tiny", **where) == parts_of(name="gla_tiny", **where)


def test_what_training_would_refuse_is_refused() -> None:
    rule = "must be a multiple of devices x microbatch_size = 6 x 8 = 48"
    with pytest.raises(ConfigError, match=f"global_batch_size=256: {rule}$"):
        plan_config("gla_340m", devices=6)


def test_rows_of_another_length(dataset: Path) -> None:
    config = small(dataset, "context_length=64")
    found = find_supply(config)
    assert isinstance(found, Supply)
    assert (
        warned_of(config, found)[0]
        == f"context_length=64: the dataset's rows are {CONTEXT_LENGTH} tokens long; training"
        " refuses it"
    )


# The script


def test_a_plan_comes_true(corpus: Corpus, undisturbed: Path) -> None:
    """The plan of the run that the other tests look at: its steps, its tokens."""
    keys = (
        "devices=1",
        "device=cpu",
        "tokens_per_second=1000",
        "preemption_hours=1",
        "price_per_hour=1",
    )
    process = run_script("recipes/plan.py", *corpus.keys(undisturbed), *keys)
    plan = last_json(process)
    summary = json.loads((undisturbed / "summary.json").read_text())
    assert (plan["steps"], plan["tokens"]) == (summary["steps"], summary["train_tokens"])
    assert plan["data"]["steps_per_epoch"] == 15
    assert plan["warnings"] == []
    lines = process.stdout.splitlines()
    assert lines[0] == "undisturbed on 1 x 1 x cpu"
    assert all(len(line) <= 100 for line in lines[:-1])
    told = dict(
        line.split(maxsplit=1)
        for line in lines
        if line.startswith(("parameters", "downloads", "dataset", "goodput"))
    )
    assert told["parameters"] == f"{plan['parameters']:,}"
    assert told["dataset"].endswith("2.67 epochs of 15 steps")
    assert told["downloads"] == "0 bytes to each node"
    shares = [
        f"{plan['preemption'][name]:.1%}"
        for name in ("goodput", "goodput_as_configured", "goodput_with_notice")
    ]
    expected = "{} then, {} with save_interval as it is; {} with notice enough to save".format(
        *shares
    )
    assert told["goodput"] == expected


def test_a_plan_without_its_data(corpus: Corpus, tmp_path: Path) -> None:
    keys = [
        *corpus.keys(tmp_path / "run"),
        f"train_data.local={tmp_path / 'none'}",
        "devices=1",
        "device=cpu",
    ]
    plan = last_json(run_script("recipes/plan.py", *keys))
    assert plan["data"] is None
    assert plan["warnings"] == [
        "the training data cannot be read, so the plan leaves it out; give dataset_tokens "
        f"({tmp_path / 'none'}: no such folder)"
    ]
    process = run_script("recipes/plan.py", *keys, "max_duration=2ep")
    assert process.returncode == 2
    assert (
        process.stderr.splitlines()[-1]
        == "error: command line: max_duration=2ep: is in epochs, and the dataset cannot be read;"
        " give dataset_tokens"
    )
    assert not (tmp_path / "run").exists()


def test_a_plan_counts_what_adapters_train() -> None:
    """Gradients, optimizer and checkpoints are of the adapters, weights and FLOPs of all."""
    keys = {"hidden_size": 64, "num_hidden_layers": 2, "num_heads": 2, "vocab_size": 1000}
    hf_config = build_hf_config({"model_type": "gla", **keys}, None, CONTEXT_LENGTH, to_run=False)
    whole, adapted = (read_size(hf_config, lora) for lora in (None, LoraConfig(rank=2)))
    assert whole.trained == whole.parameters
    added = adapted.parameters - whole.parameters
    assert adapted.trained == added
    assert 0 < added < whole.parameters / 10
    unused = 1000 * 64  # input embeddings are looked up, not multiplied
    flops = 4 * (whole.parameters - unused) + 6 * added
    assert adapted.work.flops_per_token(CONTEXT_LENGTH) == flops
    both = LoraConfig(rank=2, train_embeddings=True)
    assert read_size(hf_config, both).trained == added + 2 * unused
