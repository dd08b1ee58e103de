"""fla without a GPU: its operations in plain PyTorch, and what puts them in the place of its
kernels.

`from flame_composer import cpu; cpu.enable()`, as published model cards have it.
"""

from flame_composer.cpu.enable import enable, missing

__all__ = ["enable", "missing"]
