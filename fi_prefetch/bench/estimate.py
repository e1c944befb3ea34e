"""What a decode call should take on a GPU that is not here: a prediction, and marked as one wherever it is shown.

The model: a call reads its KV at a share of the GPU's read ceiling, after a fixed cost. Its constants are fitted to the
uniform batches in benchmarks/results/h100/, ours and the best of FlashInfer's at each shape; that they are the same on
other Hopper GPUs is assumed. Single shapes are off by up to a third, and skewed batches are not in it.
"""

from __future__ import annotations

from dataclasses import dataclass

from fi_prefetch.device import describe

from .shapes import Shape

GPUS = {"h100": "NVIDIA H100 80GB HBM3", "h200": "NVIDIA H200", "h20": "NVIDIA H20"}
_HOPPER = ((9, 0), 132, 60 << 20)

# By whether KV is fp8: microseconds, and the share of the read ceiling.
OURS = {False: (5.9, 1.0), True: (7.9, 0.92)}
THEIRS = {False: (8.6, 0.97), True: (10.2, 0.63)}


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
    fp8 = shape.kv_dtype != shape.q_dtype
    ours, theirs = (fixed + floor / share for fixed, share in (by_dtype[fp8] for by_dtype in (OURS, THEIRS)))
    return Estimate(floor, ours, theirs, nominal)
