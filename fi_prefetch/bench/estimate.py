"""What a decode call should take on a GPU that is not here: a prediction, and marked as one wherever it is shown.

The model: a call reads its KV at a share of the GPU's read ceiling, after a fixed cost. Its constants come from
measurements on an H200 with KV cold in L2, uniform batches, bf16, page size 1: an untuned split-KV kernel of our kind
took 5 us and read at 94 %, the best of FlashInfer's backends 10 us and 93 %, for fp8 KV 52 %. Our share for fp8 KV is a
guess, the same as for bf16. Skewed batches cost FlashInfer more than this says.
"""

from __future__ import annotations

from dataclasses import dataclass

from fi_prefetch.device import describe

from .shapes import Shape

GPUS = {"h100": "NVIDIA H100 80GB HBM3", "h200": "NVIDIA H200", "h20": "NVIDIA H20"}
_HOPPER = ((9, 0), 132, 60 << 20)

OUR_FIXED_US, OUR_SHARE = 5.0, 0.94
THEIR_FIXED_US, THEIR_SHARE, THEIR_FP8_SHARE = 10.0, 0.93, 0.52


@dataclass(frozen=True)
class Estimate:
    """A prediction for one shape, in microseconds. `nominal`: the ceiling is a data sheet's, not a measurement."""

    floor_us: float
    fi_prefetch_us: float
    flashinfer_us: float
    nominal: bool


def read_ceiling_gbs(gpu: str) -> tuple[float, bool]:
    """The read ceiling of a GPU by its short name, in GB/s, and whether it is nominal; ValueError for another name."""
    if gpu not in GPUS:
        raise ValueError(f"gpu: expected one of {', '.join(GPUS)}, got {gpu!r}")
    facts = describe(GPUS[gpu], *_HOPPER)
    assert facts.read_ceiling_gbs is not None
    return facts.read_ceiling_gbs, facts.ceiling_is_nominal


def estimate(shape: Shape, gpu: str) -> Estimate:
    """The prediction for a shape on "h100", "h200" or "h20"."""
    ceiling, nominal = read_ceiling_gbs(gpu)
    floor = shape.kv_bytes / ceiling / 1e3
    their_share = THEIR_SHARE if shape.kv_dtype == shape.q_dtype else THEIR_FP8_SHARE
    return Estimate(floor, OUR_FIXED_US + floor / OUR_SHARE, THEIR_FIXED_US + floor / their_share, nominal)
