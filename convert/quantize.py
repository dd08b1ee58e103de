"""Write a model with smaller weights, for use on a CPU (docs/quantization.md).

    python convert/quantize.py model=runs/gla_tiny/hf dtype=int8 out=runs/gla_tiny/int8

evaluate, generate, predict, chat and serve.py take the folder as model=... without further keys.
"""

import sys
from pathlib import Path

from flame_composer.config.cli import listen_to_signals, run
from flame_composer.config.convert import QuantizeConfig
from flame_composer.storage.folders import require_new


def main(config: QuantizeConfig) -> None:
    out = Path(config.out)
    require_new(out)

    from flame_composer.checkpoint.to_model import save_hf_folder
    from flame_composer.export.merge import load_merged
    from flame_composer.export.quantize import save_int8_folder
    from flame_composer.model.quantized import quantize

    listen_to_signals()
    model, tokenizer = load_merged(config.model, config.base)
    if config.dtype == "int8":
        quantized = quantize(model, "int8", config.model)
        save_int8_folder(model, quantized.stored, tokenizer, out)
        print(quantized.line)
    else:
        save_hf_folder(model, tokenizer, out, dtype="bfloat16")
    size = sum(file.stat().st_size for file in out.glob("*.safetensors"))
    print(f"{config.model} -> {out}: {config.dtype}, {size:,} bytes of weights")


if __name__ == "__main__":
    sys.exit(run(main, QuantizeConfig))
