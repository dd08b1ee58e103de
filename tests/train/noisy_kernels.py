"""recipes/train.py on fla's own kernels in Triton's interpreter, tuned by clocks that disagree.

    TRITON_INTERPRET=1 NOISE=1 python -m tests.train.noisy_kernels yamls/X.yaml [key=value ...]

On a GPU, the candidates of a kernel are timed, and which one is the fastest changes from process to
process. Here it is the first one, or with NOISE=1 the last.
"""

import itertools
import os
import runpy
import sys
from typing import Any

from triton.runtime import driver

from flame_composer.cpu.enable import install_stub_driver


def main() -> None:
    install_stub_driver()
    slower = -1.0 if os.environ["NOISE"] == "1" else 1.0
    clock = itertools.count()

    def timed(_kernel: Any, *, quantiles: tuple[float, ...], **_: Any) -> list[float]:
        return [slower * next(clock)] * len(quantiles)

    driver.active.get_benchmarker = lambda: timed
    sys.argv = ["recipes/train.py", *sys.argv[1:]]
    runpy.run_path("recipes/train.py", run_name="__main__")


if __name__ == "__main__":
    main()
