"""Why others' packages are patched: each of these fails when its patch is no longer needed.

Then delete the patch, its test, and its row of docs/upstream.md (`make docs`).
"""

from __future__ import annotations

import asyncio
import bz2
import dataclasses
import inspect
import json
import lzma
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
import warnings
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import uvicorn
from omegaconf import OmegaConf
from omegaconf.errors import InterpolationKeyError, OmegaConfBaseException
from streaming import MDSWriter, StreamingDataset
from streaming.base.batching import generate_work
from streaming.base.world import World
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
)
from torch.distributed._tools.mem_tracker import MemTracker
from torch.distributed.algorithms._checkpoint import checkpoint_wrapper
from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.server import ServerState

from flame_composer.reference import patches
from flame_composer.serve import connections
from flame_composer.upstream.books import Books
from flame_composer.upstream.fakes import (
    Fakes,
    attention_as_on_gpus,
    autocast_as_on_gpus,
    fakes_as_on_gpus,
    offloading_as_on_gpus,
)
from tests.runs import ROOT, check, run_ranks, run_script, two_ranks
from tests.stack import FLA, TORCH, TRANSFORMERS


def forked(tmp_path: Path, code: str) -> str:
    """What code prints in a process of its own, which has imported what the scripts do."""
    (tmp_path / "code.py").write_text(code)
    return check(run_script(tmp_path / "code.py")).stdout


def test_every_patch_says_what_it_is_and_has_a_test():
    tests = Path(__file__).read_text()
    found = {name: (what, mends) for name, what, mends in patches()}
    assert {"upstream.streaming.StreamingOrder", "upstream.composer.Sharding"} <= set(found)
    for name, (what, mends) in found.items():
        assert what, f"{name} does not say what it changes"
        assert any(digit.isdigit() for digit in what), f"{name} does not say of which version"
        assert mends, f"{name} does not say what it mends"
        test = f"def test_{name.rpartition('.')[2].strip('_').lower()}("
        assert test in tests, f"{name} has no test"


def test_known_as_causal(tmp_path):
    """Composer imports every causal model that transformers has, to ask about one."""
    code = """
import sys
import time
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


def test_remember_environment(tmp_path):
    """Composer looks up each time what cannot change."""
    code = """
from composer.core import state
from flame_composer.upstream.composer import remember_environment

looked_up = state.get_composer_env_dict
print(looked_up() == looked_up(), looked_up() is looked_up())
for _ in range(2):
    remember_environment()
print(state.get_composer_env_dict() is state.get_composer_env_dict())
print(state.get_composer_env_dict() == looked_up())
"""
    assert forked(tmp_path, code).split() == ["True", "False", "True", "True"]


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


def test_name_modules_once():
    """Composer refuses a model in which an activation without any tensor has two names."""
    from composer.distributed.prepare_distributed import _check_duplicate_modules
    from torch import nn

    from flame_composer.upstream.fsdp import name_modules_once

    shared, tied = nn.Tanh(), nn.Linear(2, 2)
    model = nn.ModuleDict({"a": shared, "inner": nn.Sequential(tied, shared), "b": shared})
    with pytest.raises(ValueError, match="duplicate module references"):
        _check_duplicate_modules(model)
    name_modules_once(model)
    _check_duplicate_modules(model)
    assert model["inner"][0] is tied
    model["tied"] = tied  # its weights would no longer be the same ones
    name_modules_once(model)
    assert model["tied"] is tied


def test_average_on_cpus(tmp_path):
    """gloo gives the sum where the mean is asked for, before torch 2.15."""
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
        found = rank.stdout.strip()
        assert found == "3.0" if TORCH >= (2, 15) else found in ("6.0", "refused"), "the mean is 3"


def test_settle_buckets(tmp_path):
    """Three ranks add up gradients in another order from a process's second step on."""
    code = """
import torch
import torch.distributed as dist

dist.init_process_group("gloo")
torch.manual_seed(0)
model = torch.nn.Sequential(*[torch.nn.Linear(64, 64) for _ in range(6)])
ranks = torch.nn.parallel.DistributedDataParallel(model)
torch.manual_seed(dist.get_rank())
batch = torch.randn(32, 64)
steps = []
for _ in range(2):
    model.zero_grad()
    ranks(batch).square().mean().backward()
    steps.append(torch.cat([each.grad.flatten() for each in model.parameters()]))
print(torch.equal(*steps))
"""
    (tmp_path / "code.py").write_text(code)
    assert [rank.stdout for rank in run_ranks(3, tmp_path / "code.py")] == ["False\n"] * 3


def test_store_of_all_ranks():
    """torch has no public name for it."""
    import torch.distributed as dist

    assert "get_default_store" not in dir(dist)
    assert "get_default_store" not in dir(dist.distributed_c10d)


def test_choose_by():
    """Triton's autotuner asks nobody, and its cache is of this process alone.

    That which Triton 3.4 keeps on disk is of this machine alone, and is no part of a run.
    """
    from triton import Config
    from triton.runtime.autotuner import Autotuner

    names = {"cache", "choose", "choices", "cache_hook"}
    assert not names & set(inspect.signature(Autotuner.__init__).parameters)
    candidates = [Config({"BLOCK": 16}), Config({"BLOCK": 32})]
    (one, other) = (
        Autotuner(Kernel(), ["x"], candidates, ["x"], None, None, do_bench=lambda *_, **__: [0.0])
        for _ in range(2)
    )
    one.run(1)
    assert list(one.cache) == [(1,)]
    assert other.cache == {}


class Kernel:
    @staticmethod
    def fn(x):
        pass

    def run(self, x, BLOCK, **_):
        pass


