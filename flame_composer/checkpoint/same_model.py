"""A run goes on with the model that its checkpoint was trained as, not only with its shapes."""

from __future__ import annotations

import json
import re
from typing import Any

from flame_composer.checkpoint.parts import Needed, Other
from flame_composer.errors import ConfigError
from flame_composer.model import softcap
from flame_composer.model.hf_config import read_back_hf_config

# Keys that change nothing of what given weights compute: which kernels compute it, how weights are
# stored, what the tokenizer says too, what new weights are drawn from
_FREE = re.compile(
    r"_.*|fuse_.*|attn_mode|use_cache|.*dtype|architectures|transformers_version|.*_token_id"
    r"|.*attn_implementation|initializer_.*|.*init_.*|rescale_prenorm_residual"
    r"|time_step_(min|max|floor)"
)


def require_same_config(held: dict[str, Any], needed: Needed) -> None:
    """Raise Other if the checkpoint's model was built from other numbers than this run's.

    Numbers such as an eps or a cap change what the same weights compute, and no shape shows it.
    `held` is what Composer stores of Hugging Face objects. What it lacks is not compared.
    """
    try:
        content = held["model"]["config"]["content"]
        before = _plain(read_back_hf_config(content, "it").to_dict())
    except (ConfigError, KeyError, TypeError, IndexError):
        return  # of a version that stored it otherwise; shapes are compared all the same
    now = _plain(dict(needed.config or {}))
    for key in sorted(before.keys() & now.keys()):
        if before[key] != now[key] and not _FREE.fullmatch(key):
            raise Other(
                f"its model has {key}={_short(before[key])}, and this run's"
                f" model.config.{key}={_short(now[key])}"
            )


def _plain(config: dict[str, Any]) -> dict[str, Any]:
    """Return a config as JSON has it, in which tuples are lists and keys are texts.

    Most config classes do not know the cap, and hold it only if it is set.
    """
    plain: dict[str, Any] = json.loads(json.dumps(config, default=str))
    return {softcap.KEY: None, **plain}


def _short(value: Any) -> str:
    return json.dumps(value)[:80]
