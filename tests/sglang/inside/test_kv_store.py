"""A step's K and V in an e4m3 cache: which steps we store, and what is in the cache then."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import triton
from sglang.srt.layers.attention.flashinfer_backend import FlashInferAttnBackend
from sglang.srt.layers.radix_attention import RadixAttention
from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool, UnquantizedKVCacheMethod
from triton.backends.compiler import GPUTarget

from fi_prefetch.sglang import kv_store
from fi_prefetch.sglang.cuda_backend import FiPrefetchAttnBackend

E4M3 = torch.float8_e4m3fn
SLOTS = torch.tensor([3, 0, 7, 8, 1])


def pool(kind: type = MHATokenToKVPool, dtype: torch.dtype = E4M3, layout: str = "nhd", quantized: bool = False) -> Any:
    made = object.__new__(kind)
    made.dtype, made.kv_cache_layout = dtype, layout
    made.quant_method = None if quantized else object.__new__(UnquantizedKVCacheMethod)
    return made


def projection(dtype: torch.dtype = torch.bfloat16) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Five tokens' queries, K and V in the rows that one projection made, of numbers that e4m3 has."""
    generator = torch.Generator().manual_seed(1)
    mantissas = torch.randint(8, 16, (5, (6 + 2 + 2) * 24), generator=generator)
    exponents = torch.randint(-6, 5, mantissas.shape, generator=generator)
    signs = torch.randint(0, 2, mantissas.shape, generator=generator) * 2 - 1
    rows = (signs * mantissas * 2.0**exponents).to(dtype)
    q, k, v = rows.split((6 * 24, 2 * 24, 2 * 24), dim=1)
    return q, k.view(5, 2, 24), v.view(5, 2, 24)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rows_go_where_their_tokens_do(dtype: torch.dtype) -> None:
    _, k, v = projection(dtype)
    k_cache, v_cache = (torch.zeros(9, 2, 24).to(E4M3) for _ in range(2))
    assert kv_store.takes(k, v)
    kv_store.store(k, v, k_cache, v_cache, SLOTS)
    for cache, stored in ((k_cache, k), (v_cache, v)):
        assert torch.equal(cache[SLOTS].float(), stored.float())
        assert not cache.float()[[2, 4, 5, 6]].any()


def test_nobody_stores_nothing() -> None:
    k = torch.empty(0, 2, 24, dtype=torch.bfloat16)
    cache = torch.zeros(9, 2, 24).to(E4M3)
    kv_store.store(k, k, cache, cache, torch.empty(0, dtype=torch.int64))


def test_a_gpu_rounds_to_the_nearest(monkeypatch: pytest.MonkeyPatch) -> None:
    """As PyTorch does, in SGLang's conversion; Triton's interpreter rounds otherwise."""
    tensors = {"k": "*bf16", "v": "*bf16", "k_cache": "*fp8e4nv", "v_cache": "*fp8e4nv", "slots": "*i64"}
    numbers = dict.fromkeys(("k_stride", "v_stride", "k_cache_stride", "v_cache_stride", "row"), "i32")
    kernel = triton.JITFunction(kv_store._store.fn)
    monkeypatch.setattr(kv_store, "_store_row", triton.JITFunction(kv_store._store_row.fn))
    source = triton.compiler.ASTSource(kernel, tensors | numbers | {"BLOCK": "constexpr"}, constexprs={"BLOCK": 1024})
    ptx = triton.compile(source, target=GPUTarget("cuda", 90, 32)).asm["ptx"]
    assert "cvt.rn.satfinite.e4m3x2.f32" in ptx


class Derived(MHATokenToKVPool):
    """A pool of SGLang's with places of its own."""


@pytest.mark.parametrize(
    ("its_pool", "served"),
    [
        (pool(), True),
        (pool(Derived), False),
        (pool(dtype=torch.bfloat16), False),
        (pool(dtype=torch.float8_e5m2), False),
        (pool(layout="hnd"), False),
        (pool(quantized=True), False),
        (SimpleNamespace(dtype=E4M3), False),
    ],
    ids=["e4m3", "derived", "bf16", "e5m2", "heads first", "quantized", "another"],
)
def test_pools_whose_rows_we_know(its_pool: Any, served: bool) -> None:
    assert kv_store.serves(its_pool, torch.device("cpu")) is served


def test_gpus_without_the_conversion_are_left_to_sglang(monkeypatch: pytest.MonkeyPatch) -> None:
    for capability, served in (((8, 0), False), ((8, 9), True), ((9, 0), True)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, found=capability: found)
        assert kv_store.serves(pool(), torch.device("cuda")) is served


def test_rows_that_are_not_dense_or_not_alike_are_left_to_sglang() -> None:
    _, k, v = projection()
    assert not kv_store.takes(k.transpose(1, 2), v.transpose(1, 2))
    assert not kv_store.takes(k, v[:, :1])
    assert not kv_store.takes(k.float(), v.float())


def layer(**more: Any) -> RadixAttention:
    made = RadixAttention(6, 24, 0.125, 2, 0)
    for name, value in more.items():
        setattr(made, name, value)
    return made


@pytest.mark.parametrize(
    ("more", "ours"),
    [({}, True), ({"k_scale": torch.tensor(2.0)}, False), ({"is_cross_attention": True}, False)],
    ids=["plain", "with a scale", "an encoder's"],
)
@pytest.mark.parametrize("stores", [True, False])
def test_sglang_stores_what_we_do_not(
    monkeypatch: pytest.MonkeyPatch, more: dict[str, Any], ours: bool, stores: bool
) -> None:
    q, k, v = projection()
    cache = tuple(torch.zeros(9, 2, 24).to(E4M3) for _ in range(2))
    asked: list[tuple[Any, bool]] = []

    def sglangs(self: Any, q: Any, k: Any, v: Any, layer: Any, batch: Any, save_kv_cache: bool) -> torch.Tensor:
        asked.append((q.contiguous().data_ptr(), save_kv_cache))
        return torch.empty(0)

    monkeypatch.setattr(FlashInferAttnBackend, "forward_decode", sglangs)
    backend = object.__new__(FiPrefetchAttnBackend)
    backend._serves, backend._stores_e4m3, backend._window = True, stores, None
    backend.token_to_kv_pool = SimpleNamespace(get_kv_buffer=lambda number: cache)
    batch = SimpleNamespace(out_cache_loc=SLOTS)
    backend.forward_decode(q, k, v, layer(**more), batch)
    assert asked == [(q.data_ptr(), not (ours and stores))]
    assert torch.equal(cache[0][SLOTS].float(), k.float()) == (ours and stores)
    # A layer that shares another's cache has nothing to store, nor has one that stored in its rope kernel.
    backend.forward_decode(q, None, None, layer(**more), batch)
    backend.forward_decode(q, k, v, layer(**more), batch, save_kv_cache=False)
    assert [saved for _, saved in asked[1:]] == [True, False]