def test_replicate_on_cpus(tmp_path):
    """Two replicas of one shard each fail in the backward pass, or at its end, before 2.15."""
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
    expected = "works" if TORCH >= (2, 15) else "fails"
    ranks = two_ranks(tmp_path / "code.py")
    assert [rank.stdout.split()[0] for rank in ranks] == [expected] * 2


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
    """The harness's bars do not ask whether they go to a terminal; what resamples prints, too."""
    code = """
import sys
from contextlib import nullcontext
import lm_eval.api.task
import tqdm
from lm_eval.api.metrics import bootstrap_stderr, median
from flame_composer.upstream.lm_eval import bars, ending_pools

assert lm_eval.api.task.tqdm is tqdm.tqdm
with ending_pools(), bars(False) if sys.argv[1] == "mended" else nullcontext():
    for _ in lm_eval.api.task.tqdm(range(3)):
        pass
    print(bootstrap_stderr(median, [1, 2, 3], iters=2000))
"""
    (tmp_path / "code.py").write_text(code)
    given, mended = (check(run_script(tmp_path / "code.py", how)) for how in ("given", "mended"))
    assert "3/3" in given.stderr
    assert "2/2" in given.stderr
    note, number = given.stdout.splitlines()
    assert note.startswith("bootstrapping for stddev")
    assert (mended.stdout, mended.stderr) == (f"{number}\n", "")


def test_template_limits():
    """The sandbox counts neither time nor memory: a text of 100 MB in 6 turns of a loop."""
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    doubled = "{% set n = namespace(x='x' * 100) %}{% for i in range(6) %}{% set n.x = n.x * 10 %}"
    template = ImmutableSandboxedEnvironment().from_string(doubled + "{% endfor %}{{ n.x }}")
    assert len(template.render()) == 10**8


def test_sandbox():
    """jinja2 computes a number of a million digits."""
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    found = ImmutableSandboxedEnvironment().from_string("{{ 10 ** (10 ** 6) % 7 }}").render()
    assert found == str(pow(10, 10**6, 7))
    rounded = ImmutableSandboxedEnvironment().from_string("{{ 1|round(10 ** 4, 'ceil') }}")
    assert rounded.render() == "1.0"  # by way of a number of 10,000 digits


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


def test_sharding():
    """Composer asks for no replicas, whatever it is given."""
    from composer.utils.parallelism import FSDP2Config

    with pytest.warns(UserWarning, match="experimental"):
        assert FSDP2Config().data_parallel_replicate_degree is None
    assert "data_parallel_replicate_degree" not in inspect.signature(FSDP2Config).parameters


def test_split_before_sharding():
    """Composer divides no model whose optimizer decays some weights and not others."""
    from composer.distributed.dist_strategy import prepare_tp_module
    from composer.utils.parallelism import TPConfig

    model = torch.nn.Linear(2, 2)
    groups = [{"params": [model.weight]}, {"params": [model.bias], "weight_decay": 0}]
    with pytest.raises(RuntimeError, match="Multiple optimizer groups are not supported"):
        prepare_tp_module(model, torch.optim.AdamW(groups), TPConfig())


def test_compile_in_private():
    """torch's folder for compiled code is one that anybody can name."""
    import getpass
    import tempfile

    from torch._inductor.runtime.cache_dir_utils import default_cache_dir

    assert default_cache_dir() == f"{tempfile.gettempdir()}/torchinductor_{getpass.getuser()}"


def test_limit_answers(tmp_path):
    """botocore reads an answer to its end, however long it is."""
    code = """
from botocore.awsrequest import AWSResponse

class Server:
    def stream(self):
        for _ in range(200):
            yield bytes(1 << 20)

print(len(AWSResponse("http://nowhere", 200, {}, Server()).content))
"""
    assert int(forked(tmp_path, code)) == 200 << 20


def test_stay(tmp_path):
    """botocore asks a server that redirects every question for ever."""
    code = """
import os
import tests.hostile as servers
import boto3

os.environ.update(AWS_ACCESS_KEY_ID="a", AWS_SECRET_ACCESS_KEY="b", AWS_DEFAULT_REGION="us-east-1")

def answer(connection, request):
    connection.sendall(servers.respond("301 Moved"))

with servers.hostile(answer) as server:
    client = boto3.client("s3", endpoint_url=server.endpoint)
    try:
        client.list_objects_v2(Bucket="data")
    except RecursionError:
        print("without end")
    except Exception as error:
        print(type(error).__name__)
"""
    assert forked(tmp_path, code).strip() == "without end"


@pytest.mark.parametrize("kind", ["doubled", "deep"])
def test_checked_keys(tmp_path, kind):
    """A key of a small pickle keeps torch busy for ever, or ends the process."""
    import torch

    torch.save({"state": "key"}, tmp_path / "ba1.pt")
    # What torch writes of such a key takes as long: the pickle is put together by hand.
    key = b")q\x00" + b"h\x00\x86q\x00" * 60
    if kind == "deep":
        key = b")" + b"\x85" * 500_000
    pickled = b"\x80\x02}" + key + b"K\x01s."
    with zipfile.ZipFile(tmp_path / "ba1.pt") as given:
        parts = {name: given.read(name) for name in given.namelist()}
    with zipfile.ZipFile(tmp_path / "ba1.pt", "w") as changed:
        for name, content in parts.items():
            changed.writestr(name, pickled if name.endswith("data.pkl") else content)
    code = f"""
import signal, torch

signal.alarm(4)
torch.load({str(tmp_path / "ba1.pt")!r}, weights_only=True)
"""
    (tmp_path / "code.py").write_text(code)
    assert run_script(tmp_path / "code.py").returncode not in (0, 1)


def test_first_row_of():
    """DTensor does not say where a part begins, but by a private name."""
    from torch.distributed import tensor

    names = [name for name in (*vars(tensor), *dir(tensor.DTensor)) if name[0] != "_"]
    assert not [name for name in names if "global_offset" in name or "chunk_list" in name]


