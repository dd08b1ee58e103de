"""Set the smallest weights of a model's linear layers to zero, in a Hugging Face folder of its own.

    python convert/prune.py model=runs/gla_tiny/hf out=runs/gla_tiny/half sparsity=0.5
    python convert/prune.py model=runs/gla_tiny/hf out=runs/gla_tiny/2of4 pattern=2:4

An experiment: the folder is as large, and its model as fast, as before (docs/pruning.md).
"""

import json
import sys
from pathlib import Path

from flame_composer.config.cli import listen_to_signals, run
from flame_composer.config.convert import PruneConfig
from flame_composer.storage.folders import require_new


def main(config: PruneConfig) -> None:
    out = Path(config.out)
    require_new(out)

    from flame_composer.checkpoint.to_model import save_hf_folder
    from flame_composer.export.merge import load_merged
    from flame_composer.export.prune import describe, prune_model

    listen_to_signals()
    model, tokenizer = load_merged(config.model, config.base)
    report = prune_model(model, config.model, config.sparsity)
    lines = describe(report)
    print(*lines, sep="\n", flush=True)
    how = config.pattern or f"{config.sparsity:g} of each layer"
    card = f"# {out.name}\n\nPruned by magnitude ({how}) with flame_composer:\n\n"
    table = "".join(f"    {line}\n" for line in lines)
    save_hf_folder(model, tokenizer, out, dtype="float32", card=card + table)
    print(f"{config.model} -> {out}: pruned ({how}), stored as float32")
    summary = {
        "out": str(out),
        "layers": len(report.layers),
        "weights": sum(layer.num_weights for layer in report.layers),
        "zeros": sum(layer.num_zeros for layer in report.layers),
        "weights_left_out": report.num_left_out,
    }
    print(json.dumps(summary))


if __name__ == "__main__":
    sys.exit(run(main, PruneConfig))
