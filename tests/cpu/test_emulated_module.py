"""From the wrapper's Python down to the kernel, on the CPU: csrc/decode.cu with its checks, exported through tvm-ffi,
launches into the emulator, under the wrapper as a GPU's user has it."""

import concurrent.futures
import ctypes
import dataclasses
import functools
import math
import shutil
import tempfile
import time

import emulated_decode as emulated
import pytest
import torch
import tvm_ffi
from batches import make_batch
from emulator import build as emulator
from emulator import module as emulated_module

import fi_prefetch
from fi_prefetch import decision, device, jit, reference, tune

BF16, F16, E4M3, E5M2 = torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.float8_e5m2
GPU = device.GpuFacts("emulated", "emulated", (9, 0), 5, 50 << 20, None, False)
load = functools.cache(emulated_module.load)


@pytest.fixture(autouse=True)
def gpu(monkeypatch):
    """The CPU passes for a GPU that has our kernel and programmatic dependent launch."""
    monkeypatch.setattr(device, "facts", lambda where: GPU)
    monkeypatch.setattr(jit, "load", load)
    monkeypatch.setattr("fi_prefetch.decode.device_support_pdl", lambda where: True)


def workspace(num_bytes=1 << 22):
    return torch.zeros(num_bytes, dtype=torch.uint8)


def assert_wrapper_is_right(
    batch, kv_layout="NHD", wrapper=None, plan=None, run=None, ready="nothing", prefetch=None, cache=None
):
    plan, run = plan or {}, run or {}
    cache = batch.cache if cache is None else cache
    wrapper = wrapper or fi_prefetch.BatchDecodeWithPagedKVCacheWrapper(
        workspace(), kv_layout, ready=ready, prefetch=prefetch
    )
    wrapper.plan(*batch.table, *batch.shape, **batch.dtypes, **plan)
    assert wrapper.kernel_choice.kernel == "fi_prefetch", wrapper.kernel_choice
    o, lse = wrapper.run(batch.q, cache, return_lse=True, **run)
    k, v = batch.cache[:, 0], batch.cache[:, 1]
    scale = plan.get("sm_scale") or batch.shape[2] ** -0.5
    expected, expected_lse = reference.batch_decode(
        batch.q, k, v, *batch.table, kv_layout=kv_layout,
        sm_scale=scale * run.get("k_scale", 1.0) * run.get("q_scale", 1.0), v_scale=run.get("v_scale", 1.0),
        window_left=plan.get("window_left", -1), logits_soft_cap=plan.get("logits_soft_cap", 0.0),
        q_len_per_req=plan.get("q_len_per_req", 1), sinks=run.get("sinks"), out_dtype=torch.float32,
        **{name: plan[name] for name in ("pos_encoding_mode", "rope_scale", "rope_theta") if name in plan},
    )  # fmt: skip
    assert o.dtype == plan.get("o_data_type", batch.q.dtype)
    torch.testing.assert_close(o.float(), expected, rtol=2e-2, atol=2e-2)
    torch.testing.assert_close(lse, expected_lse.float(), rtol=1e-3, atol=2e-3)
    return wrapper


@pytest.mark.parametrize("kv_layout", ["NHD", "HND"])
@pytest.mark.parametrize("page_size", [1, 5, 16])
def test_layouts(kv_layout, page_size):
    assert_wrapper_is_right(
        make_batch([40, 1, 0, 130], dtype=BF16, kv_layout=kv_layout, page_size=page_size), kv_layout
    )


@pytest.mark.parametrize(
    "dtype, kv_dtype, head_dim", [(F16, F16, 128), (BF16, E4M3, 128), (F16, E5M2, 64), (BF16, BF16, 256)]
)
def test_dtypes(dtype, kv_dtype, head_dim):
    assert_wrapper_is_right(
        make_batch([40, 77], dtype=dtype, kv_dtype=kv_dtype, head_dim=head_dim), run={"k_scale": 0.5, "v_scale": 2.0}
    )


@pytest.mark.parametrize(
    "plan, run",
    [
        ({"window_left": 20}, {}),
        ({"logits_soft_cap": 3.0}, {}),
        ({"sm_scale": 0.3}, {"sinks": torch.tensor([0.0, 1.0, 2.0, -1.0])}),
        ({"o_data_type": F16}, {"enable_pdl": False}),
        ({"pos_encoding_mode": "ROPE_LLAMA"}, {}),
        ({"pos_encoding_mode": "ROPE_LLAMA", "rope_scale": 4.0, "rope_theta": 5e5, "window_left": 50}, {}),
        ({"pos_encoding_mode": "ALIBI"}, {"k_scale": 0.5}),
    ],
    ids=["window", "soft cap", "sinks", "output type", "rope", "rope and window", "alibi"],
)
def test_features(plan, run):
    assert_wrapper_is_right(make_batch([40, 1, 130], dtype=BF16), plan=plan, run=run)


@pytest.mark.parametrize("group, q_len", [(8, 2), (2, 8), (16, 1), (3, 4)])
def test_several_query_tokens(group, q_len):
    batch = make_batch([40, 9, 130], dtype=BF16, num_qo_heads=2 * group, num_kv_heads=2, q_len=q_len)
    assert_wrapper_is_right(batch, plan={"q_len_per_req": q_len})


@pytest.mark.parametrize("ready", ["nothing", "page_table", "all_but_last_token", "plan"])
def test_promises(ready):
    for early_load in ("auto", False, True):
        policy = fi_prefetch.PrefetchPolicy(early_load=early_load)
        wrapper = assert_wrapper_is_right(make_batch([40, 1, 130], dtype=BF16), ready=ready, prefetch=policy)
        assert wrapper.prefetch_plan.early_load == (early_load is True and ready in ("all_but_last_token", "plan"))


