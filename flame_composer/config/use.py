"""Configurations of evaluate, generate, predict, chat and report.py: keys, defaults, rules."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, field
from typing import Literal

from omegaconf import MISSING

from flame_composer.config.data import EvalDataConfig, PlaceConfig
from flame_composer.config.rules import (
    ScriptConfig,
    require,
    require_png,
    require_seed,
    require_text,
)
from flame_composer.config.sections import require_tasks
from flame_composer.config.suites import STEREOSET, tasks_of


@dataclass
class EvaluateConfig(ScriptConfig):
    """Evaluate a model: its loss and perplexity on datasets, and its scores in tasks."""

    paths = ("model", "base", "tokenizer", "plot", "task_path", "data_root")

    model: str = MISSING
    """Hugging Face folder or id, a folder of an adapter in peft's layout, or a checkpoint file or a
    folder of checkpoints, of which the newest is taken; local or in an object store.
    """
    base: str | None = None
    """Hugging Face folder or id of the model that an adapter was trained on, if it is not where it
    was in training.
    """
    quantize: Literal["int8", "bf16"] | None = None
    """Type that the weights are turned into, on a CPU: int8 (with a scale for each output channel)
    or bf16; none if not set.
    """
    data: EvalDataConfig | None = None
    """Dataset to take loss and perplexity on."""
    datasets: dict[str, EvalDataConfig] = field(default_factory=dict)
    """Several datasets instead of one, under names that you choose: datasets.web.local=...
    datasets.code.remote=...
    """
    tokenizer: str | None = None
    """Tokenizer folder or id; the model's own tokenizer if not set."""
    batch_size: int = 8
    """Rows per forward pass."""
    precision: Literal["fp32", "amp_bf16", "amp_fp16"] = "fp32"
    """Arithmetic of the forward pass; on CPUs as in training."""
    varlen: bool = True
    """Start attention state anew at every document of a dataset."""
    block_size: int | None = None
    """Number of positions per block in a table of perplexity by the length of the context; no such
    table if not set.
    """
    plot: str | None = None
    """PNG file for a chart of perplexity over the length of the context."""
    tasks: list[str] = field(default_factory=list)
    """Tasks, groups or tags of lm-evaluation-harness (extra eval), e.g. [piqa,lambada_openai]."""
    suite: Literal["base", "chinese", "bias"] | None = None
    """Benchmarks that people quote together, each with its usual number of examples, beside tasks:
    base (MMLU, HellaSwag, PIQA, WinoGrande, ARC, LAMBADA), chinese (C-Eval, CMMLU) or bias (BBQ,
    CrowS-Pairs, StereoSet).
    """
    data_root: str | None = None
    """Folder from which all tasks' data is read instead of the Hugging Face hub, laid out as
    docs/benchmarks_data.md says; no network is used.
    """
    task_path: str | None = None
    """Folder of your own tasks, YAML files in the harness's form; they take precedence over the
    harness's tasks of the same name.
    """
    task_code: bool = False
    """Run the Python functions that task files in task_path name with !function."""
    num_fewshot: int | None = None
    """Number of examples shown before each question; each task's or suite's own number if not set.
    """
    task_limit: int | None = None
    """Number of documents to take from the beginning of each task; all if not set."""
    max_length: int | None = None
    """Largest number of tokens in a task's question and answer; the model's
    max_position_embeddings if not set.
    """
    add_bos: bool | None = None
    """Begin the texts of tasks with the tokenizer's bos token; if not set, they begin as documents
    did in training.
    """
    apply_chat_template: bool = False
    """Ask the questions of tasks in conversations, written by the tokenizer's chat template."""
    fewshot_as_multiturn: bool = True
    """With apply_chat_template, show the examples before a question as turns of the conversation;
    false puts all of them into the turn of the question.
    """
    system_instruction: str | None = None
    """Text that comes before each question of a task, in conversations as the system's message."""

    def validate(self) -> None:
        require_text(self, "model", "base", "tokenizer", "plot", "data_root")
        require(self.batch_size > 0, "batch_size", "must be a positive number of rows")
        require(
            self.data is not None or bool(self.datasets) or self.has_tasks,
            "data",
            "must be set (data.local=...), or tasks, or suite",
        )
        require(
            self.data is None or not self.datasets,
            "data",
            "must be null with datasets, which each have their own",
        )
        places = [data.address for data in self.datasets.values()]
        require(len(set(places)) == len(places), "datasets", "must all be different ones")
        require(
            self.block_size is None or self.block_size > 0,
            "block_size",
            "must be a positive number of tokens, or null",
        )
        require(
            self.block_size is None or bool(self.data or self.datasets),
            "block_size",
            "needs data.local=... or datasets",
        )
        require_png(self.plot, "plot")
        require(
            self.plot is None or self.block_size is not None,
            "block_size",
            "must be set together with plot",
        )
        require_tasks(self, suite=self.suite)
        self._check_tasks()
        require(
            self.max_length is None or self.max_length > 1,
            "max_length",
            "must be 2 tokens or more, or null",
        )

    @property
    def has_tasks(self) -> bool:
        """Whether there is a suite, or there are tasks."""
        return bool(self.tasks or self.suite)

    def _check_tasks(self) -> None:
        require(self.data_root is None or self.has_tasks, "data_root", "needs tasks or suite")
        require(
            self.data_root is None or "://" not in self.data_root,
            "data_root",
            "must be a local folder",
        )
        require(
            self.data_root is None or os.path.isdir(self.data_root),
            "data_root",
            "no such folder; make it, with a folder for each dataset, as docs/benchmarks_data.md"
            " says",
        )
        require(
            self.task_path is None or self.has_tasks,
            "tasks",
            "must be set together with task_path, or suite",
        )
        require(
            self.add_bos is None or self.has_tasks,
            "tasks",
            "must be set with add_bos, or suite",
        )
        rule = "needs tasks or suite"
        require(not self.apply_chat_template or self.has_tasks, "apply_chat_template", rule)
        require(self.system_instruction is None or self.has_tasks, "system_instruction", rule)
        require(
            self.add_bos is None or not self.apply_chat_template,
            "add_bos",
            "must be null with apply_chat_template, which decides what texts begin with",
        )
        names = [*self.tasks, *tasks_of(self.suite)]
        require(
            STEREOSET not in names or not (self.apply_chat_template or self.system_instruction),
            "apply_chat_template" if self.apply_chat_template else "system_instruction",
            "must not be set with stereoset, whose sentences are no answers; name other tasks with"
            " tasks=[...]",
        )
        require(
            self.fewshot_as_multiturn or self.apply_chat_template,
            "fewshot_as_multiturn",
            "must be true without apply_chat_template",
        )
        require(
            self.task_limit is None or self.task_limit > 0,
            "task_limit",
            "must be a positive number, or null",
        )


