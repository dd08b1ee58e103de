"""Muon: its arithmetic, which weights it trains, and runs with it that are killed and sharded."""

from __future__ import annotations

import copy
import math
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.parameter import Parameter

from flame_composer.config.load import load
from flame_composer.config.plan import PlanConfig
from flame_composer.config.sections import OptimizerConfig, SchedulerConfig
from flame_composer.config.train import RunPlan
from flame_composer.errors import InvalidField
from flame_composer.model import muon
from flame_composer.model.build import build_model
from flame_composer.model.causal_lm import CausalLM
from flame_composer.model.hf_config import build_hf_config
from flame_composer.model.muon import SCALES, Muon, orthogonal
from flame_composer.model.optimizer import build_optimizer, muon_names
from flame_composer.plan.memory import memory, moments, read_size
from flame_composer.plan.planning import find_hf_config
from flame_composer.train.optim import Schedule
from tests.conftest import CONTEXT_LENGTH, GLA, LLAMA
from tests.data_fixtures import byte_tokenizer
from tests.runs import ROOT, Corpus, Ranks, Script, check, read_log, run_script

MUON = OptimizerConfig(name="muon", lr=0.01, weight_decay=0.1)


def tiny(config: dict[str, Any], **changes: Any) -> Any:
    torch.manual_seed(0)
    keys = {**config, **changes}
    return build_model(build_hf_config(keys, byte_tokenizer(), CONTEXT_LENGTH, to_run=False))


def quintic(G: torch.Tensor) -> torch.Tensor:
    """Newton-Schulz as in Jordan et al. 2024, in fp64."""
    X = G.double() / G.double().norm()
    X = X.T if G.shape[0] > G.shape[1] else X
    for _ in range(5):
        gram = X @ X.T
        X = 3.4445 * X - 4.7750 * gram @ X + 2.0315 * gram @ gram @ X
    return X.T if G.shape[0] > G.shape[1] else X


