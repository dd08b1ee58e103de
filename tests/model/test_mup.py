"""muP: what it scales, that training is then alike at every width, and the runs that use it."""

from __future__ import annotations

import copy
import importlib.util
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from flame_composer.config.parallelism import ParallelismConfig
from flame_composer.config.sections import (
    ModelConfig,
    OptimizerConfig,
    SchedulerConfig,
)
from flame_composer.config.train import RunPlan
from flame_composer.errors import InvalidField
from flame_composer.model.build import build_or_load, enable_kernels, meta_model
from flame_composer.model.causal_lm import CausalLM
from flame_composer.model.hf_config import build_hf_config
from flame_composer.model.mup import factors_of, require_rules, weights_with_factors
from flame_composer.model.optimizer import build_optimizer
from flame_composer.model.sharding import recompute_blocks
from flame_composer.train.gradients import scale_gradients
from flame_composer.train.optim import Schedule
from tests.data_fixtures import byte_tokenizer
from tests.runs import ROOT, Corpus, Ranks, Script, check, last_json, read_log, run_script

BASE, WIDTHS = 64, (64, 128, 256, 512)
VOCAB, LENGTH = 256, 80  # longer than what fla computes step by step
MODELS: dict[str, dict[str, Any]] = {
    "gla with its number of heads": {"model_type": "gla", "num_heads": 4},
    "gla with the size of its heads": {"model_type": "gla", "num_heads": 16},
    "llama": {"model_type": "llama", "num_attention_heads": 16},
    "transformer": {"model_type": "transformer", "num_heads": 16},
}
TIED = {"tie_word_embeddings": True}
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
needs_flash_attention = pytest.mark.skipif(
    DEVICE == "cpu" or importlib.util.find_spec("flash_attn") is None,
    reason="fla's softmax attention needs a GPU and flash-attn",
)


def keys_of(name: str, width: int, **changes: Any) -> dict[str, Any]:
    """The config of a model; what is named after the size of its heads has them of 16 channels."""
    keys = dict(MODELS[name])
    for key in keys:
        if keys[key] == 16:
            keys[key] = width // 16
    sizes = {"hidden_size": width, "intermediate_size": 2 * width}
    return {**keys, **sizes, "num_hidden_layers": 2, "vocab_size": VOCAB, **changes}


def new_model(name: str, width: int, base: int | None, **changes: Any) -> PreTrainedModel:
    keys = keys_of(name, width, **changes)
    torch.manual_seed(0)
    return build_or_load(
        ModelConfig(keys, mup_base_width=base), build_hf_config(keys, None, LENGTH)
    ).to(DEVICE)  # pyright: ignore


@pytest.fixture
def attention_of_fla(monkeypatch: pytest.MonkeyPatch) -> None:
    """fla builds no model with softmax attention where flash-attn is missing."""
    enable_kernels()
    import fla.layers.attn

    if fla.layers.attn.flash_attn_func is None:
        monkeypatch.setattr(fla.layers.attn, "flash_attn_func", print)


def text() -> torch.Tensor:
    """Four rows in which most tokens follow from the one before: there is something to learn."""
    generator = torch.Generator().manual_seed(1)
    rows = torch.randint(VOCAB, (4, LENGTH), generator=generator)
    after = torch.randperm(VOCAB, generator=generator)
    for i in range(1, LENGTH):
        follows = torch.rand(4, generator=generator) < 0.7
        rows[:, i] = torch.where(follows, after[rows[:, i - 1]], rows[:, i])
    return rows.to(DEVICE)


