"""A model's answers to the examples of a tuning dataset, written so that a killed run goes on."""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import torch
import xxhash
from numpy.typing import NDArray
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from flame_composer.config.use import PredictConfig
from flame_composer.dataset.open import Dataset
from flame_composer.errors import ConfigError, DataError, InvalidField
from flame_composer.storage.folders import locked
from flame_composer.storage.local import appearing, open_own
from flame_composer.use.generate import (
    build_answer_sampling,
    continue_ids,
    ends_of_answers,
    in_batches,
)

PREDICTIONS, SETTINGS, METRICS = "predictions.jsonl", "settings.json", "metrics.json"
MOST_IN_SETTINGS = 1 << 20  # bytes; a real file has a few hundred
_PLACE = ("row", "piece", "turn")
_TEXTS = ("prompt", "label", "predict")


class Sample(NamedTuple):
    """A turn of an example that a model is to answer, as token ids.

    `piece` is the example's number within its row, `turn` the answer's within the example.
    """

    row: int
    piece: int
    turn: int
    prompt_ids: list[int]
    label_ids: list[int]

    @property
    def place(self) -> dict[str, int]:
        return {name: getattr(self, name) for name in _PLACE}


def samples_in(
    row: int,
    input_ids: NDArray[Any],
    doc_lengths: NDArray[Any],
    loss_mask: NDArray[np.bool_],
    *,
    turns: str,
) -> Iterator[Sample]:
    """Yield the samples of a row, whose number is `row`.

    `input_ids` and `loss_mask` are [T], `doc_lengths` is [pieces] and sums to T. An answer is a run
    of tokens with loss within a piece; its prompt is all of the piece before it. With `turns=last`
    only the last answer of a piece is yielded, with `turns=all` each of them. An answer without any
    prompt is left out, and so are pieces without loss, such as the padding.
    """
    ends = np.cumsum(doc_lengths, dtype=np.int64).tolist()
    for piece, (begin, end) in enumerate(itertools.pairwise([0, *ends])):
        has_loss = np.concatenate(([False], loss_mask[begin:end], [False]))
        runs = (np.flatnonzero(has_loss[1:] != has_loss[:-1]) + begin).reshape(-1, 2).tolist()
        answers = list(enumerate(runs))
        for turn, (first, after) in answers if turns == "all" else answers[-1:]:
            if first > begin:
                prompt, label = input_ids[begin:first].tolist(), input_ids[first:after].tolist()
                yield Sample(row, piece, turn, prompt, label)


def require_tuning_data(dataset: Dataset) -> None:
    """Raise InvalidField unless the dataset holds examples whose answers alone carry loss."""
    manifest = dataset.manifest
    key = "data.local" if dataset.remote is None else "data.remote"
    if not manifest.has_loss_mask:
        raise InvalidField(
            key,
            "must be a tuning dataset, made by convert/to_sft.py; it holds text without answers",
        )
    if manifest.train_on == "prompt_too":
        raise InvalidField(
            key,
            "was made with train_on=prompt_too, so that answers cannot be told from prompts;"
            " convert the held-out examples with train_on=all or last",
        )


def samples_of(rows: Iterable[Mapping[str, NDArray[Any]]], *, turns: str) -> Iterator[Sample]:
    """Yield the samples of all rows of a tuning dataset, in order; see `samples_in`."""
    for number, row in enumerate(rows):
        yield from samples_in(
            number, row["input_ids"], row["doc_lengths"], row["loss_mask"], turns=turns
        )


