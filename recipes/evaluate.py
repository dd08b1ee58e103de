"""Measure the loss and perplexity of a model on datasets, and its scores in tasks.

`model` is a Hugging Face folder or a training checkpoint.

    python recipes/evaluate.py model=runs/gla_tiny/hf data.local=data/quickstart/val block_size=128
    python recipes/evaluate.py model=runs/gla_tiny/hf tasks=piqa,lambada_openai
    python recipes/evaluate.py model=runs/gla_tiny/hf suite=base data_root=benchmarks
"""

import json
import sys
from functools import partial

from flame_composer.config.cli import listen_to_signals, run
from flame_composer.config.parallelism import ParallelismConfig
from flame_composer.config.use import EvaluateConfig


def main(config: EvaluateConfig) -> None:
    from composer.utils import dist, get_device

    from flame_composer.checkpoint.to_model import load_model
    from flame_composer.loader.batches import build_evaluator
    from flame_composer.loader.datasets import open_for_model
    from flame_composer.model.causal_lm import CausalLM
    from flame_composer.text.tokenizer import token_bytes
    from flame_composer.train.charts import require_plot
    from flame_composer.train.parallelism import check_devices
    from flame_composer.use.perplexity import evaluate, plot_by_context, print_result

    listen_to_signals()  # importing Composer replaced the handlers
    check_devices(ParallelismConfig(), precision=config.precision)
    if config.plot:
        require_plot(config.plot)
    dist.initialize_dist(get_device())
    if config.has_tasks:
        from flame_composer.use import benchmarks

        asked = benchmarks.load(config)
    model, tokenizer = load_model(config.model, config.tokenizer, config.base, config.quantize)
    if config.has_tasks:
        move = get_device().module_to_device
        adapter = benchmarks.build_adapter(config, model, tokenizer, asked, move)
    sources = config.datasets or ({"": config.data} if config.data else {})
    opened = partial(open_for_model, tokenizer=tokenizer, varlen=config.varlen)
    datasets = {name: opened(data.local, data.remote) for name, data in sources.items()}
    summary = {"model": config.model}
    results = {}
    for name, data in sources.items():
        evaluator = build_evaluator(datasets[name], data, batch_size=config.batch_size)
        result = results[name] = evaluate(
            CausalLM(model, tokenizer, varlen=config.varlen),
            evaluator,
            precision=config.precision,
            token_bytes=token_bytes(tokenizer),
            block_size=config.block_size,
        )
        if dist.get_global_rank() == 0:
            print_result(name, result)
    if config.data:
        summary |= {"data": config.data.remote or config.data.local, **results[""]}
    elif results:
        summary["datasets"] = results

    if config.has_tasks:
        summary |= benchmarks.score(config, adapter, asked)
    if dist.get_global_rank() == 0:
        print(json.dumps(summary))
        if config.plot:
            plot_by_context(results, config.plot)


if __name__ == "__main__":
    sys.exit(run(main, EvaluateConfig))
