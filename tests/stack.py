"""What the two stacks of packages (docs/stacks.md) have under other names, for tests."""

from __future__ import annotations

import importlib
import importlib.metadata
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import huggingface_hub.utils
import pytest
from wandb.proto.wandb_internal_pb2 import Record

FLA = tuple(map(int, importlib.metadata.version("fla-core").split(".")[:2]))
TRANSFORMERS = tuple(map(int, importlib.metadata.version("transformers").split(".")[:2]))
TORCH = tuple(map(int, importlib.metadata.version("torch").split(".")[:2]))

# For tests of genuine kernels: chunk_fwd_kernel_h fails there ('int' object has no attribute 'to')
interprets = pytest.mark.skipif(
    FLA >= (0, 6), reason="Triton 3.9's interpreter does not run fla 0.6's kernels of GLA"
)

# huggingface_hub < 1 keeps a session for each thread
_old = hasattr(huggingface_hub.utils, "reset_sessions")
reset_sessions = getattr(huggingface_hub.utils, "reset_sessions" if _old else "close_session")


def backends_on_cpu() -> list[Any]:
    """Return the backends that fla has been given for CPU tensors, one for each function in 0.6."""
    if FLA < (0, 6):
        registries = [importlib.import_module("fla.modules.backends").modules_registry]
    else:
        registries = [*importlib.import_module("fla.backends")._function_registries.values()]
    return [
        backend
        for registry in registries
        for backend in registry._get_sorted_backends()
        if type(backend).__name__ == "TorchCPU"
    ]


def wandb_records(file: Path) -> Iterator[Record]:
    """Yield the records of an offline run's .wandb file, which is a LevelDB log."""
    header, block = 7, 32768
    content = file.read_bytes()
    assert content.startswith(b":W&B")
    at, parts = header, b""
    while at + header <= len(content):
        left = block - at % block
        if left < header:  # padding
            at += left
            continue
        _, size, kind = struct.unpack_from("<IHB", content, at)
        parts += content[at + header : at + header + size]
        at += header + size
        if kind in (1, 4):  # whole, or the last part
            yield Record.FromString(parts)
            parts = b""