def test_part_of():
    """As for `first_row_of`."""
    test_first_row_of()


# transformers


def public_names(model: Any) -> set[str]:
    return {name for name in dir(model) if not name.startswith("_")}


def test_block_names():
    """A model does not say which of its modules are its blocks."""
    from transformers import PreTrainedModel

    assert not [
        name for name in public_names(PreTrainedModel) if "split" in name or "block" in name
    ]


def test_tied_names():
    """A model does not say which of its tensors are others, before transformers 5."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from flame_composer.upstream.transformers import tied_names

    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 1, "vocab_size": 32}
    for is_tied in (True, False):
        config = LlamaConfig(**sizes, num_hidden_layers=1, tie_word_embeddings=is_tied)
        model = LlamaForCausalLM(config)
        assert tied_names(model) == ({"lm_head.weight"} if is_tied else set())
        names = [name for name in public_names(model) if "tied_weights" in name]
        assert bool(names) == (TRANSFORMERS >= (5, 0))


def test_with_cache():
    """Models of transformers call a cache something else from 5.24 on, and those of fla do not."""
    from transformers import LlamaForCausalLM

    from flame_composer import cpu

    cpu.enable()
    from fla.models import GLAForCausalLM

    for model, renamed in ((LlamaForCausalLM, TRANSFORMERS >= (5, 24)), (GLAForCausalLM, False)):
        assert ("cache" in inspect.signature(model.forward).parameters) == renamed


def test_cache_of():
    """The output has its cache under the new name only, from transformers 5.24 on."""
    from transformers.modeling_outputs import CausalLMOutputWithPast

    from flame_composer.upstream.transformers import cache_of

    name = "cache" if TRANSFORMERS >= (5, 24) else "past_key_values"
    assert name in inspect.signature(CausalLMOutputWithPast).parameters
    cache = object()
    assert cache_of(CausalLMOutputWithPast(**{name: cache})) is cache


@pytest.mark.skipif(FLA < (0, 6), reason="transformers 5.24 needs fla 0.6")
def test_pass_on_the_cache():
    """fla's generation takes the cache by its old name, by which `generate` gives none."""
    from flame_composer import cpu

    cpu.enable()
    from fla.models import GLAConfig, GLAForCausalLM
    from fla.models.generation_utils import FLAGenerationMixin
    from transformers import GenerationMixin

    assert "cache" in inspect.signature(GenerationMixin.prepare_inputs_for_generation).parameters
    assert " cache:" not in inspect.getsource(inspect.getmodule(FLAGenerationMixin))
    config = GLAConfig(hidden_size=32, num_hidden_layers=1, num_heads=1, vocab_size=32)
    given = {"cache": object(), "attention_mask": torch.ones(1, 2, dtype=torch.long)}
    made = GLAForCausalLM(config).prepare_inputs_for_generation(
        torch.ones(1, 2, dtype=torch.long), **given
    )
    assert made["past_key_values"] is given["cache"]


def test_initialize():
    """A part of a model is not filled as a new one's is, but by a private name."""
    from transformers import PreTrainedModel

    assert set(inspect.signature(PreTrainedModel.init_weights).parameters) == {"self"}


def test_generation_keys():
    """A config takes settings of sampling that its class does not list; that of 5 drops them."""
    from transformers import LlamaConfig, PretrainedConfig

    from flame_composer.upstream.transformers import generation_keys

    assert {"temperature", "top_p", "max_length"} <= generation_keys()
    assert "temperature" not in inspect.signature(PretrainedConfig).parameters
    kept = getattr(LlamaConfig(temperature=0.5), "temperature", None)
    assert kept == (0.5 if TRANSFORMERS < (5, 0) else None)


def test_keep_generation_config(tmp_path):
    """What was set in a model's generation config is gone when a model is read and writes.

    Version 5 keeps it, but writes folders of which 4 does not.
    """
    code = f"""
import sys
import torch
from transformers import LlamaConfig, LlamaForCausalLM

config = LlamaConfig(
    hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, vocab_size=32
)
model = LlamaForCausalLM(config)
model.generation_config.pad_token_id = 7
model.save_pretrained({str(tmp_path / "model")!r})
if {TRANSFORMERS >= (5, 0)}:
    sys.exit()
model = LlamaForCausalLM.from_pretrained({str(tmp_path / "model")!r})
model.config.temperature = 0.5
model.generate(torch.ones(1, 1, dtype=torch.long), max_new_tokens=1)
print(model.generation_config.pad_token_id)
"""
    if TRANSFORMERS < (5, 0):
        assert forked(tmp_path, code).strip() == "None"
        return
    forked(tmp_path, code)
    written = json.loads((tmp_path / "model/generation_config.json").read_text())
    assert written["_from_model_config"] is True


def test_read_task():
    """The harness reads a task's file by a private name only."""
    from lm_eval import tasks

    assert not [name for name in dir(tasks) if "yaml" in name.lower() and name[0] != "_"]


def test_settings_of(tmp_path):
    """The harness reads a task's data when it builds the task."""
    (tmp_path / "own.yaml").write_text(
        "task: own\ndataset_path: json\ndataset_kwargs: {data_files: {test: nowhere.jsonl}}\n"
        "test_split: test\n"
    )
    code = f"""
from lm_eval.tasks import TaskManager

try:
    TaskManager(include_path={str(tmp_path)!r}, include_defaults=False).load(["own"])
except FileNotFoundError:
    print("reads")
"""
    assert "reads" in forked(tmp_path, code)


def test_mistral_tokenizer():
    """gigatoken converts a SentencePiece model by a private name only."""
    import gigatoken

    assert not [name for name in dir(gigatoken) if "sentencepiece" in name and name[0] != "_"]


# mosaicml-streaming


