"""A decode step's page table in one launch.

SGLang's FlashInfer backend fills it with a prefix sum, a copy and a kernel with one program a request, which walks a
long request alone: a step with one request of 64K tokens among short ones waits for it. Between two steps nothing else
runs on the GPU, so what this takes is added to every step.
"""

from __future__ import annotations

import torch
import triton  # type: ignore[import-not-found]
import triton.language as tl  # type: ignore[import-not-found]

_TOKENS = 1024
# About as many programs as a Hopper GPU runs at once: enough to fill it, and few that find nothing to do.
_PROGRAMS = 1024
_LENGTHS = 1024


def fill(
    req_to_token: torch.Tensor,
    rows: torch.Tensor,
    lengths: torch.Tensor,
    starts: torch.Tensor | None,
    indptr: torch.Tensor,
    indices: torch.Tensor,
) -> None:
    """Writes the page table of `lengths.numel()` requests.

    Args:
        req_to_token: [requests there may be, tokens each may have]: where each token's K and V are.
        rows: of each request, its row in `req_to_token`.
        lengths: of each request, how many of its tokens attention reads.
        starts: of each request, the first of these; None: its first.
        indptr: gets the sums of the lengths, after a 0 that is there already.
        indices: gets the tokens' places, request after request.
    """
    requests = lengths.shape[0]
    if not requests:
        return
    width = req_to_token.shape[1]
    programs = max(1, min(triton.cdiv(width, _TOKENS), _PROGRAMS // requests))
    _fill[(requests, programs)](
        req_to_token,
        req_to_token.stride(0),
        rows,
        lengths,
        starts,
        indptr,
        indices,
        TOKENS=_TOKENS,
        LENGTHS=_LENGTHS,
    )


@triton.jit
def _fill(
    req_to_token,
    row_stride,
    rows,
    lengths,
    starts,
    indptr,
    indices,
    TOKENS: tl.constexpr,
    LENGTHS: tl.constexpr,
):
    request = tl.program_id(0)
    begin = 0
    for first in range(0, request, LENGTHS):
        before = first + tl.arange(0, LENGTHS)
        begin += tl.sum(tl.load(lengths + before, mask=before < request, other=0).to(tl.int32))
    length = tl.load(lengths + request).to(tl.int32)
    if tl.program_id(1) == 0:
        tl.store(indptr + request + 1, begin + length)

    source = req_to_token + tl.load(rows + request).to(tl.int64) * row_stride
    if starts is not None:
        source += tl.load(starts + request).to(tl.int64)
    for first in range(tl.program_id(1) * TOKENS, length, tl.num_programs(1) * TOKENS):
        token = first + tl.arange(0, TOKENS)
        place = tl.load(source + token, mask=token < length)
        tl.store(indices + begin + token, place, mask=token < length)
