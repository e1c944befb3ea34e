"""From the wrapper's Python down to the kernel, on the CPU: csrc/decode.cu with its checks, exported through tvm-ffi,
launches into the emulator, under the wrapper as a GPU's user has it."""

import functools
import math

import emulated_decode as emulated
import pytest
import torch
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


def assert_wrapper_is_right(batch, kv_layout="NHD", wrapper=None, plan=None, run=None, ready="nothing", cache=None):
    plan, run = plan or {}, run or {}
    cache = batch.cache if cache is None else cache
    wrapper = wrapper or fi_prefetch.BatchDecodeWithPagedKVCacheWrapper(workspace(), kv_layout, ready=ready)
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


@pytest.mark.parametrize("ready", ["nothing", "page_table", "all_but_last_token"])
def test_promises(ready):
    wrapper = assert_wrapper_is_right(make_batch([40, 1, 130], dtype=BF16), ready=ready)
    assert wrapper.prefetch_plan.early_load == (ready == "all_but_last_token")
    # Early load brings the first tiles itself.
    assert (wrapper.prefetch_plan.prologue > 0) == (ready != "all_but_last_token")


def test_one_wrapper_over_many_plans():
    wrapper = fi_prefetch.BatchDecodeWithPagedKVCacheWrapper(workspace())
    for seed, lengths in enumerate([[40, 1], [0, 300, 2, 16], [5], [700]]):
        assert_wrapper_is_right(make_batch(lengths, dtype=BF16, seed=seed), wrapper=wrapper)
        assert not any(counters.any() for counters in wrapper._counters)


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


def module_arguments(problem, position="NONE", **changes):
    """Arguments of the module's run for a Problem, some of them replaced."""
    rows = problem.rows
    variant = jit.Variant(problem.q.dtype, problem.k.dtype, problem.q.dtype, problem.q.shape[2], False, False, position)
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
        "prefetch": [0, 0, 0, 0, 0],
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
    "short plan": (bad(plan_info=[1, 2]), ValueError, "plan_info: expected the 8 numbers"),
    "plan beyond the GPU": (bad(plan_info=[5, 9, 0, 0, 0, 4, 1, 3]), ValueError, "plan_info: 5 blocks of 9 warps"),
    "levers": (bad(prefetch=[1]), ValueError, "prefetch: expected"),
    "q_len": (bad(q_len=0), ValueError, "q: expected shape"),
    "rope_scale": (bad(rope_scale=0.0, position="ROPE_LLAMA"), ValueError, "rope_scale, rope_theta: expected 0.001"),
    "rope_theta": (bad(rope_theta=math.nan, position="ROPE_LLAMA"), ValueError, "got 1 and nan"),
    "short sinks": (bad(sinks=torch.zeros(3)), ValueError, "sinks: expected at least 4"),
}


@pytest.mark.parametrize("changes, error, message", BAD_INPUT.values(), ids=BAD_INPUT)
def test_the_module_refuses_before_it_launches(changes, error, message):
    module, arguments = module_arguments(emulated.make_problem([40, 9], heads_q=4, heads_kv=2), **changes)
    with pytest.raises(error, match=message):
        module.run(*arguments)


def test_the_module_runs_what_the_refused_calls_were_made_of():
    problem = emulated.make_problem([40, 9], heads_q=4, heads_kv=2)
    module, arguments = module_arguments(problem, sm_scale=128**-0.5)
    module.run(*arguments)
    torch.testing.assert_close(arguments[9].double(), emulated.reference(problem)[0], rtol=2e-2, atol=1e-2)


def test_levers_out_of_range_are_clamped():
    """A huge distance asks for nothing that is not there; a negative one is none."""
    problem = emulated.make_problem([40, 9], heads_q=4, heads_kv=2)
    module, arguments = module_arguments(problem)
    module.run(*arguments)
    expected = arguments[9].clone()
    arguments[-1] = [2**40, 2**40, 7, -3, 9]
    module.run(*arguments)
    assert torch.equal(arguments[9], expected)


def test_workspace_size_is_what_plan_asks_for():
    module, empty = load(jit.Variant(BF16, BF16, BF16, 128, False, False)), torch.empty(0)
    plan = module.plan(workspace(), empty, empty, empty, 9, 8, 2, 16, False, -1, 0.0, 128, 128, empty, empty)
    sizes = module.workspace_size(workspace(), empty, 9, 8, 2, 16, False, -1, 0.0, 128, 128, empty, empty)
    assert list(sizes) == list(plan)[3:5]


def test_a_workspace_that_is_too_small_goes_to_flashinfer():
    batch = make_batch([40], dtype=BF16)
    wrapper = fi_prefetch.BatchDecodeWithPagedKVCacheWrapper(workspace(1024))
    spec = wrapper._spec(
        torch.int32, 1, *batch.shape, "NONE", -1, None, BF16, BF16, None, None, None, False, 1, 0, None
    )
    choice = decision.decide(spec, 1 << 20, workspace(1024), torch.empty(0), torch.empty(0)).choice
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
    assert list(module.plan(workspace(), empty, empty, empty, 8192, *shape))
    with pytest.raises(ValueError, match="batch_size: 10000 requests are more"):
        module.plan(workspace(), empty, empty, empty, 10000, *shape)


def test_the_grid_follows_the_size_of_the_call(monkeypatch):
    rules = (tune.Rule(1 << 16, tune.Grid(2, 1, 1)), tune.Rule(None, tune.Grid(3, 2, 1)))
    monkeypatch.setattr(tune, "rules_for", lambda key: rules)
    wrapper = fi_prefetch.BatchDecodeWithPagedKVCacheWrapper(workspace())
    for lengths, grid in (([40], (5, 2)), ([40, 700, 300], (10, 3)), ([16], (5, 2))):  # blocks, warps
        assert_wrapper_is_right(make_batch(lengths, dtype=BF16), wrapper=wrapper)
        assert (wrapper.prefetch_plan.facts.blocks, wrapper.prefetch_plan.facts.warps) == grid
