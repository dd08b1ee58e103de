"""The share of a GPU's peak that a model is assumed to reach in training, and why."""

from __future__ import annotations

from typing import NamedTuple

from flame_composer.model.work import Work


class Assumed(NamedTuple):
    """A utilisation (MFU), and where it is from."""

    mfu: float
    source: str


GLA = "https://github.com/fla-org/flash-linear-attention/issues/94"
TABLE = "https://github.com/fla-org/flash-linear-attention/issues/32"
FOUNDRY = "https://github.com/mosaicml/llm-foundry/blob/main/scripts/train/benchmarking"

# By model type, in the FLOPs that plans count. GLA: 15 B tokens of a 340 M model in 12 hours on
# 4 H100 are 87,000 tokens/s each. TABLE: tokens/s of one H100 at 2 x 8192 tokens, taken to be of
# fla's default configs (2048 wide, 24 layers, 1.3 to 1.4 B parameters): delta_net 21,369, hgrn2
# 24,674, gsa 26,958. FOUNDRY: MPT on 8 H100 with 2048 tokens, 760 M 34.9 %, 1 B 41.8 %, 3 B 42 %
# (at 4096), 7 B 46.4 %.
LINEAR = {
    "gla": Assumed(0.18, f"87,000 tokens/s on each H100 with gla-340M: {GLA}"),
    "delta_net": Assumed(0.17, f"21,369 tokens/s on an H100 with about 1.3 B parameters: {TABLE}"),
    "hgrn2": Assumed(0.2, f"24,674 tokens/s on an H100 with about 1.3 B parameters: {TABLE}"),
    "gsa": Assumed(0.22, f"26,958 tokens/s on an H100 with about 1.3 B parameters: {TABLE}"),
    "gated_deltanet": Assumed(0.17, "no figure is known to us; taken as that of delta_net"),
}
# By this package itself, docs/gpu.md; the models above are larger, or were trained by others, with
# larger microbatches.
SMALL = 500_000_000  # multiplied parameters
SMALL_GLA = Assumed(0.1, "gla_340m at 49,697 tokens/s on an H200, 8 rows at a time: docs/gpu.md")
SMALL_SOFTMAX = Assumed(
    0.2, "transformer_340m at 76,102 tokens/s on an H200, 8 rows at a time: docs/gpu.md"
)
# mamba_ssm, whose kernels fla's Mamba models need to be fast, is not among the requirements.
SLOW = Assumed(0.05, "no figure is known to us; fla computes it by steps of PyTorch")
SOFTMAX = Assumed(0.4, f"MPT of 1 to 7 B parameters on 8 H100: {FOUNDRY}")
OTHERS = Assumed(0.17, "no figure is known to us; taken as that of delta_net")


def assumed_mfu(model_type: str, work: Work) -> Assumed:
    """Return the utilisation that a model of this type is assumed to reach on any GPU."""
    if model_type in ("mamba", "mamba2"):
        return SLOW
    is_small = work.multiplied < SMALL
    if work.softmax_heads and model_type not in LINEAR:
        return SMALL_SOFTMAX if is_small else SOFTMAX
    if model_type == "gla" and is_small:
        return SMALL_GLA
    return LINEAR.get(model_type, OTHERS)
