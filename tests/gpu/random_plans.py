"""Random sessions: a wrapper that is planned, run, replayed and given other workspaces, every answer held against a
reference of its own.

A case is one answer: one page table, on one shape, with its own features, called in one way. It must be within what
rounding allows of the reference, element by element, LSE too; every byte around the output, the LSE and the workspace
must be as it was; every element of what was NaN before must be written; every counter must be zero again; and the same
call once more must give the same bits. One case in every session is also held against FlashInfer on the same tensors.

Run it through `fi-prefetch check`, or by itself: `python tests/gpu/random_plans.py --cases 20000 --seed 1`. Its last
line says how many cases passed, how many sessions failed, and the seed. A session that fails is printed, ready to be
pasted into REGRESSIONS of test_gpu_random_plans.py; `--shrink` makes it smaller first.
"""

from __future__ import annotations

import argparse
import itertools
import random
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import harness
import numpy as np
import torch
from harness import DTYPES, LOG2E, Case, Guarded, Inputs
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import seed as hypothesis_seed
from hypothesis import strategies as st

import fi_prefetch

CHUNK = 32  # tokens that the reference takes in one go
CASES_A_SESSION = 10
MOST_ELEMENTS = 1 << 24  # of K; more requests than fit are left out

# (q, kv, o, head_dim, sliding window, soft cap): what the suite compiles of ours.
COMPILED = (
    *[(q, q, q, dim, False, False) for q in ("bf16", "f16") for dim in (64, 128, 256)],
    *[("bf16", "bf16", "bf16", dim, True, False) for dim in (64, 128, 256)],
    *[("bf16", "bf16", "bf16", dim, window, True) for dim in (128, 256) for window in (False, True)],
    ("bf16", "bf16", "f16", 128, False, False),
    ("f16", "f16", "bf16", 128, False, False),
    ("bf16", "e4m3", "bf16", 128, True, False),
    *[(q, kv, q, dim, False, False) for q in ("bf16", "f16") for kv in ("e4m3", "e5m2") for dim in (64, 128, 256)],
)
# Of the batch-invariant kernel, by the same. A variant has one for up to 8 query rows a kv head, and one for up to 16.
FIXED_SPLIT_COMPILED = (
    ("bf16", "bf16", "bf16", 128, False, False),
    ("bf16", "e4m3", "bf16", 128, False, False),
    ("bf16", "bf16", "bf16", 64, False, False),
    ("f16", "f16", "f16", 128, True, False),
)
# Of FlashInfer's, by the same: the suite's other tests compare with exactly these.
FLASHINFER_COMPILED = (
    *[("bf16", dim, window, False) for dim in (64, 128, 256) for window in (False, True)],
    *[("bf16", dim, window, True) for dim in (128, 256) for window in (False, True)],
    *[("f16", dim, False, False) for dim in (64, 128, 256)],
)


# ---- what a session is ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Shape:
    """What a plan fixes beside the page table. `split`, `blocks`, `listed`: as of a Case."""

    compiled: tuple[str, str, str, int, bool, bool] = ("bf16", "bf16", "bf16", 128, False, False)
    heads_kv: int = 2
    group: int = 4
    q_len: int = 1
    page: int = 16
    layout: str = "NHD"
    storage: str = "two"
    window: int = 100  # where the variant has one
    cap: float = 30.0
    sm_scale: float | None = None
    split: int = 0
    blocks: int = 0
    listed: int = 0


@dataclass(frozen=True)
class Step:
    """One case.

    Attributes:
        batch, kind, longest: the lengths, see `lengths`.
        order: which pages the requests hold, see `page_table`.
        how: "plan" (plan and run), "run" (run with no new plan), "replay" (of the captured graph, no new plan), "plan
            and replay". The last two are for a session under a graph; "run" without one keeps the page table.
        with_lse, sinks, scales, pdl, stream: of the call; `stream`: on a stream of its own.
        workspace: "same", or another one in the middle of the wrapper's life: "large", or as small as the kernel's own
            `workspace_size` says ("exact").
        seed: of the contents.
    """

    batch: int = 4
    kind: str = "any"
    longest: int = 100
    order: str = "shuffled"
    how: str = "plan"
    with_lse: bool = True
    sinks: bool = False
    scales: tuple[float | None, float | None, float | None] = (None, None, None)
    pdl: bool | None = None
    stream: bool = False
    workspace: str = "same"
    seed: int = 0


@dataclass(frozen=True)
class Session:
    """One wrapper's life. `shapes`: of every step; under a graph there is one, and one batch size."""

    shapes: tuple[Shape, ...]
    steps: tuple[Step, ...]
    graph: bool = False
    policy: str = "auto"
    ready: str = "nothing"
    out_given: bool = True


