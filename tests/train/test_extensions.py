"""Algorithms, callbacks and loggers by name: each does what it says, on real runs, and goes on
bit for bit when killed.
"""

from __future__ import annotations

import dataclasses
import gc
import json
import os
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import composer.algorithms
import composer.callbacks
import composer.loggers
import pytest
import torch
from composer.core import Algorithm, Callback, State
from composer.loggers import Logger, LoggerDestination

from flame_composer.checkpoint.content import needed_by
from flame_composer.checkpoint.find import find_newest
from flame_composer.checkpoint.read import Checkpoint
from flame_composer.checkpoint.to_model import load_from_checkpoint
from flame_composer.config.extensions import NEEDS_WHOLE_PARAMETERS, OFFERED, REFUSED, spelled_alike
from flame_composer.config.sections import ModelConfig
from flame_composer.config.train import TrainConfig
from flame_composer.errors import ConfigError, InvalidField
from flame_composer.model.build import load_pretrained
from flame_composer.model.hf_config import build_hf_config
from flame_composer.train.algorithms import EMA, SWA, Instant, LayerFreezing, SeqLengthWarmup
from flame_composer.train.callbacks import EarlyStopper, FileLogger, Generate, ScheduledGC
from flame_composer.train.extensions import arguments_of, build, build_extensions, find_class
from tests.conftest import CONTEXT_LENGTH, GLA, make_run
from tests.data_fixtures import byte_tokenizer
from tests.runs import Corpus, Ranks, Script, check, last_json, read_log, run_script

# A model with dropout, which draws random numbers at every step: what draws some beside it would be
# seen.
LLAMA = {
    "model_type": "llama",
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "attention_dropout": 0.2,
}
ALL: dict[str, dict[str, Any]] = {
    "algorithms": {
        "ema": {"half_life": "4ba", "ema_start": "3ba", "update_interval": "2ba"},
        "swa": {"swa_start": "0.5dur", "swa_end": "0.9dur", "update_interval": "3ba"},
        "label_smoothing": None,
        "seq_length_warmup": {"duration": 0.5, "min_seq_length": 16},
        "layer_freezing": {"freeze_start": 0.6, "freeze_level": 0.5},
    },
    "callbacks": {
        "speed_monitor": {"window_size": 2, "gpu_flops_available": 1e12},
        "lr_monitor": None,
        "optimizer_monitor": {"batch_log_interval": 1},
        "runtime_estimator": {"time_unit": "seconds"},
        "system_metrics_monitor": {},
        "free_outputs": None,
        "early_stopper": {"patience": "100ba"},
        "generate": {"prompts": ["ka", "lo mi"], "interval": "6ba", "max_new_tokens": 3},
        "hf_export": {"interval": "8ba", "dtype": "bfloat16"},
        "scheduled_gc": {"interval": "5ba"},
    },
    "loggers": {"file_logger": {"flush_interval": 1}},
}

# An epoch is 15 steps.
SHORT = ("max_duration=16ba", "save_interval=4ba", "eval_interval=8ba", "eval_data.max_rows=4")


def keys_of(sections: dict[str, dict[str, Any]]) -> list[str]:
    return [
        f"{section}.{name}={json.dumps(arguments)}"
        for section, given in sections.items()
        for name, arguments in given.items()
    ]


def test_every_name_of_composer_is_offered_or_refused_with_the_reason():
    kinds: Any = {
        "algorithms": (composer.algorithms, Algorithm),
        "callbacks": (composer.callbacks, Callback),
        "loggers": (composer.loggers, LoggerDestination),
    }
    for section, (module, kind) in kinds.items():
        theirs = {
            spelled_alike(name)
            for name in module.__all__
            if isinstance(getattr(module, name), type) and issubclass(getattr(module, name), kind)
        }
        ours = {
            spelled_alike(name) for names in (OFFERED[section], REFUSED[section]) for name in names
        }
        assert theirs - ours <= {"loggerdestination"}, "the base class"
        assert set(OFFERED[section]).isdisjoint(REFUSED[section])
        assert {spelled_alike(name) for name in REFUSED[section]} <= theirs, (
            "no reason for what does not exist"
        )
        assert all(issubclass(find_class(section, name), kind) for name in OFFERED[section])


def test_every_one_that_is_offered_is_run_below():
    assert {section: set(names) for section, names in ALL.items()} == {
        section: set(names) - {"memory_monitor", "mlflow_logger"}
        for section, names in OFFERED.items()
    }  # the one needs a GPU, the other a store: it has a test of its own


