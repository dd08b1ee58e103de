"""torch 2.7.0's ways of telling a GPU, answered on a machine that has none."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any
from unittest.mock import patch

import torch


@contextlib.contextmanager
def claimed_device(capability: int) -> Iterator[None]:
    """Make torch say in the body that it has one GPU, such as 90 for sm_90.

    Functions that are made in the body to follow a GPU's autocast follow that of CPU tensors.

    Upstream: torch 2.7.0, `torch.cuda.is_available`, `get_device_capability` and other questions;
    `torch.amp.custom_fwd` and `custom_bwd`.
    Mends: fla decides by their answers, at import, which kernels and configurations there are.
    """
    answers: dict[str, Any] = {
        "is_available": lambda: True,
        "is_bf16_supported": lambda *_, **__: True,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "get_device_name": lambda *_: f"NVIDIA sm_{capability}",
        "get_device_capability": lambda *_: divmod(capability, 10),
    }
    with contextlib.ExitStack() as stack:
        for name, answer in answers.items():
            stack.enter_context(patch.object(torch.cuda, name, answer))
        for name in ("custom_fwd", "custom_bwd"):
            given = getattr(torch.amp, name)
            stack.enter_context(patch.object(torch.amp, name, _for_cpu(given)))
        yield


def _for_cpu(decorator: Any) -> Any:
    @functools.wraps(decorator)
    def decorate(function: Any = None, *, device_type: str, **kwargs: Any) -> Any:  # noqa: ARG001
        return decorator(function, device_type="cpu", **kwargs)

    return decorate
