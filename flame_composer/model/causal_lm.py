"""A wrapper that lets Composer train any causal language model of fla or Hugging Face."""

from __future__ import annotations

import copy
import functools
import typing
from typing import Any

import torch
import torch.nn.functional as F
from composer.metrics.nlp import LanguageCrossEntropy, LanguagePerplexity
from composer.models import HuggingFaceModel
from torch.nn.parallel import DistributedDataParallel
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from flame_composer.batch import IGNORE
from flame_composer.errors import InvalidField
from flame_composer.model.context import Context
from flame_composer.model.lora import Adapter, trained_names
from flame_composer.model.quantized import is_quantized
from flame_composer.model.ranks import ALL_APART, Ranks
from flame_composer.model.work import Work, count_work
from flame_composer.upstream.composer import ask_configs_without_a_word, known_as_causal
from flame_composer.upstream.transformers import block_names

# fla models whose layers take no `cu_seqlens`: their state carries over from one document to the
# next, and most of them do not report it.
WITHOUT_VARLEN = ("abc", "lightnet", "linear_attn", "mamba", "mamba2", "samba")


def causal_lm_of(model: torch.nn.Module) -> CausalLM:
    """Return the model of a run, unwrapped if DistributedDataParallel is around it."""
    inner = model.module if isinstance(model, DistributedDataParallel) else model
    return typing.cast(CausalLM, inner)


