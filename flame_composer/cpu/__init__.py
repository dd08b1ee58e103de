"""Plain PyTorch versions of fla's operations, used in place of its kernels without a GPU.

Published model cards call `from flame_composer import cpu; cpu.enable()`.
"""

from flame_composer.cpu.enable import enable, missing

__all__ = ["enable", "missing"]
