"""Long rows are computed in pieces: what comes out is what one piece gives, at less memory."""

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig

from flame_composer import cpu
from flame_composer.cpu import chunks
from flame_composer.model.build import build_model

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:According to Bo"),
]

MODELS = {
    "mamba2": {"num_heads": 4, "head_dim": 32, "state_size": 16},
    "rwkv7": {"head_dim": 32},
    "gated_deltanet": {"num_heads": 2, "head_dim": 32},
    "gated_deltaproduct": {"num_heads": 2, "head_dim": 32},
    "kda": {"num_heads": 2, "head_dim": 32},
}


def build(name: str) -> nn.Module:
    cpu.enable()
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "vocab_size": 97}
    model = build_model(AutoConfig.for_model(name, **sizes, **MODELS[name]))
    with torch.no_grad():
        for parameter in model.parameters():
            # RWKV-7 begins with weights of 0, behind which nothing would be seen
            parameter.add_(torch.randn_like(parameter), alpha=0.02)
    return model.train()


def step(model: nn.Module, offsets: list[int] | None, num_rows: int) -> dict[str, Tensor]:
    """Return the logits and the gradients of all parameters."""
    torch.manual_seed(1)
    ids = torch.randint(0, 97, (num_rows, 203))
    model.zero_grad()
    cu_seqlens = {} if offsets is None else {"cu_seqlens": torch.tensor(offsets)}
    logits = model(input_ids=ids, use_cache=False, **cu_seqlens).logits
    logits.square().mean().backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {"logits": logits.detach(), **gradients}


@pytest.mark.parametrize("offsets", [None, [0, 1, 63, 100, 180, 203]], ids=["rows", "packed"])
@pytest.mark.parametrize("name", MODELS)
def test_pieces_give_what_the_whole_row_does(name, offsets, monkeypatch):
    if name == "mamba2" and offsets is not None:
        pytest.skip("fla's mamba2 does not keep the documents of a row apart")
    model, num_rows = build(name), 2 if offsets is None else 1
    monkeypatch.setattr(chunks, "TOKENS_AT_A_TIME", 1 << 20)
    assert len(chunks.pieces(num_rows, 203)) == 1
    whole = step(model, offsets, num_rows)
    monkeypatch.setattr(chunks, "TOKENS_AT_A_TIME", 64 * num_rows)
    assert chunks.pieces(num_rows, 203) == [(0, 64), (64, 128), (128, 203)]
    pieces = step(model, offsets, num_rows)
    assert whole.keys() == pieces.keys()
    for key, expected in whole.items():
        assert expected.norm() > 0, key
        assert (pieces[key] - expected).norm() <= 1e-5 * expected.norm(), key


def test_decoding_with_mamba2_changes_no_parameter():
    """A token of one row is as large as the convolution's bias."""
    model = build("mamba2").eval()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    cache = None
    for _ in range(2):
        outputs = model(input_ids=torch.ones(1, 1, dtype=torch.long), past_key_values=cache)
        cache = outputs.past_key_values
    assert all(torch.equal(before[name], p) for name, p in model.named_parameters())


def test_what_mamba2_keeps_of_a_token(monkeypatch):
    """For the backward pass: each of its widths once or twice."""
    monkeypatch.setattr(chunks, "TOKENS_AT_A_TIME", 64)
    layer = build("mamba2").backbone.layers[0].mixer
    saved: dict[int, int] = {}

    def pack(x: Tensor) -> Tensor:
        saved[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    x = torch.randn(1, 512, 64, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        y = layer(x)[0]
    parameters = {p.data_ptr() for p in layer.parameters()}
    kept = sum(size for pointer, size in saved.items() if pointer not in parameters)
    projected, mixed, inner = 128 + (128 + 32) + 4, 128 + 32, 128
    # A piece of 64 tokens has its scores, decays and masks, and the states in it
    piece = 2 * 4 * 64 + 64 + 16 + 2 * 16 * 128 // 64
    # The convolution's output and its activation; dt * x, and what goes into norm and out_proj
    widths = 64 + projected + 2 * mixed + 3 * inner + piece
    assert y.shape == x.shape
    assert kept <= 1.15 * 4 * 512 * widths
