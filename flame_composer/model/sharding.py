"""A model spread over devices: how FSDP2 shards it, and what of its blocks is recomputed."""

from __future__ import annotations

import warnings

from composer.distributed.activation_checkpointing import apply_ac, generate_composer_model_check_fn
from composer.models import ComposerModel

from flame_composer.config.parallelism import FsdpConfig, ParallelismConfig
from flame_composer.upstream.composer import Sharding


def sharding_of(config: FsdpConfig, *, num_nodes: int) -> Sharding:
    """Return what Composer shards a model by."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "FSDP2 Config/APIs are experimental", UserWarning)
        sharding = Sharding(
            reshard_after_forward=config.sharding_strategy != "SHARD_GRAD_OP",
            mixed_precision=config.mixed_precision,
            # Composer loads only full state dicts; checkpoint.sharded loads pieces.
            state_dict_type="full",
        )
    if config.sharding_strategy == "HYBRID_SHARD":
        sharding.replicas = config.replicas or num_nodes
    return sharding


def recompute_blocks(model: ComposerModel, config: ParallelismConfig) -> ComposerModel:
    """Return the model with its blocks' activations recomputed or offloaded, as `config` says.

    The names of its weights do not change.
    """
    if config.activation_checkpointing or config.activation_cpu_offload:
        chosen = generate_composer_model_check_fn(model)
        apply_ac(model, config.activation_checkpointing, config.activation_cpu_offload, chosen)
    return model
