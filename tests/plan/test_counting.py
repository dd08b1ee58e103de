"""The memory of a step as torch counts it, against what torch's allocator hands out in real steps.

The real steps are those of recipes/train.py on this CPU, under torch's profiler, which sees every
allocation and release of a tensor.
"""

from __future__ import annotations

import functools
import json
import os
import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from flame_composer.config.load import load
from flame_composer.config.plan import PlanConfig
from flame_composer.errors import ConfigError
from flame_composer.model.build import meta_model
from flame_composer.plan.child import CannotCount, child_for
from flame_composer.plan.figures import Memory
from flame_composer.plan.fitting import estimate, largest_microbatch
from flame_composer.plan.memory import moments, read_size
from flame_composer.plan.planning import count_and_draw_up, find_hf_config
from tests.conftest import make_dataset
from tests.data_fixtures import byte_tokenizer
from tests.runs import ROOT, Script, check, last_json, run_script

Counted = Callable[..., Memory]

# What a run allocates at its peak, from before its model is built.
MEASURE = """import json, runpy, sys
import torch
from torch.profiler import ProfilerActivity, profile

out, sys.argv = sys.argv[1], sys.argv[2:]
with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
    except SystemExit as ended:
        assert not ended.code, ended.code
events = profiled.profiler.kineto_results.events()
memory = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
now = peak = 0
for _, change in memory:
    now += change
    peak = max(peak, now)
with open(out, "w") as file:
    json.dump(peak, file)
"""


@pytest.fixture(scope="module")
def counted() -> Iterator[Counted]:
    """A function that counts a step of a recipe, in one process a device for this module."""
    with ExitStack() as stack:
        child = functools.cache(lambda device: stack.enter_context(child_for(device)))

        def count(name: str, rows: int, *keys: str) -> Memory:
            config = config_of(name, *keys)
            return child(config.device).count(config, find_hf_config(config, None), rows)

        yield count


def config_of(name: str, *keys: str) -> PlanConfig:
    os.environ.setdefault("DATA_REMOTE", "/nowhere")
    defaults = ["devices=8", "device=h100", "dataset_tokens=10_000_000_000"]
    return load(PlanConfig, [f"{ROOT}/yamls/{name}.yaml", *defaults, *keys])


# Two layers of each 340 M recipe: quick, and as wide as the whole.
FEW = "model.config.num_hidden_layers=2"
ON_CPU = ("devices=1", "device=cpu")


