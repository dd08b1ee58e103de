"""A model spread over processes trains as one, and what it saves is read by any number of them."""

from __future__ import annotations

import os
import re
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from composer.loggers import Logger
from composer.utils import dist
from hypothesis import given
from hypothesis import strategies as st
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    CheckpointWrapper,
    OffloadWrapper,
)
from torch.nn.parallel import DistributedDataParallel

from flame_composer.checkpoint.content import needed_by
from flame_composer.checkpoint.find import find_checkpoint, find_newest
from flame_composer.checkpoint.load import load
from flame_composer.checkpoint.names import step_of
from flame_composer.checkpoint.read import Checkpoint, read_checkpoint
from flame_composer.checkpoint.sharded import HEAD, Pieces, _copy, _whole, name_of
from flame_composer.checkpoint.to_model import load_from_checkpoint, load_model
from flame_composer.config.parallelism import FsdpConfig, ParallelismConfig
from flame_composer.config.sections import ModelConfig
from flame_composer.config.train import TrainConfig
from flame_composer.errors import DataError, InvalidField
from flame_composer.model.build import build_model
from flame_composer.model.causal_lm import CausalLM
from flame_composer.model.hf_config import build_hf_config
from flame_composer.model.sharding import recompute_blocks
from flame_composer.train import parallelism
from flame_composer.train.gradients import Gradients
from flame_composer.train.parallelism import check_devices
from flame_composer.upstream import fsdp
from tests.conftest import CONTEXT_LENGTH, GLA
from tests.data_fixtures import byte_tokenizer
from tests.runs import ROOT, Corpus, Ranks, Script, check, last_json, read_log, two_ranks
from tests.s3 import S3

SHARDED = (
    "parallelism.fsdp.state_dict_type=sharded",
    "parallelism.cpu_fsdp=true",
    "microbatch_size=2",
    "max_duration=12ba",
    "eval_interval=100ba",
    "save_interval=4ba",
    "eval_data.max_rows=4",
    # With so large an eps a step is all but proportional to the gradient, as it is not with AdamW's
    # usual one.
    "optimizer.eps=0.01",
    "optimizer.grad_clip_norm=0.5",
    "optimizer.lr=0.02",
)
slow = pytest.mark.skipif(
    "FLAME_COMPOSER_FAULTS" not in os.environ, reason="takes a minute: make test-faults"
)


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about machines without a GPU")
def test_what_cannot_be_done_without_a_gpu():
    fsdp = FsdpConfig()
    for allowed in (
        ParallelismConfig(),
        ParallelismConfig(fsdp, cpu_fallback=True),
        ParallelismConfig(fsdp, cpu_fsdp=True),
    ):
        check_devices(allowed, precision="fp32")
    refused: list[tuple[ParallelismConfig, str, str]] = [
        (ParallelismConfig(), "amp_fp16", "precision"),
        (ParallelismConfig(fsdp), "fp32", "parallelism.fsdp"),
        (
            ParallelismConfig(activation_cpu_offload=True),
            "fp32",
            "parallelism.activation_cpu_offload",
        ),
    ]
    for config, precision, key in refused:
        with pytest.raises(InvalidField, match=f"^{key}: there is no GPU here"):
            check_devices(config, precision=precision)


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about machines without a GPU")
def test_bf16_is_for_cpus_that_multiply_it(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen: list[bool] = []
    monkeypatch.setattr(parallelism, "use_bf16", chosen.append)
    for has_avx, has_amx in ((True, False), (False, True)):
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda has=has_avx: has)
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda has=has_amx: has)
        for precision in ("amp_bf16", "fp32"):
            check_devices(ParallelismConfig(), precision=precision)
    assert chosen == [True, False, True, False]
    for key in ("compile", "cpu_fsdp"):
        asked = ParallelismConfig(FsdpConfig(), cpu_fallback=True, **{key: True})
        rule = f"precision: on a CPU parallelism.{key} computes in fp32"
        with pytest.raises(InvalidField, match=f"^{re.escape(rule)}"):
            check_devices(asked, precision="amp_bf16")
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    with pytest.raises(InvalidField, match=r"^precision: .* has neither AVX512_BF16 nor AMX"):
        check_devices(ParallelismConfig(), precision="amp_bf16")