def test_one_wrapper_over_many_plans():
    wrapper = fi_prefetch.BatchDecodeWithPagedKVCacheWrapper(workspace())
    for seed, lengths in enumerate([[40, 1], [0, 300, 2, 16], [5], [700]]):
        assert_wrapper_is_right(make_batch(lengths, dtype=BF16, seed=seed), wrapper=wrapper)
        assert not any(counters.any() for counters in wrapper._counters)


def test_wrappers_take_turns_on_one_workspace():
    """Partial results of one, also of the batch-invariant kernel, are what the next one finds there."""
    memory = workspace()
    memory.fill_(0xFF)  # NaN
    wrappers = [fi_prefetch.BatchDecodeWithPagedKVCacheWrapper(memory) for _ in range(3)]
    batches = [
        make_batch([300, 1, 90], dtype=BF16, seed=1),
        make_batch([40, 500], dtype=BF16, kv_dtype=E4M3, head_dim=128, seed=2),
        make_batch([257, 33], dtype=BF16, head_dim=128, seed=3),
    ]
    for turn in range(2):
        for wrapper, batch in zip(wrappers, batches, strict=True):
            plan = {"fixed_split_size": 2} if wrapper is wrappers[2] else {}
            assert_wrapper_is_right(batch, wrapper=wrapper, plan=plan)
            assert not any(counters.any() for other in wrappers for counters in other._counters), turn


def test_strides_of_k_and_v_may_differ_and_q_may_be_a_slice():
    batch = make_batch([40, 9, 130], dtype=BF16)
    k, v = batch.cache[:, 0], batch.cache[:, 1].contiguous()
    wide = torch.randn(batch.q.shape[0], 3, *batch.q.shape[1:]).to(BF16)
    wide[:, 1] = batch.q
    batch.q = wide[:, 1]
    assert k.stride() != v.stride()
    assert_wrapper_is_right(batch, cache=(k, v))


def test_a_graphs_buffers_may_change_without_a_new_plan():
    """What a captured graph replays: the same run, after new lengths and pages were written into the buffers."""
    first, second = make_batch([40, 9, 130], dtype=BF16, seed=1), make_batch([3, 200, 0], dtype=BF16, seed=2)
    buffers = [torch.zeros(n, dtype=torch.int32) for n in (4, 64, 3)]
    wrapper = fi_prefetch.CUDAGraphBatchDecodeWithPagedKVCacheWrapper(workspace(), *buffers)
    wrapper.plan(*first.table, *first.shape, **first.dtypes)
    for batch in (first, second):
        for buffer, values in zip(buffers, batch.table, strict=True):
            buffer[: len(values)] = values
        expected, _ = reference.batch_decode(
            batch.q,
            batch.cache[:, 0],
            batch.cache[:, 1],
            *batch.table,
            sm_scale=batch.shape[2] ** -0.5,
            out_dtype=torch.float32,
        )
        torch.testing.assert_close(wrapper.run(batch.q, batch.cache).float(), expected, rtol=2e-2, atol=2e-2)


def test_window_op_launches_and_keeps_to_its_budget():
    batch = make_batch([400, 9], dtype=BF16)
    wrapper = assert_wrapper_is_right(batch)
    path = str(emulated_module.compiled(wrapper._decision.spec.variant()))
    library = emulator.ctypes.CDLL(path)  # the one that the wrapper called
    tile_of_every_warp = wrapper.prefetch_plan.facts.blocks * wrapper.prefetch_plan.facts.warps * 2 * 16 * 64 * 2
    for budget in (tile_of_every_warp - 1, tile_of_every_warp, 1 << 24):
        before = library.emulator_launches()
        assert fi_prefetch.prefetch_kv(wrapper, batch.cache, budget=budget)
        if budget < tile_of_every_warp:
            assert library.emulator_launches() == before, "there is no tile to spare for every warp"
        else:
            assert library.emulator_launches() == before + 1
            asked = int(emulator.prefetches(library)["bytes"].sum())
            assert 0 < asked <= budget


LARGE = 64 << 20  # bytes of KV, from which on small tiles are copied whole, and those of planned work


@pytest.mark.parametrize(
    ("tensor_copies", "table_bytes", "ready", "options"),
    [
        (True, 0, "nothing", {"page_size": 16}),
        (True, 0, "nothing", {"page_size": 48, "kv_layout": "HND"}),
        (False, LARGE, "nothing", {"page_size": 8}),
        (False, LARGE, "nothing", {"page_size": 24}),
        (False, 0, "plan", {"page_size": 16}),
        (False, LARGE - 1, "plan", {"page_size": 16}),
        (True, LARGE, "plan", {"page_size": 16}),
        (False, LARGE - 1, "nothing", {"page_size": 16, "kv_dtype": E4M3}),
        (True, LARGE, "nothing", {"page_size": 16, "kv_dtype": E4M3}),
        (True, LARGE, "plan", {"page_size": 16, "kv_dtype": E4M3}),
        (False, LARGE - 1, "nothing", {"page_size": 16, "head_dim": 64}),
        (True, LARGE, "nothing", {"page_size": 16, "head_dim": 64}),
        (False, LARGE, "nothing", {"page_size": 16, "num_qo_heads": 18}),
    ],
)
def test_tiles_are_copied_whole_where_that_is_faster(tensor_copies, table_bytes, ready, options):
    options = {"head_dim": 128, "num_kv_heads": 2, "num_qo_heads": 8, "kv_layout": "NHD", **options}
    batch = make_batch([40, 1, 0, 130], dtype=BF16, **options)
    # Pages that the table lists beyond its last request's: as many as make it name so much KV.
    listed = table_bytes // (batch.cache[0].numel() * batch.cache.element_size())
    unused = batch.indices.new_zeros(max(listed - len(batch.indices), 0))
    batch.indices = torch.cat([batch.indices, unused])
    wrapper = assert_wrapper_is_right(batch, options["kv_layout"], ready=ready)
    path = str(emulated_module.compiled(wrapper._decision.spec.variant()))
    counts = emulator.statistics(ctypes.CDLL(path))
    assert (counts["copies"] > 0, counts["tensor_copies"] > 0) == (not tensor_copies, tensor_copies)


