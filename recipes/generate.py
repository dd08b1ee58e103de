"""Continue a prompt with a trained model.

    python recipes/generate.py model=runs/gla_tiny/hf prompt="def read_lines(path):"
"""

import sys

from flame_composer.cli import run
from flame_composer.recipe_config import GenerateConfig


def main(config: GenerateConfig) -> None:
    import torch
    from transformers import GenerationConfig, TextStreamer

    from flame_composer.checkpoint import load_model

    model, tokenizer = load_model(config.model)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model.to(device).eval()
    torch.manual_seed(config.seed)
    bos, eos, pad = tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id
    ids = tokenizer(config.prompt, add_special_tokens=False, return_tensors="pt").input_ids.to(device)
    if ids.shape[1] == 0:  # nothing to continue: a document starts after the end of the one before it
        ids = torch.tensor([[eos if bos is None else bos]], device=device)
    sampling = {"do_sample": False}
    if config.temperature > 0:
        sampling = {"do_sample": True, "temperature": config.temperature, "top_p": config.top_p, "top_k": config.top_k}
    model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        generation_config=GenerationConfig(
            max_new_tokens=config.max_new_tokens, bos_token_id=bos, eos_token_id=eos,
            pad_token_id=eos if pad is None else pad, **sampling,
        ),
        streamer=TextStreamer(tokenizer, skip_special_tokens=True),
    )


if __name__ == "__main__":
    sys.exit(run(main, GenerateConfig))
