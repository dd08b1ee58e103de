"""What is decayed, the learning rate over a run, and that the fused AdamW computes what the
plain one does.
"""

from __future__ import annotations

import copy
import itertools
import re
from typing import Any

import pytest
import torch
from composer.core import State, Timestamp
from composer.loggers import Logger
from composer.utils import get_device

from flame_composer.config.sections import OptimizerConfig, SchedulerConfig
from flame_composer.config.train import RunPlan
from flame_composer.errors import ConfigError
from flame_composer.model.build import build_model
from flame_composer.model.hf_config import build_hf_config
from flame_composer.model.optimizer import build_optimizer
from flame_composer.train.algorithms import EMA, SWA, LayerFreezing, SeqLengthWarmup
from flame_composer.train.optim import Schedule, rate_factor
from tests.conftest import CONTEXT_LENGTH, GLA, LLAMA
from tests.data_fixtures import byte_tokenizer


def tiny_model(config: dict[str, Any], **changes: Any) -> torch.nn.Module:
    torch.manual_seed(0)
    return build_model(build_hf_config({**config, **changes}, byte_tokenizer(), CONTEXT_LENGTH))


@pytest.mark.parametrize(
    ("config", "changes"),
    [(GLA, {}), (GLA, {"tie_word_embeddings": True}), (LLAMA, {"attention_bias": True})],
)
def test_every_parameter_is_in_one_group_and_no_vector_is_decayed(config, changes):
    model = tiny_model(config, **changes)
    optimizer = build_optimizer(
        model, OptimizerConfig(lr=0.5, betas=(0.8, 0.9), eps=1e-6, weight_decay=0.1)
    )
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = [
        {names[id(parameter)]: parameter for parameter in group["params"]}
        for group in optimizer.param_groups
    ]
    decayed, plain = groups
    assert len(decayed) + len(plain) == len(names) == len(decayed | plain)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.0]
    assert any("norm" in name for name in plain)
    assert all("norm" in name or name.endswith(".bias") for name in plain)
    assert not any("norm" in name or name.endswith(".bias") for name in decayed)
    assert any("embed" in name for name in decayed)
    for group in optimizer.param_groups:
        assert (group["lr"], group["betas"], group["eps"], group["fused"]) == (
            0.5,
            (0.8, 0.9),
            1e-6,
            True,
        )


def test_frozen_parameters_are_left_out():
    model = tiny_model(GLA)
    frozen = model.get_input_embeddings().weight  # pyright: ignore
    frozen.requires_grad_(False)
    optimizer = build_optimizer(model, OptimizerConfig())
    given = [id(parameter) for group in optimizer.param_groups for parameter in group["params"]]
    assert id(frozen) not in given
    assert (
        len(given)
        == sum(parameter.requires_grad for parameter in model.parameters())
        == len(list(model.parameters())) - 1
    )


def test_no_empty_group():
    assert (
        len(build_optimizer(torch.nn.Linear(2, 2, bias=False), OptimizerConfig()).param_groups) == 1
    )


def plan(*, warmup: int, total: int, decay: int = 0) -> RunPlan:
    return RunPlan(
        total,
        per_epoch=9,
        warmup=warmup,
        decay=decay,
        eval_interval=9,
        save_batches=9,
        save_seconds=None,
    )


def rate(config: SchedulerConfig, batch: int, *, warmup: int, total: int, decay: int = 0) -> float:
    return rate_factor(config, batch, plan(warmup=warmup, total=total, decay=decay))


