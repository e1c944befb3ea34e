"""On how many SMs a stream's kernels run (few_sms.cu)."""

from __future__ import annotations

import functools
import hashlib
from pathlib import Path
from typing import Any

import torch
from flashinfer.jit import gen_jit_spec

SOURCE = Path(__file__).with_suffix(".cu")


def jit_spec() -> Any:
    digest = hashlib.sha256(SOURCE.read_bytes()).hexdigest()[:8]
    return gen_jit_spec(f"fi_prefetch_few_sms_{digest}", [SOURCE])


@functools.cache
def _module() -> Any:
    return jit_spec().build_and_load()


def count_sms(stream: torch.cuda.Stream) -> int:
    """How many SMs of its GPU a kernel in the stream runs on that has far more blocks than the GPU has SMs."""
    sms = torch.cuda.get_device_properties(stream.device).multi_processor_count
    marks = torch.zeros(2 * sms, dtype=torch.int32, device=stream.device)  # SMs' numbers may have gaps
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        _module().mark_sms(marks, 8 * sms)
    torch.cuda.synchronize()
    return int(marks.sum())