class Predictions:
    """The file of answers in a folder, which is open and locked, and to which lines are added."""

    def __init__(self, path: Path, file: BinaryIO):
        """Read the whole lines of `file`, which is at `path`; cut off what a kill left of another.

        Raise DataError for a line that no run has written.
        """
        self.path, self._file = path, file
        self.lines: list[dict[str, Any]] = []
        end = 0
        for number, line in enumerate(file, 1):
            if not line.endswith(b"\n"):
                break
            self.lines.append(_parse(line, f"{path}:{number}"))
            end += len(line)
        file.truncate(end)
        file.seek(end)

    def add(self, sample: Sample, *, prompt: str, label: str, predict: str, ended: bool) -> None:
        """Write a line at once; `ended` says whether the model itself ended the answer."""
        line: dict[str, Any] = {
            **sample.place,
            "prompt": prompt,
            "label": label,
            "predict": predict,
            "ended": ended,
        }
        self._file.write((json.dumps(line, ensure_ascii=False) + "\n").encode())
        self._file.flush()
        self.lines.append(line)

    @property
    def pairs(self) -> list[tuple[str, str]]:
        """Every answer with its label."""
        return [(line["predict"], line["label"]) for line in self.lines]


def _parse(line: bytes, place: str) -> dict[str, Any]:
    try:
        content = json.loads(line)
    except (ValueError, RecursionError):
        content = None
    if not (
        isinstance(content, dict)
        and all(type(content.get(name)) is int for name in _PLACE)
        and all(isinstance(content.get(name), str) for name in _TEXTS)
        and isinstance(content.get("ended"), bool)
    ):
        raise DataError(
            f"{place}: damaged: not a line of answers; delete the folder, and run the same command"
            " again"
        )
    return content


@contextmanager
def open_predictions(out: str, settings: dict[str, Any]) -> Iterator[Predictions]:
    """Open the file of answers in the folder `out`, made if need be, for the time of the body.

    `settings` are what the answers depend on; the folder records them. Raise ConfigError if it
    records others, holds other files, is in use by another process, or cannot be written.
    """
    folder = Path(out)
    with ExitStack() as stack:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            if not stack.enter_context(locked(folder)):
                raise ConfigError(
                    f"out={out}: another process writes answers there; wait for its end, or choose"
                    " another folder"
                )
            require_free(out)
            require_same(out, settings)
            if not (folder / SETTINGS).exists():
                with appearing(str(folder / SETTINGS)) as new:
                    new.write((json.dumps(settings, indent=1) + "\n").encode())
            descriptor = open_own(folder / PREDICTIONS, os.O_RDWR | os.O_CREAT)
            file = stack.enter_context(os.fdopen(descriptor, "r+b"))
            predictions = Predictions(folder / PREDICTIONS, file)
        except OSError as error:
            raise ConfigError(
                f"out={out}: cannot be written to: {error.strerror}; choose another folder"
            ) from None
        yield predictions


def require_free(out: str) -> None:
    """Raise ConfigError if the folder `out` holds files, but no answers."""
    try:
        there = sorted(os.listdir(out))
    except FileNotFoundError:
        return
    except OSError as error:
        raise ConfigError(
            f"out={out}: cannot be written to: {error.strerror}; choose another folder"
        ) from None
    others = [name for name in there if name != f"{SETTINGS}.tmp"]  # a kill may have left that
    if others and SETTINGS not in others:
        raise ConfigError(
            f"out={out}: holds {others[0]}, but no {SETTINGS} of answers; choose another folder"
        )


def require_same(out: str, settings: Mapping[str, Any]) -> None:
    """Raise ConfigError if the folder `out` holds answers made with other settings."""
    path = Path(out, SETTINGS)
    if not path.exists():
        return
    try:
        with os.fdopen(open_own(path, os.O_RDONLY), "rb") as file:
            before = json.loads(file.read(MOST_IN_SETTINGS))
        changed = [key for key in {**settings, **before} if settings.get(key) != before.get(key)]
    except (OSError, ValueError, RecursionError, TypeError, AttributeError):
        raise ConfigError(
            f"out={out}: its {SETTINGS} cannot be read; delete the folder, or choose another"
        ) from None
    if changed:
        raise ConfigError(
            f"out={out}: holds answers made with another {', '.join(map(str, changed))}; choose"
            " another folder, or delete this one"
        )


