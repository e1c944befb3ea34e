"""Host time of plan(); benchmarks/results/<gpu>/plan_time.json."""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable
from typing import Any

import flashinfer
import torch

import fi_prefetch

from .baselines import plan_arguments, workspace
from .inputs import DecodeInputs
from .shapes import Shape
from .worker import Context

REPEATS = 100
WRAPPERS: dict[str, Callable[[torch.Tensor], Any]] = {
    "fi_prefetch": fi_prefetch.BatchDecodeWithPagedKVCacheWrapper,
    "flashinfer_cuda_core": flashinfer.BatchDecodeWithPagedKVCacheWrapper,
    "flashinfer_fa2": functools.partial(
        flashinfer.BatchDecodeWithPagedKVCacheWrapper, use_tensor_cores=True, backend="fa2"
    ),
}


def specs() -> list[dict[str, Any]]:
    """Batches of 1 to 256 requests of 2K tokens."""
    return [Shape(32, 8, page, ((2048, batch),)).to_row() for batch in (1, 16, 256) for page in (1, 16)]


def measure(spec: dict[str, Any], context: Context) -> dict[str, Any]:
    """One row: the median host time of a plan like the one before it, as a server plans from step to step."""
    inputs = DecodeInputs(Shape.from_row(spec), context.pool(spec["kv_dtype"]), context.facts.l2_bytes)
    row: dict[str, Any] = {**spec, "us": {}, "missing": {}}
    for name, make in WRAPPERS.items():
        value, reason = context.attempt(name, functools.partial(_median_us, make, inputs))
        row["us"][name] = None if value is None else round(value, 2)
        if reason:
            row["missing"][name] = reason
    return row


def _median_us(make: Callable[[torch.Tensor], Any], inputs: DecodeInputs) -> float:
    wrapper = make(workspace())
    arguments, options = plan_arguments(inputs)
    samples = []
    for _ in range(REPEATS):
        torch.cuda.synchronize()
        start = time.perf_counter()
        wrapper.plan(*arguments, **options)
        samples.append((time.perf_counter() - start) * 1e6)
    return statistics.median(samples[REPEATS // 10 :])
