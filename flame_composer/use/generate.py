"""Text generation: prompts become batches, tokens are sampled and turned back into text."""

from __future__ import annotations

import itertools
import json
import logging
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from tokenizers.decoders import DecodeStream
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    RepetitionPenaltyLogitsProcessor,
    StoppingCriteria,
    StoppingCriteriaList,
)
from transformers.generation.streamers import BaseStreamer

from flame_composer.config.rules import is_text
from flame_composer.config.use import ChatConfig, GenerateConfig, PredictConfig
from flame_composer.errors import ConfigError, DataError
from flame_composer.model.build import quiet
from flame_composer.text.chat import stop_ids
from flame_composer.text.ends import encode_prompt
from flame_composer.text.tokenizer import explained_failure, special_tokens
from flame_composer.upstream.transformers import without_model_defaults

T = TypeVar("T")

log = logging.getLogger(__name__)


def build_sampling(
    config: GenerateConfig | PredictConfig | ChatConfig, tokenizer: PreTrainedTokenizerFast
) -> GenerationConfig:
    """Return transformers' generation config for the settings in `config`.

    It has no repetition penalty and no stop texts: `continue_prompts` applies them.
    """
    sampling: dict[str, Any] = {"do_sample": False}
    if config.temperature > 0:
        sampling = {
            "do_sample": True,
            "temperature": config.temperature,
            "top_p": config.top_p,
            "top_k": config.top_k,
        }
    return GenerationConfig(
        max_new_tokens=config.max_new_tokens, **special_tokens(tokenizer), **sampling
    )


def build_answer_sampling(
    config: PredictConfig | ChatConfig, tokenizer: PreTrainedTokenizerFast, stop: list[int]
) -> GenerationConfig:
    """Return transformers' generation config for answers that end with a token in `stop`."""
    sampling = build_sampling(config, tokenizer)
    sampling.eos_token_id = stop or None
    if sampling.pad_token_id is None and stop:
        sampling.pad_token_id = stop[0]
    return sampling


def continue_prompts(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    prompts: list[str],
    sampling: GenerationConfig,
    *,
    repetition_penalty: float = 1.0,
    stop: Sequence[str] = (),
    show: Callable[[str], Any] | None = None,
) -> list[str]:
    """Return the model's continuation of each prompt.

    It ends at the latest with the token that completes one of the `stop` texts. `show`, allowed for
    a single prompt only, is called with each piece of text as it is generated.

    The prompts of a batch do not see one another: greedy continuations do not depend on the other
    prompts or on their lengths. A linear attention model carries a state of fixed size from token
    to token.
    """
    rows = encode(tokenizer, prompts)
    length, limit = max(map(len, rows)), row_length(model)
    if limit is not None and length > limit:
        log.warning(
            "warning: a prompt has %s tokens, but the model was trained on rows of %s; the text it"
            " writes may be worse",
            f"{length:,}",
            f"{limit:,}",
        )
    pieces = [Pieces(tokenizer, row) for row in rows]
    streamer = None if show is None else Streamer(pieces[0], show)
    written = continue_ids(
        model,
        rows,
        sampling,
        repetition_penalty=repetition_penalty,
        criteria=[StopTexts(tokenizer, rows, stop)] if stop else [],
        streamer=streamer,
    )
    if streamer is not None:
        return ["".join(streamer.shown)]
    return ["".join(map(piece.add, row)) for piece, row in zip(pieces, written, strict=True)]


def continue_ids(
    model: PreTrainedModel,
    rows: Sequence[Sequence[int]],
    sampling: GenerationConfig,
    *,
    repetition_penalty: float = 1.0,
    criteria: Sequence[StoppingCriteria] = (),
    streamer: BaseStreamer | None = None,
) -> list[list[int]]:
    """Return the token ids that the model writes after each of the `rows` of token ids.

    A row that ends before others is filled up with the pad token. No row may be empty. `criteria`
    end rows beside the eos tokens of `sampling`; a `streamer` is allowed for a single row only.
    """
    ids, mask = pad_left(rows, sampling.pad_token_id or 0)  # any token will do: it is masked
    processors = LogitsProcessorList([RequireNumbers()])
    if repetition_penalty != 1.0:
        processors.append(RepetitionPenalty(repetition_penalty, (mask == 0).sum(1)))
    with torch.inference_mode(), quiet(), without_model_defaults(model) as options:
        written = cast(Any, model).generate(
            ids.to(model.device),
            attention_mask=mask.to(model.device),
            generation_config=sampling,
            logits_processor=processors,
            stopping_criteria=StoppingCriteriaList(criteria),
            streamer=streamer,
            **options,
        )
    return written[:, ids.shape[1] :].tolist()