def written(folder: Path, num_rows: int) -> Path:
    with MDSWriter(columns={"x": "int"}, out=str(folder), hashes=["xxh64"]) as writer:
        for number in range(num_rows):
            writer.write({"x": number})
    return folder


def opened(folder: Path, **options: Any) -> StreamingDataset:
    return StreamingDataset(local=str(folder), batch_size=2, **{"shuffle": False, **options})


def test_streamingorder(tmp_path):
    """Rows are repeated so that they come out even among the processes there are."""
    dataset = opened(written(tmp_path / "data", 10), num_canonical_nodes=1)
    for ranks, num_rows in ((1, 10), (4, 12)):
        work = generate_work("random", dataset, World(1, ranks, 1, 0), 0, 0)
        rows = [row for row in work.flatten().tolist() if row >= 0]
        assert len(rows) == num_rows
        assert sorted(set(rows)) == list(range(10))


# Others


@pytest.mark.parametrize(("kind", "compress"), [("bz2", bz2.compress), ("xz", lzma.compress)])
def test_check_every_stream(tmp_path, kind, compress):
    """What follows the first stream of a compressed file may be damaged without a word."""
    import fsspec

    path = tmp_path / f"file.{kind}"
    path.write_bytes(compress(b"first") + b"\0" * 4 + b"damaged")
    code = f"""
import fsspec
with fsspec.open({str(path)!r}, compression={kind!r}) as file:
    print(file.read().decode())
"""
    assert forked(tmp_path, code).strip() == "first"
    assert fsspec.__version__


def test_fasttextfile():
    """datatrove's models have addresses, and none can be given as a file."""
    from datatrove.utils.lid import FT176LID, FastTextLID

    assert FT176LID.MODEL_URL.startswith("https://")
    assert set(inspect.signature(FastTextLID).parameters) == {"languages", "k"}


def test_run_local(tmp_path):
    """datatrove waits for ever for a process that is gone."""
    code = f"""
import os, signal
from datatrove.executor.local import LocalPipelineExecutor
from datatrove.pipeline.base import PipelineStep

class Dies(PipelineStep):
    def run(self, data, rank=0, world_size=1):
        os.kill(os.getpid(), signal.SIGKILL)

if __name__ == "__main__":
    signal.signal(signal.SIGALRM, lambda *_: os.killpg(0, signal.SIGKILL))  # with its manager
    signal.alarm(8)
    LocalPipelineExecutor(
        [Dies()], tasks=2, workers=2, logging_dir={str(tmp_path / "logs")!r}
    ).run()
"""
    (tmp_path / "code.py").write_text(code)
    assert run_script(tmp_path / "code.py").returncode == -signal.SIGKILL


def test_pack():
    """A plain weight is laid out anew in each product of a few rows."""
    x, plain = torch.randn(16, 2048), torch.randn(2048, 2048)
    laid_out = torch.ops.mkldnn._reorder_linear_weight(plain, 16)

    def least(weight: torch.Tensor) -> float:
        times = []
        for _ in range(30):
            start = time.process_time()
            torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")
            times.append(time.process_time() - start)
        return min(times)

    assert least(laid_out) < 0.9 * least(plain)


def test_product():
    """torch multiplies matrices without oneDNN unless it is asked for by a private name."""
    import torch

    x, weight = torch.randn(512, 512), torch.randn(512, 512)
    with torch.profiler.profile() as profile:
        torch.nn.functional.linear(x, weight)
    assert not [event.key for event in profile.key_averages() if "mkldnn" in event.key]
    assert torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "").shape == (512, 512)


def test_keep_rotary_tables():
    """fla makes a table of just the positions that it is asked for, a longer one for each token."""
    import torch

    from flame_composer import cpu

    cpu.enable()
    from fla.modules.rotary import RotaryEmbedding

    on_cpu = torch.device("cpu")
    rotary, plain = RotaryEmbedding(8), RotaryEmbedding(8)
    RotaryEmbedding._update_cos_sin_cache.__wrapped__(plain, 300, on_cpu, torch.float32)
    assert len(plain._cos_cached) == 300
    rotary._update_cos_sin_cache(299, on_cpu, torch.float32)
    kept = rotary._cos_cached
    rotary._update_cos_sin_cache(300, on_cpu, torch.float32)
    assert rotary._cos_cached is kept
    assert torch.equal(kept[:300], plain._cos_cached)
    assert torch.equal(rotary._sin_cached[:300], plain._sin_cached)


def test_ending_pools(tmp_path):
    """lm-eval ends its pool by SIGTERM, which a handler in Python may take too late."""
    code = """
import inspect, os, signal
from lm_eval.api.metrics import bootstrap_stderr
from flame_composer.upstream.lm_eval import ending_pools
assert "mp.Pool" in inspect.getsource(bootstrap_stderr)
signal.signal(signal.SIGTERM, lambda *_: None)
def child():
    if not (pid := os.fork()):
        os._exit(signal.getsignal(signal.SIGTERM) == signal.SIG_DFL)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
before = child()
with ending_pools():
    within = child()
print(before, within, child())
"""
    assert forked(tmp_path, code).split() == ["0", "1", "0"]


# Without a GPU: each shows what the stack does by itself on such a machine.

NO_GPU = pytest.mark.skipif(
    "__import__('torch').cuda.is_available()", reason="shows what is missing without one"
)


@NO_GPU
def test_claimed_device():
    """torch tells of no device that is not there."""
    import torch

    assert torch.cuda.device_count() == 0
    with pytest.raises((RuntimeError, AssertionError), match=r"NVIDIA|CUDA"):
        torch.cuda.get_device_capability()


@NO_GPU
def test_claim_gpu():
    """fla has decided, without a GPU, for the configurations of one with little shared memory."""
    from flame_composer import cpu

    cpu.enable()
    from fla.ops.gla import chunk
    from fla.utils import IS_NVIDIA, check_shared_mem

    assert not IS_NVIDIA
    assert not check_shared_mem()
    assert chunk.BK_LIST == [16, 32]