class CausalLM(HuggingFaceModel):
    """A causal language model that Composer trains on batches of `flame_composer.batch.collate`.

    With `varlen`, attention and state never cross the border between two documents. An fla model
    gets the rows laid end to end as [1, B * T], with the borders as `cu_seqlens`, which its kernels
    take only for batch size 1. Any other model gets `position_ids` that restart at every document;
    transformers derives a block-diagonal mask from them.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerFast,
        *,
        varlen: bool,
        adapter: Adapter | None = None,
        z_loss: float = 0.0,
        context: Context | None = None,
        ranks: Ranks = ALL_APART,
    ):
        """Wrap `model`; raise InvalidField for `varlen` if it cannot keep documents apart.

        `z_loss` is the weight of `z_loss` in the training loss; raise InvalidField if the model
        gives no logits to compute it from.

        With a `context`, a batch is one row, of which this rank computes a part: logits and loss
        are those of its tokens. `ranks` says how many share the work.

        If `model` has adapters, `adapter` describes them. The state dict then holds the weights
        that are trained, and no others.
        """
        self.is_fla = type(model).__module__.startswith("fla.")
        if varlen and self.is_fla and model.config.model_type in WITHOUT_VARLEN:
            raise InvalidField(
                "varlen",
                f"fla's {model.config.model_type} cannot keep documents apart; set varlen=false to "
                "let its state carry over from one document of a row to the next",
            )
        if z_loss and getattr(model.config, "fuse_linear_cross_entropy", False):
            raise InvalidField(
                "z_loss",
                "needs the logits, which model.config.fuse_linear_cross_entropy=true does not make;"
                " set that to false",
            )
        ask_configs_without_a_word()
        with known_as_causal():
            super().__init__(
                model=model,
                tokenizer=tokenizer,
                use_logits=True,
                shift_labels=True,
                eval_metrics=[LanguageCrossEntropy(), LanguagePerplexity()],
            )
        blocks = block_names(model)
        # Composer looks for these functions on its model's direct children. With them, FSDP gathers
        # each block separately, and activation checkpointing recomputes each separately.
        is_block: Any = lambda module: type(module).__name__ in blocks  # noqa: E731
        model.fsdp_wrap_fn = model.activation_checkpointing_fn = is_block
        self.varlen, self.z_loss = varlen, z_loss
        self.context, self.ranks = context, ranks
        self.label_smoothing = 0.0  # in the training loss only; set by algorithms.LabelSmoothing
        # A quantized model, whose weights cannot be counted, is not trained.
        self._work = None if is_quantized(model) else count_work(model)
        self._metadata: dict[str, Any] | None = None
        self.adapter = adapter
        if adapter is not None:
            # Taken down now, because a name must not leave checkpoints when its weight is frozen.
            self._trained = frozenset(trained_names(self))
            self.register_state_dict_post_hook(_keep_trained)

    @property
    def work(self) -> Work:
        """The numbers of the model that decide its FLOPs per token."""
        assert self._work is not None
        return self._work

    def get_metadata(self) -> dict[str, Any]:
        """Return the config and the tokenizer's files in the form that a checkpoint holds.

        If there is an adapter, its description is under the key `lora`. All of it is read once,
        when the first checkpoint is saved: training waits for it, and none of it changes in a run.
        The same object is returned each time.
        """
        if self._metadata is None:
            self._metadata = self._read_metadata()
        return self._metadata

    def _read_metadata(self) -> dict[str, Any]:
        """Return what `get_metadata` returns.

        If there are several chat templates, transformers saves them in a folder, which Composer
        0.32 refuses. They are put into the tokenizer's config instead, where both find them.
        """
        tokenizer: Any = self.tokenizer
        adapted = {} if self.adapter is None else {"lora": self.adapter.as_plain()}
        if not isinstance(tokenizer.chat_template, dict):
            return super().get_metadata() | adapted
        saved: Any = copy.copy(tokenizer)
        saved.save_pretrained = functools.partial(tokenizer.save_pretrained, save_jinja_files=False)
        self.tokenizer = saved
        try:
            return super().get_metadata() | adapted
        finally:
            self.tokenizer = tokenizer

    def flops_per_batch(self, batch: dict[str, torch.Tensor]) -> int:
        """Return the FLOPs of this rank's training step on this batch.

        Composer computes the utilisation (MFU) from them; recipes/plan.py counts them the same way.
        """
        tokens = batch["input_ids"].numel()
        of_rows = self.work.flops_per_token(batch["input_ids"].shape[1]) * tokens
        return of_rows // self.ranks.together

    def eval_forward(self, batch: Any, outputs: Any | None = None) -> Any:
        """Return the logits, [B, T, V], and keep the labels of what follows each token."""
        logits = super().eval_forward(batch, outputs)
        if self.context is not None:
            assert self.labels is not None
            self.labels = self.labels[:, self.context.tokens_of(self.labels.shape[1])]
        return logits

    def forward(self, batch: dict[str, torch.Tensor]) -> Any:
        """Return the model's output: logits [B, T, V], and the loss if the batch has labels.

        The loss is the mean over labels that are not -100, or 0 if all of them are -100. In
        training, `z_loss` is added to it.
        `input_ids`, `labels` and `sequence_id` (the number of a document in its row) are [B, T]. A
        row's first label is always -100, so that when rows are laid end to end no row has to
        predict the first token of the next.
        """
        part = None if self.context is None else self.context.enter(batch, self._offsets(batch))
        input_ids, labels, is_void = _inputs(batch) if part is None else part[:3]
        smoothing = self.label_smoothing if self.training else 0.0
        inputs: dict[str, Any] = {
            "input_ids": input_ids,
            "labels": None if smoothing else labels,
            "use_cache": False,
        }
        if part is not None:
            inputs["cu_seqlens"] = part.offsets
        elif self.varlen and self.is_fla:
            inputs["input_ids"] = input_ids.reshape(1, -1)
            inputs["labels"] = None if inputs["labels"] is None else inputs["labels"].reshape(1, -1)
            inputs["cu_seqlens"] = cumulative_lengths(batch["sequence_id"])
        elif self.varlen:
            inputs["position_ids"] = positions(batch["sequence_id"])
        outputs = self.model(**inputs)
        if outputs.logits is not None:
            outputs.logits = outputs.logits.reshape(*input_ids.shape, -1)
        if labels is not None and (smoothing or (self.z_loss and self.training)):
            assert outputs.logits is not None
            scores, targets = outputs.logits[:, :-1], labels[:, 1:]
            if part is not None:  # the next part's first token is one that this one's last predicts
                assert part.after is not None
                scores, targets = outputs.logits, part.after
            if smoothing:
                outputs["loss"] = F.cross_entropy(
                    scores.flatten(0, 1),
                    targets.flatten(),
                    ignore_index=IGNORE,
                    label_smoothing=smoothing,
                )
            if self.z_loss:
                outputs["loss"] = outputs["loss"] + self.z_loss * z_loss(scores, targets)
        if is_void:
            outputs["loss"] = typing.cast(torch.Tensor, outputs["loss"]) * 0
        return outputs

    def _offsets(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """Return the offsets of what the model keeps apart: documents, or whole rows."""
        ids = batch["sequence_id"]
        return cumulative_lengths(ids if self.varlen else torch.zeros_like(ids))


def _inputs(batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor | None, bool]:
    """Return a batch's tokens, its labels, and whether it has none.

    A mean over no labels is NaN, and so is its gradient: such a batch gets a label, and its loss
    counts as 0.
    """
    input_ids, labels = batch["input_ids"], batch.get("labels")
    is_void = labels is not None and not (labels[:, 1:] != IGNORE).any()
    if labels is not None and is_void:
        labels = torch.cat([labels[:, :-1], input_ids[:, -1:]], dim=1)
    return input_ids, labels, is_void


def z_loss(scores: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Return the mean of log(Z)^2 over targets that are not -100, where Z normalizes the softmax.

    `scores` are the logits [B, T, V] for what each of the `targets` [B, T] is. Keeping log(Z) near
    0 keeps logits from drifting (Chowdhery et al. 2022, section 5).
    """
    log_z = scores.float().logsumexp(dim=-1)
    has_label = targets != IGNORE
    return (log_z.square() * has_label).sum() / has_label.sum()


