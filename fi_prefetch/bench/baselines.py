"""The kernels that are measured: FlashInfer's, FlashAttention-3, and ours, each prepared for a shape.

A preparation plans once and returns a function that decodes on the i-th cache, writing to the inputs' `out`; only that
function is timed. What a kernel does not serve raises Unsupported with the reason, which the result file keeps.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from typing import Any

import torch

import fi_prefetch

from .inputs import WORKSPACE_BYTES, DecodeInputs

Call = Callable[[int], object]
Prepare = Callable[[DecodeInputs], Call]

XQA_PAGE_SIZES = (16, 32, 64, 128)
FA3_LIBRARY_VARIABLE = "FI_PREFETCH_FA3_LIBRARY"


class Unsupported(Exception):
    """A kernel does not serve a shape, or is not there."""


@functools.cache
def workspace() -> torch.Tensor:
    """The float workspace that all wrappers share: they run one after another."""
    return torch.zeros(WORKSPACE_BYTES, dtype=torch.uint8, device="cuda")


def plan_arguments(inputs: DecodeInputs) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """What a FlashInfer-style wrapper's plan() takes for these inputs."""
    shape = inputs.shape
    return (
        (
            inputs.indptr,
            inputs.indices,
            inputs.last_page_len,
            shape.heads_q,
            shape.heads_kv,
            shape.head_dim,
            shape.page_size,
        ),
        {"q_data_type": inputs.q_dtype, "kv_data_type": inputs.kv_dtype},
    )


def prepare_flashinfer(inputs: DecodeInputs, use_tensor_cores: bool, backend: str) -> Call:
    """FlashInfer's batch-decode wrapper on one of its backends."""
    import flashinfer

    wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(
        workspace(), "NHD", use_tensor_cores=use_tensor_cores, backend=backend
    )
    arguments, options = plan_arguments(inputs)
    wrapper.plan(*arguments, **options)
    return lambda i: wrapper.run(inputs.q, inputs.cache(i), out=inputs.out)


def prepare_xqa(inputs: DecodeInputs) -> Call:
    """FlashInfer's XQA kernels."""
    from flashinfer.decode import xqa_batch_decode_with_kv_cache

    shape = inputs.shape
    if shape.page_size not in XQA_PAGE_SIZES:
        raise Unsupported(f"XQA has pages of {XQA_PAGE_SIZES} tokens, not {shape.page_size}")
    # Zeros at its first use (its semaphores), and its own: other kernels leave anything in a workspace.
    scratch = torch.zeros(WORKSPACE_BYTES, dtype=torch.uint8, device=inputs.q.device)
    seq_lens = inputs.seq_lens.view(torch.uint32)
    longest = max(shape.lengths)

    def call(i: int) -> None:
        xqa_batch_decode_with_kv_cache(
            inputs.q,
            inputs.cache(i),
            scratch,
            inputs.block_table,
            seq_lens,
            longest,
            bmm1_scale=shape.head_dim**-0.5,
            out=inputs.out,
        )

    return call


@functools.cache
def load_fa3() -> None:
    """Registers FlashAttention-3's operators as sglang-kernel ships them.

    The library is the one that FI_PREFETCH_FA3_LIBRARY names (sgl_kernel/flash_ops.abi3.so), else sgl_kernel's own.
    """
    library = os.environ.get(FA3_LIBRARY_VARIABLE)
    try:
        if library:
            torch.ops.load_library(library)
        else:
            import sgl_kernel.flash_attn  # noqa: F401
    except (ImportError, OSError) as error:
        raise Unsupported(f"sglang-kernel's FlashAttention-3 cannot be loaded: {error}") from error


def prepare_fa3(inputs: DecodeInputs) -> Call:
    """FlashAttention-3, called as SGLang calls it: scheduler metadata once a plan, the number of splits left to it."""
    shape = inputs.shape
    if shape.kv_dtype != shape.q_dtype:
        raise Unsupported(f"FlashAttention-3 wants one dtype, got q {shape.q_dtype} and KV {shape.kv_dtype}")
    load_fa3()
    operators = torch.ops.sgl_kernel
    starts = torch.arange(shape.batch + 1, dtype=torch.int32, device=inputs.q.device)
    metadata = operators.get_scheduler_metadata.default(
        shape.batch,
        1,  # most query tokens of a request
        max(shape.lengths),
        shape.heads_q,
        shape.heads_kv,
        shape.head_dim,
        shape.head_dim,
        inputs.q_dtype,
        inputs.seq_lens,
        starts,
        None,  # cu_seqlens_k
        None,  # cu_seqlens_k_new
        None,  # seqused_q
        None,  # leftpad_k
        shape.page_size,
        0,  # new keys
        True,  # causal
        -1,  # window, left and right
        -1,
        0,  # attention chunk
        False,  # soft cap
        0,  # splits: its own choice
        None,  # pack GQA: its own choice
        0,  # SM margin
    )
    scale = shape.head_dim**-0.5

    def call(i: int) -> None:
        k, v = inputs.cache(i)
        operators.fwd.default(
            inputs.q,
            k,
            v,
            *[None] * 3,  # new k, new v, qv
            inputs.out,
            starts,
            *[None] * 3,  # cu_seqlens_k, cu_seqlens_k_new, seqused_q
            inputs.seq_lens,
            1,
            None,  # most keys of a request
            inputs.block_table,
            *[None] * 8,  # batch index, left pad, rotary (three), descale (three)
            scale,
            True,  # causal
            -1,
            -1,
            0,  # attention chunk
            0.0,  # soft cap
            True,  # rotary interleaved
            metadata,
            0,  # splits
            None,  # pack GQA
            0,  # SM margin
            None,  # sinks
            None,
            False,
        )

    return call


BASELINES: dict[str, Prepare] = {
    "flashinfer_cuda_core": functools.partial(prepare_flashinfer, use_tensor_cores=False, backend="auto"),
    "flashinfer_fa2": functools.partial(prepare_flashinfer, use_tensor_cores=True, backend="fa2"),
    "flashinfer_fa3": functools.partial(prepare_flashinfer, use_tensor_cores=True, backend="fa3"),
    "flashinfer_xqa": prepare_xqa,
    "fa3": prepare_fa3,
}


def prepare_ours(
    inputs: DecodeInputs,
    policy: fi_prefetch.PrefetchPolicy | str = "auto",
    ready: str = "nothing",
    enable_pdl: bool | None = None,
) -> tuple[Any, Call]:
    """Our wrapper, planned, and its call. Raises Unsupported where the shape would go to FlashInfer's kernel."""
    wrapper = fi_prefetch.BatchDecodeWithPagedKVCacheWrapper(workspace(), "NHD", prefetch=policy, ready=ready)
    arguments, options = plan_arguments(inputs)
    wrapper.plan(*arguments, **options)
    choice = wrapper.kernel_choice
    if choice.kernel != "fi_prefetch":
        raise Unsupported(f"goes to {choice.kernel}: {choice.reason}")
    return wrapper, lambda i: wrapper.run(inputs.q, inputs.cache(i), out=inputs.out, enable_pdl=enable_pdl)