@pytest.mark.parametrize(
    ("name", "middle", "end"),
    [("cosine", 0.55, 0.1), ("linear", 0.55, 0.1), ("constant", 1.0, 1.0)],
)
def test_schedules(name, middle, end):
    config: Any = SchedulerConfig(name=name, min_lr_ratio=0.1)
    warmup, total = 10, 110
    at = [rate(config, batch, warmup=warmup, total=total) for batch in range(total + 1)]
    assert at[:11] == pytest.approx([batch / 10 for batch in range(11)])
    assert at[10] == 1.0
    assert at[60] == pytest.approx(middle)
    assert at[110] == pytest.approx(end)
    assert all(a >= b for a, b in itertools.pairwise(at[10:])), "never rises after the warmup"
    assert min(at[10:]) >= end - 1e-12
    quarter = {"cosine": 0.1 + 0.9 * (1 + 2**-0.5) / 2, "linear": 0.775, "constant": 1.0}[name]
    assert at[35] == pytest.approx(quarter)


@pytest.mark.parametrize(
    ("shape", "middle"),
    [("linear", 0.55), ("cosine", 0.55), ("1-sqrt", 0.1 + 0.9 * (1 - 0.5**0.5))],
)
def test_warmup_stable_decay(shape, middle):
    config = SchedulerConfig(name="wsd", decay_shape=shape, min_lr_ratio=0.1)
    at = [rate(config, batch, warmup=10, total=110, decay=20) for batch in range(111)]
    assert at[:11] == pytest.approx([batch / 10 for batch in range(11)])
    assert at[10:91] == [1.0] * 81
    assert all(a > b for a, b in itertools.pairwise(at[90:]))
    assert (at[100], at[110]) == (pytest.approx(middle), pytest.approx(0.1))


@pytest.mark.parametrize("name", ["cosine", "linear", "constant", "wsd"])
def test_no_warmup_starts_at_the_peak(name):
    config: Any = SchedulerConfig(name=name)
    assert rate(config, 0, warmup=0, total=10) == 1.0


def test_warmup_as_long_as_the_run():
    config = SchedulerConfig(name="cosine")
    assert [rate(config, batch, warmup=4, total=4) for batch in range(4)] == pytest.approx(
        [0, 0.25, 0.5, 0.75]
    )


def test_every_batch_gets_the_rate_of_its_place():
    """Whatever rate the optimizer had before, as after a restart."""
    parameter = torch.nn.Parameter(torch.zeros(2, 2))
    optimizer = torch.optim.AdamW([{"params": [parameter]}, {"params": []}], lr=123.0)
    state = State(
        model=torch.nn.Linear(1, 1),
        rank_zero_seed=0,
        run_name="run",
        device=get_device("cpu"),
        max_duration="9ba",
    )
    state.optimizers = optimizer
    schedule = Schedule(
        SchedulerConfig(name="linear", min_lr_ratio=0.0), 2.0, plan(warmup=4, total=8)
    )
    seen = []
    for batch in (3, 0, 4, 6):
        state.timestamp = Timestamp(batch=batch)
        schedule.batch_start(state, Logger(state))
        seen.append([group["lr"] for group in optimizer.param_groups])
    assert seen == [[1.5, 1.5], [0.0, 0.0], [2.0, 2.0], [1.0, 1.0]]


def resumed(before: Schedule, batch: int, after: Schedule) -> None:
    """`after` goes on from a checkpoint that `before` was in after `batch` batches."""
    before.num_used = batch
    after.load_state_dict(before.state_dict())


# Name, warmup and decay in batches, batches taken, length of the run before and after.
EXTENDED = [
    ("constant", 4, 0, 20, 20, 40),
    ("constant", 4, 0, 10, 20, 12),
    ("wsd", 4, 5, 15, 20, 40),
    ("wsd", 4, 5, 10, 20, 15),
    ("cosine", 4, 0, 4, 20, 40),
    ("linear", 4, 0, 0, 20, 40),
    ("cosine", 4, 0, 9, 20, 20),
]
BENT = [
    ("cosine", 4, 0, 6, 20, 40),
    ("linear", 4, 0, 6, 20, 19),
    ("wsd", 4, 5, 17, 20, 40),
    ("wsd", 4, 5, 15, 20, 18),
    ("cosine", 0, 0, 20, 20, 40),
]


