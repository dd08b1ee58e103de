"""Loss and perplexity of a Hugging Face folder or a training checkpoint on a dataset.

    python recipes/evaluate.py model=runs/gla_tiny/hf data.local=data/quickstart/val
"""

import json
import sys

from flame_composer.cli import run
from flame_composer.recipe_config import EvaluateConfig


def main(config: EvaluateConfig) -> None:
    from composer.utils import dist, get_device

    from flame_composer.checkpoint import load_model
    from flame_composer.data import build_evaluator, open_dataset
    from flame_composer.evaluate import evaluate
    from flame_composer.model import CausalLM
    from flame_composer.tokenizer import load_tokenizer

    dist.initialize_dist(get_device())
    model, tokenizer = load_model(config.model)
    if config.tokenizer is not None:
        tokenizer = load_tokenizer(config.tokenizer)
    data = config.data
    dataset = open_dataset(data.local, data.remote, tokenizer=tokenizer)
    evaluator = build_evaluator(dataset, data, batch_size=config.batch_size)
    result = evaluate(CausalLM(model, tokenizer, varlen=config.varlen), evaluator, precision=config.precision)
    if dist.get_global_rank() == 0:
        print(f"loss {result['loss']:.4f}, perplexity {result['perplexity']:.2f} over {result['tokens']:,} tokens")
        print(json.dumps({"model": config.model, "data": data.remote or data.local, **result}))


if __name__ == "__main__":
    sys.exit(run(main, EvaluateConfig))
