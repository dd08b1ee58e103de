"""Tasks of lm-evaluation-harness (extra `eval`), its own or from a local folder, on a model that is
in memory.

Importing this module needs that package. Scoring is the harness's own: its HF backend, given a
model instead of a name.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from composer.utils import dist
from jinja2 import TemplateError
from lm_eval import evaluator
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from lm_eval.tasks._yaml_loader import load_yaml
from lm_eval.utils import make_table
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from flame_composer.config.fields import nearest
from flame_composer.config.written import require_shallow
from flame_composer.errors import ConfigError, DataError, one_line
from flame_composer.text.ends import ends_of, start_of
from flame_composer.upstream.lm_eval import WRITING, bars, no_foreign_code, only_errors

FEWSHOT_SEED = 1234  # the harness's own: of the examples that are shown before a question
# The same: samples for the standard error of a metric that has no formula for it
BOOTSTRAPS = 100000
_DTYPES = {"fp32": None, "amp_bf16": torch.bfloat16, "amp_fp16": torch.float16}


class HarnessModel(HFLM):
    """A model in memory as the harness's HF backend, sharing requests among Composer's ranks
    instead of accelerate's.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerFast,
        *,
        batch_size: int,
        precision: str = "fp32",
        max_length: int | None = None,
    ):
        """`max_length` tokens are the most a request may have; the config's max_position_embeddings
        if not set.

        Texts begin as the tokenizer's template has it: as documents did in training, if that is
        known.
        """
        tokenizer = copy.deepcopy(tokenizer)  # it gets a padding token
        known = ends_of(tokenizer)
        self.has_bos = known is not None and known.bos
        self.puts_start = False  # whether the harness itself puts a token before each text
        # The harness warns of every option that has no meaning for a model in memory
        with only_errors():
            super().__init__(
                model,
                "causal",
                tokenizer=tokenizer,
                batch_size=batch_size,
                max_length=max_length,
                mixed_precision_dtype=_DTYPES[precision],
                prefix_token_id=None if known is None else start_of(tokenizer),
            )
        self._rank, self._world_size = dist.get_global_rank(), dist.get_world_size()
        self.before_batch: Callable[[], None] = lambda: None

    def take(self, model: torch.nn.Module, before_batch: Callable[[], None]) -> None:
        """Go on with `model`, which a trainer may have wrapped since; `before_batch` may raise
        to end an evaluation early.
        """
        self._model, self.before_batch = model, before_batch

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device  # a trainer moves it

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

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """As the harness's, but where documents began with bos a text has it once.

        The harness would have it predicted, from another one before it.
        """
        self.puts_start = self.has_bos
        try:
            return super().loglikelihood_rolling(requests, disable_tqdm)
        finally:
            self.puts_start = False

    def _model_call(self, *args: Any, **options: Any) -> torch.Tensor:
        self.before_batch()
        return super()._model_call(*args, **options)

    def _model_generate(self, *args: Any, **options: Any) -> torch.Tensor:
        self.before_batch()
        return super()._model_generate(*args, **options)


def load_tasks(
    names: list[str], folder: str | None, *, num_fewshot: int | None, task_code: bool = False
) -> dict[str, Any]:
    """The harness's TaskDict of these tasks, groups or tags, with their data; those in `folder`
    come before its own.

    Raises ConfigError for what is not there or cannot be loaded, and for tasks that run what a
    model writes, need code from the hub or, without `task_code`, name Python functions outside the
    harness.
    """
    manager = _find(names, folder)
    loaded: Any = {}
    for name in names:
        entry = manager.task_index[name]
        if (entry.cfg or {}).get("unsafe_code"):
            raise ConfigError(
                f"tasks: {name}: runs what the model writes as code, which is refused here"
            )
    try:
        with no_foreign_code(task_code), only_errors():
            loaded = manager.load(list(names))
    except ConfigError:
        raise
    # Whatever a task's own code, its data, the hub or the network makes of it
    except Exception as error:
        raise ConfigError(
            f"tasks: {', '.join(names)}: cannot be loaded: {one_line(error)}"
        ) from None
    for name, task in loaded["tasks"].items():
        if getattr(task, "UNSAFE_CODE", False):
            raise ConfigError(
                f"tasks: {name}: runs what the model writes as code, which is refused here"
            )
        for key in task.get_config("generation_kwargs") or {}:
            if key not in WRITING:
                raise ConfigError(
                    f"tasks: {name}: its generation_kwargs have {str(key)[:60]!r}, which is not"
                    f" taken; only {', '.join(sorted(WRITING))} are"
                )
        for metric, function in getattr(task, "_metric_fn_list", {}).items():
            if function is None:
                raise ConfigError(
                    f"tasks: {name}: the harness has no metric {metric}, and code for it is not"
                    " fetched"
                )
        # A task's own 0 stays, as in the harness
        if num_fewshot is not None and task.get_config("num_fewshot") != 0:
            task.set_config(key="num_fewshot", value=num_fewshot)
        elif task.get_config("num_fewshot") is None:
            task.set_config(key="num_fewshot", value=0)
    return loaded


