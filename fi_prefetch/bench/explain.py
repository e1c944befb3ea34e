"""What would be chosen for a decode, and why: the kernel, the schedule as a picture, the prefetch levers in numbers."""

from __future__ import annotations

from dataclasses import dataclass

import torch

import fi_prefetch
from fi_prefetch import dispatch
from fi_prefetch.device import GpuFacts, describe
from fi_prefetch.dispatch import DecodeSpec, KernelChoice
from fi_prefetch.prefetch import LaunchFacts, PrefetchPlan, PrefetchPolicy, resolve, stretch_tiles
from fi_prefetch.schedule import TILE_TOKENS, Schedule, ring_tiles
from fi_prefetch.tune import Grid, grid_for, rules_for

from .environment import require_gpu
from .estimate import GPUS
from .shapes import Shape

HOPPER_SM_COUNT = {"h100": 132, "h200": 132, "h20": 78}
HOPPER_L2_BYTES = 50 << 20

WIDTH = 40
SHADES = "0123456789"


@dataclass(frozen=True)
class Explanation:
    """The choices for one decode. `assumed`: the launch is what Hopper's would be, not what a GPU here answered."""

    choice: KernelChoice
    schedule: Schedule
    levers: PrefetchPlan | None
    assumed: bool


def named_gpu(name: str) -> GpuFacts:
    """The facts of a GPU that is not here; raises ValueError where its name is not one of GPUS."""
    if name not in GPUS:
        raise ValueError(f"gpu: expected one of {', '.join(GPUS)}, got {name!r}")
    return describe(GPUS[name], (9, 0), HOPPER_SM_COUNT[name], HOPPER_L2_BYTES)


def explain_here(shape: Shape, policy: PrefetchPolicy, ready: str) -> Explanation:
    """The choices of a wrapper planned on the current GPU, compiling the kernel where that has not been done."""
    lengths = torch.tensor(shape.lengths, dtype=torch.int32)
    pages = -(-lengths // shape.page_size)
    indptr = torch.cat([torch.zeros(1, dtype=torch.int32), pages.cumsum(0, dtype=torch.int32)])
    wrapper = fi_prefetch.BatchDecodeWithPagedKVCacheWrapper(
        torch.zeros(128 << 20, dtype=torch.uint8, device="cuda"), "NHD", prefetch=policy, ready=ready
    )
    wrapper.plan(
        indptr,
        torch.arange(shape.pages, dtype=torch.int32),
        lengths - (pages - 1).clamp(min=0) * shape.page_size,
        shape.heads_q,
        shape.heads_kv,
        shape.head_dim,
        shape.page_size,
        q_data_type=getattr(torch, shape.q_dtype),
        kv_data_type=getattr(torch, shape.kv_dtype),
    )
    levers = wrapper.prefetch_plan
    if levers is None:
        return Explanation(wrapper.kernel_choice, Schedule(shape.lengths, shape.heads_kv, 1, 1), None, assumed=False)
    launch = levers.facts
    # The least work of a warp goes to the kernel with the grid, from the same table, and is not among the facts.
    grid = grid_for(rules_for(require_gpu().key), launch.kv_bytes)
    schedule = _schedule(shape, grid, launch.blocks, launch.warps, launch.tile_bytes)
    return Explanation(wrapper.kernel_choice, schedule, levers, assumed=False)


def _schedule(shape: Shape, grid: Grid, blocks: int, warps: int, tile_bytes: int) -> Schedule:
    return Schedule(
        shape.lengths,
        shape.heads_kv,
        blocks,
        warps,
        grid.min_tiles_per_warp,
        tile_bytes=tile_bytes,
        page_size=shape.page_size,
    )


def kernel_choice(shape: Shape, facts: GpuFacts) -> KernelChoice:
    """Which kernel would serve `shape` on a GPU with these facts, and why."""
    spec = DecodeSpec(
        dtype_q=getattr(torch, shape.q_dtype),
        dtype_kv=getattr(torch, shape.kv_dtype),
        dtype_o=getattr(torch, shape.q_dtype),
        batch_size=shape.batch,
        num_qo_heads=shape.heads_q,
        num_kv_heads=shape.heads_kv,
        head_dim=shape.head_dim,
        page_size=shape.page_size,
    )
    return dispatch.choose(spec, facts)


def explain(shape: Shape, facts: GpuFacts, policy: PrefetchPolicy, ready: str) -> Explanation:
    """The choices for `shape` on a GPU with these facts, from the arithmetic alone: nothing is compiled or launched."""
    choice = kernel_choice(shape, facts)
    grid = grid_for(rules_for(facts.key), shape.kv_bytes)
    blocks, warps = facts.sm_count * grid.blocks_per_sm, grid.warps
    tile_bytes = TILE_TOKENS * shape.token_bytes // shape.heads_kv
    schedule = _schedule(shape, grid, blocks, warps, tile_bytes)
    if choice.kernel != "fi_prefetch":
        return Explanation(choice, schedule, None, assumed=True)
    launch = LaunchFacts(
        blocks=blocks,
        warps=warps,
        stages=ring_tiles(tile_bytes),
        tile_bytes=tile_bytes,
        kv_bytes=shape.kv_bytes,
        l2_bytes=facts.l2_bytes,
        sm_count=facts.sm_count,
        ready=ready,
        batch_size=len(shape.lengths),
        stretch_tiles=stretch_tiles(shape.group, rotary=False),
    )
    return Explanation(choice, schedule, resolve(policy, launch, pdl=True), assumed=True)


def picture(schedule: Schedule, requests: int = 12) -> list[str]:
    """Which blocks work on which request: one line a request, longest first, one mark a stretch of its first kv head.

    A mark is the last digit of the block that holds the stretch's first tile, so that a change of digit is a cut
    between blocks. Lines are as long as the request is, against the longest one.
    """
    order = sorted(range(len(schedule.lengths)), key=lambda request: -schedule.lengths[request])[:requests]
    longest = max(schedule.tiles, default=0)
    by_request: dict[int, list[tuple[int, int]]] = {request: [] for request in order}
    for segment in schedule.segments:
        if segment.head == 0 and segment.request in by_request:
            by_request[segment.request].append((segment.first_tile, segment.block))
    lines = []
    for request in order:
        tiles = schedule.tiles[request]
        width = max(1, round(WIDTH * tiles / longest)) if tiles else 0
        marks = ""
        for column in range(width):
            tile = column * tiles // width
            block = next(block for first, block in reversed(by_request[request]) if first <= tile)
            marks += SHADES[block % len(SHADES)]
        blocks = len({block for _, block in by_request[request]})
        lines.append(f"request {request:>3} {schedule.lengths[request]:>7} tokens {blocks:>4} blocks {marks}")
    return lines
