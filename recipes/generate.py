"""Continue a prompt, each prompt in a file, or whatever is typed, with a trained model.

python recipes/generate.py model=runs/gla_tiny/hf prompt="def read_lines(path):"
python recipes/generate.py model=runs/gla_tiny/hf prompts=prompts.txt batch_size=16 > written.jsonl
python recipes/generate.py model=runs/gla_tiny/hf
"""

import json
import signal
import sys
from functools import partial

from flame_composer.config.cli import listen_to_signals, run
from flame_composer.config.use import GenerateConfig
from flame_composer.lines import write_content


def main(config: GenerateConfig) -> None:
    import torch

    from flame_composer.checkpoint.to_model import load_model
    from flame_composer.text.ends import begin_as_in_training, describe_start, ends_of
    from flame_composer.use.generate import (
        asked,
        build_sampling,
        continue_prompts,
        in_batches,
        read_prompts,
    )

    listen_to_signals()
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # so that `| head` ends the script quietly
    prompts = read_prompts(config.prompts) if config.prompts else []
    model, tokenizer = load_model(config.model, base=config.base, quantize=config.quantize)
    otherwise = "nothing is put before a prompt"
    tokenizer = begin_as_in_training(
        tokenizer, config.model, add_bos=config.add_bos, otherwise=otherwise
    )
    if ends_of(tokenizer) is not None:
        print(describe_start(tokenizer, config.add_bos), file=sys.stderr)
    model.to("cuda" if torch.cuda.is_available() else "cpu").eval()
    torch.manual_seed(config.seed)
    proceed = partial(
        continue_prompts,
        model,
        tokenizer,
        sampling=build_sampling(config, tokenizer),
        repetition_penalty=config.repetition_penalty,
        stop=config.stop,
    )
    try:
        if config.prompt is not None:
            write_content(config.prompt)
            proceed([config.prompt], show=write_content)
            write_content("\n")
        for batch in in_batches(prompts, config.batch_size):
            for prompt, completion in zip(batch, proceed(batch), strict=True):
                write_content(json.dumps({"prompt": prompt, "completion": completion}) + "\n")
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)
    if config.prompt is None and not prompts:
        # From now on Ctrl-C may come any number of times, to cut answers short.
        signal.signal(signal.SIGINT, signal.default_int_handler)
        for prompt in asked():
            try:
                write_content(prompt)
                proceed([prompt], show=write_content)
            except KeyboardInterrupt:  # ends this answer; at the prompt it ends the session
                pass
            write_content("\n")


if __name__ == "__main__":
    sys.exit(run(main, GenerateConfig))