@dataclass
class GenerateConfig(ScriptConfig):
    """Continue a prompt, every prompt of a file, or what is typed."""

    paths = ("model", "base", "prompts")

    model: str = MISSING
    """Hugging Face folder or id, a folder of an adapter in peft's layout, or a checkpoint file or a
    folder of checkpoints, of which the newest is taken; local or in an object store.
    """
    base: str | None = None
    """Hugging Face folder or id of the model that an adapter was trained on, if it is not where it
    was in training.
    """
    quantize: Literal["int8", "bf16"] | None = None
    """Type that the weights are turned into, on a CPU: int8 (with a scale for each output channel)
    or bf16; none if not set.
    """
    prompt: str | None = None
    """Text to continue. If neither it nor prompts is set, lines that are typed or piped in are
    continued one by one, until Ctrl-D.
    """
    prompts: str | None = None
    """File of prompts, one per line (empty lines are left out), or .jsonl with a key prompt. The
    results are written as JSON lines.
    """
    batch_size: int = 8
    """Number of the file's prompts that are continued together."""
    max_new_tokens: int = 128
    """Largest number of tokens to generate."""
    temperature: float = 0.8
    """Temperature of the sampling; 0 always takes the likeliest token."""
    top_p: float = 0.95
    """Total probability of the likeliest tokens, from which the next one is sampled."""
    top_k: int = 0
    """Number of likeliest tokens from which the next one is sampled; 0 for no such limit."""
    repetition_penalty: float = 1.0
    """Factor by which tokens that the prompt or the continuation already has become less likely,
    e.g. 1.2; 1 for no difference.
    """
    stop: list[str] = field(default_factory=list)
    """Texts that end a continuation, after the token that completes one of them."""
    seed: int = 42
    """Seed of the sampling."""
    add_bos: bool | None = None
    """Begin each prompt with the tokenizer's bos token; if not set, prompts begin as documents did
    in training.
    """

    def validate(self) -> None:
        require_text(self, "model", "base", "prompts")
        require_seed(self.seed, "seed")
        require(
            self.prompt is None or self.prompts is None,
            "prompts",
            "must not be set together with prompt",
        )
        require(self.batch_size > 0, "batch_size", "must be a positive number of prompts")
        require(
            0 < self.repetition_penalty < math.inf,
            "repetition_penalty",
            "must be more than 0, and finite",
        )
        require("" not in self.stop, "stop", "must not hold an empty text")
        require_sampling(self)