def test_try_the_smallest_only():
    """An autotuner times every candidate, unless a kernel's own author says otherwise."""
    from triton import Config
    from triton.runtime.autotuner import Autotuner

    candidates = [Config({"SIZE": size}) for size in (16, 32)]
    tuner = Autotuner(Kernel(), ["x"], candidates, ["x"], None, None, do_bench=print)
    assert tuner.prune_configs({}) == candidates


def test_compile_candidates_together():
    """An autotuner compiles each candidate when it times it, in its own process."""
    from triton.runtime.autotuner import Autotuner

    assert "config: self._bench(*args, config=config, **kwargs)" in inspect.getsource(Autotuner.run)
    assert "self.fn.run(" in inspect.getsource(Autotuner._bench)


@NO_GPU
def test_drives_gpu():
    """torch may be told that there is a GPU, and Triton has a driver that is none of its own."""
    from triton.runtime import driver

    from flame_composer import cpu

    cpu.enable()
    assert not type(driver.active).__module__.startswith("triton.")


@NO_GPU
def test_noted_launches():
    """A launch without a GPU fails, and tells nothing of what would have been compiled."""
    import torch

    from flame_composer import cpu

    cpu.enable()
    from fla.ops.utils.cumsum import chunk_local_cumsum_vector

    with pytest.raises(RuntimeError, match="a Triton kernel was called on a machine without a GPU"):
        chunk_local_cumsum_vector(torch.empty(1, 64, 2, 32, device="meta"), chunk_size=64)


def test_compiled_shared_memory():
    """Triton compiles no kernel that is not launched, unless it is given its private form."""
    import triton
    from triton.backends.compiler import GPUTarget

    from flame_composer import cpu

    cpu.enable()
    from fla.ops.utils.cumsum import chunk_local_cumsum_vector_kernel as kernel

    with pytest.raises(AssertionError):
        triton.compile(kernel.fn.fn, target=GPUTarget("cuda", 90, 32))


PRODUCT = """
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from flame_composer.upstream.triton import multiplies_matrices

@triton.jit
def product(a, b, out):
    at = tl.arange(0, 32)[:, None] * 32 + tl.arange(0, 32)[None]
    tl.store(out + at, tl.dot(tl.load(a + at), tl.load(b + at)))

def compiles(capability):
    types = {"a": "*fp16", "b": "*fp16", "out": "*fp32"}
    try:
        triton.compile(ASTSource(product, types), target=GPUTarget("cuda", capability, 32))
    except RuntimeError:
        return False
    return True

for capability in (90, 120):
    assert compiles(capability) == multiplies_matrices(capability), capability
"""


def test_multiplies_matrices(tmp_path):
    """triton 3.3.0 compiles no tl.dot for sm_120."""
    file = tmp_path / "product.py"
    file.write_text(PRODUCT)
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path)}
    subprocess.run([sys.executable, file], env=environment, check=True, timeout=300)


def test_prepare_to_compile():
    """Triton hashes its own compiler when it first compiles, not before."""
    from triton.backends.nvidia.compiler import CUDABackend
    from triton.compiler import compiler
    from triton.runtime import cache

    triton_key = (compiler if hasattr(compiler, "triton_key") else cache).triton_key
    assert triton_key.cache_parameters()["typed"] is False
    assert "get_ptxas_version" in inspect.getsource(CUDABackend.hash)
    before = triton_key.cache_info().misses
    triton_key.__wrapped__()
    assert triton_key.cache_info().misses == before, "it is done again in each process"


FAKE = """
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
with FakeTensorMode():
    weight = torch.empty(2, device="cuda").requires_grad_()
    print(weight.device, flush=True)
    weight.exp().sum().backward()
"""


@NO_GPU
def test_pretendedcuda(tmp_path):
    """A fake CUDA tensor ends its process once it needs a gradient; autocast passes meta by."""
    import torch

    (tmp_path / "fake.py").write_text(FAKE)
    process = run_script(tmp_path / "fake.py")
    assert process.stdout == "cuda:0\n"
    assert process.returncode != 0
    x = torch.empty(2, 2, device="meta")
    torch.set_autocast_enabled("cuda", True)
    try:
        assert (x @ x).dtype == x.dtype
    finally:
        torch.set_autocast_enabled("cuda", False)


def test_fakes():
    """torch's own mode gives up when a value is asked for."""
    real = torch.tensor([0, 1])
    with FakeTensorMode(), pytest.raises(DataDependentOutputException):
        torch.zeros(2).sum().item()
    with FakeTensorMode(allow_non_fake_inputs=True), pytest.raises(DynamicOutputShapeException):
        real.nonzero()
    with Fakes():
        assert torch.ones(2).sum().item() == 0
        assert real.nonzero().tolist() == [[1]]
        assert isinstance(real + torch.ones(2), FakeTensor)


def test_autocast_as_on_gpus():
    half = torch.ones(2, 2, dtype=torch.bfloat16)

    def dtypes():
        with torch.autocast("cpu", torch.bfloat16):
            return {F.softplus(half).dtype, half.exp().dtype, half.cumsum(0).dtype}

    before = dtypes()
    assert torch.bfloat16 in before
    with autocast_as_on_gpus():
        assert dtypes() == {torch.float32}
    assert dtypes() == before


def test_attention_as_on_gpus():
    with Fakes():
        query = torch.ones(1, 2, 128, 64, dtype=torch.bfloat16, requires_grad=True)
        mask = torch.ones(1, 1, 128, 128, dtype=torch.bool)

        def kind(**keys):
            return F.scaled_dot_product_attention(query, query, query, **keys).grad_fn.name()

        assert not {"Efficient", "Flash"} & set(kind(attn_mask=mask).split("Attention"))
        with attention_as_on_gpus():
            assert "EfficientAttention" in kind(attn_mask=mask)
            assert "FlashAttention" in kind(is_causal=True)


