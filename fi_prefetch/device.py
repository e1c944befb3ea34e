"""Facts about a GPU that decide which kernel runs and how far it prefetches."""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class GpuFacts:
    """What one GPU is.

    Attributes:
        name: as the driver reports it.
        key: short name used for result files and tuning, "h100", "h200", "h20", ...
        capability: compute capability, (9, 0) for Hopper.
        sm_count: streaming multiprocessors visible to this process (fewer under MIG).
        l2_bytes: L2 cache size in bytes.
        read_ceiling_gbs: HBM read bandwidth in GB/s a kernel can reach; None where it is not known.
        ceiling_is_nominal: True where `read_ceiling_gbs` is the data sheet's figure and not a measurement.
    """

    name: str
    key: str
    capability: tuple[int, int]
    sm_count: int
    l2_bytes: int
    read_ceiling_gbs: float | None
    ceiling_is_nominal: bool


# Longest name first where one is a prefix of another: an H200 is not an H20.
_KEYS = ("GH200", "GB200", "H200", "H100", "H800", "H20", "B200", "A100", "A800", "L40S", "L40", "L4", "A10G", "A10")
# (GB/s, nominal). The 80 GB HBM3 H100; the PCIe and NVL boards have other memory.
_READ_CEILING_GBS = {"h100": (3050.0, False), "h200": (4500.0, False), "h20": (4000.0, True)}
_OTHER_H100_MEMORY = re.compile(r"PCIe|NVL|MIG", re.IGNORECASE)


def describe(name: str, capability: tuple[int, int], sm_count: int, l2_bytes: int) -> GpuFacts:
    """The facts that follow from what the driver reports about a GPU."""
    key = next((k.lower() for k in _KEYS if re.search(rf"\b{k}\b", name)), None)
    ceiling, nominal = _READ_CEILING_GBS.get(key or "", (None, False))
    if _OTHER_H100_MEMORY.search(name):
        ceiling, nominal = None, False
    if key is None:
        key = re.sub(r"[^a-z0-9]+", "-", name.lower().replace("nvidia", "")).strip("-") or "gpu"
    return GpuFacts(name, key, capability, sm_count, l2_bytes, ceiling, nominal)


@functools.cache
def _facts_of_index(index: int) -> GpuFacts:
    properties = torch.cuda.get_device_properties(index)
    return describe(
        properties.name,
        (properties.major, properties.minor),
        properties.multi_processor_count,
        properties.L2_cache_size,
    )


def facts(device: torch.device) -> GpuFacts | None:
    """The facts of a CUDA device; None for any other device, which has no kernel of ours to run."""
    if device.type != "cuda":
        return None
    return _facts_of_index(torch.cuda.current_device() if device.index is None else device.index)
