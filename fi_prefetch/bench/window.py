"""The window op: attention after a stretch in which HBM is idle, with and without a prefetch in it; window.json.

A step is an idle kernel of `window_us` (one thread that waits: the stand-in for an all-reduce) and attention; with the
op, `prefetch_kv` runs on a side stream beside the idle kernel, and attention does not wait for it. What attention
costs is a step less the idle kernel alone, all in CUDA graphs over rotating caches; warm is the same on one cache,
which stays in L2 where it fits.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

import fi_prefetch

from . import kernels
from .baselines import Call, prepare_ours
from .grid import verified_timing
from .inputs import DecodeInputs
from .shapes import Shape, parse_lens
from .timing import capture, time_graph
from .worker import Context

WINDOWS_US = (0, 2, 4, 8, 16, 32)
STEPS = 64


def specs() -> list[dict[str, Any]]:
    """Every window before calls of 1 MB to 256 MB of KV."""
    shapes = [
        Shape(heads_q, heads_kv, 1, parse_lens(lens))
        for heads_q, heads_kv, lens in (
            (8, 1, "1x2K"),
            (32, 8, "1x2K"),
            (8, 1, "64x512"),
            (32, 8, "8x1K"),
            (8, 1, "64x2K"),
            (32, 8, "32x2K"),
        )
    ]
    return [{**shape.to_row(), "window_us": window} for shape in shapes for window in WINDOWS_US]


def measure(spec: dict[str, Any], context: Context) -> dict[str, Any]:
    """One row: attention's time without the op, with it, and with the KV in L2 already."""
    shape, nanoseconds = Shape.from_row(spec), int(spec["window_us"] * 1000)
    inputs = DecodeInputs(shape, context.pool(shape.kv_dtype), context.facts.l2_bytes)
    wrapper, call = prepare_ours(inputs)
    verified_timing(inputs, call)
    steps = -(-STEPS // inputs.copies) * inputs.copies
    idle_us = _time(lambda: _idle(inputs.out, nanoseconds, steps), steps) if nanoseconds else 0.0
    row: dict[str, Any] = {**spec, "floor_us": round(context.floor_us(shape.kv_bytes), 3), "idle_us": round(idle_us, 3)}
    for name, prefetch, caches in (
        ("off_us", False, inputs.copies),
        ("on_us", True, inputs.copies),
        ("off_again_us", False, inputs.copies),
        ("warm_us", False, 1),
    ):
        timed_steps = functools.partial(_steps, wrapper, inputs, call, nanoseconds, steps, prefetch, caches)
        value, reason = context.attempt(name, functools.partial(_time, timed_steps, steps))
        row[name] = None if value is None else round(value - idle_us, 3)
        if reason:
            row.setdefault("missing", {})[name] = reason
    row["levers"] = wrapper.prefetch_plan.codes()
    return row


def _time(calls: Callable[[], None], steps: int) -> float:
    return time_graph(capture(calls), steps).us


def _idle(any_tensor: torch.Tensor, nanoseconds: int, steps: int) -> None:
    for _ in range(steps):
        kernels.module().idle(any_tensor, nanoseconds)


def _steps(
    wrapper: Any, inputs: DecodeInputs, call: Call, nanoseconds: int, steps: int, prefetch: bool, caches: int
) -> None:
    side = torch.cuda.Stream()
    for i in range(steps):
        cache = i % caches
        if prefetch and not fi_prefetch.prefetch_kv(wrapper, inputs.cache(cache), stream=side):
            raise RuntimeError("prefetch_kv launched nothing")
        if nanoseconds:
            kernels.module().idle(inputs.out, nanoseconds)
        call(cache)
    if prefetch:
        torch.cuda.current_stream().wait_stream(side)  # a capture ends with every stream joined