@pytest.mark.parametrize("missing", ["compute capability 9.0", "the driver's function", "strides it can describe"])
def test_tiles_are_copied_row_by_row_where_they_cannot_be_whole(missing, monkeypatch):
    batch = make_batch([40, 1, 130], dtype=BF16, page_size=16, head_dim=128, num_kv_heads=2)
    wrapper = fi_prefetch.BatchDecodeWithPagedKVCacheWrapper(workspace())
    wrapper.plan(*batch.table, *batch.shape, **batch.dtypes)
    # A copy of the library is a module that has not looked for the driver's function yet.
    variant = wrapper._decision.spec.variant()
    with tempfile.TemporaryDirectory() as folder:
        path = shutil.copy(emulated_module.compiled(variant), folder)
        library = ctypes.CDLL(path)
        {
            "compute capability 9.0": lambda: library.emulator_set_compute_capability(ctypes.c_int64(8)),
            "the driver's function": lambda: library.emulator_set_driver(ctypes.c_int64(0)),
            "strides it can describe": lambda: library.emulator_set_driver(ctypes.c_int64(2)),
        }[missing]()
        monkeypatch.setattr(jit, "load", lambda _: tvm_ffi.load_module(str(path)))
        wrapper = assert_wrapper_is_right(batch)
        counts = emulator.statistics(library)
        assert counts["copies"] > 0 and counts["tensor_copies"] == 0


def module_arguments(problem, position="NONE", fixed_split=False, **changes):
    """Arguments of the module's run for a Problem, some of them replaced."""
    rows = problem.rows
    dtypes = (problem.q.dtype, problem.k.dtype, problem.q.dtype)
    variant = jit.Variant(*dtypes, problem.q.shape[2], False, False, position, fixed_split)
    module, empty = load(variant), torch.empty(0)
    plan = module.plan(
        workspace(), empty, empty, empty, 1, problem.q.shape[1] * problem.q_len, problem.k.shape[2], 1, False, -1, 0.0,
        problem.q.shape[2], problem.q.shape[2], empty, empty,
    )  # fmt: skip
    arguments = {
        "float_workspace": workspace(), "counters": torch.zeros(64, dtype=torch.int32), "plan_info": plan,
        "q": problem.q, "k": problem.k, "v": problem.v, "indptr": problem.indptr, "indices": problem.indices,
        "last_page_len": problem.last_page_len, "o": torch.empty_like(problem.q),
        "lse": torch.empty(problem.q.shape[:2]), "layout": 0, "window_left": -1, "pdl": True, "sinks": None,
        "soft_cap": 0.0, "sm_scale": 0.1, "v_scale": 1.0, "rope_scale": 1.0, "rope_theta": 1e4, "q_len": problem.q_len,
        "prefetch": [0, 0, 0, 0, 0], "running": None, "planned": None,
    }  # fmt: skip
    assert rows <= 16 and not changes.keys() - arguments.keys()
    return module, list((arguments | changes).values())


def bad(**changes):
    return changes


