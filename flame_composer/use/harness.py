"""Tasks of lm-evaluation-harness, or of a local folder, scored on a model that is in memory.

Importing this module needs lm-evaluation-harness (extra `eval`). It does the scoring with its own
Hugging Face backend, which gets the model itself instead of a name.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from composer.utils import dist
from jinja2 import TemplateError
from lm_eval import evaluator
from lm_eval.models.huggingface import HFLM
from lm_eval.utils import make_table
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from flame_composer.config.use import EvaluateConfig
from flame_composer.errors import ConfigError, DataError, one_line
from flame_composer.text.ends import describe_start, ends_of, start_of, template_of
from flame_composer.upstream.jinja import template_limits
from flame_composer.upstream.lm_eval import (
    bars,
    ending_pools,
    no_foreign_code,
    only_errors,
)

# Both are the harness's defaults: the seed of the examples shown before a question, and the number
# of resamples for the standard error of a metric without a formula for it.
FEWSHOT_SEED = 1234
BOOTSTRAPS = 100000
_DTYPES = {"fp32": None, "amp_bf16": torch.bfloat16, "amp_fp16": torch.float16}


class Chat(NamedTuple):
    """How questions become conversations; the fields are the harness's options of these names."""

    apply_chat_template: bool = False
    fewshot_as_multiturn: bool = True
    system_instruction: str | None = None


def build_chat(config: EvaluateConfig) -> Chat:
    """Return how `config` wants questions to become conversations."""
    return Chat(config.apply_chat_template, config.fewshot_as_multiturn, config.system_instruction)


class HarnessModel(HFLM):
    """The harness's HF backend for a model in memory.

    Requests are shared among Composer's ranks instead of accelerate's.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerFast,
        *,
        batch_size: int,
        precision: str = "fp32",
        max_length: int | None = None,
        chat: Chat | None = None,
    ):
        """Wrap `model`, with a copy of `tokenizer`.

        A request may have at most `max_length` tokens; the default is the config's
        max_position_embeddings. Texts begin as the tokenizer's template says: as documents did in
        training, if that is known. With the chat template of `chat`, which the tokenizer must have
        or ConfigError is raised, they are what that template makes, and nothing comes before it.
        """
        self.chat = Chat() if chat is None else chat
        self.reader = tokenizer
        tokenizer = copy.deepcopy(tokenizer)  # the harness adds a padding token to it
        known = ends_of(tokenizer)
        self.has_bos = known is not None and known.bos
        # Whether documents were shown with nothing before them, not even an eos.
        self.starts_bare = known is not None and not known.bos and not known.eos
        self.puts_start = False  # whether the harness itself puts a token before each text
        # The harness warns about every option that has no meaning for a model in memory.
        with only_errors():
            super().__init__(
                model,
                "causal",
                tokenizer=tokenizer,
                batch_size=batch_size,
                max_length=max_length,
                # On a CPU linear layers see to it themselves (`cpu.linear.use_bf16`)
                mixed_precision_dtype=_DTYPES[precision] if torch.cuda.is_available() else None,
                prefix_token_id=None if known is None else start_of(tokenizer),
                add_bos_token=False if self.chat.apply_chat_template else None,
            )
        self._rank, self._world_size = dist.get_global_rank(), dist.get_world_size()
        self.before_batch: Callable[[], None] = lambda: None
        if self.chat.apply_chat_template:
            _require_chat_template(self)

    def take(self, model: torch.nn.Module, before_batch: Callable[[], None]) -> None:
        """Replace the model with `model`, which may be the same one, wrapped by a trainer.

        `before_batch` is called before each batch; it may raise to end an evaluation early.
        """
        self._model, self.before_batch = model, before_batch

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device  # a trainer may move the model

    def all_gather(self, tensor: torch.Tensor) -> torch.Tensor:
        return torch.cat([each.reshape(-1) for each in dist.all_gather(tensor)])

    def barrier(self) -> None:
        dist.barrier()

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **options: Any
    ) -> list[int]:
        if self.puts_start and add_special_tokens is None:
            add_special_tokens = False
        return super().tok_encode(string, add_special_tokens, **options)

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """Return a conversation as the tokenizer's chat template writes it.

        As in the harness, the system message, which may be a task's description, is left out if the
        template refuses it. Raise TemplateError if the template fails.
        """
        try:
            return _written(self.tokenizer, chat_history, add_generation_prompt)
        except TemplateError:
            turns = [message for message in chat_history if message["role"] != "system"]
            if turns == chat_history:
                raise
            return _written(self.tokenizer, turns, add_generation_prompt)

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """Return the log-likelihoods of whole texts, as the harness computes them.

        The exception is a model whose documents began with bos. Its texts get a single bos; the
        harness would put another one before it and score the prediction of the second.
        """
        self.puts_start = self.has_bos
        try:
            return super().loglikelihood_rolling(requests, disable_tqdm)
        finally:
            self.puts_start = False

    def _loglikelihood_tokens(
        self, requests: list[tuple[Any, list[int], list[int]]], *args: Any, **options: Any
    ) -> list[tuple[float, bool]]:
        """Return the log-likelihood of each request's tokens after those before them.

        If training showed nothing before a document, a text's first token cannot be predicted from
        anything; the others are predicted from it.
        """
        if not self.starts_bare:
            return super()._loglikelihood_tokens(requests, *args, **options)
        start = [self.prefix_token_id]
        shifted = [
            (text, answer[:1], answer[1:]) if before == start else (text, before, answer)
            for text, before, answer in requests
        ]
        scored = [each for each in shifted if each[2]]
        found = iter(super()._loglikelihood_tokens(scored, *args, **options) if scored else [])
        return [next(found) if each[2] else (0.0, True) for each in shifted]

    def _model_call(self, *args: Any, **options: Any) -> torch.Tensor:
        self.before_batch()
        return super()._model_call(*args, **options)

    def _model_generate(self, *args: Any, **options: Any) -> torch.Tensor:
        self.before_batch()
        return super()._model_generate(*args, **options)


def _require_chat_template(model: HarnessModel) -> None:
    """Raise ConfigError if the tokenizer has no chat template, or one that does not work.

    A template must take the system instruction, if there is one, and not leave it out.
    """
    if not model.reader.chat_template:
        raise ConfigError(
            "apply_chat_template: the model's tokenizer has no chat template; set it to false, or"
            " set tokenizer to one that has a template"
        )
    system = model.chat.system_instruction
    messages = [] if system is None else [{"role": "system", "content": system}]
    try:
        _written(model.reader, [*messages, {"role": "user", "content": "question"}])
    except TemplateError as error:
        what = "a question" if system is None else "a question after system_instruction"
        raise ConfigError(f"apply_chat_template: {what} cannot be written: {error}") from None


def _written(
    tokenizer: PreTrainedTokenizerFast,
    messages: list[dict[str, str]],
    add_generation_prompt: bool = True,
) -> str:
    """Return the messages as the tokenizer's chat template writes them; raise TemplateError."""
    try:
        with template_limits():
            written: Any = tokenizer.apply_chat_template(
                messages,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=not add_generation_prompt,
            )
    except Exception as error:  # the template is code of somebody else's, in a sandbox
        raise TemplateError(f"the tokenizer's chat template: {one_line(error)}") from None
    return written


