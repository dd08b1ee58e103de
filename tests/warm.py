"""What the scripts import, and work out once in a process: done before the tests fork (tests/runs.py), it is not done again."""

from composer.utils.collect_env import get_composer_env_dict
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from flame_composer import (
    callbacks,  # noqa: F401
    checkpoint,  # noqa: F401
    cpu,
    data,  # noqa: F401
    evaluate,  # noqa: F401
    executors,  # noqa: F401
    model,  # noqa: F401
    optim,  # noqa: F401
    parallelism,  # noqa: F401
    preemption,  # noqa: F401
    shards,  # noqa: F401
    watch,  # noqa: F401
)

cpu.enable()  # imports fla
list(MODEL_FOR_CAUSAL_LM_MAPPING.values())  # Composer goes through all of them for every model
get_composer_env_dict()  # what every checkpoint says of the machine
