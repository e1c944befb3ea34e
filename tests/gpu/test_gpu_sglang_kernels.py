"""What the SGLang backend launches beside attention, on a GPU: the page table of a step, and an e4m3 cache's store."""

from __future__ import annotations

import pytest
import torch

from fi_prefetch.sglang import kv_store, page_table

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
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_stored_rows_are_pytorchs_conversion(dtype: torch.dtype, kv_heads: int) -> None:
    """Bit for bit, in e4m3's range."""
    generator = torch.Generator("cuda").manual_seed(kv_heads)
    row = kv_heads * 128
    made = torch.randn(65, 3 * row, device="cuda", generator=generator)
    scales = torch.logspace(-4, 1.9, 65, device="cuda")[:, None]
    rows = (made * scales).clamp(-448, 448).to(dtype)
    k, v = (rows[:, part * row :][:, :row].view(65, kv_heads, 128) for part in (1, 2))
    k_cache, v_cache = (torch.zeros(200, kv_heads, 128, device="cuda").to(E4M3) for _ in range(2))
    slots = torch.randperm(200, device="cuda", generator=generator)[:65]
    assert kv_store.takes(k, v)
    kv_store.store(k, v, k_cache, v_cache, slots)
    for cache, stored in ((k_cache, k), (v_cache, v)):
        expected = torch.zeros_like(cache)
        expected.view(torch.uint8)[slots] = stored.to(E4M3).view(torch.uint8)
        assert torch.equal(cache.view(torch.uint8), expected.view(torch.uint8))


def test_what_is_beyond_the_range_becomes_its_end() -> None:
    k = torch.tensor([[[500.0, -1e4, 3.0, 448.0]]], dtype=torch.bfloat16, device="cuda")
    cache = [torch.zeros(2, 1, 4, device="cuda").to(E4M3) for _ in range(2)]
    kv_store.store(k, k, *cache, torch.tensor([1], device="cuda"))
    assert cache[0][1].flatten().tolist() == [448.0, -448.0, 3.0, 448.0]