def loss_of(logits: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.cross_entropy(
        logits[:, :-1].reshape(-1, VOCAB), rows[:, 1:].reshape(-1)
    )


def changes_by_module(name: str, width: int, base: int | None, **changes: Any) -> dict[str, float]:
    """How far four steps move what modules return, as the mean of its absolute change."""
    model: Any = new_model(name, width, base, **changes)
    optimizer = build_optimizer(model, OptimizerConfig(lr=3e-3), base)
    rows, outputs = text(), dict[str, torch.Tensor]()

    def note(module: str) -> Any:
        def hook(_: Any, __: Any, output: Any) -> None:
            outputs[module] = (output[0] if isinstance(output, tuple) else output).detach()

        return hook

    for module, each in model.named_modules():
        if module.endswith(("q_proj", "attn", "mlp", "gk_proj", "lm_head")):
            each.register_forward_hook(note(module))
    first: dict[str, torch.Tensor] = {}
    for step in range(5):
        logits = model(input_ids=rows, use_cache=False).logits
        first = first or dict(outputs)
        if step < 4:
            loss_of(logits, rows).backward()
            scale_gradients(optimizer)
            optimizer.step()
            optimizer.zero_grad()
    return {name: (outputs[name] - first[name]).abs().mean().item() for name in first}


def slopes(name: str, *, with_mup: bool, **changes: Any) -> dict[str, float]:
    """The exponent of the width that each module's change grows with, between widths."""
    base = BASE if with_mup else None
    seen = [changes_by_module(name, width, base, **changes) for width in WIDTHS]
    log = torch.tensor(WIDTHS).double().log()
    log -= log.mean()
    return {
        module: float((log * torch.tensor([each[module] for each in seen]).double().log()).sum())
        / float((log * log).sum())
        for module in seen[0]
    }


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("gla with its number of heads", TIED),
        ("gla with the size of its heads", {}),
        ("llama", TIED),
        ("llama", {}),
        pytest.param("transformer", TIED, marks=[pytest.mark.gpu, needs_flash_attention]),
    ],
)
def test_coordinate_check(name: str, changes: dict[str, Any]) -> None:
    """As Yang et al. 2022 check an implementation: with muP a few steps change what every module
    returns by as much at every width, and without by more, the wider the model.

    Logits, and the gates that come out of 16 channels, are no wider in a wider model. The share of
    their change that is by chance falls as 1 / sqrt(width), and none may grow.
    """
    with_mup, without = (slopes(name, with_mup=each, **changes) for each in (True, False))
    assert {module.rpartition(".")[2] for module in with_mup} >= {"mlp", "lm_head", "q_proj"}
    for module, slope in with_mup.items():
        falls = module.endswith(("lm_head", "gk_proj"))
        assert (-0.6 if falls else -0.25) < slope < 0.1, (module, slope)
        assert without[module] > 0.3, (module, without[module])
        if module.endswith(("attn", "mlp")):
            assert without[module] > 0.8, (module, without[module])


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.usefixtures("attention_of_fla")
def test_each_weight_has_the_rule_of_its_kind(name: str, tied: bool) -> None:
    """The table of docs/mup.md, of a model four times as wide."""
    keys = keys_of(name, 4 * BASE, tie_word_embeddings=tied)
    model = meta_model(build_hf_config(keys, None, LENGTH, to_run=False))
    kinds: dict[tuple[float, ...], set[str]] = {}
    for weight in model.state_dict():
        kind = tuple(factors_of(weight, 4) or (1.0, 1.0, 1.0))
        kinds.setdefault(kind, set()).add(".".join(weight.split(".")[-3:]).removeprefix("model."))
    attention = "self_attn" if name == "llama" else "attn"
    is_gla = name.startswith("gla")
    hidden = {f"{attention}.{letter}_proj.weight" for letter in "qkvo" + "g" * is_gla}
    hidden |= {f"mlp.{which}_proj.weight" for which in ("gate", "up", "down")}
    assert kinds.pop((0.5, 0.25, 1.0)) == hidden
    assert kinds.pop((0.25, 0.25, 0.25)) == {"norm.weight"}
    few = kinds.pop((0.25, 0.25, 1.0), set())
    assert few == ({"gk_proj.0.weight"} if is_gla else set())
    (rest,) = kinds.values()
    assert {each for each in rest if not each.endswith(("norm.weight", "gate.weight"))} == {
        *({"gk_proj.1.weight", "gk_proj.1.bias"} if is_gla else ()),
        "embed_tokens.weight" if name == "llama" else "embeddings.weight",
        "lm_head.weight",
    }