@pytest.mark.parametrize(
    ("name", "keys"),
    [
        ("gla_tiny", ()),
        ("gla_tiny", ("global_batch_size=16",)),
        ("gla_tiny", ("varlen=false", "model.config.vocab_size=16384")),
        ("gla_tiny", ("parallelism.activation_checkpointing=true",)),
        ("transformer_tiny", ()),
        ("transformer_tiny", ("parallelism.activation_checkpointing=true",)),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else value,
)
def test_a_count_is_what_a_real_step_allocates(
    counted: Counted, tmp_path: Path, name: str, keys: tuple[str, ...]
) -> None:
    """Within a tenth, as the plan promises; it was within a thousandth when this was written."""
    byte_tokenizer().save_pretrained(tmp_path / "tokenizer")
    make_dataset(tmp_path / "data", num_documents=300, context_length=128, shard_size=200_000)
    script = tmp_path / "measure.py"
    script.write_text(MEASURE)
    run = (*keys, "context_length=128", "model.config.num_hidden_layers=2")
    check(
        Script(
            script,
            tmp_path / "peak",
            "recipes/train.py",
            f"{ROOT}/yamls/{name}.yaml",
            f"tokenizer={tmp_path / 'tokenizer'}",
            f"train_data.local={tmp_path / 'data/out'}",
            "train_data.num_workers=0",
            "eval_data=null",
            f"log_folder={tmp_path / 'run'}",
            "save_folder=null",
            "max_duration=2ba",
            "scheduler.warmup=0ba",
            *run,
        ).wait()
    )
    peak = json.loads((tmp_path / "peak").read_text())
    memory = counted(name, 8, *ON_CPU, *run)
    assert memory.counted
    print(f"{name} {' '.join(keys)}: counted {memory.tensors}, measured {peak}")
    assert memory.tensors == pytest.approx(peak, rel=0.1)


def test_divided_layers_are_counted(counted: Counted) -> None:
    """On 2 x 2 devices: the weights of layers in four, all else in two, and half of what they
    compute at a time.
    """
    config = find_hf_config(config_of("gla_340m", FEW), None)
    whole = meta_model(config)
    projections = re.compile(r"(q|k|v|g|o|gate|up|down)_proj|gk_proj.1")
    inside = sum(p.numel() for name, p in whole.named_parameters() if projections.search(name))
    outside = sum(p.numel() for p in whole.parameters()) - inside
    four = ("devices=4", "parallelism.tensor=2", "global_batch_size=32", "microbatch_size=8")
    fsdp = ("parallelism.fsdp.sharding_strategy=FULL_SHARD",)
    divided = counted("gla_340m", 8, FEW, *four, *fsdp)
    sharded = counted("gla_340m", 8, FEW, *four[:1], *four[2:], *fsdp)
    assert divided.counted
    share = inside / 4 + outside / 2
    assert divided.weights == pytest.approx(4 * share, rel=0.01)
    assert divided.optimizer == pytest.approx(8 * share, rel=0.01)
    assert sharded.weights == pytest.approx(4 * (inside + outside) / 4, rel=0.01)
    assert 0.5 < divided.activations / sharded.activations < 0.8
    with pytest.raises(CannotCount, match=r"must divide model\.config\.num_heads=4"):
        counted("gla_340m", 8, FEW, "devices=8", "parallelism.tensor=8", *fsdp)
    with pytest.raises(ConfigError, match=r"parallelism\.cpu_fsdp=false: must be true with"):
        counted("gla_340m", 8, FEW, "device=cpu", "devices=8", "parallelism.tensor=4", *fsdp)


def test_parts_of_strategies_are_those_of_arithmetic(counted: Counted) -> None:
    """FSDP2 over 8 ranks, over 2 replicas, and plain data parallelism."""
    size = read_size(find_hf_config(config_of("gla_340m", FEW), None))
    N = size.parameters
    share = pytest.approx(4 * N / 8, rel=0.01)
    shard = counted("gla_340m", 1, FEW)
    assert (shard.weights, shard.gradients) == (share, share)
    assert shard.optimizer == pytest.approx(8 * N / 8, rel=0.01)
    full = counted("gla_340m", 1, FEW, "parallelism.fsdp.sharding_strategy=FULL_SHARD")
    # What is outside the blocks stays gathered, in bf16.
    assert 2 * (N - size.in_blocks) <= full.copies < shard.copies <= 2.5 * N
    replicas = "parallelism.fsdp.replicas=4"
    hybrid = counted(
        "gla_340m", 1, FEW, "parallelism.fsdp.sharding_strategy=HYBRID_SHARD", replicas
    )
    assert hybrid.weights == pytest.approx(4 * N / 2, rel=0.01)
    by_muon = "optimizer.name=muon"
    kept = moments(config_of("gla_340m", FEW, by_muon), size)
    assert counted("gla_340m", 1, FEW, by_muon).optimizer == pytest.approx(kept / 8, rel=0.01)
    plain = counted("gla_340m", 1, FEW, "parallelism.fsdp=null")
    assert (plain.weights, plain.buffers) == (pytest.approx(4 * N, rel=0.01), 4 * N)
    assert plain.copies == pytest.approx(2 * size.work.multiplied, rel=0.02)
    assert counted("gla_340m", 1, FEW, "parallelism.fsdp=null", "devices=1").buffers == 0


@pytest.mark.parametrize(
    "name",
    [
        "transformer_340m",
        "delta_net_340m",
        "gated_deltanet_340m",
        "gated_deltanet_hybrid_340m",
        "gsa_340m",
        "hgrn2_340m",
    ],
)
def test_every_recipe_is_counted_as_on_a_gpu(counted: Counted, name: str) -> None:
    """With fla's own code around its kernels; activations grow in proportion to the rows."""
    few = [FEW, "model.config.attn.layers=[1]"] if "hybrid" in name else [FEW]
    one, two, four = (counted(name, rows, *few) for rows in (4, 8, 16))
    assert two.total - one.total > 0
    assert four.total - two.total == pytest.approx(2 * (two.total - one.total), rel=0.02)
    if "delta" not in name:  # the kernels of the delta rule refuse fp32
        single = counted(name, 4, FEW, "precision=fp32")
        assert 1.4 < single.activations / one.activations < 2.2


def test_less_is_kept_when_it_is_recomputed(counted: Counted) -> None:
    plain = counted("transformer_340m", 8)
    again = counted("transformer_340m", 8, "parallelism.activation_checkpointing=true")
    away = counted("transformer_340m", 8, "parallelism.activation_cpu_offload=true")
    assert again.activations < plain.activations / 8
    assert away.activations < plain.activations / 4


def test_the_largest_microbatch_is_one_that_was_counted(counted: Counted) -> None:
    config = config_of("gla_340m", FEW, "device=a100_40gb", "context_length=8192")
    asked: list[int] = []

    def count(rows: int) -> Memory:
        asked.append(rows)
        return counted("gla_340m", rows, FEW, "context_length=8192")

    rows = largest_microbatch(config, count)
    assert rows in asked
    assert count(rows).total <= 0.9 * 40e9 < count(2 * rows).total
    assert len(set(asked)) <= 5


def test_a_model_that_cannot_be_counted_is_estimated() -> None:
    config = config_of("gla_340m", FEW, "parallelism.activation_cpu_offload=true")
    hf_config = find_hf_config(config, None)
    size = read_size(hf_config)

    with child_for(config.device) as child:
        plan, reason = count_and_draw_up(config, hf_config, size, None, child.count)
    assert reason is not None
    assert "what a model of fla offloads cannot be told" in reason
    assert plan.memory == estimate(config, size)(plan.microbatch_size)
    assert not plan.memory.counted


def test_a_count_that_fails_on_the_way_is_an_estimate() -> None:
    """Not a part of one: the largest microbatch is estimated, too."""
    config = config_of("gla_340m", FEW)
    hf_config = find_hf_config(config, None)
    size = read_size(hf_config)
    estimated = estimate(config, size)

    def counter(_: object, __: object, rows: int) -> Memory:
        if rows > 1:
            raise CannotCount("killed")
        return estimated(rows)

    plan, reason = count_and_draw_up(config, hf_config, size, None, counter)
    assert reason == "killed"
    assert plan.memory == estimated(plan.microbatch_size)
    assert plan.largest_microbatch_size == largest_microbatch(config, estimated)


def test_a_process_that_dies_says_so_and_is_started_again(monkeypatch: pytest.MonkeyPatch) -> None:
    config = config_of("gla_340m", FEW)
    hf_config = find_hf_config(config, None)
    with monkeypatch.context() as patched:
        patched.setattr("flame_composer.plan.child.COMMAND", "raise SystemExit('no torch')")
        with child_for("h100") as child:
            with pytest.raises(CannotCount, match="status 1: no torch"):
                child.count(config, hf_config, 1)
            patched.setattr("flame_composer.plan.child.COMMAND", "print('half', end='')")
            with pytest.raises(CannotCount, match="status 0: it gave no reason"):
                child.count(config, hf_config, 1)
            patched.undo()
            assert child.count(config, hf_config, 1).counted


def test_the_script_says_how_memory_is_known() -> None:
    keys = ("devices=8", "device=h100", "dataset_tokens=1_000_000_000", FEW)
    process = run_script(
        "recipes/plan.py", f"{ROOT}/yamls/gla_340m.yaml", *keys, env={"DATA_REMOTE": "/nowhere"}
    )
    plan = last_json(process)
    assert plan["memory"]["counted"] is True
    assert "fits), counted by torch\n" in process.stdout
    assert "assumed         10% of the peak (mfu), until you have measured it:" in process.stdout
    assert plan["time"]["mfu"] == 0.1
