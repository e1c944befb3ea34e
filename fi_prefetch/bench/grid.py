"""The grid: every shape on every kernel, in one process; benchmarks/results/<gpu>/grid.json."""

from __future__ import annotations

import functools
from typing import Any

from .baselines import BASELINES, Call, prepare_ours
from .inputs import DecodeInputs
from .shapes import Shape
from .timing import Timing, time_calls
from .worker import Context, check_error


def specs(shapes: list[Shape]) -> list[dict[str, Any]]:
    """The rows to measure. Shapes of one KV dtype come together: a pool of random KV serves all of them."""
    return [shape.to_row() for shape in sorted(shapes, key=lambda shape: shape.kv_dtype)]


def verified_timing(inputs: DecodeInputs, call: Call) -> tuple[Timing, float]:
    """Time and error of a prepared call; raises WrongAnswer where the output is not the attention asked for."""
    inputs.out.fill_(float("nan"))
    call(0)
    error = check_error(inputs.error(inputs.out))
    return time_calls(call, inputs.copies), error


def measure(spec: dict[str, Any], context: Context) -> dict[str, Any]:
    """One row. The kernels' names are those of `baselines.BASELINES`; null where one could not be measured."""
    shape = Shape.from_row(spec)
    shuffled = context.options["page_order"] == "shuffled"
    inputs = DecodeInputs(shape, context.pool(shape.kv_dtype), context.facts.l2_bytes, shuffled)
    times: dict[str, float | None] = {}
    errors: dict[str, float] = {}
    spreads: dict[str, float] = {}
    missing: dict[str, str] = {}

    def record(name: str, answer: tuple[tuple[Timing, float] | None, str | None]) -> None:
        result, reason = answer
        if result is None:
            times[name], missing[name] = None, reason or ""
            return
        timing, errors[name] = result
        times[name], spreads[name] = round(timing.us, 3), round(timing.spread, 4)

    for name in context.options["baselines"]:
        prepare = functools.partial(_prepared_timing, inputs, BASELINES[name])
        record(name, context.attempt(name, prepare))
    choice: dict[str, Any] = {"kernel": None, "levers": None}
    policy = context.options["policy"]

    def ours() -> tuple[Timing, float]:
        wrapper, call = prepare_ours(inputs, policy)
        choice.update(kernel=wrapper.kernel_choice.reason, levers=wrapper.prefetch_plan.codes())
        return verified_timing(inputs, call)

    record("fi_prefetch", context.attempt("fi_prefetch", ours))
    return {
        **shape.to_row(),
        "floor_us": round(context.floor_us(shape.kv_bytes), 3),
        "fi_prefetch_us": times.pop("fi_prefetch"),
        "baselines_us": times,
        "error": errors.get("fi_prefetch"),
        "error_flashinfer": errors.get("flashinfer_fa2", errors.get("flashinfer_cuda_core")),
        **choice,
        "policy": policy,
        "spread": spreads,
        "missing": missing,
        "copies": inputs.copies,
    }


def _prepared_timing(inputs: DecodeInputs, prepare: Any) -> tuple[Timing, float]:
    return verified_timing(inputs, prepare(inputs))
