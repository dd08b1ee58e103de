"""The section `parallelism` of recipes/train.py's configuration: devices, and what each holds."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from flame_composer.config.rules import require

LEAST_TOKENS = 16  # of a row on one device: more than a short convolution looks back
NEED_WHOLE_ROWS = frozenset({"seq_length_warmup"})  # algorithms


@dataclass
class FsdpConfig:
    """Fully sharded data parallelism, by torch's FSDP2."""

    sharding_strategy: Literal["FULL_SHARD", "SHARD_GRAD_OP", "HYBRID_SHARD"] = "FULL_SHARD"
    """Sharding over devices. FULL_SHARD: of parameters, gradients and optimizer state.
    SHARD_GRAD_OP: the same, but a block's parameters stay gathered from its forward to its
    backward pass. HYBRID_SHARD: as FULL_SHARD, within each of several replicas of the model.
    """
    replicas: int | None = None
    """Number of copies of the model with HYBRID_SHARD, each sharded over devices / replicas
    devices; one per machine if not set.
    """
    mixed_precision: Literal["PURE", "DEFAULT", "FULL"] = "PURE"
    """Arithmetic of gradients with precision=amp_bf16. PURE: computed and reduced in bf16.
    DEFAULT: computed in bf16 and reduced in fp32. FULL: neither in bf16. Weights stay fp32.
    """
    state_dict_type: Literal["full", "sharded"] = "sharded"
    """Form of checkpoints. sharded: a folder with a piece from every rank, for which save_folder
    must be shared by all machines or be in an object store. full: one file, for which the first
    rank gathers all weights and optimizer state. Either is read by any number of devices, with or
    without fsdp.
    """

    def validate(self) -> None:
        require(
            self.replicas is None or self.sharding_strategy == "HYBRID_SHARD",
            "replicas",
            "must be null unless sharding_strategy=HYBRID_SHARD",
        )
        require(self.replicas is None or self.replicas > 0, "replicas", "must be more than 0")


@dataclass
class ParallelismConfig:
    """Distribution of the model over devices, and memory saved on each."""

    fsdp: FsdpConfig | None = None
    """Fully sharded data parallelism (torch's FSDP2); plain data parallelism if not set."""
    activation_checkpointing: bool = False
    """Recompute each block in the backward pass instead of keeping its activations, which saves
    memory and costs about a third more work.
    """
    activation_cpu_offload: bool = False
    """Keep activations for the backward pass in the machine's memory instead of the GPU's."""
    compile: bool = False
    """Compile the model with torch.compile."""
    tensor: int = 1
    """Devices that each layer is divided over (tensor parallelism), which train on the same rows;
    must divide the model's heads. For gla, gated_deltanet, transformer and llama, with fsdp.
    """
    context: int = 1
    """Devices that the tokens of each row are divided over (context parallelism), which pass on the
    recurrent state; for rows too long for one device, with microbatch_size=1.
    """
    gradient_compression: Literal["bf16"] | None = None
    """Numbers that gradients travel in without fsdp: bf16, half the bytes; fp32 if not set."""
    cpu_fallback: bool = False
    """Train with plain data parallelism where there is no GPU, even if fsdp is set."""
    cpu_fsdp: bool = False
    """Shard over processes (by gloo) where there is no GPU. This saves no time; it is for trying
    out what GPUs will do.
    """

    def validate(self) -> None:
        for name in ("tensor", "context"):
            rule = "must be 1 device or more"
            require(getattr(self, name) > 0, name, rule)
        has_shards = self.tensor == 1 or self.fsdp is not None
        rule = "needs parallelism.fsdp={}, whose shards are divided further; set it, or tensor=1"
        require(has_shards, "tensor", rule)
        require(
            not (self.cpu_fallback and self.cpu_fsdp),
            "cpu_fsdp",
            "must not be set together with cpu_fallback",
        )
        require(
            self.gradient_compression is None or self.fsdp is None or self.cpu_fallback,
            "gradient_compression",
            "must be null with parallelism.fsdp, which has mixed_precision for it",
        )

    @property
    def together(self) -> int:
        """The number of devices that work on the same rows."""
        return self.tensor * self.context

    def check_rows(
        self,
        devices: int,
        *,
        global_batch_size: int,
        microbatch_size: int | str,
        context_length: int,
    ) -> None:
        """Raise InvalidField if the rows of a run cannot be divided over so many devices."""
        together = self.together
        key = "parallelism.context" if self.context > 1 else "parallelism.tensor"
        rule = f"tensor x context = {self.tensor} x {self.context} must divide the {devices}"
        require(devices % together == 0, key, f"{rule} devices")
        if self.context > 1:
            self._check_context(microbatch_size, context_length)
        places, among, all_places = devices // together, "devices", f"the {devices} devices"
        if together > 1:
            among = "devices / (parallelism.tensor x context)"
            all_places = f"{among} = {places}"
        if isinstance(microbatch_size, int):
            rows = places * microbatch_size
            product = f"{among} x microbatch_size = {places} x {microbatch_size} = {rows}"
            rule = f"must be a multiple of {product}"
            require(global_batch_size % rows == 0, "global_batch_size", rule)
        rule = f"must be a multiple of {all_places}"
        require(global_batch_size % places == 0, "global_batch_size", rule)

    def _check_context(self, microbatch_size: int | str, context_length: int) -> None:
        key, what = "parallelism.context", f"context_length={context_length}"
        require(context_length % self.context == 0, key, f"must divide {what}")
        tokens = context_length // self.context
        rule = f"leaves {tokens} tokens of {what} to a device; must leave {LEAST_TOKENS} at least"
        require(tokens >= LEAST_TOKENS, key, rule)
        rule = "must be 1 with parallelism.context, which is for rows too long for one device"
        require(microbatch_size == 1, "microbatch_size", rule)
        require(not self.compile, "parallelism.compile", "must be false with parallelism.context")

    def check_division(
        self, eval_batch_size: int | None, algorithms: Iterable[str], *, has_tasks: bool
    ) -> None:
        """Raise InvalidField for what needs whole rows on a device, if those are divided."""
        if self.context == 1:
            return
        rule = "must be 1 with parallelism.context, which is for rows too long for one device"
        require(eval_batch_size in (None, 1), "eval_batch_size", rule)
        rule = "must be null with parallelism.context: evaluate checkpoints with"
        require(not has_tasks, "eval_tasks", f"{rule} recipes/evaluate.py")
        rule = "must not be set together with parallelism.context, which divides rows"
        for each in NEED_WHOLE_ROWS.intersection(algorithms):
            require(False, f"algorithms.{each}", rule)
