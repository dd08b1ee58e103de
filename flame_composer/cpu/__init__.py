"""Plain PyTorch versions of fla's operations, used in place of its kernels without a GPU.

Published model cards call `from flame_composer import cpu; cpu.enable()`.
"""

from flame_composer.cpu.coverage import missing, missing_type
from flame_composer.cpu.enable import enable

__all__ = ["enable", "missing", "missing_type"]