def test_offloading_as_on_gpus():
    """Offloaded tensors are on a CPU, and so are fake ones that stay."""

    def peak():
        with Fakes():
            y = x = torch.ones(1000, requires_grad=True)
            books = Books()
            with books:
                with checkpoint_wrapper.save_on_cpu(pin_memory=True):
                    for _ in range(8):
                        y = y.exp()
                y.sum().backward()
            assert x.grad.shape == x.shape
        return books.peak["Total"]

    kept = peak()
    with offloading_as_on_gpus():
        assert peak() < kept / 2


COUNT = """
import contextlib
from flame_composer.config.load import load
from flame_composer.config.plan import PlanConfig
from flame_composer.plan import planning, step

keys = ["devices=1", "device=cpu", "dataset_tokens=10000000", "context_length=128"]
keys.append("parallelism.activation_checkpointing=true")
config = load(PlanConfig, ["yamls/gla_tiny.yaml", *keys])
hf_config = planning.find_hf_config(config, None)
mended = step.count_step(config, hf_config, 8).activations
step.recomputing_of_fakes = contextlib.nullcontext
print(step.count_step(config, hf_config, 8).activations / mended)
"""


def test_recomputing_of_fakes(tmp_path):
    """What fla's functions save in a recomputed block stays to the step's end (torch < 2.15)."""
    ratio = float(forked(tmp_path, COUNT).splitlines()[-1])
    assert ratio == 1 if TORCH >= (2, 15) else ratio > 1.5


SHARDED = """
import torch
import torch.distributed as dist
from torch.distributed._tools.fsdp2_mem_tracker import FSDPMemTracker
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.testing._internal.distributed.fake_pg import FakeStore
from flame_composer.upstream.books import ShardedBooks
from flame_composer.upstream.fakes import Fakes

dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=4)
mesh = init_device_mesh("cpu", (4,))
for kind in (FSDPMemTracker, ShardedBooks):
    with Fakes():
        model = torch.nn.Sequential(torch.nn.Linear(8, 32))
        fully_shard(model, mesh=mesh)
        books = kind(model)
        books.vocab_size = 32
        with books:
            model(torch.ones(3, 8)).exp().sum().backward()
    found = books.get_tracker_snapshot("peak")[torch.device("cpu")]
    print(found["Total"], found.get("Logits"))
dist.destroy_process_group()
"""


def test_shardedbooks(tmp_path):
    theirs, ours = (line.split() for line in forked(tmp_path, SHARDED).splitlines())
    assert theirs[0] == ours[0]
    assert (theirs[1], int(ours[1]) > 0) == ("None", True)


def test_books():
    peaks = []
    for kind in (MemTracker, Books):
        with Fakes():
            model = torch.nn.Linear(8, 32)
            books = kind()
            books.vocab_size = 32
            books.track_external(model)
            with books:
                model(torch.ones(3, 8)).exp().sum().backward()
        peaks.append(books.get_tracker_snapshot("peak")[torch.device("cpu")])
    theirs, ours = peaks
    assert theirs["Total"] == ours["Total"]
    assert "Logits" not in theirs
    assert ours["Logits"] > 0


LAUNCH = """
import torch
from flame_composer import cpu
cpu.enable()
from fla.ops.delta_rule import chunk_delta_rule
from flame_composer.cpu.launches import code_for_gpus
from flame_composer.upstream.fakes import Fakes
from flame_composer.upstream.triton import without_launches

def states():
    q, k, v = (torch.ones(1, 128, 2, 64, dtype=torch.bfloat16) for _ in range(3))
    beta = torch.ones(1, 128, 2, dtype=torch.bfloat16)
    return chunk_delta_rule(q, k, v, beta, cu_seqlens=offsets)[0].shape

offsets = torch.tensor([0, 100, 128])
try:
    states()
except Exception as error:
    print(type(error).__name__)
with code_for_gpus(0), Fakes():
    try:
        states()
    except Exception as error:
        print(type(error).__name__)
    with without_launches():
        print(tuple(states()))
"""


def test_code_for_gpus(tmp_path):
    error, _, shape = forked(tmp_path, LAUNCH).splitlines()
    assert error.endswith("Error")
    assert shape == "(1, 128, 2, 64)"


def test_without_launches(tmp_path):
    """By itself, fla launches kernels in the middle of its functions."""
    _, error, shape = forked(tmp_path, LAUNCH).splitlines()
    assert error.endswith("Error")
    assert shape == "(1, 128, 2, 64)"


def test_fakes_as_on_gpus():
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        rows = torch.empty(4, 3)
    assert not rows.is_cuda
    with fakes_as_on_gpus():
        assert (rows.data_ptr(), rows[1].data_ptr(), rows.is_cuda) == (0, 12, True)
    with pytest.warns(UserWarning, match="data pointer"):
        rows.data_ptr()


def test_connection(monkeypatch):
    """Uvicorn waits for ever for the rest of a request's head."""
    monkeypatch.setattr(connections, "HEAD_SECONDS", 0.2)

    async def is_left_open(protocol):
        config = uvicorn.Config(lambda: None, lifespan="off", ws="none", log_config=None)
        config.load()
        state = ServerState()
        listening = await asyncio.get_running_loop().create_server(
            lambda: protocol(config=config, server_state=state, app_state={}), "127.0.0.1", 0
        )
        reader, writer = await asyncio.open_connection(*listening.sockets[0].getsockname())
        try:
            writer.write(b"GET / HTTP/1.1\r\n")
            await asyncio.wait_for(reader.read(1), 2)
        except asyncio.TimeoutError:
            return True
        except ConnectionResetError:
            return False
        finally:
            for each in list(state.connections):
                each.transport.abort()
            writer.close()
            listening.close()
        return False

    assert asyncio.run(is_left_open(H11Protocol))
    assert not asyncio.run(is_left_open(connections.Connection))


