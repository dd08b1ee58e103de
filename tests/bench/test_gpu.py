"""`make gpu` without a GPU: what can be known before the first minute on a real one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from flame_composer.bench import gpu
from flame_composer.bench.gpu_parts import PARTS, Site
from flame_composer.config.gpu import GPU_PARTS, GpuBenchmarkConfig
from flame_composer.config.load import load
from flame_composer.config.train import TrainConfig
from tests.runs import last_json, run_script


def test_every_part_has_a_stage_and_a_function():
    staged = [name for stage in gpu.STAGES for name in stage]
    assert sorted(staged) == sorted(GPU_PARTS) == sorted(PARTS)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_without_a_gpu_it_says_how_to_rehearse():
    refused = run_script("recipes/benchmark.py", "gpu")
    assert refused.returncode == 2
    assert refused.stderr == (
        "error: there is no GPU here; rehearse=true runs the same commands on small models without"
        " one\n"
    )


def test_parts_run_as_the_keys_say(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run: list[tuple[Any, ...]] = []

    def note(limits: dict[str, int], folder: Path, is_rehearsal: bool, left: float | None) -> Any:
        run.append((list(limits), is_rehearsal, left is None))
        return {name: {"answers": []} for name in limits}

    monkeypatch.setattr(gpu, "run_parts", note)
    keys = ["names=[parity,tests,decode]"]
    found, is_well = gpu.check_all(load(GpuBenchmarkConfig, keys), tmp_path)
    assert run == [(["tests", "parity"], False, False), (["decode"], False, False)]
    assert is_well
    assert list(found["parts"]) == ["tests", "parity", "decode"]
    run.clear()
    gpu.check_all(load(GpuBenchmarkConfig, [*keys, "rehearse=true"]), tmp_path)
    assert run == [([name], True, True) for name in ("tests", "parity", "decode")]


def test_a_part_that_fails_or_takes_too_long_hides_no_other(tmp_path: Path) -> None:
    results = gpu.run_parts({"auto": 100, "nothing": 100}, tmp_path, True, 100)
    assert results["auto"]["answers"][0]["question"] == "microbatch_size=auto"
    assert results["nothing"]["problem"] == "KeyError: 'nothing' (status 1)"
    # parity takes seconds to import what it needs
    assert gpu.run_parts({"parity": 1}, tmp_path, True, 100) == {
        "parity": {"problem": "not done after 1 s"}
    }
    assert gpu.run_parts({"parity": 99}, tmp_path, True, 3) == {
        "parity": {"problem": "no time was left"}
    }


def test_what_was_found_is_kept(tmp_path: Path) -> None:
    keys = ("rehearse=true", "names=[auto]", f"out={tmp_path}/out")
    found = last_json(run_script("recipes/benchmark.py", "gpu", *keys))
    assert json.loads((tmp_path / "out/gpu.json").read_text()) == {
        key: value for key, value in found.items() if key != "benchmark"
    }
    table = (tmp_path / "out/gpu.md").read_text()
    assert "Rehearsed without a GPU: no figure here is one of a GPU" in table
    assert table.endswith(
        "| auto | microbatch_size=auto | not rehearsed: memory is tried out on a GPU only |\n"
    )
    assert (tmp_path / "out/auto.log").exists()
    refused = run_script("recipes/benchmark.py", "gpu", *keys, f"folder={tmp_path}/missing")
    assert refused.returncode == 1
    assert refused.stderr.startswith(f"error: folder: {tmp_path}/missing/")


def test_problems_are_in_the_table() -> None:
    found = {"device": "A", "cores": 2, "commit": "c", "seconds": 3, "rehearsal": False}
    found |= gpu._versions()
    parts = {"data": {"problem": "a | b"}, "save": {"answers": [{**ANSWER}]}}
    *_, first, second = gpu._table({**found, "parts": parts})
    assert first == "| data | | **failed**: a / b |"
    assert second == "| save | tokens | 1,234 tokens/s |"


ANSWER = {"question": "tokens", "answer": 1234, "unit": "tokens/s"}


@pytest.mark.parametrize("is_rehearsal", [True, False])
@pytest.mark.parametrize("recipe", ["gla_340m", "transformer_340m", "gated_deltanet_340m"])
def test_keys_of_a_part_are_keys_of_a_run(tmp_path: Path, recipe: str, is_rehearsal: bool) -> None:
    config = load(TrainConfig, Site(tmp_path, is_rehearsal).keys(recipe, "run"))
    assert config.context_length == (128 if is_rehearsal else 2048)