def test_what_is_named_is_built_unless_it_is_left_out(tmp_path):
    config = TrainConfig(
        "run",
        max_duration="9ba",
        global_batch_size=4,
        microbatch_size=4,
        tokenizer="t",
        log_folder=str(tmp_path),
        **ALL,
    )
    built = build_extensions(config)
    assert [[type(each) for each in objects] for objects in built] == [
        [find_class(section, name) for name in names] for section, names in ALL.items()
    ]
    nothing = {section: dict.fromkeys(names, False) for section, names in ALL.items()}
    assert build_extensions(dataclasses.replace(config, **nothing)) == ([], [], [])


@pytest.fixture(scope="module")
def everything(corpus: Corpus, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A run with all of them, and the file it was configured with."""
    run = tmp_path_factory.mktemp("runs") / "everything"
    file = corpus.yaml_with(LLAMA)
    corpus.train_run(run, file, *SHORT, *keys_of(ALL))
    return run, file


def test_metrics_reach_the_logger(everything: tuple[Path, str]) -> None:
    text = (everything[0] / "logs-rank0.txt").read_text()
    metrics = set(re.findall(r"^\[metric\]\[batch=\d+\]: (\S+):", text, re.MULTILINE))
    assert {
        "throughput/device/mfu",
        "throughput/tokens_per_sec",
        "lr-AdamW/group0",
        "l2_norm/grad/global",
        "time/remaining_estimate",
        "cpu_percentage",
        "seq_length_warmup/curr_seq_len",
        "layer_freezing/layers_frozen",
        "loss/train/total",
    } <= metrics
    assert len(re.findall("seq_length_warmup/curr_seq_len", text)) == 16


def test_samples_and_exports_are_written_when_they_are_due(
    everything: tuple[Path, str], tmp_path: Path
) -> None:
    run, _ = everything
    samples = [json.loads(line) for line in (run / "samples.jsonl").read_text().splitlines()]
    assert [(row["current_steps"], row["prompt"]) for row in samples] == [
        (step, prompt) for step in (6, 12, 16) for prompt in ("ka", "lo mi")
    ]
    assert all(isinstance(row["text"], str) for row in samples)
    assert sorted(path.name for path in (run / "hf").iterdir()) == ["ba16", "ba8"]
    exported = load_pretrained(str(run / "hf" / "ba16")).state_dict()
    newest = find_newest(str(run / "checkpoints"), run / "staging")
    assert newest is not None
    model, _ = load_from_checkpoint(newest)
    weights = torch.load(newest.file, weights_only=False)["state"]["model"]
    for name, tensor in model.state_dict().items():
        assert torch.equal(exported[name], tensor.bfloat16().float()), "both are the average"
    assert any(
        not torch.equal(weights[f"model.{name}"], tensor)
        for name, tensor in model.state_dict().items()
    )
    plain = tmp_path / "plain"
    check(
        run_script("convert/to_hf.py", f"checkpoint={newest.file}", f"out={plain}", "weights=model")
    )
    for name, tensor in load_pretrained(str(plain)).state_dict().items():
        assert torch.equal(weights[f"model.{name}"], tensor), "what training goes on with"


def test_a_run_with_all_of_them_that_was_killed_ends_bit_identical(
    everything: tuple[Path, str], corpus: Corpus, tmp_path: Path
) -> None:
    whole, file = everything
    run = tmp_path / "killed"
    for step in (5, 13):  # while rows grow; while SWA collects and layers freeze
        corpus.killed_run(run, file, *SHORT, *keys_of(ALL), after_step=step)
    corpus.train_run(run, file, *SHORT, *keys_of(ALL))
    assert_same_outcome(run, whole)


def assert_same_outcome(run: Path, whole: Path) -> None:
    """All that it logged, wrote and saved, bit for bit."""
    assert read_log(run) == read_log(whole)
    assert (run / "samples.jsonl").read_text() == (whole / "samples.jsonl").read_text()
    for path in sorted((whole / "hf").glob("*/model.safetensors")):
        assert path.read_bytes() == (run / "hf" / path.parent.name / path.name).read_bytes(), path
    ours, theirs = (
        torch.load(each / "checkpoints" / "ba16.pt", weights_only=False)["state"]
        for each in (run, whole)
    )
    averages = [dict(state["algorithms"])["EMA"]["average"] for state in (ours, theirs)]
    for mine, tensors in ((ours["model"], theirs["model"]), averages):
        assert list(mine) == list(tensors)
        assert [
            name for name, tensor in tensors.items() if not torch.equal(mine[name], tensor)
        ] == []


def test_with_blocks_recomputed_it_is_the_same_run(
    everything: tuple[Path, str], corpus: Corpus, tmp_path: Path
) -> None:
    """Killed as well: torch's wrapper of a block puts a name of its own into those of its
    parameters.
    """
    whole, file = everything
    run = tmp_path / "recomputed"
    keys = (file, *SHORT, *keys_of(ALL), "parallelism.activation_checkpointing=true")
    corpus.killed_run(run, *keys, after_step=13)
    corpus.train_run(run, *keys)
    assert_same_outcome(run, whole)
    folders = [tmp_path / f"{each.name}_exported" for each in (run, whole)]
    for each, folder in zip((run, whole), folders, strict=True):
        check(
            Script(
                "convert/to_hf.py",
                f"checkpoint={each / 'checkpoints'}",
                f"out={folder}",
                "weights=ema",
            ).wait()
        )
    exported = [(folder / "model.safetensors").read_bytes() for folder in folders]
    assert exported[0] == exported[1]


@pytest.mark.faults
@pytest.mark.skipif(
    "FLAME_COMPOSER_FAULTS" not in os.environ, reason="takes half a minute: make test-faults"
)
@pytest.mark.parametrize(
    ("ranks", "model", "keys"),
    [
        (2, "llama", ["microbatch_size=1", "parallelism.activation_checkpointing=true"]),
        (2, "gla", ["microbatch_size=1", "parallelism.activation_checkpointing=true"]),
        (1, "llama", ["microbatch_size=4"]),
        (1, "gla", ["parallelism.compile=true", "parallelism.activation_checkpointing=true"]),
        (
            2,
            "gla",
            [
                "parallelism.fsdp={}",
                "parallelism.cpu_fsdp=true",
                "microbatch_size=1",
                "parallelism.activation_checkpointing=true",
            ],
        ),
    ],
    ids=["ranks-llama", "ranks-gla", "microbatch", "compiled", "sharded"],
)
def test_all_of_them_however_it_is_computed(
    corpus: Corpus, tmp_path: Path, ranks: int, model: str, keys: list[str]
) -> None:
    """To fp32 rounding; 2e-7 was seen. Without dropout, which draws other numbers for other
    microbatches.
    """
    refused = NEEDS_WHOLE_PARAMETERS if "parallelism.fsdp={}" in keys else ()
    allowed = {
        section: {name: given[name] for name in given if name not in refused}
        for section, given in ALL.items()
    }
    file = (corpus.yaml_with(LLAMA | {"attention_dropout": 0.0}),) if model == "llama" else ()
    whole, run = tmp_path / "whole", tmp_path / "run"
    corpus.train_run(whole, *file, *SHORT, *keys_of(allowed))
    Ranks(ranks, *corpus.keys(run, *file, *SHORT, *keys_of(allowed), *keys)).finish()
    for ours, theirs in zip(read_log(run), read_log(whole), strict=True):
        for key in {"loss", "eval_loss", "grad_norm"} & set(theirs):
            assert ours[key] == pytest.approx(theirs[key], rel=1e-5), key


# What each does


PROMPTS = ["the", "a b c", "one"]


class Weights(Callback):
    """The weights after every step, and those that evaluation sees."""

    def __init__(self) -> None:
        self.after: list[dict[str, torch.Tensor]] = []
        self.evaluated: list[dict[str, torch.Tensor]] = []
        self.lengths: list[int] = []

    @staticmethod
    def of(state: State) -> dict[str, torch.Tensor]:
        return {name: value.detach().clone() for name, value in state.model.state_dict().items()}

    def batch_start(self, state: State, logger: Logger) -> None:
        self.lengths.append(state.batch["input_ids"].shape[1])

    def batch_checkpoint(self, state: State, logger: Logger) -> None:
        self.after.append(self.of(state))

    def eval_batch_start(self, state: State, logger: Logger) -> None:
        if state.eval_timestamp.batch.value == 0:
            self.evaluated.append(self.of(state))


def run_with(
    folder: Path, dataset: Path, eval_dataset: Path, *algorithms: Algorithm, **options: Any
) -> tuple[Any, Weights]:
    weights = Weights()
    run = make_run(
        folder,
        dataset,
        eval_dataset,
        algorithms=algorithms,
        watchers=(weights, *options.pop("watchers", ())),
        schedule="constant",
        **options,
    )
    run.trainer.fit()
    run.trainer.close()
    return run, weights


def assert_close(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    for name, tensor in theirs.items():
        torch.testing.assert_close(ours[name], tensor, rtol=1e-5, atol=1e-7)


def test_ema_is_evaluated_and_exported_in_place_of_the_weights(dataset, eval_dataset, tmp_path):
    ema, generate = (
        EMA(half_life="2ba", ema_start="2ba"),
        Generate(tmp_path, PROMPTS, "5ba", 12, temperature=0.0),
    )
    run, seen = run_with(
        tmp_path, dataset, eval_dataset, ema, total=5, eval_interval=1, watchers=(generate,), lr=0.3
    )
    expected = seen.after[1]
    for weights in seen.after[2:]:
        expected = {
            name: value + (weights[name] - value) * (1 - 2**-0.5)
            for name, value in expected.items()
        }
    assert_close(seen.evaluated[-1], expected)
    assert_close(seen.evaluated[0], seen.after[0])  # before it starts
    assert any(
        not torch.equal(seen.after[-1][name], value) for name, value in seen.evaluated[-1].items()
    )
    place = run.checkpoints / "ba5.pt"
    model, _ = load_from_checkpoint(Checkpoint(str(place), place))
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, seen.evaluated[-1][f"model.{name}"]), name
    assert_close({f"model.{name}": value for name, value in run.weights.items()}, seen.after[-1])
    samples = [
        json.loads(line)["text"] for line in (tmp_path / "samples.jsonl").read_text().splitlines()
    ]
    tokenizer = run.trainer.state.model.tokenizer
    assert samples == [generate._continued(prompt, model, tokenizer) for prompt in PROMPTS]
    assert samples != [
        generate._continued(prompt, run.trainer.state.model.model, tokenizer) for prompt in PROMPTS
    ]


def test_swa_puts_the_mean_of_the_weights_in_their_place(dataset, eval_dataset, tmp_path):
    _, seen = run_with(
        tmp_path, dataset, eval_dataset, SWA("2ba", "4ba", "1ba"), total=5, eval_interval=9
    )
    plain_folder = tmp_path / "plain"
    plain_folder.mkdir()
    _, plain = run_with(plain_folder, dataset, eval_dataset, total=5, eval_interval=9)
    mean = {
        name: torch.stack([weights[name] for weights in plain.after[1:4]]).mean(dim=0)
        for name in plain.after[0]
    }
    assert_close(seen.after[3], mean)
    assert_close(seen.after[2], plain.after[2])
    assert any(
        not torch.equal(seen.after[4][name], value) for name, value in seen.after[3].items()
    ), "training goes on"


def test_frozen_layers_stay_as_they_are_and_others_do_not(dataset, eval_dataset, tmp_path):
    _, seen = run_with(
        tmp_path, dataset, eval_dataset, LayerFreezing(0.4, 0.5), total=5, eval_interval=9
    )
    moved = [
        {name for name, value in after.items() if not torch.equal(value, before[name])}
        for before, after in zip(seen.after, seen.after[1:], strict=False)
    ]
    assert set(seen.after[0]) == moved[0] == moved[1]
    assert moved[3] < moved[2] < moved[1], "more and more"
    assert "model.model.embeddings.weight" not in moved[2]
    assert "model.lm_head.weight" in moved[3]


def test_a_run_that_was_frozen_once_goes_on_from_its_checkpoints(
    dataset, eval_dataset, tmp_path, caplog
):
    """Its weights have unequal steps for good, also when nothing is frozen any more."""
    for name in ("frozen", "not"):
        (tmp_path / name).mkdir()
    frozen, _ = run_with(
        tmp_path / "frozen", dataset, eval_dataset, LayerFreezing(0.4, 0.5), total=4
    )
    load_path = frozen.checkpoints / "ba4.pt"
    later = make_run(
        tmp_path / "not", dataset, eval_dataset, total=6, schedule="constant", load_path=load_path
    )
    later.trainer.fit()
    later.trainer.close()
    hf_config = build_hf_config(GLA, byte_tokenizer(), CONTEXT_LENGTH)
    needed = needed_by(TrainConfig(model=ModelConfig(config=GLA)), hf_config)
    steps = {
        float(state["step"])
        for state in torch.load(later.checkpoints / "ba6.pt", weights_only=False)["state"][
            "optimizers"
        ]["AdamW"]["state"].values()
    }
    assert len(steps) > 1
    found = find_newest(str(later.checkpoints), tmp_path / "staging", lambda: needed)
    assert found is not None
    assert found.file == later.checkpoints / "ba6.pt"
    assert "not a checkpoint" not in caplog.text


def test_rows_grow_to_their_full_length(dataset, eval_dataset, tmp_path):
    _, seen = run_with(
        tmp_path, dataset, eval_dataset, SeqLengthWarmup(32, 0.5, 8, 8), total=8, eval_interval=9
    )
    assert seen.lengths == [8, 8, 16, 24, 32, 32, 32, 32]
    warmup = SeqLengthWarmup(2048, duration=0.3, min_seq_length=10, step_size=1000)
    lengths = [warmup.length(batch, 100) for batch in range(100)]
    assert lengths == sorted(lengths)
    assert (lengths[0], lengths[29], lengths[30], lengths[99]) == (10, 1010, 2048, 2048)


class Losses(Callback):
    """Sets what evaluation finds."""

    def __init__(self, *losses: float):
        self.losses = list(losses)

    def eval_end(self, state: State, logger: Logger) -> None:
        state.eval_metric_values["LanguageCrossEntropy"] = torch.tensor(self.losses.pop(0))


def test_a_run_that_does_not_get_better_is_ended_and_stays_so(
    dataset, eval_dataset, tmp_path, capfd
):
    def started(stopper: EarlyStopper, *losses: float, load_path: Path | None = None) -> Any:
        return make_run(
            tmp_path,
            dataset,
            eval_dataset,
            total=8,
            eval_interval=1,
            schedule="constant",
            watchers=(Losses(*losses), stopper),
            load_path=load_path,
        )

    run = started(EarlyStopper("2ba", min_delta=0.1), 5.0, 4.0, 3.95, 3.9)
    with pytest.raises(IndexError):
        run.trainer.fit()  # the losses run out: as if it had been killed
    run.trainer.close()
    stopper = EarlyStopper("2ba", min_delta=0.1)
    run = started(stopper, 3.91, 4.0, 4.0, load_path=tmp_path / "checkpoints/ba4.pt")
    assert (stopper.best, stopper.best_batch) == (4.0, 2)
    run.trainer.fit()
    run.trainer.close()
    assert run.trainer.state.timestamp.batch == 5
    said = [line for line in capfd.readouterr().out.splitlines() if "early_stopper" in line]
    assert said == [
        "step 5: eval loss 3.9100; it was 4.0000 at step 2 and has not fallen by more than 0.1 "
        "since: the run ends (callbacks.early_stopper)"
    ]
    again = started(EarlyStopper("2ba", min_delta=0.1), load_path=tmp_path / "checkpoints/ba5.pt")
    assert again.trainer.state.timestamp >= again.trainer.state.max_duration


def test_garbage_is_collected_on_schedule_only(dataset, eval_dataset, tmp_path):
    class Enabled(Callback):
        seen: list[bool] = []

        def batch_start(self, state: State, logger: Logger) -> None:
            self.seen.append(gc.isenabled())

    collected = []
    note = lambda phase, info: collected.append(phase)  # noqa: E731
    gc.callbacks.append(note)
    try:
        run_with(
            tmp_path,
            dataset,
            eval_dataset,
            total=4,
            eval_interval=9,
            watchers=(ScheduledGC("2ba"), Enabled()),
        )
    finally:
        gc.callbacks.remove(note)
    assert Enabled.seen == [False] * 4
    assert gc.isenabled()
    assert collected.count("start") >= 3, "at the start and after steps 2 and 4"


@pytest.mark.faults
@pytest.mark.skipif(
    "FLAME_COMPOSER_FAULTS" not in os.environ, reason="takes half a minute: make test-faults"
)
def test_an_average_goes_on_with_another_number_of_ranks(corpus: Corpus, tmp_path: Path) -> None:
    whole, run = tmp_path / "whole", tmp_path / "ranks"
    keys = (
        "max_duration=12ba",
        "save_interval=1ba",
        "optimizer.eps=1e-5",
        "microbatch_size=1",
        *keys_of(
            {
                "algorithms": {
                    "ema": {"half_life": "2ba", "ema_start": "2ba"},
                    "layer_freezing": {"freeze_start": 0.3},
                }
            }
        ),
    )
    last_json(Script("recipes/train.py", *corpus.keys(whole, *keys)).wait())
    Ranks(2, *corpus.keys(run, *keys)).kill_after(run / "train_log.jsonl", 5)
    check(Script("recipes/train.py", *corpus.keys(run, *keys)).wait())
    for ours, theirs in zip(read_log(run), read_log(whole), strict=True):
        for key in {"loss", "eval_loss"} & set(theirs):
            assert ours[key] == pytest.approx(theirs[key], rel=1e-5)
    averages = [
        dict(torch.load(each / "checkpoints/ba12.pt", weights_only=False)["state"]["algorithms"])[
            "EMA"
        ]["average"]
        for each in (run, whole)
    ]
    for name, tensor in averages[1].items():
        torch.testing.assert_close(averages[0][name], tensor, rtol=1e-3, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="it logs a GPU's memory")
def test_memory_of_a_gpu_is_logged(corpus: Corpus, tmp_path: Path) -> None:
    run = tmp_path / "run"
    corpus.train_run(
        run,
        "max_duration=2ba",
        *keys_of({"callbacks": {"memory_monitor": None}, "loggers": ALL["loggers"]}),
    )
    assert "memory/peak_allocated_mem" in (run / "logs-rank0.txt").read_text()


def test_a_log_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    logger = FileLogger(tmp_path / "file" / "log")
    state: Any = SimpleNamespace(run_name="run")
    none: Any = None
    with pytest.raises(
        ConfigError,
        match=r"logs-rank0.txt: cannot be written to: Not a directory; set log_folder, or ",
    ):
        logger.init(state, none)


# Arguments

RUN = {"log_folder": Path("log"), "context_length": 64}
Plain = int | float | str | list | dict
WRONG: list[tuple[str, dict[str, Any], str, str]] = [
    (
        "algorithms.ema",
        {"halflife": "9ba"},
        "algorithms.ema.halflife",
        "unknown argument of EMA; did you mean algorithms.ema.half_life?",
    ),
    (
        "algorithms.ema",
        {"smoothing": 0.9},
        "algorithms.ema.smoothing",
        "unknown argument of EMA; its arguments are half_life, ema_start, update_interval",
    ),
    (
        "algorithms.ema",
        {"half_life": 9},
        "algorithms.ema.half_life",
        "must be str; quote what is text",
    ),
    ("algorithms.ema", {"half_life": None}, "algorithms.ema.half_life", "must be str"),
    (
        "algorithms.ema",
        {"half_life": "1ep"},
        "algorithms.ema",
        "EMA refuses it: half_life=1ep: must be a whole number of batches, e.g. 100ba",
    ),
    (
        "algorithms.ema",
        {"half_life": "0ba"},
        "algorithms.ema",
        "EMA refuses it: half_life=0ba: must be a whole number of batches, e.g. 100ba",
    ),
    (
        "algorithms.ema",
        {"ema_start": "1.5dur"},
        "algorithms.ema",
        (
            "EMA refuses it: ema_start=1.5dur: must be batches, e.g. 100ba, or a fraction of the"
            " run, e.g. 0.5dur"
        ),
    ),
    (
        "algorithms.swa",
        {"swa_start": "0.9dur", "swa_end": "0.8dur"},
        "algorithms.swa",
        "SWA refuses it: swa_end=0.8dur: must be after swa_start=0.9dur, both in ba or both in dur",
    ),
    (
        "algorithms.swa",
        {"swa_start": "5ba"},
        "algorithms.swa",
        "SWA refuses it: swa_end=0.97dur: must be after swa_start=5ba, both in ba or both in dur",
    ),
    (
        "algorithms.label_smoothing",
        {"smoothing": True},
        "algorithms.label_smoothing.smoothing",
        "must be float",
    ),
    (
        "algorithms.label_smoothing",
        {"smoothing": 1},
        "algorithms.label_smoothing",
        "LabelSmoothing refuses it: smoothing=1: must be more than 0 and less than 1",
    ),
    (
        "algorithms.seq_length_warmup",
        {"min_seq_length": 64},
        "algorithms.seq_length_warmup",
        "SeqLengthWarmup refuses it: min_seq_length=64: must be in [2, context_length=64)",
    ),
    (
        "algorithms.seq_length_warmup",
        {"context_length": 9},
        "algorithms.seq_length_warmup.context_length",
        (
            "unknown argument of SeqLengthWarmup; did you mean"
            " algorithms.seq_length_warmup.min_seq_length?"
        ),
    ),
    (
        "loggers.file_logger",
        {"log_folder": "x"},
        "loggers.file_logger.log_folder",
        "unknown argument of FileLogger; its arguments are filename, flush_interval",
    ),
    (
        "algorithms.layer_freezing",
        {"freeze_start": 1.0},
        "algorithms.layer_freezing",
        (
            "LayerFreezing refuses it: freeze_start=1.0, freeze_level=1.0: must be in [0, 1) and"
            " (0, 1]"
        ),
    ),
    (
        "callbacks.speed_monitor",
        {"window_size": 0},
        "callbacks.speed_monitor.window_size",
        "must be 1 or more, and finite",
    ),
    (
        "callbacks.speed_monitor",
        {"window_size": 2.5},
        "callbacks.speed_monitor.window_size",
        "must be int",
    ),
    (
        "callbacks.speed_monitor",
        {"gpu_flops_available": "x"},
        "callbacks.speed_monitor.gpu_flops_available",
        "must be float | int | null",
    ),
    (
        "callbacks.speed_monitor",
        {"time_unit": "s"},
        "callbacks.speed_monitor",
        (
            'SpeedMonitor refuses it: Invalid time_unit: s. Must be one of "seconds", "minutes",'
            ' "hours", or "days"'
        ),
    ),
    (
        "callbacks.lr_monitor",
        {"x": 1},
        "callbacks.lr_monitor.x",
        "unknown argument of LRMonitor; it takes none",
    ),
    (
        "callbacks.optimizer_monitor",
        {"batch_log_interval": 0},
        "callbacks.optimizer_monitor.batch_log_interval",
        "must be 1 or more, and finite",
    ),
    (
        "callbacks.runtime_estimator",
        {"skip_batches": -1},
        "callbacks.runtime_estimator.skip_batches",
        "must be 0 or more, and finite",
    ),
    (
        "callbacks.memory_monitor",
        {"memory_keys": {"a": 1}},
        "callbacks.memory_monitor.memory_keys",
        "must be dict[str, str] | null",
    ),
    ("callbacks.early_stopper", {}, "callbacks.early_stopper.patience", "must be set: str"),
    (
        "callbacks.early_stopper",
        {"patience": "5ba", "min_delta": -0.1},
        "callbacks.early_stopper.min_delta",
        "must be 0 or more, and finite",
    ),
    ("callbacks.generate", {"prompts": "x"}, "callbacks.generate.prompts", "must be list[str]"),
    ("callbacks.generate", {"prompts": [1]}, "callbacks.generate.prompts", "must be list[str]"),
    (
        "callbacks.generate",
        {"prompts": []},
        "callbacks.generate",
        "Generate refuses it: prompts: must be one or more, and none of them empty",
    ),
    (
        "callbacks.generate",
        {"prompts": ["a"], "top_p": 1.5},
        "callbacks.generate",
        (
            "Generate refuses it: max_new_tokens must be 1 or more, temperature 0 or more, top_p in"
            " (0, 1]"
        ),
    ),
    (
        "callbacks.hf_export",
        {"dtype": "int8"},
        "callbacks.hf_export.dtype",
        "must be one of float32, bfloat16, float16",
    ),
    (
        "callbacks.hf_export",
        {"folder": "s3://b/hf"},
        "callbacks.hf_export",
        "HfExport refuses it: folder=s3://b/hf: must be a local folder",
    ),
    (
        "callbacks.scheduled_gc",
        {"interval": "5min"},
        "callbacks.scheduled_gc",
        "ScheduledGC refuses it: interval=5min: must be a whole number of batches, e.g. 100ba",
    ),
    (
        "loggers.file_logger",
        {"filename": "log.txt"},
        "loggers.file_logger",
        (
            "FileLogger refuses it: filename=log.txt: must hold {rank}, or ranks would write over"
            " one another"
        ),
    ),
    *(
        (
            "loggers.file_logger",
            {"filename": name},
            "loggers.file_logger",
            f"FileLogger refuses it: filename={name}: must lie within log_folder",
        )
        for name in ("/etc/{rank}", "../x{rank}")
    ),
    (
        "loggers.file_logger",
        {"flush_interval": 0},
        "loggers.file_logger",
        "FileLogger refuses it: flush_interval=0: must be 1 or more batches",
    ),
]


@pytest.mark.parametrize(
    ("name", "arguments", "key", "rule"), WRONG, ids=lambda value: str(value)[:40]
)
def test_arguments_that_do_not_fit(name, arguments, key, rule):
    with pytest.raises(InvalidField) as caught:
        build(*name.split("."), arguments, RUN)
    assert (caught.value.name, caught.value.rule) == (key, rule)


@pytest.mark.parametrize(
    ("section", "name"), [(section, name) for section, names in OFFERED.items() for name in names]
)
def test_every_argument_has_a_type_that_a_configuration_can_hold(section, name):
    for argument, parameter in arguments_of(find_class(section, name)).items():
        assert parameter.annotation is not Any, argument


def test_mlflow_has_one_run_of_a_killed_one(
    corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mlflow = pytest.importorskip("mlflow")
    store, run = f"file:{tmp_path}/mlruns", tmp_path / "killed"
    keys = (
        "max_duration=9ba",
        "save_interval=3ba",
        f"loggers.mlflow_logger={{tracking_uri: '{store}'}}",
    )
    env = {"MLFLOW_ALLOW_FILE_STORE": "true"}
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    client = mlflow.MlflowClient(store)

    def only_run() -> Any:
        (experiment,) = client.search_experiments(filter_string="name = 'flame_composer'")
        (found,) = client.search_runs([experiment.experiment_id])
        return found

    corpus.killed_run(run, *keys, after_step=4, env=env)
    assert corpus.stopped_run(run, *keys, after_step=6, env=env).returncode == 143
    assert only_run().info.status == "KILLED"
    corpus.train_run(run, *keys, env=env)
    found = only_run()
    assert (found.info.run_name, found.info.status) == ("killed", "FINISHED")
    assert found.data.params["global_batch_size"] == "4"
    losses = {
        metric.step: metric.value
        for metric in client.get_metric_history(found.info.run_id, "loss/train/total")
    }
    assert losses == pytest.approx(
        {row["current_steps"] - 1: row["loss"] for row in read_log(run)}, rel=1e-6
    )


def test_mlflow_that_cannot_be_reached(corpus: Corpus, tmp_path: Path) -> None:
    for uri, what in (
        ("http://127.0.0.1:9", "MLFlowLogger refuses it: http://127.0.0.1:9: API request to "),
        (
            "http://me:secret@127.0.0.1:9",
            "MLFlowLogger refuses it: tracking_uri: must hold no password; set MLFLOW_TRACKING_",
        ),
    ):
        keys = corpus.keys(tmp_path / "run", f"loggers.mlflow_logger={{tracking_uri: '{uri}'}}")
        failed = Script("recipes/train.py", *keys).wait()
        assert (failed.returncode, failed.stderr.count("\n")) == (2, 1), failed.stderr
        assert what in failed.stderr
        assert "secret" not in failed.stderr + failed.stdout


OTHER: dict[str, dict[str, dict[str, Any]]] = {
    "algorithms": {
        "ema": {"half_life": "4ba", "ema_start": "3ba", "update_interval": "2ba"},
        "swa": {"swa_start": "0.5dur", "swa_end": "0.9dur", "update_interval": "3ba"},
        "label_smoothing": {"smoothing": 0.2},
        "layer_freezing": {"freeze_start": 0.6, "freeze_level": 0.5},
        "seq_length_warmup": {"duration": 0.5, "min_seq_length": 16, "step_size": 4},
    },
    "callbacks": {
        "speed_monitor": {"window_size": 2, "gpu_flops_available": 1e12, "time_unit": "seconds"},
        "lr_monitor": {},
        "memory_monitor": {
            "memory_keys": {"allocated_bytes.all.current": "now"},
            "dist_aggregate_batch_interval": 3,
        },
        "optimizer_monitor": {"log_optimizer_metrics": False, "batch_log_interval": 1},
        "free_outputs": {},
        "runtime_estimator": {"skip_batches": 3, "time_unit": "seconds"},
        "system_metrics_monitor": {"log_all_data": True},
        "early_stopper": {"patience": "100ba", "min_delta": 0.5},
        "scheduled_gc": {"interval": "5ba"},
        "generate": {
            "prompts": ["a"],
            "interval": "6ba",
            "max_new_tokens": 3,
            "temperature": 0.5,
            "top_p": 0.5,
        },
        "hf_export": {"folder": "elsewhere", "interval": "8ba", "dtype": "bfloat16"},
    },
    "loggers": {
        "file_logger": {"filename": "log{rank}", "flush_interval": 1},
        "mlflow_logger": {
            "experiment_name": "e",
            "tracking_uri": "its own folder",
            "run_name": "r",
            "run_group": "g",
            "ignore_metrics": ["*"],
        },
    },
}


@pytest.mark.parametrize(
    ("section", "name"), [(section, name) for section, names in OFFERED.items() for name in names]
)
def test_every_argument_reaches_what_it_is_given_to(section, name, tmp_path, monkeypatch):
    """What the classes make of them is theirs (Composer's), or tested above."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")

    def settings(**arguments: Any) -> dict[str, Any]:
        made = build(section, name, arguments, RUN)
        values = {
            attribute: getattr(value, "maxlen", value)
            for attribute, value in vars(made).items()
            if not attribute.startswith("_last")
        }  # times
        return {
            attribute: value
            for attribute, value in values.items()
            if isinstance(value, Plain | Path | Instant)
        }

    known, given = arguments_of(find_class(section, name)), dict(OTHER[section][name])
    if name == "mlflow_logger":
        given["tracking_uri"] = (tmp_path / "elsewhere").as_uri()
    assert list(given) == list(known)
    needed = {
        each: ["x"] if each == "prompts" else "9ba"
        for each, parameter in known.items()
        if parameter.default is parameter.empty
    }
    # Else it goes on with the last that it was given, and all others seem to have an effect
    if name == "mlflow_logger":
        needed["tracking_uri"] = (tmp_path / "here").as_uri()
    plain = settings(**needed)
    assert settings(**needed) == plain
    for argument, value in given.items():
        assert settings(**{**needed, argument: value}) != plain, argument
