"""The wrapper: on CPU tensors against a dense computation; its GPU path with a module that stands in for the kernel."""

from __future__ import annotations

import contextlib
import copy
import inspect
import os
import pickle
import timeit
from types import SimpleNamespace
from typing import Any

import flashinfer
import flashinfer.decode
import numpy
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import fi_prefetch
from fi_prefetch import checks, decision, decode, device, dispatch, jit, reference
from fi_prefetch.prefetch import PrefetchPolicy

THEIRS = flashinfer.decode.BatchDecodeWithPagedKVCacheWrapper
HAS_0_7 = hasattr(THEIRS, "_plan_impl")
HAS_0_7_4 = "jit_kwargs" in inspect.signature(THEIRS.__init__).parameters


def workspace(num_bytes: int = 1 << 20) -> torch.Tensor:
    return torch.zeros(num_bytes, dtype=torch.uint8)


def planned(batch, **options) -> fi_prefetch.BatchDecodeWithPagedKVCacheWrapper:
    """A wrapper planned for a batch."""
    constructor = {name: options.pop(name) for name in ("use_tensor_cores", "prefetch", "ready") if name in options}
    size = options.pop("workspace_bytes", 1 << 20)
    wrapper = fi_prefetch.BatchDecodeWithPagedKVCacheWrapper(workspace(size), batch.kv_layout, **constructor)
    wrapper.plan(*batch.table, *batch.shape, q_len_per_req=batch.q_len, **batch.dtypes, **options)
    return wrapper


def graph_wrapper(batch, pages: int = 100, **options) -> fi_prefetch.BatchDecodeWithPagedKVCacheWrapper:
    size = len(batch.lengths)
    return fi_prefetch.BatchDecodeWithPagedKVCacheWrapper(
        workspace(),
        batch.kv_layout,
        use_cuda_graph=True,
        paged_kv_indptr_buffer=torch.zeros(size + 1, dtype=torch.int32),
        paged_kv_indices_buffer=torch.zeros(pages, dtype=torch.int32),
        paged_kv_last_page_len_buffer=torch.zeros(size, dtype=torch.int32),
        **options,
    )


def assert_decodes(result, expected, rtol: float = 1e-5) -> None:
    for got, want in zip(result, expected, strict=True):
        torch.testing.assert_close(got.double(), want, rtol=rtol, atol=rtol)


# --- on the CPU ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kv_layout", ["NHD", "HND"])
@pytest.mark.parametrize("page_size", [1, 7, 16])
@pytest.mark.parametrize("q_len", [1, 3])
@pytest.mark.parametrize("as_pair", [False, True])
def test_decodes(make_batch, dense_decode, kv_layout, page_size, q_len, as_pair):
    batch = make_batch([5, 3, 16, 33], kv_layout=kv_layout, page_size=page_size, q_len=q_len)
    wrapper = planned(batch)
    cache = (batch.cache[:, 0], batch.cache[:, 1].clone()) if as_pair else batch.cache
    expected = dense_decode(batch)
    assert_decodes(wrapper.run(batch.q, cache, return_lse=True), expected)
    assert_decodes(wrapper.run_return_lse(batch.q, cache), expected)
    assert_decodes([wrapper.run(batch.q, cache)], expected[:1])
    assert wrapper.kernel_choice.kernel == wrapper.resolved_backend == "reference"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kv_dtype", [None, torch.float8_e4m3fn])
@pytest.mark.parametrize("o_dtype", [None, torch.float32])
def test_dtypes(make_batch, dense_decode, dtype, kv_dtype, o_dtype):
    batch = make_batch([5, 0, 33], dtype=dtype, kv_dtype=kv_dtype)
    out = planned(batch, o_data_type=o_dtype).run(batch.q, batch.cache)
    assert out.dtype == (o_dtype or dtype)
    assert_decodes([out], dense_decode(batch)[:1], rtol=1e-5 if o_dtype else 1e-2)


def test_default_dtypes_are_flashinfers(make_batch):
    batch = make_batch([5], dtype=torch.float16, kv_dtype=torch.bfloat16)
    wrapper = fi_prefetch.BatchDecodeWithPagedKVCacheWrapper(workspace())
    wrapper.plan(*batch.table, *batch.shape, data_type="bfloat16")
    assert wrapper.run(batch.q, batch.cache).dtype == torch.float16


@pytest.mark.parametrize("window_left", [-1, 0, 9])
@pytest.mark.parametrize("soft_cap", [None, 3.0])
@pytest.mark.parametrize("with_sinks", [False, True])
def test_features(batch, dense_decode, window_left, soft_cap, with_sinks):
    sinks = torch.linspace(-1, 1, 4) if with_sinks else None
    wrapper = planned(batch, window_left=window_left, logits_soft_cap=soft_cap, sm_scale=0.2)
    expected = dense_decode(batch, window_left=window_left, soft_cap=soft_cap or 0.0, sm_scale=0.2, sinks=sinks)
    assert_decodes(wrapper.run(batch.q, batch.cache, sinks=sinks, return_lse=True), expected)


@pytest.mark.parametrize("as_tensor", [False, True])
def test_scales(batch, dense_decode, as_tensor):
    scales = {"q_scale": 2.0, "k_scale": 0.5, "v_scale": 3.0}
    if as_tensor:
        scales = {name: torch.tensor([value]) for name, value in scales.items()}
    out, lse = planned(batch, sm_scale=0.3).run(batch.q, batch.cache, return_lse=True, **scales)
    expected, expected_lse = dense_decode(batch, sm_scale=0.3)
    assert_decodes((out, lse), (3 * expected, expected_lse))


def test_a_v_scale_per_head(batch, dense_decode):
    scale = torch.tensor([[1.0], [2.0], [3.0], [4.0]])
    out = planned(batch).run(batch.q, batch.cache, v_scale=scale)
    assert_decodes([out], [dense_decode(batch)[0] * scale])


def test_rope_and_alibi(make_batch):
    batch = make_batch([5, 33])
    for mode in ("ROPE_LLAMA", "ALIBI"):
        wrapper = planned(batch, pos_encoding_mode=mode, rope_scale=2.0, rope_theta=100.0)
        expected = reference.batch_decode(
            batch.q, batch.cache[:, 0], batch.cache[:, 1], *batch.table,
            pos_encoding_mode=mode, rope_scale=2.0, rope_theta=100.0,
        )  # fmt: skip
        assert_decodes(wrapper.run(batch.q, batch.cache, return_lse=True), [t.double() for t in expected])


def test_preallocated_results(batch, dense_decode):
    out, lse = torch.full_like(batch.q, torch.nan), torch.full(batch.q.shape[:2], torch.nan)
    result = planned(batch).run(batch.q, batch.cache, out=out, lse=lse, return_lse=True)
    assert result[0] is out and result[1] is lse
    assert_decodes(result, dense_decode(batch))


def test_strided_tensors(batch, dense_decode):
    wide = torch.zeros(*batch.cache.shape[:-1], 80)
    wide[..., :64] = batch.cache
    q = torch.zeros(4, 6, 64)[:, 1:5].copy_(batch.q)
    assert_decodes(planned(batch).run(q, wide[..., :64], return_lse=True), dense_decode(batch))


def test_empty_batch_and_empty_requests(make_batch):
    batch = make_batch([0, 0])
    out, lse = planned(batch).run(batch.q, batch.cache, return_lse=True)
    assert not out.any() and (lse == -torch.inf).all()
    wrapper = fi_prefetch.BatchDecodeWithPagedKVCacheWrapper(workspace())
    nothing = torch.zeros(0, dtype=torch.int32)
    wrapper.plan(torch.zeros(1, dtype=torch.int32), nothing, nothing, 4, 2, 64, 16, q_data_type="float32")
    out, lse = wrapper.run(torch.zeros(0, 4, 64), batch.cache, return_lse=True)
    assert out.shape == (0, 4, 64) and lse.shape == (0, 4)


def test_int64_page_table(batch, dense_decode):
    batch.indptr, batch.indices, batch.last_page_len = (t.long() for t in batch.table)
    assert_decodes(planned(batch).run(batch.q, batch.cache, return_lse=True), dense_decode(batch))


def test_forward_sets_its_own_parameters(batch, dense_decode):
    wrapper = planned(batch, window_left=3)
    assert_decodes([wrapper.forward(batch.q, batch.cache)], dense_decode(batch)[:1])
    wrapper.begin_forward(*batch.table, *batch.shape, **batch.dtypes)
    result = wrapper.forward_return_lse(batch.q, batch.cache, window_left=5, logits_soft_cap=2.0, sm_scale=0.5)
    assert_decodes(result, dense_decode(batch, window_left=5, soft_cap=2.0, sm_scale=0.5))
    wrapper.end_forward()


def test_q_len_per_req_at_run(make_batch):
    batch = make_batch([5, 6], q_len=2)
    wrapper = planned(batch)
    with pytest.warns(DeprecationWarning, match="q_len_per_req"):
        wrapper.run(batch.q, batch.cache, q_len_per_req=2)


def test_graph_buffers_change_without_a_plan(make_batch, dense_decode):
    batch = make_batch([5, 0, 40])
    wrapper = graph_wrapper(batch)
    wrapper.plan(*batch.table, *batch.shape, **batch.dtypes)
    assert_decodes(wrapper.run(batch.q, batch.cache, return_lse=True), dense_decode(batch))
    later = make_batch([50, 17, 1], seed=1)
    wrapper._paged_kv_indptr_buf.copy_(later.indptr)
    wrapper._paged_kv_indices_buf[: len(later.indices)] = later.indices
    wrapper._paged_kv_last_page_len_buf.copy_(later.last_page_len)
    assert_decodes(wrapper.run(later.q, later.cache, return_lse=True), dense_decode(later))
    assert wrapper.is_cuda_graph_enabled


def test_graph_wrapper_class(batch, dense_decode):
    buffers = [torch.zeros(n, dtype=torch.int32) for n in (5, 50, 4)]
    wrapper = fi_prefetch.CUDAGraphBatchDecodeWithPagedKVCacheWrapper(workspace(), *buffers, prefetch="off")
    assert isinstance(wrapper, flashinfer.decode.CUDAGraphBatchDecodeWithPagedKVCacheWrapper)
    assert isinstance(wrapper, fi_prefetch.BatchDecodeWithPagedKVCacheWrapper)
    wrapper.plan(*batch.table, *batch.shape, **batch.dtypes)
    assert_decodes(wrapper.run(batch.q, batch.cache, return_lse=True), dense_decode(batch))
    assert wrapper._paged_kv_indices_buf.data_ptr() == buffers[1].data_ptr()


def test_fast_decode_plan(make_batch, dense_decode):
    batch, later = make_batch([5, 16]), make_batch([40, 1, 17], seed=1)
    wrapper = planned(batch)
    wrapper.begin_forward = lambda *args, **kwargs: flashinfer.decode.fast_decode_plan(wrapper, *args, **kwargs)
    if not HAS_0_7:
        with pytest.raises((AssertionError, ValueError), match="(?i)cuda"):
            wrapper.begin_forward(*later.table, *later.shape, **later.dtypes)
        return
    wrapper.begin_forward(*later.table, *later.shape, **later.dtypes)
    assert_decodes(wrapper.run(later.q, later.cache, return_lse=True), dense_decode(later))


def test_compiles_to_one_graph_once(make_batch, dense_decode):
    batch = make_batch([5, 16])
    wrapper = planned(batch)
    graphs = []

    def count(graph, example):
        graphs.append(graph)
        return graph

    @torch.compile(fullgraph=True, backend=count)
    def attend(q, cache):
        return wrapper.run(q * 1.0, cache, return_lse=True)

    assert_decodes(attend(batch.q, batch.cache), dense_decode(batch))
    later = make_batch([16, 3], seed=1)
    wrapper.plan(*later.table, *later.shape, **later.dtypes)
    assert_decodes(attend(later.q, later.cache), dense_decode(later))
    assert len(graphs) == 1


def test_compiles_with_a_v_scale_on_the_device(batch, dense_decode):
    wrapper = planned(batch)

    @torch.compile(fullgraph=True, backend="eager")
    def attend(q, cache, scale):
        return wrapper.run(q, cache, v_scale=scale)

    assert_decodes([attend(batch.q, batch.cache, torch.tensor(2.0))], [2 * dense_decode(batch)[0]])


