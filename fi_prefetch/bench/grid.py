"""The grid: every shape on every kernel, in one process; benchmarks/results/<gpu>/grid.json."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from . import kernels
from .baselines import BASELINES, Call, prepare_ours
from .inputs import DecodeInputs
from .shapes import Shape
from .timing import Timing, time_calls
from .worker import Context, check_error


def specs(shapes: list[Shape]) -> list[dict[str, Any]]:
    """The rows to measure. Shapes of one KV dtype come together: a pool of random KV serves all of them."""
    return [shape.to_row() for shape in sorted(shapes, key=lambda shape: shape.kv_dtype)]


def verified(inputs: DecodeInputs, call: Call) -> float:
    """The error of a prepared call; raises WrongAnswer where the output is not the attention asked for."""
    inputs.out.fill_(float("nan"))
    call(0)
    return check_error(inputs.error(inputs.out))


def verified_timing(inputs: DecodeInputs, call: Call) -> tuple[Timing, float]:
    """Time and error of a prepared call, as `verified` says."""
    error = verified(inputs, call)
    return time_calls(call, inputs.copies), error


def reading(inputs: DecodeInputs, blocks: int) -> Timing:
    """Time of a kernel that brings the call's KV into shared memory and does nothing with it."""
    read = kernels.module().read_rows
    return time_calls(lambda i: read(*inputs.cache(i), inputs.indices, blocks), inputs.copies)


def measure(spec: dict[str, Any], context: Context) -> dict[str, Any]:
    """One row. The kernels' names are those of `baselines.BASELINES`; null where one could not be measured."""
    shape = Shape.from_row(spec)
    shuffled = context.options["page_order"] == "shuffled"
    inputs = DecodeInputs(shape, context.pool(shape.kv_dtype), context.facts.l2_bytes, shuffled)
    policy = context.options["policy"]
    times: dict[str, float | None] = {}
    row: dict[str, Any] = {
        **shape.to_row(),
        "floor_us": round(context.floor_us(shape.kv_bytes), 3),
        "read_us": None,
        "fi_prefetch_us": None,
        "baselines_us": times,
        "error": None,
        "error_flashinfer": None,
        "kernel": None,
        "levers": None,
        "policy": policy,
        "copies": inputs.copies,
        "spread": {},
        "warm_us": {},
        "missing": {},
    }
    errors: dict[str, float] = {}

    def ours() -> Call:
        wrapper, call = prepare_ours(inputs, policy, "plan")
        row.update(kernel=wrapper.kernel_choice.reason, levers=wrapper.prefetch_plan.codes())
        return call

    def timed(prepare: Callable[[], Call]) -> tuple[Timing, float, Timing | None]:
        call = prepare()
        timing, error = verified_timing(inputs, call)
        return timing, error, time_calls(call, 1) if context.options.get("warm") else None

    candidates: dict[str, Callable[[], Call]]
    candidates = {name: functools.partial(BASELINES[name], inputs) for name in context.options["baselines"]}
    for name, prepare in {**candidates, "fi_prefetch": ours}.items():
        result, reason = context.attempt(name, functools.partial(timed, prepare))
        if result is None:
            times[name], row["missing"][name] = None, reason
            continue
        timing, errors[name], warm = result
        times[name], row["spread"][name] = round(timing.us, 3), round(timing.spread, 4)
        if warm is not None:
            row["warm_us"][name] = round(warm.us, 3)
    read, reason = context.attempt("read", functools.partial(reading, inputs, context.facts.sm_count))
    if read is None:
        row["missing"]["read"] = reason
    else:
        row["read_us"] = round(read.us, 3)
    row["fi_prefetch_us"] = times.pop("fi_prefetch")
    row["error"] = errors.get("fi_prefetch")
    row["error_flashinfer"] = errors.get("flashinfer_fa2", errors.get("flashinfer_cuda_core"))
    return row