def schedules_of(
    name: str, warmup: int, decay: int, lengths: tuple[int, int], **options: Any
) -> list[Schedule]:
    config: Any = SchedulerConfig(name=name)
    return [
        Schedule(config, 3e-4, plan(warmup=warmup, decay=decay, total=total), **options)
        for total in lengths
    ]


@pytest.mark.parametrize(("name", "warmup", "decay", "taken", "before", "after"), EXTENDED)
def test_a_length_that_changes_no_rate_that_was_used_is_accepted(
    name, warmup, decay, taken, before, after
):
    old, new = schedules_of(name, warmup, decay, (before, after))
    resumed(old, taken, new)
    assert new.num_used == taken


@pytest.mark.parametrize(("name", "warmup", "decay", "taken", "before", "after"), BENT)
def test_a_length_that_changes_a_rate_that_was_used_is_refused_with_the_reason(
    name, warmup, decay, taken, before, after
):
    old, new = schedules_of(name, warmup, decay, (before, after))
    with pytest.raises(
        ConfigError,
        match=rf"^the checkpoint was trained at other learning rates: step \d+ of the {taken} "
        rf"taken had .*: max_duration \({before}ba before, {after}ba now\); set back what changed,"
        r" start a new "
        "run_name, or set allow_schedule_change=true to continue anyway$",
    ):
        resumed(old, taken, new)
    old, new = schedules_of(name, warmup, decay, (before, after), allow_change=True)
    resumed(old, taken, new)
    strict = schedules_of(name, warmup, decay, (before, after))[1]
    resumed(new, taken, strict)  # from then on it is the new one that counts


@pytest.mark.parametrize(
    ("key", "other", "lr"),
    [
        ("optimizer.lr", {}, 1e-4),
        ("scheduler.name", {"name": "linear"}, 3e-4),
        ("scheduler.min_lr_ratio", {"min_lr_ratio": 0.2}, 3e-4),
    ],
)
def test_whatever_bends_the_curve_is_named(key, other, lr):
    before = Schedule(SchedulerConfig(), 3e-4, plan(warmup=4, total=20))
    with pytest.raises(ConfigError, match=rf": {key} \("):
        resumed(before, 9, Schedule(SchedulerConfig(**other), lr, plan(warmup=4, total=20)))


# Steps taken, length of the run before and after, and what the line begins with.
BY_LENGTH: list[tuple[Any, int, int, int, str]] = [
    (
        SWA("0.5dur", "0.9dur"),
        20,
        20,
        40,
        (
            "step 10 of the 20 taken had an average, and would have no average: max_duration (20ba"
            " before, 40ba now); set it back"
        ),
    ),
    (SWA("0.5dur", "0.9dur"), 9, 20, 40, ""),
    (SWA("5ba", "9ba"), 20, 20, 40, ""),
    (
        EMA(ema_start="0.5dur"),
        12,
        20,
        40,
        "step 10 of the 12 taken had an average, and would have no average",
    ),
    (EMA(ema_start="5ba"), 20, 20, 40, ""),
    (
        SeqLengthWarmup(32, 0.5, 8, 8),
        20,
        20,
        40,
        "step 5 of the 20 taken had rows of 16 tokens, and would have rows of 8",
    ),
    (LayerFreezing(0.5), 10, 20, 40, ""),
    (LayerFreezing(0.5), 11, 20, 40, ""),
    (
        LayerFreezing(0.5),
        12,
        20,
        40,
        "step 12 of the 12 taken had 0.1 of the layers frozen, and would have 0 of the layers",
    ),
]


@pytest.mark.parametrize(("algorithm", "taken", "before", "after", "line"), BY_LENGTH)
def test_an_algorithm_that_goes_by_the_length_of_the_run(algorithm, taken, before, after, line):
    """A constant rate would allow any other length."""

    def schedule(total: int, **options: Any) -> Schedule:
        config = SchedulerConfig(name="constant")
        return Schedule(
            config,
            3e-4,
            plan(warmup=0, total=total),
            going_by_length={"algorithms.x": algorithm},
            **options,
        )

    resumed(schedule(before), taken, schedule(before))
    if not line:
        resumed(schedule(before), taken, schedule(after))
        return
    with pytest.raises(
        ConfigError, match=re.escape(f"algorithms.x: depends on the length of the run: {line}")
    ):
        resumed(schedule(before), taken, schedule(after))
    resumed(schedule(before), taken, schedule(after, allow_change=True))