def test_compiled_layers_have_their_own_parameters(make_batch, dense_decode):
    """`forward` brings scale, cap, window and position mode with each call: no layer gets another one's."""
    batch = make_batch([5, 16])
    wrapper = planned(batch, sm_scale=7.0, logits_soft_cap=1.0)
    graphs = []

    def count(graph, example):
        graphs.append(graph)
        return graph

    layers = (
        {"sm_scale": 0.5, "logits_soft_cap": 2.0},
        {"sm_scale": 0.1, "window_left": 3},
        {"q_scale": 2.0, "v_scale": 3.0},
    )

    @torch.compile(fullgraph=True, backend=count)
    def attend(q, cache):
        q = q * 1.0
        rotary = {"pos_encoding_mode": "ROPE_LLAMA", "rope_scale": 2.0, "rope_theta": 100.0}
        return (
            *(wrapper.forward_return_lse(q, cache, **parameters) for parameters in layers),
            wrapper.forward(q, cache, **rotary),
        )

    def expected(of):
        yield dense_decode(of, sm_scale=0.5, soft_cap=2.0)
        yield dense_decode(of, sm_scale=0.1, window_left=3)
        out, lse = dense_decode(of, sm_scale=2 * 64**-0.5)
        yield 3 * out, lse

    def check(of):
        *results, rotated = attend(of.q, of.cache)
        for result, want in zip(results, expected(of), strict=True):
            assert_decodes(result, want)
        rotary = {"pos_encoding_mode": "ROPE_LLAMA", "rope_scale": 2.0, "rope_theta": 100.0}
        want, _ = reference.batch_decode(of.q, of.cache[:, 0], of.cache[:, 1], *of.table, **rotary)
        assert_decodes([rotated], [want.double()])

    for _ in range(2):  # the second call starts from what the first one's last layer left
        check(batch)
    later = make_batch([16, 3], seed=1)
    wrapper.plan(*later.table, *later.shape, **later.dtypes)
    check(later)
    assert len(graphs) == 1


def test_compiled_run_reads_what_is_set_when_it_runs(batch, dense_decode):
    """`run` goes by the plan, or by the `forward` before it, as it does without torch.compile."""
    wrapper = planned(batch, sm_scale=0.3)

    @torch.compile(fullgraph=True, backend="eager")
    def attend(q, cache):
        first = wrapper.run(q, cache)
        return first, wrapper.forward(q, cache, sm_scale=0.5), wrapper.run(q, cache)

    for scales in ((0.3, 0.5, 0.5), (0.5, 0.5, 0.5)):
        for out, scale in zip(attend(batch.q, batch.cache), scales, strict=True):
            assert_decodes([out], dense_decode(batch, sm_scale=scale)[:1])


def test_page_tables_with_gaps(make_batch, dense_decode):
    """Kernels read page tables by their address alone, so they are brought together first."""
    batch = make_batch([5, 16, 33])
    indptr, indices, last_page_len = (
        torch.stack([table, torch.full_like(table, 99)], dim=1)[:, 0] for table in batch.table
    )
    for wrapper in (fi_prefetch.BatchDecodeWithPagedKVCacheWrapper(workspace()), graph_wrapper(batch)):
        wrapper.plan(indptr, indices, last_page_len, *batch.shape, **batch.dtypes)
        assert all(buffer.is_contiguous() for buffer in (wrapper._paged_kv_indptr_buf, wrapper._paged_kv_indices_buf))
        assert_decodes(wrapper.run(batch.q, batch.cache, return_lse=True), dense_decode(batch))
        assert wrapper.workspace_size(indptr, indices, last_page_len, *batch.shape, **batch.dtypes) == (0, 0)


def test_a_graphs_own_buffer_with_gaps(make_batch, dense_decode):
    """It starts where the buffer does, and is not the buffer."""
    batch = make_batch([5, 16, 33])
    wrapper = graph_wrapper(batch)
    indices = wrapper._paged_kv_indices_buf[::2][: len(batch.indices)].copy_(batch.indices)
    wrapper.plan(batch.indptr, indices, batch.last_page_len, *batch.shape, **batch.dtypes)
    assert_decodes(wrapper.run(batch.q, batch.cache, return_lse=True), dense_decode(batch))


def test_integers_of_other_kinds(batch, dense_decode):
    wrapper = fi_prefetch.BatchDecodeWithPagedKVCacheWrapper(workspace())
    options = {"fixed_split_size": numpy.int64(4), **batch.dtypes}
    wrapper.plan(*batch.table, *(numpy.int64(number) for number in batch.shape), **options)
    assert_decodes(wrapper.run(batch.q, batch.cache, return_lse=True), dense_decode(batch))


def test_custom_op_is_well_formed(batch):
    wrapper = planned(batch)
    out, lse = torch.empty_like(batch.q), torch.empty(batch.q.shape[:2])
    torch.library.opcheck(
        torch.ops.fi_prefetch.batch_decode.default,
        (wrapper._number, batch.q, batch.cache[:, 0], batch.cache[:, 1], out, lse, None, None, None, None, None, None),
        test_utils=("test_schema", "test_faketensor"),
    )
    parameters = (1.0, 1.0, 1.0, "NONE", 3, 2.0, 0.5, None, None)
    torch.library.opcheck(
        torch.ops.fi_prefetch.batch_decode_with.default,
        (wrapper._number, batch.q, batch.cache[:, 0], batch.cache[:, 1], out, lse, *parameters),
        test_utils=("test_schema", "test_faketensor"),
    )


def test_prefetch_kv_checks_its_arguments(batch, make_batch):
    wrapper = planned(batch)
    assert fi_prefetch.prefetch_kv(wrapper, batch.cache) is False
    assert fi_prefetch.prefetch_kv(wrapper, batch.cache, budget=1 << 20) is False
    with pytest.raises(ValueError, match="l2_budget"):
        fi_prefetch.prefetch_kv(wrapper, batch.cache, budget=-1)
    with pytest.raises(ValueError, match="paged_kv_cache"):
        fi_prefetch.prefetch_kv(wrapper, batch.cache[..., :32])
    with pytest.raises(TypeError, match="wrapper"):
        fi_prefetch.prefetch_kv(object(), batch.cache)
    with pytest.raises(RuntimeError, match="plan"):
        fi_prefetch.prefetch_kv(fi_prefetch.BatchDecodeWithPagedKVCacheWrapper(workspace()), batch.cache)


def test_patch_flashinfer():
    theirs = flashinfer.BatchDecodeWithPagedKVCacheWrapper
    ours = fi_prefetch.BatchDecodeWithPagedKVCacheWrapper
    assert theirs is not ours
    with fi_prefetch.patch_flashinfer():
        assert flashinfer.BatchDecodeWithPagedKVCacheWrapper is ours
        assert flashinfer.decode.BatchDecodeWithPagedKVCacheWrapper is ours
        graph = fi_prefetch.CUDAGraphBatchDecodeWithPagedKVCacheWrapper
        assert flashinfer.CUDAGraphBatchDecodeWithPagedKVCacheWrapper is graph
        with pytest.raises(KeyError), fi_prefetch.patch_flashinfer():
            raise KeyError
        assert flashinfer.BatchDecodeWithPagedKVCacheWrapper is ours
    assert flashinfer.BatchDecodeWithPagedKVCacheWrapper is theirs
    for_good = fi_prefetch.patch_flashinfer()
    try:
        with fi_prefetch.patch_flashinfer():
            pass
        assert flashinfer.decode.BatchDecodeWithPagedKVCacheWrapper is ours
    finally:
        for_good.__exit__(None, None, None)
    assert flashinfer.decode.BatchDecodeWithPagedKVCacheWrapper is theirs


def test_neither_pickled_nor_copied(batch):
    wrapper = planned(batch)
    for operation in (pickle.dumps, copy.copy, copy.deepcopy):
        with pytest.raises(TypeError, match="cannot be pickled or copied"):
            operation(wrapper)


@pytest.mark.parametrize("graph", [False, True])
def test_new_workspaces(batch, dense_decode, graph):
    if graph:
        wrapper = graph_wrapper(batch)
        wrapper.plan(*batch.table, *batch.shape, **batch.dtypes)
    else:
        wrapper = planned(batch)
    wrapper.reset_workspace_buffer(workspace(), workspace(64))
    with pytest.raises(RuntimeError, match="plan"):
        wrapper.run(batch.q, batch.cache)
    wrapper.plan(*batch.table, *batch.shape, **batch.dtypes)
    assert_decodes(wrapper.run(batch.q, batch.cache, return_lse=True), dense_decode(batch))
    assert wrapper.workspace_size(*batch.table, *batch.shape, **batch.dtypes) == (0, 0)


def test_unsupported_on_the_cpu(batch):
    wrapper = planned(batch)
    with pytest.raises(NotImplementedError, match="CPU"):
        wrapper.run(batch.q, batch.cache, kv_cache_sf=batch.cache)
    with pytest.raises(NotImplementedError, match="NVFP4"):
        wrapper.plan(*batch.table, *batch.shape, kv_data_type=torch.uint8)
    with pytest.raises(NotImplementedError, match="jit_args"):
        fi_prefetch.BatchDecodeWithPagedKVCacheWrapper(workspace(), jit_args=["name"])
    if HAS_0_7_4:
        with pytest.raises(NotImplementedError, match="use_token_head_sf.*CUDA device"):
            wrapper.plan(*batch.table, *batch.shape, use_token_head_sf=True, kv_data_type=torch.float8_e4m3fn)


def test_what_the_release_does_not_know_is_refused(batch, dense_decode):
    if HAS_0_7_4:
        return
    with pytest.raises(TypeError, match=f"jit_kwargs: FlashInfer {flashinfer.__version__} has no such argument"):
        fi_prefetch.BatchDecodeWithPagedKVCacheWrapper(workspace(), jit_kwargs={})
    wrapper = planned(batch)
    with pytest.raises(TypeError, match="use_token_head_sf: FlashInfer .* has no such argument"):
        wrapper.plan(*batch.table, *batch.shape, use_token_head_sf=True, **batch.dtypes)
    assert_decodes(wrapper.run(batch.q, batch.cache, return_lse=True), dense_decode(batch))


def test_jit_kwargs_reach_flashinfer(monkeypatch):
    given = []
    monkeypatch.setattr(THEIRS, "__init__", lambda self, *args, **kwargs: given.append((args[8], kwargs)) or None)
    ours = fi_prefetch.BatchDecodeWithPagedKVCacheWrapper
    buffer = torch.empty(64, dtype=torch.uint8, device="meta")  # no CPU's: FlashInfer's constructor is called
    monkeypatch.setattr(ours, "device", torch.device("meta"), raising=False)
    ours(buffer, jit_args=["name"])
    if HAS_0_7_4:
        ours(buffer, "NHD", False, False, None, None, None, "fa2", ["name"], {"use_fast_math": True})
        assert given[1:] == [(["name"], {"jit_kwargs": {"use_fast_math": True}})]
    assert given[0] == (["name"], {})


# --- bad input -------------------------------------------------------------------------------------------------------