def _keep_trained(module: CausalLM, state: dict[str, Any], prefix: str, _: Any) -> None:
    """Remove from a state dict what is not trained, unless Composer sends weights to all ranks.

    For that Composer switches `should_save_peft_only` off. Its own filter goes by peft's wrapper,
    and by the return value of `state_dict`, which DistributedDataParallel ignores.
    """
    if not module.should_save_peft_only:
        return
    for name in list(state):
        if name.startswith(prefix) and name.removeprefix(prefix) not in module._trained:
            del state[name]


def check_microbatch_size(size: int | str) -> None:
    """Raise InvalidField for `auto` on a machine without a GPU.

    `auto` tries sizes until one fits into memory. On a CPU, running out of memory would kill the
    process.
    """
    if size == "auto" and not torch.cuda.is_available():
        raise InvalidField(
            "microbatch_size",
            "there is no GPU here, and auto works by trying out a GPU's memory; give a number of"
            " rows",
        )


def _starts(sequence_id: torch.Tensor) -> torch.Tensor:
    starts = torch.ones_like(sequence_id, dtype=torch.bool)
    starts[:, 1:] = sequence_id[:, 1:] != sequence_id[:, :-1]
    return starts


def cumulative_lengths(sequence_id: torch.Tensor) -> torch.Tensor:
    """Return the documents' offsets, [num_documents + 1], in rows that are laid end to end.

    `sequence_id` [B, T] holds the number of each token's document in its row. The last offset is
    B * T.
    """
    offsets = _starts(sequence_id).flatten().nonzero().flatten()
    return torch.cat([offsets, offsets.new_tensor([sequence_id.numel()])])


def positions(sequence_id: torch.Tensor) -> torch.Tensor:
    """Return each token's position in its document, [B, T]."""
    index = torch.arange(sequence_id.shape[1], device=sequence_id.device).expand_as(sequence_id)
    return index - torch.where(_starts(sequence_id), index, 0).cummax(dim=1).values
