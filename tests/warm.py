"""What the scripts import, and work out once in a process: done before the tests fork
(tests/runs.py), it is not done again.
"""

import torch
from composer.utils.collect_env import get_composer_env_dict

from flame_composer import cpu
from flame_composer.checkpoint import save  # noqa: F401
from flame_composer.cleaning import executors  # noqa: F401
from flame_composer.dataset import writer as shards  # noqa: F401
from flame_composer.export import card as publish  # noqa: F401
from flame_composer.loader import batches as data  # noqa: F401
from flame_composer.model import causal_lm as model  # noqa: F401
from flame_composer.serve import connections, front  # noqa: F401
from flame_composer.serve import prepare as serving  # noqa: F401
from flame_composer.train import guards as watch  # noqa: F401
from flame_composer.train import log as callbacks  # noqa: F401
from flame_composer.train import (
    optim,  # noqa: F401
    parallelism,  # noqa: F401
    preemption,  # noqa: F401
)
from flame_composer.use import benchmarks, generate  # noqa: F401
from flame_composer.use import perplexity as evaluate  # noqa: F401

if not torch.cuda.is_available():  # else CUDA would begin here, and a fork cannot use it
    cpu.enable()  # imports fla
    get_composer_env_dict()  # what every checkpoint says of the machine
