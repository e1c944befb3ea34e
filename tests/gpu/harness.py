"""One A/B case: inputs, the truth, FlashInfer's answer and ours, and what must hold between them.

The truth is `fi_prefetch.reference` in float64. FlashInfer's answer comes from its tensor-core decode (fa2), the kernel
of the same kind as ours: products of 16-bit operands, float32 sums. Our error must be at most 1.1 times FlashInfer's on
the same values. What FlashInfer needs in another form gets the same values in that form: a K and V of different strides
as contiguous copies, an fp8 cache in the query's dtype (every fp8 number is one exactly). It has no sinks in this
kernel: they scale each row of its output, which is then rounded once more.
"""

from __future__ import annotations

import contextlib
import functools
import math
import random
from dataclasses import dataclass
from typing import Any
from unittest import mock

import flashinfer
import torch

import fi_prefetch
from fi_prefetch import decision, reference

DEVICE = torch.device("cuda")
WORKSPACE_BYTES = 128 << 20
GUARD_BYTES = 256
GUARD_VALUE = 0xA5
SPARE_PAGES = 3

DTYPES = {
    "bf16": torch.bfloat16,
    "f16": torch.float16,
    "e4m3": torch.float8_e4m3fn,
    "e5m2": torch.float8_e5m2,
}
# FlashInfer's own fp8 modules that are worth compiling; other fp8 caches are compared in the query's dtype.
DIRECT_FP8 = {("bf16", "e4m3", 128)}

ERROR_FACTOR = 1.1
LSE_FLOOR = 2e-4
LOG2E = math.log2(math.e)


