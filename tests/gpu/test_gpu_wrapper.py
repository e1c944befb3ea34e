"""The wrapper on a GPU: its ways of returning, what goes to FlashInfer's kernels, and what is reported."""

from __future__ import annotations

from typing import Any

import flashinfer
import pytest
import torch
from harness import (
    DEVICE,
    Case,
    build,
    flashinfer_workspace,
    guarded_workspace,
    new_wrapper,
    plan,
    plan_options,
    run,
    same_bits,
)

import fi_prefetch

WAYS_TO_RUN = {
    "run": lambda w, q, cache: (w.run(q, cache), None),
    "run with lse": lambda w, q, cache: w.run(q, cache, return_lse=True),
    "run_return_lse": lambda w, q, cache: w.run_return_lse(q, cache),
    "forward": lambda w, q, cache: (w.forward(q, cache), None),
    "forward_return_lse": lambda w, q, cache: w.forward_return_lse(q, cache),
    "run with out": lambda w, q, cache: (w.run(q, cache, out=torch.full_like(q, torch.nan)), None),
    "run with v_scale on the GPU": lambda w, q, cache: (w.run(q, cache, v_scale=torch.ones(1, device=DEVICE)), None),
}


@pytest.mark.parametrize("way", WAYS_TO_RUN)
@pytest.mark.parametrize("heads", [(8, 2), (8, 8)], ids=str)
def test_every_way_to_run_gives_the_same(way: str, heads: tuple[int, int]) -> None:
    inputs = build(Case(heads=heads))
    wrapper = new_wrapper(inputs.case)
    plan(wrapper, inputs)
    expected, expected_lse = run(wrapper, inputs)
    out, lse = WAYS_TO_RUN[way](wrapper, inputs.q, inputs.cache)
    assert same_bits(out, expected)
    assert lse is None or same_bits(lse, expected_lse)


def test_out_and_lse_are_what_is_returned() -> None:
    inputs = build(Case())
    wrapper = new_wrapper(inputs.case)
    plan(wrapper, inputs)
    out, lse = torch.empty_like(inputs.q), torch.empty(inputs.q.shape[:2], device=DEVICE)
    returned = wrapper.run(inputs.q, inputs.cache, out=out, lse=lse, return_lse=True)
    assert returned[0] is out and returned[1] is lse


@pytest.mark.parametrize("strides", ["padded heads", "every second row", "heads first"])
def test_queries_in_other_strides(strides: str) -> None:
    inputs = build(Case(lens=(100, 37, 64), heads=(8, 2)))
    wrapper = new_wrapper(inputs.case)
    plan(wrapper, inputs)
    expected, _ = run(wrapper, inputs)
    rows, heads, dim = inputs.q.shape
    if strides == "padded heads":
        q = torch.full((rows, heads, dim + 2), torch.nan, dtype=inputs.q.dtype, device=DEVICE)[..., :dim]
    elif strides == "every second row":
        q = torch.full((2 * rows, heads, dim), torch.nan, dtype=inputs.q.dtype, device=DEVICE)[::2]
    else:
        q = torch.full((heads, rows, dim), torch.nan, dtype=inputs.q.dtype, device=DEVICE).transpose(0, 1)
    q.copy_(inputs.q)
    inputs.q = q
    out, _ = run(wrapper, inputs)
    assert same_bits(out, expected)


# Plans and calls that our kernel does not serve, on FlashInfer's modules that the suite compiles anyway.
FOR_FLASHINFER: dict[str, tuple[Case, dict[str, Any], dict[str, Any]]] = {
    "32 query heads a kv head": (Case(heads=(32, 1)), {"use_tensor_cores": True}, {}),
    "too many query rows": (Case(lens=(100, 37), heads=(8, 2), q_len=5), {"use_tensor_cores": True}, {}),
    "a backend by name": (Case(), {"use_tensor_cores": True, "backend": "fa2"}, {}),
    "32 query heads, cut after 4 pages": (Case(heads=(32, 1)), {"use_tensor_cores": True}, {"fixed_split_size": 4}),
    "32 query heads, not cut": (Case(heads=(32, 1)), {"use_tensor_cores": True}, {"disable_split_kv": True}),
}


