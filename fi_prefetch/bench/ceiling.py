"""The read ceiling: how fast this GPU's HBM can be read, measured in the same process as everything else.

A grid of blocks reads a buffer many times the size of L2 once, every thread with several independent 16-byte loads that
bypass L1, and folds what it read so that no load can be left out. Several grids and depths are tried on random data and
the fastest median counts: a ceiling is what reading can reach, and a poor reader would flatter the kernels under it.
"""

from __future__ import annotations

import functools

import torch

from . import kernels
from .timing import time_calls

BUFFER_BYTES = 8 << 30
LARGEST_SHARE_OF_FREE = 0.5
BLOCKS_PER_SM = (1, 2, 4, 8)
LOADS = (4, 8, 16)


def random_bytes(count: int, device: torch.device) -> torch.Tensor:
    """`count` random bytes (a multiple of 8) on `device`: uint8 [count]."""
    return torch.randint(-(1 << 62), 1 << 62, (count // 8,), dtype=torch.int64, device=device).view(torch.uint8)


def read_ceiling_gbs(sm_count: int) -> float:
    """Measures the read ceiling of the current GPU in GB/s (10^9 bytes a second)."""
    device = torch.device("cuda")
    free, _ = torch.cuda.mem_get_info()
    size = min(BUFFER_BYTES, int(free * LARGEST_SHARE_OF_FREE)) & ~0xFFFFFF
    buffer, sink = random_bytes(size, device), torch.zeros(1, dtype=torch.int32, device=device)
    read = kernels.module().read

    def read_once(grid: int, loads: int, _: int) -> None:
        read(buffer, sink, grid, loads)

    fastest_us = min(
        time_calls(functools.partial(read_once, sm_count * blocks, loads), 1, replays=5).us
        for blocks in BLOCKS_PER_SM
        for loads in LOADS
    )
    return size / fastest_us / 1e3
