"""What the scripts import, and work out once in a process: done before the tests fork (tests/runs.py), it is not done again."""

from composer.utils.collect_env import get_composer_env_dict

from flame_composer import (
    callbacks,  # noqa: F401
    checkpoint,  # noqa: F401
    cpu,
    data,  # noqa: F401
    evaluate,  # noqa: F401
    executors,  # noqa: F401
    generate,  # noqa: F401
    harness,  # noqa: F401
    model,  # noqa: F401
    optim,  # noqa: F401
    parallelism,  # noqa: F401
    preemption,  # noqa: F401
    publish,  # noqa: F401
    shards,  # noqa: F401
    watch,  # noqa: F401
)

cpu.enable()  # imports fla
get_composer_env_dict()  # what every checkpoint says of the machine