BAD_INPUT = {
    "q of another type": (bad(q=torch.zeros(2, 4, 128)), TypeError, "q: expected dtype bfloat16, got float32"),
    "q of another rank": (bad(q=torch.zeros(2, 512, dtype=BF16)), ValueError, "q: expected 3 dimensions, got 2"),
    "q of another batch": (bad(q=torch.zeros(3, 4, 128, dtype=BF16)), ValueError, "q: expected shape"),
    "q misaligned": (
        bad(q=torch.zeros(2 * 4 * 128 + 1, dtype=BF16)[1:].view(2, 4, 128)),
        ValueError,
        "q: expected an address",
    ),
    "heads that do not divide": (
        bad(q=torch.zeros(2, 5, 128, dtype=BF16)),
        ValueError,
        "num_qo_heads: expected a positive multiple",
    ),
    "too many rows": (bad(q=torch.zeros(2, 34, 128, dtype=BF16)), ValueError, "at most 16 query rows"),
    "k of another head_dim": (
        bad(k=torch.zeros(9, 1, 2, 64, dtype=BF16)),
        ValueError,
        "paged_k_cache: expected a contiguous last dimension of 128",
    ),
    "k misaligned": (
        bad(k=torch.zeros(9 * 2 * 128 + 4, dtype=BF16)[4:].view(9, 1, 2, 128)),
        ValueError,
        "paged_k_cache: expected a 16-byte aligned",
    ),
    "odd strides": (bad(k=torch.zeros(9, 1, 2, 132, dtype=BF16)[..., :128]), ValueError, "multiples of 16 bytes"),
    "v of another shape": (
        bad(v=torch.zeros(9, 1, 2, 128, dtype=BF16)),
        ValueError,
        "paged_v_cache: expected paged_k_cache's shape",
    ),
    "indptr too short": (
        bad(indptr=torch.zeros(2, dtype=torch.int32)),
        ValueError,
        "paged_kv_indptr: expected at least 3",
    ),
    "int64 indices": (
        bad(indices=torch.zeros(9, dtype=torch.int64)),
        TypeError,
        "paged_kv_indices: expected dtype int32",
    ),
    "out not contiguous": (
        bad(o=torch.zeros(2, 128, 4, dtype=BF16).transpose(1, 2)),
        ValueError,
        "out: expected a contiguous",
    ),
    "lse of another shape": (bad(lse=torch.zeros(2, 3)), ValueError, "lse: expected a contiguous tensor of shape"),
    "workspace too small": (
        bad(float_workspace=workspace(64)),
        ValueError,
        "float_workspace_buffer: expected at least",
    ),
    "counters too few": (bad(counters=torch.zeros(3, dtype=torch.int32)), ValueError, "counters: expected at least"),
    "window not compiled in": (bad(window_left=5), ValueError, "window_left"),
    "soft cap not compiled in": (bad(soft_cap=5.0), ValueError, "logits_soft_cap"),
    "no layout": (bad(layout=2), ValueError, "kv_layout_code: expected 0"),
    "short plan": (bad(plan_info=[1, 2]), ValueError, "plan_info: expected the 10 numbers"),
    "plan beyond the GPU": (
        bad(plan_info=[5, 9, 0, 0, 0, 4, 1, 3, 0, 0]),
        ValueError,
        "plan_info: 5 blocks of 9 warps",
    ),
    "heads that are not there abreast": (
        bad(plan_info=[5, 8, 0, 0, 0, 2, 0, 3, 2, 0]),
        ValueError,
        r"plan_info: .* 2\^2 of 2 kv heads abreast",
    ),
    "a workspace that no warps can meet in": (
        bad(plan_info=[5, 8, 0, 0, 0, 2, 0, 3, 1, 0], float_workspace=workspace(1 << 16)),
        ValueError,
        "float_workspace_buffer: expected at least 368640",
    ),
    "counters for too few warps": (
        bad(plan_info=[5, 8, 0, 0, 0, 2, 0, 3, 1, 0], counters=torch.zeros(39, dtype=torch.int32)),
        ValueError,
        "counters: expected at least 40",
    ),
    "a query that is none": (bad(q=None), TypeError, "argument 3: expected .*Tensor.*, got None"),
    "a layout that is a word": (bad(layout="NHD"), TypeError, "argument 11: expected int, got "),
    "a plan of words": (bad(plan_info=["5"]), TypeError, "argument 2: expected Array<int>, got "),
    "levers": (bad(prefetch=[1]), ValueError, "prefetch: expected"),
    "q_len": (bad(q_len=0), ValueError, "q: expected shape"),
    "rope_scale": (bad(rope_scale=0.0, position="ROPE_LLAMA"), ValueError, "rope_scale, rope_theta: expected 0.001"),
    "rope_theta": (bad(rope_theta=math.nan, position="ROPE_LLAMA"), ValueError, "got 1 and nan"),
    "short sinks": (bad(sinks=torch.zeros(3)), ValueError, "sinks: expected at least 4"),
    "records for too few warps": (
        bad(planned=torch.zeros(5 * 8 * 128 + 7, dtype=torch.int32)),
        ValueError,
        "planned: expected at least 5128",
    ),
    "records of another type": (bad(planned=torch.zeros(5 * 8 * 128 + 8)), TypeError, "planned: expected dtype int32"),
    "records misaligned": (
        bad(planned=torch.zeros(5 * 8 * 128 + 9, dtype=torch.int32)[1:]),
        ValueError,
        "planned: expected a 16-byte aligned",
    ),
    "running of another type": (bad(running=torch.zeros(1)), TypeError, "running: expected dtype int32"),
    "a plan without splits": (
        bad(plan_info=[5, 8, 0, 0, 0, 2, 0, 3, 0, 0], fixed_split=True),
        ValueError,
        "plan_info: .* 0 tiles a split",
    ),
    "a split too long": (
        bad(plan_info=[5, 8, 0, 0, 0, 2, 1 << 29, 3, 0, 0], fixed_split=True),
        ValueError,
        "536870912 tiles a split",
    ),
    "a workspace that holds no split": (
        bad(plan_info=[5, 8, 0, 0, 0, 2, 1, 3, 0, 0], float_workspace=workspace(64), fixed_split=True),
        ValueError,
        "float_workspace_buffer: expected at least",
    ),
    "counters for no split": (
        bad(plan_info=[5, 8, 0, 0, 0, 2, 1, 3, 0, 0], counters=torch.zeros(3, dtype=torch.int32), fixed_split=True),
        ValueError,
        "counters: expected at least",
    ),
}


@pytest.mark.parametrize("changes, error, message", BAD_INPUT.values(), ids=BAD_INPUT)
def test_the_module_refuses_before_it_launches(changes, error, message):
    module, arguments = module_arguments(emulated.make_problem([40, 9], heads_q=4, heads_kv=2), **changes)
    with pytest.raises(error, match=message):
        module.run(*arguments)


def test_the_module_refuses_another_number_of_arguments():
    module, arguments = module_arguments(emulated.make_problem([40, 9], heads_q=4, heads_kv=2))
    with pytest.raises(TypeError, match="calling: `run.*Expected 24 but got 23 arguments"):
        module.run(*arguments[:-1])


def test_the_module_runs_what_the_refused_calls_were_made_of():
    problem = emulated.make_problem([40, 9], heads_q=4, heads_kv=2)
    module, arguments = module_arguments(problem, sm_scale=128**-0.5)
    module.run(*arguments)
    torch.testing.assert_close(arguments[9].double(), emulated.reference(problem)[0], rtol=2e-2, atol=1e-2)


