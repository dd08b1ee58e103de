"""A tiny model that says given answers, since it was trained on nothing else."""

from __future__ import annotations

from pathlib import Path

import torch

from flame_composer.model.build import build_model
from flame_composer.model.hf_config import build_hf_config
from flame_composer.text.bpe import train_bpe
from flame_composer.text.chat import CHATML
from flame_composer.text.ends import Ends, with_ends

GLA = {
    "model_type": "gla",
    "hidden_size": 128,
    "num_hidden_layers": 2,
    "num_heads": 2,
    "use_short_conv": True,
}
GOOD_ENOUGH = 0.02  # nats for each token: a greedy text is then the one it was trained on
MOST_STEPS = 600


def speak(folder: Path, conversations: list[list[str]]) -> None:
    """Save a model whose likeliest text after the beginning of a conversation is how it goes on.

    The texts of a conversation are the user's and the model's in turn.
    """
    texts = [text for conversation in conversations for text in conversation]
    tokenizer = train_bpe(texts * 3, vocab_size=700, min_frequency=2, eos_token="<|endoftext|>")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template = CHATML
    tokenizer = with_ends(tokenizer, Ends(bos=False, eos=True))
    rows = []
    for conversation in conversations:
        messages = [
            {"role": ("user", "assistant")[place % 2], "content": text}
            for place, text in enumerate(conversation)
        ]
        ids = tokenizer.apply_chat_template(messages, return_dict=False)
        rows.append(torch.tensor(ids))
    longest = max(map(len, rows))
    torch.manual_seed(0)
    config = build_hf_config({**GLA, "vocab_size": len(tokenizer)}, tokenizer, longest)
    model = build_model(config)
    inputs = torch.stack([torch.nn.functional.pad(row, (0, longest - len(row))) for row in rows])
    ends = torch.tensor([[len(row)] for row in rows])
    labels = inputs.masked_fill(torch.arange(longest) >= ends, -100)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.0)
    for _ in range(MOST_STEPS):
        loss = model(inputs, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if loss.item() < GOOD_ENOUGH:
            break
    assert loss.item() < GOOD_ENOUGH, f"it has not learned what to say: {loss.item():.3f}"
    model.eval().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
