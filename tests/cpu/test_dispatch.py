"""Which kernel a plan gets, and why: a table over specs and GPUs, and tensors by their strides alone."""

from __future__ import annotations

import itertools

import pytest
import torch

from fi_prefetch import device, dispatch, jit
from fi_prefetch.dispatch import DecodeSpec, KernelChoice

H100 = device.describe("NVIDIA H100 80GB HBM3", (9, 0), 132, 50 << 20)
LLAMA = DecodeSpec(torch.bfloat16, torch.bfloat16, torch.bfloat16, 16, 32, 8, 128, 16)

SERVED = {
    "llama": {},
    "float16": {"dtype_q": torch.float16, "dtype_kv": torch.float16, "dtype_o": torch.float16},
    "output of another float": {"dtype_o": torch.float16},
    "e4m3 cache": {"dtype_kv": torch.float8_e4m3fn},
    "e5m2 cache": {"dtype_kv": torch.float8_e5m2, "dtype_q": torch.float16},
    "head_dim 64": {"head_dim": 64},
    "head_dim 256": {"head_dim": 256},
    "one kv head, 16 query heads": {"num_qo_heads": 16, "num_kv_heads": 1},
    "several query tokens": {"q_len_per_req": 4},
    "page_size 1": {"page_size": 1},
    "page_size 7": {"page_size": 7},
    "window": {"window_left": 4095},
    "soft cap": {"logits_soft_cap": 30.0},
    "rotary positions": {"pos_encoding_mode": "ROPE_LLAMA"},
    "rotary positions, soft cap and window": {
        "pos_encoding_mode": "ROPE_LLAMA",
        "logits_soft_cap": 30.0,
        "window_left": 7,
    },
    "ALiBi": {"pos_encoding_mode": "ALIBI", "window_left": 7},
    "empty batch": {"batch_size": 0},
    "asked for by name": {"backend": "fi_prefetch"},
    "FlashInfer's way to say no fixed split": {"fixed_split_size": -1},
    "fixed split": {"fixed_split_size": 4},
    "no split": {"disable_split_kv": True},
    "fixed split in a CUDA graph, with rotary positions and a float8 cache": {
        "fixed_split_size": 4,
        "use_cuda_graph": True,
        "pos_encoding_mode": "ROPE_LLAMA",
        "dtype_kv": torch.float8_e4m3fn,
    },
    "causal as it is anyway": {"is_causal": False},
    "CUDA graph": {"use_cuda_graph": True},
}
UNSERVED = {
    "float8 queries": ({"dtype_q": torch.float8_e4m3fn}, "queries are torch.float8_e4m3fn"),
    "float32 queries": ({"dtype_q": torch.float32}, "queries are torch.float32"),
    "cache of another float": ({"dtype_kv": torch.float16}, "KV cache is torch.float16"),
    "NVFP4 cache": ({"dtype_kv": torch.uint8}, "KV cache is torch.uint8"),
    "float8 output": ({"dtype_o": torch.float8_e4m3fn}, "output is torch.float8_e4m3fn"),
    "int64 page table": ({"dtype_index": torch.int64}, "torch.int64, not int32"),
    "head_dim 512": ({"head_dim": 512}, "head_dim 512"),
    "head_dim 96": ({"head_dim": 96}, "head_dim 96"),
    "17 rows": ({"num_qo_heads": 17, "num_kv_heads": 1}, "17 rows"),
    "17 rows in a fixed split": ({"num_qo_heads": 17, "num_kv_heads": 1, "fixed_split_size": 4}, "17 rows"),
    "20 rows": ({"q_len_per_req": 5}, "20 rows"),
    "ALiBi under a soft cap": ({"pos_encoding_mode": "ALIBI", "logits_soft_cap": 30.0}, "'ALIBI' with logits_soft_cap"),
    "another backend": ({"backend": "fa2"}, "backend='fa2'"),
    "custom variant": ({"custom_variant": True}, "jit_args"),
    "a scale of each token and head": (
        {"use_token_head_sf": True, "dtype_kv": torch.float8_e4m3fn},
        "use_token_head_sf",
    ),
    "window to the right": ({"window_right": -1}, "window_right=-1"),
    "causal against its nature": ({"is_causal": True}, "is_causal=True"),
    "not causal": ({"is_causal": False, "q_len_per_req": 2}, "is_causal=False"),
}


@pytest.mark.parametrize("changes", SERVED.values(), ids=SERVED)
def test_served(changes):
    spec = LLAMA._replace(**changes)
    choice = dispatch.choose(spec, H100)
    assert choice.kernel == "fi_prefetch"
    assert spec.variant().name in choice.reason
    assert spec.variant() in jit.all_variants(fixed_split=spec.split_tokens is not None)


