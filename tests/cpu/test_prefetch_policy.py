"""The prefetch policy and the plan it becomes: properties over random launches, and the cases that have names."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fi_prefetch.prefetch import (
    MIB,
    NAMED_POLICIES,
    PROLOGUE_KV_BYTES,
    PROLOGUE_TILES,
    READY_CODES,
    LaunchFacts,
    PrefetchPolicy,
    budget_bytes,
    resolve,
    stretch_tiles,
)

tiles = st.one_of(st.just("auto"), st.integers(0, 1000))
budgets = st.one_of(st.integers(0, 1 << 32), st.floats(0.0, 1.0))
policies = st.builds(
    PrefetchPolicy,
    run_ahead=tiles,
    prologue=tiles,
    early_load=st.sampled_from((True, False, "auto")),
    streaming_hint=st.sampled_from((True, False, "auto")),
    l2_budget=budgets,
)
launches = st.builds(
    LaunchFacts,
    blocks=st.integers(1, 1024),
    warps=st.integers(1, 8),
    stages=st.integers(2, 8),
    tile_bytes=st.sampled_from([2048, 4096, 8192, 16384]),
    kv_bytes=st.integers(0, 1 << 37),
    l2_bytes=st.integers(1 << 20, 128 << 20),
    sm_count=st.integers(1, 160),
    ready=st.sampled_from(sorted(READY_CODES)),
    batch_size=st.integers(1, 600),
    fixed_split=st.booleans(),
    stretch_tiles=st.sampled_from([2, 4]),
)
H100 = LaunchFacts(132, 8, 3, 8192, 32 * MIB, 50 * MIB, 132)


@given(policies, launches, st.booleans())
def test_never_over_budget(policy, launch, pdl):
    plan = resolve(policy, launch, pdl)
    demand = launch.blocks * launch.warps * (plan.run_ahead + plan.prologue) * launch.tile_bytes
    assert plan.demand_bytes == demand <= plan.budget_bytes <= launch.l2_bytes
    assert plan.run_ahead >= 0 and plan.prologue >= 0


def test_no_run_ahead_with_fixed_splits():
    asked = PrefetchPolicy(run_ahead=1)
    assert resolve(asked, H100._replace(kv_bytes=1 << 33), pdl=True).run_ahead == 1
    plan = resolve(asked, H100._replace(kv_bytes=1 << 33, fixed_split=True), pdl=True)
    assert plan.run_ahead == 0
    assert "run-ahead 0: the batch-invariant kernel brings nothing into L2 ahead" in plan.reason


@given(st.integers(1, 40), st.integers(0, 40), st.integers(0, 40))
def test_run_ahead_has_what_the_prologue_leaves_of_the_budget(affordable, prologue, run_ahead):
    much = H100._replace(kv_bytes=1 << 33)
    budget = affordable * much.blocks * much.warps * much.tile_bytes
    policy = PrefetchPolicy(run_ahead, prologue, l2_budget=budget)
    plan = resolve(policy, much._replace(l2_bytes=2 * budget), pdl=True)
    assert plan.prologue == min(prologue, affordable, much.stretch_tiles)
    assert plan.run_ahead == min(run_ahead, affordable - plan.prologue)


def test_no_prologue_where_the_kernel_waits_before_it_looks():
    many = H100._replace(batch_size=257)
    plan = resolve(PrefetchPolicy(prologue=2), many, pdl=True)
    assert plan.prologue == 0 and "257 requests are more than a block can check" in plan.reason
    assert resolve(PrefetchPolicy(prologue=2), many._replace(batch_size=256), pdl=True).prologue == 2
    assert resolve(PrefetchPolicy(prologue=2), many._replace(ready="page_table"), pdl=True).prologue == 2


@given(policies, launches, st.booleans())
def test_never_more_than_there_is(policy, launch, pdl):
    plan = resolve(policy, launch, pdl)
    tiles_of_a_warp = -(-launch.kv_bytes // (launch.blocks * launch.warps * launch.tile_bytes))
    assert plan.prologue <= tiles_of_a_warp
    assert plan.run_ahead <= max(0, tiles_of_a_warp - launch.stages)
    assert plan.prologue <= launch.stretch_tiles


@pytest.mark.parametrize(
    ("query_rows", "rotary", "tiles"), [(1, False, 4), (8, False, 4), (9, False, 2), (16, True, 2), (8, True, 2)]
)
def test_no_prologue_beyond_the_page_numbers_that_are_known(query_rows, rotary, tiles):
    much = H100._replace(kv_bytes=1 << 33, stretch_tiles=stretch_tiles(query_rows, rotary))
    asked = PrefetchPolicy(prologue=5, l2_budget=1.0)
    plan = resolve(asked, much, pdl=True)
    assert plan.prologue == tiles
    assert f"before the wait a warp knows the pages of {tiles}" in plan.reason
    within = resolve(PrefetchPolicy(prologue=tiles, l2_budget=1.0), much, pdl=True)
    assert within.prologue == tiles and "before the wait" not in within.reason


@given(policies, launches, st.booleans(), st.integers(0, 1 << 32), st.integers(0, 1 << 32))
def test_monotone_in_the_budget(policy, launch, pdl, one, other):
    less, more = (
        resolve(PrefetchPolicy(policy.run_ahead, policy.prologue, True, policy.streaming_hint, budget), launch, pdl)
        for budget in sorted((one, other))
    )
    assert less.run_ahead <= more.run_ahead
    assert less.prologue <= more.prologue


@given(policies, launches)
def test_nothing_before_a_wait_that_is_not_there(policy, launch):
    plan = resolve(policy, launch, pdl=False)
    assert plan.prologue == 0 and not plan.early_load


@given(policies, launches, st.booleans())
def test_fixed_splits_bring_nothing_into_l2(policy, launch, pdl):
    plan = resolve(policy, launch._replace(fixed_split=True), pdl)
    assert plan.prologue == 0 and not plan.early_load
    if pdl:
        assert "prologue 0: the batch-invariant kernel starts with the dependency wait" in plan.reason
        if policy.early_load is True:
            assert "early load off: the batch-invariant kernel starts with the dependency wait" in plan.reason
    assert plan.run_ahead == plan.demand_bytes == 0
    # The hint is what it is without.
    without = resolve(policy, launch._replace(fixed_split=False), pdl)
    assert plan.streaming_hint == without.streaming_hint


@given(policies, launches, st.booleans())
def test_early_load_only_on_a_promise(policy, launch, pdl):
    allowed = pdl and launch.ready in ("all_but_last_token", "plan") and not launch.fixed_split
    assert resolve(policy, launch, pdl).early_load == (allowed and policy.early_load is True)


@given(launches, st.booleans())
def test_off_is_off(launch, pdl):
    run_ahead, prologue, early_load, _, streaming = resolve(PrefetchPolicy.named("off"), launch, pdl).codes()
    assert [run_ahead, prologue, early_load, streaming] == [0, 0, 0, 0]


@given(policies, launches, st.booleans())
def test_the_streaming_hint_is_on_where_it_is_asked_for(policy, launch, pdl):
    assert resolve(policy, launch, pdl).streaming_hint == (policy.streaming_hint in ("auto", True))


@given(policies, launches, st.booleans())
def test_codes(policy, launch, pdl):
    plan = resolve(policy, launch, pdl)
    run_ahead, prologue, early_load, ready, streaming = plan.codes()
    assert (run_ahead, prologue) == (plan.run_ahead, plan.prologue)
    assert early_load == plan.early_load and bool(streaming) == plan.streaming_hint
    assert READY_CODES[launch.ready] == ready


@pytest.mark.parametrize(("blocks", "on_an_sm"), [(1, 1), (132, 1), (133, 2), (264, 2)])
def test_what_is_in_flight_is_that_of_the_fullest_sm(blocks, on_an_sm):
    plan = resolve(PrefetchPolicy.named("auto"), H100._replace(blocks=blocks), pdl=True)
    assert plan.bytes_in_flight_per_sm == on_an_sm * H100.warps * H100.stages * H100.tile_bytes


def test_auto_follows_the_measurements():
    auto = PrefetchPolicy.named("auto")
    for launch, in_flight in ((H100, 192 << 10), (H100._replace(warps=1, stages=2), 16 << 10)):
        plan = resolve(auto, launch, pdl=True)
        assert plan.bytes_in_flight_per_sm == in_flight
        assert (plan.run_ahead, plan.prologue) == (0, PROLOGUE_TILES)
    # The prologue pays up to a size, and in a CUDA graph, which may be replayed on any size.
    for kv_bytes, prologue in (
        (1 * MIB, PROLOGUE_TILES),
        (PROLOGUE_KV_BYTES, PROLOGUE_TILES),
        (PROLOGUE_KV_BYTES + 1, 0),
        (None, PROLOGUE_TILES),
    ):
        plan = resolve(auto, H100._replace(kv_bytes=kv_bytes), pdl=True)
        assert (plan.prologue, plan.early_load, plan.streaming_hint) == (prologue, False, True), kv_bytes
    # In layers early load is slower than the prologue, whatever is promised.
    promise = H100._replace(ready="all_but_last_token")
    promised = resolve(auto, promise, pdl=True)
    assert (promised.early_load, promised.prologue) == (False, PROLOGUE_TILES)
    named = resolve(PrefetchPolicy(prologue=2, early_load=True), promise, pdl=True)
    assert (named.early_load, named.prologue) == (True, 2)


@pytest.mark.parametrize(
    ("tile_bytes", "megabytes", "prologue"),
    [
        (8192, 0, 0), (8192, 1, 1), (8192, 16, 1), (8192, 32, 1), (8192, 64, 1), (8192, 96, 2), (8192, 128, 2),
        (8192, 256, 3), (8192, 8192, 3),
        (4096, 16, 1), (4096, 32, 2), (4096, 64, 2), (4096, 128, 4), (4096, 8192, 4),
    ],
)  # fmt: skip
def test_auto_brings_more_before_a_planned_call(tile_bytes, megabytes, prologue):
    """An eighth of what a warp reads, of little a quarter; within the budget (3 tiles of 8 KB), and what is known."""
    planned = H100._replace(ready="plan", tile_bytes=tile_bytes, kv_bytes=megabytes * MIB)
    plan = resolve(PrefetchPolicy(), planned, pdl=True)
    assert plan.prologue == prologue
    assert "planned once, and a warp reads " in plan.reason
    assert resolve(PrefetchPolicy(prologue=0), planned, pdl=True).prologue == 0
    assert resolve(PrefetchPolicy(), planned._replace(kv_bytes=None), pdl=True).prologue == PROLOGUE_TILES


def test_the_paper_over_budget_shrinks_to_nothing():
    """264 blocks that each prefetch 192 KB ahead ask for more than L2 holds."""
    launch = LaunchFacts(264, 4, 3, 8192, 2 << 30, 50 * MIB, 132)
    plan = resolve(PrefetchPolicy(run_ahead=6, prologue=0), launch, pdl=False)
    assert plan.run_ahead == 3
    assert "budget" in plan.reason
    assert resolve(PrefetchPolicy(run_ahead=6, prologue=0, l2_budget=0.1), launch, pdl=False).run_ahead == 0
    assert resolve(PrefetchPolicy.named("paper"), launch, pdl=False).run_ahead == 1


def test_reasons_have_numbers():
    plan = resolve(PrefetchPolicy.named("auto"), H100, pdl=True)
    for part in (
        "prologue 1",
        "run-ahead 0",
        "early load off",
        "streaming hint on: a call reads",
        "32.0 MiB",
        "192 KiB",
    ):
        assert part in plan.reason
    promise = H100._replace(ready="all_but_last_token")
    promised = resolve(PrefetchPolicy(early_load=True, streaming_hint=True), promise, pdl=True)
    for part in ("prologue 1", "early load on: the policy says so", "streaming hint on: the policy says so"):
        assert part in promised.reason
    assert "early load off: in a model's layers" in resolve(PrefetchPolicy(), promise, pdl=True).reason
    # What cut a distance is named, and nothing else.
    cut = resolve(PrefetchPolicy(prologue=9), H100, pdl=True)
    limits = "budget 25.00 MiB is 3 tiles a warp; a warp reads at most 4; run-ahead"
    assert cut.prologue == 3 and f"prologue 3: the policy says so, {limits}" in cut.reason
    cut = resolve(PrefetchPolicy(prologue=9), H100._replace(stretch_tiles=2), pdl=True)
    limits = "before the wait a warp knows the pages of 2 tiles; run-ahead"
    assert cut.prologue == 2 and f"prologue 2: the policy says so, {limits}" in cut.reason


def test_empty_batch():
    plan = resolve(PrefetchPolicy(run_ahead=5, prologue=5), H100._replace(kv_bytes=0), pdl=True)
    assert plan.demand_bytes == 0


@pytest.mark.parametrize(
    ("text", "policy"),
    [
        ("auto", PrefetchPolicy()),
        (" off ", NAMED_POLICIES["off"]),
        ("paper", NAMED_POLICIES["paper"]),
        ("run_ahead=2,prologue=4", PrefetchPolicy(run_ahead=2, prologue=4)),
        ("run_ahead=auto, early_load=0", PrefetchPolicy(early_load=False)),
        ("streaming_hint=on,l2_budget=0.25", PrefetchPolicy(streaming_hint=True, l2_budget=0.25)),
        ("streaming_hint=0,l2_budget=1000000", PrefetchPolicy(streaming_hint=False, l2_budget=1000000)),
    ],
)
def test_texts(text, policy, monkeypatch):
    assert PrefetchPolicy.parse(text) == policy
    monkeypatch.setenv("FI_PREFETCH_POLICY", text)
    assert PrefetchPolicy.of(None) == policy
    assert PrefetchPolicy.of("off") == NAMED_POLICIES["off"]


@pytest.mark.parametrize(
    "text",
    ["fast", "run_ahead", "run_ahead=", "run_ahead=-1", "run_ahead=two", "depth=2", "early_load=2", "l2_budget=1.5",
     "early_load=often", "streaming_hint=often", "streaming_hint=2",
     "l2_budget=-1", "run_ahead=2 prologue=4", "auto,run_ahead=2"],
)  # fmt: skip
def test_bad_texts(text, monkeypatch):
    monkeypatch.setenv("FI_PREFETCH_POLICY", text)
    with pytest.raises(ValueError, match="expected"):
        PrefetchPolicy.of(None)


def test_environment_left_out(monkeypatch):
    monkeypatch.delenv("FI_PREFETCH_POLICY", raising=False)
    assert PrefetchPolicy.of(None) == PrefetchPolicy()
    monkeypatch.setenv("FI_PREFETCH_POLICY", "")
    assert PrefetchPolicy.of(None) == PrefetchPolicy()


@pytest.mark.parametrize(
    "fields", [{"run_ahead": -1}, {"prologue": 1.5}, {"run_ahead": True}, {"early_load": 1}, {"streaming_hint": 1},
               {"early_load": "often"}, {"streaming_hint": "often"},
               {"l2_budget": -1}, {"l2_budget": 1.01}, {"l2_budget": "half"}, {"l2_budget": True}]
)  # fmt: skip
def test_bad_fields(fields):
    with pytest.raises(ValueError, match=next(iter(fields))):
        PrefetchPolicy(**fields)


def test_wrong_type():
    with pytest.raises(TypeError, match="prefetch"):
        PrefetchPolicy.of(3)


def test_budget():
    assert budget_bytes(0.5, 100) == 50
    assert budget_bytes(30, 100) == 30
    assert budget_bytes(300, 100) == 100
    # One byte and all of L2.
    assert budget_bytes(1, 100) == 1 and budget_bytes(1.0, 100) == 100
