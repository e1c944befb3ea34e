"""The tensors of one measured shape: random KV in a pool that many caches are cut from, a page table, queries."""

from __future__ import annotations

import functools
import random
from collections.abc import Sequence

import torch

from fi_prefetch import reference

from .shapes import Shape
from .timing import copies_needed

WORKSPACE_BYTES = 256 << 20
CHUNK = 1 << 28


class KvPool:
    """Random KV values of one dtype, made once and cut into the caches of one shape after another."""

    def __init__(self, capacity_bytes: int, dtype: torch.dtype, device: torch.device, seed: int = 0) -> None:
        self.values = torch.empty(capacity_bytes // dtype.itemsize, dtype=dtype, device=device)
        generator = torch.Generator(device).manual_seed(seed)
        for chunk in self.values.split(CHUNK):
            # Not every dtype has a normal_() of its own: fp8 values are rounded from float16.
            source = chunk if dtype.itemsize > 1 else torch.empty(chunk.shape, dtype=torch.float16, device=device)
            source.normal_(generator=generator)
            if source is not chunk:
                chunk.copy_(source)

    @property
    def bytes(self) -> int:
        """What the pool holds."""
        return self.values.numel() * self.values.dtype.itemsize


class DecodeInputs:
    """One shape's page table, queries, outputs, and as many caches as the timing has to rotate over.

    Attributes:
        copies: number of caches; `cache(i)` gives the i-th.
        q, out: [batch, heads_q, head_dim].
        indptr, indices, last_page_len: int32, FlashInfer's page table; the same for every cache.
        block_table: int32 [batch, most pages of a request]; seq_lens: int32 [batch].
    """

    def __init__(
        self, shape: Shape, pool: KvPool, l2_bytes: int, shuffled: bool = True, copies: int | None = None, seed: int = 0
    ) -> None:
        device = pool.values.device
        self.shape = shape
        self.q_dtype, self.kv_dtype = getattr(torch, shape.q_dtype), getattr(torch, shape.kv_dtype)
        if pool.values.dtype != self.kv_dtype:
            raise ValueError(f"the pool holds {pool.values.dtype}, the shape's KV is {self.kv_dtype}")
        self.copies = copies or copies_needed(shape.allocated_bytes, l2_bytes, pool.bytes)
        cache_values = shape.allocated_bytes // 2 // self.kv_dtype.itemsize
        if 2 * self.copies * cache_values > pool.values.numel():
            raise ValueError(f"{self.copies} caches of {shape.allocated_bytes} bytes do not fit {pool.bytes} bytes")
        dims = (self.copies, shape.pages, shape.page_size, shape.heads_kv, shape.head_dim)
        self._k = pool.values[: self.copies * cache_values].view(dims)
        self._v = pool.values[self.copies * cache_values : 2 * self.copies * cache_values].view(dims)

        generator = torch.Generator(device).manual_seed(seed + 1)
        q = torch.randn(shape.batch, shape.heads_q, shape.head_dim, generator=generator, device=device)
        self.q = q.to(self.q_dtype)
        self.out = torch.empty_like(self.q)

        lengths = torch.tensor(shape.lengths, dtype=torch.int32)
        pages = (lengths + shape.page_size - 1) // shape.page_size
        starts = torch.cat([torch.zeros(1, dtype=torch.int32), pages.cumsum(0, dtype=torch.int32)])
        order = list(range(shape.pages))
        if shuffled:
            random.Random(seed).shuffle(order)
        indices = torch.tensor(order, dtype=torch.int32)
        table = torch.zeros(shape.batch, max(1, int(pages.max())), dtype=torch.int32)
        for request, (begin, end) in enumerate(zip(starts[:-1].tolist(), starts[1:].tolist(), strict=True)):
            table[request, : end - begin] = indices[begin:end]
        self.indptr_cpu = starts
        self.indptr, self.indices, self.block_table = starts.to(device), indices.to(device), table.to(device)
        self.last_page_len = (lengths - (pages - 1) * shape.page_size).clamp(min=0).to(device)
        self.seq_lens = lengths.to(device)

    def cache(self, i: int) -> tuple[torch.Tensor, torch.Tensor]:
        """K and V of cache i: [pages, page_size, heads_kv, head_dim] each (NHD)."""
        return self._k[i], self._v[i]

    @functools.cached_property
    def _truth(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Some requests (the longest, the shortest, and others between) and their outputs in float32 on cache 0."""
        by_length = sorted(range(self.shape.batch), key=self.shape.lengths.__getitem__)
        step = max(1, (len(by_length) - 1) // 5)
        chosen = sorted({*by_length[::step][:6], by_length[-1]})
        k, v = self.cache(0)
        starts = self.indptr_cpu.tolist()
        rows = torch.tensor(chosen, device=self.q.device)
        spans = [self.indices[starts[r] : starts[r + 1]] for r in chosen]
        lengths = torch.tensor([len(span) for span in spans]).cumsum(0)
        indptr = torch.cat([torch.zeros(1, dtype=lengths.dtype), lengths])
        o, _ = reference.batch_decode(
            self.q[rows], k, v, indptr, torch.cat(spans), self.last_page_len[rows], out_dtype=torch.float32
        )
        return rows, o

    def error(self, out: torch.Tensor) -> float:
        """||out - truth|| / ||truth|| over a sample of the requests, for an output computed on cache 0."""
        rows, truth = self._truth
        return relative_error(out[rows], truth)


def relative_error(out: torch.Tensor, truth: torch.Tensor) -> float:
    """||out - truth|| / ||truth||, or the absolute norm where the truth is zero; infinite where `out` has a NaN."""
    difference = (out.double() - truth.double()).norm()
    scale = truth.double().norm()
    error = float(difference / scale if scale > 0 else difference)
    return error if error == error else float("inf")


def pool_bytes(shapes: Sequence[Shape], l2_bytes: int, memory_bytes: int, fewest_copies: int = 2) -> int:
    """What a pool has to hold so that every shape finds its caches in it, within `memory_bytes`."""
    fitting = [shape.allocated_bytes for shape in shapes if fewest_copies * shape.allocated_bytes <= memory_bytes]
    copies = [max(fewest_copies, copies_needed(size, l2_bytes, memory_bytes)) for size in fitting]
    return max((size * count for size, count in zip(fitting, copies, strict=True)), default=0)
