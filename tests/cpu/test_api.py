"""The wrapper's surface against FlashInfer's, by signature: what a new release adds has to fail here, loudly."""

from __future__ import annotations

import ast
import inspect
import re
import textwrap
import warnings
from pathlib import Path

import flashinfer.decode
import pytest
import torch

import fi_prefetch

THEIRS = flashinfer.decode.BatchDecodeWithPagedKVCacheWrapper
OURS = fi_prefetch.BatchDecodeWithPagedKVCacheWrapper
ADDED = {"prefetch": None, "ready": "nothing"}
# What 0.7.4 brought, with its defaults; on older releases ours has it too, and refuses another value.
NEWEST = {"jit_kwargs": None, "use_token_head_sf": False}

# All that FlashInfer 0.6.14 to 0.7.4 have in public. A name that is not here has not been thought about: does it work
# while our kernel serves the plan?
KNOWN_PUBLIC = {
    "begin_forward", "end_forward", "forward", "forward_return_lse", "is_cuda_graph_enabled", "plan",
    "prewarm_paged_kv_stride_variant", "reset_workspace_buffer", "resolved_backend", "run", "run_return_lse",
    "use_tensor_cores", "workspace_size",
}  # fmt: skip
# What fast_decode_plan takes in these releases; a new one may have to reach our kernel.
KNOWN_FAST_PLAN = {
    "self", "indptr", "indices", "last_page_len", "num_qo_heads", "num_kv_heads", "head_dim", "page_size",
    "pos_encoding_mode", "window_left", "logits_soft_cap", "q_data_type", "kv_data_type", "data_type", "sm_scale",
    "rope_scale", "rope_theta", "non_blocking", "fixed_split_size", "disable_split_kv", "q_len_per_req",
    "global_override_indptr_cpu",
}  # fmt: skip


def parameters(function) -> dict[str, inspect.Parameter]:
    return dict(inspect.signature(function).parameters)


def their_plan() -> dict[str, inspect.Parameter]:
    """Since 0.7, `plan` itself takes what it hands on, and the names are those of what it hands it to."""
    return parameters(getattr(THEIRS, "_plan_impl", THEIRS.plan))


def test_release():
    version = tuple(int(part) for part in flashinfer.__version__.split(".")[:3])
    assert (0, 6, 14) <= version < (0, 7, 5), "supported are 0.6.14 to 0.7.4; look at what is new and extend this test"


@pytest.mark.parametrize("name", ["BatchDecodeWithPagedKVCacheWrapper", "CUDAGraphBatchDecodeWithPagedKVCacheWrapper"])
def test_constructors(name):
    theirs, ours = getattr(flashinfer.decode, name), getattr(fi_prefetch, name)
    assert issubclass(ours, theirs)
    expected, got = parameters(theirs.__init__), parameters(ours.__init__)
    shared = [p for p in got.values() if p.name not in ADDED and (p.name in expected or p.name not in NEWEST)]
    assert [(p.name, p.default, p.kind) for p in shared] == [(p.name, p.default, p.kind) for p in expected.values()]
    added = {p.name: p.default for p in got.values() if p.name not in expected}
    assert added == ADDED | ({"jit_kwargs": None} if "jit_kwargs" in set(got) - set(expected) else {})
    assert all(got[name].kind is inspect.Parameter.KEYWORD_ONLY for name in ADDED)


def test_plan():
    expected, got = their_plan(), parameters(OURS.plan)
    assert set(expected) <= set(got), f"new in FlashInfer's plan: {set(expected) - set(got)}"
    for name, parameter in expected.items():
        assert got[name].default == parameter.default, name
    required = [name for name, p in expected.items() if p.default is inspect.Parameter.empty]
    assert list(got)[: len(required)] == required
    assert got["use_token_head_sf"].default is NEWEST["use_token_head_sf"]


def test_plan_takes_the_deprecated_positions():
    """0.6 has these arguments in plain, 0.7 takes them in the same order and warns."""
    legacy = getattr(flashinfer.decode, "_BATCH_DECODE_PLAN_LEGACY_POS_ARGS", None)
    if legacy is None:
        legacy = [name for name, p in their_plan().items() if p.default is not inspect.Parameter.empty]
    positional = [
        name
        for name, p in parameters(OURS.plan).items()
        if p.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD and p.default is not inspect.Parameter.empty
    ]
    assert positional == list(legacy)


