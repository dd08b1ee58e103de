"""Generation by fla's models with transformers 5.24 and later, which call the cache `cache`."""

from __future__ import annotations

import inspect
import logging
from typing import Any

_OLD_NAME = "are deprecated. Use `cache` instead."


def pass_on_the_cache(mixin: Any) -> None:
    """Have models of fla get the cache that `generate` keeps, and say nothing of its old name.

    Upstream: fla 0.6.0, `fla.models.generation_utils.FLAGenerationMixin`.
    Mends: transformers 5.24 calls `past_key_values` `cache`. fla's models do not know it by that
        name, compute each token from nothing, and warn that they use the old one.
    """
    from transformers import GenerationMixin

    theirs = GenerationMixin.prepare_inputs_for_generation
    if "cache" not in inspect.signature(theirs).parameters or hasattr(mixin, "_has_cache_names"):
        return

    def prepare(self: Any, *args: Any, past_key_values: Any = None, **given: Any) -> dict[str, Any]:
        if past_key_values is not None:
            given["cache"] = past_key_values
        inputs: dict[str, Any] = theirs(self, *args, **given)
        if "cache" in inputs:
            inputs["past_key_values"] = inputs.pop("cache")
        return inputs

    # `generate` accepts what the signature of this function has
    prepare.__signature__ = inspect.signature(theirs)  # type: ignore[attr-defined]
    mixin.prepare_inputs_for_generation = prepare
    mixin._has_cache_names = True
    logging.getLogger("transformers.utils.generic").addFilter(
        lambda record: _OLD_NAME not in record.getMessage()
    )
