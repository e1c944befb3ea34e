"""Writes that come after the kernel behind them has started (late_writes.cu)."""

from __future__ import annotations

import functools
import hashlib
from pathlib import Path
from typing import Any

import torch
from flashinfer.jit import gen_jit_spec

SOURCE = Path(__file__).with_suffix(".cu")
DELAY_NANOSECONDS = 30_000


def jit_spec() -> Any:
    digest = hashlib.sha256(SOURCE.read_bytes()).hexdigest()[:8]
    return gen_jit_spec(f"fi_prefetch_late_writes_{digest}", [SOURCE])


@functools.cache
def _module() -> Any:
    return jit_spec().build_and_load()


def write_rows(destination: torch.Tensor, offsets: torch.Tensor, rows: torch.Tensor) -> None:
    """Copies row i of `rows` (uint8 [n, bytes]) to byte offsets[i] (int64 [n]) of `destination` (any dtype), late."""
    _module().write_late(flat_bytes(destination), offsets, rows.contiguous(), DELAY_NANOSECONDS)


def write_all(destination: torch.Tensor, source: torch.Tensor) -> None:
    """Copies `source` over the whole of `destination`, late."""
    zero = torch.zeros(1, dtype=torch.int64, device=destination.device)
    write_rows(destination, zero, flat_bytes(source).view(1, -1))


def flat_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """The bytes of a contiguous tensor: uint8 [n]."""
    return tensor.view(-1).view(torch.uint8)