def test_plan_aliases():
    assert OURS.begin_forward is OURS.plan
    # What FlashInfer 0.7 calls from its fast_decode_plan.
    assert OURS._plan_impl is OURS.plan


@pytest.mark.parametrize("name", ["run", "forward", "forward_return_lse", "reset_workspace_buffer", "workspace_size"])
def test_methods(name):
    if not hasattr(THEIRS, name):
        assert name == "workspace_size" and flashinfer.__version__.startswith("0.6")
        return
    expected, got = parameters(getattr(THEIRS, name)), parameters(getattr(OURS, name))
    assert [(p.name, p.default, p.kind) for p in got.values()] == [
        (p.name, p.default, p.kind) for p in expected.values()
    ]


def test_nothing_public_is_unknown():
    public = {name for name in vars(THEIRS) if not name.startswith("_")}
    assert public <= KNOWN_PUBLIC, f"new in FlashInfer's wrapper: {public - KNOWN_PUBLIC}"
    assert all(hasattr(OURS, name) for name in KNOWN_PUBLIC)


def test_run_return_lse_is_ours():
    assert vars(OURS)["run_return_lse"].func is OURS.run


def test_fast_decode_plan_is_known():
    assert set(parameters(flashinfer.decode.fast_decode_plan)) <= KNOWN_FAST_PLAN


def attributes_read(function) -> set[str]:
    """Names X of `self.X` that a function reads, other than those it sets or asks for with getattr."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(inspect.unwrap(function))))
    nodes = [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "self"
    ]
    return {node.attr for node in nodes if isinstance(node.ctx, ast.Load)}


@pytest.mark.parametrize("tensor_cores", [False, True])
def test_attributes_that_fast_decode_plan_reads(batch, tensor_cores):
    wrapper = OURS(torch.zeros(1024, dtype=torch.uint8), use_tensor_cores=tensor_cores)
    wrapper.plan(*batch.table, *batch.shape, **batch.dtypes)
    read = attributes_read(flashinfer.decode.fast_decode_plan)
    assert {"_cached_module", "_backend", "device"} <= read
    missing = {name for name in read if not hasattr(wrapper, name)} - {"_auto_prefers_cudnn"}
    assert not missing


def test_no_warning_on_import_or_plan(batch):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        wrapper = OURS(torch.zeros(1024, dtype=torch.uint8))
        wrapper.plan(*batch.table, *batch.shape, "NONE", -1, None, torch.float32)
        wrapper.run(batch.q, batch.cache)


def test_package():
    assert fi_prefetch.__version__
    for name in fi_prefetch.__all__:
        assert getattr(fi_prefetch, name) is not None
    assert set(fi_prefetch.__all__) <= set(dir(fi_prefetch))
    with pytest.raises(AttributeError, match="nothing_like_this"):
        _ = fi_prefetch.nothing_like_this


def arguments_in_the_readme() -> set[str]:
    """What the first column of the README's table of arguments names."""
    readme = (Path(__file__).resolve().parents[2] / "README.md").read_text()
    table = readme.split("### Argument by argument")[1].split("\n## ")[0]
    rows = [line.split("|")[1:4] for line in table.splitlines() if line.startswith("| `")]
    assert all(len(row) == 3 and re.search(r"ours|FlashInfer|above", row[1]) and "::test_" in row[2] for row in rows)
    return {name for row in rows for name in re.findall(r"`(\w+)`", row[0])}


def test_the_readme_says_of_every_argument_who_serves_it():
    functions = (THEIRS.__init__, getattr(THEIRS, "_plan_impl", THEIRS.plan), THEIRS.run)
    theirs = {name for function in functions for name in parameters(function)} - {"self"}
    ours = {name for function in (OURS.__init__, OURS.plan, OURS.run) for name in parameters(function)} - {"self"}
    said = arguments_in_the_readme()
    assert theirs <= said, f"new in FlashInfer, and nobody says who serves it: {theirs - said}"
    assert said == ours - set(ADDED), "the table names what no release has"
