"""A step's K and V in the cache: which steps we store, and what is in the cache then."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import triton
from sglang.srt.layers.attention.flashinfer_backend import FlashInferAttnBackend
from sglang.srt.layers.radix_attention import RadixAttention
from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool, UnquantizedKVCacheMethod
from sglang.srt.model_executor.runner_utils import capture_mode
from triton.backends.compiler import GPUTarget

from fi_prefetch.sglang import kv_store
from fi_prefetch.sglang.cuda_backend import FiPrefetchAttnBackend

E4M3 = torch.float8_e4m3fn
SLOTS = torch.tensor([3, 6, 7, 8, 1])


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


@pytest.mark.parametrize("converts", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rows_go_where_their_tokens_do(dtype: torch.dtype, converts: bool) -> None:
    _, k, v = projection(dtype)
    k_cache, v_cache = (torch.zeros(9, 2, 24).to(E4M3 if converts else dtype) for _ in range(2))
    assert kv_store.takes(k, v, SLOTS, k_cache.dtype)
    kv_store.store(k, v, k_cache, v_cache, SLOTS, dependent=False)
    for cache, stored in ((k_cache, k), (v_cache, v)):
        assert torch.equal(cache[SLOTS].float(), stored.float())
        assert not cache.float()[[0, 2, 4, 5]].any()


@pytest.mark.parametrize("nowhere", [0, -1, 9, 1 << 40])
def test_rows_without_a_place_go_nowhere(nowhere: int) -> None:
    """Slot 0 is nobody's, and what lies before and behind a cache is another's."""
    _, k, v = projection()
    memory = [torch.zeros(13, 2, 24, dtype=torch.bfloat16) for _ in range(2)]
    slots = torch.tensor([nowhere, 6, nowhere, 8, 1])
    kv_store.store(k, v, memory[0][2:11], memory[1][2:11], slots, dependent=False)
    for cache, stored in zip(memory, (k, v), strict=True):
        assert torch.equal(cache[[8, 10, 3]], stored[[1, 3, 4]])
        assert not cache[[0, 1, 2, 4, 5, 6, 7, 9, 11, 12]].any()


def test_nobody_stores_nothing() -> None:
    k = torch.empty(0, 2, 24, dtype=torch.bfloat16)
    cache = torch.zeros(9, 2, 24).to(E4M3)
    kv_store.store(k, k, cache, cache, torch.empty(0, dtype=torch.int64), dependent=False)


def ptx_of(monkeypatch: pytest.MonkeyPatch, cache: str, dependent: bool) -> str:
    """What the kernel for K and V in bf16 becomes on a Hopper GPU."""
    tensors = {"k": "*bf16", "v": "*bf16", "k_cache": cache, "v_cache": cache, "slots": "*i64"}
    numbers = dict.fromkeys(("k_stride", "v_stride", "k_cache_stride", "v_cache_stride", "row", "places"), "i32")
    constants = {"BLOCK": 1024, "DEPENDENT": dependent}
    kernel = triton.JITFunction(kv_store._store.fn)
    monkeypatch.setattr(kv_store, "_store_row", triton.JITFunction(kv_store._store_row.fn))
    source = triton.compiler.ASTSource(
        kernel, tensors | numbers | dict.fromkeys(constants, "constexpr"), constexprs=constants
    )
    return str(triton.compile(source, target=GPUTarget("cuda", 90, 32)).asm["ptx"])


def test_a_gpu_rounds_to_the_nearest(monkeypatch: pytest.MonkeyPatch) -> None:
    """As PyTorch does, in SGLang's conversion; Triton's interpreter rounds otherwise."""
    assert "cvt.rn.satfinite.e4m3x2.f32" in ptx_of(monkeypatch, "*fp8e4nv", dependent=False)


@pytest.mark.parametrize("cache", ["*bf16", "*fp8e4nv"])
def test_what_follows_starts_before_the_wait_and_nothing_is_read_before_it(
    monkeypatch: pytest.MonkeyPatch, cache: str
) -> None:
    ptx = ptx_of(monkeypatch, cache, dependent=True)
    order = [ptx.index(part) for part in ("griddepcontrol.launch_dependents", "griddepcontrol.wait", "ld.global")]
    assert order == sorted(order) and ptx.count("griddepcontrol.wait") == 1
    assert "griddepcontrol" not in ptx_of(monkeypatch, cache, dependent=False)


class Derived(MHATokenToKVPool):
    """A pool of SGLang's with places of its own."""


