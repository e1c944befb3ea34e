"""Batches for tests: random paged caches with known contents, and a plain attention over them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch


@dataclass
class Batch:
    """A decode batch, with each request's KV also as plain tensors.

    Attributes:
        q: [len(lengths) * q_len, num_qo_heads, head_dim].
        cache: [num_pages, 2, page_size, num_kv_heads, head_dim] or its "HND" order; pages shuffled, the rest NaN.
        indptr, indices, last_page_len: int32 page table.
        keys, values: a request each, [length, num_kv_heads, head_dim], in the cache's dtype.
    """

    q: torch.Tensor
    cache: torch.Tensor
    indptr: torch.Tensor
    indices: torch.Tensor
    last_page_len: torch.Tensor
    keys: list[torch.Tensor]
    values: list[torch.Tensor]
    lengths: list[int]
    kv_layout: str
    page_size: int
    q_len: int

    @property
    def table(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return self.indptr, self.indices, self.last_page_len

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """num_qo_heads, num_kv_heads, head_dim, page_size: `plan`'s arguments."""
        return self.q.shape[1], self.keys[0].shape[1], self.q.shape[2], self.page_size

    @property
    def dtypes(self) -> dict[str, torch.dtype]:
        return {"q_data_type": self.q.dtype, "kv_data_type": self.keys[0].dtype}


def make_batch(
    lengths: Sequence[int],
    *,
    num_qo_heads: int = 4,
    num_kv_heads: int = 2,
    head_dim: int = 64,
    page_size: int = 16,
    kv_layout: str = "NHD",
    dtype: torch.dtype = torch.float32,
    kv_dtype: torch.dtype | None = None,
    q_len: int = 1,
    seed: int = 0,
) -> Batch:
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    kv_dtype = kv_dtype or dtype
    pages_of = [-(-length // page_size) for length in lengths]
    num_pages = sum(pages_of) + 3
    order = torch.randperm(num_pages, generator=generator).int()
    indptr = torch.tensor([0, *torch.tensor(pages_of).cumsum(0).tolist()], dtype=torch.int32)
    last = [length - (pages - 1) * page_size if pages else 0 for length, pages in zip(lengths, pages_of, strict=True)]
    cache = torch.full((num_pages, 2, page_size, num_kv_heads, head_dim), torch.nan)
    keys, values = [], []
    for request, length in enumerate(lengths):
        both = [random(length, num_kv_heads, head_dim).to(kv_dtype).float() for _ in range(2)]
        for token in range(length):
            page = int(order[int(indptr[request]) + token // page_size])
            for which, tensor in enumerate(both):
                cache[page, which, token % page_size] = tensor[token]
        keys.append(both[0].to(kv_dtype))
        values.append(both[1].to(kv_dtype))
    if kv_layout == "HND":
        cache = cache.transpose(2, 3).contiguous()
    return Batch(
        q=random(len(lengths) * q_len, num_qo_heads, head_dim).to(dtype),
        cache=cache.to(kv_dtype),
        indptr=indptr,
        indices=order[: int(indptr[-1])].clone(),
        last_page_len=torch.tensor(last, dtype=torch.int32),
        keys=keys,
        values=values,
        lengths=list(lengths),
        kv_layout=kv_layout,
        page_size=page_size,
        q_len=q_len,
    )


def dense_decode(
    batch: Batch,
    *,
    window_left: int = -1,
    soft_cap: float = 0.0,
    sm_scale: float | None = None,
    sinks: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Output and base-2 LSE in float64, a query row and a head at a time, from the plain keys and values."""
    scale = batch.q.shape[-1] ** -0.5 if sm_scale is None else sm_scale
    num_qo_heads = batch.q.shape[1]
    out = torch.zeros(batch.q.shape, dtype=torch.float64)
    lse = torch.full(batch.q.shape[:2], -torch.inf, dtype=torch.float64)
    for row in range(batch.q.shape[0]):
        request, number = divmod(row, batch.q_len)
        position = batch.lengths[request] - batch.q_len + number
        first = max(0, position - window_left) if window_left >= 0 else 0
        for head in range(num_qo_heads):
            kv_head = head * batch.keys[request].shape[1] // num_qo_heads
            keys = batch.keys[request][first : position + 1, kv_head].double()
            values = batch.values[request][first : position + 1, kv_head].double()
            logits = keys @ batch.q[row, head].double() * scale
            if soft_cap > 0:
                logits = soft_cap * (logits / soft_cap).tanh()
            if sinks is not None:
                logits = torch.cat([logits, sinks[head].double().view(1)])
                values = torch.cat([values, values.new_zeros(1, values.shape[1])])
            if len(logits):
                out[row, head] = logits.softmax(0) @ values
                lse[row, head] = logits.exp().sum().log2()
    return out, lse
