"""Grids measured for `fi-prefetch tune`: every candidate of tune.py on a few shapes of every size."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict
from typing import Any
from unittest import mock

from fi_prefetch import tune
from fi_prefetch.prefetch import PrefetchPolicy
from fi_prefetch.tune import CANDIDATES, Grid, Rule

from .baselines import Call, Unsupported, prepare_ours
from .grid import verified_timing
from .inputs import DecodeInputs
from .report import GRID_COLUMNS
from .shapes import Shape, parse_lens
from .worker import Context

# By MiB of KV a call: heads and lengths.
SIZES: dict[int, tuple[tuple[int, int, str], ...]] = {
    1: ((8, 1, "1x2K"), (32, 8, "1x256")),
    8: ((8, 1, "8x2K"), (32, 8, "1x2K")),
    32: ((8, 1, "64x1K"), (32, 8, "8x1K")),
    64: ((8, 1, "64x2K"), (32, 8, "32x512")),
    128: ((8, 1, "64x4K"), (32, 8, "16x2K")),
    512: ((8, 1, "64x16K"), (32, 8, "64x2K")),
    2048: ((32, 8, "128x4K"), (32, 32, "32x4K")),
}


def specs() -> list[dict[str, Any]]:
    """Every candidate on every shape."""
    return [
        {**Shape(heads_q, heads_kv, 1, parse_lens(lens)).to_row(), **asdict(grid)}
        for shapes in SIZES.values()
        for heads_q, heads_kv, lens in shapes
        for grid in CANDIDATES
    ]


def prepare_on_grid(inputs: DecodeInputs, grid: Grid, policy: PrefetchPolicy | str = "auto") -> tuple[Any, Call]:
    """Our wrapper, planned on a grid, and its call. Raises Unsupported where the kernel does not take that grid."""
    with mock.patch.object(tune, "rules_for", lambda gpu_key: (Rule(None, grid),)):
        wrapper, call = prepare_ours(inputs, policy)
    launch = wrapper.prefetch_plan.facts
    if (launch.blocks, launch.warps) != (grid.blocks_per_sm * launch.sm_count, grid.warps):
        raise Unsupported(f"the kernel made it {launch.blocks} blocks of {launch.warps} warps")
    return wrapper, call


def measure(spec: dict[str, Any], context: Context) -> dict[str, Any]:
    """One row: the time of a shape on a grid. Raises Unsupported where the kernel does not take that grid."""
    shape = Shape.from_row(spec)
    inputs = DecodeInputs(shape, context.pool(shape.kv_dtype), context.facts.l2_bytes)
    _, call = prepare_on_grid(inputs, grid_of(spec))
    timing, _ = verified_timing(inputs, call)
    return {**spec, "us": round(timing.us, 3), "spread": round(timing.spread, 4)}


def grid_of(row: dict[str, Any]) -> Grid:
    """The grid that a row is of."""
    return Grid(*(row[name] for name in GRID_COLUMNS))


def rules(rows: Iterable[dict[str, Any]]) -> tuple[Rule, ...]:
    """What the rows say is best. A grid counts for a size where it was measured on all of the size's shapes.

    Raises ValueError where no grid was.
    """
    times: dict[int, dict[Grid, list[float]]] = {}
    for row in rows:
        times.setdefault(row["kv_bytes"], {}).setdefault(grid_of(row), []).append(row["us"])
    shapes = {mebibytes << 20: len(group) for mebibytes, group in SIZES.items()}
    return tune.best_rules(
        {
            size: {grid: values for grid, values in by_grid.items() if len(values) == shapes[size]}
            for size, by_grid in times.items()
        }
    )
