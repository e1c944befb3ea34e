"""Prefetch levers against none, on the grid's shapes; benchmarks/results/<gpu>/prefetch.json."""

from __future__ import annotations

import functools
from typing import Any

from fi_prefetch.prefetch import PROLOGUE_TILES, PrefetchPolicy

from .baselines import prepare_ours
from .grid import specs, verified_timing
from .inputs import DecodeInputs
from .shapes import Shape
from .timing import Timing
from .worker import Context

__all__ = ["POLICIES", "measure", "specs"]

_ALONE: dict[str, Any] = {"run_ahead": 0, "prologue": 0, "early_load": False, "streaming_hint": False}

# Name in the file -> policy, and what is promised to be final when the kernel starts. Each lever alone, and together.
# "off" is measured first and last: the difference is what the clocks did meanwhile.
POLICIES: dict[str, tuple[PrefetchPolicy, str]] = {
    "off": (PrefetchPolicy.named("off"), "nothing"),
    "auto": (PrefetchPolicy.named("auto"), "nothing"),
    "paper": (PrefetchPolicy.named("paper"), "nothing"),
    "run_ahead": (PrefetchPolicy(**{**_ALONE, "run_ahead": 4}), "nothing"),
    "prologue": (PrefetchPolicy(**{**_ALONE, "prologue": PROLOGUE_TILES}), "nothing"),
    "early_load": (PrefetchPolicy(**{**_ALONE, "early_load": True}), "all_but_last_token"),
    "streaming_hint": (PrefetchPolicy(**{**_ALONE, "streaming_hint": True}), "nothing"),
    "auto_ready": (PrefetchPolicy.named("auto"), "all_but_last_token"),
    "auto_plan": (PrefetchPolicy.named("auto"), "plan"),
    "off_again": (PrefetchPolicy.named("off"), "nothing"),
}


def measure(spec: dict[str, Any], context: Context) -> dict[str, Any]:
    """One row: the time of every policy, and the levers that it became for this shape."""
    shape = Shape.from_row(spec)
    shuffled = context.options["page_order"] == "shuffled"
    inputs = DecodeInputs(shape, context.pool(shape.kv_dtype), context.facts.l2_bytes, shuffled)
    row: dict[str, Any] = {
        **shape.to_row(),
        "floor_us": round(context.floor_us(shape.kv_bytes), 3),
        "us": {},
        "spread": {},
        "levers": {},
        "missing": {},
    }

    def timed(policy: PrefetchPolicy, ready: str) -> tuple[Timing, list[int]]:
        wrapper, call = prepare_ours(inputs, policy, ready)
        timing, _ = verified_timing(inputs, call)
        return timing, wrapper.prefetch_plan.codes()

    for name, (policy, ready) in POLICIES.items():
        result, reason = context.attempt(name, functools.partial(timed, policy, ready))
        if result is None:
            row["us"][name], row["missing"][name] = None, reason
        else:
            timing, row["levers"][name] = result
            row["us"][name], row["spread"][name] = round(timing.us, 3), round(timing.spread, 4)
    return row