@pytest.mark.parametrize(
    ("its_pool", "served"),
    [
        (pool(), True),
        (pool(Derived), False),
        (pool(dtype=torch.float32), False),
        (pool(dtype=torch.float8_e5m2), False),
        (pool(layout="hnd"), False),
        (pool(quantized=True), False),
        (SimpleNamespace(dtype=E4M3), False),
    ],
    ids=["e4m3", "derived", "fp32", "e5m2", "heads first", "quantized", "another"],
)
def test_pools_whose_rows_we_know(its_pool: Any, served: bool) -> None:
    assert kv_store.serves(its_pool, torch.device("cpu")) is served


@pytest.mark.parametrize(
    ("dtype", "first"), [(E4M3, (8, 9)), (torch.bfloat16, (9, 0)), (torch.float16, (9, 0))], ids=["e4m3", "bf16", "f16"]
)
def test_gpus_without_the_conversion_or_dependent_launch_are_left_to_sglang(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, first: tuple[int, int]
) -> None:
    for capability in ((8, 0), (8, 9), (9, 0), (10, 0)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, found=capability: found)
        assert kv_store.serves(pool(dtype=dtype), torch.device("cuda")) is (capability >= first)
        assert kv_store.launches_dependents(torch.device("cuda")) is (capability >= (9, 0))


def test_rows_that_are_not_dense_or_not_alike_are_left_to_sglang() -> None:
    _, k, v = projection()
    assert kv_store.takes(k, v, SLOTS, E4M3)
    assert not kv_store.takes(k.transpose(1, 2), v.transpose(1, 2), SLOTS, E4M3)
    assert not kv_store.takes(k, v[:, :1], SLOTS, E4M3)
    assert not kv_store.takes(k.float(), v.float(), SLOTS, E4M3)
    assert not kv_store.takes(k, v, SLOTS, torch.float16)
    assert not kv_store.takes(k, v, SLOTS[:4], E4M3)
    assert not kv_store.takes(k, v, SLOTS.repeat_interleave(2)[::2], E4M3)


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
@pytest.mark.parametrize("graph", [True, False])
@pytest.mark.parametrize("dtype", [E4M3, torch.bfloat16], ids=["e4m3", "bf16"])
def test_sglang_stores_what_we_do_not(
    monkeypatch: pytest.MonkeyPatch, more: dict[str, Any], ours: bool, stores: bool, graph: bool, dtype: torch.dtype
) -> None:
    q, k, v = projection()
    cache = tuple(torch.zeros(9, 2, 24).to(dtype) for _ in range(2))
    asked: list[tuple[Any, bool]] = []

    def sglangs(self: Any, q: Any, k: Any, v: Any, layer: Any, batch: Any, save_kv_cache: bool) -> torch.Tensor:
        asked.append((q.contiguous().data_ptr(), save_kv_cache))
        return torch.empty(0)

    monkeypatch.setattr(FlashInferAttnBackend, "forward_decode", sglangs)
    monkeypatch.setattr(capture_mode, "is_capture_mode", graph)
    backend = object.__new__(FiPrefetchAttnBackend)
    backend._serves, backend._stores, backend._launches_dependents, backend._window = True, stores, False, None
    backend.token_to_kv_pool = SimpleNamespace(get_kv_buffer=lambda number: cache, dtype=dtype)
    batch = SimpleNamespace(out_cache_loc=SLOTS)
    backend.forward_decode(q, k, v, layer(**more), batch)
    # What needs no conversion gains in a graph alone.
    stored = ours and stores and (graph or dtype == E4M3)
    assert asked == [(q.data_ptr(), not stored)]
    assert torch.equal(cache[0][SLOTS].float(), k.float()) == stored
    # A layer that shares another's cache has nothing to store, nor has one that stored in its rope kernel.
    backend.forward_decode(q, None, None, layer(**more), batch)
    backend.forward_decode(q, k, v, layer(**more), batch, save_kv_cache=False)
    # Nor do we store rows that have no slot.
    backend.forward_decode(q, k, v, layer(**more), SimpleNamespace(out_cache_loc=SLOTS[:3]))
    assert [saved for _, saved in asked[1:]] == [True, False, True]
