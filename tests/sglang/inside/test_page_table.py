"""The decode page table as SGLang's own code fills it for our wrapper, and what is left out on the way."""

from __future__ import annotations

import contextlib
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from gpu_path_plugin import CpuForCuda
from sglang.srt.layers.attention import flashinfer_backend
from sglang.srt.layers.attention.flashinfer_backend import FlashInferIndicesUpdaterDecode

from fi_prefetch.sglang import page_table
from fi_prefetch.sglang.cuda_backend import FiPrefetchAttnBackend, _DecodePageTable, _Queries
from fi_prefetch.sglang.decode_wrapper import ServedDecodeWrapper

LENGTHS = torch.tensor([3, 1, 7])
ROWS = torch.tensor([2, 0, 4])
TABLE_WIDTH = 16
WORKSPACE = torch.empty(1024, dtype=torch.uint8)


class Untouchable:
    """Host lengths that may be passed on, and that nobody may compute with."""

    def __getattr__(self, name: str) -> Any:
        raise AssertionError(f"{name} of the lengths on the host was used")


class WindowPool:
    """A pool whose slots are those of the full pool plus 100."""

    @staticmethod
    def translate_loc_from_full_to_swa(slots: torch.Tensor) -> torch.Tensor:
        return slots + 100


def updater(
    kind: type[FlashInferIndicesUpdaterDecode], window_pool: Any = None, split_tile_size: int | None = None
) -> FlashInferIndicesUpdaterDecode:
    """SGLang's updater, without the model runner it is normally made from; deterministic with a `split_tile_size`."""
    made = object.__new__(kind)
    made.num_qo_heads, made.num_kv_heads, made.head_dim = 6, 2, 64
    made.data_type = made.q_data_type = torch.float32
    made.kv_last_page_len = torch.ones(8, dtype=torch.int32)
    req_to_token = torch.arange(6 * TABLE_WIDTH, dtype=torch.int32).view(6, TABLE_WIDTH)
    made._swa_kv_pool = window_pool
    made.attn_backend = SimpleNamespace(
        req_to_token_pool=SimpleNamespace(req_to_token=req_to_token),
        kv_index_translator=translator(req_to_token),
        enable_deterministic=split_tile_size is not None,
        decode_split_tile_size=split_tile_size,
    )
    if made.attn_backend.kv_index_translator is None:
        made.req_to_token = req_to_token  # 0.5.16's updater has it itself
    return made


def translator(req_to_token: torch.Tensor) -> Any:
    """SGLang 0.5.23's reader of `req_to_token`, with an ordinary pool behind it; 0.5.16 has none."""
    try:
        from sglang.srt.mem_cache.kv_index_translator import KVIndexTranslator
    except ImportError:
        return None
    made = object.__new__(KVIndexTranslator)
    made.req_to_token = req_to_token
    made._spaces = {}
    return made


def graph_wrapper(batch_size: int = 3) -> ServedDecodeWrapper:
    wrapper = ServedDecodeWrapper(
        WORKSPACE,
        use_cuda_graph=True,
        paged_kv_indptr_buffer=torch.zeros(batch_size + 1, dtype=torch.int32),
        paged_kv_indices_buffer=torch.zeros(64, dtype=torch.int32),
        paged_kv_last_page_len_buffer=torch.ones(batch_size, dtype=torch.int32),
    )
    table = (wrapper._paged_kv_indptr_buf, wrapper._paged_kv_indices_buf, wrapper._paged_kv_last_page_len_buf)
    wrapper._paged_kv_indptr_buf.copy_(torch.arange(batch_size + 1))
    wrapper.plan(*table, 6, 2, 64, 1, q_data_type=torch.float32)
    return wrapper


def fill(its_updater: Any, wrapper: Any, lengths_cpu: Any, **more: Any) -> None:
    """One decode step's update, with SGLang's arguments."""
    arguments = {
        "paged_kernel_lens": LENGTHS,
        "paged_kernel_lens_sum": int(LENGTHS.sum()),
        "kv_indptr": wrapper._paged_kv_indptr_buf,
        "kv_start_idx": None,
        "spec_info": None,
        "seq_lens_cpu": lengths_cpu,
        "req_pool_indices": ROWS,
    } | more
    if its_updater.attn_backend.kv_index_translator is not None:
        arguments["plan"] = None
    with CpuForCuda():
        its_updater.call_begin_forward(wrapper, **arguments)


