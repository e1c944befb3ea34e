"""On a slice of the GPU: fewer SMs than a plan counted on, so that most of its blocks start when others have ended.

No block may wait for one that has not started. A green context cuts the slice; the plan is for the whole GPU. What it
gives there are the bits that the whole GPU gives. A plan for few SMs on all of them is Case.blocks, elsewhere.
"""

from __future__ import annotations

import pytest
import torch
from few_sms import count_sms
from harness import (
    DEVICE,
    WHOLE,
    Case,
    assert_close,
    assert_counters_are_zero,
    build,
    flashinfer_answer,
    guarded_workspace,
    new_wrapper,
    plan,
    poison_unused,
    run,
    same_bits,
)

import fi_prefetch
from fi_prefetch.bench.paper import slice_stream

FEW = (8, 64)
over_few = pytest.mark.parametrize("sms", FEW)


def sm_count() -> int:
    return torch.cuda.get_device_properties(DEVICE).multi_processor_count


@over_few
def test_a_slice_has_so_few_sms(sms: int) -> None:
    """Else what follows would show nothing."""
    assert count_sms(torch.cuda.Stream()) == sm_count() > max(FEW)
    assert count_sms(slice_stream(sms)) == sms


CASES = (
    Case(lens=(700, 33, 2100, 1), page=1),  # several blocks share a request
    Case(lens=(40000,), heads=(8, 1), page=16),  # and all of them one
    Case(lens=(9000, 0, 5, 700), heads=(32, 8), kv="e4m3", page=16),
    Case(lens=(600,) * 40, heads=(32, 32)),  # warps read heads abreast, and meet by themselves
    Case(lens=(30,) * 300, heads=(8, 1), page=1),
    Case(lens=(5000, 17, 300), blocks=1024),  # the largest grid there is
    Case(lens=(2100, 0, 333), page=16, split=3),
    Case(lens=(2100, 40), page=16, split=WHOLE),
)


@over_few
@pytest.mark.parametrize("pdl", [True, False])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_plan_for_the_whole_gpu_is_right_on_a_slice(case: Case, pdl: bool, sms: int) -> None:
    inputs = build(case)
    theirs = flashinfer_answer(inputs)
    poison_unused(inputs)
    wrapper = new_wrapper(case)
    plan(wrapper, inputs)
    assert wrapper.prefetch_plan.facts.blocks >= sm_count()
    whole, whole_lse = run(wrapper, inputs, enable_pdl=pdl)
    torch.cuda.synchronize()
    with torch.cuda.stream(slice_stream(sms)):
        for _ in range(2):
            out, lse = run(wrapper, inputs, enable_pdl=pdl)
            assert same_bits(out, whole) and same_bits(lse, whole_lse)
    torch.cuda.synchronize()
    assert_close(inputs, out, lse, theirs)


@over_few
@pytest.mark.parametrize("policy", ["off", "auto"])
def test_calls_back_to_back_on_a_slice(policy: str, sms: int) -> None:
    """Under dependent launch a call's blocks queue up behind those of the call before; a window's are among them."""
    inputs = build(Case(lens=(700, 33, 2100, 1), page=1))
    wrapper = new_wrapper(inputs.case, prefetch=policy)
    plan(wrapper, inputs)
    expected, _ = run(wrapper, inputs)
    outs = [torch.full_like(expected, torch.nan) for _ in range(30)]
    stream, side = slice_stream(sms), torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        for number, out in enumerate(outs):
            if number % 10 == 0:
                fi_prefetch.prefetch_kv(wrapper, inputs.cache, stream=(side, stream)[number % 20 // 10])
            wrapper.run(inputs.q, inputs.cache, out=out, enable_pdl=True)
    torch.cuda.synchronize()
    assert all(same_bits(out, expected) for out in outs)
    guarded_workspace().check("the workspace")
    assert_counters_are_zero(wrapper)
    assert int(wrapper._running) == 0, "blocks are counted that have ended"


@over_few
def test_a_graph_of_a_slice(sms: int) -> None:
    inputs = build(Case(lens=(700, 33, 2100, 1), page=1))
    wrapper = new_wrapper(inputs.case)
    plan(wrapper, inputs)
    expected, _ = run(wrapper, inputs)
    out = torch.full_like(expected, torch.nan)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=slice_stream(sms)):
        wrapper.run(inputs.q, inputs.cache, out=out)
        wrapper.run(inputs.q, inputs.cache, out=out)
    for _ in range(5):
        out.fill_(torch.nan)
        graph.replay()
        torch.cuda.synchronize()
        assert same_bits(out, expected)
    assert_counters_are_zero(wrapper)