def _find(names: list[str], folder: str | None) -> TaskManager:
    """What knows the names: the folder alone if that is enough, as reading the harness's own
    takes seconds.
    """
    manager = None
    if folder is not None:
        if not Path(folder).is_dir():
            raise ConfigError(f"task_path={folder}: no such folder")
        for file in sorted(Path(folder).rglob("*.yaml")):
            if not file.is_file():  # which opening might wait for
                raise ConfigError(f"{file}: cannot be read as a task: is no file")
            try:
                require_shallow(file.read_text(encoding="utf-8"))
                load_yaml(file, resolve_func=False)
            except Exception as error:  # the harness passes over such files without a word
                raise ConfigError(f"{file}: cannot be read as a task: {one_line(error)}") from None
        with only_errors():
            manager = TaskManager(include_path=folder, include_defaults=False)
    if manager is None or not set(names) <= set(manager.all_tasks):
        with only_errors():
            manager = TaskManager(include_path=folder)
    for name in names:
        if name not in manager.task_index:
            where = "the harness" if folder is None else f"{folder} and the harness"
            raise ConfigError(
                f"tasks: {name}: no such task in {where}{nearest(name, manager.all_tasks)}"
            )
    return manager


def score(
    model: HarnessModel,
    tasks: dict[str, Any],
    *,
    limit: int | None,
    bootstraps: int = BOOTSTRAPS,
    show_bars: bool = False,
) -> dict[str, Any] | None:
    """The harness's results of `load_tasks`' tasks, on their first `limit` documents each; None but
    on the first rank.

    Always on the same few-shot examples. Without `bootstraps` there are no standard errors.
    """
    for task in tasks["tasks"].values():
        task.set_fewshot_seed(FEWSHOT_SEED)
    try:
        with no_foreign_code(), only_errors(), bars(show_bars):
            return evaluator.evaluate(
                model, tasks, limit=limit, bootstrap_iters=bootstraps, log_samples=False
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
            f"tasks: {', '.join(tasks['tasks'])}: a template of theirs fails: {one_line(error)}"
        ) from None


def check_fits(model: HarnessModel, tasks: dict[str, Any]) -> None:
    """Raises ConfigError for a task that has text written which leaves no room for the question:
    the harness gives up then.
    """
    for name, task in tasks["tasks"].items():
        if task.OUTPUT_TYPE != "generate_until":
            continue
        written = (task.get_config("generation_kwargs") or {}).get(
            "max_gen_toks", model.max_gen_toks
        )
        if written >= model.max_length:
            raise ConfigError(
                f"tasks: {name}: has up to {written} tokens written, of {model.max_length} for"
                " question and answer; set max_gen_toks in its generation_kwargs, or a larger"
                " max_length"
            )


def scores(results: dict[str, Any]) -> dict[str, dict[str, float]]:
    """The numbers in the harness's results: by task or group, then by metric, with the filter's
    name if it has one.
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
    """The harness's own table of its results."""
    groups = f"\n{make_table(results, 'groups')}" if results.get("groups") else ""
    return f"{make_table(results)}{groups}".rstrip()
