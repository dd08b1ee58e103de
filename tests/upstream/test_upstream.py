"""Why others' packages are patched: each of these fails when its patch is no longer needed.

Then delete the patch, its test, and its row of docs/upstream.md (`make docs`).
"""

from __future__ import annotations

import ast
import inspect
import pickle
import shutil
from pathlib import Path

import pytest
from omegaconf import OmegaConf
from omegaconf.errors import InterpolationKeyError, OmegaConfBaseException

from tests.runs import ROOT, check, run_script, two_ranks

PATCHES = sorted((ROOT / "flame_composer" / "upstream").glob("[a-z]*.py"))


def forked(tmp_path: Path, code: str) -> str:
    """What code prints in a process of its own, which has imported what the scripts do."""
    (tmp_path / "code.py").write_text(code)
    return check(run_script(tmp_path / "code.py")).stdout


def test_every_patch_says_what_it_is_and_has_a_test():
    tests = Path(__file__).read_text()
    for path in PATCHES:
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.FunctionDef) and "Upstream: " in (
                ast.get_docstring(node) or ""
            ):
                assert "Mends: " in (ast.get_docstring(node) or ""), node.name
                assert f"_{node.name}" in tests, f"{path.stem}.{node.name} has no test"


def test_known_as_causal(tmp_path):
    """Composer imports every causal model that transformers has, to ask about one."""
    code = """
import sys
import torch
from composer.models import huggingface

def imported():
    return sum("transformers.models." in name and ".modeling_" in name for name in sys.modules)

before = imported()
huggingface._is_registered_causal_lm(torch.nn.Linear(1, 1))
print(imported() - before)
"""
    assert int(forked(tmp_path, code)) > 50


class Runs:
    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self):
        return Path.touch, (self.marker,)


def test_load_checkpoints_with(tmp_path):
    """Composer's own reading runs what is pickled in a checkpoint."""
    import torch

    marker = tmp_path / "marker"
    torch.save({"state": Runs(marker)}, tmp_path / "ba1.pt", pickle_module=pickle)
    code = f"""
from composer.utils import checkpoint

checkpoint._torch_load_with_validation({str(tmp_path / "ba1.pt")!r}, map_location="cpu")
"""
    forked(tmp_path, code)
    assert marker.exists()


def test_own_shared_memory(tmp_path):
    """Upstream's names are the first small numbers that nothing has, for every user to see."""
    code = """
from streaming.base.shared import get_shm_prefix
from streaming.base.world import World

number, memory = get_shm_prefix(["/nowhere"], [None], World.detect())
print(number, memory.shm.name)
memory.cleanup()
"""
    number, name = forked(tmp_path, code).split()
    assert int(number) < 10_000
    assert name.endswith("_locals")
    assert name.startswith(f"{int(number):06}")


def test_average_on_cpus(tmp_path):
    """gloo gives the sum where the mean is asked for."""
    code = """
import torch
import torch.distributed as dist

dist.init_process_group("gloo")
out = torch.empty(1)
try:
    dist.reduce_scatter_tensor(out, torch.full((2,), 3.0), op=dist.ReduceOp.AVG)
    print(out.item())
except RuntimeError as error:
    print("refused")
"""
    (tmp_path / "code.py").write_text(code)
    for rank in two_ranks(tmp_path / "code.py"):
        assert rank.stdout.split() in (["6.0"], ["refused"]), "the mean is 3"


def test_replicate_on_cpus(tmp_path):
    """Two replicas of one shard each fail in the backward pass, or at its end."""
    code = """
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from flame_composer.upstream.fsdp import average_on_cpus

dist.init_process_group("gloo")
average_on_cpus()
model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4))
mesh = init_device_mesh("cpu", (2, 1), mesh_dim_names=("replicate", "shard"))
for part in model:
    fully_shard(part, mesh=mesh)
fully_shard(model, mesh=mesh)
try:
    for _ in range(2):
        model(torch.ones(2, 4)).sum().backward()
    print("works")
except Exception as error:
    print("fails", type(error).__name__)
"""
    (tmp_path / "code.py").write_text(code)
    assert [rank.stdout.split()[0] for rank in two_ranks(tmp_path / "code.py")] == [
        "fails",
        "fails",
    ]


def test_no_foreign_code(tmp_path):
    """The harness runs the functions that a task's file names."""
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks/own.py").write_text(
        "import pathlib\npathlib.Path(__file__).with_name('ran').touch()\ndef f(): pass\n"
    )
    (tmp_path / "tasks/own.yaml").write_text("task: own\nprocess_docs: !function own.f\n")
    code = f"""
from lm_eval.tasks._yaml_loader import load_yaml

load_yaml({str(tmp_path / "tasks/own.yaml")!r})
"""
    forked(tmp_path, code)
    assert (tmp_path / "tasks/ran").exists()


def test_import_evaluate(tmp_path):
    """A script's folder comes before installed packages."""
    shutil.copy(ROOT / "recipes/evaluate.py", tmp_path / "evaluate.py")
    (tmp_path / "code.py").write_text("import evaluate\nprint(evaluate.__file__)\n")
    import subprocess
    import sys

    command = [sys.executable, str(tmp_path / "code.py")]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert printed.strip() == str(tmp_path / "evaluate.py")


def test_bars(tmp_path):
    """The harness's bars do not ask whether they go to a terminal."""
    code = """
import lm_eval.api.task
import tqdm

assert lm_eval.api.task.tqdm is tqdm.tqdm
for _ in lm_eval.api.task.tqdm(range(3)):
    pass
"""
    (tmp_path / "code.py").write_text(code)
    assert "3/3" in check(run_script(tmp_path / "code.py")).stderr


def test_load_yaml():
    """OmegaConf keeps nothing of what was written, and its private loader is still there."""
    from omegaconf import _yaml

    assert OmegaConf.create("{a: 1.10, b: no}") == {"a": 1.1, "b": False}
    assert not hasattr(OmegaConf, "get_yaml_loader")
    assert callable(_yaml.get_yaml_loader)


def test_dump_yaml():
    """What OmegaConf or PyYAML writes is read as something else than it was."""
    import yaml

    resolved = OmegaConf.to_yaml(OmegaConf.create({"key": r"\${HOME}"}), resolve=True)
    with pytest.raises(InterpolationKeyError):
        _ = OmegaConf.create(resolved).key
    assert OmegaConf.create(yaml.safe_dump({"key": "1e5"})).key == 100_000


def test_resolved_by(monkeypatch):
    """A resolver is of the whole process, and nothing else tells what came from a variable."""
    monkeypatch.setenv("FLAME_SECRET", "hunter2")
    config = OmegaConf.create({"key": "${oc.env:FLAME_SECRET}"})
    assert OmegaConf.to_container(config, resolve=True) == {"key": "hunter2"}
    assert "resolvers" not in inspect.signature(OmegaConf.to_container).parameters
    assert "resolvers" not in inspect.signature(OmegaConf.to_object).parameters


def test_reason_of_failure():
    """OmegaConf's message begins with a class's name, and tells of its parser's tokens."""
    for text, told in (
        ("${oc.env:FLAME_NOT_SET}", "KeyError raised while resolving interpolation: "),
        ("${oc.decode:'[1,'}", "GrammarParseError raised while resolving interpolation: "),
    ):
        with pytest.raises(OmegaConfBaseException, match=f"^{told}"):
            _ = OmegaConf.create({"key": text}).key


@pytest.mark.parametrize("path", PATCHES, ids=lambda path: path.stem)
def test_modules_name_the_version_they_were_written_for(path):
    assert any(digit.isdigit() for digit in path.read_text())
