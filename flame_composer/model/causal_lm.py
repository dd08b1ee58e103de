"""The model: any fla or Hugging Face causal language model, as Composer trains it."""

from __future__ import annotations

import copy
import functools
import typing
from typing import Any

import torch
import torch.nn.functional as F
from composer.metrics.nlp import LanguageCrossEntropy, LanguagePerplexity
from composer.models import HuggingFaceModel
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from flame_composer.batch import IGNORE
from flame_composer.errors import InvalidField
from flame_composer.model.work import count_work
from flame_composer.upstream.composer import known_as_causal

# fla models whose layers take no borders of documents: their state runs on across them, most
# without a word.
_WITHOUT_VARLEN = ("abc", "lightnet", "linear_attn", "mamba", "mamba2", "samba")


class CausalLM(HuggingFaceModel):
    """A causal language model under Composer, fed with batches of
    `flame_composer.batch.collate`.

    With `varlen`, attention state never crosses documents: an fla model gets the rows end to end as
    [1, B * T] with the documents' borders as `cu_seqlens` (its kernels take those for batch 1
    only); another model gets `position_ids` that start anew at every document, from which
    transformers derives a block-diagonal mask.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, *, varlen: bool):
        """Raises InvalidField for `varlen` with a model that cannot keep documents apart."""
        self.is_fla = type(model).__module__.startswith("fla.")
        if varlen and self.is_fla and model.config.model_type in _WITHOUT_VARLEN:
            raise InvalidField(
                "varlen",
                f"fla's {model.config.model_type} cannot keep documents apart; set varlen=false to "
                "let its state run on across the documents of a row",
            )
        with known_as_causal():
            super().__init__(
                model=model,
                tokenizer=tokenizer,
                use_logits=True,
                shift_labels=True,
                eval_metrics=[LanguageCrossEntropy(), LanguagePerplexity()],
            )
        blocks = set(model._no_split_modules or ())
        # Composer asks the model's direct children: each block is gathered, and recomputed, by
        # itself.
        is_block: Any = lambda module: type(module).__name__ in blocks  # noqa: E731
        model.fsdp_wrap_fn = model.activation_checkpointing_fn = is_block
        self.varlen = varlen
        self.label_smoothing = 0.0  # of the loss that is trained on; see algorithms.LabelSmoothing
        self.work = count_work(model)

    def get_metadata(self) -> dict[str, Any]:
        """Return the config and the tokenizer's files, as a checkpoint holds them.

        Of several chat templates transformers makes a folder, which Composer 0.32 refuses: they go
        into the tokenizer's config instead, where both find them again.
        """
        tokenizer: Any = self.tokenizer
        if not isinstance(tokenizer.chat_template, dict):
            return super().get_metadata()
        saved: Any = copy.copy(tokenizer)
        saved.save_pretrained = functools.partial(tokenizer.save_pretrained, save_jinja_files=False)
        self.tokenizer = saved
        try:
            return super().get_metadata()
        finally:
            self.tokenizer = tokenizer

    def flops_per_batch(self, batch: dict[str, torch.Tensor]) -> int:
        """Of a training step on this batch: what utilisation (MFU) goes by, as does
        recipes/plan.py.
        """
        return self.work.flops_per_token(batch["input_ids"].shape[1]) * batch["input_ids"].numel()

    def forward(self, batch: dict[str, torch.Tensor]) -> Any:
        """Logits [B, T, V], and the mean loss over labels that are not -100 if the batch has
        labels; 0 if all of them are.

        `input_ids`, `labels` and `sequence_id` (the document's number in its row) are [B, T]. A
        row's first label is always -100, so that no row is asked to predict the next one's first
        token when rows are laid end to end.
        """
        input_ids, labels = batch["input_ids"], batch.get("labels")
        smoothing = self.label_smoothing if self.training else 0.0
        is_void = labels is not None and not (labels[:, 1:] != IGNORE).any()
        # The mean over nothing is no number, and nor is its gradient
        if labels is not None and is_void:
            labels = torch.cat([labels[:, :-1], input_ids[:, -1:]], dim=1)
        inputs: dict[str, Any] = {
            "input_ids": input_ids,
            "labels": None if smoothing else labels,
            "use_cache": False,
        }
        if self.varlen and self.is_fla:
            inputs["input_ids"] = input_ids.reshape(1, -1)
            inputs["labels"] = None if inputs["labels"] is None else inputs["labels"].reshape(1, -1)
            inputs["cu_seqlens"] = cumulative_lengths(batch["sequence_id"])
        elif self.varlen:
            inputs["position_ids"] = positions(batch["sequence_id"])
        outputs = self.model(**inputs)
        if outputs.logits is not None:
            outputs.logits = outputs.logits.reshape(*input_ids.shape, -1)
        if smoothing and labels is not None:
            assert outputs.logits is not None
            outputs["loss"] = F.cross_entropy(
                outputs.logits[:, :-1].flatten(0, 1),
                labels[:, 1:].flatten(),
                ignore_index=IGNORE,
                label_smoothing=smoothing,
            )
        if is_void:
            outputs["loss"] = typing.cast(torch.Tensor, outputs["loss"]) * 0
        return outputs


def check_microbatch_size(size: int | str) -> None:
    """Raises InvalidField for `auto` on a machine without a GPU, where lack of memory ends the
    process.
    """
    if size == "auto" and not torch.cuda.is_available():
        raise InvalidField(
            "microbatch_size",
            "there is no GPU here, whose memory could be tried out; give a number of rows",
        )


def _starts(sequence_id: torch.Tensor) -> torch.Tensor:
    starts = torch.ones_like(sequence_id, dtype=torch.bool)
    starts[:, 1:] = sequence_id[:, 1:] != sequence_id[:, :-1]
    return starts


def cumulative_lengths(sequence_id: torch.Tensor) -> torch.Tensor:
    """Offsets [num_documents + 1] of the documents when the rows of `sequence_id` [B, T] are
    laid end to end.
    """
    offsets = _starts(sequence_id).flatten().nonzero().flatten()
    return torch.cat([offsets, offsets.new_tensor([sequence_id.numel()])])


def positions(sequence_id: torch.Tensor) -> torch.Tensor:
    """Each token's place in its document, [B, T]."""
    index = torch.arange(sequence_id.shape[1], device=sequence_id.device).expand_as(sequence_id)
    return index - torch.where(_starts(sequence_id), index, 0).cummax(dim=1).values