@pytest.mark.parametrize("name", ["gla with its number of heads", "llama"])
@pytest.mark.parametrize("tied", [True, False])
def test_it_is_a_multiplier_of_the_logits_to_the_last_bit(name: str, tied: bool) -> None:
    """Table 8 of Yang et al. 2022: logits divided by the width and an ordinary last norm, here by
    a hook. What we do instead trains the same, clipping and weight decay included.
    """
    ours: Any = new_model(name, 4 * BASE, BASE, tie_word_embeddings=tied)
    theirs = copy.deepcopy(ours)
    with torch.no_grad():
        theirs.model.norm.weight.fill_(1.0)
    theirs.lm_head.register_forward_hook(lambda _, __, logits: logits / 4)
    config = OptimizerConfig(lr=1e-2, weight_decay=0.1)
    optimizer = build_optimizer(ours, config, BASE)
    groups = []
    for weight, parameter in theirs.named_parameters():
        wider = 4 if "_proj" in weight and "gk_proj.1" not in weight else 1
        decay = 0.1 * wider if parameter.ndim >= 2 else 0.0
        groups.append({"params": [parameter], "lr": 1e-2 / wider, "weight_decay": decay})
    reference = torch.optim.AdamW(groups, betas=config.betas, eps=config.eps, fused=True)
    rows = text()
    for _ in range(4):
        losses, norms = [], []
        for model, its in ((ours, optimizer), (theirs, reference)):
            loss = loss_of(model(input_ids=rows, use_cache=False).logits, rows)
            loss.backward()
            scale_gradients(its)
            losses.append(loss.item())
            norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1).item())
            its.step()
            its.zero_grad()
        assert losses[0] == losses[1]
        assert norms[0] == norms[1] > 0.1, "clipped"
    assert torch.equal(ours.model.norm.weight * 4, theirs.model.norm.weight)
    assert ours.model.norm.weight.std() > 0


def test_at_the_width_of_the_base_nothing_changes() -> None:
    name = "gla with its number of heads"
    plain, same = (new_model(name, BASE, base) for base in (None, BASE))
    for weight, other in zip(plain.parameters(), same.parameters(), strict=True):
        assert torch.equal(weight, other)
    config = OptimizerConfig()
    ours, theirs = (build_optimizer(plain, config, base).param_groups for base in (BASE, None))
    assert [list(group) for group in ours] == [list(group) for group in theirs]
    assert "lr_factor" not in ours[0]
    for group, other in zip(ours, theirs, strict=True):
        assert list(map(id, group["params"])) == list(map(id, other["params"]))


