"""Serve a trained model over HTTP, to clients of OpenAI's API (docs/serving.md).

python recipes/serve.py model=runs/gla_tiny/hf
python recipes/serve.py model=runs/gla_tiny/hf host=0.0.0.0 api_key_env=SERVE_API_KEY
"""

import os
import sys
from pathlib import Path

from flame_composer.config.cli import listen_to_signals, run
from flame_composer.config.serve import ServeConfig
from flame_composer.errors import hide


def main(config: ServeConfig) -> None:
    from flame_composer.serve import texts
    from flame_composer.serve.connections import address_of, bind, page_of, serve

    key = None if config.api_key_env is None else os.environ[config.api_key_env]
    if key is not None:
        hide(key, str(config.api_key_env))
    listener = bind(config.host, config.port)  # before the minutes that a large model takes
    log = None if config.log_texts is None else texts.TextLog(config.log_texts)

    import torch

    from flame_composer.checkpoint.to_model import load_model
    from flame_composer.serve import prefixes
    from flame_composer.serve.app import Service, build_app
    from flame_composer.serve.engine import Engine
    from flame_composer.serve.front import Front
    from flame_composer.serve.metrics import Metrics
    from flame_composer.serve.prepare import Preparation
    from flame_composer.serve.protocol import Limits
    from flame_composer.serve.states import describe, prepare_weights, probe
    from flame_composer.serve.writing import BlockedTexts
    from flame_composer.text.ends import begin_as_in_training

    listen_to_signals()  # importing Composer replaced the handlers
    model, tokenizer = load_model(config.model, base=config.base, quantize=config.quantize)
    otherwise = "nothing is put before a prompt"
    tokenizer = begin_as_in_training(
        tokenizer, config.model, add_bos=config.add_bos, otherwise=otherwise
    )
    model.to("cuda" if torch.cuda.is_available() else "cpu").eval()
    prepare_weights(model, config.max_rows)
    abilities = probe(model)
    for line in (
        describe(abilities, config.max_rows),
        prefixes.describe(model, abilities, config.prefix_cache_bytes),
        texts.describe(config.log_texts),
    ):
        print(line, file=sys.stderr)

    metrics = Metrics()
    engine = Engine(
        model,
        abilities,
        metrics,
        max_rows=config.max_rows,
        max_waiting=config.max_waiting,
        prefill_tokens=config.prefill_tokens,
        prefix_cache_bytes=config.prefix_cache_bytes,
    )
    preparation = Preparation(
        model,
        tokenizer,
        abilities,
        max_prompt_tokens=config.max_prompt_tokens,
        blocked=BlockedTexts(config.blocked),
    )
    limits = Limits(
        max_rows=config.max_rows,
        max_waiting=config.max_waiting,
        max_new_tokens=config.max_new_tokens,
        vocab_size=model.config.vocab_size,
    )
    name = config.served_name or Path(config.model.rstrip("/")).name or "model"
    service = Service(
        name, engine, preparation, limits, config.max_body_bytes, config.request_seconds
    )
    engine.start()
    address = address_of(listener)
    serve(
        Front(build_app(service), key, metrics, log),
        listener,
        engine,
        drain_seconds=config.drain_seconds,
        announce=lambda: print(
            f"{name} is served at {address}/v1 (in a browser: {page_of(listener)})", flush=True
        ),
    )
    preparation.close()
    if log is not None:
        log.close()


if __name__ == "__main__":
    sys.exit(run(main, ServeConfig))