@dataclass(frozen=True)
class Case:
    """What to decode. `storage`: how K and V lie in memory; `order`: which pages the requests hold; `split`: by the
    batch-invariant kernel, cut after so many pages, or not at all (WHOLE); 0: by the decode kernel. `blocks`: of the
    grid, where little KV is to make long pieces; 0: as planned. `listed`: megabytes of KV that the page table names at
    least, with pages that no request holds: of 64 on the kernel copies small tiles whole."""

    lens: tuple[int, ...] = (100, 37, 64)
    heads: tuple[int, int] = (8, 2)
    dim: int = 128
    page: int = 16
    q: str = "bf16"
    kv: str = "bf16"
    o: str | None = None
    layout: str = "NHD"
    storage: str = "two"
    order: str = "shuffled"
    window: int = -1
    cap: float = 0.0
    position: str = "NONE"
    rope: tuple[float, float] = (1.0, 1e4)
    sinks: bool = False
    q_len: int = 1
    scales: tuple[float | None, float | None, float | None] = (None, None, None)
    sm_scale: float | None = None
    split: int = 0
    blocks: int = 0
    listed: int = 0
    seed: int = 0

    def __str__(self) -> str:
        parts = [f"{self.q}-{self.kv}", f"h{self.heads[0]}.{self.heads[1]}", f"d{self.dim}", f"p{self.page}"]
        lens = ".".join(map(str, self.lens)) if len(self.lens) <= 4 else f"b{len(self.lens)}max{max(self.lens)}"
        parts += [self.layout, self.storage, self.order, f"l{lens}"]
        for name, default in _OPTIONAL:
            value = getattr(self, name)
            if value != default:
                parts.append(f"{name}{value}".replace(" ", ""))
        return "-".join(parts)

    @property
    def unheld_pages(self) -> int:
        """Page numbers that `listed` adds to the page table, none of them a request's."""
        return -(-(self.listed << 20) // (2 * self.page * self.heads[1] * self.dim * DTYPES[self.kv].itemsize))


_OPTIONAL = (
    ("o", None),
    ("window", -1),
    ("cap", 0.0),
    ("position", "NONE"),
    ("rope", (1.0, 1e4)),
    ("sinks", False),
    ("q_len", 1),
    ("scales", (None, None, None)),
    ("sm_scale", None),
    ("split", 0),
    ("blocks", 0),
    ("listed", 0),
    ("seed", 0),
)
WHOLE = -1


@dataclass
class Inputs:
    """A case's tensors. `k` and `v` are views in the case's layout, `cache` is what run() is given, `unused` says which
    slots of the cache no request holds: bool [pages, page]."""

    case: Case
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    cache: Any
    lens: list[int]
    indptr: torch.Tensor
    indices: torch.Tensor
    last_page_len: torch.Tensor
    sinks: torch.Tensor | None
    unused: torch.Tensor

    @property
    def o_dtype(self) -> torch.dtype:
        return DTYPES[self.case.o or self.case.q]

    @property
    def weight_dtype(self) -> torch.dtype:
        """Of the weights that multiply V."""
        return torch.float16 if self.k.dtype.itemsize == 1 else self.q.dtype

    @property
    def weight_rounding(self) -> float:
        """By how much of itself a weight may be rounded."""
        return torch.finfo(self.weight_dtype).eps / 2

    @property
    def rows_with_kv(self) -> torch.Tensor:
        """Rows of q whose request has any KV."""
        with_kv = torch.tensor([length > 0 for length in self.lens], device=self.q.device)
        return with_kv.repeat_interleave(self.case.q_len)


# ---- inputs --------------------------------------------------------------------------------------------------------


def page_table(case: Case, rng: random.Random) -> tuple[list[list[int]], int]:
    """The pages that each request holds, and how many pages the cache has."""
    counts = [-(-length // case.page) for length in case.lens]
    used = sum(counts)
    stride = 3 if case.order == "spread" else 1
    numbers = [stride * i for i in range(used)]
    if case.order != "sequential":
        rng.shuffle(numbers)
    pages, position = [], 0
    for count in counts:
        pages.append(numbers[position : position + count])
        position += count
    if case.order == "shared":  # every request starts with the pages of the one before it
        for before, own in zip(pages[:-1], pages[1:], strict=True):
            common = min(len(before), len(own)) // 2
            own[:common] = before[:common]
    if case.order == "repeated":  # a request holds its first page several times over
        for own in pages:
            own[1::2] = own[:1] * len(own[1::2])
    return pages, stride * used + SPARE_PAGES


def random_values(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, seed: int) -> torch.Tensor:
    generator = torch.Generator(device).manual_seed(seed)
    return torch.randn(shape, generator=generator, device=device, dtype=torch.float32).to(dtype)


def store(values: torch.Tensor, case: Case, padded: bool) -> torch.Tensor:
    """`values` [pages, tokens, heads, dim] as a 4-D view in the case's layout; `padded`: with gaps between rows."""
    pages, tokens, heads, dim = values.shape
    hnd = case.layout == "HND"
    shape = (pages, heads, tokens, dim) if hnd else (pages, tokens, heads, dim)
    if padded:
        padding = 16 // values.dtype.itemsize
        memory = torch.empty(
            (2 * shape[0], shape[1], shape[2], dim + padding), dtype=values.dtype, device=values.device
        )
        memory.view(torch.uint8).fill_(0xFF)  # a NaN in every dtype here
        view = memory[::2, ..., :dim]
    else:
        view = torch.empty(shape, dtype=values.dtype, device=values.device)
    view.copy_(values.transpose(1, 2) if hnd else values)
    return view


def build_cache(k: torch.Tensor, v: torch.Tensor, case: Case) -> tuple[torch.Tensor, torch.Tensor, Any]:
    """K and V as the case stores them: the two 4-D views, and the argument of run()."""
    if case.storage == "one":
        both = torch.stack([store(k, case, False), store(v, case, False)], dim=1)
        return both[:, 0], both[:, 1], both
    if case.storage == "swapped":  # the memory order of the other layout behind this layout's view
        k_view, v_view = (
            t.transpose(1, 2).contiguous().transpose(1, 2) for t in (store(k, case, False), store(v, case, False))
        )
    else:
        k_view = store(k, case, case.storage == "strided")
        v_view = store(v, case, case.storage in ("strided", "different_strides"))
    return k_view, v_view, (k_view, v_view)


def build(case: Case, device: torch.device = DEVICE) -> Inputs:
    """The case's tensors, on `device`."""
    rng = random.Random(case.seed)
    pages, num_pages = page_table(case, rng)
    heads_q, heads_kv = case.heads
    seed = case.seed * 4
    values = (num_pages, case.page, heads_kv, case.dim)
    k = random_values(values, DTYPES[case.kv], device, seed + 1)
    v = random_values(values, DTYPES[case.kv], device, seed + 2)
    counts = torch.tensor([len(own) for own in pages], dtype=torch.int32)
    lens = torch.tensor(case.lens, dtype=torch.int32)
    indptr = torch.zeros(len(pages) + 1, dtype=torch.int32)
    indptr[1:] = counts.cumsum(0)
    indices = torch.tensor([page for own in pages for page in own], dtype=torch.int32)
    last_page_len = torch.where(counts > 0, lens - (counts - 1) * case.page, 0).to(torch.int32)
    tokens_held = torch.full_like(indices, case.page)
    tokens_held[indptr[1:][counts > 0].long() - 1] = last_page_len[counts > 0]
    held = torch.arange(case.page) < tokens_held[:, None]
    holders = torch.zeros(num_pages, case.page, dtype=torch.int32)
    holders.index_put_((indices.long(),), held.to(torch.int32), accumulate=True)

    k_view, v_view, cache = build_cache(k, v, case)
    q = random_values((len(case.lens) * case.q_len, heads_q, case.dim), DTYPES[case.q], device, seed + 3)
    sinks = random_values((heads_q,), torch.float32, device, seed + 4) * 2 if case.sinks else None
    return Inputs(
        case=case,
        q=q,
        k=k_view,
        v=v_view,
        cache=cache,
        lens=list(case.lens),
        indptr=indptr.to(device),
        indices=torch.cat([indices, indices.new_zeros(case.unheld_pages)]).to(device),
        last_page_len=last_page_len.to(device),
        sinks=sinks,
        unused=(holders == 0).to(device),
    )


def poison_unused(inputs: Inputs) -> None:
    """Puts NaN into every slot of the cache that no request holds: who reads one, and lets it count, shows it."""
    for view in (inputs.k, inputs.v):
        slots = view.transpose(1, 2) if inputs.case.layout == "HND" else view
        # By its bytes: an index_put has no fp8 form everywhere.
        integer = torch.uint8 if slots.dtype.itemsize == 1 else torch.int16
        slots.view(integer)[inputs.unused] = -1 if integer is torch.int16 else 0xFF


# ---- three answers -------------------------------------------------------------------------------------------------


def truth(inputs: Inputs) -> tuple[torch.Tensor, torch.Tensor]:
    """Output in float64 and LSE in float32, of the values as they lie in the cache."""
    case = inputs.case
    q_scale, k_scale, v_scale = (1.0 if scale is None else scale for scale in case.scales)
    return reference.batch_decode(
        inputs.q,
        inputs.k,
        inputs.v,
        inputs.indptr,
        inputs.indices,
        inputs.last_page_len,
        kv_layout=case.layout,
        sm_scale=case.sm_scale,
        q_scale=q_scale,
        k_scale=k_scale,
        v_scale=v_scale,
        window_left=case.window,
        logits_soft_cap=case.cap,
        q_len_per_req=case.q_len,
        sinks=inputs.sinks,
        pos_encoding_mode=case.position,
        rope_scale=case.rope[0],
        rope_theta=case.rope[1],
        out_dtype=torch.float64,
        compute_dtype=torch.float64,
    )


@functools.cache
def flashinfer_workspace(device: torch.device) -> torch.Tensor:
    return torch.zeros(256 << 20, dtype=torch.uint8, device=device)


def plan_options(case: Case, kv_dtype: torch.dtype) -> dict[str, Any]:
    return {
        "q_data_type": DTYPES[case.q],
        "kv_data_type": kv_dtype,
        "o_data_type": DTYPES[case.o or case.q],
        "window_left": case.window,
        "logits_soft_cap": case.cap or None,
        "pos_encoding_mode": case.position,
        "rope_scale": case.rope[0],
        "rope_theta": case.rope[1],
        "sm_scale": case.sm_scale,
        "q_len_per_req": case.q_len,
    }


def split_options(case: Case) -> dict[str, Any]:
    """Where our kernel is to cut; FlashInfer answers with splits of its own choice."""
    return {"fixed_split_size": case.split if case.split > 0 else None, "disable_split_kv": case.split == WHOLE}


def flashinfer_answer(inputs: Inputs) -> tuple[torch.Tensor, torch.Tensor]:
    """FlashInfer's output and LSE for the rows that have KV."""
    case, device = inputs.case, inputs.q.device
    cache, kv_dtype = inputs.cache, DTYPES[case.kv]
    # Its tensor-core kernel does not rotate fp8 keys.
    compiled = (case.q, case.kv, case.dim) in DIRECT_FP8 and case.window < 0 and case.cap == 0
    compiled = compiled and case.position == "NONE"
    if case.kv != case.q and not compiled:
        kv_dtype = DTYPES[case.q]
        cache = (inputs.k.to(kv_dtype), inputs.v.to(kv_dtype))
    elif inputs.k.stride() != inputs.v.stride():
        cache = (inputs.k.contiguous(), inputs.v.contiguous())
    with_kv = torch.tensor([length > 0 for length in inputs.lens], device=device)
    counts = (inputs.indptr[1:] - inputs.indptr[:-1])[with_kv]
    indptr = torch.zeros(len(counts) + 1, dtype=torch.int32, device=device)
    indptr[1:] = counts.cumsum(0)
    wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(
        flashinfer_workspace(device), case.layout, use_tensor_cores=True, backend="fa2"
    )
    wrapper.plan(
        indptr,
        inputs.indices,
        inputs.last_page_len[with_kv],
        *case.heads,
        case.dim,
        case.page,
        **plan_options(case, kv_dtype),
    )
    q_scale, k_scale, v_scale = case.scales
    out, lse = wrapper.run(
        inputs.q[inputs.rows_with_kv], cache, q_scale=q_scale, k_scale=k_scale, v_scale=v_scale, return_lse=True
    )
    return (out, lse) if inputs.sinks is None else with_sinks(out, lse, inputs.sinks)


def with_sinks(out: torch.Tensor, lse: torch.Tensor, sinks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """An output and its LSE (base 2), once a logit `sinks[head]` without a value joins the softmax."""
    joined = torch.logaddexp2(lse, sinks * LOG2E)
    return (out.float() * torch.exp2(lse - joined)[..., None]).to(out.dtype), joined


class Guarded:
    """A tensor of NaN (or a workspace of them) between two stretches of memory that nobody may write."""

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device = DEVICE) -> None:
        count = dtype.itemsize
        for size in shape:
            count *= size
        self._memory = torch.full((count + 2 * GUARD_BYTES,), GUARD_VALUE, dtype=torch.uint8, device=device)
        self._inside = self._memory[GUARD_BYTES : GUARD_BYTES + count]
        self.tensor = self._inside.view(dtype).view(shape)
        self.poison()

    def poison(self) -> None:
        self._inside.fill_(0xFF)  # a NaN in float32, float16 and bfloat16

    def damaged(self) -> torch.Tensor:
        """Whether a guard byte is not as it was: a bool on the device, which waits for nothing."""
        guards = torch.cat([self._memory[:GUARD_BYTES], self._memory[-GUARD_BYTES:]])
        return (guards != GUARD_VALUE).any()

    def check(self, what: str) -> None:
        assert not bool(self.damaged()), f"written outside {what}"


@functools.cache
def guarded_workspace() -> Guarded:
    return Guarded((WORKSPACE_BYTES,), torch.uint8)


def new_wrapper(case: Case, **options: Any) -> fi_prefetch.BatchDecodeWithPagedKVCacheWrapper:
    options.setdefault("use_tensor_cores", case.q_len > 1)
    return fi_prefetch.BatchDecodeWithPagedKVCacheWrapper(guarded_workspace().tensor, case.layout, **options)


def grid_of(blocks: int) -> contextlib.AbstractContextManager[Any]:
    """Within the block plans get a grid of so many blocks of as many warps as they may have; 0: their own."""
    if blocks == 0:
        return contextlib.nullcontext()

    def small(module: Any, plan_info: Any, spec: Any, *_: Any) -> Any:
        return module.adjust_plan(plan_info, spec.batch_size, blocks, int(plan_info[1]), 0)

    return mock.patch.object(decision, "_on_tuned_grid", small)


def plan(wrapper: Any, inputs: Inputs) -> None:
    case = inputs.case
    with grid_of(case.blocks):
        wrapper.plan(
            inputs.indptr,
            inputs.indices,
            inputs.last_page_len,
            *case.heads,
            case.dim,
            case.page,
            **plan_options(case, DTYPES[case.kv]),
            **split_options(case),
        )


def run(wrapper: Any, inputs: Inputs, **options: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """One run of our kernel into poisoned, guarded outputs; checks the guards, and that it was our kernel."""
    case = inputs.case
    rows, heads_q, _ = inputs.q.shape
    out, lse = Guarded((rows, heads_q, case.dim), inputs.o_dtype), Guarded((rows, heads_q), torch.float32)
    guarded_workspace().poison()
    q_scale, k_scale, v_scale = case.scales
    wrapper.run(
        inputs.q,
        inputs.cache,
        out=out.tensor,
        lse=lse.tensor,
        return_lse=True,
        q_scale=q_scale,
        k_scale=k_scale,
        v_scale=v_scale,
        sinks=inputs.sinks,
        **options,
    )
    assert wrapper.kernel_choice.kernel == "fi_prefetch", wrapper.kernel_choice.reason
    out.check("out")
    lse.check("lse")
    guarded_workspace().check("the workspace")
    assert_counters_are_zero(wrapper)
    return out.tensor, lse.tensor


def assert_counters_are_zero(wrapper: Any) -> None:
    assert wrapper._counters, "the wrapper has no counters: no kernel of ours has run"
    assert not any(bool(counters.any()) for counters in wrapper._counters), "a counter is not zero after the run"


# ---- what must hold ------------------------------------------------------------------------------------------------


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


def relative_error(out: torch.Tensor, expected: torch.Tensor) -> float:
    return float((out.double() - expected).norm() / expected.norm().clamp(min=1e-30))


def worst_element(out: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest error of an element, relative to it and to its row: one wrong among many right ones shows."""
    scale = expected.abs() + expected.square().mean(-1, keepdim=True).sqrt()
    return float(((out.double() - expected).abs() / scale.clamp(min=1e-30)).max())


def assert_close(
    inputs: Inputs, out: torch.Tensor, lse: torch.Tensor, flashinfer_says: tuple[torch.Tensor, torch.Tensor] | None
) -> None:
    """Our output and LSE against the truth, by FlashInfer's measure (None where no request has any KV)."""
    expected, expected_lse = truth(inputs)
    rows = inputs.rows_with_kv
    assert bool(torch.isfinite(out[rows].float()).all()), "NaN, infinity, or a row that was not written"
    assert not bool(out[~rows].any()), "a request without KV must give zeros"
    assert torch.allclose(lse[~rows], expected_lse[~rows], rtol=0.0, atol=LSE_FLOOR), "LSE of a request without KV"
    if flashinfer_says is None:
        return
    theirs, their_lse = flashinfer_says
    # Both errors are means over the same number of roundings, and vary by about 1 / sqrt(2 n) of themselves.
    roundoff = torch.finfo(inputs.o_dtype).eps / 2
    floor = roundoff / out[rows].numel() ** 0.5
    error, their_error = relative_error(out[rows], expected[rows]), relative_error(theirs, expected[rows])
    assert error <= ERROR_FACTOR * their_error + floor, f"error {error:.3e}, FlashInfer's {their_error:.3e}"
    worst, their_worst = worst_element(out[rows], expected[rows]), worst_element(theirs, expected[rows])
    assert worst <= max(1.5 * their_worst, 8 * roundoff), f"worst {worst:.3e}, FlashInfer's {their_worst:.3e}"
    lse_error = float((lse[rows] - expected_lse[rows]).abs().max())
    their_lse_error = float((their_lse - expected_lse[rows]).abs().max())
    # Of rounded weights, as FlashInfer's: with few of them chance decides whose sum is further off.
    limit = max(ERROR_FACTOR * their_lse_error, LOG2E * inputs.weight_rounding) + LSE_FLOOR
    assert lse_error <= limit, f"LSE off by {lse_error:.3e}, FlashInfer's {their_lse_error:.3e}"


def check(case: Case, **wrapper_options: Any) -> None:
    """The whole of a case: our answer twice, bit for bit the same, and close enough to the truth."""
    inputs = build(case)
    theirs = flashinfer_answer(inputs) if any(inputs.lens) else None
    poison_unused(inputs)
    wrapper = new_wrapper(case, **wrapper_options)
    plan(wrapper, inputs)
    out, lse = run(wrapper, inputs)
    again, lse_again = run(wrapper, inputs)
    assert same_bits(out, again) and same_bits(lse, lse_again), "two runs differ"
    assert_close(inputs, out, lse, theirs)