@pytest.mark.parametrize("shape", [(8, 8), (24, 8), (8, 24), (1, 8), (8, 1)])
@pytest.mark.parametrize("scale", list(SCALES))
def test_updates_are_those_of_the_definition(shape: tuple[int, int], scale: str) -> None:
    draw = torch.Generator().manual_seed(0)
    weight = Parameter(torch.randn(shape, generator=draw))
    expected, M = weight.detach().double(), torch.zeros(shape, dtype=torch.float64)
    lr, decay, mu = 0.02, 0.1, 0.9
    optimizer = Muon([weight], lr, weight_decay=decay, momentum=mu, update_scale=scale)
    rows, columns = shape
    s = {"adamw_rms": 0.2 * max(shape) ** 0.5, "original": max(1, rows / columns) ** 0.5}[scale]
    for _ in range(6):
        weight.grad = torch.randn(shape, generator=draw)
        G = weight.grad.double()
        M = mu * M + (1 - mu) * G
        expected = (1 - lr * decay) * expected - lr * s * quintic(mu * M + (1 - mu) * G)
        optimizer.step()
        assert (weight - expected).abs().max() < 2e-6


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="this torch has no Muon")
@pytest.mark.parametrize("shape", [(24, 8), (8, 24)])
@pytest.mark.parametrize(
    ("scale", "theirs"), [("adamw_rms", "match_rms_adamw"), ("original", "original")]
)
def test_one_matrix_is_torchs_muon(
    shape: tuple[int, int], scale: str, theirs: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the bf16 that torch's takes on a CPU, too; with its own orthogonal matrix, to fp32."""
    draw = torch.Generator().manual_seed(0)
    start, keys = torch.randn(shape, generator=draw), {"weight_decay": 0.1, "momentum": 0.9}
    torchs = Parameter(start.clone())
    reference = torch.optim.Muon([torchs], 0.02, adjust_lr_fn=theirs, **keys)
    ours = [Parameter(start.clone()) for _ in range(2)]
    optimizers = [Muon([each], 0.02, update_scale=scale, **keys) for each in ours]
    for _ in range(6):
        torchs.grad = torch.randn(shape, generator=draw)
        reference.step()
        for weight, optimizer in zip(ours, optimizers, strict=True):
            weight.grad = torchs.grad.clone()
            with monkeypatch.context() as exact:
                if weight is ours[1]:
                    settings = ((muon.A, muon.B, muon.C), muon.STEPS, muon.EPS)
                    exact.setattr(
                        muon,
                        "orthogonal",
                        lambda matrix, settings=settings: (
                            torch.optim._muon._zeropower_via_newtonschulz(matrix, *settings).float()
                        ),
                    )
                optimizer.step()
    moved = (torchs - start).norm()
    assert (ours[0] - torchs).norm() < 0.02 * moved
    assert (ours[1] - torchs).abs().max() < 1e-6


def test_a_matrix_becomes_all_but_orthogonal() -> None:
    draw = torch.Generator().manual_seed(0)
    for shape in ((64, 64), (128, 32), (16, 256)):
        singular = torch.linalg.svdvals(orthogonal(torch.randn(shape, generator=draw)))
        assert singular[:-1].min() > 0.3  # all but one that was next to none
        assert singular.max() < 1.3
    assert not orthogonal(torch.zeros(3, 4)).any()


def test_updates_are_as_large_as_those_of_adamw() -> None:
    """Their root mean square, about 0.2 of the learning rate, which Liu et al. (2025) match."""
    draw = torch.Generator().manual_seed(0)
    for shape in ((96, 96), (32, 256), (256, 32)):
        update = SCALES["adamw_rms"](*shape) * orthogonal(torch.randn(shape, generator=draw))
        assert 0.15 < update.square().mean().sqrt() < 0.23


def test_without_matrices_it_is_adamw() -> None:
    draw = torch.Generator().manual_seed(0)
    ours = [Parameter(torch.randn(size, generator=draw)) for size in ((5, 3), (7,))]
    theirs = copy.deepcopy(ours)
    settings: Any = {"lr": 0.1, "betas": (0.8, 0.9), "eps": 1e-6, "weight_decay": 0.3}
    pair = Muon(ours, **settings), torch.optim.AdamW(theirs, fused=True, **settings)
    for _ in range(3):
        for a, b in zip(ours, theirs, strict=True):
            a.grad = torch.randn(a.shape, generator=draw)
            b.grad = a.grad.clone()
        for optimizer in pair:
            optimizer.step()
    for a, b in zip(ours, theirs, strict=True):
        assert torch.equal(a, b)


def test_what_has_no_gradient_stays_as_it_is() -> None:
    weights = [Parameter(torch.ones(2, 3)) for _ in range(2)]
    optimizer = Muon([{"params": weights, "momentum": 0.9}], 0.1, weight_decay=0.5)
    weights[0].grad = torch.ones(2, 3)
    optimizer.step()
    assert torch.equal(weights[1], torch.ones(2, 3))
    assert not torch.equal(weights[0], torch.ones(2, 3))
    assert set(optimizer.state) == {weights[0]}


IN_MLP = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
GATED = {"model_type": "gated_deltanet", "hidden_size": 32, "num_hidden_layers": 1}
OF = {
    "gla": (
        {**GLA, "use_short_conv": True},
        ("attn.q_proj", "attn.k_proj", "attn.v_proj", "attn.g_proj", "attn.o_proj"),
        ("attn.gk_proj.0", "attn.gk_proj.1"),
    ),
    "llama": (
        {**LLAMA, "tie_word_embeddings": False},
        tuple(f"self_attn.{name}_proj" for name in "qkvo"),
        (),
    ),
    "tied llama": (
        {**LLAMA, "tie_word_embeddings": True},
        tuple(f"self_attn.{name}_proj" for name in "qkvo"),
        (),
    ),
    "gated_deltanet": (
        {**GATED, "num_heads": 2, "head_dim": 8},
        tuple(f"attn.{name}_proj" for name in "qkvabgo"),
        (),
    ),
}


@pytest.mark.parametrize("name", list(OF))
def test_linear_layers_in_blocks_go_to_muon_and_all_else_to_adamw(name: str) -> None:
    config, of_mixer, more = OF[name]
    model = tiny(config)
    layers = (*of_mixer, *more, *IN_MLP)
    expected = {f"model.layers.0.{layer}.weight" for layer in layers}
    assert muon_names(model, MUON) == expected
    optimizer = build_optimizer(model, MUON)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = [[names[id(each)] for each in group["params"]] for group in optimizer.param_groups]
    assert set(groups[0]) == expected
    assert sorted(chain(*groups)) == sorted(names.values())
    settings = [(group["momentum"], group["weight_decay"]) for group in optimizer.param_groups]
    assert settings == [(0.95, 0.1), (0.0, 0.1), (0.0, 0.0)]
    assert any("embed" in each for each in groups[1])
    assert any("norm" in each for each in groups[2])
    assert not muon_names(model, OptimizerConfig())
    wrapped = muon_names(CausalLM(model, byte_tokenizer(), varlen=True), MUON)
    assert wrapped == {f"model.{each}" for each in expected}


def test_a_model_without_blocks_is_refused() -> None:
    model = tiny(LLAMA)
    model._no_split_modules = model.model._no_split_modules = []
    with pytest.raises(InvalidField, match=r"^optimizer.name: must not be muon: .* no blocks"):
        build_optimizer(model, MUON)


def test_settings_reach_the_groups_and_the_schedule_multiplies_both_rates() -> None:
    config = OptimizerConfig(
        name="muon", lr=0.5, adamw_lr_ratio=0.1, momentum=0.8, update_scale="original"
    )
    optimizer = build_optimizer(tiny(GLA), config)
    plan = RunPlan(100, 100, warmup=10, decay=0, eval_interval=9, save_batches=9, save_seconds=None)
    schedule = Schedule(SchedulerConfig(name="constant"), config.lr, plan)

    class At:
        optimizers = (optimizer,)

        class timestamp:
            class batch:
                value = 5

    schedule.batch_start(At, None)  # type: ignore[arg-type]
    assert {group["update_scale"] for group in optimizer.param_groups} == {"original"}
    rates = {group["momentum"]: group["lr"] for group in optimizer.param_groups}
    assert rates == {0.8: pytest.approx(0.25), 0.0: pytest.approx(0.025)}


def test_plans_count_one_moment_of_its_matrices() -> None:
    keys = [f"{ROOT}/yamls/gla_340m.yaml", "devices=8", "device=h100"]
    adamw, muon = (
        load(PlanConfig, [*keys, f"optimizer.name={name}"]) for name in ("adamw", "muon")
    )
    size = read_size(find_hf_config(adamw, None))
    assert moments(adamw, size) == 8 * size.trained
    assert moments(muon, size) == 8 * size.trained - 4 * size.for_muon
    assert 0.85 * size.trained < size.for_muon < size.in_blocks
    saved = memory(adamw, size, 1).optimizer - memory(muon, size, 1).optimizer
    assert saved == pytest.approx(4 * size.for_muon / 8, rel=1e-6)


WITH_MUON = (
    "optimizer.name=muon",
    "optimizer.adamw_lr_ratio=0.5",
    "max_duration=12ba",
    "save_interval=4ba",
)


@pytest.fixture(scope="module")
def undisturbed_muon(corpus: Corpus, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("muon") / "undisturbed"
    said = check(Script("recipes/train.py", *corpus.keys(run, *WITH_MUON)).wait()).stdout
    assert "\nMuon: all but matrices in layers train at 0.5 times the learning rate" in said
    return run


def test_a_killed_run_goes_on_bit_for_bit(
    corpus: Corpus, undisturbed_muon: Path, tmp_path: Path
) -> None:
    run = tmp_path / "killed"
    corpus.killed_run(run, *WITH_MUON, after_step=6)
    corpus.train_run(run, *WITH_MUON)
    assert read_log(run) == read_log(undisturbed_muon)
    state = torch.load(run / "checkpoints/ba12.pt", weights_only=False)["state"]["optimizers"]
    kept = {frozenset(each) for each in state["Muon"]["state"].values()}
    assert kept == {
        frozenset({"step", "momentum_buffer"}),
        frozenset({"step", "exp_avg", "exp_avg_sq"}),
    }


@pytest.mark.parametrize(
    ("key", "said"),
    [
        ("optimizer.momentum=0.9", "optimizer.momentum: its optimizer has momentum=0.95 for"),
        ("optimizer.update_scale=original", "optimizer.update_scale: its optimizer has"),
        ("optimizer.adamw_lr_ratio=0.25", "optimizer.adamw_lr_ratio: its optimizer has"),
        ("optimizer.name=adamw", "its optimizer is Muon, and this run's AdamW"),
    ],
)
def test_it_goes_on_with_the_same_settings_only(
    corpus: Corpus, undisturbed_muon: Path, tmp_path: Path, key: str, said: str
) -> None:
    run, file = tmp_path / "run", "checkpoints/ba8.pt"
    (run / "checkpoints").mkdir(parents=True)
    (run / file).write_bytes((undisturbed_muon / file).read_bytes())
    changed = [key, *(["optimizer.adamw_lr_ratio=null"] if "adamw" in key[-6:] else [])]
    process = run_script("recipes/train.py", *corpus.keys(run, *WITH_MUON, *changed))
    assert process.returncode == 2
    assert said in process.stderr


def test_a_sharded_run_is_the_same_and_goes_on(corpus: Corpus, tmp_path: Path) -> None:
    """On two ranks with FSDP2, and on two with replicas, as on one."""
    keys = (
        *WITH_MUON,
        "microbatch_size=2",
        "optimizer.eps=0.01",  # with so large an eps AdamW's part is all but linear
        "optimizer.lr=0.005",
        "scheduler.name=constant",
    )
    fsdp = ("parallelism.fsdp.state_dict_type=sharded", "parallelism.cpu_fsdp=true")
    whole, run, killed, replicas = (tmp_path / name for name in ("one", "run", "killed", "ddp"))
    corpus.train_run(whole, *keys)
    Ranks(2, *corpus.keys(run, *keys, *fsdp)).finish()
    Ranks(2, *corpus.keys(replicas, *keys)).finish()
    expected = read_log(whole)
    for other in (read_log(run), read_log(replicas)):
        for key in ("loss", "grad_norm"):
            values = [row[key] for row in other]
            assert values == pytest.approx([row[key] for row in expected], rel=1e-4), key
    Ranks(2, *corpus.keys(killed, *keys, *fsdp)).kill_after(killed / "train_log.jsonl", 6)
    Ranks(2, *corpus.keys(killed, *keys, *fsdp)).finish()
    assert read_log(killed) == read_log(run)
    assert math.isfinite(expected[-1]["loss"])
