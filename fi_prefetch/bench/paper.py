"""What run-ahead gains over bytes in flight: the map; benchmarks/results/<gpu>/map.json.

Three kernels, each on the whole GPU and on a slice of it with about the SMs of the paper's H20 (78), cut with a green
context. The paper's (csrc/xformers_decode.cuh) is paged attention that loads KV into registers, one thread block to a
query head of a sequence, and can ask for its next KV block to be brought into L2 meanwhile. Ours is measured on smaller
grids than it launches, down to one warp an SM, which keeps as little in flight. FlashInfer's CUDA-core kernel is given
a prefetch (flashinfer_run_ahead.py). A row of the result file:

    part             "residency": the paper's kernel with fewer thread blocks an SM than would fit; "ours": our kernel
                     by grid; "flashinfer": FlashInfer's; "table": the paper's kernel over its batches and lengths
    heads_q, heads_kv, head_dim, page_size, kv_lens, q_dtype, kv_dtype, kv_bytes
                     the shape; each query head reads its kv head's KV, kv_bytes counts it once
    sms              SMs of the slice; null: the whole GPU
    sms_used         SMs that a captured kernel ran on, counted on the GPU; null where there was no such slice
    most_resident    of the paper's kernel: thread blocks an SM may hold; 0: as many as fit
    warps_per_block, blocks_per_sm
                     of ours: its grid
    pad              of FlashInfer's: shared memory that a block takes for nothing, so that fewer fit
    resident         thread blocks an SM held: what may be and fits, or what there were; null without a slice
    bytes_in_flight  KV bytes that an SM waited for at a time, at most, without prefetch; null without a slice
    floor_us         kv_bytes at the read ceiling of the whole GPU
    us               time of a call without prefetch ("off", and "off_again" after the others), and with one that many
                     iterations (of ours: tiles) ahead: "bulk_1" is the paper's, "lines_1" has line prefetches in its
                     place; "run_ahead_1" is the one after the pipeline's last, in ours the policy `paper`; in the
                     table's rows of the whole GPU also that of other kernels on as much KV; null where there is none
    spread, missing  of each of `us`: (90th - 10th percentile) / median; why it is null
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
from flashinfer.jit import gen_jit_spec

from fi_prefetch import device, jit, reference
from fi_prefetch.prefetch import PrefetchPolicy
from fi_prefetch.tune import Grid

from . import flashinfer_run_ahead
from .baselines import BASELINES, Call, Unsupported, prepare_ours
from .explain import HOPPER_SM_COUNT
from .flashinfer_run_ahead import PADS
from .grid import verified, verified_timing
from .inputs import DecodeInputs, relative_error
from .report import NOISE, Row, microseconds
from .shapes import Shape, lens_label
from .timing import Timing, calls_per_replay, time_graph
from .tuning import prepare_on_grid
from .worker import Context, check_error

BLOCK_TOKENS = 16
WARPS = 4
PREFETCHES = {"off": 0, "bulk": 1, "lines": 2}

SLICE_SMS = 80
TABLE_HEADS = ((32, 32), (32, 8))
TABLE_BATCHES = (16, 32, 64, 128)
TABLE_LENGTHS = (512, 1024, 2048, 4096, 8192)
RESIDENCY_HEADS = ((32, 32), (32, 8), (8, 1))
RESIDENCY_LENS = (((2048, 16),), ((4096, 64),))
RESIDENCIES = (1, 2, 3, 4, 6)

# Our warps a block and blocks an SM. A warp's ring is compiled in, so that fewer warps are what there is to have less
# in flight; one warp in each of four blocks keeps as much as four in one.
OUR_GRIDS = ((1, 1), (2, 1), (4, 1), (8, 1), (1, 4))

# Name in the file -> prefetch, and how many iterations ahead.
TABLE_VARIANTS = {"off": ("off", 1), "bulk_1": ("bulk", 1), "off_again": ("off", 1)}
RESIDENCY_VARIANTS = {
    "off": ("off", 1),
    "bulk_1": ("bulk", 1),
    "lines_1": ("lines", 1),
    "bulk_2": ("bulk", 2),
    "bulk_4": ("bulk", 4),
    "off_again": ("off", 1),
}
# Name in the file -> tiles ahead.
OUR_VARIANTS = {"off": 0, "run_ahead_1": 1, "run_ahead_2": 2, "run_ahead_4": 4, "off_again": 0}
# Iterations of a block ahead.
FLASHINFER_VARIANTS = {"off": 0, "run_ahead_1": 1, "run_ahead_4": 4, "off_again": 0}
VARIANTS: dict[str, list[str]] = {
    "residency": list(RESIDENCY_VARIANTS),
    "table": list(TABLE_VARIANTS),
    "ours": list(OUR_VARIANTS),
    "flashinfer": list(FLASHINFER_VARIANTS),
}
# The paper's prefetch, by part.
PAPERS = {"residency": "bulk_1", "table": "bulk_1", "ours": "run_ahead_1", "flashinfer": "run_ahead_1"}
BESIDE = ("fi_prefetch", "flashinfer_fa2", "fa3")


# ---- the kernel ----------------------------------------------------------------------------------------------------


def jit_spec() -> Any:
    """FlashInfer's JitSpec of the paper's kernel: one library with every dtype, head_dim and prefetch."""
    csrc = jit.csrc_dir()
    spec: Any = gen_jit_spec(
        f"fi_prefetch_paper_{jit.sources_hash()}", [csrc / "xformers_decode.cu"], extra_include_paths=[csrc]
    )
    # FlashInfer's default; the kernel says itself where it approximates.
    spec.extra_cuda_cflags = [flag for flag in spec.extra_cuda_cflags if flag.lstrip("-") != "use_fast_math"]
    return spec


@functools.cache
def module() -> Any:
    """The loaded module: `run`, `residency` and `mark_sms`, as csrc/xformers_decode.cu documents them."""
    return jit_spec().build_and_load()


def decode(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    block_table: torch.Tensor,
    context_lens: torch.Tensor,
    max_context_len: int,
    *,
    out: torch.Tensor,
    sm_scale: float | None = None,
    prefetch: str = "off",
    distance: int = 1,
    most_resident: int = 0,
) -> None:
    """Paged attention of one query token a sequence, by the paper's kernel. All tensors are contiguous, on one GPU.

    Args:
        q, out: float16 or bfloat16 [num_seqs, num_heads, head_dim], head_dim 64 or 128.
        k_cache: q's dtype, [num_blocks, num_kv_heads, head_dim / 8, 16, 8]; query head h reads kv head
            h // (num_heads / num_kv_heads).
        v_cache: q's dtype, [num_blocks, num_kv_heads, head_dim, 16].
        block_table: int32 [num_seqs, max_blocks], the cache block of each of a sequence's KV blocks. Not checked.
        context_lens: int32 [num_seqs], tokens.
        max_context_len: the largest of them. Its logits must fit shared memory: about 57,000 on Hopper.
        sm_scale: of Q K^T; 1 / sqrt(head_dim) where None.
        prefetch: "off", "bulk" (a KV block in one instruction, the paper's; compute capability 9.0) or "lines".
        distance: how many of its iterations ahead a warp prefetches, at least 1; the paper's is 1.
        most_resident: thread blocks an SM may hold at a time; 0: as many as fit.

    Raises ValueError or TypeError, naming the argument, where one is not as said.
    """
    scale = q.shape[-1] ** -0.5 if sm_scale is None else sm_scale
    module().run(
        q,
        k_cache,
        v_cache,
        block_table,
        context_lens,
        out,
        max_context_len,
        scale,
        prefetch_code(prefetch),
        distance,
        most_resident,
    )


def prefetch_code(prefetch: str) -> int:
    """The module's number for a prefetch by name; ValueError for another name."""
    if prefetch not in PREFETCHES:
        raise ValueError(f"prefetch: expected one of {', '.join(PREFETCHES)}, got {prefetch!r}")
    return PREFETCHES[prefetch]


# ---- on a shape ----------------------------------------------------------------------------------------------------


def caches(inputs: DecodeInputs, i: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Cache i read in the paper's layouts: the same random numbers, in other places. See `decode` for the shapes."""
    k, v = inputs.cache(i)
    pages, page_size, heads, dim = k.shape
    return k.view(pages, heads, dim // 8, page_size, 8), v.view(pages, heads, dim, page_size)


def prepare(inputs: DecodeInputs, prefetch: str = "bulk", distance: int = 1, most_resident: int = 0) -> Call:
    """The paper's kernel on a shape, as `baselines` prepares other kernels. Raises Unsupported for other shapes."""
    shape = inputs.shape
    if shape.page_size != BLOCK_TOKENS:
        raise Unsupported(f"the paper's kernel has pages of {BLOCK_TOKENS} tokens, not {shape.page_size}")
    if shape.kv_dtype != shape.q_dtype:
        raise Unsupported(f"the paper's kernel wants one dtype, got q {shape.q_dtype} and KV {shape.kv_dtype}")
    longest = max(shape.lengths)

    def call(i: int) -> None:
        k, v = caches(inputs, i)
        decode(
            inputs.q,
            k,
            v,
            inputs.block_table,
            inputs.seq_lens,
            longest,
            out=inputs.out,
            prefetch=prefetch,
            distance=distance,
            most_resident=most_resident,
        )

    return call


def truth(inputs: DecodeInputs) -> tuple[list[int], torch.Tensor]:
    """Some requests, and their outputs in float32 on cache 0: [requests, heads_q, head_dim]."""
    batch = inputs.shape.batch
    chosen = sorted({0, batch // 2, batch - 1})
    k_cache, v_cache = caches(inputs, 0)
    outputs = []
    for request in chosen:
        length = inputs.shape.lengths[request]
        blocks = inputs.block_table[request, : -(-length // BLOCK_TOKENS)].long()
        k = k_cache[blocks].permute(0, 3, 1, 2, 4).flatten(3)
        v = v_cache[blocks].permute(0, 3, 1, 2)
        table = (torch.tensor([0, len(blocks)]), torch.arange(len(blocks), device=k.device))
        last = torch.tensor([length - (len(blocks) - 1) * BLOCK_TOKENS])
        o, _ = reference.batch_decode(inputs.q[request : request + 1], k, v, *table, last, out_dtype=torch.float32)
        outputs.append(o)
    return chosen, torch.cat(outputs)


def bytes_in_flight(shape: Shape, sms: int, fitting: int) -> tuple[int, int]:
    """Thread blocks that one of `sms` SMs holds, of which `fitting` fit, and the KV bytes that they wait for at most.

    A warp has the loads of one KV block (16 tokens of K or V of a head) in flight at a time.
    """
    resident = min(fitting, -(-shape.batch * shape.heads_q // sms))
    return resident, resident * WARPS * (shape.token_bytes // (2 * shape.heads_kv)) * BLOCK_TOKENS


# ---- a slice of the GPU --------------------------------------------------------------------------------------------


@functools.cache
def slice_stream(sms: int) -> torch.cuda.Stream:
    """A stream whose kernels have `sms` of the current GPU's SMs (rounded up to what the GPU can cut) and no others.

    Raises Unsupported, with the reason, where green contexts cannot be had: no cuda-python, an old driver, too few SMs.
    """
    try:
        from flashinfer.green_ctx import split_device_green_ctx_by_sm_count
    except ImportError as error:
        raise Unsupported(f"no green contexts: {error}") from error
    device = torch.device("cuda", torch.cuda.current_device())
    torch.cuda.synchronize()  # the context must be there before it is cut
    try:
        streams: Any
        streams, _ = split_device_green_ctx_by_sm_count(device, [sms])
    except (RuntimeError, ValueError) as error:
        raise Unsupported(f"no green context of {sms} SMs: {error}") from error
    return streams[0]


@functools.cache
def whole_stream() -> torch.cuda.Stream:
    """A stream whose kernels have all SMs."""
    return torch.cuda.Stream()


def capture_on(stream: torch.cuda.Stream, calls: Callable[[], None]) -> torch.cuda.CUDAGraph:
    """A graph of what `calls` launches. Its kernels keep to the SMs of `stream`, wherever the graph is replayed."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        calls()
    return graph


def count_sms(stream: torch.cuda.Stream, sm_count: int) -> int:
    """How many of the GPU's `sm_count` SMs a kernel that was captured on `stream` runs on."""
    marks = torch.zeros(sm_count, dtype=torch.int32, device="cuda")
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        module().mark_sms(marks)  # a kernel is loaded at its first launch, which a capture does not allow
        stream.synchronize()
        marks.zero_()
        capture_on(stream, lambda: module().mark_sms(marks)).replay()
    stream.synchronize()
    return int(marks.sum())


def time_on(stream: torch.cuda.Stream, call: Call, copies: int) -> Timing:
    """What `timing.time_calls` measures, on a stream of one's own."""
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        call(0)
        some = min(copies, 8)
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        for i in range(some):
            call(i)
        end.record()
        end.synchronize()
        calls = calls_per_replay(start.elapsed_time(end) * 1000.0 / some, copies)

        def all_calls() -> None:
            for i in range(calls):
                call(i % copies)

        return time_graph(capture_on(stream, all_calls), calls)


# ---- the result file -----------------------------------------------------------------------------------------------


def specs() -> list[dict[str, Any]]:
    """The rows to measure, those that tell most first: a run that is stopped in time lacks the end of the table."""
    few = [Shape(*heads, BLOCK_TOKENS, lens) for heads in RESIDENCY_HEADS for lens in RESIDENCY_LENS]
    many = [
        Shape(*heads, BLOCK_TOKENS, ((length, batch),))
        for heads in TABLE_HEADS
        for batch in TABLE_BATCHES
        for length in TABLE_LENGTHS
    ]
    places = (None, SLICE_SMS)
    return [
        *(
            _spec("residency", shape, sms, most_resident=most)
            for shape in few
            for sms in places
            for most in _residencies(shape, sms)
        ),
        *(
            _spec("ours", shape, sms, warps_per_block=warps, blocks_per_sm=blocks)
            for shape in few
            for sms in places
            for warps, blocks in OUR_GRIDS
        ),
        *(_spec("flashinfer", shape, sms, pad=pad) for shape in few for sms in places for pad in PADS),
        *(_spec("table", shape, sms, most_resident=0) for shape in many for sms in places),
    ]


def _residencies(shape: Shape, sms: int | None) -> list[int]:
    """Of RESIDENCIES those that change something: an SM of a Hopper is given so many of the shape's blocks at most."""
    given = -(-shape.batch * shape.heads_q // (sms or HOPPER_SM_COUNT["h200"]))
    return [*(most for most in RESIDENCIES if most < given), 0]


def _spec(part: str, shape: Shape, sms: int | None, **columns: int) -> dict[str, Any]:
    """All rows of a file have the same columns, by which `--resume` tells them apart."""
    knobs: dict[str, int | None] = dict.fromkeys(("most_resident", "warps_per_block", "blocks_per_sm", "pad"))
    return {"part": part, **shape.to_row(), "sms": sms, **knobs, **columns}


def measure(spec: dict[str, Any], context: Context) -> dict[str, Any]:
    """One row, as the module's docstring says."""
    shape = Shape.from_row(spec)
    inputs = DecodeInputs(shape, context.pool(shape.kv_dtype), context.facts.l2_bytes)
    row: dict[str, Any] = {
        **spec,
        "sms_used": None,
        "resident": None,
        "bytes_in_flight": None,
        "floor_us": round(context.floor_us(shape.kv_bytes), 3),
        "us": {},
        "spread": {},
        "missing": {},
    }

    def record(name: str, action: Callable[[], Timing]) -> None:
        timing, reason = context.attempt(name, action)
        if timing is None:
            row["us"][name], row["missing"][name] = None, reason
        else:
            row["us"][name], row["spread"][name] = round(timing.us, 3), round(timing.spread, 4)

    place, reason = context.attempt("slice", lambda: _place(spec["sms"], context.facts.sm_count))
    if place is None:
        names = VARIANTS[spec["part"]]
        row["us"], row["missing"] = dict.fromkeys(names), dict.fromkeys(names, reason)
        return row
    stream, row["sms_used"] = place
    if spec["part"] == "ours":
        for name, tiles in OUR_VARIANTS.items():
            record(name, functools.partial(_time_ours, row, inputs, stream, context.facts, tiles))
        return row
    if spec["part"] == "flashinfer":
        for name, iterations in FLASHINFER_VARIANTS.items():
            record(name, functools.partial(_time_flashinfers, row, inputs, stream, context.facts.sm_count, iterations))
        return row
    most_resident = spec["most_resident"]
    fitting = module().residency(inputs.q, max(shape.lengths), PREFETCHES["off"], most_resident)
    row["resident"], row["bytes_in_flight"] = bytes_in_flight(shape, row["sms_used"], fitting)
    requests, expected = truth(inputs)

    def paper(prefetch: str, distance: int) -> Timing:
        call = prepare(inputs, prefetch, distance, most_resident)
        inputs.out.fill_(float("nan"))
        call(0)
        check_error(relative_error(inputs.out[requests], expected))
        return time_on(stream, call, inputs.copies)

    variants = RESIDENCY_VARIANTS if spec["part"] == "residency" else TABLE_VARIANTS
    for name, (prefetch, distance) in variants.items():
        record(name, functools.partial(paper, prefetch, distance))
    if spec["part"] == "table" and spec["sms"] is None:
        for name in BESIDE:
            record(name, functools.partial(_beside, name, inputs))
    return row


def _time_ours(
    row: dict[str, Any], inputs: DecodeInputs, stream: torch.cuda.Stream, facts: device.GpuFacts, run_ahead: int
) -> Timing:
    """Our kernel on the row's grid and slice, with run-ahead by so many tiles and no other lever.

    Fills in what the row says of its launch. Raises Unsupported where that many tiles ahead nothing is left to read.
    """
    # All of L2 is the budget: what a distance over the usual one costs belongs on the map.
    policy = PrefetchPolicy(run_ahead, prologue=0, early_load=False, streaming_hint=False, l2_budget=1.0)
    grid = Grid(row["warps_per_block"], row["blocks_per_sm"], 0)
    # To the plan the slice is the GPU: blocks beyond what its SMs hold would wait for the others to end.
    of_slice = dataclasses.replace(facts, sm_count=row["sms_used"])
    with mock.patch.object(device, "facts", lambda where: of_slice):
        wrapper, call = prepare_on_grid(inputs, grid, policy)
        plan = wrapper.prefetch_plan
        if plan.run_ahead != run_ahead:
            raise Unsupported(f"run-ahead became {plan.run_ahead}: a warp has no more to read, or L2 no more room")
        row["resident"], row["bytes_in_flight"] = grid.blocks_per_sm, plan.bytes_in_flight_per_sm
        verified(inputs, call)
        return time_on(stream, call, inputs.copies)


def _time_flashinfers(
    row: dict[str, Any], inputs: DecodeInputs, stream: torch.cuda.Stream, sm_count: int, iterations: int
) -> Timing:
    """FlashInfer's kernel, with prefetch so many iterations ahead. Fills in what the row says of its launch.

    Its plan is for the whole GPU wherever it runs: on a slice the same blocks come in more than one wave.
    """
    shape, pad = inputs.shape, row["pad"]
    fitting = flashinfer_run_ahead.fitting(shape.heads_q, shape.heads_kv, pad, sm_count)
    blocks, call = flashinfer_run_ahead.prepare(inputs, pad, iterations)
    row["resident"] = min(fitting, -(-blocks // row["sms_used"]))
    row["bytes_in_flight"] = flashinfer_run_ahead.bytes_in_flight(shape, row["resident"])
    verified(inputs, call)
    return time_on(stream, call, inputs.copies)


def _place(sms: int | None, sm_count: int) -> tuple[torch.cuda.Stream, int]:
    """The stream to run on, and the SMs that it has. Raises Unsupported where a slice is none."""
    stream = whole_stream() if sms is None else slice_stream(sms)
    used = count_sms(stream, sm_count)
    if sms is not None and used >= sm_count:
        raise Unsupported(f"kernels on a slice of {sms} SMs ran on all {used}")
    return stream, used


def _beside(name: str, inputs: DecodeInputs) -> Timing:
    call = prepare_ours(inputs)[1] if name == "fi_prefetch" else BASELINES[name](inputs)
    return verified_timing(inputs, call)[0]


# ---- read ----------------------------------------------------------------------------------------------------------


def without_prefetch(row: Row) -> float | None:
    """The time of a call without prefetch, us: the shorter of the two that were measured, before the others and after
    them. What slowed one of them down, whatever it was, is not to look like a gain."""
    return min((time for name in ("off", "off_again") if (time := row["us"].get(name))), default=None)


def gain(row: Row, name: str | None = None) -> float | None:
    """How much faster a call is with a prefetch, by its name in `us`, else the paper's; None where it has no time."""
    off, on = without_prefetch(row), row["us"].get(name or PAPERS[row["part"]])
    return off / on if off and on else None


def distances(part: str) -> list[str]:
    """The names in `us` of a part's prefetches."""
    return [name for name in VARIANTS[part] if not name.startswith("off")]


GAIN_COLUMNS = ("heads", "batch x length", "SMs", "an SM", "KiB in flight", "off, us", "of the ceiling")


def gain_rows(result: dict[str, Any], part: str) -> list[list[str]]:
    """The map in numbers: the cells under GAIN_COLUMNS and a gain for each of `distances`, a line a row of a part."""
    cells = []
    for row in result["rows"]:
        if row["part"] != part or row["sms_used"] is None:
            continue
        off = without_prefetch(row)
        flight = row["bytes_in_flight"]
        cells.append(
            [
                f"{row['heads_q']}/{row['heads_kv']}",
                lens_label(row["kv_lens"]),
                str(row["sms_used"]),
                _residents(row),
                "-" if flight is None else str(flight >> 10),
                microseconds(off),
                "-" if off is None else f"{row['floor_us'] / off:.0%}",
                *("-" if (found := gain(row, name)) is None else f"{found:.2f}x" for name in distances(part)),
            ]
        )
    return cells


def _residents(row: Row) -> str:
    if row["part"] == "ours":
        return f"{row['blocks_per_sm']} x {row['warps_per_block']} warp{'s' * (row['warps_per_block'] > 1)}"
    return f"{row['resident']} block{'s' * (row['resident'] != 1)}"


KERNEL_NAMES = {
    "residency": "the paper's kernel",
    "table": "the paper's kernel, as many blocks as fit",
    "ours": "ours",
    "flashinfer": "FlashInfer's kernel",
}


def reading(result: dict[str, Any]) -> list[str]:
    """What a map says, a sentence a statement: where the paper's prefetch pays, where it hurts, what is most."""
    found = []
    for part, name in KERNEL_NAMES.items():
        for sms in sorted({row["sms_used"] for row in result["rows"]} - {None}, reverse=True):
            rows = [row for row in result["rows"] if (row["part"], row["sms_used"]) == (part, sms)]
            gains = [(value, row) for row in rows if (value := gain(row)) is not None]
            if gains:
                found.append(f"{name} on {sms} SMs: {_pays(gains)}")
    papers = [
        (value, row)
        for row in result["rows"]
        if row["part"] in ("residency", "table") and (value := gain(row)) is not None
    ]
    if papers:
        most, row = max(papers, key=lambda pair: pair[0])
        reached = "is reached" if most >= 2.15 else "is nowhere reached"
        found.append(
            f"the 2.15x that the paper reports {reached}: the most is {most:.2f}x, on {row['sms_used']} SMs at "
            f"{_where(row)}"
        )
    values = [
        value
        for row in result["rows"]
        if row["part"] == "ours"
        for name in distances("ours")
        if (value := gain(row, name)) is not None
    ]
    if values:
        found.append(f"ours over all distances: {min(values):.2f}x to {max(values):.2f}x, and `auto` adds no run-ahead")
    return found


def _where(row: Row) -> str:
    return (
        f"{row['heads_q']}/{row['heads_kv']} heads, {lens_label(row['kv_lens'])}, {_residents(row)} and "
        f"{row['bytes_in_flight'] >> 10} KiB in flight an SM"
    )


def _pays(gains: list[tuple[float, Row]]) -> str:
    """On how many of some rows the paper's prefetch gains and costs more than noise, and the ends."""
    pays = [(value, row) for value, row in gains if value > 1 + NOISE]
    hurts = [(value, row) for value, row in gains if value < 1 - NOISE]
    text = f"of {len(gains)} points it gains more than {NOISE:.0%} on {len(pays)}"
    if pays:
        most, row = max(pays, key=lambda pair: pair[0])
        flight = max(row["bytes_in_flight"] for _, row in pays) >> 10
        text += f" (up to {most:.2f}x: {_where(row)}; none of them with more than {flight} KiB)"
    text += f" and costs more than {NOISE:.0%} on {len(hurts)}"
    if hurts:
        least, row = min(hurts, key=lambda pair: pair[0])
        text += f" (down to {least:.2f}x: {_where(row)})"
    return text


TABLE_COLUMNS = ("heads", "batch x length", "SMs", "off, us", "on, us", "gain", "of the ceiling, off", "on", *BESIDE)


def table_rows(result: dict[str, Any]) -> list[list[str]]:
    """The paper's table: the cells under TABLE_COLUMNS, a row for every row of the file's "table" part."""
    cells = []
    for row in result["rows"]:
        if row["part"] != "table":
            continue
        off, on = without_prefetch(row), row["us"]["bulk_1"]
        cells.append(
            [
                f"{row['heads_q']}/{row['heads_kv']}",
                lens_label(row["kv_lens"]),
                "-" if row["sms_used"] is None else str(row["sms_used"]),
                microseconds(off),
                microseconds(on),
                "-" if off is None or on is None else f"{off / on:.2f}x",
                *("-" if time is None else f"{row['floor_us'] / time:.0%}" for time in (off, on)),
                *(microseconds(row["us"].get(name)) for name in BESIDE),
            ]
        )
    return cells
