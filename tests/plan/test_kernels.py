"""Kernels noted, compiled and judged for GPUs that are not here."""

from __future__ import annotations

import errno
import importlib
import itertools
import json
import multiprocessing
import os
import re
import subprocess
import sys
import time
import types
import unittest
from pathlib import Path
from typing import Any

import pytest
import torch
from triton.backends.compiler import GPUTarget

from flame_composer.config.load import load
from flame_composer.config.plan import PlanConfig
from flame_composer.model.hf_config import build_hf_config
from flame_composer.plan.child import child_for
from flame_composer.plan.compiling import Verdict
from flame_composer.plan.kernels import ENDED_HERE, GPUS, SHARED_MEMORY, Checked
from flame_composer.plan.memory import DEVICES
from flame_composer.upstream import triton
from flame_composer.upstream.fakes import autocast_as_on_gpus
from tests import compile_table
from tests.runs import ROOT, last_json, run_script


def plan_config(name: str, device: str, *keys: str) -> PlanConfig:
    return load(PlanConfig, [f"{ROOT}/yamls/{name}.yaml", "devices=1", f"device={device}", *keys])


# What passes for a GPU


@pytest.fixture
def autocast_lists(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The lists by which torch tests its own, without what else its tests import."""
    name = "torch.testing._internal.common_utils"
    stand_in = types.SimpleNamespace(TEST_WITH_ROCM=False, TestCase=unittest.TestCase)
    monkeypatch.setitem(sys.modules, name, stand_in)
    return importlib.import_module("torch.testing._internal.autocast_test_lists").AutocastTestLists


# Of torch's lists: what is inside of conv1d, cells of recurrent networks, which return several
# tensors, and entries that do not fit their own list.
NOT_CALLED = re.compile(r"_?convolution|cudnn_.*|.*_cell|nll_loss2d|einsum|chain_matmul")


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
def test_autocast_is_that_of_cuda(autocast_lists: Any, half: torch.dtype) -> None:
    checked = 0
    owners = {"torch": torch, "nn": torch.nn.functional, "methods": torch.Tensor}
    lists = autocast_lists(torch.device("cpu"))
    with autocast_as_on_gpus(), torch.autocast("cpu", half):
        for owner, kind in itertools.product(owners, ("fp16", "fp32")):
            for name, args, *keywords in getattr(lists, f"{owner}_{kind}", ()):
                if NOT_CALLED.fullmatch(name):
                    continue
                result = getattr(owners[owner], name)(*args, **(keywords or [{}])[0])
                assert result.dtype == (half if kind == "fp16" else torch.float32), name
                checked += 1
    assert checked >= 70


# Launches


FOLLOW = """
import json, sys
from flame_composer.config.load import load
from flame_composer.config.plan import PlanConfig
from flame_composer.plan.child import import_fla
from flame_composer.plan.kernels import GPUS

device, model = sys.argv[1], {"vocab_size": 512, "num_hidden_layers": 4} | json.loads(sys.argv[2])
gpu = GPUS[device]
import_fla(device)
from flame_composer.model.hf_config import build_hf_config
from flame_composer.plan.compiling import judge
from flame_composer.plan.launches import follow

keys = ["context_length=256", "microbatch_size=2", "global_batch_size=2", "devices=1"]
config = load(PlanConfig, ["yamls/gla_340m.yaml", f"device={device}", *keys])
followed = follow(config, build_hf_config(model, None, 256, to_run=False))
family = [each for each in followed.launches if each[0].kernel == sys.argv[3]][:1]
verdicts = []
judge(family, gpu.shared_memory, every=True, report=verdicts.append)
print(json.dumps({
    "failures": followed.failures,
    "kernels": sorted({launch.kernel for launch, _ in followed.launches}),
    "uses": sorted({use for _, uses in followed.launches for use in uses}),
    "configurations": [dict(v.configuration) for launch, _ in family for v in launch.variants],
    "types": json.loads(family[0][0].variants[0].specialization)["signature"],
    "verdicts": [vars(verdict) for verdict in verdicts],
}))
"""


def followed(device: str, model: dict[str, Any], kernel: str, folder: Path) -> dict[str, Any]:
    """What `follow` finds for a small model, and all configurations of a kernel's first launch.

    In a process of its own: what fla takes its GPU for is decided when it is imported.
    """
    (folder / "follow.py").write_text(FOLLOW)
    process = subprocess.run(
        [sys.executable, folder / "follow.py", device, json.dumps(model), kernel],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=os.environ
        | {
            "TRITON_CACHE_DIR": str(folder / "cache"),
            "PYTHONPATH": str(ROOT),
            "DATA_REMOTE": "/nowhere",
            "CUDA_VISIBLE_DEVICES": "",
        },
    )
    assert process.returncode == 0, process.stderr[-2000:]
    return json.loads(process.stdout.splitlines()[-1])


def test_a_family_of_kernels_on_two_architectures(tmp_path: Path) -> None:
    """All its configurations compile, and which there are depends on the architecture."""
    model = {"model_type": "gla", "hidden_size": 256, "num_heads": 2}
    h100, a10 = (
        followed(device, model, "chunk_local_cumsum_vector_kernel", tmp_path)
        for device in ("h100", "a10")
    )
    for found in (h100, a10):
        assert found["failures"] == {}
        assert found["uses"] == ["evaluation", "generation", "training, packed"]
        assert {"chunk_gla_bwd_kernel_intra", "fused_recurrent_fwd_kernel"} < set(found["kernels"])
        assert (found["types"]["s"], found["types"]["cu_seqlens"]) == ("*bf16", "*i64")
        (verdict,) = found["verdicts"]
        assert verdict["uses"] == ["training, packed", "evaluation"]
        assert verdict["compiled"] == verdict["configurations"] == len(found["configurations"])
        assert verdict["errors"] == {}
        assert 0 < verdict["least"] < verdict["most"]
        assert verdict["fit"] == verdict["configurations"]
    assert h100["kernels"] == a10["kernels"]
    sizes = [{each["BS"] for each in found["configurations"]} for found in (h100, a10)]
    assert sizes == [{32, 64}, {16, 32}], "fla's BS_LIST for much and for little shared memory"
    assert a10["verdicts"][0]["least"] < h100["verdicts"][0]["least"]


def test_a_head_that_is_too_large_for_an_architecture(tmp_path: Path) -> None:
    """Softmax attention over heads of 256 channels, whose tiles fla does not divide further."""
    model = {"model_type": "forgetting_transformer", "hidden_size": 256, "num_heads": 1}
    found = followed("a10", model, "parallel_attn_fwd_kernel", tmp_path)
    (verdict,) = (Verdict(**each) for each in found["verdicts"])
    assert (verdict.fit, verdict.compiled) == (0, verdict.configurations)
    assert verdict.least is not None
    assert verdict.least > 99 << 10
    hf_config = build_hf_config({**model, "vocab_size": 512}, None, 256, to_run=False)
    (line,) = Checked(GPUS["a10"], [verdict], {}).warnings("a10", hf_config)
    assert re.fullmatch(
        r"no configuration of parallel_attn_fwd_kernel \(training, packed.*\) fits a10 \(sm_86\):"
        r" the least, num_warps=\d num_stages=\d, asks for 104.2 KB of shared memory a block, and"
        r" there are 99; give the model more heads, or take another device",
        line,
    )


# What a plan says


def test_every_gpu_has_its_architecture() -> None:
    assert set(GPUS) == set(DEVICES)
    assert {gpu.capability for gpu in GPUS.values()} == set(SHARED_MEMORY)


def test_no_kernels_are_compiled_unless_asked_for() -> None:
    hf_config = build_hf_config({"model_type": "gla", "vocab_size": 512}, None, 64, to_run=False)
    for device, *keys in (("h100", "kernels=none"), ("cpu",)):
        with child_for(device) as child:
            assert child.check(plan_config("gla_tiny", device, *keys), hf_config) is None
            assert child.process.poll() is None
    assert child.process.poll() is not None, "it ends with the plan"


ENDING = """
import os, signal, sys
from pathlib import Path
from types import SimpleNamespace
from flame_composer.plan import compiling
from flame_composer.upstream.triton import Launch

compiling.prepare_to_compile = lambda: None
tries = Path(sys.argv[1])


def compile_one(variant):
    with tries.open("a") as file:
        file.write(variant.name + " ")
    ends, number = variant.ends
    if tries.read_text().split().count(variant.name) <= number:
        os.kill(os.getpid(), ends)
    return 1024


compiling.compiled_shared_memory = compile_one


def launch(name, ends, number):
    variant = SimpleNamespace(name=name, ends=(ends, number), size=(1,), configuration=(("B", 1),))
    return Launch(name, (variant,)), ["training"]


launches = [
    launch("once", signal.SIGKILL, 1),
    launch("always", signal.SIGKILL, 9),
    launch("assertion", signal.SIGABRT, 9),
    launch("well", 0, 0),
]
compiling.judge(
    launches, 2048, every=False, report=lambda v: print(v.kernel, v.fit, list(v.errors), flush=True)
)
"""


def test_a_compiler_that_is_killed_is_not_the_recipes_fault(tmp_path: Path) -> None:
    (tmp_path / "ending.py").write_text(ENDING)
    process = subprocess.run(
        [sys.executable, tmp_path / "ending.py", tmp_path / "tries"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    assert process.returncode == 0, process.stderr[-2000:]
    assert sorted(process.stdout.splitlines()) == [
        "always 0 ['the compiler was ended here by signal 9, twice']",
        'assertion 0 ["the compiler\'s process ended with -6"]',
        "once 1 []",
        "well 1 []",
    ]
    tries = (tmp_path / "tries").read_text().split()
    assert sorted(tries) == ["always", "always", "assertion", "once", "once", "well"]
    assert set(tries[-2:]) == {"always", "once"}, "again when all others are done"


def test_what_is_not_known_is_not_called_unfit() -> None:
    hf_config = build_hf_config({"model_type": "gla", "vocab_size": 512}, None, 64, to_run=False)
    verdict = Verdict("large", ["generation"], 2)
    verdict.add("BK=16", None, f"{ENDED_HERE} by signal 9, twice", 99 << 10)
    assert Checked(GPUS["a10"], [verdict], {}).warnings("a10", hf_config) == [
        "whether large (generation) fits a10 (sm_86) is not known: the compiler was ended here by"
        " signal 9, twice; plan again when more memory is free, or give kernels=none"
    ]


def test_a_head_that_no_kernel_takes_is_named() -> None:
    """With the reason, the remedy and what fla has there, and no traceback."""
    process = run_script(
        "recipes/plan.py",
        f"{ROOT}/yamls/gated_deltanet_340m.yaml",
        "devices=1",
        "device=a10",
        "dataset_tokens=10_000_000_000",
        "model.config.head_dim=512",
        "model.config.hidden_size=64",
        "model.config.num_heads=1",
        "model.config.vocab_size=512",
    )
    plan = last_json(process)
    said = [line for line in plan["warnings"] if "head dimension larger than 256" in line]
    assert said[0].startswith("memory is estimated by formula, because no step can be counted")
    refused = said[1:]
    assert len(refused) == 3, plan["warnings"]
    assert refused[0].startswith("training, packed: fla refuses it on a GPU")
    assert plan["kernels"]["failures"].keys() == {"training, packed", "evaluation", "generation"}
    assert all(verdict["fit"] for verdict in plan["kernels"]["verdicts"])
    assert f"{len(plan['kernels']['verdicts'])} launches have a configuration" in process.stdout


def test_what_does_not_fit_is_told_in_one_line() -> None:
    hf_config = build_hf_config(
        {"model_type": "gla", "vocab_size": 512, "num_heads": 1}, None, 64, to_run=False
    )
    large, broken = Verdict("large", ["training, packed"], 2), Verdict("broken", ["generation"], 1)
    for stages in (2, 3):
        large.add(f"BK=128 num_stages={stages}", stages * 60 << 10, "", 99 << 10)
    broken.add("BK=16", None, "PTXASError: no", 99 << 10)
    lines = Checked(GPUS["a10"], [large, large, broken], {}).warnings("a10", hf_config)
    assert lines == [
        "no configuration of large (training, packed) fits a10 (sm_86): the least, BK=128"
        " num_stages=2, asks for 120 KB of shared memory a block, and there are 99; give the model"
        " a smaller expand_k or expand_v, or more num_heads, or take another device",
        "no configuration of broken (generation) compiles for a10 (sm_86): PTXASError: no; take"
        " another device or model",
    ]


@pytest.mark.faults
@pytest.mark.timeout(14400)
@pytest.mark.skipif(
    os.environ.get("FLAME_COMPOSER_FAULTS") != "table",
    reason="takes an hour: FLAME_COMPOSER_FAULTS=table pytest -m faults tests/plan/test_kernels.py",
)
def test_every_recipe_fits_every_architecture(tmp_path: Path) -> None:
    """The table of docs/gpu.md."""
    results = tmp_path / "results.jsonl"
    compile_table.compile_all(results, False, compile_table.recipes())
    rows = list(compile_table.read(results))
    assert len(rows) == len(compile_table.recipes()) * len(SHARED_MEMORY)
    for row in rows:
        where = row["recipe"], row["capability"]
        assert row["verdicts"], where
        fits = all(verdict["fit"] for verdict in row["verdicts"])
        multiplies = row["recipe"] != "mamba2_340m"  # whose kernels are norms and convolutions
        assert fits == (row["capability"] != compile_table.NOT_FOR or not multiplies), where
        assert set(row["failures"]) <= compile_table.REFUSED.get(row["recipe"], set()), where


# Compiling before timing

TUNED = """
import os
from contextlib import suppress
from pathlib import Path

import torch, triton
import triton.language as tl
from flame_composer.upstream.triton import claim_gpu, compile_candidates_together

claim_gpu(90, 227 << 10, 132)


@triton.autotune([triton.Config({"BLOCK": size}, num_warps=1) for size in (16, 32, 64, 128)], ["n"])
@triton.heuristics({"IS_LARGE": lambda args: args["n"] > 4})
@triton.jit
def scale(x, n, BLOCK: tl.constexpr, IS_LARGE: tl.constexpr):
    tl.static_assert(BLOCK != 64)
    at = tl.arange(0, BLOCK)
    tl.store(x + at, tl.load(x + at, mask=at < n) * 2, mask=at < n)


def binaries():
    found = sorted(Path(os.environ["TRITON_CACHE_DIR"]).rglob("*.cubin"))
    return {path: path.stat().st_mtime_ns for path in found}


timed = []


def bench(call, quantiles):
    timed.append(binaries())
    if len(timed) > 1:  # compile, as the first launch does; there is no GPU to launch it on
        with suppress(Exception):
            call()
    return [1.0] * 3


scale.do_bench = bench
for _ in range(2):
    compile_candidates_together(2)
with suppress(Exception):
    scale[(1,)](torch.empty(8, device="meta"), 8)
first, *others = timed
assert len(first) == 3, first  # all but the one that cannot compile
assert all(other == first for other in others), "compiled again"
print(len(timed))
"""


def test_candidates_are_compiled_together_before_one_is_timed(tmp_path: Path) -> None:
    (tmp_path / "tuned.py").write_text(TUNED)
    process = subprocess.run(
        [sys.executable, tmp_path / "tuned.py"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=os.environ | {"TRITON_CACHE_DIR": str(tmp_path / "cache"), "PYTHONPATH": str(ROOT)},
    )
    assert process.returncode == 0, process.stderr[-2000:]
    assert process.stdout.split() == ["4"]


def test_a_compiler_that_hangs_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its processes are ended, and the autotuner compiles by itself from then on."""
    monkeypatch.setattr(triton, "PATIENCE", 0.5)
    monkeypatch.setattr(triton, "prepare_to_compile", lambda: None)
    monkeypatch.setattr(triton, "_compile_for", lambda *_: time.sleep(60))
    variant: Any = types.SimpleNamespace(size=(1,), function=types.SimpleNamespace(cache_key=""))
    target = GPUTarget("cuda", 90, 32)
    assert not triton._compile_in_processes([variant] * 3, target, 2)
    assert multiprocessing.active_children() == []

    def no_process(_: Any) -> None:
        raise BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable")

    monkeypatch.setattr(multiprocessing.context.ForkProcess, "start", no_process)
    assert not triton._compile_in_processes([variant], target, 2)
    assert not triton._compile_in_processes([variant], GPUTarget("hip", "gfx942", 64), 2)
