"""Cross-entropy losses of fla in plain PyTorch, for tensors on a CPU."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from flame_composer.cpu.linear import layer_product, weight_gradient


def cross_entropy_loss(
    logits: Tensor,
    target: Tensor,
    label_smoothing: float = 0.0,
    logit_scale: float = 1.0,
    lse_square_scale: float = 0.0,
    logit_softcapping: float | None = None,
    ignore_index: int = -100,
    inplace_backward: bool = False,
    process_group: Any = None,
) -> tuple[Tensor, Tensor]:
    """Return the loss, which includes the z-loss, and the z-loss of each token, `[N]` each.

    Unlike fla's function, it never overwrites the logits.
    """
    if process_group is not None:
        raise NotImplementedError("cross-entropy over a sharded vocabulary needs a GPU")
    logits = logits.float() * logit_scale if logit_scale != 1 else logits.float()
    if logit_softcapping:
        logits = logit_softcapping * torch.tanh(logits / logit_softcapping)
    losses = F.cross_entropy(
        logits, target, ignore_index=ignore_index, reduction="none", label_smoothing=label_smoothing
    )
    if not lse_square_scale:
        return losses, torch.zeros_like(losses)
    z_losses = (lse_square_scale * logits.logsumexp(-1) ** 2).masked_fill(target == ignore_index, 0)
    return losses + z_losses, z_losses.detach()


def cross_entropy_forward(
    self: Any,
    input: Tensor,
    target: Tensor,
    compute: Callable[..., tuple[Tensor, Tensor]] = cross_entropy_loss,
) -> Any:
    """Stand in for `FusedCrossEntropyLoss.forward`, which refuses CPU tensors before it dispatches.

    `self` is the FusedCrossEntropyLoss, whose settings are used. `compute` returns the losses and
    z-losses of tokens.
    """
    losses, z_losses = compute(
        input,
        target,
        self.label_smoothing,
        self.logit_scale,
        self.lse_square_scale,
        self.logit_softcapping,
        self.ignore_index,
    )
    if self.reduction != "none":
        losses, z_losses = losses.sum(), z_losses.sum()
    if self.reduction == "mean":
        count = (target != self.ignore_index).sum()
        losses, z_losses = losses / count, z_losses / count
    return (losses, z_losses) if self.return_z_loss else losses


def genuine_cross_entropy_forward(self: Any, input: Tensor, target: Tensor) -> Any:
    """Compute `FusedCrossEntropyLoss.forward` by fla's own kernels, for tensors of any device."""
    from fla.modules.fused_cross_entropy import cross_entropy_loss as genuine

    in_place = functools.partial(genuine, inplace_backward=self.inplace_backward)
    return cross_entropy_forward(self, input, target, in_place)


def fused_linear_cross_entropy_forward(
    x: Tensor,
    target: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    logit_scale: float = 1.0,
    logit_softcapping: float | None = None,
    num_chunks: int = 8,
    reduction: str = "mean",
    use_l2warp: bool = False,
    l2_penalty_factor: float = 1e-4,
    accumulate_grad_in_fp32: bool = True,
    process_group: Any = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Return the summed or mean loss, and its gradients for x `[N, D]`, weight and bias.

    The tokens are processed in `num_chunks` groups, one group at a time.
    """
    if process_group is not None:
        raise NotImplementedError("cross-entropy over a sharded vocabulary needs a GPU")
    dx = torch.empty_like(x)
    grad_dtype = torch.float32 if accumulate_grad_in_fp32 else weight.dtype
    dw = torch.zeros_like(weight, dtype=grad_dtype)
    db = None if bias is None else torch.zeros_like(bias, dtype=grad_dtype)
    total = target.ne(ignore_index).sum() if reduction == "mean" else 1
    loss = x.new_zeros((), dtype=torch.float32)
    size = -(-len(x) // num_chunks)
    for x_c, target_c, dx_c in zip(x.split(size), target.split(size), dx.split(size), strict=True):
        logits = layer_product(x_c, weight, bias).detach().requires_grad_()
        with torch.enable_grad():
            losses, _ = cross_entropy_loss(
                logits, target_c, label_smoothing, logit_scale, 0.0, logit_softcapping, ignore_index
            )
            loss_c = losses.sum() / total
        (dlogits,) = torch.autograd.grad(loss_c, logits)
        loss += loss_c.detach()
        if use_l2warp:
            largest, index = logits.detach().max(-1, keepdim=True)
            dlogits.scatter_add_(-1, index, largest * (l2_penalty_factor / len(x)))
        dx_c.copy_(layer_product(dlogits, weight.t()))
        dw += weight_gradient(dlogits.to(grad_dtype), x_c.to(grad_dtype))
        if db is not None:
            db += dlogits.sum(0, dtype=grad_dtype)
    return loss, dx, dw.to(weight.dtype), None if db is None or bias is None else db.to(bias.dtype)


def fused_linear_cross_entropy_backward(
    do: Tensor, dx: Tensor, dw: Tensor, db: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return the gradients of x, weight and bias, scaled by the loss's own gradient `do`."""
    return dx * do, dw * do, None if db is None else db * do
