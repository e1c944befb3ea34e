"""Batch decode attention over a paged KV cache in plain PyTorch: the truth that every kernel is held against.

It computes one request after another in float32 (or float64), on any device and from any dtype, and shares no code
with the kernels. It is also what the wrapper runs on CPU tensors.
"""

from __future__ import annotations

import math

import torch

LOG2_E = math.log2(math.e)


def alibi_slopes(num_heads: int) -> torch.Tensor:
    """ALiBi's slope per query head: a geometric series; odd powers of the half step beyond a power of two.

    Returns float64 [num_heads].
    """
    power = 1 << (num_heads.bit_length() - 1)
    slopes = [2.0 ** (-8.0 * (h + 1) / power) for h in range(power)]
    slopes += [2.0 ** (-4.0 * (2 * h + 1) / power) for h in range(num_heads - power)]
    return torch.tensor(slopes, dtype=torch.float64)


def rotate(x: torch.Tensor, positions: torch.Tensor, rope_scale: float, rope_theta: float) -> torch.Tensor:
    """LLaMA's rotary embedding: element i is paired with element i + head_dim / 2.

    Args:
        x: floating [tokens, heads, head_dim].
        positions: [tokens], the position of each token in its request.
        rope_scale: positions are divided by it.
        rope_theta: base of the frequencies.
    """
    half = x.shape[-1] // 2
    exponents = torch.arange(half, dtype=torch.float64, device=x.device) / half
    angles = positions.to(torch.float64)[:, None] / rope_scale * rope_theta**-exponents
    cos, sin = angles.cos().to(x.dtype)[:, None], angles.sin().to(x.dtype)[:, None]
    low, high = x[..., :half], x[..., half:]
    return torch.cat([low * cos - high * sin, high * cos + low * sin], dim=-1)


def request_tokens(
    cache: torch.Tensor, pages: torch.Tensor, length: int, kv_layout: str, dtype: torch.dtype
) -> torch.Tensor:
    """One request's keys or values in order, [length, num_kv_heads, head_dim] in `dtype`, out of a paged cache."""
    gathered = cache[pages.long()]
    if kv_layout == "HND":
        gathered = gathered.transpose(1, 2)
    return gathered.reshape(-1, *gathered.shape[2:])[:length].to(dtype)