@pytest.mark.parametrize("options", [{}, {"allow_change": True}])
def test_a_run_cannot_be_made_shorter_than_it_is(options):
    old, new = schedules_of("constant", 0, 0, (20, 10), **options)
    resumed(old, 10, new)
    line = (
        "^max_duration: comes to 10ba, but the checkpoint has already taken 11 steps; set it to"
        " more, or move"
    )
    with pytest.raises(ConfigError, match=line):
        resumed(old, 11, new)


def test_fused_adamw_is_adamw():
    """Five steps of the optimizer that is used, and of PyTorch's for-loop, on the same
    gradients.
    """
    model = tiny_model(GLA)
    reference = copy.deepcopy(model)
    config = OptimizerConfig(lr=1e-2, weight_decay=0.1)
    optimizer = build_optimizer(model, config)
    vectors = [p for p in reference.parameters() if p.ndim < 2]
    plain = torch.optim.AdamW(
        [
            {"params": [p for p in reference.parameters() if p.ndim >= 2], "weight_decay": 0.1},
            {"params": vectors, "weight_decay": 0.0},
        ],
        lr=1e-2,
        betas=config.betas,
        eps=config.eps,
        foreach=False,
        fused=False,
    )
    start = copy.deepcopy(model.state_dict())
    generator = torch.Generator().manual_seed(1)
    for _ in range(5):
        for ours, theirs in zip(model.parameters(), reference.parameters(), strict=True):
            ours.grad = torch.randn(ours.shape, generator=generator)
            theirs.grad = ours.grad.clone()
        optimizer.step()
        plain.step()
    for (name, ours), theirs in zip(
        model.state_dict().items(), reference.state_dict().values(), strict=True
    ):
        moved = (theirs - start[name]).norm()
        assert moved > 0
        assert (ours - theirs).norm() <= 1e-5 * moved, name


def steps_of(
    name: str, *, weight_decay: float, lr: float = 1e-2
) -> tuple[torch.Tensor, torch.Tensor]:
    """A matrix and a vector of ones after three steps on gradients of zero but for their first
    entry.
    """
    model = torch.nn.Linear(3, 2)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(1.0)
    config: Any = OptimizerConfig(name=name, lr=lr, weight_decay=weight_decay)
    optimizer = build_optimizer(model, config)
    for _ in range(3):
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
            parameter.grad.view(-1)[0] = 1.0
        optimizer.step()
    return model.weight.detach().view(-1), model.bias.detach()


def test_weight_decay_is_what_each_optimizer_calls_it():
    """Entries without a gradient only decay: by lr x weight_decay a step in AdamW, by
    weight_decay in DecoupledAdamW.
    """
    for name, weight_decay, left in (
        ("adamw", 0.1, (1 - 1e-3) ** 3),
        ("decoupled_adamw", 1e-3, (1 - 1e-3) ** 3),
    ):
        matrix, vector = steps_of(name, weight_decay=weight_decay)
        assert matrix[1:].tolist() == pytest.approx([left] * 5, rel=1e-6)
        assert vector[1] == 1.0
        assert matrix[0] < left
        assert vector[0] < 1


def test_lamb_scales_the_step_by_the_norm_of_the_weights():
    """You et al. 2020, algorithm 2: here every step is lr x |w| / |update| x update, and the
    update has one entry.
    """
    matrix, _ = steps_of("lamb", weight_decay=0.0, lr=1e-2)
    expected = torch.ones(6)
    for _ in range(3):
        expected[0] -= 1e-2 * expected.norm()
    torch.testing.assert_close(matrix, expected, rtol=1e-4, atol=0)
