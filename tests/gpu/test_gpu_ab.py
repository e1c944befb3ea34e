"""Our kernel against FlashInfer's on the same tensors, over everything that a plan can say."""

from __future__ import annotations

import itertools

import pytest
from harness import Case, check

DTYPES = [("bf16", "bf16"), ("bf16", "e4m3"), ("bf16", "e5m2"), ("f16", "f16"), ("f16", "e4m3"), ("f16", "e5m2")]
PAGE_SIZES = (1, 2, 3, 5, 8, 16, 32, 64, 128)
HEAD_DIMS = (64, 128, 256)


def over(cases: list[Case]):
    """Parametrises a test over cases; each must be there once."""
    assert len(set(cases)) == len(cases)
    return pytest.mark.parametrize("case", cases, ids=str)


@over(
    [
        Case(lens=(129, 1, 40, 333), q=q, kv=kv, dim=dim, page=page, layout=layout)
        for (q, kv), dim, page, layout in itertools.product(DTYPES, HEAD_DIMS, PAGE_SIZES, ("NHD", "HND"))
    ]
)
def test_dtypes_head_dims_page_sizes_and_layouts(case: Case) -> None:
    check(case)


@over(
    [
        Case(lens=(70, 200, 513), heads=(2 * group, 2), q=q, kv=kv, dim=dim, page=page)
        for group, (q, kv), dim, page in itertools.product(
            range(1, 17), (("bf16", "bf16"), ("f16", "f16"), ("bf16", "e4m3")), HEAD_DIMS, (1, 16)
        )
    ]
)
def test_group_sizes(case: Case) -> None:
    check(case)


@over(
    [
        Case(
            lens=lens,
            heads=(group * heads, heads),
            q=q,
            kv=kv,
            dim=dim,
            page=page,
            blocks=blocks,
            listed=listed,
            **options,
        )
        for lens, heads, group, blocks in (
            ((900,) * 12, 8, 4, 4),
            ((900,) * 12, 32, 1, 12),
            ((1, 0, 1500, 16, 700, 31, 2000, 640) * 3, 8, 4, 3),
            ((40,) * 200, 4, 9, 2),
            ((600,) * 40, 32, 1, 0),
        )
        for q, kv, dim, page, listed in (
            ("bf16", "bf16", 128, 16, 0),
            ("f16", "f16", 64, 1, 0),
            ("f16", "f16", 64, 16, 64),
            ("bf16", "e4m3", 128, 64, 0),
            ("bf16", "e4m3", 128, 64, 64),
        )
        for options in ({}, {"window": 333, "sinks": True} if q == kv == "bf16" else {"layout": "HND"})
    ]
)
def test_heads_abreast(case: Case) -> None:
    """Pieces so long that neighbouring warps read neighbouring kv heads, and each meets others by itself; where tiles
    are copied whole, a block's eight keep step."""
    check(case)


@over(
    [
        Case(lens=(300, 77), heads=heads, q="bf16", kv=kv, page=page)
        for heads, kv, page in itertools.product(
            (
                (1, 1),
                (3, 1),
                (32, 8),
                (32, 32),
                (28, 4),
                (64, 8),
                (16, 2),
                (8, 1),
                (40, 8),
                (12, 12),
                (48, 4),
                (128, 8),
            ),
            ("bf16", "e4m3"),
            (1, 16),
        )
    ]
)
def test_heads_of_real_models(case: Case) -> None:
    check(case)


LENGTHS = (0, 1, 2, 7, 15, 16, 17, 31, 32, 33, 47, 61, 64, 127, 128, 129, 251, 256, 509, 1021, 1024, 2039, 4093, 8191)


@over(
    [
        Case(lens=(length,), kv=kv, page=page)
        for length, kv, page in itertools.product(LENGTHS, ("bf16", "e4m3"), (1, 3, 16, 64))
    ]
)
def test_one_request_of_every_length(case: Case) -> None:
    check(case)


@over(
    [
        Case(
            lens=(page - 1, page, page + 1, 2 * page - 1, 2 * page, 2 * page + 1, 7 * page), kv=kv, page=page, layout=n
        )
        for page, kv, n in itertools.product(PAGE_SIZES, ("bf16", "e4m3"), ("NHD", "HND"))
    ]
)
def test_page_boundaries(case: Case) -> None:
    check(case)


@over(
    [
        Case(lens=lens, heads=heads, kv=kv, page=page)
        for lens, heads, kv, page in itertools.product(
            ((131072,), (131071, 16), (131073,), (100003, 1, 0)),
            ((8, 8), (8, 1), (32, 8)),
            ("bf16", "e4m3"),
            (1, 16, 64),
        )
    ]
)
def test_long_requests(case: Case) -> None:
    check(case)


def batch_of(size: int, kind: str) -> tuple[int, ...]:
    if kind == "uniform":
        return (96,) * size
    if kind == "ragged":
        return tuple(1 + 37 * i % 251 for i in range(size))
    if kind == "holes":  # requests without KV, also first and last
        return tuple(0 if i % 3 == 0 or i == size - 1 else 50 + i % 70 for i in range(size))
    return (5000, *(3,) * (size - 1))  # skewed


@over(
    [
        Case(lens=batch_of(size, kind), kv=kv, page=page)
        for size, kind, kv, page in itertools.product(
            (2, 3, 7, 8, 31, 32, 33, 64, 65, 100, 256, 512), ("uniform", "ragged", "holes", "skewed"), ("bf16", "e4m3"),
            (1, 16),
        )
    ]
)  # fmt: skip
def test_batches(case: Case) -> None:
    check(case)