@pytest.mark.parametrize(("changes", "reason"), UNSERVED.values(), ids=UNSERVED)
def test_unserved(changes, reason):
    choice = dispatch.choose(LLAMA._replace(**changes), H100)
    assert choice.kernel == "flashinfer"
    assert reason in choice.reason


@pytest.mark.parametrize(
    ("capability", "served"),
    [
        ((7, 5), False),
        ((8, 0), True),
        ((8, 9), True),
        ((9, 0), True),
        ((10, 0), True),
        ((11, 0), False),
        ((12, 0), True),
    ],
)
def test_compute_capability(capability, served):
    facts = device.describe("a GPU", capability, 80, 40 << 20)
    choice = dispatch.choose(LLAMA, facts)
    assert (choice.kernel == "fi_prefetch") == served
    assert served or f"{capability[0]}.{capability[1]}" in choice.reason


def test_without_a_gpu():
    for changes in SERVED.values():
        assert dispatch.choose(LLAMA._replace(**changes), None).kernel == "reference"
    assert dispatch.choose(LLAMA._replace(pos_encoding_mode="ALIBI"), None).kernel == "reference"
    for changes in (
        {"custom_variant": True}, {"dtype_kv": torch.uint8}, {"window_right": 1}, {"is_causal": True},
        {"use_token_head_sf": True},
    ):  # fmt: skip
        choice = dispatch.choose(LLAMA._replace(**changes), None)
        assert choice.kernel == "none" and choice.reason


def test_every_variant_is_reachable():
    floats = (torch.bfloat16, torch.float16)
    reached = {
        LLAMA._replace(
            dtype_q=dtype, dtype_kv=kv or dtype, dtype_o=out, head_dim=head_dim, window_left=window,
            logits_soft_cap=cap, pos_encoding_mode=mode, fixed_split_size=split,
        ).variant()
        for dtype, kv, out, head_dim, window, cap, mode, split in itertools.product(
            floats, (None, torch.float8_e4m3fn, torch.float8_e5m2), floats, (64, 128, 256), (-1, 0), (0.0, 30.0),
            ("NONE", "ROPE_LLAMA", "ALIBI"), (None, 4),
        )
        if (mode, cap) != ("ALIBI", 30.0)
    }  # fmt: skip
    assert reached == {*jit.all_variants(), *jit.all_variants(fixed_split=True)}


@pytest.mark.parametrize(
    ("scale", "theta", "served"),
    [(1.0, 1e4, True), (1e-3, 1.0, True), (1e6, 1e12, True), (0.0, 1e4, False), (1.0, 0.5, False),
     (-1.0, 1e4, False), (float("nan"), 1e4, False), (1.0, float("inf"), False)],
)  # fmt: skip
def test_rotary_frequencies(scale, theta, served):
    reason = dispatch.rope_obstacle(scale, theta)
    assert (reason is None) == served
    assert served or f"rope_scale={scale} and rope_theta={theta}" in reason


def test_workspace():
    choice = KernelChoice("fi_prefetch", "serves")
    assert dispatch.check_workspace(choice, 1000, 1000) is choice
    short = dispatch.check_workspace(choice, 1001, 1000)
    assert short.kernel == "flashinfer"
    assert "1000" in short.reason and "1001" in short.reason