def row_length(model: PreTrainedModel) -> int | None:
    """Return the number of tokens of the rows that the model was trained on, or None if unknown."""
    limit = getattr(model.config, "max_position_embeddings", None)
    return limit if type(limit) is int else None


def encode(tokenizer: PreTrainedTokenizerFast, prompts: list[str]) -> list[list[int]]:
    """Return the token ids of each prompt.

    Each prompt begins as documents did in training. Special tokens that are written out in a prompt
    are encoded as such. An empty prompt becomes the token from which a document's first token is
    predicted.
    """
    with explained_failure():
        return [encode_prompt(tokenizer, prompt) for prompt in prompts]


def pad_left(rows: Sequence[Sequence[int]], padding: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the token ids of `rows` and their attention mask, [B, T] each, padded on the left."""
    length = max(map(len, rows))
    ids = torch.tensor([[padding] * (length - len(row)) + [*row] for row in rows])
    mask = torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in rows])
    return ids, mask


def ends_of_answers(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> list[int]:
    """Return the tokens that end an answer, in ascending order.

    They are the end of an answer in the tokenizer's chat template, eos, and the eos tokens of the
    model's generation config. Of those, what is no token of the model is left out.
    """
    named = getattr(model.generation_config, "eos_token_id", None)
    named = named if isinstance(named, list) else [named]
    known = [id for id in named if type(id) is int and 0 <= id < model.config.vocab_size]
    return sorted({*known, *stop_ids(tokenizer)})


class RequireNumbers(LogitsProcessor):
    """A processor that raises DataError if any score is NaN or plus infinity.

    Neither sampling nor taking the maximum makes sense for such scores.
    """

    def __call__(self, _: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        if (torch.isnan(scores) | torch.isposinf(scores)).any():
            raise DataError(
                "the model's scores for the next token are not numbers: its weights are damaged, or"
                " its training diverged; take an earlier checkpoint"
            )
        return scores


class RepetitionPenalty(LogitsProcessor):
    """A repetition penalty that ignores the padding before shorter prompts.

    Transformers' own processor counts the padding as text. Often it is the eos token, which would
    become less likely.
    """

    def __init__(self, penalty: float, padding: torch.Tensor):
        """Set the penalty; `padding` [B] is the number of padding tokens before each prompt."""
        self.plain = RepetitionPenaltyLogitsProcessor(penalty)
        self.padding = padding

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        is_padding = torch.arange(input_ids.shape[1]) < self.padding[:, None]
        text = torch.where(is_padding.to(input_ids.device), input_ids[:, -1:], input_ids)
        return self.plain(text, scores)  # type: ignore[arg-type]


class Pieces:
    """A decoder that turns a text's tokens into pieces of text, one token at a time.

    A character comes out once all its tokens have been added. Spaces depend on the tokens before,
    so the tokens of the prompt are added first.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerFast,
        prompt: list[int],
        *,
        skip_special_tokens: bool = True,
    ):
        self.backend = tokenizer.backend_tokenizer
        self.stream = DecodeStream(skip_special_tokens=skip_special_tokens)
        self.prompt = "".join(map(self.add, prompt))

    def add(self, token: int) -> str:
        """Return the text that `token` completes, which may be empty."""
        return self.stream.step(self.backend, token) or ""