def settings_of(
    config: PredictConfig, model: PreTrainedModel, *, data: str, stop: list[int]
) -> dict[str, Any]:
    """Return all that the answers depend on; `data` is the fingerprint of the dataset.

    `seed`, `top_p` and `top_k` change nothing where the likeliest token is taken.
    """
    settings = {
        "model": fingerprint_of(model),
        "data": data,
        "stop_ids": stop,
        "turns": config.turns,
        "batch_size": config.batch_size,
        "max_new_tokens": config.max_new_tokens,
        "max_examples": config.max_examples,
        "temperature": config.temperature,
    }
    if config.temperature > 0:
        settings |= {"top_p": config.top_p, "top_k": config.top_k, "seed": config.seed}
    return settings


def fingerprint_of(model: PreTrainedModel) -> str:
    """Return a hash of a model's weights and config, wherever it was loaded from."""
    digest = xxhash.xxh3_128()
    config = model.config.to_dict()
    for name in ("_name_or_path", "transformers_version", "dtype", "torch_dtype"):
        config.pop(name, None)
    digest.update(json.dumps(config, sort_keys=True, default=str).encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def predict(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    samples: Iterable[Sample],
    predictions: Predictions,
    config: PredictConfig,
    *,
    num_rows: int,
) -> None:
    """Answer the samples after those that `predictions` has, and add each answer to it.

    Every batch is seeded by its number, and a batch of which only a part was written is made anew
    as a whole, so that the file is the same however often it was begun. Raise DataError if there is
    no sample, or the file has other lines than these samples.
    """
    stop = ends_of_answers(model, tokenizer)
    sampling = build_answer_sampling(config, tokenizer, stop)
    done, count = len(predictions.lines), 0
    with tqdm(total=num_rows, unit="row", disable=None) as bar:
        chosen = itertools.islice(samples, config.max_examples)
        for number, batch in enumerate(in_batches(chosen, config.batch_size)):
            for sample, line in zip(batch, predictions.lines[count:done], strict=False):
                _require_same_place(sample, line, predictions.path)
            count += len(batch)
            if count > done:
                # Hashed, since PyTorch's generator on CPUs looks at 32 bits of a seed only
                seeds = np.random.SeedSequence([config.seed, number])
                torch.manual_seed(int(seeds.generate_state(1)[0]))
                written = continue_ids(model, [each.prompt_ids for each in batch], sampling)
                left = len(predictions.lines) - (count - len(batch))
                for sample, ids in [*zip(batch, written, strict=True)][left:]:
                    _add(predictions, tokenizer, sample, ids, stop)
            bar.set_postfix_str(f"{count:,} answers", refresh=False)
            bar.update(batch[-1].row - bar.n)
        bar.update(num_rows - bar.n)
    if count == 0:
        raise DataError(
            "data: no example has an answer after a prompt without loss; convert the examples with"
            " train_on=all or train_on=last"
        )
    if count < done:
        raise DataError(
            f"{predictions.path}: holds {done:,} answers to {count:,} prompts; delete the folder,"
            " and run the same command again"
        )


def _require_same_place(sample: Sample, line: dict[str, Any], path: Path) -> None:
    if sample.place != {name: line[name] for name in _PLACE}:
        raise DataError(
            f"{path}: its answer to row {line['row']}, piece {line['piece']}, turn {line['turn']}"
            " is not where it belongs; delete the folder, and run the same command again"
        )


def _add(
    predictions: Predictions,
    tokenizer: PreTrainedTokenizerFast,
    sample: Sample,
    written: list[int],
    stop: list[int],
) -> None:
    """Write the answer `written`, which its first stop token ends.

    As in LLaMA-Factory, the label and the answer are decoded alone, without special tokens, and the
    prompt with them. Unlike there, no spaces before punctuation are ever taken away.
    """
    length = next((place for place, id in enumerate(written, 1) if id in stop), None)
    answer, label = (
        tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        for ids in (written[:length], sample.label_ids)
    )
    prompt = tokenizer.decode(
        sample.prompt_ids, skip_special_tokens=False, clean_up_tokenization_spaces=False
    )
    predictions.add(sample, prompt=prompt, label=label, predict=answer, ended=length is not None)