def expected(offset: int = 0) -> list[int]:
    rows = zip(ROWS.tolist(), LENGTHS.tolist(), strict=True)
    return [row * TABLE_WIDTH + token + offset for row, length in rows for token in range(length)]


def slots(wrapper: ServedDecodeWrapper) -> list[int]:
    return wrapper._paged_kv_indices_buf[: int(LENGTHS.sum())].tolist()


def test_replay_fills_the_graphs_buffers_and_plans_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    wrapper = graph_wrapper()

    def planned(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("planned for a replay")

    monkeypatch.setattr(ServedDecodeWrapper, "plan", planned)
    # What SGLang does after a capture.
    wrapper.begin_forward = planned
    fill(updater(_DecodePageTable), wrapper, Untouchable())
    assert wrapper._paged_kv_indptr_buf.tolist() == [0, 3, 4, 11]
    assert slots(wrapper) == expected()


def test_sglangs_own_update_uses_the_lengths_on_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the override leaves out: without it the same call computes on the host."""
    # Where SGLang leaves its sum when it is interrupted.
    monkeypatch.setattr(flashinfer_backend, "global_override_indptr_cpu", None)
    with pytest.raises(TypeError, match="Untouchable"):
        fill(updater(FlashInferIndicesUpdaterDecode), graph_wrapper(), Untouchable())


@pytest.mark.parametrize("starts", [None, [5, 0, 40]])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_table_is_sglangs(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, starts: list[int] | None) -> None:
    """Also where a request has several blocks of tokens, a program several blocks, and the sum several parts."""
    monkeypatch.setattr(page_table, "_TOKENS", 8)
    monkeypatch.setattr(page_table, "_LENGTHS", 2)
    monkeypatch.setattr(page_table, "_PROGRAMS", 12)
    table = torch.randperm(7 * 100, dtype=torch.int32).view(7, 100)
    rows = torch.tensor([6, 0, 3, 2, 5])
    lengths = torch.tensor([1, 90, 0, 17, 8] if starts is None else [1, 90, 17], dtype=dtype)
    rows = rows[: lengths.numel()]
    first = None if starts is None else torch.tensor(starts, dtype=dtype)
    indptr = torch.zeros(lengths.numel() + 2, dtype=torch.int32)
    indices = torch.full((200,), -1, dtype=torch.int32)
    page_table.fill(table, rows, lengths, first, indptr, indices)
    expected_slots = [
        slot
        for row, length, start in zip(rows.tolist(), lengths.tolist(), starts or [0] * len(rows), strict=True)
        for slot in table[row, start : start + length].tolist()
    ]
    assert indptr.tolist() == [0, *lengths.cumsum(0).tolist(), 0]
    assert indices.tolist() == expected_slots + [-1] * (200 - len(expected_slots))


def test_queries_are_read_where_the_projection_put_them() -> None:
    """And copied only where a row of theirs is not dense."""
    rows = torch.randn(3, 6 * 64 + 2 * 2 * 64)
    q = rows[:, : 6 * 64]
    given = _Queries(q).contiguous()
    assert given.data_ptr() == q.data_ptr() and given.view(-1, 6, 64).stride() == (rows.shape[1], 64, 1)
    scattered = torch.randn(6 * 64, 3).T
    assert _Queries(scattered).contiguous().is_contiguous()


def test_answers_follow_a_replays_page_table() -> None:
    wrapper = graph_wrapper()
    fill(updater(_DecodePageTable), wrapper, LENGTHS)
    generator = torch.Generator().manual_seed(0)
    k, v = (torch.randn(6 * TABLE_WIDTH, 2, 64, generator=generator) for _ in range(2))
    q = torch.randn(3, 6, 64, generator=generator)
    answer = wrapper.forward(q, (k, v), sm_scale=0.125)
    for request, (row, length) in enumerate(zip(ROWS.tolist(), LENGTHS.tolist(), strict=True)):
        tokens = slice(row * TABLE_WIDTH, row * TABLE_WIDTH + length)
        keys, values = (x[tokens].repeat_interleave(3, dim=1).transpose(0, 1) for x in (k, v))
        truth = torch.nn.functional.scaled_dot_product_attention(q[request][:, None], keys, values, scale=0.125)
        torch.testing.assert_close(answer[request], truth[:, 0], atol=1e-5, rtol=1e-5)


def test_step_without_a_graph_plans_for_its_own_table() -> None:
    wrapper = ServedDecodeWrapper(WORKSPACE)
    its_updater = updater(_DecodePageTable)
    fill(its_updater, wrapper, Untouchable(), kv_indptr=torch.zeros(9, dtype=torch.int32))
    assert wrapper._paged_kv_indptr_buf.tolist() == [0, 3, 4, 11]
    assert slots(wrapper) == expected()
    assert wrapper.kernel_choice.kernel == "reference"


# What SGLang asks for in deterministic inference, outside and inside of CUDA graphs.
ASKED_EAGER = {"fixed_split_size": 4, "disable_split_kv": False}
ASKED_IN_GRAPHS = {"fixed_split_size": None, "disable_split_kv": True}


@pytest.mark.parametrize("asked", [ASKED_EAGER, ASKED_IN_GRAPHS], ids=["eager", "as in graphs"])
@pytest.mark.parametrize("graph", [False, True])
def test_deterministic_steps_are_cut_at_the_same_places(
    monkeypatch: pytest.MonkeyPatch, asked: dict[str, Any], graph: bool
) -> None:
    wrapper = graph_wrapper() if graph else ServedDecodeWrapper(WORKSPACE)
    planned: list[dict[str, Any]] = []
    monkeypatch.setattr(
        ServedDecodeWrapper, "begin_forward", property(lambda self: lambda *args, **kwargs: planned.append(kwargs))
    )
    table = {} if graph else {"kv_indptr": torch.zeros(9, dtype=torch.int32)}
    fill(updater(_DecodePageTable, split_tile_size=4), wrapper, LENGTHS, **table, **asked)
    fill(updater(_DecodePageTable), wrapper, LENGTHS, **table, **asked)
    deterministic, other = ({name: plan[name] for name in asked} for plan in planned)
    assert deterministic == ASKED_EAGER
    assert other == asked, "nothing is changed where inference need not be deterministic"


def test_deterministic_graphs_are_planned_with_the_splits_of_steps_without() -> None:
    """By the plan that a wrapper of a graph keeps: the one at its capture."""
    its_updater = updater(_DecodePageTable, split_tile_size=4)
    wrapper = ServedDecodeWrapper(
        WORKSPACE,
        use_cuda_graph=True,
        paged_kv_indptr_buffer=torch.zeros(4, dtype=torch.int32),
        paged_kv_indices_buffer=torch.zeros(64, dtype=torch.int32),
        paged_kv_last_page_len_buffer=torch.ones(3, dtype=torch.int32),
    )
    for _ in range(2):  # the second one is a replay's
        fill(its_updater, wrapper, LENGTHS, **ASKED_IN_GRAPHS)
        spec = wrapper._decision.spec
        assert (spec.fixed_split_size, spec.disable_split_kv, spec.split_tokens) == (4, False, 4)
        assert slots(wrapper) == expected()


@pytest.mark.parametrize("lengths_on_host", [True, False])
def test_window_pools_slots_are_translated(lengths_on_host: bool) -> None:
    lengths = LENGTHS if lengths_on_host else None
    ours, sglangs = graph_wrapper(), graph_wrapper()
    fill(updater(_DecodePageTable, WindowPool), ours, lengths, use_sliding_window_kv_pool=True)
    fill(updater(FlashInferIndicesUpdaterDecode, WindowPool), sglangs, LENGTHS, use_sliding_window_kv_pool=True)
    assert slots(ours) == slots(sglangs) == expected(100)


def test_steps_without_requests_are_planned() -> None:
    """As an idle rank of data-parallel attention has them, without a graph."""
    wrapper = ServedDecodeWrapper(WORKSPACE)
    nobody = torch.empty(0, dtype=torch.int64)
    lengths = {"paged_kernel_lens": nobody, "paged_kernel_lens_sum": 0, "req_pool_indices": nobody}
    fill(updater(_DecodePageTable), wrapper, nobody, kv_indptr=torch.zeros(9, dtype=torch.int32), **lengths)
    assert wrapper.kernel_choice.kernel == "reference"
    cache = torch.zeros(4, 2, 64)
    assert wrapper.forward(torch.empty(0, 6, 64), (cache, cache), sm_scale=0.125).shape == (0, 6, 64)


@pytest.mark.parametrize("graph", [False, True])
def test_rows_beyond_the_requests_are_left_out(graph: bool) -> None:
    """Two-batch overlap pads the tokens of a half of the batch, and not its requests."""
    wrapper = graph_wrapper() if graph else ServedDecodeWrapper(WORKSPACE)
    table = {} if graph else {"kv_indptr": torch.zeros(9, dtype=torch.int32)}
    fill(updater(_DecodePageTable), wrapper, LENGTHS, **table)
    k, v = (torch.randn(6 * TABLE_WIDTH, 2, 64) for _ in range(2))
    q = torch.randn(4, 6, 64)
    answer = wrapper.forward(q, (k, v), sm_scale=0.125)
    torch.testing.assert_close(answer[:3], wrapper.forward(q[:3], (k, v), sm_scale=0.125))
    assert not answer[3:].any()


@pytest.mark.parametrize("rows", [3, 4])
def test_compiled_layers_keep_a_scale_and_a_cap_of_their_own(rows: int) -> None:
    """--enable-torch-compile: what a compiled layer writes to the wrapper is there only when the code has ended."""
    wrapper = graph_wrapper()
    fill(updater(_DecodePageTable), wrapper, LENGTHS)
    k, v = (torch.randn(6 * TABLE_WIDTH, 2, 64) for _ in range(2))

    def step(q: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        first = wrapper.forward(q, (k, v), sm_scale=0.5, logits_soft_cap=0.0, k_scale=2.0)
        return first, wrapper.forward(q, (k, v), sm_scale=0.125, logits_soft_cap=2.0, v_scale=0.5)

    q = torch.randn(rows, 6, 64)
    expected_answers = step(q)
    compiled = torch.compile(step, backend="aot_eager", fullgraph=True)
    for _ in range(2):
        torch.testing.assert_close(compiled(q), expected_answers)


def test_table_in_other_buffers_is_planned_for() -> None:
    wrapper = graph_wrapper()
    indptr = torch.tensor([0, 2, 3, 4], dtype=torch.int32)
    indices = torch.tensor([5, 6, 7, 8], dtype=torch.int32)
    wrapper.begin_forward(indptr, indices, torch.ones(3, dtype=torch.int32), 6, 2, 64, 1, q_data_type=torch.float32)
    assert wrapper._paged_kv_indptr_buf.tolist() == indptr.tolist()
    assert wrapper._paged_kv_indices_buf[:4].tolist() == indices.tolist()


def test_graph_wrapper_that_flashinfer_serves_is_planned_each_time(monkeypatch: pytest.MonkeyPatch) -> None:
    wrapper = graph_wrapper()
    monkeypatch.setattr(
        ServedDecodeWrapper, "kernel_choice", property(lambda self: SimpleNamespace(kernel="flashinfer"))
    )
    assert wrapper.begin_forward == wrapper.plan


def backend_for_graphs() -> FiPrefetchAttnBackend:
    backend = object.__new__(FiPrefetchAttnBackend)
    backend._serves = True
    backend._graph_wrappers = {}
    backend.num_wrappers = 1
    backend.workspace_buffer = WORKSPACE
    backend.decode_use_tensor_cores = True
    backend._promise = SimpleNamespace(ready="page_table")
    backend._layers = []
    backend.enable_deterministic = False
    backend._requests_share_slots = True
    backend.kv_indptr = [torch.zeros(9, dtype=torch.int32)]
    backend.kv_last_page_len = torch.ones(8, dtype=torch.int32)
    backend.cuda_graph_kv_indices = [torch.zeros(8 * TABLE_WIDTH, dtype=torch.int32)]
    backend.req_to_token_pool = SimpleNamespace(req_to_token=torch.zeros(6, TABLE_WIDTH, dtype=torch.int32))
    return backend


def test_second_capture_of_a_batch_size_keeps_the_first_ones_wrapper() -> None:
    backend = backend_for_graphs()
    first = backend._create_decode_wrappers(4, 4)
    assert backend._create_decode_wrappers(4, 4) is first
    assert backend._create_decode_wrappers(2, 2) is not first


def test_a_graphs_table_is_as_long_as_its_requests_can_make_it() -> None:
    """Splits of a fixed size need workspace for as many as a table can list."""
    backend = backend_for_graphs()
    for batch_size in (1, 4, 8):
        (wrapper,) = backend._create_decode_wrappers(batch_size, batch_size)
        assert wrapper._paged_kv_indices_buf.shape[0] == batch_size * TABLE_WIDTH
        assert wrapper._paged_kv_indices_buf.data_ptr() == backend.cuda_graph_kv_indices[0].data_ptr()


@pytest.mark.parametrize("shared", [False, True])
def test_a_deterministic_graphs_table_is_no_longer_than_the_pool(shared: bool) -> None:
    """No two requests share a slot there, but for those that fill a batch up; with a radix cache they do."""
    backend = backend_for_graphs()
    backend.enable_deterministic = True
    backend._requests_share_slots = shared
    backend._layers = [SimpleNamespace(layer_id=number, logit_cap=0.0) for number in range(2)]
    backend._get_wrapper_idx = lambda layer: 0
    backend.token_to_kv_pool = SimpleNamespace(
        get_kv_buffer=lambda number: (torch.zeros(40 + number, 1), torch.zeros(40 + number, 1))
    )
    for batch_size, slots in ((1, TABLE_WIDTH), (2, 2 * TABLE_WIDTH), (4, 41 + 4), (8, 41 + 8)):
        (wrapper,) = backend._create_decode_wrappers(batch_size, batch_size)
        assert wrapper._paged_kv_indices_buf.shape[0] == (batch_size * TABLE_WIDTH if shared else slots)


@pytest.mark.parametrize(
    ("deterministic", "kernel"), [(True, "flashinfer"), (True, "reference"), (False, "flashinfer")]
)
def test_a_deterministic_graph_that_flashinfer_would_serve_is_refused(deterministic: bool, kernel: str) -> None:
    backend = backend_for_graphs()
    backend.enable_deterministic = deterministic
    backend._graph_wrappers[4] = [
        SimpleNamespace(kernel_choice=SimpleNamespace(kernel=kernel, reason="the float workspace holds 8192 bytes"))
    ]
    refused = deterministic and kernel == "flashinfer"
    with (
        pytest.raises(RuntimeError, match="graph of 4 requests .* holds 8192") if refused else contextlib.nullcontext()
    ):
        backend._check_graph(4)


@pytest.mark.parametrize("ready", ["page_table", "plan"])
def test_layers_with_a_cap_are_planned_with_it(ready: str) -> None:
    """So no plan is for a kernel that does not run, and none is adopted anew in a layer's call."""
    backend = backend_for_graphs()
    backend._promise = SimpleNamespace(ready=ready)
    backend._layers = [SimpleNamespace(logit_cap=50.0)] * 2
    (wrapper,) = backend._create_decode_wrappers(3, 3)
    fill(updater(_DecodePageTable), wrapper, LENGTHS)
    planned = wrapper._decision
    assert planned.spec.logits_soft_cap == 50.0
    cache = torch.zeros(6 * TABLE_WIDTH, 1, 2, 64)
    wrapper.forward(torch.zeros(3, 6, 64), (cache, cache), sm_scale=0.125, logits_soft_cap=50.0)
    assert wrapper._decision is planned
    backend._layers = [SimpleNamespace(logit_cap=50.0), SimpleNamespace(logit_cap=None)]
    assert backend._wrapper()._layers_soft_cap == 0.0, "each call's own, where they differ"
