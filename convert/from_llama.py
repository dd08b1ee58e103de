"""Turn a Llama or Mistral checkpoint into a GLA model for continual pretraining.

    python convert/from_llama.py model=mistralai/Mistral-7B-v0.1 config=yamls/gla_7b_continual.yaml
        out=runs/gla_7b_continual/start

Train it with model.pretrained set to `out`, as that YAML file does.
"""

import json
import sys
from collections import Counter
from pathlib import Path

from tqdm import tqdm

from flame_composer.config.cli import listen_to_signals, run
from flame_composer.config.convert import FromLlamaConfig
from flame_composer.storage.folders import new_folder, require_new


def main(config: FromLlamaConfig) -> None:
    out = Path(config.out)
    require_new(out)

    from flame_composer.model import transplant
    from flame_composer.model.llama import open_source
    from flame_composer.text.tokenizer import load_tokenizer

    listen_to_signals()
    target = transplant.read_target(config.config)
    source = open_source(config.model)
    tokenizer = load_tokenizer(config.tokenizer or str(source.folder))
    model, plan = transplant.plan_conversion(target, source, tokenizer, config.fresh)
    generation = transplant.build_generation_config(source, model.config)
    transplant.require_space(plan, out)
    print(*transplant.describe(plan), sep="\n", flush=True)

    num_bytes = sum(entry.shape.numel() * entry.dtype.itemsize for entry in plan if entry.target)
    with (
        new_folder(out) as folder,
        tqdm(total=num_bytes, unit="B", unit_scale=True, disable=None) as bar,
    ):
        limit = config.max_shard_size
        transplant.write_weights(
            plan,
            source,
            model,
            folder,
            seed=config.seed,
            max_shard_size=limit,
            on_progress=bar.update,
        )
        for part in (model.config, generation, tokenizer):
            part.save_pretrained(folder)
    tensors = Counter(entry.fate for entry in plan)
    parameters = sum(entry.shape.numel() for entry in plan if entry.target)
    print(f"{config.model} -> {out}: {parameters:,} parameters; train with model.pretrained={out}")
    print(
        json.dumps(
            {
                "out": str(out),
                "parameters": parameters,
                **{fate: tensors[fate] for fate in transplant.FATES},
            }
        )
    )


if __name__ == "__main__":
    sys.exit(run(main, FromLlamaConfig))