def test_a_model_narrower_than_its_base_is_scaled_the_other_way() -> None:
    model = new_model("llama", BASE // 2, BASE)
    factors = {name: each for name, _, each in weights_with_factors(model, BASE)}
    assert factors["model.layers.0.mlp.up_proj.weight"] == (math.sqrt(2), 2.0, 1.0)
    assert (model.model.norm.weight == 2).all()


def test_weights_are_those_of_the_seed_scaled() -> None:
    name, width = "gla with its number of heads", 256
    ours, plain = (dict(new_model(name, width, base).named_parameters()) for base in (BASE, None))
    layer = "model.layers.1."
    for weight, factor in {
        f"{layer}attn.q_proj.weight": 0.5,
        f"{layer}attn.gk_proj.0.weight": 0.25,
        f"{layer}attn.gk_proj.1.weight": 1.0,
        f"{layer}mlp.down_proj.weight": 0.5,
        f"{layer}mlp_norm.weight": 1.0,
        "model.norm.weight": 0.25,
        "model.embeddings.weight": 1.0,
        "lm_head.weight": 1.0,
    }.items():
        assert torch.equal(ours[weight], plain[weight] * factor), weight


@pytest.mark.parametrize(
    ("optimizer", "decays"), [("adamw", (0.1, 0.4)), ("decoupled_adamw", (0.1, 0.1))]
)
@pytest.mark.parametrize("recomputed", [False, True])
def test_the_groups_of_the_optimizer(
    optimizer: Any, decays: tuple[float, float], recomputed: bool
) -> None:
    """Each weight is in one of them, whatever its blocks are wrapped in, and what decays does so by
    the same part of itself at every width; the schedule keeps to their factors.
    """
    model: Any = new_model("gla with its number of heads", 4 * BASE, BASE, vocab_size=400)
    wrapped = CausalLM(model, byte_tokenizer(), varlen=True)
    if recomputed:
        recompute_blocks(wrapped, ParallelismConfig(activation_checkpointing=True))
        assert any("_checkpoint_wrapped" in name for name, _ in model.named_parameters())
    config = OptimizerConfig(name=optimizer, lr=1e-2, weight_decay=0.1)
    made = build_optimizer(model, config, BASE)
    held = [id(parameter) for group in made.param_groups for parameter in group["params"]]
    assert sorted(held) == sorted(map(id, model.parameters()))
    assert made.param_groups[0]["lr"] == 1e-2, "the log shows the rate of the first group"
    found = {
        (len(group["params"]), group["lr"], group["weight_decay"], group.get("gradient_factor"))
        for group in made.param_groups
    }
    assert found == {
        (4, 1e-2, decays[0], None),  # two embeddings, and the gates' 16 channels on, in two layers
        (8, 1e-2, 0.0, None),  # the norms' weights and the gates' biases
        (16, 2.5e-3, decays[1], 1.0),
        (2, 2.5e-3, decays[1], 1.0),  # the gates' 16 channels
        (1, 2.5e-3, 0.0, 0.25),  # the last norm
    }
    state: Any = type("", (), {"optimizers": [made]})()
    state.timestamp = type("", (), {"batch": type("", (), {"value": 5})()})()
    plan = RunPlan(10, 9, warmup=10, decay=0, eval_interval=9, save_batches=9, save_seconds=None)
    Schedule(SchedulerConfig(), 1e-2, plan).batch_start(state, None)  # type: ignore[arg-type]
    assert {group["lr"] for group in made.param_groups} == {5e-3, 1.25e-3}


REFUSED: list[tuple[dict[str, Any], int, str, str]] = [
    (
        {"model_type": "gpt2", "n_embd": 64},
        32,
        "model.mup_base_width",
        "there are no rules for gpt2 models, but for gla, llama, transformer; leave it out",
    ),
    (
        {"model_type": "mamba2"},
        32,
        "model.mup_base_width",
        "there are no rules for mamba2 models, but for gla, llama, transformer; leave it out",
    ),
    *(
        (
            {"model_type": "gla", "hidden_size": 64, **part},
            32,
            f"model.config.{next(iter(part))}",
            "must be left out with model.mup_base_width, which has no rules for it (docs/mup.md)",
        )
        for part in (
            {"use_short_conv": True},
            {"attnres_block_size": 2},
            {"attn": {"layers": [1], "num_heads": 2}},
        )
    ),
    (
        {"model_type": "llama", "hidden_size": 64, "num_attention_heads": 2},
        48,
        "model.config.num_attention_heads",
        "must be a multiple of 4 with model.mup_base_width: heads keep their size, so a base of"
        " width 48 would have 2 x 48 / 64 = 1.5 of them",
    ),
    (
        {
            "model_type": "llama",
            "hidden_size": 64,
            "num_attention_heads": 4,
            "num_key_value_heads": 1,
        },
        32,
        "model.config.num_key_value_heads",
        "must be a multiple of 2 with model.mup_base_width: heads keep their size, so a base of"
        " width 32 would have 1 x 32 / 64 = 0.5 of them",
    ),
    (
        {"model_type": "transformer", "hidden_size": 100, "num_heads": 5, "num_kv_heads": 5},
        30,
        "model.config.num_heads",
        "must be a multiple of 10 with model.mup_base_width: heads keep their size, so a base of"
        " width 30 would have 5 x 30 / 100 = 1.5 of them",
    ),
]


@pytest.mark.parametrize(("keys", "base", "name", "rule"), REFUSED)
def test_what_has_no_rules_is_refused(
    keys: dict[str, Any], base: int, name: str, rule: str
) -> None:
    enable_kernels()
    keys = {"vocab_size": VOCAB, **keys}
    hf_config = build_hf_config(keys, None, LENGTH, to_run=False)
    with pytest.raises(InvalidField) as error:
        require_rules(ModelConfig(keys, mup_base_width=base), hf_config)
    assert (error.value.name, error.value.rule) == (name, rule)
    require_rules(ModelConfig(keys), hf_config)


def assert_same_log(ours: Path, theirs: Path) -> None:
    assert read_log(ours) == read_log(theirs)


WITH_MUP = ("model.mup_base_width=16", "max_duration=12ba", "save_interval=4ba")


@pytest.fixture(scope="module")
def wide(corpus: Corpus, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with muP that nothing disturbed, of a model twice as wide as its base."""
    run = tmp_path_factory.mktemp("mup") / "wide"
    corpus.train_run(run, *WITH_MUP)
    return run


def test_a_run_with_it_is_another_and_its_rates_are_the_schedules(
    corpus: Corpus, tmp_path: Path
) -> None:
    wide, plain = tmp_path / "wide", tmp_path / "plain"
    said = check(Script("recipes/train.py", *corpus.keys(wide, *WITH_MUP)).wait()).stdout
    assert "\nmuP: matrices in layers train at 0.5 times the learning rate that is logged\n" in said
    said = check(Script("recipes/train.py", *corpus.keys(plain, *WITH_MUP[1:])).wait()).stdout
    assert "muP" not in said
    ours, theirs = read_log(wide), read_log(plain)
    assert [row["batch_hash"] for row in ours] == [row["batch_hash"] for row in theirs]
    assert [row["learning_rate"] for row in ours] == [row["learning_rate"] for row in theirs]
    assert all(row["loss"] != other["loss"] for row, other in zip(ours, theirs, strict=True))
    content = torch.load(wide / "checkpoints/ba12.pt", weights_only=False)
    groups = content["state"]["optimizers"]["AdamW"]["param_groups"]
    assert [group.get("lr_factor", 1.0) for group in groups] == [1.0, 1.0, 0.5, 0.5, 0.5]
    assert len({group["lr"] / group.get("lr_factor", 1.0) for group in groups}) == 1


def test_a_killed_run_goes_on_bit_for_bit(corpus: Corpus, wide: Path, tmp_path: Path) -> None:
    run = tmp_path / "wide"
    corpus.killed_run(run, *WITH_MUP, after_step=6)
    corpus.train_run(run, *WITH_MUP)
    assert_same_log(run, wide)


@pytest.mark.parametrize("base", ["8", "null"])
def test_it_goes_on_with_the_same_base_only(
    corpus: Corpus, wide: Path, tmp_path: Path, base: str
) -> None:
    run = tmp_path / "wide"
    (run / "checkpoints").mkdir(parents=True)
    file = "checkpoints/ba8.pt"
    (run / file).write_bytes((wide / file).read_bytes())
    keys = corpus.keys(run, *WITH_MUP, f"model.mup_base_width={base}")
    process = run_script("recipes/train.py", *keys)
    assert process.returncode == 2, process.stderr
    found = "0.25" if base == "8" else "1.0"
    assert process.stderr == (
        f"error: {run}/checkpoints: none of its 1 checkpoints is of this run: {run}/{file}: it was"
        " trained with another model.mup_base_width or optimizer.adamw_lr_ratio: its optimizer has"
        f" lr_factor=0.5 for model.model.layers.0.attn.q_proj.weight, and this run's"
        f" lr_factor={found}; set back what changed, or give another run_name or save_folder\n"
    )


def test_a_sharded_run_is_the_same_and_goes_on(corpus: Corpus, tmp_path: Path) -> None:
    sharded = (
        *WITH_MUP,
        "parallelism.fsdp.state_dict_type=sharded",
        "parallelism.cpu_fsdp=true",
        "microbatch_size=2",
        "optimizer.eps=0.01",  # with so large an eps a step is all but proportional to the gradient
        "optimizer.grad_clip_norm=0.5",
        "optimizer.lr=0.02",
        "scheduler.name=constant",
    )
    whole, run, killed = (tmp_path / name for name in ("whole", "run", "killed"))
    corpus.train_run(whole, *sharded, "parallelism.fsdp=null")
    Ranks(2, *corpus.keys(run, *sharded)).finish()
    ours, theirs = read_log(run), read_log(whole)
    for key in ("loss", "grad_norm"):
        assert [row[key] for row in ours] == pytest.approx([row[key] for row in theirs], rel=1e-3)
    Ranks(2, *corpus.keys(killed, *sharded)).kill_after(killed / "train_log.jsonl", 6)
    Ranks(2, *corpus.keys(killed, *sharded)).finish()
    assert_same_log(killed, run)


def test_what_is_exported_is_an_ordinary_model(corpus: Corpus, wide: Path, tmp_path: Path) -> None:
    """fla loads it as any other; what muP changed is in the weights alone."""
    folder = tmp_path / "hf"
    checkpoint = f"checkpoint={wide / 'checkpoints'}"
    check(run_script("convert/to_hf.py", checkpoint, f"out={folder}", "dtype=float32"))
    enable_kernels()
    plain: Any = AutoModelForCausalLM.from_pretrained(folder)
    assert "mup" not in (folder / "config.json").read_text()
    state = torch.load(wide / "checkpoints/ba12.pt", weights_only=False)["state"]["model"]
    for name, weight in plain.state_dict().items():
        assert torch.equal(weight, state[f"model.{name}"]), name
    evaluated = last_json(
        run_script(
            "recipes/evaluate.py", f"model={folder}", f"data.local={corpus.val}", "data.max_rows=7"
        )
    )
    trained = read_log(wide)[-1]["eval_loss"]
    assert math.log(evaluated["perplexity"]) == pytest.approx(trained, rel=1e-4)


def test_plan_counts_its_steps(corpus: Corpus, tmp_path: Path) -> None:
    keys = corpus.keys(tmp_path / "run", *WITH_MUP)
    for more, status in (((), 0), (("model.config.use_short_conv=true",), 2)):
        plan = Script("recipes/plan.py", *keys, *more, "devices=1", "device=cpu").wait()
        assert plan.returncode == status, plan.stderr
        assert ("model.config.use_short_conv" in plan.stderr) == bool(status)


def test_frozen_layers(corpus: Corpus, tmp_path: Path) -> None:
    """Layers that stop training keep their place in the groups."""
    run, frozen = tmp_path / "run", "algorithms.layer_freezing={freeze_start: 0.2}"
    corpus.train_run(run, *WITH_MUP, frozen)
    again = tmp_path / "again" / "run"
    corpus.killed_run(again, *WITH_MUP, frozen, after_step=9)
    corpus.train_run(again, *WITH_MUP, frozen)
    assert_same_log(again, run)


def test_the_commands_of_the_page(corpus: Corpus, tmp_path: Path) -> None:
    """docs/mup.md on a smaller corpus, with fewer and shorter steps."""
    blocks = (ROOT / "docs/mup.md").read_text().split("```bash\n")[1:]
    commands = [line.split() for block in blocks for line in block.split("```")[0].splitlines()]
    assert [command[1] for command in commands] == ["recipes/train.py"] * 3 + ["convert/to_hf.py"]
    for python, script, *keys in commands:
        assert python == "python"
        keys = [key.replace("runs/", f"{tmp_path}/runs/") for key in keys]
        if script == "recipes/train.py":
            run = tmp_path / "runs" / keys[1].removeprefix("run_name=")
            keys = [*keys[:1], *corpus.keys(run, *keys)[1:], "max_duration=4ba", *keys[1:]]
        check(run_script(script, *keys))
    hidden = "model.layers.0.mlp.up_proj.weight"
    enable_kernels()
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "runs/wide/hf").state_dict()
    assert plain[hidden].std().item() == pytest.approx(0.02 / 2, rel=0.1)
    assert plain["model.norm.weight"].mean().item() == pytest.approx(1 / 4, rel=0.1)