KINDS = ("any", "equal", "one long", "geometric", "many empty", "tiles", "pages", "all empty")
ORDERS = ("sequential", "shuffled", "spread", "shared", "repeated")
STORAGES = ("one", "two", "strided", "swapped", "different_strides")
POLICIES = ("auto", "off", "paper", "run_ahead=4,prologue=4,early_load=1", "run_ahead=64,prologue=64,streaming_hint=1")


def lengths(step: Step, shape: Shape, budget: int) -> list[int]:
    """A length a request: 0, or at least the query tokens; about `budget` tokens together at most."""
    rng = random.Random(step.seed)
    low = shape.q_len
    high = max(low, step.longest)

    def some(limit: int) -> int:
        return rng.randint(low, max(low, limit))

    mean = max(low, min(high, budget // step.batch))
    if step.kind == "equal":
        lens = [some(mean)] * step.batch
    elif step.kind == "one long":
        lens = [some(min(7 + low, mean)) for _ in range(step.batch)]
        lens[rng.randrange(step.batch)] = high
    elif step.kind == "geometric":
        lens = [some(max(low, high >> min(i, 20))) for i in range(step.batch)]
        rng.shuffle(lens)
    elif step.kind == "many empty":
        lens = [0 if rng.random() < 0.7 else some(mean) for _ in range(step.batch)]
    elif step.kind in ("tiles", "pages"):  # multiples, one less, one more
        unit = 16 if step.kind == "tiles" else shape.page
        lens = [max(low, unit * rng.randint(1, max(1, mean // unit)) + rng.randint(-1, 1)) for _ in range(step.batch)]
    elif step.kind == "all empty":
        lens = [0] * step.batch
    else:
        lens = [0 if rng.random() < 0.1 else some(mean) for _ in range(step.batch)]
    return lens


def case_of(step: Step, shape: Shape, budget: int) -> Case:
    """The case of a step, with fewer requests where the cache would be too large for a quick test."""
    q, kv, o, dim, window, cap = shape.compiled
    room = MOST_ELEMENTS // (shape.heads_kv * dim * shape.page * (3 if step.order == "spread" else 1))
    lens = lengths(step, shape, budget)
    fitting = len(lens)
    while fitting > 1 and sum(-(-length // shape.page) for length in lens[:fitting]) > room:
        fitting = (fitting + 1) // 2
    return Case(
        lens=tuple(lens[:fitting]),
        heads=(shape.heads_kv * shape.group, shape.heads_kv),
        dim=dim,
        page=shape.page,
        q=q,
        kv=kv,
        o=o,
        layout=shape.layout,
        storage=shape.storage,
        order=step.order,
        window=shape.window if window else -1,
        cap=shape.cap if cap else 0.0,
        sinks=step.sinks,
        q_len=shape.q_len,
        scales=step.scales,
        sm_scale=shape.sm_scale,
        split=shape.split,
        blocks=shape.blocks,
        listed=shape.listed,
        seed=step.seed,
    )


# ---- strategies ----------------------------------------------------------------------------------------------------


# Pages; one shape in ten is the batch-invariant kernel's.
FIXED_SPLITS = (harness.WHOLE, 1, 3, 40)
SPLITS = (0,) * 9 * len(FIXED_SPLITS) + FIXED_SPLITS


@st.composite
def shapes(draw: st.DrawFn) -> Shape:
    q_len = draw(st.sampled_from((1, 1, 1, 2, 4, 16)))
    split = draw(st.sampled_from(SPLITS))
    return Shape(
        compiled=draw(st.sampled_from(FIXED_SPLIT_COMPILED if split else COMPILED)),
        heads_kv=draw(st.sampled_from((1, 2, 3, 4, 8))),
        group=draw(st.integers(1, 16 // q_len)),
        q_len=q_len,
        page=draw(st.sampled_from((1, 1, 16, 16, 2, 3, 5, 7, 32, 61, 64, 128))),
        layout=draw(st.sampled_from(("NHD", "HND"))),
        storage=draw(st.sampled_from(STORAGES)),
        window=draw(st.sampled_from((0, 1, 15, 16, 17, 100, 1000))),
        cap=draw(st.sampled_from((1.0, 30.0))),
        sm_scale=draw(st.sampled_from((None, None, 0.02, 0.3))),
        split=split,
        blocks=draw(st.sampled_from((0, 0, 0, 0, 1, 3))),
        # Workspace for every split that a table could have would be too much of it.
        listed=0 if split else draw(st.sampled_from((0, 0, 64))),
    )


BATCHES = (1, 1, 2, 3, 4, 5, 8, 17, 31, 32, 33, 64, 65, 100, 256, 257, 512)
PLAIN_WAYS = ("plan", "plan", "plan", "run")
GRAPH_WAYS = ("replay", "replay", "replay", "plan and replay", "plan", "run")


# In one draw what belongs together: drawing takes longer than a case on the GPU.
CALLS = tuple(
    itertools.product((True, True, False), (False, True), (None, True, False), (False, False, True))
)  # with_lse, sinks, pdl, stream
SCALES = tuple(itertools.product((None, 0.5, 1.7), repeat=3))


@st.composite
def steps(draw: st.DrawFn, ways: tuple[str, ...], largest_batch: int, longest: int) -> Step:
    with_lse, sinks, pdl, stream = draw(st.sampled_from(CALLS))
    kind, order = draw(st.sampled_from(tuple(itertools.product(KINDS, ORDERS))))
    return Step(
        batch=draw(st.sampled_from([batch for batch in BATCHES if batch <= largest_batch])),
        kind=kind,
        longest=draw(st.sampled_from([n for n in (1, 16, 40, 100, 300, 1000, 3000, 9000) if n <= longest])),
        order=order,
        how=draw(st.sampled_from(ways)),
        with_lse=with_lse,
        sinks=sinks,
        scales=draw(st.sampled_from(SCALES)),
        pdl=pdl,
        stream=stream,
        workspace=draw(st.sampled_from(("same",) * 8 + ("large", "exact"))),
        seed=draw(st.integers(0, 1000)),
    )


@st.composite
def sessions(draw: st.DrawFn, largest_batch: int = 512, longest: int = 9000) -> Session:
    graph = draw(st.sampled_from((False, True)))
    ways = GRAPH_WAYS if graph else PLAIN_WAYS
    some_steps = st.lists(steps(ways, largest_batch, longest), min_size=CASES_A_SESSION, max_size=CASES_A_SESSION)
    return Session(
        shapes=tuple(draw(st.lists(shapes(), min_size=1, max_size=1 if graph else 4))),
        steps=tuple(draw(some_steps)),
        graph=graph,
        policy=draw(st.sampled_from(POLICIES)),
        ready=draw(st.sampled_from(("nothing", "page_table", "all_but_last_token", "plan"))),
        out_given=draw(st.booleans()),
    )


# ---- tensors -------------------------------------------------------------------------------------------------------


def page_table(case: Case, num_pages: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """indptr, indices, last_page_len, and which slots [num_pages, page] a request holds."""
    rng = np.random.default_rng(case.seed)
    lens = np.array(case.lens, dtype=np.int64)
    counts = -(-lens // case.page)
    indptr = np.concatenate([[0], counts.cumsum()])
    used = int(indptr[-1])
    step = 3 if case.order == "spread" and 3 * used <= num_pages else 1
    indices = np.arange(used) * step
    if case.order != "sequential":
        indices = rng.permutation(indices)
    if case.order == "shared":  # every request begins with pages of the first long one
        longest = int(counts.argmax())
        first = indices[indptr[longest] : indptr[longest + 1]].copy()
        for begin, count in zip(indptr[:-1], counts, strict=True):
            common = min(int(count) // 2, len(first))
            indices[begin : begin + common] = first[:common]
    if case.order == "repeated":  # a request holds its first page several times over
        for begin, count in zip(indptr[:-1], counts, strict=True):
            indices[begin + 1 : begin + count : 2] = indices[begin : begin + 1] if count else 0
    last = np.where(counts > 0, lens - (counts - 1) * case.page, 0)
    tokens = np.full(used, case.page)
    tokens[indptr[1:][counts > 0] - 1] = last[counts > 0]
    held = np.zeros((num_pages, case.page), dtype=bool)
    held[indices[tokens == case.page]] = True
    for page, count in zip(indices[tokens < case.page], tokens[tokens < case.page], strict=True):
        held[page, :count] = True
    return indptr.astype(np.int32), indices.astype(np.int32), last.astype(np.int32), held


def cache_pages(case: Case) -> int:
    """How many pages a cache for the case has."""
    used = sum(-(-length // case.page) for length in case.lens)
    return (3 if case.order == "spread" else 1) * used + harness.SPARE_PAGES


class Memory:
    """A K and V of one shape, which every case fills anew: random where a request holds a slot, NaN elsewhere."""

    def __init__(self, case: Case, num_pages: int, device: torch.device) -> None:
        shape = (num_pages, case.page, case.heads[1], case.dim)
        zeros = torch.zeros(shape, dtype=torch.float32, device=device).to(DTYPES[case.kv])
        self.k, self.v, self.cache = harness.build_cache(zeros, zeros, case)
        self.shape, self.device, self.num_pages = shape, device, num_pages

    def load(self, case: Case) -> Inputs:
        """The case's tensors, its values written into this memory."""
        table = page_table(case, self.num_pages)
        indptr, indices, last_page_len, held = (torch.from_numpy(part).to(self.device) for part in table)
        indices = torch.cat([indices, indices.new_zeros(case.unheld_pages)])
        for number, view in ((1, self.k), (2, self.v)):
            generator = torch.Generator(self.device).manual_seed(4 * case.seed + number)
            values = torch.randn(self.shape, generator=generator, device=self.device)
            values = values.masked_fill_(~held[:, :, None, None], torch.nan).to(DTYPES[case.kv])
            view.copy_(values.transpose(1, 2) if case.layout == "HND" else values)
        rows = (len(case.lens) * case.q_len, case.heads[0])
        q = harness.random_values((*rows, case.dim), DTYPES[case.q], self.device, 4 * case.seed + 3)
        sinks = None
        if case.sinks:
            sinks = 2 * harness.random_values(rows[1:], torch.float32, self.device, 4 * case.seed + 4)
        return Inputs(
            case, q, self.k, self.v, self.cache, list(case.lens), indptr, indices, last_page_len, sinks, ~held
        )


# ---- the reference -------------------------------------------------------------------------------------------------


@dataclass
class Truth:
    """The answer in float32, and how far rounding may take another from it, element by element."""

    out: torch.Tensor
    lse: torch.Tensor
    out_error: torch.Tensor
    lse_error: float


def chunk_tokens(inputs: Inputs, view: torch.Tensor, pages: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
    """float32 [chunks, CHUNK, heads, dim] of a paged K or V."""
    slots_first = view.transpose(1, 2) if inputs.case.layout == "HND" else view
    # By its bytes: not every PyTorch can index an fp8 tensor.
    raw = slots_first.view(torch.uint8 if view.element_size() == 1 else torch.int16)[pages, slots]
    return raw.view(view.dtype).float()


def truth(inputs: Inputs) -> Truth:
    """All requests at once, CHUNK tokens of one request a row: sums over a request are sums over its rows.

    What it has in common with the kernel is the definition of attention and nothing else: no tiles, no running maximum,
    no 16-bit weights.
    """
    case = inputs.case
    device = inputs.q.device
    batch, (heads_q, heads_kv), q_len = len(case.lens), case.heads, case.q_len
    group = heads_q // heads_kv
    q_scale, k_scale, v_scale = (1.0 if scale is None else scale for scale in case.scales)
    scale = (case.dim**-0.5 if case.sm_scale is None else case.sm_scale) * q_scale * k_scale
    lens = np.array(case.lens, dtype=np.int64)
    chunks = -(-lens // CHUNK)
    first_chunk = chunks.cumsum() - chunks
    owner_host = np.repeat(np.arange(batch), chunks)
    start = (np.arange(len(owner_host)) - first_chunk[owner_host]) * CHUNK
    owner = torch.from_numpy(owner_host).to(device)
    position = torch.from_numpy(start[:, None] + np.arange(CHUNK)).to(device)
    length = torch.from_numpy(lens[owner_host]).to(device)
    valid = position < length[:, None]
    inside = torch.where(valid, position, 0)
    pages = inputs.indices[inputs.indptr[owner].long()[:, None] + inside // case.page].long()
    slots = inside % case.page
    keep = valid[:, :, None, None]
    k = torch.where(keep, chunk_tokens(inputs, inputs.k, pages, slots), 0.0).permute(0, 2, 3, 1)
    v = torch.where(keep, chunk_tokens(inputs, inputs.v, pages, slots), 0.0).transpose(1, 2)

    rows = q_len * group
    q = inputs.q.float().view(batch, q_len, heads_kv, group, case.dim).transpose(1, 2).reshape(
        batch, heads_kv, rows, case.dim
    )  # fmt: skip
    logits = torch.matmul(q[owner], k) * scale
    if case.cap > 0:
        logits = case.cap * torch.tanh(logits / case.cap)
    query_position = length[:, None] - q_len + torch.arange(q_len, device=device)
    seen = valid[:, None, :] & (position[:, None, :] <= query_position[:, :, None])
    if case.window >= 0:
        seen &= position[:, None, :] >= query_position[:, :, None] - case.window
    seen = seen.repeat_interleave(group, dim=1)[:, None]
    logits = logits.masked_fill(~seen, -torch.inf)

    def over_chunks(x: torch.Tensor) -> torch.Tensor:
        return torch.zeros(batch, *x.shape[1:], device=device).index_add_(0, owner, x)

    greatest = torch.full((batch, heads_kv, rows), -torch.inf, device=device)
    of_chunks = logits.amax(-1)
    greatest.scatter_reduce_(0, owner.view(-1, 1, 1).expand_as(of_chunks), of_chunks, "amax")
    sink = None
    if inputs.sinks is not None:
        sink = inputs.sinks.view(heads_kv, 1, group).expand(heads_kv, q_len, group).reshape(heads_kv, rows)
        greatest = torch.maximum(greatest, sink)
    base = greatest.masked_fill(greatest == -torch.inf, 0.0)
    weights = torch.exp(logits - base[owner][..., None])
    total = over_chunks(weights.sum(-1))
    if sink is not None:
        total = total + torch.exp(sink - base)
    inverse = torch.where(total > 0, 1 / total, 0.0)[..., None] * v_scale
    out = over_chunks(torch.matmul(weights, v)) * inverse
    magnitude = over_chunks(torch.matmul(weights, v.abs())) * inverse.abs()
    lse = (base + torch.log(total)) * LOG2E

    # float32 sums of `dim` products, whatever their order, and the instructions' approximations of exp2.
    logit_error = 4e-6 * (1 + abs(scale) * case.dim)
    weight_error = inputs.weight_rounding + 2 * logit_error + 2e-5
    out_rounding = torch.finfo(inputs.o_dtype).eps / 2
    smallest = torch.finfo(inputs.o_dtype).smallest_normal * out_rounding
    # Weights below 2^-25 of the greatest are none in half; their signs and those of their values are random.
    lost = 2.0**-22 * max(case.lens, default=0) ** 0.5 * abs(v_scale) if inputs.weight_dtype is torch.float16 else 0.0
    error = 1.01 * (out_rounding * out.abs() + weight_error * magnitude) + 2 * smallest + lost + 1e-7

    def by_row(x: torch.Tensor) -> torch.Tensor:
        rest = x.shape[3:]
        order = x.view(batch, heads_kv, q_len, group, *rest).transpose(1, 2)
        return order.reshape(batch * q_len, heads_q, *rest)

    lse_error = harness.LSE_FLOOR + 2 * logit_error + LOG2E * inputs.weight_rounding
    return Truth(by_row(out), by_row(lse), by_row(error), lse_error)


# ---- running a session ---------------------------------------------------------------------------------------------


class Wrong(AssertionError):
    """An answer, a guard or a counter is not as it must be."""


class Runner:
    """Runs sessions on one device; `passed` counts cases, each once however often it is drawn, `compared` those that
    FlashInfer answered too.

    Args:
        budget: tokens of a batch, about.
        compare: whether FlashInfer answers as well.
        repeat: whether every call is made twice.
        workspace_bytes: room for the largest batch in splits of one tile.
    """

    def __init__(
        self, device: torch.device, budget: int = 8192, compare: bool = True, repeat: bool = True,
        workspace_bytes: int = 192 << 20,
    ) -> None:  # fmt: skip
        torch.set_float32_matmul_precision("highest")  # for the reference
        self.device, self.budget, self.compare, self.repeat = device, budget, compare, repeat
        self.passed = self.compared = self.sessions = 0
        self.seen: Counter[str] = Counter()
        self.known: set[Any] = set()
        self.on_gpu = device.type == "cuda"
        self.large = [Guarded((size,), torch.uint8, device) for size in (workspace_bytes, workspace_bytes + (1 << 20))]

    def run(self, session: Session) -> None:
        """All steps of a session. Raises Wrong, with the step's number, where one is."""
        self.sessions += 1
        life = _Life(self, session)
        try:
            for number, step in enumerate(session.steps):
                try:
                    life.step(number, step)
                except Exception as error:
                    raise Wrong(f"step {number} ({step.how}): {type(error).__name__}: {error}") from error
                shape = session.shapes[number % len(session.shapes)]
                case = (shape, step, session.graph, session.policy, session.ready, session.out_given)
                if case not in self.known:
                    self.known.add(case)
                    self.passed += 1
                    self.seen[step.how] += 1
        finally:
            life.end()


class _Life:
    """A session on the way."""

    def __init__(self, runner: Runner, session: Session) -> None:
        self.runner, self.session, self.device = runner, session, runner.device
        self.workspace = runner.large[0]
        self.must_grow = False
        self.captured: tuple[Any, ...] | None = None
        self.planned: Case | None = None
        self.memory: Memory | None = None
        # A wrapper has one layout for life.
        layout = session.shapes[0].layout
        self.shapes = [replace(shape, layout=layout) for shape in session.shapes]
        options: dict[str, Any] = {"prefetch": session.policy, "ready": session.ready}
        if session.graph:
            self._prepare_for_a_graph()

            def buffer(size: int) -> torch.Tensor:
                return torch.zeros(size, dtype=torch.int32, device=self.device)

            batch = len(self.cases[0].lens)
            options |= {
                "use_cuda_graph": True,
                "paged_kv_indptr_buffer": buffer(batch + 1),
                "paged_kv_indices_buffer": buffer(self.memory.num_pages + self.cases[0].unheld_pages),
                "paged_kv_last_page_len_buffer": buffer(batch),
            }
        self.wrapper = fi_prefetch.BatchDecodeWithPagedKVCacheWrapper(self.workspace.tensor, layout, **options)

    def _prepare_for_a_graph(self) -> None:
        """One batch size, one cache, and the same scales and sinks or none: the first step's."""
        first = self.session.steps[0]
        fixed = {"batch": first.batch, "scales": first.scales, "sinks": first.sinks}
        cases = [case_of(replace(step, **fixed), self.shapes[0], self.runner.budget) for step in self.session.steps]
        batch = min(len(case.lens) for case in cases)
        self.cases = [replace(case, lens=case.lens[:batch]) for case in cases]
        self.memory = Memory(self.cases[0], max(map(cache_pages, self.cases)), self.device)

    def end(self) -> None:
        if self.runner.on_gpu:
            torch.cuda.synchronize()

    def step(self, number: int, step: Step) -> None:
        runner, wrapper = self.runner, self.wrapper
        how = step.how
        if self.planned is None and how != "plan":
            how = "plan and replay" if self.session.graph else "plan"
        if self.session.graph:
            case = self.cases[number]
        elif how == "run":  # of the lengths that were planned, with other contents at other places
            case = replace(self.planned, seed=step.seed, sinks=step.sinks, scales=step.scales)
        else:
            case = case_of(step, self.shapes[number % len(self.shapes)], runner.budget)
            self.memory = Memory(case, cache_pages(case), self.device)
        inputs = self.memory.load(case)
        self._set_workspace(step, inputs)
        if how in ("plan", "plan and replay") or self.session.ready == "plan":
            harness.plan(wrapper, inputs)
            self.planned = case
        else:
            # What a server does between replays: writes the page table where the plan's is.
            wrapper._paged_kv_indptr_buf.copy_(inputs.indptr)
            wrapper._paged_kv_indices_buf[: len(inputs.indices)].copy_(inputs.indices)
            wrapper._paged_kv_last_page_len_buf.copy_(inputs.last_page_len)
        assert wrapper.kernel_choice.kernel == "fi_prefetch", wrapper.kernel_choice.reason
        expected = truth(inputs)
        replayed = "replay" in how and runner.on_gpu
        out, lse, complaints = self._replay(inputs, step) if replayed else self._run(inputs, step)
        self._judge(inputs, expected, out, lse, complaints)
        if number == 0 and runner.compare:
            self._against_flashinfer(inputs, expected, out)

    def _set_workspace(self, step: Step, inputs: Inputs) -> None:
        """Another float workspace in the middle of the wrapper's life, on which the plan stays; a captured graph, which
        knows the old one, does not."""
        if self.planned is None or (step.workspace == "same" and not self.must_grow):
            return
        case, wrapper = inputs.case, self.wrapper
        if step.workspace == "exact":
            options = harness.plan_options(case, DTYPES[case.kv]) | harness.split_options(case)
            table = (inputs.indptr, inputs.indices, inputs.last_page_len)
            size, _ = wrapper.workspace_size(*table, *case.heads, case.dim, case.page, **options)
            size = max(size, wrapper._decision.partial_bytes, 16)  # a plan that stays may have a larger grid
            chosen = Guarded((size,), torch.uint8, self.device)
        else:
            chosen = self.runner.large[self.workspace is self.runner.large[0]]
        self.must_grow = step.workspace == "exact"
        wrapper.reset_workspace_buffer(chosen.tensor, torch.zeros(1 << 20, dtype=torch.uint8, device=self.device))
        self.workspace, self.captured = chosen, None

    def _arguments(self, inputs: Inputs, step: Step) -> dict[str, Any]:
        q_scale, k_scale, v_scale = inputs.case.scales
        return {"q_scale": q_scale, "k_scale": k_scale, "v_scale": v_scale, "sinks": inputs.sinks,
                "enable_pdl": step.pdl}  # fmt: skip

    def _outputs(self, inputs: Inputs) -> tuple[Guarded, Guarded]:
        rows, heads, dim = inputs.q.shape
        return (
            Guarded((rows, heads, dim), inputs.o_dtype, self.device),
            Guarded((rows, heads), torch.float32, self.device),
        )

    def _run(self, inputs: Inputs, step: Step) -> tuple[torch.Tensor, torch.Tensor | None, list[torch.Tensor]]:
        guarded_out, guarded_lse = self._outputs(inputs)
        options = self._arguments(inputs, step)
        given = self.session.out_given
        self.workspace.poison()

        def call() -> tuple[torch.Tensor, torch.Tensor | None]:
            if not step.with_lse:
                return self.wrapper.run(
                    inputs.q, inputs.cache, out=guarded_out.tensor if given else None, **options
                ), None
            return self.wrapper.run(
                inputs.q, inputs.cache, out=guarded_out.tensor if given else None,
                lse=guarded_lse.tensor if given else None, return_lse=True, **options,
            )  # fmt: skip

        if step.stream and self.runner.on_gpu:
            lane = torch.cuda.Stream()
            lane.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(lane):
                out, lse = call()
            torch.cuda.current_stream().wait_stream(lane)
        else:
            out, lse = call()
        complaints = [guarded_out.damaged(), guarded_lse.damaged()]
        if self.runner.repeat:
            first, first_lse = out.clone(), None if lse is None else lse.clone()
            if given:
                guarded_out.poison()
                guarded_lse.poison()
            again, again_lse = call()
            complaints.append(different(first, again))
            if first_lse is not None:
                complaints.append(different(first_lse, again_lse))
        return out, lse, complaints

    def _replay(self, inputs: Inputs, step: Step) -> tuple[torch.Tensor, torch.Tensor, list[torch.Tensor]]:
        """A graph holds on to its tensors: those of the capture are filled with this case's."""
        if self.captured is None:
            outs = self._outputs(inputs)
            q = inputs.q.clone()
            sinks = None if inputs.sinks is None else inputs.sinks.clone()
            held = replace_inputs(inputs, q=q, sinks=sinks)
            options = self._arguments(held, step)
            graph = torch.cuda.CUDAGraph()
            lane = torch.cuda.Stream()
            lane.wait_stream(torch.cuda.current_stream())

            def call() -> None:
                self.wrapper.run(q, inputs.cache, out=outs[0].tensor, lse=outs[1].tensor, return_lse=True, **options)

            with torch.cuda.stream(lane):  # not torch.cuda.graph, which collects garbage for 50 ms first
                call()
                graph.capture_begin()
                try:
                    call()
                finally:
                    graph.capture_end()
            torch.cuda.current_stream().wait_stream(lane)
            self.captured = (graph, q, sinks, outs)
        graph, q, sinks, outs = self.captured
        q.copy_(inputs.q)
        if sinks is not None:
            sinks.copy_(inputs.sinks)
        self.workspace.poison()
        for guarded in outs:
            guarded.poison()
        graph.replay()
        complaints = [guarded.damaged() for guarded in outs]
        out, lse = (guarded.tensor.clone() for guarded in outs)
        if self.runner.repeat:
            for guarded in outs:
                guarded.poison()
            graph.replay()
            complaints += [different(out, outs[0].tensor), different(lse, outs[1].tensor)]
        return out, lse, complaints

    def _judge(
        self, inputs: Inputs, expected: Truth, out: torch.Tensor, lse: torch.Tensor | None,
        complaints: list[torch.Tensor],
    ) -> None:  # fmt: skip
        """One copy to the host for everything that is asked of a case."""
        off = (out.float() - expected.out).abs() / expected.out_error
        worst = torch.nan_to_num(off, nan=torch.inf).amax()
        lse_off = torch.zeros((), device=out.device)
        if lse is not None:
            allowed = expected.lse_error * (1 + 1e-3 * expected.lse.abs().nan_to_num(posinf=0.0))
            off_by = torch.nan_to_num((lse - expected.lse).abs() / allowed, nan=torch.inf)
            lse_off = torch.where(lse == expected.lse, 0.0, off_by).amax()  # equal infinities have no difference
        counters = torch.stack([counters.any() for counters in self.wrapper._counters]).any()
        flags = [worst, lse_off, counters, self.workspace.damaged(), *complaints]
        numbers = torch.stack([flag.to(torch.float32).view(()) for flag in flags]).tolist()
        if not numbers[0] <= 1:
            where = torch.nan_to_num(off, nan=torch.inf).flatten().argmax()
            index = [int(i) for i in torch.unravel_index(where, off.shape)]
            got, want = float(out.flatten()[where]), float(expected.out.flatten()[where])
            raise Wrong(f"out{index} is {got}, expected {want}: off by {numbers[0]:.3g} of what rounding allows")
        if not numbers[1] <= 1:
            raise Wrong(f"LSE is off by {numbers[1]:.3g} of what rounding allows")
        names = (
            "a counter is not zero",
            "written outside the workspace",
            "written outside out",
            "written outside lse",
            "a second call gave another output",
            "a second call gave another LSE",
        )
        for name, number in zip(names, numbers[2:], strict=False):
            if number:
                raise Wrong(name)

    def _against_flashinfer(self, inputs: Inputs, expected: Truth, out: torch.Tensor) -> None:
        """Our error at most 1.1 times FlashInfer's on the same tensors."""
        case = inputs.case
        if (case.q, case.dim, case.window >= 0, case.cap > 0) not in FLASHINFER_COMPILED or case.o != case.q:
            return
        if not any(case.lens) or (case.q_len > 1 and 0 in case.lens):
            return
        # FlashInfer multiplies what it read of a slot by a weight of zero: it gets numbers where ours got NaN.
        clean = replace_inputs(inputs, **{name: without_nan(getattr(inputs, name)) for name in ("k", "v")})
        clean = replace_inputs(clean, cache=(clean.k, clean.v))
        theirs, _ = harness.flashinfer_answer(clean)
        rows = inputs.rows_with_kv
        want = expected.out[rows]
        error = harness.relative_error(out[rows], want.double())
        their_error = harness.relative_error(theirs, want.double())
        # Means over the same number of roundings: three deviations, or thousands of cases would show one by chance.
        floor = 3 * torch.finfo(inputs.o_dtype).eps / 2 / want.numel() ** 0.5
        if not error <= harness.ERROR_FACTOR * their_error + floor:
            raise Wrong(f"error {error:.3e}, FlashInfer's {their_error:.3e}")
        self.runner.compared += 1


def without_nan(view: torch.Tensor) -> torch.Tensor:
    """A copy with zeros for NaN, in strides that FlashInfer takes."""
    return torch.nan_to_num(view.float(), nan=0.0).to(view.dtype)


def replace_inputs(inputs: Inputs, **changes: Any) -> Inputs:
    return Inputs(**{**inputs.__dict__, **changes})


def different(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    integer = {2: torch.int16, 4: torch.int32}[a.element_size()]
    return (a.contiguous().view(integer) != b.contiguous().view(integer)).any()


# ---- the recorded run ----------------------------------------------------------------------------------------------


def explore(runner: Runner, cases: int, seed: int, strategy: st.SearchStrategy[Session], shrink: bool = False) -> None:
    """Runs sessions until `cases` cases have passed. Raises what the first failing session raises."""
    phases = (Phase.generate, Phase.shrink) if shrink else (Phase.generate,)
    numbers = itertools.count(1)
    failures: list[Exception] = []

    def search(count: int, seed: int) -> Callable[[], None]:
        @hypothesis_seed(seed)
        @settings(
            max_examples=count,
            deadline=None,
            database=None,
            suppress_health_check=list(HealthCheck),
            phases=phases,
            print_blob=True,
        )
        @given(strategy)
        def one(session: Session) -> None:
            if failures:  # hypothesis asks once more, to be sure
                raise failures[0]
            if not shrink:
                # A search repeats what it has drawn: each case still has lengths, pages and values of its own.
                salt = 1_000_003 * (seed % 1_000_003) + 100 * next(numbers)
                steps = [
                    replace(step, seed=1000 * (salt + i) + step.seed % 1000) for i, step in enumerate(session.steps)
                ]
                session = replace(session, steps=tuple(steps))
            try:
                runner.run(session)
            except Exception as error:
                print(f"random: this session fails: {session!r}", flush=True)
                if not shrink:
                    failures.append(error)
                raise

        return one

    turn = 0
    while runner.passed < cases:
        # In turns: a search that has gone on for long draws more slowly, and no search repeats a session.
        search(min(250, -(-(cases - runner.passed) // CASES_A_SESSION)), seed + 1_000_003 * turn)()
        turn += 1


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--cases", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=None, help="a new one where left out")
    parser.add_argument("--shrink", action="store_true", help="look for a smaller failing session, for up to 5 minutes")
    options = parser.parse_args(arguments)
    seed = options.seed if options.seed is not None else random.SystemRandom().randrange(1 << 31)
    print(f"random: seed {seed}", flush=True)
    runner = Runner(harness.DEVICE)
    start = time.monotonic()
    failed = 0
    try:
        explore(runner, options.cases, seed, sessions(), options.shrink)
    except Exception:
        failed = 1
        traceback.print_exc()
    seconds = time.monotonic() - start
    print(f"random: {runner.sessions} sessions in {seconds:.0f} s, {runner.compared} also against FlashInfer, "
          f"{dict(runner.seen)}", flush=True)  # fmt: skip
    print(f"random: {runner.passed} passed, {failed} failed, seed {seed}", flush=True)
    return failed


if __name__ == "__main__":
    sys.exit(main())