def test_pack_int8():
    """Packed int8 weights have no public name but in modules that quantize activations."""
    import torch

    from flame_composer.cpu.int8 import pack_int8

    assert pack_int8(torch.ones(4, 8, dtype=torch.int8)).layout is torch._mkldnn
    assert not hasattr(torch.nn.functional, "linear_int8")


def test_int8_product():
    """torch's public product of int8 weights gives all rows of a batch one scale of 8 bits."""
    import torch

    from flame_composer.cpu.int8 import int8_product, pack_int8, quantize_rows

    torch.manual_seed(0)
    layer = torch.nn.Sequential(torch.nn.Linear(64, 8, bias=False))
    numbers, scale = quantize_rows(layer[0].weight.data)
    x = torch.randn(2, 64) * torch.tensor([[1.0], [1000.0]])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # later versions of torch say that it is to go
        theirs = torch.ao.quantization.quantize_dynamic(layer, dtype=torch.qint8)
    expected = layer(x)[0]
    ours = int8_product(x, pack_int8(numbers), scale, torch.zeros(8, dtype=torch.int32))[0]
    assert (ours - expected).norm() < 0.02 * expected.norm()
    assert (theirs(x)[0] - expected).norm() > 0.2 * expected.norm()


def test_without_parameters():
    """On the meta device, buffers have no numbers either."""
    import torch

    from flame_composer.upstream.transformers import without_parameters

    def build():
        return torch.nn.BatchNorm1d(3)

    with torch.device("meta"):
        assert build().running_var.is_meta
    with without_parameters():
        module = build()
    assert module.weight.is_meta
    assert module.running_var.tolist() == [1, 1, 1]


def test_ask_wandb_for_its_address():
    """Composer's logger asks for `get_url`, which wandb has replaced by `url`."""
    from composer.loggers import wandb_logger
    from wandb.sdk.wandb_run import Run

    from flame_composer.upstream.composer import ask_wandb_for_its_address

    assert "wandb.run.get_url()" in inspect.getsource(wandb_logger)
    ask_wandb_for_its_address()
    assert callable(Run.get_url)
    assert isinstance(Run.url, property)


RETURN_DICT = """
from transformers import PretrainedConfig, configuration_utils
from flame_composer.upstream.composer import ask_configs_without_a_word

said = []
configuration_utils.logger.warning_once = said.append
assert PretrainedConfig().use_return_dict is True
before = len(said)
ask_configs_without_a_word()
for wanted in (True, False):
    assert PretrainedConfig(return_dict=wanted).use_return_dict is wanted
print(before, len(said) - before)
"""


def test_ask_configs_without_a_word():
    """Composer asks a config for `use_return_dict`, of which transformers 5 warns."""
    from composer.models import huggingface

    assert "self.config.use_return_dict" in inspect.getsource(huggingface)
    command = [sys.executable, "-c", RETURN_DICT]
    said = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT).stdout
    assert said.split() == ["0" if TRANSFORMERS < (5, 0) else "1", "0"]


def test_base_keys():
    """transformers 4 hides them behind **kwargs; 5 has them as fields, of which there are few."""
    from transformers import PretrainedConfig

    from flame_composer.upstream.hf_configs import base_keys

    known = PretrainedConfig.__init__.__kwdefaults__
    if TRANSFORMERS < (5, 0):
        assert base_keys() == {*known}
    else:
        assert {"architectures", "dtype", "num_labels", "sep_token_id"} <= base_keys()
        assert "sep_token_id" not in {each.name for each in dataclasses.fields(PretrainedConfig)}


def test_parameters_of():
    """Neither the keys of all configs nor **kwargs are a model's own."""
    from transformers import LlamaConfig

    from flame_composer.upstream.hf_configs import parameters_of

    found, raw = parameters_of(LlamaConfig), inspect.signature(LlamaConfig.__init__).parameters
    assert {"hidden_size", "rope_theta", "rope_scaling", "rms_norm_eps"} <= {*found}
    assert not {"self", "kwargs", "architectures", "return_dict", "id2label"} & {*found}
    if TRANSFORMERS >= (5, 0):
        assert {"architectures", "return_dict", "id2label"} <= {*raw}
        assert "rope_theta" not in raw


def test_hints_of():
    """The annotations of keys that all configs have name what their own module imports."""
    import typing

    from transformers import GPT2Config, LlamaConfig

    from flame_composer.upstream.hf_configs import hints_of, parameters_of

    for config_class in (LlamaConfig, GPT2Config):
        assert {*hints_of(config_class)} <= {*parameters_of(config_class)}
    assert "rope_theta" not in hints_of(GPT2Config)
    if TRANSFORMERS >= (5, 0):
        assert hints_of(LlamaConfig)["rope_theta"] is float
        assert hints_of(LlamaConfig)["hidden_size"] is int
        with pytest.raises(NameError):
            typing.get_type_hints(LlamaConfig.__init__)


def test_rotates():
    """transformers 5 has one key for all of the rotary embedding's settings."""
    from transformers import GPT2Config, LlamaConfig

    from flame_composer.upstream.hf_configs import rotates

    assert rotates(LlamaConfig())
    assert not rotates(GPT2Config())
    assert hasattr(LlamaConfig(), "rope_theta") is (TRANSFORMERS < (5, 0))


def test_has_value():
    """Rotary settings have other names in transformers 4 and 5; either may be asked for."""
    from transformers import LlamaConfig

    from flame_composer.upstream.hf_configs import has_value

    config = LlamaConfig(rope_theta=5e5)
    assert has_value(config, "rope_theta", 5e5)
    assert has_value(config, "rope_parameters", {"rope_theta": 5e5})
    assert not has_value(config, "rope_parameters", {"rope_type": "linear", "rope_theta": 5e5})
    assert hasattr(config, "rope_parameters") is (TRANSFORMERS >= (5, 0))


