"""What the SGLang backend launches beside attention, on a GPU: the page table of a step, and the cache's store."""

from __future__ import annotations

import pytest
import torch

import fi_prefetch
from fi_prefetch import reference
from fi_prefetch.sglang import kv_store, page_table
from fi_prefetch.sglang.decode_wrapper import ServedDecodeWrapper

E4M3 = torch.float8_e4m3fn


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("starts", [False, True])
@pytest.mark.parametrize("requests", [1, 3, 1200])
def test_page_table_of_a_skewed_batch(requests: int, starts: bool, dtype: torch.dtype) -> None:
    generator = torch.Generator("cuda").manual_seed(requests)
    width, begin = 70000, 9
    req_to_token = torch.randint(0, 1 << 30, (40, width), dtype=torch.int32, device="cuda", generator=generator)
    rows = torch.randint(0, 40, (requests,), device="cuda", generator=generator)
    lengths = torch.randint(0, 600, (requests,), dtype=dtype, device="cuda", generator=generator)
    lengths[requests // 2] = 65555
    first = torch.full_like(lengths, begin) if starts else None
    indptr = torch.zeros(requests + 1, dtype=torch.int32, device="cuda")
    indices = torch.full((int(lengths.sum()) + 5,), -1, dtype=torch.int32, device="cuda")
    page_table.fill(req_to_token, rows, lengths, first, indptr, indices)
    from_token = begin if starts else 0
    expected = [
        req_to_token[row, from_token : from_token + length]
        for row, length in zip(rows.tolist(), lengths.tolist(), strict=True)
    ]
    assert torch.equal(indptr[1:], lengths.cumsum(0).int())
    assert torch.equal(indices[:-5], torch.cat(expected))
    assert (indices[-5:] == -1).all()


@pytest.mark.parametrize("kv_heads", [1, 3, 8, 32])
@pytest.mark.parametrize("dependent", [False, True])
@pytest.mark.parametrize("converts", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_stored_rows_are_pytorchs(dtype: torch.dtype, converts: bool, dependent: bool, kv_heads: int) -> None:
    """Bit for bit, in e4m3's range; also right behind the kernels that make them, in a graph."""
    stored_dtype = E4M3 if converts else dtype
    generator = torch.Generator("cuda").manual_seed(kv_heads)
    row = kv_heads * 128
    made = torch.randn(65, 3 * row, device="cuda", generator=generator)
    scales = torch.logspace(-4, 1.9, 65, device="cuda")[:, None]
    numbers = (made * scales).clamp(-448, 448).to(dtype)
    rows = torch.zeros_like(numbers)
    k, v = (rows[:, part * row :][:, :row].view(65, kv_heads, 128) for part in (1, 2))
    k_cache, v_cache = (torch.zeros(200, kv_heads, 128, device="cuda").to(stored_dtype) for _ in range(2))
    slots = 1 + torch.randperm(199, device="cuda", generator=generator)[:65]
    assert kv_store.takes(k, v, slots, stored_dtype)

    def step() -> None:
        rows.copy_(numbers)
        kv_store.store(k, v, k_cache, v_cache, slots, dependent)

    step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    for replay in range(3):
        numbers.copy_(numbers.roll(1, 0))
        graph.replay()
        for cache, stored in ((k_cache, k), (v_cache, v)):
            expected = torch.zeros_like(cache)
            expected.view(torch.uint8)[slots] = stored.to(stored_dtype).view(torch.uint8)
            assert torch.equal(cache.view(torch.uint8), expected.view(torch.uint8)), replay


def test_what_is_beyond_the_range_becomes_its_end() -> None:
    k = torch.tensor([[[500.0, -1e4, 3.0, 448.0]]], dtype=torch.bfloat16, device="cuda")
    cache = [torch.zeros(2, 1, 4, device="cuda").to(E4M3) for _ in range(2)]
    kv_store.store(k, k, *cache, torch.tensor([1], device="cuda"), dependent=True)
    assert cache[0][1].flatten().tolist() == [448.0, -448.0, 3.0, 448.0]


def test_attention_that_starts_beside_the_store_reads_what_it_stores() -> None:
    """A step's chain, as SGLang captures it: something makes the step's queries, K and V, they are stored, and the
    decode kernel, which was promised that no more than the newest tokens is being written, starts before that is done.
    """
    batch, heads, kv_heads, dim, length = 16, 32, 8, 128, 300
    generator = torch.Generator("cuda").manual_seed(0)
    cache = [
        torch.randn(1 + batch * length, 1, kv_heads, dim, device="cuda", generator=generator).bfloat16()
        for _ in range(2)
    ]
    indices = 1 + torch.randperm(batch * length, device="cuda", generator=generator).int()  # slot 0 is nobody's
    indptr = torch.arange(0, batch * length + 1, length, dtype=torch.int32, device="cuda")
    table = (indptr, indices, torch.ones(batch, dtype=torch.int32, device="cuda"))
    slots = indices[indptr[1:].long() - 1].long()
    steps = torch.randn(6, batch, heads + 2 * kv_heads, dim, device="cuda", generator=generator).bfloat16()
    rows = torch.empty_like(steps[0])
    source = torch.empty_like(steps[0])
    q, k, v = rows.split((heads, kv_heads, kv_heads), dim=1)
    wrapper = fi_prefetch.BatchDecodeWithPagedKVCacheWrapper(
        torch.zeros(128 << 20, dtype=torch.uint8, device="cuda"), ready="all_but_last_token"
    )
    wrapper.plan(*table, heads, kv_heads, dim, 1, q_data_type=torch.bfloat16, kv_data_type=torch.bfloat16)
    out = torch.empty(batch, heads, dim, device="cuda", dtype=torch.bfloat16)

    def step() -> None:
        rows.copy_(source)
        kv_store.store(k, v, cache[0][:, 0], cache[1][:, 0], slots, dependent=True)
        wrapper.run(q, tuple(cache), out=out)

    source.copy_(steps[0])
    step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    for made in steps[1:]:
        source.copy_(made)
        graph.replay()
        cache_rows = [part.clone() for part in cache]
        expected, _ = reference.batch_decode(made[:, :heads], *cache_rows, *table, out_dtype=torch.float32)
        for part, stored in zip(cache_rows, made.split((heads, kv_heads, kv_heads), dim=1)[1:], strict=True):
            assert torch.equal(part[slots, 0], stored)
        torch.testing.assert_close(out.float(), expected, atol=5e-3, rtol=2e-2)


@pytest.mark.parametrize("batch", [3, 40])
def test_a_captured_step_goes_by_the_schedule_of_each_replay(batch: int) -> None:
    """As SGLang replays a step: the page table is filled and planned, and all layers go by what was worked out then."""
    heads, kv_heads, dim, layers, longest = 32, 8, 128, 3, 900
    generator = torch.Generator("cuda").manual_seed(batch)
    q = torch.randn(layers, batch, heads, dim, device="cuda", generator=generator).bfloat16()
    caches = [
        [torch.randn(batch * longest, 1, kv_heads, dim, device="cuda", generator=generator).bfloat16() for _ in "kv"]
        for _ in range(layers)
    ]
    shape = (heads, kv_heads, dim, 1)
    wrappers, tables = [], []
    for ready in ("plan", "nothing"):
        tables.append([torch.zeros(n, dtype=torch.int32, device="cuda") for n in (batch + 1, batch * longest, batch)])
        names = ("paged_kv_indptr_buffer", "paged_kv_indices_buffer", "paged_kv_last_page_len_buffer")
        wrappers.append(
            ServedDecodeWrapper(
                torch.zeros(128 << 20, dtype=torch.uint8, device="cuda"),
                use_cuda_graph=True,
                ready=ready,
                **dict(zip(names, tables[-1], strict=True)),
            )
        )

    def fill() -> None:
        lengths = torch.randint(1, longest, (batch,), device="cuda", generator=generator)
        pages = torch.randperm(batch * longest, device="cuda", generator=generator)
        for indptr, indices, last_page_len in tables:
            indptr[1:] = lengths.cumsum(0)
            indices.copy_(pages)
            last_page_len.fill_(1)

    def step(wrapper: ServedDecodeWrapper) -> list[torch.Tensor]:
        return [wrapper.forward(q[layer], tuple(caches[layer]), sm_scale=0.1) for layer in range(layers)]

    fill()
    for wrapper, table in zip(wrappers, tables, strict=True):
        wrapper.plan(*table, *shape, q_data_type=torch.bfloat16)
        step(wrapper)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = step(wrappers[0])
    for _ in range(6):
        fill()
        wrappers[0].begin_forward(*tables[0], *shape, q_data_type=torch.bfloat16)
        graph.replay()
        for output, expected in zip(outputs, step(wrappers[1]), strict=True):
            assert torch.equal(output, expected) and bool(expected.isfinite().all())
