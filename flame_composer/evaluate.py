"""How good a model is on text it has not seen."""

from __future__ import annotations

from typing import Any, cast

import torch
from composer.core import Evaluator, Precision, get_precision_context
from composer.utils import dist, get_device
from tqdm import tqdm

from flame_composer.model import CausalLM


def evaluate(model: CausalLM, evaluator: Evaluator, *, precision: str) -> dict[str, Any]:
    """Mean loss over all predicted tokens (nats), its exponential, and the number of those tokens, over all ranks.

    The same metrics over the same batches as an evaluation in training, without a Trainer.
    """
    device = get_device()
    model = device.module_to_device(model).eval()
    metrics = {name: device.module_to_device(metric) for name, metric in model.get_metrics().items()}
    batches = evaluator.dataloader.dataloader
    with torch.no_grad():
        for batch in tqdm(batches, unit="batch", disable=None if dist.get_global_rank() == 0 else True):
            batch = device.batch_to_device(batch)
            with get_precision_context(Precision(precision)):
                outputs = model.eval_forward(batch)
            for metric in metrics.values():
                model.update_metric(batch, outputs, metric)
    results = {name: float(metric.compute()) for name, metric in metrics.items()}  # over all ranks
    tokens = cast(torch.Tensor, metrics["LanguageCrossEntropy"].total_items)
    dist.all_reduce(tokens)
    return {"loss": results["LanguageCrossEntropy"], "perplexity": results["LanguagePerplexity"], "tokens": int(tokens)}
