"""The paper's kernel with and without its prefetch, over bytes in flight; benchmarks/results/<gpu>/map.json.

The kernel (csrc/xformers_decode.cuh) is paged attention that loads KV into registers, one thread block to a query head
of a sequence, and can ask for its next KV block to be brought into L2 meanwhile. It runs on the whole GPU and on a
slice of it with about the SMs of the paper's H20 (78), cut with a green context. A row of the result file:

    part             "table": the paper's batches and lengths; "residency": fewer thread blocks an SM than would fit
    heads_q, heads_kv, head_dim, page_size, kv_lens, q_dtype, kv_dtype, kv_bytes
                     the shape; each query head reads its kv head's KV, kv_bytes counts it once
    sms              SMs of the slice; null: the whole GPU
    sms_used         SMs that a captured kernel ran on, counted on the GPU; null where there was no such slice
    most_resident    thread blocks an SM may hold; 0: as many as fit
    resident         thread blocks an SM held: what may be and fits, or what there were; null without a slice
    bytes_in_flight  KV bytes that an SM waited for at a time, at most, without prefetch; null without a slice
    floor_us         kv_bytes at the read ceiling of the whole GPU
    us               time of a call without prefetch ("off", and "off_again" after the others), and with one that many
                     iterations ahead ("bulk_1" is the paper's; "lines_1" has line prefetches in its place); in the
                     table's rows of the whole GPU also that of other kernels on as much KV; null where there is none
    spread, missing  of each of `us`: (90th - 10th percentile) / median; why it is null
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from flashinfer.jit import gen_jit_spec

from fi_prefetch import jit, reference

from .baselines import BASELINES, Call, Unsupported, prepare_ours
from .grid import verified_timing
from .inputs import DecodeInputs, relative_error
from .report import microseconds
from .shapes import Shape, lens_label
from .timing import Timing, calls_per_replay, time_graph
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

# Name in the file -> prefetch, and how many iterations ahead.
VARIANTS = {
    "off": ("off", 1),
    "bulk_1": ("bulk", 1),
    "lines_1": ("lines", 1),
    "bulk_2": ("bulk", 2),
    "bulk_4": ("bulk", 4),
    "off_again": ("off", 1),
}
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
    """The rows to measure: the table and the residencies, each on the whole GPU and on the slice."""
    table = [
        ("table", Shape(*heads, BLOCK_TOKENS, ((length, batch),)), 0)
        for heads in TABLE_HEADS
        for batch in TABLE_BATCHES
        for length in TABLE_LENGTHS
    ]
    residency = [
        ("residency", Shape(*heads, BLOCK_TOKENS, lens), most)
        for heads in RESIDENCY_HEADS
        for lens in RESIDENCY_LENS
        for most in (*RESIDENCIES, 0)
    ]
    return [
        {"part": part, **shape.to_row(), "sms": sms, "most_resident": most}
        for sms in (None, SLICE_SMS)
        for part, shape, most in (*table, *residency)
    ]


def measure(spec: dict[str, Any], context: Context) -> dict[str, Any]:
    """One row, as the module's docstring says."""
    shape, most_resident = Shape.from_row(spec), spec["most_resident"]
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
        row["us"], row["missing"] = dict.fromkeys(VARIANTS), dict.fromkeys(VARIANTS, reason)
        return row
    stream, row["sms_used"] = place
    fitting = module().residency(inputs.q, max(shape.lengths), PREFETCHES["off"], most_resident)
    row["resident"], row["bytes_in_flight"] = bytes_in_flight(shape, row["sms_used"], fitting)
    requests, expected = truth(inputs)

    def paper(prefetch: str, distance: int) -> Timing:
        call = prepare(inputs, prefetch, distance, most_resident)
        inputs.out.fill_(float("nan"))
        call(0)
        check_error(relative_error(inputs.out[requests], expected))
        return time_on(stream, call, inputs.copies)

    for name, (prefetch, distance) in VARIANTS.items():
        record(name, functools.partial(paper, prefetch, distance))
    if spec["part"] == "table" and spec["sms"] is None:
        for name in BESIDE:
            record(name, functools.partial(_beside, name, inputs))
    return row


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


TABLE_COLUMNS = ("heads", "batch x length", "SMs", "off, us", "on, us", "gain", "of the ceiling, off", "on", *BESIDE)


def table_rows(result: dict[str, Any]) -> list[list[str]]:
    """The paper's table: the cells under TABLE_COLUMNS, a row for every row of the file's "table" part."""
    cells = []
    for row in result["rows"]:
        if row["part"] != "table":
            continue
        off, on = row["us"]["off"], row["us"]["bulk_1"]
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