def score(
    model: HarnessModel,
    tasks: dict[str, Any],
    *,
    limit: int | None,
    bootstraps: int = BOOTSTRAPS,
    show_bars: bool = False,
) -> dict[str, Any] | None:
    """Return the harness's results of tasks from `load_tasks`, or None on ranks other than 0.

    Each task is scored on its first `limit` documents, always with the same few-shot examples. With
    `bootstraps=0` there are no standard errors. Raise DataError if the harness cannot score them.
    """
    for task in tasks["tasks"].values():
        task.set_fewshot_seed(FEWSHOT_SEED)
    try:
        with no_foreign_code(), only_errors(), ending_pools(), bars(show_bars):
            return evaluator.evaluate(
                model,
                tasks,
                limit=limit,
                bootstrap_iters=bootstraps,
                log_samples=False,
                **model.chat._asdict(),
            )
    except AssertionError as error:
        reason = (
            str(error)
            or f"an answer may be longer than the {model.max_length} tokens of max_length"
        )
        raise DataError(
            f"tasks: {', '.join(tasks['tasks'])}: the harness gives up:"
            f" {one_line(Exception(reason))}"
        ) from None
    except TemplateError as error:
        raise DataError(
            f"tasks: {', '.join(tasks['tasks'])}: one of their templates fails: {one_line(error)}"
        ) from None


def check_fits(model: HarnessModel, tasks: dict[str, Any]) -> None:
    """Raise ConfigError for a task whose answers may be so long that no room is left for questions.

    The harness could not score such a task.
    """
    for name, task in tasks["tasks"].items():
        if task.OUTPUT_TYPE != "generate_until":
            continue
        written = (task.get_config("generation_kwargs") or {}).get(
            "max_gen_toks", model.max_gen_toks
        )
        if written >= model.max_length:
            raise ConfigError(
                f"tasks: {name}: its answers may have {written} tokens, but there are only"
                f" {model.max_length} for question and answer; set max_gen_toks in its"
                " generation_kwargs, or a larger max_length"
            )


def scores(results: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Return the finite numbers in the harness's results, by task or group and then by metric.

    If a metric has a filter, the filter's name follows the metric's name.
    """
    return {
        name: {
            key.removesuffix(",none"): float(value)
            for key, value in values.items()
            if "," in key and isinstance(value, (int, float)) and math.isfinite(value)
        }
        for name, values in results["results"].items()
    }


def table(results: dict[str, Any]) -> str:
    """Return the harness's own table of its results."""
    groups = f"\n{make_table(results, 'groups')}" if results.get("groups") else ""
    return f"{make_table(results)}{groups}".rstrip()


def describe_texts(model: HarnessModel, add_bos: bool | None) -> tuple[str, dict[str, Any]]:
    """Return a line for the user about what texts begin with, and the same for programs.

    `add_bos` is what the user set, or None.
    """
    begin = model.reader.convert_ids_to_tokens(template_of(model.reader)[0])
    system = model.chat.system_instruction
    facts: dict[str, Any] = {} if system is None else {"system_instruction": system}
    if not model.chat.apply_chat_template:
        return describe_start(model.reader, add_bos), {"texts_begin_with": begin, **facts}
    line = "texts are conversations, as the tokenizer's chat template writes them"
    return line, {**model.chat._asdict(), **facts}
