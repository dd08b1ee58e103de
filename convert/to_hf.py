"""Turn a training checkpoint into a Hugging Face folder.

    python convert/to_hf.py checkpoint=runs/gla_tiny/checkpoints out=runs/gla_tiny/hf

The folder holds the config, safetensors, tokenizer, generation config and model card. An adapter
(lora) is merged into its base, or written in peft's layout with merge=false.
"""

import sys
import tempfile
from pathlib import Path

from flame_composer.config.cli import run
from flame_composer.config.convert import ToHfConfig
from flame_composer.errors import InvalidField
from flame_composer.storage.folders import require_new


def main(config: ToHfConfig) -> None:
    out = Path(config.out)
    require_new(out)

    from flame_composer.checkpoint.adapter import adapter_of
    from flame_composer.checkpoint.find import find_checkpoint
    from flame_composer.checkpoint.read import read_checkpoint
    from flame_composer.checkpoint.to_model import model_in, save_hf_folder
    from flame_composer.export import card as publish
    from flame_composer.export.merge import merge, save_adapter_folder
    from flame_composer.model.work import count_parameters
    from flame_composer.text.ends import begin_as_in_training, describe_start

    if config.push_to_hub is not None:
        publish.check_hub(config.push_to_hub)
    with tempfile.TemporaryDirectory() as staging:
        checkpoint = find_checkpoint(config.checkpoint, Path(staging))
        content = read_checkpoint(checkpoint)
        adapter = adapter_of(content, checkpoint.place)
        if adapter is None and config.merge is not None:
            raise InvalidField("merge", f"must be null: {checkpoint.place} holds no adapter (lora)")
        is_merged = config.merge is not False
        model, tokenizer = model_in(content, checkpoint, config.weights, config.base)
        otherwise = "the tokenizer goes out as it is"
        tokenizer = begin_as_in_training(
            tokenizer, checkpoint.place, add_bos=config.add_bos, otherwise=otherwise
        )
        if adapter is not None and is_merged:
            print("\n".join(merge(model, checkpoint.place, dtype=config.dtype)))
        run_config = publish.read_run_config(checkpoint)
        card = publish.model_card(
            model,
            content,
            run_config,
            dtype=config.dtype,
            name=out.name,
            which=config.weights,
            tokenization=describe_start(tokenizer, config.add_bos),
            adapter=adapter,
            is_merged=is_merged,
        )
    if adapter is not None and not is_merged:
        save_adapter_folder(model, adapter, tokenizer, out, dtype=config.dtype, card=card)
        print(f"{checkpoint.place} -> {out}: an adapter for {adapter.base.place}")
        print(f"README.md says how to load it with peft; {out} works as model=... here")
    else:
        size = config.max_shard_size
        save_hf_folder(model, tokenizer, out, dtype=config.dtype, max_shard_size=size, card=card)
        number = f"{count_parameters(model):,}"
        print(f"{checkpoint.place} -> {out}: {number} parameters as {config.dtype}")
        first = "from flame_composer import cpu; cpu.enable()\n" if publish.needs_fla(model) else ""
        print(f"load it with: {first}AutoModelForCausalLM.from_pretrained({str(out)!r})")
    if config.push_to_hub is not None:
        print(
            f"uploaded: {publish.push_folder(out, config.push_to_hub, private=config.hub_private)}"
        )


if __name__ == "__main__":
    sys.exit(run(main, ToHfConfig))
