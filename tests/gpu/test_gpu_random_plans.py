"""Random plans: whatever the combination, our answer is as close to the truth as FlashInfer's, twice the same."""

from __future__ import annotations

from harness import Case, check
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

# (q, kv, head_dim, sliding window, soft cap) for which both sides are compiled by the other tests.
COMPILED = [
    *[(q, kv, dim, False, False) for q, kv in (("bf16", "bf16"), ("f16", "f16")) for dim in (64, 128, 256)],
    *[(q, kv, 128, False, False) for q, kv in (("bf16", "e4m3"), ("bf16", "e5m2"), ("f16", "e4m3"), ("f16", "e5m2"))],
    *[("bf16", "bf16", dim, True, False) for dim in (64, 128, 256)],
    *[("bf16", "bf16", dim, window, True) for dim in (128, 256) for window in (False, True)],
]
EXAMPLES = 200


@st.composite
def cases(draw: st.DrawFn) -> Case:
    q, kv, dim, window, cap = draw(st.sampled_from(COMPILED))
    q_len = draw(st.sampled_from((1, 1, 1, 2, 4)))
    group = draw(st.integers(1, 16 // q_len))
    heads_kv = draw(st.integers(1, 8))
    length = st.one_of(st.integers(q_len, 40), st.integers(q_len, 3000))
    if q_len == 1:
        length = st.one_of(st.just(0), length)
    return Case(
        lens=tuple(draw(st.lists(length, min_size=1, max_size=40))),
        heads=(group * heads_kv, heads_kv),
        dim=dim,
        page=draw(st.integers(1, 130)),
        q=q,
        kv=kv,
        layout=draw(st.sampled_from(("NHD", "HND"))),
        storage=draw(st.sampled_from(("one", "two", "strided", "swapped", "different_strides"))),
        order=draw(st.sampled_from(("sequential", "shuffled", "spread", "shared", "repeated"))),
        window=draw(st.integers(0, 3000)) if window else -1,
        cap=draw(st.sampled_from((1.0, 30.0))) if cap else 0.0,
        sinks=draw(st.booleans()),
        q_len=q_len,
        seed=draw(st.integers(0, 1000)),
    )


@settings(
    max_examples=EXAMPLES, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck), print_blob=True
)
@given(case=cases())
def test_random_plans(case: Case) -> None:
    check(case)