@over(
    [
        Case(lens=lens, page=page, kv=kv)
        for lens, page, kv in itertools.product(
            ((0,), (0, 0, 0), (0,) * 70, (0, 1), (1, 0), (0,) * 40 + (17,) + (0,) * 40), (1, 16), ("bf16", "e4m3")
        )
    ]
)
def test_batches_with_hardly_any_kv(case: Case) -> None:
    check(case)


@over(
    [
        Case(lens=(90, 16, 233), q=q, kv=kv, page=page, layout=layout, storage=storage, order=order)
        for storage, layout, page, (q, kv), order in itertools.product(
            ("one", "two", "strided", "swapped", "different_strides"),
            ("NHD", "HND"),
            (1, 3, 16),
            (("bf16", "bf16"), ("f16", "f16"), ("bf16", "e4m3")),
            ("sequential", "shuffled", "spread", "shared", "repeated"),
        )
    ]
)
def test_storage_and_page_order(case: Case) -> None:
    check(case)


# ---- features ------------------------------------------------------------------------------------------------------

WINDOWS = (0, 1, 14, 15, 16, 17, 31, 64, 127, 1000)


@over(
    [
        Case(lens=(1, 16, 70, 129, 700), dim=dim, kv=kv, page=page, window=window)
        for window, (dim, kv), page in itertools.product(
            WINDOWS, ((64, "bf16"), (128, "bf16"), (256, "bf16"), (128, "e4m3")), (1, 3, 16)
        )
    ]
)
def test_sliding_window(case: Case) -> None:
    check(case)


@over(
    [
        Case(lens=(1, 33, 257), dim=dim, page=page, cap=cap, window=window)
        for cap, dim, page, window in itertools.product((0.5, 30.0, 50.0), (128, 256), (1, 16), (-1, 64))
    ]
)
def test_soft_cap(case: Case) -> None:
    check(case)


@over(
    [
        Case(lens=(0, 1, 40, 700), heads=heads, dim=dim, q=q, kv=kv, window=window, sinks=True)
        for heads, dim, (q, kv), window in itertools.product(
            ((8, 8), (8, 2), (16, 2), (16, 1)),
            HEAD_DIMS,
            (("bf16", "bf16"), ("f16", "f16"), ("bf16", "e4m3")),
            (-1, 127),
        )
        # What FlashInfer is compiled for here, see test_sliding_window.
        if window < 0 or (q, kv) == ("bf16", "bf16")
    ]
)
def test_sinks(case: Case) -> None:
    check(case)


@over(
    [
        Case(lens=(q_len, 16, 100, 641), heads=(2 * group, 2), kv=kv, page=page, q_len=q_len)
        for group, q_len, kv, page in itertools.product(
            (1, 2, 3, 4, 5, 8), range(2, 17), ("bf16", "e4m3"), (1, 16)
        )
        if group * q_len <= 16 and (q_len <= 5 or q_len in (8, 16))
    ]
)  # fmt: skip
def test_several_query_tokens_a_request(case: Case) -> None:
    check(case)


@over(
    [
        Case(lens=(8, 20, 300), heads=(4, 2), page=page, q_len=q_len, window=window, cap=cap)
        for q_len, window, cap, page in itertools.product((2, 8), (-1, 0, 5, 64), (0.0, 30.0), (1, 16))
    ]
)
def test_several_query_tokens_with_window_and_cap(case: Case) -> None:
    check(case)


@over(
    [
        Case(lens=(q_len, 40, 333, 9000), heads=(2 * group, 2), q=q, kv=kv, dim=dim, position="ROPE_LLAMA", rope=rope,
             q_len=q_len)
        for (q, kv, dim), group, q_len, rope in itertools.product(
            (("bf16", "bf16", 64), ("bf16", "bf16", 128), ("bf16", "bf16", 256), ("f16", "f16", 128),
             ("bf16", "e4m3", 128)),
            (1, 4, 8), (1, 2), ((1.0, 1e4), (8.0, 5e5)),
        )
    ]
)  # fmt: skip
def test_rotary_positions(case: Case) -> None:
    check(case)


@over([Case(lens=(131072,), heads=(8, 2), kv=kv, position="ROPE_LLAMA", page=64) for kv in ("bf16", "e4m3")])
def test_rotary_positions_of_long_requests(case: Case) -> None:
    check(case)


@over(
    [
        Case(lens=(q_len, 40, 333, 900), heads=(heads, 2), q="bf16", kv=kv, position="ALIBI", q_len=q_len, sinks=sinks)
        for heads, kv, q_len, sinks in itertools.product((2, 6, 16), ("bf16", "e4m3"), (1, 2), (False, True))
    ]
)
def test_alibi(case: Case) -> None:
    check(case)


@over(
    [
        Case(q=q, kv=kv, scales=scales, sm_scale=sm_scale)
        for (q, kv), scales, sm_scale in itertools.product(
            DTYPES,
            ((0.5, None, None), (None, 1.7, None), (None, None, 0.25), (None, None, 1.0), (1.3, 0.6, 2.5)),
            (None, 0.2),
        )
    ]
)
def test_scales(case: Case) -> None:
    check(case)


@over(
    [
        Case(q=q, kv=q, o=o, heads=heads, page=page, scales=(None, None, v_scale))
        for (q, o), heads, page, v_scale in itertools.product(
            (("bf16", "f16"), ("f16", "bf16")), ((8, 8), (8, 2), (8, 1)), (1, 16), (None, 0.5)
        )
    ]
)
def test_output_dtype(case: Case) -> None:
    check(case)


@over([Case(lens=(64, 300), q="bf16", kv=kv, sm_scale=scale) for kv in ("bf16", "e4m3") for scale in (1.0, 3.0, 1e-3)])
def test_sharp_and_flat_softmax(case: Case) -> None:
    check(case)