def test_value_of():
    """What a config was given as rope_theta and rope_scaling, it has under these names."""
    from transformers import GPT2Config, LlamaConfig

    from flame_composer.upstream.hf_configs import value_of

    scaled = {"rope_type": "linear", "factor": 2.0}
    config = LlamaConfig(rope_theta=5e5, rope_scaling=dict(scaled), hidden_size=64)
    assert [value_of(config, key) for key in ("rope_theta", "rope_scaling", "hidden_size")] == [
        5e5,
        scaled,
        64,
    ]
    assert value_of(LlamaConfig(), "rope_scaling") is None
    assert value_of(GPT2Config(), "rope_theta") is None
    assert hasattr(LlamaConfig(), "rope_theta") is (TRANSFORMERS < (5, 0))


def test_as_known_here():
    """What one version of transformers writes of rotary embeddings, the other reads as well."""
    from transformers import GPT2Config, LlamaConfig

    from flame_composer.upstream.hf_configs import as_known_here

    special = {"dt_limit": [0.0, {"__float__": "Infinity"}], "x": {"y": {"__float__": "z"}}}
    numbers = {"dt_limit": [0.0, float("inf")], "x": {"y": {"__float__": "z"}}}
    assert as_known_here(special, GPT2Config) == numbers
    scaled = {"rope_type": "linear", "factor": 2.0}
    of_4 = {"rope_theta": 5e5, "rope_scaling": scaled}
    of_5 = {"rope_parameters": {"rope_theta": 5e5, **scaled}}
    plain = {"rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}}
    if TRANSFORMERS < (5, 0):
        assert LlamaConfig(**of_5).rope_theta == 1e4, "which would be another model"
        assert as_known_here(of_5, LlamaConfig) == of_4
        assert as_known_here(plain, LlamaConfig) == {"rope_theta": 5e5}
        assert as_known_here(of_4, LlamaConfig) == of_4
        partly = {"rope_parameters": {"rope_theta": 5e5, "partial_rotary_factor": 0.5}}
        expected = {"rope_theta": 5e5, "partial_rotary_factor": 0.5}
        assert as_known_here(partly, LlamaConfig) == expected
        for_each_kind = {"rope_parameters": {"full_attention": {"rope_theta": 5e5}}}
        assert as_known_here(for_each_kind, LlamaConfig) == for_each_kind, "which is then named"
        assert as_known_here(of_5, GPT2Config) == of_5
    else:
        for content in (of_4, of_5):
            found = LlamaConfig(**as_known_here(content, LlamaConfig))
            assert found.rope_parameters == {"rope_theta": 5e5, **scaled}


def test_read_fast(tmp_path):
    """transformers 5 takes no more than vocabulary and merges from a Llama tokenizer's file."""
    from transformers import AutoTokenizer

    from flame_composer.upstream.tokenizers import read_fast
    from tests.data_fixtures import byte_tokenizer, llama_tokenizer

    for tokenizer in (byte_tokenizer(), llama_tokenizer()):
        folder = tmp_path / str(tokenizer.bos_token_id)
        tokenizer.save_pretrained(folder)
        file = folder / "tokenizer.json"
        written = json.loads(file.read_text())
        written["post_processor"] = (
            None if tokenizer.bos_token_id == 0 else written["post_processor"]
        )
        file.write_text(json.dumps(written))
        found = read_fast(str(folder))
        assert json.loads(found.backend_tokenizer.to_str()) == written
        settings = folder / "tokenizer_config.json"
        found.save_pretrained(tmp_path / "again")
        saved = json.loads((tmp_path / "again" / settings.name).read_text())["tokenizer_class"]
        assert saved in ("PreTrainedTokenizerFast", "LlamaTokenizer", "LlamaTokenizerFast")
        settings.write_text(json.dumps({"tokenizer_class": "TokenizersBackend"}))
        assert json.loads(read_fast(str(folder)).backend_tokenizer.to_str()) == written
        if TRANSFORMERS >= (5, 0):
            theirs = AutoTokenizer.from_pretrained(folder).backend_tokenizer.to_str()
            assert (json.loads(theirs) != written) or tokenizer.bos_token_id != 0
            assert pickle.dumps(type(found))


def test_rebuilds_its_template():
    """Llama's tokenizer makes its template from flags, and others of transformers 5 do as well."""
    from flame_composer.upstream.tokenizers import rebuilds_its_template
    from tests.data_fixtures import byte_tokenizer, llama_tokenizer

    assert not rebuilds_its_template(byte_tokenizer())
    assert rebuilds_its_template(llama_tokenizer()) is (TRANSFORMERS < (5, 0))
    assert hasattr(byte_tokenizer(), "update_post_processor") is (TRANSFORMERS >= (5, 0))


def test_without_model_defaults():
    """What is left open in the given config is taken from the model's own."""
    from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

    from flame_composer.upstream.transformers import without_model_defaults

    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "vocab_size": 4}
    model = LlamaForCausalLM(LlamaConfig(**sizes, intermediate_size=8))
    torch.nn.init.zeros_(model.lm_head.weight)  # writes token 0 for ever
    own = model.generation_config
    own.suppress_tokens, own.pad_token_id = [0], 0
    ids = torch.ones(1, 1, dtype=torch.int64)

    def generate(**options):
        asked = GenerationConfig(max_new_tokens=5)  # a new one: it may be completed in place
        mask = torch.ones_like(ids)
        return model.generate(ids, attention_mask=mask, generation_config=asked, **options)

    assert 0 not in generate()
    with without_model_defaults(model) as options:
        assert (generate(**options)[:, 1:] == 0).all()
    assert model.generation_config is own