def test_two_threads_may_launch_a_kernel_for_the_first_time_at_once(tmp_path):
    """CUDA keeps what a kernel's shared memory was set to last: the launch that needs less must not take it back."""
    # A copy of the library is a module that nobody has launched yet.
    path = shutil.copy(emulated_module.compiled(jit.Variant(BF16, BF16, BF16, 128, False, False)), tmp_path)
    ctypes.CDLL(path).emulator_set_attribute_milliseconds(300)
    module = tvm_ffi.load_module(str(path))
    problems = [emulated.make_problem([40, 9], heads_q=heads, heads_kv=2) for heads in (16, 2)]
    calls = []
    for problem in problems:
        _, arguments = module_arguments(problem, sm_scale=128**-0.5)
        arguments[1] = torch.zeros(arguments[2][4] // 4, dtype=torch.int32)
        calls.append(arguments)
    assert calls[0][2][2] > calls[1][2][2] > 48 << 10, "bytes of shared memory"
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        large = pool.submit(module.run, *calls[0])
        time.sleep(0.1)  # it is setting its size now
        small = pool.submit(module.run, *calls[1])
        for future, arguments, problem in zip((large, small), calls, problems, strict=True):
            future.result(timeout=120)
            torch.testing.assert_close(arguments[9].double(), emulated.reference(problem)[0], rtol=2e-2, atol=1e-2)


def test_levers_out_of_range_are_clamped():
    """A huge distance asks for nothing that is not there; a negative one is none."""
    problem = emulated.make_problem([40, 9], heads_q=4, heads_kv=2)
    module, arguments = module_arguments(problem)
    module.run(*arguments)
    expected = arguments[9].clone()
    arguments[-3] = [2**40, 2**40, 7, -3, 9]
    module.run(*arguments)
    assert torch.equal(arguments[9], expected)


def test_workspace_size_is_what_plan_asks_for():
    module, empty = load(jit.Variant(BF16, BF16, BF16, 128, False, False)), torch.empty(0)
    plan = module.plan(workspace(), empty, empty, empty, 9, 8, 2, 16, False, -1, 0.0, 128, 128, empty, empty)
    sizes = module.workspace_size(workspace(), empty, 9, 8, 2, 16, False, -1, 0.0, 128, 128, empty, empty)
    assert list(sizes) == list(plan)[3:5]


def test_heads_are_read_abreast_where_the_workspace_lets_warps_meet():
    module, empty = load(jit.Variant(BF16, BF16, BF16, 128, False, False)), torch.empty(0)

    def plan(heads, size):
        shape = (1, 2 * heads, heads, 16, False, -1, 0.0, 128, 128, empty, empty)
        return list(module.plan(workspace(size), empty, empty, empty, *shape))

    # Five SMs, eight warps each: 2 * 40 places of 128 * 9 floats.
    saved = 2 * 40 * 128 * 9 * 4
    for heads, abreast_log2 in ((1, 0), (2, 1), (6, 1), (4, 2), (8, 3), (32, 3)):
        made = plan(heads, 1 << 20)
        assert made[8] == abreast_log2 and made[3] == (saved if abreast_log2 else 2 * 5 * 2 * 132 * 4)
    assert plan(8, saved)[8] == 3
    small = plan(8, saved - 1)
    assert small[8] == 0 and small[3] == 2 * 5 * 2 * 132 * 4
    # Another grid takes as many as share it out evenly, in the room there is.
    for grid, abreast_log2 in (((5, 8), 3), ((5, 4), 2), ((3, 5), 0), ((2, 6), 2), ((10, 8), 0)):
        adjusted = list(module.adjust_plan(plan(8, 1 << 20), 1, *grid, 0))
        assert adjusted[8] == abreast_log2, grid


def test_a_workspace_that_is_too_small_goes_to_flashinfer():
    batch = make_batch([40], dtype=BF16)
    wrapper = fi_prefetch.BatchDecodeWithPagedKVCacheWrapper(workspace(1024))
    spec = wrapper._spec(
        1, torch.int32, *batch.shape, "NONE", -1, None, BF16, BF16, None, None, None, False, 1, 0, None
    )
    choice = decision.decide(spec, 1 << 20, 16, workspace(1024), torch.empty(0), torch.empty(0)).choice
    assert choice.kernel == "flashinfer" and "float workspace holds 1024 bytes" in choice.reason


def test_another_grid_gives_the_same_answer():
    problem = emulated.make_problem([700, 9, 40], heads_q=4, heads_kv=2)
    module, arguments = module_arguments(problem, sm_scale=128**-0.5)
    plan = arguments[2]
    for blocks, warps, min_tiles in ((10, 4, 1), (1, 1, 1), (5, 8, 7), (40, 2, 3)):
        arguments[2] = module.adjust_plan(plan, 3, blocks, warps, min_tiles)
        arguments[1] = torch.zeros(arguments[2][4] // 4, dtype=torch.int32)
        module.run(*arguments)
        torch.testing.assert_close(arguments[9].double(), emulated.reference(problem)[0], rtol=2e-2, atol=1e-2)


@pytest.mark.parametrize(
    "grid, message",
    [
        ((0, 8, 1), "blocks: expected 1 to 1024, got 0"),
        ((1025, 8, 1), "blocks: expected 1 to 1024, got 1025"),
        ((5, 9, 1), "warps: expected 1 to 8, got 9"),
        ((5, 8, -1), r"min_tiles_per_warp: expected 0 \(the kernel chooses\) to 65536, got -1"),
        ((5, 8, 65537), r"min_tiles_per_warp: expected 0 \(the kernel chooses\) to 65536, got 65537"),
    ],
)
def test_a_grid_beyond_the_kernel_is_refused(grid, message):
    module, arguments = module_arguments(emulated.make_problem([40], heads_q=4, heads_kv=2))
    with pytest.raises(ValueError, match=message):
        module.adjust_plan(arguments[2], 1, *grid)


def test_a_batch_whose_scan_does_not_fit_shared_memory_is_refused_when_planned():
    module, empty = load(jit.Variant(BF16, BF16, BF16, 128, False, False)), torch.empty(0)
    shape = (8, 2, 16, False, -1, 0.0, 128, 128, empty, empty)
    assert list(module.plan(workspace(), empty, empty, empty, 6500, *shape))
    with pytest.raises(ValueError, match="batch_size: 7000 requests are more"):
        module.plan(workspace(), empty, empty, empty, 7000, *shape)


def test_the_grid_follows_the_size_of_the_call(monkeypatch):
    rules = (tune.Rule(1 << 16, tune.Grid(2, 1, 1)), tune.Rule(None, tune.Grid(3, 2, 1)))
    monkeypatch.setattr(tune, "rules_for", lambda key: rules)
    wrapper = fi_prefetch.BatchDecodeWithPagedKVCacheWrapper(workspace())
    for lengths, grid in (([40], (5, 2)), ([40, 700, 300], (10, 3)), ([16], (5, 2))):  # blocks, warps
        assert_wrapper_is_right(make_batch(lengths, dtype=BF16), wrapper=wrapper)
        assert (wrapper.prefetch_plan.facts.blocks, wrapper.prefetch_plan.facts.warps) == grid


# --- splits of a fixed size -----------------------------------------------------------------------------------------

FIXED = {
    "a page": {"fixed_split_size": 1},
    "five pages": {"fixed_split_size": 5},
    "whole requests": {"disable_split_kv": True},
    "both": {"fixed_split_size": 5, "disable_split_kv": True},
}
over_fixed = pytest.mark.parametrize("plan", FIXED.values(), ids=FIXED)
POOL = [700, 0, 1, 16, 257, 90, 33]


def some_requests(pool, requests):
    """A batch of the pool's requests of these numbers, each as often as it is named."""
    pages = [pool.indices[pool.indptr[r] : pool.indptr[r + 1]] for r in requests]
    return dataclasses.replace(
        pool,
        q=pool.q[requests],
        indptr=torch.tensor([0, *map(len, pages)]).cumsum(0).int(),
        indices=torch.cat(pages),
        last_page_len=pool.last_page_len[requests],
        keys=[pool.keys[r] for r in requests],
        values=[pool.values[r] for r in requests],
        lengths=[pool.lengths[r] for r in requests],
    )


def answers(batch, wrapper, **plan):
    """(o, lse) of a new plan; it must be our kernel's."""
    wrapper.plan(*batch.table, *batch.shape, **batch.dtypes, **plan)
    answer = wrapper.run(batch.q, batch.cache, return_lse=True)
    assert wrapper.kernel_choice.kernel == "fi_prefetch" and "_fixed_split serves" in wrapper.kernel_choice.reason
    return answer


def same(got, expected, rows):
    return all(torch.equal(x, y[rows]) for x, y in zip(got, expected, strict=True))


@over_fixed
@pytest.mark.parametrize("kv_dtype", [BF16, E4M3], ids=["bf16", "e4m3"])
def test_fixed_splits_are_served(plan, kv_dtype):
    wrapper = assert_wrapper_is_right(make_batch(POOL, dtype=BF16, kv_dtype=kv_dtype), plan=plan)
    assert wrapper.kernel_choice.reason.split()[0].endswith("_fixed_split")
    assert not any(counters.any() for counters in wrapper._counters)
    assert wrapper.prefetch_plan.prologue == 0 and not wrapper.prefetch_plan.early_load


@over_fixed
def test_fixed_splits_give_a_request_the_same_bits_in_every_batch(plan):
    pool = make_batch(POOL, dtype=BF16)
    wrapper = fi_prefetch.BatchDecodeWithPagedKVCacheWrapper(workspace())
    everyone = answers(pool, wrapper, **plan)
    for requests in ([3], [0], [6, 5, 4], [4] * 7, [0, 1, 2] * 12, [2, 6, 2, 0]):
        assert same(answers(some_requests(pool, requests), wrapper, **plan), everyone, requests)
    assert not any(counters.any() for counters in wrapper._counters)


def test_the_default_gives_a_request_other_bits_in_another_batch():
    """So the comparison above means something."""
    pool = make_batch(POOL, dtype=BF16)
    wrapper = fi_prefetch.BatchDecodeWithPagedKVCacheWrapper(workspace())
    outs = []
    for batch in (pool, some_requests(pool, [0])):
        wrapper.plan(*batch.table, *batch.shape, **batch.dtypes)
        outs.append(wrapper.run(batch.q, batch.cache, return_lse=True))
    assert not same(outs[1], outs[0], [0])


@over_fixed
def test_fixed_splits_in_a_graphs_buffers_give_the_bits_of_a_batch_without_a_graph(plan):
    pool = make_batch(POOL, dtype=BF16)
    everyone = answers(pool, fi_prefetch.BatchDecodeWithPagedKVCacheWrapper(workspace()), **plan)
    buffers = [torch.zeros(n, dtype=torch.int32) for n in (4, 150, 3)]
    wrapper = fi_prefetch.CUDAGraphBatchDecodeWithPagedKVCacheWrapper(workspace(), *buffers)
    answers(some_requests(pool, [2, 1, 3]), wrapper, **plan)  # what is captured
    for requests in ([0, 4, 5], [1, 1, 1], [6, 0, 0]):  # what is replayed, with no new plan
        batch = some_requests(pool, requests)
        for buffer, values in zip(buffers, batch.table, strict=True):
            buffer[: len(values)] = values
        assert same(wrapper.run(batch.q, batch.cache, return_lse=True), everyone, requests)
    assert not any(counters.any() for counters in wrapper._counters)


def test_one_wrapper_from_fixed_splits_to_none_and_back():
    pool = make_batch(POOL, dtype=BF16)
    wrapper = fi_prefetch.BatchDecodeWithPagedKVCacheWrapper(workspace())
    plans = [{}, {"fixed_split_size": 2}, {"disable_split_kv": True}, {"fixed_split_size": -1}, {"fixed_split_size": 2}]
    for seed, plan in enumerate([*plans, *plans]):
        batch = some_requests(pool, [(seed + i) % len(POOL) for i in range(1 + seed % 4)])
        assert_wrapper_is_right(batch, wrapper=wrapper, plan=plan)
        fixed = plan.get("fixed_split_size", -1) > 0 or "disable_split_kv" in plan
        assert wrapper._decision.spec.variant().fixed_split == fixed
        assert not any(counters.any() for counters in wrapper._counters)


def fast_plan(wrapper, batch, fixed_split_size=-1, disable_split_kv=False):
    """What FlashInfer's fast_decode_plan does with a tensor-core wrapper; it itself needs a CUDA device."""
    wrapper._paged_kv_indptr_buf, wrapper._paged_kv_indices_buf, wrapper._paged_kv_last_page_len_buf = batch.table
    num_qo_heads, num_kv_heads, head_dim, page_size = batch.shape
    size = len(batch.lengths)
    buffers = (wrapper._float_workspace_buffer, wrapper._int_workspace_buffer, wrapper._pin_memory_int_workspace_buffer)
    table = (torch.arange(size + 1), batch.indptr, torch.tensor(batch.lengths), size, size)
    shape = (num_qo_heads, num_kv_heads, page_size, wrapper.is_cuda_graph_enabled, head_dim, head_dim, False, -1)
    wrapper._plan_info = wrapper._cached_module.plan(*buffers, *table, *shape, fixed_split_size, disable_split_kv, 0, 0)


def test_fast_planning_takes_fixed_splits_and_lets_them_go():
    pool = make_batch(POOL, dtype=BF16)
    expected = answers(pool, fi_prefetch.BatchDecodeWithPagedKVCacheWrapper(workspace()), fixed_split_size=2)
    wrapper = fi_prefetch.BatchDecodeWithPagedKVCacheWrapper(workspace(), use_tensor_cores=True)
    assert_wrapper_is_right(pool, wrapper=wrapper)
    for requests in ([4, 0], [6, 5, 4, 3, 0]):
        batch = some_requests(pool, requests)
        fast_plan(wrapper, batch, fixed_split_size=2)
        assert same(wrapper.run(batch.q, batch.cache, return_lse=True), expected, requests)
        assert wrapper._decision.spec.split_tokens == 32
        fast_plan(wrapper, batch)
        assert wrapper._decision.spec.split_tokens is None
        torch.testing.assert_close(
            wrapper.run(batch.q, batch.cache).float(), expected[0][requests].float(), atol=1e-2, rtol=1e-2
        )
        fast_plan(wrapper, batch, disable_split_kv=True)
        assert wrapper._decision.spec.variant().fixed_split
        torch.testing.assert_close(
            wrapper.run(batch.q, batch.cache).float(), expected[0][requests].float(), atol=1e-2, rtol=1e-2
        )
    assert not any(counters.any() for counters in wrapper._counters)


@over_fixed
@pytest.mark.parametrize("graph", [False, True])
def test_workspace_size_is_what_fixed_splits_need(plan, graph):
    batch = make_batch(POOL, dtype=BF16)

    def wrapper_on(num_bytes):
        buffers = [torch.zeros(n, dtype=torch.int32) for n in (len(POOL) + 1, 200, len(POOL))]
        if graph:
            return fi_prefetch.CUDAGraphBatchDecodeWithPagedKVCacheWrapper(workspace(num_bytes), *buffers)
        return fi_prefetch.BatchDecodeWithPagedKVCacheWrapper(workspace(num_bytes))

    sizes = wrapper_on(64).workspace_size(*batch.table, *batch.shape, **batch.dtypes, **plan)
    assert (sizes[0] == 0) == ("disable_split_kv" in plan), "whole requests leave nothing to merge"
    wrapper = wrapper_on(max(sizes[0], 16))
    answers(batch, wrapper, **plan)
    assert wrapper._decision.partial_bytes == sizes[0]


def test_a_workspace_too_small_for_fixed_splits_goes_to_flashinfer():
    batch = make_batch(POOL, dtype=BF16)
    wrapper = fi_prefetch.BatchDecodeWithPagedKVCacheWrapper(workspace())
    needed, _ = wrapper.workspace_size(*batch.table, *batch.shape, **batch.dtypes, fixed_split_size=1)
    answers(batch, wrapper, fixed_split_size=1)
    spec, kv_bytes = wrapper._decision.spec, wrapper._decision.kv_bytes
    pages = wrapper._most_pages(spec, kv_bytes)
    for size, kernel in ((needed, "fi_prefetch"), (needed - 16, "flashinfer")):
        choice = decision.decide(spec, kv_bytes, pages, workspace(size), torch.empty(0), torch.empty(0)).choice
        assert choice.kernel == kernel
    assert f"the float workspace holds {needed - 16} bytes, the partial results need {needed}" in choice.reason


def test_splits_are_whole_tiles_and_there_is_room_for_all_that_a_table_can_have():
    module, arguments = module_arguments(emulated.make_problem([40], heads_q=8, heads_kv=2), fixed_split=True)
    plan, stride = arguments[2], 4 * (128 + 4)
    assert list(plan)[6] == 1 << 28, "until fix_splits() every request is one split"
    for tokens, tiles in ((1, 1), (16, 1), (17, 2), (2048, 128), (1 << 32, 1 << 28), (1 << 60, 1 << 28)):
        # 1,000 pages of 48 tokens, 9 requests, 2 heads of 4 query rows.
        fixed = list(module.fix_splits(plan, tokens, 1000, 48, 9, 2))
        splits = 0 if tiles == 1 << 28 else (48_000 // (16 * tiles) + 9) * 2
        assert fixed == [*list(plan)[:3], splits * 4 * stride, splits * 4 * 4, 4, tiles, 2, 0, 0], tokens
    sizes = module.workspace_size(workspace(), torch.empty(0), 9, 8, 2, 48, False, -1, 0.0, 128, 128, *arguments[3:5])
    assert list(sizes) == [0, 0]


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda fixed, plain, info: plain.fix_splits(info, 16, 9, 16, 1, 2), "compiled without fixed splits"),
        (lambda fixed, plain, info: fixed.fix_splits(info, 0, 9, 16, 1, 2), "split_tokens: expected 1 or more, got 0"),
        (lambda fixed, plain, info: fixed.fix_splits(info, 16, -1, 16, 1, 2), "expected counts, got -1 pages"),
        (lambda fixed, plain, info: fixed.fix_splits(info, 16, 1 << 62, 1 << 20, 1, 2), "are too many splits"),
        (lambda fixed, plain, info: fixed.fix_splits(info[:3], 16, 9, 16, 1, 2), "plan_info: expected the 10 numbers"),
        (lambda fixed, plain, info: fixed.adjust_plan(info, 1, 5, 4, 1), "the grid is part of the result"),
    ],
    ids=["other module", "no tokens", "no count", "too many", "short plan", "other grid"],
)
def test_splits_that_are_none_are_refused(call, message):
    fixed, arguments = module_arguments(emulated.make_problem([40], heads_q=8, heads_kv=2), fixed_split=True)
    plain, _ = module_arguments(emulated.make_problem([40], heads_q=8, heads_kv=2))
    with pytest.raises(ValueError, match=message):
        call(fixed, plain, list(arguments[2]))


