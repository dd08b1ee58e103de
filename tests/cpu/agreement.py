"""How tests of the CPU operations compare: outputs and gradients, by their relative error."""

import numpy as np
import torch
from torch import Tensor


def relative_error(a: Tensor | np.ndarray, b: Tensor | np.ndarray) -> float:
    assert a.shape == b.shape
    a, b = (torch.as_tensor(x).detach().cpu().double() for x in (a, b))
    return float((a - b).norm() / b.norm().clamp_min(1e-30))


def leaves(*shapes: tuple[int, ...], dtype: torch.dtype = torch.float32) -> list[Tensor]:
    random = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=random).to(dtype).requires_grad_() for shape in shapes]


def assert_same(got, want, inputs: list[Tensor], tolerance: float = 2e-6) -> None:
    """Same outputs, and same gradients under the same random weights on them."""
    got, want = (x if isinstance(x, tuple) else (x,) for x in (got, want))
    weights = [torch.randn(x.shape, generator=torch.Generator().manual_seed(1)) for x in want]
    gradients = []
    for outputs in (got, want):
        total = sum((x.float() * w).sum() for x, w in zip(outputs, weights, strict=True))
        gradients.append(torch.autograd.grad(total, inputs, retain_graph=True))
    for a, b in zip((*got, *gradients[0]), (*want, *gradients[1]), strict=True):
        assert a.dtype == b.dtype
        assert relative_error(a, b) < tolerance
