"""FlashInfer's CUDA-core decode kernel with run-ahead, for the map: a custom attention variant, given as `jit_args`.

The kernel brings KV by asynchronous copies into a ring of two stages in shared memory and has no prefetch. What a
variant may do to a logit is the place to put one: whoever has computed the logit of a token asks for the lines of the
token so far ahead. Everything else is FlashInfer's, and a distance of 0 is its kernel without prefetch.
"""

from __future__ import annotations

import functools
import hashlib
from typing import Any

import torch
from flashinfer import BatchDecodeWithPagedKVCacheWrapper
from flashinfer.jit.attention import gen_customize_batch_decode_module

from .baselines import Call, Unsupported, plan_arguments, workspace
from .inputs import DecodeInputs
from .shapes import Shape

HEAD_DIM = 128
STAGES = 2  # of FlashInfer's ring, on compute capability 8.0 and later
THREADS = 128
LANES = 16  # threads that share a row of 256 bytes
# Shared memory that a block takes without need, so that fewer fit on an SM. It is a compile-time number, as static
# shared memory is, of which a block has 48 KB at most.
PADS = (0, 46 << 10)

VARIANT = r"""
#include <flashinfer/attention/variants.cuh>

// DISTANCE in tokens comes with the call. Four threads of a row's first query head ask for the row's two lines of K and
// of V each. A request's end is the end; beyond the end of a block's own piece another block's KV is asked for.
template <int PAD>
struct RunAhead : DefaultAttention<false, false, false, false> {
  uint32_t first_page, end_page;

  template <typename Params>
  __device__ RunAhead(const Params& params, uint32_t batch_idx, uint8_t* smem)
      : DefaultAttention<false, false, false, false>(params, batch_idx, smem) {
    first_page = params.paged_kv.indptr[batch_idx];
    end_page = params.paged_kv.indptr[batch_idx + 1];
    if constexpr (PAD > 0) {
      __shared__ volatile uint8_t pad[PAD];
      if (params.distance < 0) pad[threadIdx.x * 16] = 1;  // never: only the compiler does not know
    }
  }

  REGISTER_LOGITS_TRANSFORM(params, logits, batch_idx, qo_idx, kv_idx, qo_head_idx, kv_head_idx, {
    if (params.distance > 0 && threadIdx.y == 0 && threadIdx.x < 4) {
      uint32_t page, entry;
      params.paged_kv.page_size.divmod(kv_idx + static_cast<uint32_t>(params.distance), page, entry);
      page += first_page;
      if (page < end_page) {
        const size_t offset = params.paged_kv.get_elem_offset(__ldg(params.paged_kv.indices + page), kv_head_idx,
                                                              entry, threadIdx.x % 2 * 64);
        const auto* row = (threadIdx.x < 2 ? params.paged_kv.k_data : params.paged_kv.v_data) + offset;
        asm volatile("prefetch.global.L2 [%0];" ::"l"(row));
      }
    }
    return logits;
  })
};
"""


def jit_args(pad: int) -> list[Any]:
    """FlashInfer's `jit_args` of the kernel for bfloat16, with so many bytes of shared memory taken for nothing."""
    return [
        f"fi_prefetch_flashinfer_run_ahead_{hashlib.sha256(VARIANT.encode()).hexdigest()[:8]}_pad{pad}",
        *[torch.bfloat16] * 3,
        torch.int32,
        HEAD_DIM,
        HEAD_DIM,
        [],
        [],
        ["sm_scale", "distance"],
        ["double", "int64_t"],
        f"RunAhead<{pad}>",
        VARIANT,
    ]


def jit_spec(pad: int) -> Any:
    """The JitSpec of the kernel."""
    return gen_customize_batch_decode_module(*jit_args(pad))


@functools.cache
def wrapper(pad: int) -> Any:
    """FlashInfer's wrapper with the kernel."""
    return BatchDecodeWithPagedKVCacheWrapper(workspace(), "NHD", jit_args=jit_args(pad))


def rows_of_an_iteration(shape: Shape) -> int:
    """KV tokens that a block of FlashInfer's kernel works on at a time."""
    rows = THREADS // LANES  # of 16-byte chunks: each thread has one row's chunk, or with one query head a kv head four
    return 4 * rows if shape.group == 1 else rows


def prepare(inputs: DecodeInputs, pad: int, iterations: int) -> tuple[int, Call]:
    """The thread blocks of a launch on a shape, and the call, with prefetch so many iterations beyond the ring.

    Raises Unsupported for other shapes.
    """
    shape = inputs.shape
    if (shape.head_dim, shape.q_dtype, shape.kv_dtype) != (HEAD_DIM, "bfloat16", "bfloat16"):
        raise Unsupported(f"the kernel is compiled for bfloat16 and head_dim {HEAD_DIM}")
    arguments, options = plan_arguments(inputs)
    kernel = wrapper(pad)
    kernel.plan(*arguments, **options)
    distance = (STAGES + iterations) * rows_of_an_iteration(shape) if iterations else 0
    scale = shape.head_dim**-0.5
    blocks = int(kernel._plan_info[0]) * shape.heads_kv
    return blocks, lambda i: kernel.run(inputs.q, inputs.cache(i), scale, distance, out=inputs.out)


@functools.cache
def fitting(heads_q: int, heads_kv: int, pad: int, sm_count: int) -> int:
    """Thread blocks that an SM holds, as FlashInfer's plan counts them: it cuts a long request into as many as fit."""
    pages = 1 << 16
    table = (torch.tensor(x, dtype=torch.int32) for x in ([0, pages], range(pages), [16]))
    kernel = wrapper(pad)
    kernel.plan(*table, heads_q, heads_kv, HEAD_DIM, 16, q_data_type=torch.bfloat16, kv_data_type=torch.bfloat16)
    pieces = int(kernel._plan_info[0])
    return -(-pieces * heads_kv // sm_count)


def bytes_in_flight(shape: Shape, resident: int) -> int:
    """KV bytes that so many blocks wait for at most: their rings."""
    return resident * STAGES * rows_of_an_iteration(shape) * shape.token_bytes // shape.heads_kv