@pytest.mark.parametrize("name", FOR_FLASHINFER)
def test_what_our_kernel_does_not_serve_is_flashinfers_to_the_bit(name: str) -> None:
    case, constructor, planning = FOR_FLASHINFER[name]
    inputs = build(case)
    answers = []
    for make in (fi_prefetch.BatchDecodeWithPagedKVCacheWrapper, flashinfer.BatchDecodeWithPagedKVCacheWrapper):
        wrapper = make(flashinfer_workspace(inputs.q.device), case.layout, **constructor)
        table = (inputs.indptr, inputs.indices, inputs.last_page_len)
        options = {**plan_options(case, inputs.k.dtype), **planning}
        wrapper.plan(*table, *case.heads, case.dim, case.page, **options)
        answers.append(wrapper.run(inputs.q, inputs.cache, return_lse=True))
        if make is fi_prefetch.BatchDecodeWithPagedKVCacheWrapper:
            assert wrapper.kernel_choice.kernel == "flashinfer"
            assert wrapper.kernel_choice.reason
    assert same_bits(answers[0][0], answers[1][0])
    assert same_bits(answers[0][1], answers[1][1])


def test_a_workspace_too_small_for_us_is_still_enough() -> None:
    inputs = build(Case())
    wrapper = fi_prefetch.BatchDecodeWithPagedKVCacheWrapper(
        guarded_workspace().tensor[: 1 << 16], inputs.case.layout, use_tensor_cores=True
    )
    plan(wrapper, inputs)
    assert wrapper.kernel_choice.kernel == "flashinfer"
    assert "workspace" in wrapper.kernel_choice.reason
    assert bool(torch.isfinite(wrapper.run(inputs.q, inputs.cache).float()).all())


@pytest.mark.parametrize("page", [1, 16])
def test_page_numbers_out_of_range_are_reported_on_request(page: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FI_PREFETCH_CHECK", "1")
    inputs = build(Case(page=page))
    wrapper = new_wrapper(inputs.case)
    plan(wrapper, inputs)
    run(wrapper, inputs)
    pages = inputs.k.shape[0]
    for position, bad in ((2, pages), (5, -1)):
        was = int(inputs.indices[position])
        inputs.indices[position] = bad
        with pytest.raises(ValueError, match=rf"indices: .*{bad} at position {position} "):
            run(wrapper, inputs)
        inputs.indices[position] = was
    run(wrapper, inputs)


@pytest.mark.parametrize("bad", [-1, -(2**31), 2**31 - 1, "pages"])
@pytest.mark.parametrize("page", [1, 16])
def test_page_numbers_out_of_range_lead_nowhere(page: int, bad: int | str) -> None:
    """Without the check: any answer for that request, the right one for the others, and no access outside the cache."""
    inputs = build(Case(lens=(100, 37, 64), page=page))
    wrapper = new_wrapper(inputs.case)
    plan(wrapper, inputs)
    expected, _ = run(wrapper, inputs)
    inputs.indices[int(inputs.indptr[1])] = inputs.k.shape[0] if bad == "pages" else bad
    out, _ = run(wrapper, inputs)
    assert same_bits(out[[0, 2]], expected[[0, 2]])


def test_patch_flashinfer_takes_effect_and_ends() -> None:
    theirs = flashinfer.BatchDecodeWithPagedKVCacheWrapper
    inputs = build(Case())
    with fi_prefetch.patch_flashinfer():
        wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(guarded_workspace().tensor, inputs.case.layout)
        plan(wrapper, inputs)
        run(wrapper, inputs)
    assert flashinfer.BatchDecodeWithPagedKVCacheWrapper is theirs


def test_planning_does_not_wait_for_the_gpu() -> None:
    """Planning while the GPU is busy for longer than planning may take."""
    inputs = build(Case(lens=(100,) * 256, page=1))
    wrapper = new_wrapper(inputs.case)
    plan(wrapper, inputs)
    torch.cuda.synchronize()
    busy = torch.cuda.Event()
    torch.cuda._sleep(2_000_000_000)  # cycles: about a second
    busy.record()
    plan(wrapper, inputs)
    assert not busy.query(), "plan() waited for the GPU"
    torch.cuda.synchronize()