@dataclass
class PredictConfig(ScriptConfig):
    """Have a model answer the examples of a tuning dataset, and score the answers."""

    paths = ("model", "out")
    goes_on = True

    model: str = MISSING
    """Hugging Face folder or id, or a checkpoint file or a folder of checkpoints, of which the
    newest is taken; local or in an object store.
    """
    quantize: Literal["int8", "bf16"] | None = None
    """Type that the weights are turned into, on a CPU: int8 (with a scale for each output channel)
    or bf16; none if not set.
    """
    data: PlaceConfig = field(default_factory=PlaceConfig)
    """Tuning dataset with the examples to answer, e.g. its held-out split."""
    out: str = MISSING
    """Folder for predictions.jsonl and metrics.json. If it holds part of them, the same command
    goes on from there.
    """
    turns: Literal["last", "all"] = "last"
    """Turns of an example to answer: the last one that the loss was taken on in training, or all of
    them, each after the true answers before it.
    """
    batch_size: int = 8
    """Number of prompts that are answered together."""
    max_new_tokens: int = 512
    """Largest number of tokens of an answer."""
    temperature: float = 0.0
    """Temperature of the sampling; 0 always takes the likeliest token."""
    top_p: float = 0.95
    """Total probability of the likeliest tokens, from which the next one is sampled."""
    top_k: int = 0
    """Number of likeliest tokens from which the next one is sampled; 0 for no such limit."""
    max_examples: int | None = None
    """Number of answers to write, from the beginning of the dataset; all if not set."""
    seed: int = 42
    """Seed of the sampling."""

    def validate(self) -> None:
        require_text(self, "model", "out")
        require("://" not in self.out, "out", "must be a local folder")
        require_seed(self.seed, "seed")
        require(self.batch_size > 0, "batch_size", "must be a positive number of prompts")
        require_sampling(self)
        require(
            self.max_examples is None or self.max_examples > 0,
            "max_examples",
            "must be a positive number of answers, or null",
        )


@dataclass
class ChatConfig(ScriptConfig):
    """Hold a conversation with a model in the terminal."""

    paths = ("model", "base")

    model: str = MISSING
    """Hugging Face folder or id, a folder of an adapter in peft's layout, or a checkpoint file or a
    folder of checkpoints, of which the newest is taken; local or in an object store. Its tokenizer
    must have a chat template.
    """
    base: str | None = None
    """Hugging Face folder or id of the model that an adapter was trained on, if it is not where it
    was in training.
    """
    system: str | None = None
    """System prompt; the template's own, if it has one, if not set."""
    max_new_tokens: int = 512
    """Largest number of tokens of an answer."""
    temperature: float = 0.8
    """Temperature of the sampling; 0 always takes the likeliest token."""
    top_p: float = 0.95
    """Total probability of the likeliest tokens, from which the next one is sampled."""
    top_k: int = 0
    """Number of likeliest tokens from which the next one is sampled; 0 for no such limit."""
    repetition_penalty: float = 1.0
    """Factor by which tokens that the conversation already has become less likely, e.g. 1.2; 1 for
    no difference.
    """
    seed: int = 42
    """Seed of the sampling."""

    def validate(self) -> None:
        require_text(self, "model", "base")
        require(self.system != "", "system", "must not be empty; null is for none")
        require_seed(self.seed, "seed")
        require(
            0 < self.repetition_penalty < math.inf,
            "repetition_penalty",
            "must be more than 0, and finite",
        )
        require_sampling(self)


def require_sampling(config: GenerateConfig | PredictConfig | ChatConfig) -> None:
    """Raise InvalidField for a bad `max_new_tokens`, `temperature`, `top_p` or `top_k`."""
    require(config.max_new_tokens > 0, "max_new_tokens", "must be more than 0")
    require(0 <= config.temperature < math.inf, "temperature", "must be 0 or more, and finite")
    require(0 < config.top_p <= 1, "top_p", "must be in (0, 1]")
    require(config.top_k >= 0, "top_k", "must be 0 or more")


@dataclass
class ReportConfig(ScriptConfig):
    """Draw charts of one or more runs, as a self-contained HTML page and as PNGs."""

    paths = ("runs", "out")
    positional = "runs"
    runs: list[str] = field(default_factory=list)
    """Log folders of runs, like runs/NAME, or the logs in them."""
    out: str | None = None
    """Folder for report.html and the PNGs; report/ in the first run's folder if not set."""
    smooth: int = 1
    """Number of steps over which loss, perplexity, gradient norm and throughput are averaged; 1
    shows every step.
    """

    def validate(self) -> None:
        require(bool(self.runs), "runs", "must name at least one run's folder, e.g. runs/gla_tiny")
        require_text(self, "runs", "out")
        require(self.smooth > 0, "smooth", "must be 1 step or more")