INT = torch.int32
BAD_CONSTRUCTOR = {
    "workspace type": ({"float_workspace_buffer": [0]}, TypeError, "float_workspace_buffer"),
    "workspace alignment": ({"float_workspace_buffer": workspace(100)[1:]}, ValueError, "16-byte"),
    "workspace stride": ({"float_workspace_buffer": workspace(100)[::2]}, ValueError, "contiguous"),
    "layout": ({"kv_layout": "NDH"}, ValueError, "kv_layout.*'NDH'"),
    "ready": ({"ready": "soon"}, ValueError, "ready.*'soon'"),
    "policy": ({"prefetch": "fast"}, ValueError, "prefetch policy.*'fast'"),
    "policy type": ({"prefetch": 2}, TypeError, "prefetch"),
    "no graph buffers": ({"use_cuda_graph": True}, ValueError, "paged_kv_indptr_buffer"),
}
GRAPH_BUFFERS = {
    "paged_kv_indptr_buffer": torch.zeros(4, dtype=INT),
    "paged_kv_indices_buffer": torch.zeros(9, dtype=INT),
    "paged_kv_last_page_len_buffer": torch.zeros(3, dtype=INT),
}
BAD_GRAPH_BUFFERS = {
    "indptr length": ({"paged_kv_indptr_buffer": torch.zeros(5, dtype=INT)}, "paged_kv_indptr_buffer.*4.*got 5"),
    "float indices": ({"paged_kv_indices_buffer": torch.zeros(9)}, "paged_kv_indices_buffer.*float32"),
    "mixed dtypes": ({"paged_kv_indices_buffer": torch.zeros(9, dtype=torch.int64)}, "paged_kv_indices_buffer.*int64"),
    "rank": ({"paged_kv_last_page_len_buffer": torch.zeros(3, 1, dtype=INT)}, "paged_kv_last_page_len_buffer.*one"),
}
BAD_PLAN = {
    "indptr dtype": ({"indptr": torch.zeros(5)}, ValueError, "indptr.*float32"),
    "indptr rank": ({"indptr": torch.zeros(5, 1, dtype=INT)}, ValueError, r"indptr.*\(5, 1\)"),
    "indptr length": ({"indptr": torch.zeros(4, dtype=INT)}, ValueError, "indptr.*5 entries.*got 4"),
    "indptr type": ({"indptr": [0, 1]}, TypeError, "indptr.*list"),
    "indices dtype": ({"indices": torch.zeros(5, dtype=torch.int64)}, ValueError, "indices.*int32.*int64"),
    "indices device": ({"indices": torch.zeros(5, dtype=INT, device="meta")}, ValueError, "indices.*cpu.*meta"),
    "last_page_len dtype": ({"last_page_len": torch.zeros(4)}, ValueError, "last_page_len.*float32"),
    "heads that do not divide": ({"num_qo_heads": 5}, ValueError, "num_qo_heads.*2.*got 5"),
    "no heads": ({"num_kv_heads": 0}, ValueError, "num_kv_heads.*at least 1.*0"),
    "head_dim": ({"head_dim": 64.0}, TypeError, "head_dim.*64.0"),
    "page_size": ({"page_size": -16}, ValueError, "page_size.*-16"),
    "q_len_per_req": ({"q_len_per_req": 0}, ValueError, "q_len_per_req.*0"),
    "window_left": ({"window_left": -2}, ValueError, "window_left.*-2"),
    "fixed_split_size": ({"fixed_split_size": -2}, ValueError, "fixed_split_size.*at least -1.*-2"),
    "fixed_split_size type": ({"fixed_split_size": 4.0}, TypeError, "fixed_split_size.*int.*4.0"),
    "fixed_split_size that is a yes": ({"fixed_split_size": True}, TypeError, "fixed_split_size.*int.*True"),
    "use_token_head_sf type": ({"use_token_head_sf": 1}, TypeError, "use_token_head_sf.*bool.*1"),
    "pos_encoding_mode": ({"pos_encoding_mode": "ROPE"}, ValueError, "pos_encoding_mode.*'ROPE'"),
    "q_data_type": ({"q_data_type": "float99"}, TypeError, "q_data_type.*'float99'"),
    "no q_data_type": ({"q_data_type": None}, TypeError, "q_data_type.*None"),
    "o_data_type": ({"o_data_type": int}, TypeError, "o_data_type"),
    "lengths beyond the page table": ({"indices": torch.zeros(4, dtype=INT)}, ValueError, "indptr.*at most 4.*got 5"),
    "indptr that falls": (
        {"indptr": torch.tensor([0, 3, 1, 2, 5], dtype=INT)}, ValueError, r"indptr.*got 1 after 3.*request 1"
    ),
    "indptr below 0": ({"indptr": torch.tensor([-1, 1, 1, 2, 5], dtype=INT)}, ValueError, "indptr.*-1"),
    "last page too long": (
        {"last_page_len": torch.tensor([5, 0, 17, 1], dtype=INT)}, ValueError, "last_page_len.*request 2.*got 17"
    ),
    "last page empty": (
        {"last_page_len": torch.tensor([5, 0, 16, 0], dtype=INT)}, ValueError, "last_page_len.*request 3.*got 0"
    ),
}  # fmt: skip


@pytest.mark.parametrize(("changes", "error", "message"), BAD_CONSTRUCTOR.values(), ids=BAD_CONSTRUCTOR)
def test_bad_constructor(changes, error, message):
    with pytest.raises(error, match=message):
        fi_prefetch.BatchDecodeWithPagedKVCacheWrapper(**{"float_workspace_buffer": workspace(), **changes})


@pytest.mark.parametrize(("changes", "message"), BAD_GRAPH_BUFFERS.values(), ids=BAD_GRAPH_BUFFERS)
def test_bad_graph_buffers(changes, message):
    with pytest.raises(ValueError, match=message):
        fi_prefetch.BatchDecodeWithPagedKVCacheWrapper(workspace(), use_cuda_graph=True, **GRAPH_BUFFERS | changes)


@pytest.mark.parametrize(("changes", "error", "message"), BAD_PLAN.values(), ids=BAD_PLAN)
def test_bad_plan(batch, dense_decode, changes, error, message):
    names = ("indptr", "indices", "last_page_len", "num_qo_heads", "num_kv_heads", "head_dim", "page_size")
    good = dict(zip(names, (*batch.table, *batch.shape), strict=True)) | batch.dtypes
    wrapper = planned(batch)
    with pytest.raises(error, match=message):
        wrapper.plan(**good | changes)
    # The plan before it still stands.
    assert_decodes(wrapper.run(batch.q, batch.cache, return_lse=True), dense_decode(batch))


BAD_RUN = {
    "q dtype": (lambda b: {"q": b.q.half()}, ValueError, "q: expected dtype torch.float32, got torch.float16"),
    "q rows": (lambda b: {"q": b.q[:3]}, ValueError, r"q: expected shape \(4, 4, 64\), got \(3, 4, 64\)"),
    "q rank": (lambda b: {"q": b.q[0]}, ValueError, "q: expected shape"),
    "q heads": (lambda b: {"q": b.q[:, :2]}, ValueError, "q: expected shape"),
    "q type": (lambda b: {"q": None}, TypeError, "q: expected a torch.Tensor"),
    "q device": (lambda b: {"q": b.q.to("meta")}, ValueError, "q: expected device cpu, got meta"),
    "q stride": (lambda b: {"q": b.q.repeat_interleave(2, 2)[..., ::2]}, ValueError, "q: expected a last stride of 1"),
    "cache dtype": (lambda b: {"paged_kv_cache": b.cache.half()}, ValueError, "paged_kv_cache .*float16"),
    "cache rank": (lambda b: {"paged_kv_cache": b.cache[0, 0, 0]}, ValueError, "paged_kv_cache: expected 5 dimensions"),
    "cache type": (lambda b: {"paged_kv_cache": "kv"}, TypeError, "paged_kv_cache: expected a tensor or a pair"),
    "cache of three": (lambda b: {"paged_kv_cache": (b.cache[:, 0],) * 3}, ValueError, "pair .*got 3"),
    "cache head_dim": (lambda b: {"paged_kv_cache": b.cache[..., :32]}, ValueError, "paged_kv_cache .*shape"),
    "cache page_size": (lambda b: {"paged_kv_cache": b.cache[:, :, :8]}, ValueError, "paged_kv_cache .*16, .*got .*8,"),
    "cache layout": (lambda b: {"paged_kv_cache": b.cache.transpose(2, 3)}, ValueError, "paged_kv_cache .*NHD"),
    "cache stride": (
        lambda b: {"paged_kv_cache": b.cache.repeat_interleave(2, 4)[..., ::2]}, ValueError, "k_cache.*last stride"
    ),
    "v of other pages": (
        lambda b: {"paged_kv_cache": (b.cache[:, 0], b.cache[1:, 1])}, ValueError, "v_cache.*expected shape"
    ),
    "page number": (lambda b: {"paged_kv_cache": b.cache[:2]}, ValueError, "indices: expected page numbers .* 0 to 1"),
    "out dtype": (lambda b: {"out": b.q.half()}, ValueError, "out: expected dtype"),
    "out shape": (lambda b: {"out": b.q[:3]}, ValueError, "out: expected shape"),
    "out stride": (lambda b: {"out": b.q.mT.contiguous().mT}, ValueError, "out: expected a contiguous"),
    "out address": (
        lambda b: {"out": torch.zeros(4 * 4 * 64 + 1)[1:].view(4, 4, 64)}, ValueError, "out: expected a 16-byte aligned"
    ),
    "lse dtype": (lambda b: {"lse": torch.zeros(4, 4).half()}, ValueError, "lse: expected dtype torch.float32"),
    "lse shape": (lambda b: {"lse": torch.zeros(4)}, ValueError, "lse: expected shape"),
    "sinks shape": (lambda b: {"sinks": torch.zeros(2)}, ValueError, r"sinks: expected shape \(4,\)"),
    "sinks device": (lambda b: {"sinks": torch.zeros(4, device="meta")}, ValueError, "sinks: .* cpu, got .* meta"),
    "out device": (lambda b: {"out": b.q.to("meta")}, ValueError, "out: expected device cpu, got meta"),
    "lse device": (
        lambda b: {"lse": torch.zeros(4, 4, device="meta")}, ValueError, "lse: expected device cpu, got meta"
    ),
    "cache device": (
        lambda b: {"paged_kv_cache": b.cache.to("meta")}, ValueError, r"paged_kv_cache \(k_cache.*device cpu, got meta"
    ),
    "v device": (
        lambda b: {"paged_kv_cache": (b.cache[:, 0], b.cache[:, 1].to("meta"))}, ValueError, r"\(v_cache.*got meta"
    ),
    "v_scale device": (
        lambda b: {"v_scale": torch.ones(1, device="meta")}, ValueError, "v_scale: .* a tensor on cpu, got one on meta"
    ),
    "v_scale shape": (lambda b: {"v_scale": torch.ones(3)}, ValueError, r"v_scale: expected a shape .*, got \(3,\)"),
    "v_scale rank": (lambda b: {"v_scale": torch.ones(2, 4, 4, 1)}, ValueError, "v_scale: expected a shape"),
    "window_left": (lambda b: {"window_left": 7}, ValueError, "window_left: expected None or -1 as planned, got 7"),
}  # fmt: skip


@pytest.mark.parametrize(("changes", "error", "message"), BAD_RUN.values(), ids=BAD_RUN)
def test_bad_run(batch, changes, error, message):
    with pytest.raises(error, match=message):
        planned(batch).run(**{"q": batch.q, "paged_kv_cache": batch.cache, "return_lse": True} | changes(batch))


def test_the_first_bad_page_number(batch):
    batch.indices[3] = 77
    batch.indices[4] = -1
    wrapper = planned(batch)
    with pytest.raises(ValueError, match=r"indices: .* got 77 at position 3 \(request 3, its page 1\)"):
        wrapper.run(batch.q, batch.cache)


@pytest.mark.parametrize(
    "changes, error",
    [
        ({"window_left": True}, TypeError),
        ({"q_len_per_req": 1.0}, TypeError),
        ({"use_token_head_sf": 0}, TypeError),
        ({"window_left": -2}, ValueError),
    ],
)
def test_a_bad_plan_is_refused_after_a_good_one_too(batch, changes, error):
    """Arguments that were checked are told by being the same objects; 1 is not True, nor 1.0."""
    wrapper = planned(batch, window_left=1)
    with pytest.raises(error, match=next(iter(changes))):
        wrapper.plan(*batch.table, *batch.shape, **batch.dtypes, **{"window_left": 1, **changes})


def test_a_plan_of_another_batch_size_is_another_plan(make_batch):
    first, second = make_batch(lengths=[5, 70, 33]), make_batch(lengths=[5, 70])
    wrapper = planned(first)
    before = wrapper._decision
    wrapper.plan(*second.table, *second.shape, **second.dtypes)
    assert wrapper._decision.spec == before.spec._replace(batch_size=2)
    wrapper.plan(*first.table, *first.shape, **first.dtypes)
    assert wrapper._decision is before


def test_run_before_plan(batch):
    wrapper = fi_prefetch.BatchDecodeWithPagedKVCacheWrapper(workspace())
    assert wrapper.kernel_choice.kernel == "none" and wrapper.prefetch_plan is None
    with pytest.raises(RuntimeError, match="plan"):
        wrapper.run(batch.q, batch.cache)


def test_graph_wrapper_of_another_shape(batch, make_batch):
    wrapper = graph_wrapper(batch)
    other = make_batch([5, 5])
    with pytest.raises(ValueError, match="batch size 4, got 2"):
        wrapper.plan(*other.table, *other.shape, **other.dtypes)
    small = graph_wrapper(batch, pages=3)
    with pytest.raises(ValueError, match="indices: expected at most 3 entries.*got 5"):
        small.plan(*batch.table, *batch.shape, **batch.dtypes)
    wrapper.plan(*batch.table, *batch.shape, **batch.dtypes)
    with pytest.raises(ValueError, match="q_len_per_req: expected 1.*got 2"):
        wrapper.plan(*batch.table, *batch.shape, q_len_per_req=2, **batch.dtypes)


# --- the GPU path ----------------------------------------------------------------------------------------------------

H100 = device.describe("NVIDIA H100 80GB HBM3", (9, 0), 132, 50 << 20)