def test_window_op_leaves_fixed_splits_alone():
    batch = make_batch([400, 9], dtype=BF16)
    wrapper = assert_wrapper_is_right(batch, plan={"fixed_split_size": 2})
    assert fi_prefetch.prefetch_kv(wrapper, batch.cache) is False
    assert wrapper._running is None
    module, k, v = wrapper._decision.module, batch.cache[:, 0], batch.cache[:, 1]
    with pytest.raises(ValueError, match="prefetch_kv: not with fixed splits"):
        module.prefetch_kv(wrapper._decision.plan_info, k, v, *batch.table, 0, -1, 1, 1 << 20, 5, True, None)


def schedule_arguments(**changes):
    """Arguments of the module's schedule for a small batch, some of them replaced."""
    problem = emulated.make_problem([40, 7], dtype=BF16, head_dim=128)
    module, arguments = module_arguments(problem)
    named = {
        "plan_info": arguments[2], "planned": torch.zeros(5 * 8 * 128 + 8, dtype=torch.int32), "indptr": problem.indptr,
        "indices": problem.indices, "last_page_len": problem.last_page_len, "page_size": problem.k.shape[1],
        "num_kv_heads": problem.k.shape[2], "window_left": -1, "q_len": 1,
    }  # fmt: skip
    return module, list((named | changes).values())


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        (bad(planned=torch.zeros(5 * 8 * 128 + 7, dtype=torch.int32)), ValueError, "planned: expected at least 5128"),
        (bad(planned=torch.zeros(5 * 8 * 128 + 8)), TypeError, "planned: expected dtype int32"),
        (bad(indptr=torch.zeros(2, dtype=torch.int32)), ValueError, "paged_kv_indptr: expected at least 3"),
        (bad(page_size=0), ValueError, "page_size, num_kv_heads: expected 1 or more, got 0 and"),
        (bad(window_left=5), ValueError, "window_left: .* without a sliding window, got 5"),
        (bad(q_len=17), ValueError, "q_len_per_req: expected 1 to 16, got 17"),
        (bad(plan_info=[5, 8]), ValueError, "plan_info: expected the 10 numbers"),
        (bad(plan_info=[5, 8, 0, 0, 0, 17, 0, 3, 0, 0]), ValueError, "plan_info: expected 1 to 16 query rows"),
        (bad(plan_info=[5, 9, 0, 0, 0, 2, 0, 3, 0, 0]), ValueError, "plan_info: 5 blocks of 9 warps"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_schedule_refuses_before_it_launches(changes, error, message):
    module, arguments = schedule_arguments(**changes)
    with pytest.raises(error, match=message):
        module.schedule(*arguments)


def test_schedule_is_not_for_fixed_splits():
    problem = emulated.make_problem([40, 7], dtype=BF16, head_dim=128)
    module, arguments = module_arguments(problem, fixed_split=True)
    with pytest.raises(ValueError, match="schedule: not with fixed splits"):
        module.schedule(arguments[2], arguments[1], *arguments[6:9], 16, 2, -1, 1)


@pytest.mark.parametrize("lengths", [[40, 1, 130, 0], [9, 300] * 20])
@pytest.mark.parametrize("changes", [{}, {"head_dim": 64}, {"kv_dtype": E4M3, "head_dim": 128}], ids=str)
def test_planned_launches_give_the_same_bits(lengths, changes):
    """Through the wrapper, again and again, also after another plan in between."""
    batches = [make_batch(lengths, dtype=BF16, **changes), make_batch(lengths[::-1], dtype=BF16, **changes)]
    plain, promised = (
        fi_prefetch.BatchDecodeWithPagedKVCacheWrapper(workspace(), ready=ready) for ready in ("nothing", "plan")
    )
    for batch in (*batches, *batches):
        outputs = []
        for wrapper in (plain, promised):
            wrapper.plan(*batch.table, *batch.shape, **batch.dtypes)
            for _ in range(2):
                outputs.append(wrapper.run(batch.q, batch.cache))
        assert all(torch.equal(outputs[0], other) for other in outputs[1:])