def test_what_fsdp_is_asked_for(monkeypatch):
    dist.initialize_dist("cpu")
    factors = "_get_gradient_divide_factors"
    for module, name in (
        (fsdp._fsdp_collectives, factors),
        (fsdp._fsdp_param_group, "foreach_reduce"),
    ):
        monkeypatch.setattr(module, name, getattr(module, name))  # put back
    asked = parallelism.build(
        ParallelismConfig(FsdpConfig("SHARD_GRAD_OP", mixed_precision="FULL"), cpu_fsdp=True)
    )
    assert asked is not None
    assert (asked["fsdp"].reshard_after_forward, asked["fsdp"].mixed_precision) == (False, "FULL")
    assert asked["fsdp"].data_parallel_replicate_degree is None
    asked = parallelism.build(ParallelismConfig(FsdpConfig("HYBRID_SHARD"), cpu_fsdp=True))
    assert asked is not None
    assert asked["fsdp"].data_parallel_replicate_degree == 1, "one for each machine"


@pytest.mark.parametrize(
    ("key", "wrapper"),
    [("activation_checkpointing", CheckpointWrapper), ("activation_cpu_offload", OffloadWrapper)],
)
def test_every_block_is_wrapped(key, wrapper):
    config = build_hf_config({**GLA, "num_hidden_layers": 3}, byte_tokenizer(), CONTEXT_LENGTH)
    model = CausalLM(build_model(config), byte_tokenizer(), varlen=True)
    names = list(model.state_dict())
    recompute_blocks(model, ParallelismConfig(**{key: True}))
    assert sum(isinstance(module, wrapper) for module in model.modules()) == 3
    assert list(model.state_dict()) == names


def losses(run: Path) -> list[float]:
    return [row["loss"] for row in read_log(run)]


def norms(run: Path) -> list[float]:
    return [row["grad_norm"] for row in read_log(run)]


def weights(run: Path, name: str) -> dict[str, torch.Tensor]:
    found = find_checkpoint(str(run / "checkpoints" / name), run / "copies")
    return load_from_checkpoint(found)[0].state_dict()