class StopTexts(StoppingCriteria):
    """A criterion that ends each row once it contains one of `texts`.

    Transformers' own stop strings cannot match characters that are made of several tokens.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerFast, prompts: list[list[int]], texts: Sequence[str]
    ):
        self.pieces = [Pieces(tokenizer, prompt, skip_special_tokens=False) for prompt in prompts]
        self.rows = [piece.prompt for piece in self.pieces]
        self.texts = texts

    def __call__(self, input_ids: torch.LongTensor, *_: Any, **__: Any) -> torch.BoolTensor:
        done = []
        for row, (piece, token) in enumerate(
            zip(self.pieces, input_ids[:, -1].tolist(), strict=True)
        ):
            self.rows[row] += piece.add(token)
            # A stop text may begin in the prompt, but not lie wholly within it.
            starts = [max(0, len(piece.prompt) - len(text) + 1) for text in self.texts]
            done.append(
                any(
                    text in self.rows[row][start:]
                    for text, start in zip(self.texts, starts, strict=True)
                )
            )
        return torch.tensor(done, device=input_ids.device)  # type: ignore[return-value]


class Streamer(BaseStreamer):
    """A streamer that shows the text `generate` writes, but not the prompt, which it gets first."""

    def __init__(self, pieces: Pieces, show: Callable[[str], Any], hidden: Sequence[int] = ()):
        """Decode with `pieces`, and leave out the tokens in `hidden`."""
        self.pieces, self.show, self.hidden = pieces, show, hidden
        self.shown: list[str] = []
        self.is_prompt = True

    def put(self, value: torch.Tensor) -> None:
        if not self.is_prompt:
            for token in value.flatten().tolist():
                if token in self.hidden:
                    continue
                self.shown.append(self.pieces.add(token))
                self.show(self.shown[-1])
        self.is_prompt = False

    def end(self) -> None:
        self.is_prompt = True


def read_prompts(path: str) -> list[str]:
    """Return the prompts in a file: the lines of a text file, or each line's `prompt` in a .jsonl.

    Empty lines are skipped. Raise ConfigError if the file cannot be read, holds no prompt, or holds
    a line without a valid one.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError, MemoryError) as error:
        reason = error.strerror if isinstance(error, OSError) else "is not UTF-8"
        if isinstance(error, MemoryError):
            reason = "does not fit into memory"
        raise ConfigError(f"prompts={path}: cannot be read: {reason}") from None
    prompts = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        if not path.endswith(".jsonl"):
            prompts.append(line.removesuffix("\r"))
            continue
        try:
            prompts.append(json.loads(line)["prompt"])
        except (ValueError, KeyError, TypeError, RecursionError):
            raise ConfigError(
                f'prompts={path}: line {number} must be JSON like {{"prompt": "text"}}'
            ) from None
        if not isinstance(prompts[-1], str):
            raise ConfigError(f"prompts={path}: line {number}: prompt must be a string")
        if not is_text(prompts[-1]):
            raise ConfigError(
                f"prompts={path}: line {number}: prompt holds half a surrogate pair, which is not"
                " valid text"
            )
    if not prompts:
        raise ConfigError(f"prompts={path}: holds no prompt")
    return prompts


def in_batches(prompts: Iterable[T], size: int) -> Iterator[list[T]]:
    """Yield the prompts in lists of `size`; the last may be shorter."""
    rest = iter(prompts)
    while batch := list(itertools.islice(rest, size)):
        yield batch


def asked(prompt: Callable[[], str] = lambda: "> ") -> Iterator[str]:
    """Yield each line of standard input as a prompt, until it ends (Ctrl-D in a terminal).

    A terminal shows what `prompt` returns before each line. Raise ConfigError if standard input is
    closed or is not UTF-8.
    """
    if sys.stdin is None:  # closed
        raise ConfigError(
            "there is no standard input to read prompts from; set prompt=... or prompts=FILE"
        )
    for number in itertools.count(1):
        try:
            line = input(prompt() if sys.stdin.isatty() else "")
        except EOFError:
            return
        except UnicodeDecodeError:
            line = "\udcff"
        if not is_text(line):
            raise ConfigError(f"standard input: line {number} or one soon after it is not UTF-8")
        yield line.removeprefix("\ufeff") if number == 1 else line
