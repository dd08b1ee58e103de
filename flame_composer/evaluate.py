"""How good a model is on text it has not seen."""

from __future__ import annotations

from typing import Any

from composer import Trainer
from composer.core import Evaluator

from flame_composer.model import CausalLM


def evaluate(model: CausalLM, evaluator: Evaluator, *, precision: str) -> dict[str, Any]:
    """Mean loss over all predicted tokens (nats), its exponential, and how many tokens that is over all ranks."""
    trainer = Trainer(model=model, eval_dataloader=evaluator, precision=precision)
    trainer.eval()
    metrics = trainer.state.eval_metrics["eval"]
    loss = metrics["LanguageCrossEntropy"]
    result = {
        "loss": float(loss.compute()),
        "perplexity": float(metrics["LanguagePerplexity"].compute()),
        "tokens": int(loss.total_items),  # type: ignore[arg-type]
    }
    trainer.close()
    return result