def assert_equal(ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    assert list(ours) == list(theirs)
    assert [name for name, tensor in ours.items() if not torch.equal(tensor, theirs[name])] == []


def assert_close(ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    """To fp32 rounding: sums over ranks are added up in another order."""
    assert list(ours) == list(theirs)
    for name, tensor in theirs.items():
        torch.testing.assert_close(ours[name], tensor, rtol=1e-4, atol=1e-5, msg=name)


@pytest.fixture(scope="module")
def sharded(corpus: Corpus, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on two ranks with FSDP2, its checkpoints in pieces, that nothing disturbed."""
    run = tmp_path_factory.mktemp("runs") / "sharded"
    Ranks(2, *corpus.keys(run, *SHARDED)).finish()
    return run


def test_a_sharded_model_is_trained_as_a_whole_one(
    corpus: Corpus, sharded: Path, tmp_path: Path
) -> None:
    """Its gradients are means, though gloo gives FSDP2 their sums."""
    whole = tmp_path / "whole"
    check(Script("recipes/train.py", *corpus.keys(whole, *SHARDED, "parallelism.fsdp=null")).wait())
    assert losses(sharded)[0] == pytest.approx(losses(whole)[0], rel=1e-6), (
        "the same weights to begin with"
    )
    assert losses(sharded) == pytest.approx(losses(whole), rel=1e-4)
    assert norms(sharded) == pytest.approx(norms(whole), rel=1e-3)
    assert min(norms(whole)) > 0.5, "clipped, every one"
    ours, theirs = weights(sharded, "ba12"), weights(whole, "ba12.pt")
    assert_close(ours, theirs)
    saved = torch.load(sharded / "checkpoints/ba12/piece1.pt", weights_only=True)["model"]
    parts = {name: len(piece["part"]) / piece["shape"][0] for name, piece in saved.items()}
    assert parts, "every tensor is cut in two"
    assert set(parts.values()) == {0.5}


def test_a_killed_sharded_run_goes_on_bit_for_bit_and_on_other_ranks(
    corpus: Corpus, sharded: Path, tmp_path: Path
) -> None:
    run = tmp_path / "killed"
    keys = corpus.keys(run, *SHARDED)
    Ranks(2, *keys).kill_after(run / "train_log.jsonl", 6)
    # A piece that was cut short, of a newer checkpoint, and one that was never finished.
    newest = run / "checkpoints/ba4"
    torso = run / "checkpoints/ba5"
    torso.mkdir()
    for file in newest.iterdir():
        (torso / file.name).write_bytes(
            file.read_bytes()[: -10 if file.name == "piece1.pt" else None]
        )
    (run / "checkpoints/unfinished-ba8").mkdir()
    ranks = Ranks(2, *keys)
    stderr = [check(script.wait()).stderr for script in ranks.scripts]
    assert f"warning: {torso}/piece1.pt: not a whole checkpoint" in stderr[0]
    assert not (run / "checkpoints/unfinished-ba8").exists()
    assert read_log(run) == read_log(sharded)
    assert_equal(weights(run, "ba12"), weights(sharded, "ba12"))

    # On one rank that does not shard, from the pieces; its own checkpoint is a file.
    longer = ("allow_schedule_change=true",)
    alone = last_json(
        Script(
            "recipes/train.py", *keys, *longer, "parallelism.fsdp=null", "max_duration=14ba"
        ).wait()
    )
    assert alone["steps"] == 14
    assert sorted(path.name for path in (run / "checkpoints").glob("ba*")) == [
        "ba12",
        "ba14.pt",
        "ba8",
    ]
    # And the other way round, from the file.
    ranks = Ranks(2, *keys, *longer, "max_duration=16ba")
    ranks.finish()
    assert_equal(weights(sharded, "ba12"), weights(run, "ba12"))
    assert len(losses(run)) == 16


def test_blocks_that_are_recomputed_change_nothing(
    corpus: Corpus, undisturbed: Path, tmp_path: Path
) -> None:
    run = tmp_path / "recomputed"
    corpus.train_run(run, "parallelism.activation_checkpointing=true")
    assert read_log(run) == read_log(undisturbed)


def test_compressed_gradients_take_half_the_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    """What replicas send one another is bf16, and so are the sums that they step by."""
    dist.initialize_dist("cpu")
    sent: list[int] = []
    reduce = torch.distributed.all_reduce

    def noting(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        sent.append(tensor.numel() * tensor.element_size())
        return reduce(tensor, *args, **kwargs)

    monkeypatch.setattr(torch.distributed, "all_reduce", noting)
    model = DistributedDataParallel(torch.nn.Linear(7, 5))
    state: Any = SimpleNamespace(model=model)
    sums: Any = SimpleNamespace(add=lambda *_: None)
    Gradients(None, "stop", sums, "bf16").fit_start(state, Logger(state))
    sent.clear()
    model(torch.randn(3, 7)).square().sum().backward()
    assert sent == [2 * (7 * 5 + 5)]
    for parameter in model.parameters():
        assert parameter.grad is not None
        assert parameter.grad.dtype == torch.float32
        assert torch.equal(parameter.grad, parameter.grad.bfloat16().float())


def test_a_run_with_compressed_gradients_goes_on_bit_for_bit(
    corpus: Corpus, tmp_path: Path
) -> None:
    keys = (*SHARDED, "parallelism.fsdp=null")
    compressed = (*keys, "parallelism.gradient_compression=bf16")
    plain, whole, killed = (tmp_path / name for name in ("plain", "whole", "killed"))
    Ranks(2, *corpus.keys(plain, *keys)).finish()
    Ranks(2, *corpus.keys(whole, *compressed)).finish()
    Ranks(2, *corpus.keys(killed, *compressed)).kill_after(killed / "train_log.jsonl", 6)
    Ranks(2, *corpus.keys(killed, *compressed)).finish()
    assert read_log(killed) == read_log(whole)
    assert_equal(weights(killed, "ba12.pt"), weights(whole, "ba12.pt"))
    assert losses(whole)[0] == losses(plain)[0]
    assert losses(whole) == pytest.approx(losses(plain), rel=2e-3)
    assert losses(whole)[1:] != losses(plain)[1:]


@slow
@pytest.mark.faults
def test_full_and_sharded_checkpoints_export_the_same(
    corpus: Corpus, sharded: Path, tmp_path: Path
) -> None:
    full = tmp_path / "full"
    Ranks(2, *corpus.keys(full, *SHARDED, "parallelism.fsdp.state_dict_type=full")).finish()
    assert read_log(full) == read_log(sharded)
    for run, name in ((full, "ba12.pt"), (sharded, "ba12")):
        keys = (f"checkpoint={run}/checkpoints/{name}", f"out={tmp_path}/{run.name}_export")
        check(Script("convert/to_hf.py", *keys).wait())
    exports = [
        (tmp_path / f"{name}_export/model.safetensors").read_bytes() for name in ("full", "sharded")
    ]
    assert exports[0] == exports[1]


@slow
@pytest.mark.faults
def test_two_ranks_export_what_one_does(corpus: Corpus, tmp_path: Path) -> None:
    """Of two rows a step the sum of gradients does not depend on the order: what one rank
    computes, two do, bit for bit.
    """
    exports = []
    for number in (1, 2):
        run = tmp_path / f"ranks{number}"
        # A norm is added up by ranks
        two_rows = ("global_batch_size=2", "microbatch_size=1", "optimizer.grad_clip_norm=null")
        Ranks(number, *corpus.keys(run, *SHARDED, *two_rows)).finish()
        check(
            Script("convert/to_hf.py", f"checkpoint={run}/checkpoints", f"out={run}/export").wait()
        )
        exports.append((run / "export/model.safetensors").read_bytes())
    assert exports[0] == exports[1]


@slow
@pytest.mark.faults
@pytest.mark.parametrize(
    "keys",
    [
        ["parallelism.fsdp.sharding_strategy=SHARD_GRAD_OP"],
        [
            "parallelism.fsdp.sharding_strategy=HYBRID_SHARD",
            "parallelism.fsdp.replicas=2",
            "microbatch_size=1",
        ],
        ["parallelism.activation_checkpointing=true"],
    ],
    ids=["grad-op", "hybrid", "recomputed"],
)
def test_every_strategy_trains_the_same(
    corpus: Corpus, sharded: Path, tmp_path: Path, keys: list[str]
) -> None:
    run = tmp_path / "strategy"
    number = 4 if "parallelism.fsdp.replicas=2" in keys else 2
    Ranks(number, *corpus.keys(run, *SHARDED, *keys)).kill_after(run / "train_log.jsonl", 6)
    Ranks(number, *corpus.keys(run, *SHARDED, *keys)).finish()
    assert losses(run) == pytest.approx(losses(sharded), rel=1e-4)
    ours, theirs = weights(run, "ba12"), weights(sharded, "ba12")
    assert_close(ours, theirs)
    assert len(list((run / "checkpoints/ba12").glob("piece*.pt"))) == 2, (
        "four ranks are two replicas of two shards"
    )


MIXERS: dict[str, dict[str, Any]] = {
    # Its mixer reads its parameters again in the backward pass
    "mamba2": {"head_dim": 16, "state_size": 16},
    "rwkv7": {"head_dim": 16},
}


@slow
@pytest.mark.faults
@pytest.mark.filterwarnings("ignore:According to Bo")  # fla's word on its RWKV
@pytest.mark.parametrize("model_type", MIXERS)
def test_other_models_are_sharded_as_well(corpus: Corpus, tmp_path: Path, model_type: str) -> None:
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, **MIXERS[model_type]}
    file = corpus.yaml_with({"model_type": model_type, **sizes})
    keys = (file, *SHARDED, f"varlen={str(model_type != 'mamba2').lower()}")
    sharded, whole = tmp_path / "sharded", tmp_path / "whole"
    Ranks(2, *corpus.keys(sharded, *keys)).finish()
    check(Script("recipes/train.py", *corpus.keys(whole, *keys, "parallelism.fsdp=null")).wait())
    assert losses(sharded) == pytest.approx(losses(whole), rel=1e-4)
    assert norms(sharded) == pytest.approx(norms(whole), rel=1e-3)
    assert_close(weights(sharded, "ba12"), weights(whole, "ba12.pt"))


def killed_in(
    run: Path, keys: list[str], phase: str, rank: int, names: Callable[[], list[str]], s3: S3
) -> None:
    """Start two ranks, one of which is killed in a phase of its second checkpoint."""
    before = max((step_of(name) or 0 for name in names()), default=0)
    env = {**s3.env, "PHASE_RANK": f"{rank}"}
    # The first rank writes a piece and a head, and uploads them.
    number = 3 if phase in ("writing", "uploading", "uploaded") and rank == 0 else 2
    ranks = Ranks(2, *keys, env=env, command=(ROOT / "tests/phases.py", phase, number))
    killed, other = (ranks.scripts[number].wait() for number in (rank, 1 - rank))
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert other.returncode == 1, other.stderr
    assert "Traceback" not in other.stderr
    after = max(step_of(name) or 0 for name in names())
    assert before < after, "the first checkpoint is there"


def test_a_sharded_run_is_killed_in_every_phase_of_a_save(
    corpus: Corpus, sharded: Path, s3_server: S3, tmp_path: Path
) -> None:
    """Whichever rank it is; the other ends by itself, though its pieces may be on their way."""
    run = tmp_path / "killed"
    keys = corpus.keys(run, *SHARDED, "save_interval=1ba")

    def names() -> list[str]:
        return [path.parent.name for path in (run / "checkpoints").glob("ba*/state.pt")]

    for phase, rank in (("copying", 1), ("writing", 1), ("writing", 0), ("renaming", 0)):
        killed_in(run, keys, phase, rank, names, s3_server)
    Ranks(2, *keys).finish()
    assert read_log(run) == read_log(sharded)
    assert_equal(weights(run, "ba12"), weights(sharded, "ba12"))


@slow
@pytest.mark.faults
def test_a_sharded_run_is_killed_in_every_phase_of_an_upload(
    corpus: Corpus, sharded: Path, s3_server: S3, tmp_path: Path
) -> None:
    run = tmp_path / "killed_uploading"
    place = f"save_folder=s3://data/{run.name}"
    keys = corpus.keys(run, *SHARDED, "save_interval=1ba", place)

    def names() -> list[str]:
        found = s3_server.keys(run.name)
        return [name.split("/")[0] for name in found if name.endswith("/state.pt")]

    for phase, rank in (("uploading", 1), ("uploaded", 1), ("uploading", 0), ("deleting", 0)):
        killed_in(run, keys, phase, rank, names, s3_server)
    Ranks(2, *keys, env=s3_server.env).finish()
    assert read_log(run) == read_log(sharded)
    assert max(step_of(name) or 0 for name in names()) == 12


@slow
@pytest.mark.faults
def test_pieces_in_an_object_store(
    corpus: Corpus, sharded: Path, s3_server: S3, tmp_path: Path
) -> None:
    s3, run = s3_server, tmp_path / "pieces_in_s3"
    keys = corpus.keys(
        run, *SHARDED, f"save_folder=s3://data/{run.name}", "save_num_checkpoints_to_keep=2"
    )
    Ranks(2, *keys, env=s3.env).kill_after(run / "train_log.jsonl", 6)
    Ranks(2, *keys, env=s3.env).finish()
    assert read_log(run) == read_log(sharded)
    names = {
        f"ba{step}/{file}" for step in (8, 12) for file in ("piece0.pt", "piece1.pt", "state.pt")
    }
    assert set(s3.keys(run.name)) == {"config.yaml", *names}
    assert not list((run / "staging").glob("unfinished-*")), "what was uploaded is not left behind"
    check(
        Script(
            "convert/to_hf.py",
            f"checkpoint=s3://data/{run.name}",
            f"out={tmp_path}/out",
            env=s3.env,
        ).wait()
    )


@slow
@pytest.mark.faults
def test_a_compiled_model_trains_the_same(corpus: Corpus, tmp_path: Path) -> None:
    file = corpus.yaml_with(
        {
            "model_type": "llama",
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "intermediate_size": 64,
        }
    )
    for name, keys in (("plain", ()), ("compiled", ("parallelism.compile=true",))):
        env = {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path / f"{name}_code")}
        corpus.train_run(tmp_path / name, file, "max_duration=8ba", *keys, env=env)
    assert [
        len(list(tmp_path.glob(f"{name}_code/**/*.py"))) > 0 for name in ("plain", "compiled")
    ] == [False, True]
    assert losses(tmp_path / "compiled") == pytest.approx(losses(tmp_path / "plain"), rel=1e-4)


@given(st.lists(st.integers(0, 5), min_size=1, max_size=5), st.data())
def test_any_rows_out_of_any_pieces(lengths: list[int], data: st.DataObject) -> None:
    whole = torch.arange(sum(lengths) * 2).reshape(-1, 2)
    starts = [sum(lengths[:number]) for number in range(len(lengths))]
    cut = [
        {"shape": list(whole.shape), "start": start, "part": whole[start : start + length]}
        for start, length in zip(starts, lengths, strict=True)
    ]
    first = data.draw(st.integers(0, len(whole)))
    last = data.draw(st.integers(first, len(whole)))
    out = torch.full((last - first, 2), -1)
    _copy(cut, out, first)
    assert torch.equal(out, whole[first:last])
    assert torch.equal(_whole(cut), whole)
    if len(whole):
        short = [piece for piece in cut if len(piece["part"])][1:]
        with pytest.raises((TypeError, IndexError)):
            _whole(short)


def test_pieces_of_another_model_are_refused(trained: Any) -> None:
    state = trained.trainer.state
    with pytest.raises(DataError, match="not those of this model"):
        load(state, Pieces({"model": {}, "optimizers": {}}, ()), Path())


LOOK = """
import os
import sys
from pathlib import Path
from composer.utils import dist, get_device
from flame_composer.checkpoint.find import find_newest
from flame_composer.errors import ConfigError, DataError

dist.initialize_dist(get_device())
os.chdir(sys.argv[1 + dist.get_global_rank()])  # the same place on another disk
try:
    found = find_newest(".", Path("staging"))
    print(found and found.file.name)
except (ConfigError, DataError) as error:
    print(f"{type(error).__name__}: {error}")
"""


def test_every_rank_takes_the_same_checkpoint(trained: Any, copy_of: Any, tmp_path: Path) -> None:
    """What one of them cannot read, none takes: here each sees another disk."""
    (tmp_path / "look.py").write_text(LOOK)
    folders = [copy_of(trained.checkpoints) for _ in range(2)]

    def found() -> list[str]:
        return [
            process.stdout.splitlines()[-1] for process in two_ranks(tmp_path / "look.py", *folders)
        ]

    (folders[1] / "ba3.pt").write_bytes(b"damaged")
    assert found() == ["ba2.pt", "ba2.pt"]
    (folders[0] / "ba2.pt").unlink()
    (folders[1] / "ba1.pt").unlink()
    assert (
        found()
        == [
            "DataError: .: none of its 3 checkpoints can be read; move them away (or set another"
            " run_name) to start over"
        ]
        * 2
    ), "one that only some have is no reason to start over"


def as_pieces(file: Path) -> Path:
    """The checkpoint cut in two, as two ranks would have saved it."""
    content = torch.load(file, weights_only=False)
    folder = file.with_suffix("")
    folder.mkdir()

    def cut(tree: Any, number: int) -> Any:
        if isinstance(tree, torch.Tensor) and tree.ndim:
            half = -(-len(tree) // 2)
            part = tree[:half] if number == 0 else tree[half:]
            return {"shape": list(tree.shape), "start": half * number, "part": part.clone()}
        if isinstance(tree, dict):
            return {key: cut(value, number) for key, value in tree.items()}
        return tree

    whole = {kind: content["state"].pop(kind) for kind in ("model", "optimizers")}
    for number in range(2):
        torch.save(cut(whole, number), folder / name_of(number))
    torch.save({**content, "pieces": 2}, folder / HEAD)
    file.unlink()
    return folder


NORM = "model.model.norm.weight"
PIECES: dict[str, Callable[[dict[str, Any]], Any]] = {
    "no model": lambda piece: piece.pop("model"),
    "an empty model": lambda piece: piece["model"].clear(),
    "no optimizers": lambda piece: piece.pop("optimizers"),
    "a weight missing": lambda piece: piece["model"].pop(NORM),
    "rows twice": lambda piece: piece["model"][NORM].update(start=0),
    "rows missing": lambda piece: piece["model"][NORM].update(part=torch.zeros(3)),
    "another shape": lambda piece: piece["model"][NORM].update(shape=[99]),
    "a start of text": lambda piece: piece["model"][NORM].update(start="16"),
    "another width": (
        lambda piece: piece["model"]["model.lm_head.weight"].update(part=torch.zeros(200, 5))
    ),
    "moments missing": lambda piece: piece["optimizers"]["AdamW"]["state"].clear(),
    "moments of another shape": (
        lambda piece: piece["optimizers"]["AdamW"]["state"][NORM]["exp_avg"].update(shape=[99])
    ),
}


@pytest.mark.parametrize("case", PIECES)
def test_pieces_that_hold_too_little_are_named_and_the_one_before_used(
    trained: Any, copy_of: Any, caplog: Any, case: str
) -> None:
    folder = copy_of(trained.checkpoints)
    newest = as_pieces(folder / "ba3.pt")
    needed = needed_by(
        TrainConfig(model=ModelConfig(config=GLA)),
        build_hf_config(GLA, byte_tokenizer(), CONTEXT_LENGTH),
    )
    found = find_newest(str(folder), folder / "staging", lambda: needed)
    assert found == Checkpoint(str(newest), newest / HEAD, ())
    piece = torch.load(newest / "piece1.pt", weights_only=False)
    PIECES[case](piece)
    torch.save(piece, newest / "piece1.pt")
    found = find_newest(str(folder), folder / "staging", lambda: needed)
    assert found == Checkpoint(str(folder / "ba2.pt"), folder / "ba2.pt", (str(newest),))
    (line,) = caplog.messages
    assert line.startswith(f"warning: {newest}: not a checkpoint that can be used: ")


def test_a_piece_of_another_checkpoint_is_named_and_the_one_before_used(
    sharded: Path, tmp_path: Path, caplog: Any
) -> None:
    """Though it is whole, and of the same model: by what its head knows of its own pieces."""
    folder = Path(shutil.copytree(sharded / "checkpoints", tmp_path / "checkpoints"))
    shutil.rmtree(folder / "ba12")
    whole = find_newest(str(folder), folder / "staging")
    assert whole == Checkpoint(str(folder / "ba8"), folder / "ba8" / HEAD, ())
    for name, source in (
        ("piece1.pt", "ba4/piece1.pt"),
        ("piece0.pt", "ba4/piece0.pt"),
        ("piece1.pt", "ba8/piece0.pt"),
        ("state.pt", "ba4/state.pt"),
    ):
        good = (folder / "ba8" / name).read_bytes()
        (folder / "ba8" / name).write_bytes((folder / source).read_bytes())
        found = find_newest(str(folder), folder / "staging")
        assert found == Checkpoint(
            str(folder / "ba4"), folder / "ba4" / HEAD, (str(folder / "ba8"),)
        )
        named = "piece0.pt" if name == "state.pt" else name
        what = "not a whole checkpoint: not the piece that was saved with its head"
        problem = f"{folder}/ba8/{named}: {what}"
        assert caplog.messages == [f"warning: {problem}; trying the one before it"]
        with pytest.raises(DataError, match=f"^{re.escape(problem)}$"):
            load_model(str(folder / "ba8"))
        (folder / "ba8" / name).write_bytes(good)
        caplog.clear()
    head = torch.load(folder / "ba8" / HEAD, weights_only=False)
    problem = f"{folder}/ba8/piece0.pt: not a whole checkpoint: not the piece"
    for fingerprints in (None, [], {}, [1, 2], head["fingerprints"][::-1]):
        torch.save({**head, "fingerprints": fingerprints}, folder / "ba8" / HEAD)
        with pytest.raises(DataError, match=f"^{re.escape(problem)}"):
            load_model(str(folder / "ba8"))


def test_pieces_without_a_fingerprint_are_of_the_step_of_their_head(
    trained: Any, copy_of: Any, caplog: Any
) -> None:
    """As earlier versions saved them."""
    folder = copy_of(trained.checkpoints)
    older, newer = as_pieces(folder / "ba2.pt"), as_pieces(folder / "ba3.pt")
    config = TrainConfig(model=ModelConfig(config=GLA))
    hf_config = build_hf_config(GLA, byte_tokenizer(), CONTEXT_LENGTH)
    stops = needed_by(config, hf_config)
    config.on_nan = "skip"
    skips = needed_by(config, hf_config)

    def found(needed: Any = None) -> str:
        newest = find_newest(str(folder), folder / "staging", (lambda: needed) if needed else None)
        assert newest is not None
        return newest.place

    assert [found(), found(stops), found(skips)] == [str(newer)] * 3
    shutil.copy(older / "piece1.pt", newer)
    assert [found(), found(stops), found(skips)] == [str(older)] * 3
    problem = f"{newer}: not a whole checkpoint: its clock is at step 3, and its pieces at"
    assert caplog.messages == [f"warning: {problem} 3, 2; trying the one before it"] * 3
    with pytest.raises(DataError, match=f"^{re.escape(problem)} 3, 2$"):
        load_model(str(newer))

    # All of them of an earlier step: right only where steps were left out.
    caplog.clear()
    shutil.copy(older / "piece0.pt", newer)
    note = "2, 2; if steps were left out (on_nan=skip), that is right"
    assert found(stops) == str(older)
    assert caplog.messages == [f"warning: {problem} {note}; trying the one before it"]
    caplog.clear()
    assert [found(skips), found()] == [str(newer)] * 2
    assert caplog.messages == []
    load_model(str(newer))
    assert caplog.messages == [f"warning: {problem} {note}".replace("not a whole checkpoint: ", "")]


@pytest.mark.parametrize("name", ["state.pt", "piece0.pt", "piece1.pt"])
@pytest.mark.parametrize("damage", ["pipe", "device", "folder", "empty", "dangling", "gone"])
def test_pieces_that_are_no_files_are_damage(
    trained: Any, copy_of: Any, name: str, damage: str
) -> None:
    folder = copy_of(trained.checkpoints)
    file = as_pieces(folder / "ba3.pt") / name
    file.unlink()
    make = {
        "pipe": lambda: os.mkfifo(file),
        "device": lambda: file.symlink_to("/dev/zero"),
        "folder": file.mkdir,
        "empty": file.touch,
        "dangling": lambda: file.symlink_to("nowhere"),
        "gone": lambda: None,
    }[damage]
    make()
    found = find_newest(str(folder), folder / "staging")
    # Without its head a folder was never finished.
    passed_over = () if (name, damage) == ("state.pt", "gone") else (str(folder / "ba3"),)
    assert found == Checkpoint(str(folder / "ba2.pt"), folder / "ba2.pt", passed_over)


@pytest.mark.parametrize(
    "content",
    [
        [1],
        {"state": {}},
        {"pieces": "two"},
        {"pieces": 0},
        {"pieces": 2},
        {"pieces": True},
        {"pieces": 10**12},
    ],
)
def test_a_head_that_is_none_is_damage(tmp_path: Path, content: Any) -> None:
    head = tmp_path / "ba1" / HEAD
    head.parent.mkdir()
    torch.save(content, head)
    with pytest.raises(DataError, match=str(head.parent)):
        read_checkpoint(Checkpoint(str(head.parent), head))