class FakeModule:
    """Has the compiled module's functions and argument order; runs the reference, so that wrong arguments show."""

    def __init__(self, variant: jit.Variant) -> None:
        self.variant = variant
        self.calls: list[tuple[str, tuple[Any, ...]]] = []
        self.partial_bytes = 4096
        self.error: Exception | None = None

    def plan(self, *args: Any) -> list[int]:
        self.calls.append(("plan", args))
        if self.error is not None:
            raise self.error
        assert len(args) == 15
        batch_size, num_qo_heads, num_kv_heads, page_size, graph, window_left, soft_cap, qk, vo = args[4:13]
        assert qk == vo == self.variant.head_dim
        assert (window_left >= 0, soft_cap > 0) == (self.variant.sliding_window, self.variant.soft_cap)
        assert (args[13].dtype, args[14].dtype) == (self.variant.dtype_q, self.variant.dtype_kv)
        assert isinstance(graph, bool)
        tile = 2 * 16 * qk * self.variant.dtype_kv.itemsize
        shared, rows = 8 * 3 * tile + 512, num_qo_heads // num_kv_heads
        return [132, 8, shared, self.partial_bytes, 3 * 132 * 4, rows, 1, 3, 0, 132 * 8 * 512 + batch_size * 16]

    def adjust_plan(self, info: list[int], batch_size: int, blocks: int, warps: int, min_tiles: int) -> list[int]:
        assert warps <= info[1] and not self.variant.fixed_split
        return [blocks, warps, *info[2:6], min_tiles, *info[7:9], blocks * warps * 512 + batch_size * 16]

    def fix_splits(
        self, info: list[int], split_tokens: int, pages: int, page_size: int, batch_size: int, heads: int
    ) -> list[int]:
        self.calls.append(("fix_splits", (split_tokens, pages, page_size, batch_size, heads)))
        assert self.variant.fixed_split
        splits = (pages * page_size // split_tokens + batch_size) * heads
        return [*info[:3], splits * 1024, splits * 4, info[5], -(-split_tokens // 16), *info[7:]]

    def workspace_size(self, *args: Any) -> list[int]:
        self.calls.append(("workspace_size", args))
        assert len(args) == 13
        return [self.partial_bytes, 64]

    def run(
        self, float_workspace, counters, plan_info, q, k, v, indptr, indices, last_page_len, o, lse, layout,
        window_left, enable_pdl, sinks, soft_cap, sm_scale, v_scale, rope_scale, rope_theta, q_len, prefetch, running,
        planned,
    ) -> None:  # fmt: skip
        self.calls.append(("run", (enable_pdl, prefetch, counters, plan_info, planned)))
        assert isinstance(enable_pdl, bool) and len(prefetch) == 5 and len(plan_info) == 10
        assert (window_left >= 0, soft_cap > 0) == (self.variant.sliding_window, self.variant.soft_cap)
        assert (q.dtype, k.dtype, o.dtype) == (self.variant.dtype_q, self.variant.dtype_kv, self.variant.dtype_o)
        assert counters.dtype == torch.int32 and 4 * counters.numel() >= plan_info[4] and not counters.any()
        assert running is None or (running.dtype == torch.int32 and not running.any())
        if planned is not None:
            assert planned.tolist() == self.scheduled(indptr, indices, last_page_len, planned), "an old schedule"
        assert sinks is None or (sinks.dtype == torch.float32 and sinks.is_contiguous())
        result, result_lse = reference.batch_decode(
            q, k, v, indptr, indices, last_page_len, kv_layout=["NHD", "HND"][layout], sm_scale=sm_scale,
            v_scale=v_scale, window_left=window_left, logits_soft_cap=soft_cap, q_len_per_req=q_len, sinks=sinks,
            pos_encoding_mode=self.variant.position, rope_scale=rope_scale, rope_theta=rope_theta, out_dtype=o.dtype,
        )  # fmt: skip
        o.copy_(result)
        if lse is not None:
            lse.copy_(result_lse)

    def prefetch_kv(self, *args: Any) -> None:
        self.calls.append(("prefetch_kv", args))

    def schedule(
        self, plan_info, planned, indptr, indices, last_page_len, page_size, num_kv_heads, window_left, q_len
    ) -> None:  # fmt: skip
        self.calls.append(("schedule", (plan_info, planned)))
        assert (window_left >= 0) == self.variant.sliding_window and not self.variant.fixed_split
        assert planned.dtype == torch.int32 and 4 * planned.numel() >= plan_info[9]
        assert q_len >= 1 and page_size >= 1 and num_kv_heads >= 1
        planned.copy_(torch.tensor(self.scheduled(indptr, indices, last_page_len, planned), dtype=torch.int32))

    @staticmethod
    def scheduled(indptr, indices, last_page_len, planned) -> list[int]:
        """Stands for what a schedule of this page table is."""
        return [hash((*indptr.tolist(), *indices.tolist(), *last_page_len.tolist())) % (1 << 31)] * planned.numel()

    def names(self) -> list[str]:
        return [name for name, _ in self.calls]


@pytest.fixture
def gpu(monkeypatch):
    """CPU tensors pass for an H100's: our kernel is a FakeModule, and FlashInfer's planner and run are recorded."""
    modules: dict[jit.Variant, FakeModule] = {}
    flashinfers: list[tuple[str, dict[str, Any]]] = []
    their_module = SimpleNamespace(plan=lambda *args: ["their plan"], stage="theirs")

    def load(variant: jit.Variant) -> FakeModule:
        return modules.setdefault(variant, FakeModule(variant))

    def plan(self, indptr, indices, last_page_len, *shape, **kwargs):
        flashinfers.append(("plan", {"table": (indptr, indices, last_page_len), "shape": shape, **kwargs}))
        assert self._backend != "fa2" or self._asked_backend == "fa2", "our pick of a backend reached FlashInfer"
        self._cached_module = their_module
        self._plan_info = self._cached_module.plan()
        for name in ("window_left", "logits_soft_cap", "pos_encoding_mode", "sm_scale", "rope_scale", "rope_theta"):
            setattr(self, f"_{name}", kwargs[name])
        self._paged_kv_indptr_buf, self._paged_kv_indices_buf = indptr, indices
        self._paged_kv_last_page_len_buf = last_page_len

    def run(self, q, cache, *args, **kwargs):
        flashinfers.append(("run", {"args": args, "module": self._cached_module, **kwargs}))
        return "their result"

    base = flashinfer.decode.BatchDecodeWithPagedKVCacheWrapper
    monkeypatch.setattr(base, "_plan_impl" if HAS_0_7 else "plan", plan)
    monkeypatch.setattr(base, "run", run)
    monkeypatch.setattr(device, "facts", lambda where: H100)
    monkeypatch.setattr(jit, "load", load)
    monkeypatch.setattr(decode, "device_support_pdl", lambda where: True)
    return SimpleNamespace(modules=modules, flashinfers=flashinfers, their_module=their_module)


@pytest.fixture
def half_batch(make_batch):
    return make_batch([5, 0, 16, 33], dtype=torch.bfloat16)


def only(modules: dict[jit.Variant, FakeModule]) -> FakeModule:
    (module,) = modules.values()
    return module


@pytest.mark.parametrize("kv_layout", ["NHD", "HND"])
@pytest.mark.parametrize("q_len", [1, 3])
@pytest.mark.parametrize("features", [{}, {"window_left": 9}, {"logits_soft_cap": 3.0}, {"sm_scale": 0.3}])
def test_gpu_arguments(gpu, make_batch, dense_decode, kv_layout, q_len, features):
    batch = make_batch([5, 3, 16, 33], kv_layout=kv_layout, q_len=q_len, dtype=torch.float16)
    wrapper = planned(batch, **features)
    sinks = torch.linspace(-1, 1, 4, dtype=torch.float16)
    result = wrapper.run(batch.q, batch.cache, return_lse=True, sinks=sinks, v_scale=2.0)
    options = {"soft_cap" if name == "logits_soft_cap" else name: value for name, value in features.items()}
    expected, expected_lse = dense_decode(batch, sinks=sinks, **options)
    assert_decodes(result, (2 * expected, expected_lse), rtol=2e-3)
    module = only(gpu.modules)
    assert module.names() == ["plan", "run"]
    assert module.calls[0][1][4:8] == (4, 4 * q_len, 2, 16)
    assert wrapper.kernel_choice.kernel == wrapper.resolved_backend == "fi_prefetch"
    assert module.variant.name in wrapper.kernel_choice.reason
    assert not gpu.flashinfers


def test_gpu_plans_once_for_the_same_shape(gpu, half_batch, make_batch):
    wrapper = planned(half_batch)
    for lengths in ([50, 1, 1, 1], [0, 0, 0, 90]):
        later = make_batch(lengths, dtype=torch.bfloat16)
        wrapper.plan(*later.table, *later.shape, **later.dtypes)
        wrapper.run(later.q, later.cache)
    assert only(gpu.modules).names() == ["plan", "run", "run"]
    smaller = make_batch([5, 5, 5], dtype=torch.bfloat16)
    for batch in (smaller, half_batch, smaller):
        wrapper.plan(*batch.table, *batch.shape, **batch.dtypes)
        wrapper.run(batch.q, batch.cache)
    assert only(gpu.modules).names()[3:] == ["plan", "run", "run", "run"]


def test_gpu_prefetch_plan(gpu, half_batch):
    wrapper = planned(half_batch, prefetch="run_ahead=2,prologue=1,l2_budget=0.5", ready="page_table")
    plan = wrapper.prefetch_plan
    assert (plan.facts.blocks, plan.facts.warps, plan.facts.stages) == (132, 8, 3)
    assert plan.facts.tile_bytes == 2 * 16 * 64 * 2
    # Five pages of 16 tokens, K and V, two kv heads: 40,960 bytes, rounded up to a power of two.
    assert plan.facts.kv_bytes == 65536
    assert plan.prologue == 1 and plan.ready == "page_table" and plan.pdl
    module = only(gpu.modules)
    for enable_pdl, prologue in ((None, 1), (True, 1), (False, 0)):
        wrapper.run(half_batch.q, half_batch.cache, enable_pdl=enable_pdl)
        pdl, codes, *_ = module.calls[-1][1]
        assert pdl == (enable_pdl is not False)
        assert codes == [plan.run_ahead, prologue, 0, 1, 1]
    assert PrefetchPolicy.parse("off") == planned(half_batch, prefetch="off")._policy


@pytest.mark.parametrize(
    ("heads", "q_len", "mode", "tiles"),
    [(8, 1, "NONE", 4), (8, 1, "ALIBI", 4), (8, 1, "ROPE_LLAMA", 2), (4, 2, "NONE", 4), (8, 2, "NONE", 2)],
)
def test_gpu_prologue_reaches_what_the_kernel_knows(gpu, make_batch, heads, q_len, mode, tiles):
    batch = make_batch([40, 20], num_qo_heads=heads, num_kv_heads=1, q_len=q_len, dtype=torch.bfloat16)
    assert planned(batch, pos_encoding_mode=mode).prefetch_plan.facts.stretch_tiles == tiles


def test_gpu_levers_follow_the_plan(gpu, half_batch):
    """A wrapper that is planned for much KV must not go on with the levers of the little that it had before."""
    wrapper = planned(half_batch, ready="all_but_last_token")
    module = only(gpu.modules)
    # Pages of 8 KiB: over the 512 MiB up to which there is a prologue.
    much = torch.cat([half_batch.indices, torch.zeros(1 << 16, dtype=torch.int32)])
    for indices, prologue in ((half_batch.indices, 1), (much, 0), (half_batch.indices, 1)):
        wrapper.plan(half_batch.indptr, indices, half_batch.last_page_len, *half_batch.shape, **half_batch.dtypes)
        wrapper.run(half_batch.q, half_batch.cache)
        codes = module.calls[-1][1][1]
        assert codes == wrapper.prefetch_plan.codes() and codes[1:3] == [prologue, 0]


def test_gpu_plans_of_a_long_life_are_forgotten(gpu, make_batch, dense_decode, monkeypatch):
    monkeypatch.setattr(decode, "_MAX_DECISIONS", 3)
    wrapper = fi_prefetch.BatchDecodeWithPagedKVCacheWrapper(workspace())
    for size in (1, 2, 3, 4, 5, 1, 2):
        batch = make_batch([17] * size, dtype=torch.bfloat16)
        wrapper.plan(*batch.table, *batch.shape, **batch.dtypes)
        assert len(wrapper._decisions) <= 3
        assert_decodes(wrapper.run(batch.q, batch.cache, return_lse=True), dense_decode(batch), rtol=1e-2)


def test_gpu_tuned_grid_has_no_more_warps_than_fit(gpu, half_batch, monkeypatch):
    original = FakeModule.plan
    monkeypatch.setattr(FakeModule, "plan", lambda self, *args: [132, 3, *original(self, *args)[2:]])
    assert planned(half_batch).prefetch_plan.facts.warps == 3


def test_gpu_tuned_grid_that_needs_more_workspace_is_left_out(gpu, half_batch, monkeypatch):
    def adjust_plan(self, info, batch_size, blocks, warps, min_tiles):
        return [4 * blocks, warps, info[2], 8192, *info[4:6], min_tiles, *info[7:]]

    monkeypatch.setattr(FakeModule, "adjust_plan", adjust_plan)
    assert planned(half_batch, workspace_bytes=8191)._decision.blocks == 132
    assert planned(half_batch, workspace_bytes=8192)._decision.blocks == 4 * 132


def test_gpu_kv_bytes_follow_the_plan(gpu, make_batch):
    batch = make_batch([5], dtype=torch.bfloat16)
    wrapper = planned(batch)
    small = wrapper.prefetch_plan.facts.kv_bytes
    pages = torch.arange(64, dtype=torch.int32)
    table = torch.tensor([0, 64], dtype=torch.int32), pages, torch.tensor([16], dtype=torch.int32)
    wrapper.plan(*table, *batch.shape, **batch.dtypes)
    assert wrapper.prefetch_plan.facts.kv_bytes == 64 * small


def test_gpu_counters_are_the_wrappers_own(gpu, half_batch, monkeypatch):
    wrapper = planned(half_batch)
    module = only(gpu.modules)
    wrapper.run(half_batch.q, half_batch.cache)
    first = module.calls[-1][1][2]
    wrapper.run(half_batch.q, half_batch.cache)
    assert module.calls[-1][1][2] is first
    original = FakeModule.plan
    monkeypatch.setattr(FakeModule, "plan", lambda self, *args: [*original(self, *args)[:4], 1 << 20, 2, 1, 3, 0])
    wrapper.plan(*half_batch.table, *half_batch.shape, window_left=3, **half_batch.dtypes)
    wrapper.run(half_batch.q, half_batch.cache)
    # The old ones stay: a graph may have been captured with them.
    assert [counters.numel() for counters in wrapper._counters] == [1024, 1 << 18]
    assert wrapper._counters[0] is first


def test_gpu_counters_are_one_buffer_a_stream(gpu, half_batch, monkeypatch):
    """Calls that overlap on two streams must not count each other's blocks."""
    wrapper = planned(half_batch)
    module = only(gpu.modules)
    used = {}
    for stream in (7, 9, None, 7):
        monkeypatch.setattr(type(wrapper), "_current_stream", lambda self, stream=stream: stream)
        wrapper.run(half_batch.q, half_batch.cache)
        counters = module.calls[-1][1][2]
        assert used.setdefault(stream, counters) is counters
    assert len({id(counters) for counters in used.values()}) == 3


def test_gpu_counters_of_a_capture_are_no_streams(monkeypatch):
    """A graph is replayed on any stream: it has counters of its own, and asks no stream while it is captured."""
    monkeypatch.setattr(torch.cuda, "current_stream", lambda where: SimpleNamespace(cuda_stream=7))
    wrapper = SimpleNamespace(device=torch.device("cuda", 0), _is_capturing=lambda: True)
    current_stream = fi_prefetch.BatchDecodeWithPagedKVCacheWrapper._current_stream
    assert current_stream(wrapper) is None
    wrapper._is_capturing = lambda: False
    assert current_stream(wrapper) == 7


def test_whether_a_graph_is_captured_is_asked_of_the_wrappers_gpu(monkeypatch):
    """The current GPU may be another one, where nothing is captured, or where something else is."""
    current = [0]

    @contextlib.contextmanager
    def on(where):
        before, current[0] = current[0], where.index
        yield
        current[0] = before

    monkeypatch.setattr(torch.cuda, "current_device", lambda: current[0])
    monkeypatch.setattr(torch.cuda, "device", on)
    for capturing in (0, 1):
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda gpu=capturing: current[0] == gpu)
        for index in (0, 1):
            wrapper = SimpleNamespace(device=torch.device("cuda", index))
            assert fi_prefetch.BatchDecodeWithPagedKVCacheWrapper._is_capturing(wrapper) == (index == capturing)
            assert current == [0]


def test_gpu_counters_made_in_a_capture_are_that_graphs_alone(gpu, half_batch, monkeypatch):
    """They are zero only once that graph has been replayed, which may never happen."""
    capturing = [True]
    monkeypatch.setattr(decode.BatchDecodeWithPagedKVCacheWrapper, "_is_capturing", lambda self: capturing[0])
    wrapper = planned(half_batch)
    module = only(gpu.modules)

    def counters_of_a_run():
        wrapper.run(half_batch.q, half_batch.cache)
        return module.calls[-1][1][2]

    first, second = counters_of_a_run(), counters_of_a_run()
    assert first is not second and not wrapper._counters
    capturing[0] = False
    # The same plan outside: from now on graphs have zeros that were there before them.
    wrapper.plan(*half_batch.table, *half_batch.shape, **half_batch.dtypes)
    capturing[0] = True
    third = counters_of_a_run()
    assert third is wrapper._counters[0] and counters_of_a_run() is third
    assert all(third is not other for other in (first, second))


def test_gpu_plans_work_out_a_schedule_where_the_page_table_stays(gpu, half_batch):
    """Anew for every plan, in the same memory; the run after it does not start before it is there."""
    wrapper = planned(half_batch, ready="plan")
    module = only(gpu.modules)
    memory = module.calls[-1][1][1]
    assert module.names()[-1] == "schedule"
    for dependent in (False, True):
        wrapper.run(half_batch.q, half_batch.cache)
        pdl, _, _, _, given = module.calls[-1][1]
        assert given is memory and pdl is dependent
    half_batch.table[1].copy_(half_batch.table[1].flip(0))
    wrapper.plan(*half_batch.table, *half_batch.shape, **half_batch.dtypes)
    assert module.calls[-1] == ("schedule", (module.calls[-1][1][0], memory))
    wrapper.run(half_batch.q, half_batch.cache)
    assert module.calls[-1][1][4] is memory and module.calls[-1][1][0] is False


@pytest.mark.parametrize("between", ["captured", "failed"])
def test_gpu_a_run_that_launched_nothing_is_not_the_first_after_a_schedule(gpu, half_batch, monkeypatch, between):
    """The first one in the stream must not begin beside the schedule's kernel."""
    wrapper = planned(half_batch, ready="plan")
    module = only(gpu.modules)
    with monkeypatch.context() as context:
        if between == "captured":
            context.setattr(type(wrapper), "_is_capturing", lambda self: True)
            wrapper.run(half_batch.q, half_batch.cache)
            assert module.calls[-1][1][0] is True, "in a graph the schedule's kernel is not the one before"
        else:
            context.setattr(type(wrapper), "_reserve_counters", lambda *_: (_ for _ in ()).throw(MemoryError))
            with pytest.raises(MemoryError):
                wrapper.run(half_batch.q, half_batch.cache)
    for dependent in (False, True):
        wrapper.run(half_batch.q, half_batch.cache)
        assert module.calls[-1][1][0] is dependent


def test_gpu_no_schedule_without_the_promise_or_with_fixed_splits(gpu, half_batch):
    for options, ready in (({}, "all_but_last_token"), ({"fixed_split_size": 1}, "plan")):
        wrapper = planned(half_batch, ready=ready, **options)
        wrapper.run(half_batch.q, half_batch.cache)
        assert wrapper._decision.module.calls[-1][1][4] is None
    assert not any("schedule" in module.names() for module in gpu.modules.values())


def test_gpu_a_schedule_is_of_one_decision(gpu, half_batch):
    """`forward` may change the plan's window, and so who serves; what was worked out is of the plan before."""
    wrapper = planned(half_batch, ready="plan")
    wrapper.forward(half_batch.q, half_batch.cache, window_left=3)
    assert wrapper._decision.module.calls[-1][1][4] is None
    wrapper.plan(*half_batch.table, *half_batch.shape, **half_batch.dtypes)
    wrapper.run(half_batch.q, half_batch.cache)
    assert wrapper._decision.module.calls[-1][1][4] is not None


def test_gpu_a_captured_plan_leaves_no_schedule(gpu, half_batch, monkeypatch):
    """What is captured has not been done."""
    wrapper = planned(half_batch, ready="plan")
    module = only(gpu.modules)
    monkeypatch.setattr(type(wrapper), "_is_capturing", lambda self: True)
    wrapper.plan(*half_batch.table, *half_batch.shape, **half_batch.dtypes)
    assert module.names().count("schedule") == 1
    monkeypatch.setattr(type(wrapper), "_is_capturing", lambda self: False)
    wrapper.run(half_batch.q, half_batch.cache)
    assert module.calls[-1][1][4] is None


def test_gpu_a_captured_run_keeps_its_schedule(gpu, half_batch, monkeypatch):
    """A plain wrapper's graph goes on reading the page table of its plan. A CUDA-graph wrapper's gets the new one."""
    for wrapper, same in ((planned(half_batch, ready="plan"), False), (graph_wrapper(half_batch, ready="plan"), True)):
        schedules = []
        for capturing in (True, True, False):
            wrapper.plan(*half_batch.table, *half_batch.shape, **half_batch.dtypes)
            monkeypatch.setattr(type(wrapper), "_is_capturing", lambda self, now=capturing: now)
            for _ in range(2):
                wrapper.run(half_batch.q, half_batch.cache)
                schedules.append(wrapper._decision.module.calls[-1][1][4])
            monkeypatch.setattr(type(wrapper), "_is_capturing", lambda self: False)
        assert all(
            first is second and first is not None for first, second in zip(schedules[::2], schedules[1::2], strict=True)
        )
        assert len({id(schedule) for schedule in schedules}) == (1 if same else 3)


def test_gpu_a_schedule_that_needs_more_room_gets_it(gpu, half_batch, monkeypatch):
    wrapper = planned(half_batch, ready="plan")
    module = only(gpu.modules)
    first = module.calls[-1][1][1]
    original = FakeModule.plan
    monkeypatch.setattr(FakeModule, "plan", lambda self, *args: [264, *original(self, *args)[1:9], 264 * 8 * 512])
    monkeypatch.setattr(FakeModule, "adjust_plan", lambda self, info, *args: info)
    wrapper.plan(*half_batch.table, *half_batch.shape, window_left=3, **half_batch.dtypes)
    second = wrapper._decision.module.calls[-1][1][1]
    assert second.numel() >= 264 * 8 * 128 and second is not first
    assert any(kept is first for kept in wrapper._planned_before), "a run on another stream may still read it"


class Recorder(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.ops: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.ops.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("batch_size", [1, 256])
def test_gpu_plan_reads_no_tensor(gpu, monkeypatch, batch_size):
    wrapper = fi_prefetch.BatchDecodeWithPagedKVCacheWrapper(workspace())
    wrapper._check_contents = False  # as on a GPU
    table = (
        torch.arange(batch_size + 1, dtype=torch.int32) * 16,
        torch.arange(batch_size * 16, dtype=torch.int32),
        torch.ones(batch_size, dtype=torch.int32),
    )
    for name in ("cpu", "item", "tolist", "numpy", "__int__", "__bool__", "__float__", "__index__"):
        monkeypatch.setattr(torch.Tensor, name, None)

    def plan() -> None:
        wrapper.plan(*table, 32, 8, 128, 1, q_data_type=torch.bfloat16)

    plan()
    with Recorder() as recorder:
        plan()
    assert not recorder.ops
    # The time to beat is 10 us; the bound leaves room for a busy machine.
    assert min(timeit.repeat(plan, number=200, repeat=20)) / 200 < 100e-6


def test_gpu_graph_plan_only_copies_into_the_buffers(gpu, half_batch):
    wrapper = graph_wrapper(half_batch)
    wrapper._check_contents = False
    wrapper.plan(*half_batch.table, *half_batch.shape, **half_batch.dtypes)
    with Recorder() as recorder:
        wrapper.plan(*half_batch.table, *half_batch.shape, **half_batch.dtypes)
    assert recorder.ops.count("aten.copy_.default") == 3
    assert set(recorder.ops) <= {"aten.copy_.default", "aten.slice.Tensor"}
    buffers = wrapper._paged_kv_indptr_buf, wrapper._paged_kv_indices_buf[:5], wrapper._paged_kv_last_page_len_buf
    for buffer, source in zip(buffers, half_batch.table, strict=True):
        assert torch.equal(buffer, source)
    with Recorder() as recorder:
        wrapper.plan(*buffers, *half_batch.shape, **half_batch.dtypes)
    assert not recorder.ops


class Copies(TorchDispatchMode):
    """Whether each copy into a buffer was one to wait for."""

    def __init__(self) -> None:
        super().__init__()
        self.non_blocking: list[bool] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.copy_.default:
            self.non_blocking.append(bool(args[2]) if len(args) > 2 else bool((kwargs or {}).get("non_blocking")))
        return func(*args, **(kwargs or {}))


class Elsewhere(torch.Tensor):
    """A tensor on another device, that notes how it is brought to the wrapper's."""

    device = torch.device("cpu", 1)
    asked: list[bool] = []

    def to(self, device: torch.device, *, non_blocking: bool) -> torch.Tensor:
        self.asked.append(non_blocking)
        return self.as_subclass(torch.Tensor)


@pytest.mark.parametrize("asked", [{}, {"non_blocking": True}, {"non_blocking": False}], ids=str)
def test_gpu_plan_waits_for_its_copies_where_it_is_told_to(gpu, half_batch, dense_decode, asked, monkeypatch):
    expected = asked.get("non_blocking", True)
    wrapper = graph_wrapper(half_batch)
    with Copies() as copies:
        wrapper.plan(*half_batch.table, *half_batch.shape, **half_batch.dtypes, **asked)
    assert copies.non_blocking == [expected] * 3
    monkeypatch.setattr(Elsewhere, "asked", [])
    wrapper = fi_prefetch.BatchDecodeWithPagedKVCacheWrapper(workspace())
    table = [part.as_subclass(Elsewhere) for part in half_batch.table]
    wrapper.plan(*table, *half_batch.shape, **half_batch.dtypes, **asked)
    assert Elsewhere.asked == [expected] * 3
    assert_decodes(wrapper.run(half_batch.q, half_batch.cache, return_lse=True), dense_decode(half_batch), rtol=1e-2)


UNSERVED_PLANS = {
    "ALiBi under a soft cap": {"pos_encoding_mode": "ALIBI", "logits_soft_cap": 30.0, "rope_scale": 2.0},
    "too many rows": {"q_len_per_req": 9},
    "too many rows in fixed splits": {"q_len_per_req": 9, "fixed_split_size": 4},
    "too many rows in one split": {"q_len_per_req": 9, "disable_split_kv": True},
    "float32": {"q_data_type": torch.float32, "kv_data_type": torch.float32},
}


@pytest.mark.parametrize("changes", UNSERVED_PLANS.values(), ids=UNSERVED_PLANS)
def test_gpu_unserved_plan_is_flashinfers(gpu, half_batch, changes):
    wrapper = fi_prefetch.BatchDecodeWithPagedKVCacheWrapper(workspace())
    theirs = {"block_tables": torch.zeros(4, 3, dtype=torch.int32), "seq_lens": torch.tensor([5, 0, 16, 33])}
    wrapper.plan(*half_batch.table, *half_batch.shape, **half_batch.dtypes | theirs | changes)
    assert wrapper.kernel_choice.kernel == "flashinfer" and wrapper.kernel_choice.reason
    assert all(gpu.flashinfers[0][1][name] is value for name, value in theirs.items())
    ((_, arguments),) = gpu.flashinfers
    assert arguments["table"] == half_batch.table and arguments["shape"] == half_batch.shape
    for name, value in changes.items():
        assert arguments[name] == value
    assert "window_right" not in arguments and "is_causal" not in arguments
    assert wrapper.run(half_batch.q, half_batch.cache, v_scale=2.0) == "their result"
    assert gpu.flashinfers[-1][1]["v_scale"] == 2.0
    assert wrapper.resolved_backend == "fa2" and wrapper.prefetch_plan is None


def test_gpu_flashinfer_plans_and_runs_with_the_wrappers_gpu_current(gpu, half_batch, monkeypatch):
    """Its XQA kernels, for one, go to the current GPU, wherever the tensors are."""
    current: list[torch.device] = []

    @contextlib.contextmanager
    def on_device(where):
        current.append(where)
        yield
        current.pop()

    def within(name):
        original = getattr(THEIRS, name)

        def called(self, *args, **kwargs):
            assert current == [self.device]
            return original(self, *args, **kwargs)

        return called

    monkeypatch.setattr(decode, "on_device", on_device)
    for name in (decode._PLANNER, "run"):
        monkeypatch.setattr(THEIRS, name, within(name))
    wrapper = fi_prefetch.BatchDecodeWithPagedKVCacheWrapper(workspace())
    float32 = {"q_data_type": torch.float32, "kv_data_type": torch.float32}
    wrapper.plan(*half_batch.table, *half_batch.shape, **float32)
    assert wrapper.run(half_batch.q, half_batch.cache) == "their result" and not current
    assert [name for name, _ in gpu.flashinfers] == ["plan", "run"]


@pytest.mark.parametrize(
    "changes, tiles",
    [
        ({"fixed_split_size": 4}, 4 * 16 // 16),
        ({"disable_split_kv": True}, dispatch.WHOLE_REQUEST // 16),
        ({"disable_split_kv": True, "fixed_split_size": 4}, dispatch.WHOLE_REQUEST // 16),
    ],
)
def test_gpu_fixed_splits(gpu, half_batch, dense_decode, changes, tiles):
    wrapper = planned(half_batch, prefetch="run_ahead=2,prologue=1,l2_budget=1.0", **changes)
    assert_decodes(wrapper.run(half_batch.q, half_batch.cache, return_lse=True), dense_decode(half_batch), rtol=1e-2)
    assert wrapper.kernel_choice.kernel == "fi_prefetch" and not gpu.flashinfers
    module = only(gpu.modules)
    assert module.variant.fixed_split
    assert module.calls[-1][1][3][6] == tiles
    assert wrapper.prefetch_plan.codes() == [0, 0, 0, 0, 1]
    assert fi_prefetch.prefetch_kv(wrapper, half_batch.cache) is False
    # And back: another module, another plan.
    wrapper.plan(*half_batch.table, *half_batch.shape, **half_batch.dtypes)
    assert not wrapper._decision.spec.variant().fixed_split
    # FlashInfer's words for no fixed size.
    for nothing in (-1, 0, None):
        wrapper.plan(*half_batch.table, *half_batch.shape, **half_batch.dtypes, fixed_split_size=nothing)
        assert not wrapper._decision.spec.variant().fixed_split


def test_gpu_fixed_splits_need_room(gpu, half_batch):
    wrapper = planned(half_batch, workspace_bytes=4096, fixed_split_size=1)
    assert wrapper.kernel_choice.kernel == "flashinfer" and "4096 bytes" in wrapper.kernel_choice.reason
    table = (*half_batch.table, *half_batch.shape)
    needed, _ = wrapper.workspace_size(*table, **half_batch.dtypes, fixed_split_size=1)
    # Five pages, which count as eight: the power of two that the launch goes by. Four requests, two kv heads.
    assert needed == (8 + 4) * 2 * 1024
    assert planned(half_batch, workspace_bytes=needed, fixed_split_size=1).kernel_choice.kernel == "fi_prefetch"
    # FlashInfer gets the same splits to make.
    assert [plan["fixed_split_size"] for _, plan in gpu.flashinfers] == [1]


@pytest.mark.parametrize("options", [{"fixed_split_size": 2}, {"disable_split_kv": True, "window_left": 9}])
def test_gpu_fixed_splits_in_a_graph(gpu, half_batch, dense_decode, options):
    """There is room for as many pages as the buffer holds, and the grid is the module's own."""
    wrapper = graph_wrapper(half_batch)
    for _ in range(2):
        wrapper.plan(*half_batch.table, *half_batch.shape, **half_batch.dtypes, **options)
        result = wrapper.run(half_batch.q, half_batch.cache, return_lse=True)
        assert_decodes(result, dense_decode(half_batch, window_left=options.get("window_left", -1)), rtol=1e-2)
    module = only(gpu.modules)
    assert module.names() == ["plan", "fix_splits", "run", "run"]
    tokens = 32 if "fixed_split_size" in options else dispatch.WHOLE_REQUEST
    assert module.calls[1] == ("fix_splits", (tokens, 100, 16, 4, 2))
    assert list(wrapper._plan_info)[:2] == [132, 8] and wrapper._plan_info is module.calls[2][1][3]


@pytest.mark.parametrize("options", [{"fixed_split_size": 4}, {"disable_split_kv": True}])
def test_fixed_splits_on_the_cpu_are_the_references(batch, dense_decode, options):
    """Which computes a request by itself anyway."""
    wrapper = planned(batch, **options)
    assert_decodes(wrapper.run(batch.q, batch.cache, return_lse=True), dense_decode(batch))
    assert wrapper.kernel_choice.kernel == "reference"


def test_gpu_small_workspace(gpu, half_batch):
    wrapper = planned(half_batch, workspace_bytes=1024)
    assert wrapper.kernel_choice.kernel == "flashinfer"
    assert "1024 bytes" in wrapper.kernel_choice.reason and "4096" in wrapper.kernel_choice.reason
    assert wrapper.workspace_size(*half_batch.table, *half_batch.shape, **half_batch.dtypes) == (4096, 64)
    wrapper.reset_workspace_buffer(workspace(4096), workspace(64))
    with pytest.raises(RuntimeError, match="plan"):
        wrapper.run(half_batch.q, half_batch.cache)
    wrapper.plan(*half_batch.table, *half_batch.shape, **half_batch.dtypes)
    assert wrapper.kernel_choice.kernel == "fi_prefetch"
    wrapper.reset_workspace_buffer(workspace(8192), workspace(64))
    wrapper.run(half_batch.q, half_batch.cache)
    assert wrapper.kernel_choice.kernel == "fi_prefetch"


def test_gpu_without_a_compiler(gpu, half_batch, monkeypatch):
    def fail(variant):
        raise jit.KernelUnavailableError("no CUDA compiler: install one")

    monkeypatch.setattr(jit, "load", fail)
    wrapper = planned(half_batch)
    assert wrapper.kernel_choice == fi_prefetch.KernelChoice("flashinfer", "no CUDA compiler: install one")
    assert wrapper.run(half_batch.q, half_batch.cache) == "their result"


def test_gpu_kernel_that_cannot_plan(gpu, half_batch):
    variant = planned(half_batch)._decision.spec.variant()
    gpu.modules[variant].error = RuntimeError("too little shared memory")
    wrapper = planned(half_batch)
    assert wrapper.kernel_choice.kernel == "flashinfer"
    assert "too little shared memory" in wrapper.kernel_choice.reason


@pytest.fixture
def far(monkeypatch):
    """Makes a copy of a batch's cache that is, as the dispatcher is told, beyond the reach of our kernel's offsets."""
    copies: list[torch.Tensor] = []
    obstacle = dispatch.cache_obstacle

    def of_a_copy(k: torch.Tensor, v: torch.Tensor) -> str | None:
        if any(k.untyped_storage().data_ptr() == x.untyped_storage().data_ptr() for x in copies):
            return "k_cache spans 160 GiB in units of 16 bytes, more than 32-bit offsets reach"
        return obstacle(k, v)

    def make(batch) -> torch.Tensor:
        copies.append(batch.cache.clone())
        return copies[-1]

    monkeypatch.setattr(dispatch, "cache_obstacle", of_a_copy)
    return make


def misaligned(x: torch.Tensor) -> torch.Tensor:
    return torch.zeros(x.numel() + 8, dtype=x.dtype)[4 : 4 + x.numel()].view(x.shape).copy_(x)


def test_gpu_queries_are_brought_to_boundaries_and_caches_must_lie_on_them(gpu, half_batch):
    """Both kernels read 16 bytes at a time."""
    wrapper = planned(half_batch)
    expected = wrapper.run(half_batch.q, half_batch.cache)
    for q in (misaligned(half_batch.q), torch.nn.functional.pad(half_batch.q, (0, 2))[..., :-2]):
        assert torch.equal(wrapper.run(q, half_batch.cache), expected)
    assert not gpu.flashinfers
    with pytest.raises(ValueError, match="paged_kv_cache: expected a start on a multiple of 16 bytes"):
        wrapper.run(half_batch.q, misaligned(half_batch.cache))
    with pytest.raises(ValueError, match="paged_kv_cache: expected a start on a multiple of 16 bytes"):
        fi_prefetch.prefetch_kv(wrapper, misaligned(half_batch.cache))


@pytest.mark.parametrize("tensor_cores", [False, True])
def test_gpu_late_flashinfer(gpu, half_batch, tensor_cores, far):
    """A cache that our kernel cannot read: FlashInfer plans at the first such run, once, and ours serves the rest."""
    wrapper = planned(half_batch, use_tensor_cores=tensor_cores, sm_scale=0.5, seq_lens=torch.tensor([5, 0, 16, 33]))
    ours = [wrapper.run(half_batch.q, half_batch.cache) for _ in range(2)]
    for _ in range(2):
        assert wrapper.run(half_batch.q, far(half_batch), q_scale=3.0) == "their result"
        assert wrapper.kernel_choice.kernel == "flashinfer" and "16 bytes" in wrapper.kernel_choice.reason
        assert wrapper.resolved_backend != "fi_prefetch"
    assert [name for name, _ in gpu.flashinfers] == ["plan", "run", "run"]
    plan = gpu.flashinfers[0][1]
    assert plan["sm_scale"] == 0.5 and plan["seq_lens"] is not None and plan["q_data_type"] == torch.bfloat16
    for got, want in zip(plan["table"], half_batch.table, strict=True):
        assert torch.equal(got, want)
    assert gpu.flashinfers[-1][1]["q_scale"] == 3.0
    # FlashInfer's run finds its module behind ours.
    assert gpu.flashinfers[-1][1]["module"].stage == "theirs"
    assert torch.equal(wrapper.run(half_batch.q, half_batch.cache), ours[0])
    assert wrapper.kernel_choice.kernel == "fi_prefetch"
    # A new plan is a new plan for FlashInfer, too.
    wrapper.plan(*half_batch.table, *half_batch.shape, **half_batch.dtypes)
    wrapper.run(half_batch.q, far(half_batch))
    assert [name for name, _ in gpu.flashinfers] == ["plan", "run", "run", "plan", "run"]


def test_gpu_late_flashinfer_that_was_captured_is_planned_again(gpu, half_batch, make_batch, monkeypatch, far):
    """A graph of FlashInfer's kernels reads a schedule that only its plan writes."""
    wrapper = graph_wrapper(half_batch)
    later = make_batch([33, 16, 0, 5], dtype=torch.bfloat16)
    wrapper.plan(*half_batch.table, *half_batch.shape, **half_batch.dtypes)
    wrapper.run(half_batch.q, far(half_batch))
    wrapper.plan(*later.table, *later.shape, **later.dtypes)
    assert [name for name, _ in gpu.flashinfers] == ["plan", "run"], "nothing of it was captured"
    wrapper.run(half_batch.q, far(half_batch))
    with monkeypatch.context() as capturing:
        capturing.setattr(type(wrapper), "_is_capturing", lambda self: True)
        wrapper.run(half_batch.q, far(half_batch))
    gpu.flashinfers.clear()
    wrapper.plan(*half_batch.table, *half_batch.shape, **half_batch.dtypes)
    ((name, plan),) = gpu.flashinfers
    assert name == "plan" and torch.equal(plan["table"][0], half_batch.indptr)
    wrapper.run(half_batch.q, half_batch.cache)
    assert wrapper.kernel_choice.kernel == "fi_prefetch"
    assert wrapper.run(half_batch.q, far(half_batch)) == "their result"
    assert gpu.flashinfers[-1][1]["module"].stage == "theirs" and len(gpu.flashinfers) == 2


def test_gpu_a_plan_of_flashinfers_that_fails_leaves_none(gpu, half_batch, monkeypatch):
    wrapper = planned(half_batch)
    module = only(gpu.modules)
    base = flashinfer.decode.BatchDecodeWithPagedKVCacheWrapper

    def failing(self, *args, **kwargs):
        raise RuntimeError("Buffer overflow when allocating memory")

    with monkeypatch.context() as failure:
        failure.setattr(base, "_plan_impl" if HAS_0_7 else "plan", failing)
        with pytest.raises(RuntimeError, match="overflow"):
            wrapper.plan(*half_batch.table, *half_batch.shape, **half_batch.dtypes, window_right=1)
    with pytest.raises(RuntimeError, match=r"run: expected plan\(\) before run\(\): FlashInfer's plan failed"):
        wrapper.run(half_batch.q, half_batch.cache)
    wrapper.plan(*half_batch.table, *half_batch.shape, **half_batch.dtypes)
    wrapper.run(half_batch.q, half_batch.cache)
    assert module.names()[-1] == "run"


def test_gpu_late_flashinfer_while_capturing(gpu, half_batch, monkeypatch, far):
    wrapper = planned(half_batch)
    monkeypatch.setattr(decode.BatchDecodeWithPagedKVCacheWrapper, "_is_capturing", lambda self: True)
    with pytest.raises(RuntimeError, match="16 bytes.*captured"):
        wrapper.run(half_batch.q, far(half_batch))
    wrapper.run(half_batch.q, half_batch.cache)
    assert not gpu.flashinfers


LATE = {
    "extra arguments": ((1,), {}),
    "NVFP4 scales": ((), {"kv_cache_sf": torch.zeros(1)}),
    "skip softmax": ((), {"skip_softmax_threshold_scale_factor": 1.0}),
    "a scale per head": ((), {"k_scale": torch.ones(4)}),
    "a scale on another device": ((), {"q_scale": torch.ones(1, device="meta")}),
}


@pytest.mark.parametrize(("args", "kwargs"), LATE.values(), ids=LATE)
def test_gpu_unserved_run_is_flashinfers(gpu, half_batch, args, kwargs):
    wrapper = planned(half_batch)
    assert wrapper.run(half_batch.q, half_batch.cache, *args, **kwargs) == "their result"
    run = gpu.flashinfers[-1][1]
    assert run["args"] == args and all(run[name] is value for name, value in kwargs.items())


def test_gpu_forward_changes_the_variant(gpu, half_batch, dense_decode):
    wrapper = planned(half_batch)
    out = wrapper.forward(half_batch.q, half_batch.cache, logits_soft_cap=3.0, window_left=9)
    assert_decodes([out], dense_decode(half_batch, soft_cap=3.0, window_left=9)[:1], rtol=1e-2)
    assert len(gpu.modules) == 2
    alibi = {"pos_encoding_mode": "ALIBI", "logits_soft_cap": 3.0}
    assert wrapper.forward(half_batch.q, half_batch.cache, **alibi) == "their result"
    assert gpu.flashinfers[0][1]["pos_encoding_mode"] == "ALIBI"
    assert_decodes([wrapper.forward(half_batch.q, half_batch.cache)], dense_decode(half_batch)[:1], rtol=1e-2)
    assert wrapper.kernel_choice.kernel == "fi_prefetch"


@pytest.mark.parametrize("mode", ["ROPE_LLAMA", "ALIBI"])
def test_gpu_positions_reach_the_kernel(gpu, half_batch, mode):
    options = {"pos_encoding_mode": mode, "rope_scale": 2.0, "rope_theta": 100.0}
    wrapper = fi_prefetch.BatchDecodeWithPagedKVCacheWrapper(workspace())
    wrapper.plan(*half_batch.table, *half_batch.shape, **half_batch.dtypes, **options)
    found = [wrapper.run(half_batch.q, half_batch.cache), planned(half_batch).forward(
        half_batch.q, half_batch.cache, **options
    )]  # fmt: skip
    assert wrapper.kernel_choice.kernel == "fi_prefetch"
    k, v = half_batch.cache[:, 0], half_batch.cache[:, 1]
    expected, _ = reference.batch_decode(half_batch.q, k, v, *half_batch.table, **options)
    for out in found:
        torch.testing.assert_close(out, expected, rtol=1e-2, atol=1e-3)


def test_gpu_rotary_frequencies_beyond_the_kernel_are_flashinfers(gpu, half_batch):
    wrapper = fi_prefetch.BatchDecodeWithPagedKVCacheWrapper(workspace())
    plan = {"pos_encoding_mode": "ROPE_LLAMA", "rope_theta": 0.5}
    wrapper.plan(*half_batch.table, *half_batch.shape, **half_batch.dtypes, **plan)
    assert wrapper.run(half_batch.q, half_batch.cache) == "their result"
    assert "rope_theta=0.5" in wrapper.kernel_choice.reason


def fast_plan_arguments(wrapper, batch, form: int) -> tuple[Any, ...]:
    """What FlashInfer's fast_decode_plan calls `_cached_module.plan` with."""
    num_qo_heads, num_kv_heads, head_dim, page_size = batch.shape
    size = len(batch.lengths)
    buffers = (wrapper._float_workspace_buffer, wrapper._int_workspace_buffer, wrapper._pin_memory_int_workspace_buffer)
    heads = (num_qo_heads, num_kv_heads, page_size, wrapper.is_cuda_graph_enabled)
    if form == 15:
        empty = torch.empty(0, dtype=torch.float16)
        return (*buffers, batch.indptr, size, *heads, -1, 0.0, head_dim, head_dim, empty, empty)
    table = (torch.arange(size + 1), batch.indptr, torch.tensor(batch.lengths))
    args = (*buffers, *table, size, size, *heads, head_dim, head_dim, False, -1, -1, False, 0, 0, True)
    return args[:form]


@pytest.mark.parametrize("form", [15, 16, 19, 20, 21])
def test_gpu_fast_plan(gpu, half_batch, make_batch, dense_decode, form, far):
    """FlashInfer's fast_decode_plan itself needs a CUDA device; this does what it does with the wrapper."""
    wrapper = planned(half_batch, use_tensor_cores=form != 15)
    later = make_batch([40, 1, 17], seed=1, dtype=torch.bfloat16)
    wrapper._paged_kv_indptr_buf, wrapper._paged_kv_indices_buf, wrapper._paged_kv_last_page_len_buf = later.table
    wrapper._plan_info = wrapper._cached_module.plan(*fast_plan_arguments(wrapper, later, form))
    assert list(wrapper._plan_info)[:2] == [132, 8]
    assert_decodes(wrapper.run(later.q, later.cache, return_lse=True), dense_decode(later), rtol=1e-2)
    assert wrapper.kernel_choice.kernel == "fi_prefetch"
    assert not gpu.flashinfers
    # Also once FlashInfer had to serve a run of this plan.
    wrapper.run(later.q, far(later))
    wrapper._plan_info = wrapper._cached_module.plan(*fast_plan_arguments(wrapper, later, form))
    assert_decodes(wrapper.run(later.q, later.cache, return_lse=True), dense_decode(later), rtol=1e-2)


def test_gpu_fast_plan_that_ours_cannot_serve(gpu, half_batch, make_batch):
    wrapper = planned(half_batch, use_tensor_cores=True)
    later = make_batch([40, 1, 17], seed=1, dtype=torch.bfloat16)
    wrapper._paged_kv_indptr_buf, wrapper._paged_kv_indices_buf, wrapper._paged_kv_last_page_len_buf = later.table
    args = list(fast_plan_arguments(wrapper, later, 20))
    args[16] = 1 << 20
    wrapper._plan_info = wrapper._cached_module.plan(*args)
    assert wrapper._decision.spec.fixed_split_size == 1 << 20 and wrapper.kernel_choice.kernel == "fi_prefetch"
    wrapper._float_workspace_buffer = workspace(16)
    wrapper._decisions.clear()
    wrapper._plan_info = wrapper._cached_module.plan(*args)
    assert wrapper._plan_info == ["their plan"] and wrapper._cached_module is gpu.their_module
    assert gpu.flashinfers[0][1]["fixed_split_size"] == 1 << 20
    assert wrapper.run(later.q, later.cache) == "their result"
    with pytest.raises(TypeError, match="got 3"):
        wrapper._module.plan(1, 2, 3)


@pytest.mark.parametrize("tensor_cores", [False, True])
@pytest.mark.parametrize("splits", [{}, {"fixed_split_size": 2}, {"disable_split_kv": True}])
def test_gpu_flashinfers_fast_decode_plan(gpu, half_batch, make_batch, dense_decode, monkeypatch, tensor_cores, splits):
    """It itself, as this release has it: how many arguments it plans with, and what it reads and leaves."""
    wrapper = planned(half_batch, use_tensor_cores=tensor_cores, **splits)
    monkeypatch.setattr(torch.cuda, "device", lambda where: contextlib.nullcontext())
    if HAS_0_7:  # on the CPU ours would lead it to the full plan
        monkeypatch.setattr(wrapper, "_auto_prefers_cudnn", lambda *args, **kwargs: False)
    later = make_batch([40, 1, 17], seed=1, dtype=torch.bfloat16)
    flashinfer.decode.fast_decode_plan(wrapper, *later.table, *later.shape, **later.dtypes, **splits)
    assert_decodes(wrapper.run(later.q, later.cache, return_lse=True), dense_decode(later), rtol=1e-2)
    assert wrapper.kernel_choice.kernel == "fi_prefetch" and not gpu.flashinfers
    assert wrapper._decision.module.variant.fixed_split == bool(splits)


@pytest.mark.parametrize("splits", [{"fixed_split_size": 2}, {"disable_split_kv": True}])
def test_gpu_fast_plan_without_tensor_cores_keeps_the_plans_splits(gpu, half_batch, make_batch, dense_decode, splits):
    """Its 15 arguments do not name them, and to drop them would be to drop what they were asked for."""
    wrapper = planned(half_batch, **splits)
    later = make_batch([40, 1, 17], seed=1, dtype=torch.bfloat16)
    wrapper._paged_kv_indptr_buf, wrapper._paged_kv_indices_buf, wrapper._paged_kv_last_page_len_buf = later.table
    wrapper._plan_info = wrapper._cached_module.plan(*fast_plan_arguments(wrapper, later, 15))
    assert_decodes(wrapper.run(later.q, later.cache, return_lse=True), dense_decode(later), rtol=1e-2)
    module = wrapper._decision.module
    assert module.variant.fixed_split and not gpu.flashinfers
    tokens = 32 if "fixed_split_size" in splits else dispatch.WHOLE_REQUEST
    assert module.calls[-2][0] == "fix_splits" and module.calls[-2][1][0] == tokens


@pytest.mark.parametrize(
    ("tensor_cores", "q_len", "asked", "full_plan"),
    [
        (False, 1, {}, False),
        (False, 1, {"fixed_split_size": None, "disable_split_kv": False}, False),
        (False, 1, {"fixed_split_size": 2}, True),
        (False, 1, {"fixed_split_size": -1}, True),
        (False, 1, {"disable_split_kv": True}, True),
        (False, 2, {}, True),
        (True, 1, {"fixed_split_size": 2, "disable_split_kv": True}, False),
        (True, 2, {}, False),
    ],
)
def test_gpu_fast_decode_plan_is_led_to_the_full_plan(gpu, half_batch, far, tensor_cores, q_len, asked, full_plan):
    """0.7's fast path, which asks first: it goes to the full plan where it has no place for what was asked for."""
    wrapper = planned(half_batch, use_tensor_cores=tensor_cores)
    wrapper.device = torch.device("cuda", 0)
    names = (torch.bfloat16,) * 3 + (64, 4, 2, 4, 16, "NONE", -1, 0.0, q_len)
    assert wrapper._auto_prefers_cudnn(*names, user_block_tables=False, **asked) is full_plan
    # Also once FlashInfer had to serve a run of this plan.
    wrapper.device = half_batch.q.device
    wrapper.run(half_batch.q, far(half_batch))
    wrapper.device = torch.device("cuda", 0)
    assert wrapper.kernel_choice.kernel == "flashinfer"
    assert wrapper._auto_prefers_cudnn(*names, user_block_tables=False, **asked) is full_plan


def test_gpu_scales_of_tokens_and_heads(gpu, half_batch):
    if not HAS_0_7_4:
        return  # test_what_the_release_does_not_know_is_refused
    wrapper = fi_prefetch.BatchDecodeWithPagedKVCacheWrapper(workspace())
    plan = {"q_data_type": torch.bfloat16, "kv_data_type": torch.float8_e4m3fn}
    wrapper.plan(*half_batch.table, *half_batch.shape, use_token_head_sf=True, **plan)
    assert wrapper.kernel_choice.kernel == "flashinfer" and "use_token_head_sf" in wrapper.kernel_choice.reason
    scales = (torch.ones(3, 16, 2), torch.ones(3, 16, 2))
    assert wrapper.run(half_batch.q, half_batch.cache, kv_cache_sf=scales) == "their result"
    assert gpu.flashinfers[0][1]["use_token_head_sf"] is True and gpu.flashinfers[1][1]["kv_cache_sf"] is scales
    wrapper.plan(*half_batch.table, *half_batch.shape, **plan)
    assert wrapper.kernel_choice.kernel == "fi_prefetch"
    # What FlashInfer plans next is without them.
    wrapper.plan(*half_batch.table, *half_batch.shape, q_len_per_req=9, **plan)
    assert "use_token_head_sf" not in gpu.flashinfers[-1][1]


def test_gpu_xqa_finds_its_counters_zero(gpu, half_batch, far):
    """FlashInfer 0.7.4 may choose XQA for its plan, which counts where our kernel leaves partial results."""
    wrapper = planned(half_batch, workspace_bytes=9 << 20)
    buffer = wrapper._float_workspace_buffer
    for chosen, zeroed in ((False, 0), (True, 8 << 20)):
        wrapper.run(half_batch.q, half_batch.cache)
        wrapper._use_xqa_mtp_decode = chosen  # as FlashInfer's plan leaves it
        buffer.fill_(1)
        assert wrapper.run(half_batch.q, far(half_batch)) == "their result"
        assert not buffer[:zeroed].any() and buffer[zeroed:].all()


def test_gpu_xqa_of_a_wrapper_that_ours_never_served_is_left_alone(gpu, half_batch):
    wrapper = planned(half_batch, workspace_bytes=9 << 20, pos_encoding_mode="ALIBI", logits_soft_cap=30.0)
    wrapper._use_xqa_mtp_decode = True
    wrapper._float_workspace_buffer.fill_(1)
    assert wrapper.run(half_batch.q, half_batch.cache) == "their result"
    assert wrapper._float_workspace_buffer.all()


@pytest.mark.parametrize("form", [19, 20, 21])
@pytest.mark.parametrize(("size", "whole"), [(2, False), (-1, True)])
def test_gpu_fast_plan_of_fixed_splits(gpu, half_batch, make_batch, dense_decode, form, size, whole):
    wrapper = planned(half_batch, use_tensor_cores=True)
    later = make_batch([40, 1, 17], seed=1, dtype=torch.bfloat16)
    # Longer than this batch needs: there must be room for all that the table could list.
    indices = torch.cat([later.indices, torch.zeros(20, dtype=torch.int32)])
    wrapper._paged_kv_indptr_buf, wrapper._paged_kv_indices_buf = later.indptr, indices
    wrapper._paged_kv_last_page_len_buf = later.last_page_len
    args = list(fast_plan_arguments(wrapper, later, form))
    args[16], args[17] = size, whole
    wrapper._plan_info = wrapper._cached_module.plan(*args)
    assert_decodes(wrapper.run(later.q, later.cache, return_lse=True), dense_decode(later), rtol=1e-2)
    module = wrapper._decision.module
    assert module.variant.fixed_split and not gpu.flashinfers
    assert module.calls[1] == ("fix_splits", (dispatch.WHOLE_REQUEST if whole else 32, 32, 16, 3, 2))
    # And back.
    wrapper._plan_info = wrapper._cached_module.plan(*fast_plan_arguments(wrapper, later, form))
    assert_decodes(wrapper.run(later.q, later.cache, return_lse=True), dense_decode(later), rtol=1e-2)
    assert not wrapper._decision.module.variant.fixed_split


def test_gpu_fast_plan_of_several_query_tokens(gpu, make_batch, dense_decode):
    """0.7's fast path refuses these without tensor cores, and the wrapper leads it to the full plan; 0.6's has none."""
    if not HAS_0_7:
        assert "q_len_per_req" not in inspect.signature(flashinfer.decode.fast_decode_plan).parameters
        return
    batch = make_batch([5, 16], q_len=2, dtype=torch.bfloat16)
    wrapper = planned(batch)
    later = make_batch([40, 3, 17], q_len=2, seed=1, dtype=torch.bfloat16)
    flashinfer.decode.fast_decode_plan(wrapper, *later.table, *later.shape, q_len_per_req=2, **later.dtypes)
    assert_decodes(wrapper.run(later.q, later.cache, return_lse=True), dense_decode(later), rtol=1e-2)
    assert not gpu.flashinfers


def test_gpu_prefetch_kv(gpu, half_batch, far):
    wrapper = planned(half_batch, prefetch="auto", window_left=9)
    assert fi_prefetch.prefetch_kv(wrapper, half_batch.cache) is True
    module = only(gpu.modules)
    name, args = module.calls[-1]
    assert name == "prefetch_kv" and len(args) == 13
    assert args[0] is wrapper._decision.plan_info and torch.equal(args[3], half_batch.indptr)
    assert args[6:12] == (0, 9, 1, 25 << 20, wrapper._decision.blocks, True)
    # The run that it is for says when it has begun.
    assert args[12] is wrapper._running and args[12].tolist() == [0]
    fi_prefetch.prefetch_kv(wrapper, half_batch.cache, budget=0.25)
    assert module.calls[-1][1][9] == (50 << 20) // 4
    assert module.calls[-1][1][12] is args[12], "a graph may have been captured with it"
    count = len(module.calls)
    assert fi_prefetch.prefetch_kv(wrapper, half_batch.cache, budget=0) is False
    assert fi_prefetch.prefetch_kv(wrapper, far(half_batch)) is False
    assert len(module.calls) == count


def test_gpu_prefetch_kv_comes_after_what_the_current_stream_holds(gpu, half_batch, monkeypatch):
    happened = []
    wrapper = planned(half_batch)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda where: "the current one")
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: happened.append("in it") or contextlib.nullcontext())
    monkeypatch.setattr(FakeModule, "prefetch_kv", lambda self, *args: happened.append("launch"))
    stream = SimpleNamespace(
        wait_stream=lambda other: happened.append(f"waits for {other}"), device=torch.device("cpu")
    )
    assert fi_prefetch.prefetch_kv(wrapper, half_batch.cache, stream=stream) is True
    assert happened == ["waits for the current one", "in it", "launch"]


def test_gpu_prefetch_kv_wants_a_stream_of_its_gpu(gpu, half_batch):
    """On another GPU's the prefetch would have gone to the current stream instead."""
    wrapper = planned(half_batch)
    stream = SimpleNamespace(device=torch.device("cuda", 1))
    with pytest.raises(ValueError, match="stream: expected one of cpu, got one of cuda:1"):
        fi_prefetch.prefetch_kv(wrapper, half_batch.cache, stream=stream)
    assert "prefetch_kv" not in only(gpu.modules).names()


def test_gpu_prefetch_kv_makes_no_tensor(gpu, half_batch):
    """Its first call may be captured: what a capture makes is zero only in that graph's replays."""
    wrapper = planned(half_batch)
    with Recorder() as recorder:
        assert fi_prefetch.prefetch_kv(wrapper, half_batch.cache) is True
    assert not [op for op in recorder.ops if "zero" in op or "empty" in op or "new" in op]
    assert only(gpu.modules).calls[-1][1][12].tolist() == [0]


def test_gpu_empty_batch_launches_nothing(gpu):
    wrapper = fi_prefetch.BatchDecodeWithPagedKVCacheWrapper(workspace())
    nothing = torch.zeros(0, dtype=torch.int32)
    wrapper.plan(torch.zeros(1, dtype=torch.int32), nothing, nothing, 4, 2, 64, 16, q_data_type="float16")
    out = wrapper.run(torch.zeros(0, 4, 64).half(), torch.zeros(3, 2, 16, 2, 64).half())
    assert out.shape == (0, 4, 64)
    assert only(gpu.modules).names() == ["plan"]


def test_gpu_plan_that_fails_leaves_the_one_before(gpu, half_batch, make_batch, monkeypatch):
    wrapper = planned(half_batch)
    before = wrapper.run(half_batch.q, half_batch.cache)
    later = make_batch([40, 1, 17], dtype=torch.bfloat16)

    def out_of_memory(*args):
        raise torch.OutOfMemoryError("no room for the page table")

    monkeypatch.setattr(wrapper, "_set_page_table", out_of_memory)
    with pytest.raises(torch.OutOfMemoryError):
        wrapper.plan(*later.table, *later.shape, **later.dtypes)
    assert torch.equal(wrapper.run(half_batch.q, half_batch.cache), before)


class NoRoom(torch.Tensor):
    """A tensor on another device, whose copy to the wrapper's finds no memory there."""

    device = torch.device("cpu", 1)

    def to(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        raise torch.OutOfMemoryError("no memory")


@pytest.mark.parametrize("place", [0, 1, 2])
def test_out_of_memory_while_planning_leaves_the_plan_before(batch, make_batch, dense_decode, place):
    wrapper = planned(batch)
    other = list(make_batch([17, 2, 1, 9], seed=1).table)
    other[place] = other[place].as_subclass(NoRoom)
    with pytest.raises(torch.OutOfMemoryError):
        wrapper.plan(*other, *batch.shape, **batch.dtypes)
    assert_decodes(wrapper.run(batch.q, batch.cache, return_lse=True), dense_decode(batch))


def test_gpu_check_contents_is_asked_for(gpu, half_batch, monkeypatch):
    """FI_PREFETCH_CHECK decides on a GPU; on the CPU, where nothing waits, the check is always on."""
    half_batch.indices[0] = 1000
    wrapper = planned(half_batch)
    with pytest.raises(ValueError, match="got 1000 at position 0"):
        wrapper.run(half_batch.q, half_batch.cache)
    assert not any(name == "run" for name in only(gpu.modules).names())
    assert "FI_PREFETCH_CHECK" not in os.environ
    # While a graph is captured nothing can be read.
    monkeypatch.setattr(checks, "page_table", None)
    monkeypatch.setattr(FakeModule, "run", lambda self, *args: self.calls.append(("run", ())))
    monkeypatch.setattr(wrapper, "_is_capturing", lambda: True)
    wrapper.run(half_batch.q, half_batch.cache)
    assert only(gpu.modules).names()[-1] == "run"


def test_decisions_are_made_on_the_wrappers_device(gpu, half_batch, monkeypatch):
    used = []
    original = decision.on_device
    monkeypatch.setattr(decision, "on_device", lambda where: used.append(where) or original(where))
    planned(half_batch)
    assert used == [torch.device("cpu")]