def cache(*shape: int, strides: tuple[int, ...] | None = None, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    """A tensor with strides and no memory."""
    if strides is None:
        return torch.empty(shape, dtype=dtype, device="meta")
    return torch.empty_strided(shape, strides, dtype=dtype, device="meta")


@pytest.mark.parametrize(
    ("k", "v"),
    [
        (cache(100, 16, 8, 128), cache(100, 16, 8, 128)),
        (cache(100, 16, 8, 128), cache(100, 16, 8, 128, strides=(2 * 16384, 1024, 128, 1))),
        (cache(100, 16, 8, 64, dtype=torch.float8_e4m3fn), cache(100, 16, 8, 64, dtype=torch.float8_e4m3fn)),
        # 80 GB and more, contiguous.
        (cache(3_000_000, 16, 8, 128), cache(3_000_000, 16, 8, 128)),
        # One head, one token a page: the strides of these dimensions say nothing.
        (cache(9, 1, 1, 128, strides=(128, 3, 5, 1)), cache(9, 1, 1, 128, strides=(128, 3, 5, 1))),
        # Every page the same one.
        (cache(9, 16, 8, 128, strides=(0, 1024, 128, 1)), cache(9, 16, 8, 128)),
    ],
)
def test_caches_our_kernel_reads(k, v):
    assert dispatch.cache_obstacle(k, v) is None


@pytest.mark.parametrize(
    ("k", "v", "reason"),
    [
        (cache(0, 16, 8, 128), cache(0, 16, 8, 128), "no pages"),
        # 160 GiB in steps of 16 bytes.
        (
            cache(5_000_000, 16, 8, 128, strides=(16384 + 8, 1024, 128, 1)),
            cache(5_000_000, 16, 8, 128),
            "units of 16 bytes",
        ),
    ],
)
def test_caches_our_kernel_does_not_read(k, v, reason):
    assert reason in dispatch.cache_obstacle(k, v)


@pytest.mark.parametrize(
    ("step", "unit", "most_pages"),
    [
        (40, 16, (1 << 36) // 80 + 1),  # 80 bytes from page to page
        (24, 16, (1 << 36) // 48 + 1),
        (64, 128, (1 << 39) // 128),
    ],
)
def test_offsets_of_32_bits_end_where_they_do(step, unit, most_pages):
    """The unit is the greatest power of two that divides all strides; the last page's offset is below 2^32 of them."""
    last = cache(most_pages, 1, 1, 8, strides=(step, 8, 8, 1))
    assert dispatch.cache_obstacle(last, last) is None
    beyond = cache(most_pages + 1, 1, 1, 8, strides=(step, 8, 8, 1))
    assert f"units of {unit} bytes" in dispatch.cache_obstacle(beyond, beyond)


@pytest.mark.parametrize(
    ("k", "v", "name"),
    [
        (cache(10, 16, 8, 128), cache(10, 16, 8, 128, strides=(16384, 1028, 128, 1)), "v_cache"),
        (cache(10, 16, 8, 128, strides=(16385, 1024, 128, 1)), cache(10, 16, 8, 128), "k_cache"),
    ],
)
def test_caches_no_kernel_reads(k, v, name):
    with pytest.raises(ValueError, match=rf"paged_kv_cache \({name}\): expected strides of multiples of 16 bytes, got"):
        dispatch.cache_obstacle(k, v)


def test_addresses():
    memory = torch.zeros(4096, dtype=torch.bfloat16)
    aligned = memory[: 2 * 1024].view(2, 2, 4, 128)
    shifted = memory[4 : 4 + 2 * 1024].view(2, 2, 4, 128)
    assert dispatch.cache_obstacle(aligned, aligned) is None
    for k, v in ((aligned, shifted), (shifted, aligned)):
        with pytest.raises(ValueError, match="paged_kv_cache: expected a start on a multiple of 16 bytes, got"):
            dispatch.cache_obstacle(k, v)
    assert dispatch.query_is_aligned(memory[8:1032].view(2, 4, 128))
    assert not dispatch.query_is_aligned(memory[2:1026].view(2, 4, 128))
    assert not dispatch.query_is_aligned(memory.as_strided((2, 4, 128), (1024, 132, 1)))
    assert dispatch.query_is_aligned(memory.as_strided((1, 4, 128), (1025, 128, 1)))


@pytest.mark.parametrize(
    ("name", "key", "ceiling", "nominal"),
    [
        ("NVIDIA H100 80GB HBM3", "h100", 3050.0, False),
        ("NVIDIA H100 PCIe", "h100", None, False),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", "h100", None, False),
        ("NVIDIA H200", "h200", 4500.0, False),
        ("NVIDIA H20", "h20", 4000.0, True),
        ("NVIDIA GH200 480GB", "gh200", None, False),
        ("NVIDIA A100-SXM4-80GB", "a100", None, False),
        ("NVIDIA GeForce RTX 4090", "geforce-rtx-4090", None, False),
    ],
)
def test_gpu_names(name, key, ceiling, nominal):
    facts = device.describe(name, (9, 0), 132, 50 << 20)
    assert (facts.key, facts.read_ceiling_gbs, facts.ceiling_is_nominal) == (key, ceiling, nominal)


def test_facts_of_the_cpu():
    assert device.facts(torch.device("cpu")) is None


@pytest.mark.parametrize(
    ("changes", "tokens"),
    [
        ({}, None),
        ({"fixed_split_size": -1}, None),
        ({"fixed_split_size": 0}, None),
        ({"fixed_split_size": 4}, 64),
        ({"fixed_split_size": 4, "page_size": 1}, 4),
        ({"disable_split_kv": True}, dispatch.WHOLE_REQUEST),
        ({"fixed_split_size": 4, "disable_split_kv": True}, dispatch.WHOLE_REQUEST),
    ],
)
def test_split_tokens(changes, tokens):
    """FlashInfer's planner, too, takes a size below 1 for none, and lets disable_split_kv win."""
    spec = LLAMA._replace(page_size=16)._replace(**changes)
    assert spec.split_tokens == tokens
    assert spec.variant().fixed_split == (tokens is not None)