def batch_decode(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    indptr: torch.Tensor,
    indices: torch.Tensor,
    last_page_len: torch.Tensor,
    *,
    kv_layout: str = "NHD",
    sm_scale: float | None = None,
    q_scale: float = 1.0,
    k_scale: float = 1.0,
    v_scale: float = 1.0,
    window_left: int = -1,
    logits_soft_cap: float = 0.0,
    q_len_per_req: int = 1,
    sinks: torch.Tensor | None = None,
    pos_encoding_mode: str = "NONE",
    rope_scale: float = 1.0,
    rope_theta: float = 1e4,
    out_dtype: torch.dtype | None = None,
    compute_dtype: torch.dtype = torch.float32,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of each request's newest tokens over its own KV.

    Args:
        q: [batch_size * q_len_per_req, num_qo_heads, head_dim]; a request's rows are consecutive and are its last
            q_len_per_req positions, each of which sees the positions up to its own (bottom-right causal).
        k_cache, v_cache: [num_pages, page_size, num_kv_heads, head_dim] ("NHD") or
            [num_pages, num_kv_heads, page_size, head_dim] ("HND").
        indptr: int [batch_size + 1]; request i owns indices[indptr[i]:indptr[i + 1]].
        indices: int, page numbers.
        last_page_len: int [batch_size], tokens in each request's last page.
        sm_scale: multiplies Q K^T; 1 / sqrt(head_dim) where None. q_scale and k_scale multiply it, v_scale the output.
        window_left: a position p sees positions from p - window_left on; -1: all.
        logits_soft_cap: above 0, logits become cap * tanh(logits / cap).
        sinks: [num_qo_heads], logits of a virtual token whose value is zero.
        pos_encoding_mode: "NONE", "ROPE_LLAMA" or "ALIBI" (the bias is slope * (position of k - row of q)).
        out_dtype: of the output; q's where None.
        compute_dtype: float32 or float64.

    Returns:
        o: [batch_size * q_len_per_req, num_qo_heads, head_dim] in out_dtype.
        lse: float32 [batch_size * q_len_per_req, num_qo_heads], base-2 logarithm of the sum of the exponentials of
            the logits, the sink's among them. A row that sees nothing has o = 0, and lse = -inf without a sink.
    """
    num_rows, num_qo_heads, head_dim = q.shape
    num_kv_heads, page_size = (k_cache.shape[2], k_cache.shape[1]) if kv_layout == "NHD" else k_cache.shape[1:3]
    group = num_qo_heads // num_kv_heads
    scale = (head_dim**-0.5 if sm_scale is None else sm_scale) * q_scale * k_scale
    bounds, last = indptr.tolist(), last_page_len.tolist()
    o = torch.zeros(num_rows, num_qo_heads, v_cache.shape[-1], dtype=compute_dtype, device=q.device)
    lse = torch.full((num_rows, num_qo_heads), -torch.inf, dtype=compute_dtype, device=q.device)

    for request, (begin, end) in enumerate(zip(bounds[:-1], bounds[1:], strict=True)):
        length = (end - begin - 1) * page_size + last[request] if end > begin else 0
        rows = slice(request * q_len_per_req, (request + 1) * q_len_per_req)
        queries = q[rows].to(compute_dtype)
        keys = request_tokens(k_cache, indices[begin:end], length, kv_layout, compute_dtype)
        values = request_tokens(v_cache, indices[begin:end], length, kv_layout, compute_dtype)
        q_positions = torch.arange(length - q_len_per_req, length, device=q.device)
        k_positions = torch.arange(length, device=q.device)
        if pos_encoding_mode == "ROPE_LLAMA":
            queries = rotate(queries, q_positions, rope_scale, rope_theta)
            keys = rotate(keys, k_positions, rope_scale, rope_theta)

        # [kv head, head of its group, row, key]
        grouped = queries.reshape(q_len_per_req, num_kv_heads, group, head_dim)
        logits = torch.einsum("rhgd,khd->hgrk", grouped, keys) * scale
        if pos_encoding_mode == "ALIBI":
            slopes = alibi_slopes(num_qo_heads).to(q.device, compute_dtype).view(num_kv_heads, group, 1, 1)
            row_numbers = torch.arange(q_len_per_req, device=q.device)
            logits = logits + slopes * (k_positions[None, :] - row_numbers[:, None])
        if logits_soft_cap > 0:
            logits = logits_soft_cap * torch.tanh(logits / logits_soft_cap)
        seen = k_positions[None, :] <= q_positions[:, None]
        if window_left >= 0:
            seen &= k_positions[None, :] >= q_positions[:, None] - window_left
        logits = logits.masked_fill(~seen, -torch.inf)
        # What no row of this request sees must not reach its sum even where it is NaN.
        first = int(seen.any(0).to(torch.uint8).argmax()) if length else 0
        logits, values = logits[..., first:], values[first:]

        with_sink = logits
        if sinks is not None:
            sink_logits = sinks.to(q.device, compute_dtype).view(num_kv_heads, group, 1, 1)
            with_sink = torch.cat([logits, sink_logits.expand(*logits.shape[:-1], 1)], dim=-1)
        log_sum = torch.logsumexp(with_sink, dim=-1, keepdim=True)
        weights = torch.exp(logits - log_sum.masked_fill(log_sum == -torch.inf, 0.0))
        result = torch.einsum("hgrk,khd->rhgd", weights, values) * v_scale
        o[rows] = result.reshape(q_len_per_req, num_qo_heads, -1)
        lse[rows] = log_sum.squeeze(-1).permute(2, 0, 1).reshape(q_len_per_req, num_qo_heads) * LOG2_E

    return o.to(out_dtype or q.dtype), lse.float()
