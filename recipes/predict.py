"""Have a model answer the examples of a tuning dataset, and score its answers.

python recipes/predict.py model=runs/sft_tiny/hf data.local=data/tune/val out=runs/sft_tiny/answers
"""

import json
import sys
from pathlib import Path

from flame_composer.config.cli import listen_to_signals, run
from flame_composer.config.use import PredictConfig


def main(config: PredictConfig) -> None:
    from flame_composer.use.metrics import require_metrics, score, table

    require_metrics()
    from composer.utils import dist, get_device

    from flame_composer.checkpoint.to_model import load_model
    from flame_composer.loader.datasets import open_for_model
    from flame_composer.loader.fetch import Shards
    from flame_composer.storage.local import appearing
    from flame_composer.text.chat import with_template
    from flame_composer.use.generate import ends_of_answers
    from flame_composer.use.predict import (
        METRICS,
        open_predictions,
        predict,
        require_free,
        require_tuning_data,
        samples_of,
        settings_of,
    )

    listen_to_signals()  # importing Composer replaced the handlers
    dist.initialize_dist(get_device())
    require_free(config.out)
    model, tokenizer = load_model(config.model, quantize=config.quantize)
    dataset = open_for_model(config.data.local, config.data.remote, tokenizer=tokenizer)
    require_tuning_data(dataset)
    if dataset.manifest.template is not None:
        # Answers end as they do in the examples, even those of a model that was not tuned on any.
        tokenizer = with_template(tokenizer, {"data": dataset.manifest.template})
    shards = Shards([dataset])
    settings = settings_of(
        config,
        model,
        data=dataset.manifest.index_sha256,
        stop=ends_of_answers(model, tokenizer),
    )
    samples = samples_of(map(shards.row, range(shards.num_rows)), turns=config.turns)
    with open_predictions(config.out, settings) as predictions:
        predict(
            get_device().module_to_device(model).eval(),
            tokenizer,
            samples,
            predictions,
            config,
            num_rows=shards.num_rows,
        )
        result = score(predictions.pairs)
        result["ended"] = sum(line["ended"] for line in predictions.lines)
        with appearing(str(Path(config.out, METRICS))) as file:
            file.write((json.dumps(result, indent=1, ensure_ascii=False) + "\n").encode())
    print(table(result))
    ended = f"{result['examples']:,} answers, of which the model ended {result['ended']:,}"
    if result["ended"] < result["examples"]:
        ended += f"; the others have max_new_tokens={config.max_new_tokens} tokens"
    print(ended)
    print(json.dumps({"model": config.model, "data": dataset.place, "out": config.out, **result}))


if __name__ == "__main__":
    sys.exit(run(main, PredictConfig))
