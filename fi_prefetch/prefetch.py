"""What to prefetch, and how far: the policy a user chooses, and the plan it becomes for one launch.

A prefetch competes for L2 with everything else in flight, so every plan keeps to a budget: the bytes that all warps
together may have asked for and not yet used,

    blocks * warps * (run_ahead + prologue) * tile_bytes <= budget.

Everything here is arithmetic on numbers, without a GPU.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from typing import Literal, NamedTuple

MIB = 1 << 20
# Each one promises what those before it do.
READY_CODES = {"nothing": 0, "page_table": 1, "all_but_last_token": 2, "plan": 3}

# Up to this much KV a call, the first tiles' latency is a visible part of the call, and the prologue hides it; one tile
# a warp hides as much as two.
PROLOGUE_KV_BYTES = 512 * MIB
PROLOGUE_TILES = 1
# Blocks of a planned call begin to prefetch as soon as they run, while others of the call before still read. Of what a
# warp will read, in tiles rounded up, an eighth is then worth bringing, and of little a quarter: 1 to 3 % more than one
# tile of 90 to 256 MB, 1 % of 32 MB of fp8; twice as much costs 1 to 8 % of up to 64 MB (H200, back to back). In layers
# there is less time before the wait: it costs 0.6 to 0.9 us there of 128 to 256 MB, and nothing of less.
PLANNED_PROLOGUE_SHARE = 1 / 8
PLANNED_PROLOGUE_SHARE_OF_LITTLE = 1 / 4
LITTLE_PROLOGUE_BYTES = 8 << 10
DEFAULT_L2_FRACTION = 0.5


@dataclass(frozen=True)
class PrefetchPolicy:
    """Which prefetch levers a wrapper may use.

    Attributes:
        run_ahead: tiles beyond a warp's pipeline to prefetch into L2 in the main loop; "auto" chooses.
        prologue: tiles a warp prefetches into L2 before it waits for the kernel before it; "auto" chooses. Never more
            than it knows the page numbers of by then: four where a kv head has at most eight query rows and positions
            are not rotary, else two.
        early_load: start real loads before that wait, where the wrapper's `ready` promises that this is safe, and
            leave the prologue out; "auto" does not.
        streaming_hint: load KV so that it leaves L2 first; "auto" does so.
        l2_budget: what prefetches may hold of L2, as bytes (int) or as a fraction of L2 in [0, 1] (float).
    """

    run_ahead: int | Literal["auto"] = "auto"
    prologue: int | Literal["auto"] = "auto"
    early_load: bool | Literal["auto"] = "auto"
    streaming_hint: bool | Literal["auto"] = "auto"
    l2_budget: int | float = DEFAULT_L2_FRACTION

    def __post_init__(self) -> None:
        for name in ("run_ahead", "prologue"):
            value = getattr(self, name)
            if value != "auto" and (isinstance(value, bool) or not isinstance(value, int) or value < 0):
                raise ValueError(f'{name}: expected "auto" or a number of tiles >= 0, got {value!r}')
        for name in ("early_load", "streaming_hint"):
            value = getattr(self, name)
            if value != "auto" and not isinstance(value, bool):
                raise ValueError(f'{name}: expected "auto", True or False, got {value!r}')
        budget_bytes(self.l2_budget, 0)

    @classmethod
    def named(cls, name: str) -> PrefetchPolicy:
        """The policy called "auto", "off" or "paper"; ValueError for any other name."""
        if name not in NAMED_POLICIES:
            raise ValueError(f"prefetch policy: expected one of {', '.join(sorted(NAMED_POLICIES))}, got {name!r}")
        return NAMED_POLICIES[name]

    @classmethod
    def parse(cls, text: str) -> PrefetchPolicy:
        """The policy that a text names: a policy's name, or "key=value" pairs joined by commas.

        Keys are this class's fields; those left out keep their defaults. "run_ahead=2,prologue=auto,l2_budget=0.25".
        """
        text = text.strip()
        if "=" not in text:
            return cls.named(text)
        values: dict[str, object] = {}
        for pair in text.split(","):
            key, equals, value = (part.strip() for part in pair.partition("="))
            if not equals or key not in _READERS:
                raise ValueError(f"prefetch policy: expected {_FORMAT}, got {pair.strip()!r} in {text!r}")
            try:
                values[key] = _READERS[key](value.lower())
            except (KeyError, ValueError):
                raise ValueError(f"prefetch policy: expected {_FORMAT}, got {value!r} for {key}") from None
        return cls(**values)  # type: ignore[arg-type]

    @classmethod
    def of(cls, policy: PrefetchPolicy | str | None) -> PrefetchPolicy:
        """A wrapper's policy: the argument, else the environment's FI_PREFETCH_POLICY, else "auto"."""
        if policy is None:
            policy = os.environ.get("FI_PREFETCH_POLICY") or "auto"
        if isinstance(policy, str):
            return cls.parse(policy)
        if not isinstance(policy, cls):
            raise TypeError(f"prefetch: expected a PrefetchPolicy, a policy's text or None, got {policy!r}")
        return policy


def budget_bytes(budget: int | float, l2_bytes: int) -> int:
    """A budget in bytes: an int is bytes already, a float a fraction of `l2_bytes`. Never more than L2 holds.

    Raises ValueError for a negative budget, or a fraction above 1.
    """
    if isinstance(budget, bool) or not isinstance(budget, (int, float)):
        raise ValueError(f"l2_budget: expected bytes (int) or a fraction of L2 (float), got {budget!r}")
    if isinstance(budget, float):
        if not 0.0 <= budget <= 1.0:
            raise ValueError(f"l2_budget: expected a fraction between 0.0 and 1.0, got {budget!r}")
        return int(budget * l2_bytes)
    if budget < 0:
        raise ValueError(f"l2_budget: expected a number of bytes >= 0, got {budget!r}")
    return min(budget, l2_bytes)


NAMED_POLICIES = {
    "auto": PrefetchPolicy(),
    "off": PrefetchPolicy(run_ahead=0, prologue=0, early_load=False, streaming_hint=False),
    # The paper's lever alone: the next tile into L2 while this one is computed on.
    "paper": PrefetchPolicy(run_ahead=1, prologue=0, early_load=False, streaming_hint=False),
}

_SWITCH = {"1": True, "true": True, "on": True, "0": False, "false": False, "off": False}
_READERS = {
    "run_ahead": lambda text: text if text == "auto" else int(text),
    "prologue": lambda text: text if text == "auto" else int(text),
    "early_load": lambda text: text if text == "auto" else _SWITCH[text],
    "streaming_hint": lambda text: text if text == "auto" else _SWITCH[text],
    "l2_budget": lambda text: float(text) if "." in text else int(text),
}
_FORMAT = (
    'one of auto, off, paper, or "key=value,..." with run_ahead and prologue (tiles or auto), early_load and '
    "streaming_hint (0, 1 or auto), l2_budget (bytes, or a fraction of L2 such as 0.5)"
)


def stretch_tiles(query_rows: int, rotary: bool) -> int:
    """Tiles whose page numbers a warp loads at once: csrc/row_copies.cuh's RowCopies::kStretch.

    Args:
        query_rows: of a kv head, group size times query tokens a request.
        rotary: whether the kernel encodes rotary positions.
    """
    return 4 if query_rows <= 8 and not rotary else 2


class LaunchFacts(NamedTuple):
    """One launch, as far as prefetching cares.

    Attributes:
        blocks, warps: thread blocks, and warps in each.
        stages: tiles a warp's shared-memory pipeline holds.
        tile_bytes: K and V of one tile (16 tokens of one kv head).
        kv_bytes: upper bound of the KV the call reads; None where nobody knows, as in a CUDA graph.
        l2_bytes, sm_count: of the GPU.
        ready: what the wrapper's user promises is final when the kernel starts.
        batch_size: requests.
        fixed_split: whether it is the batch-invariant kernel, which starts with the dependency wait and brings
            nothing into L2 ahead.
        stretch_tiles: tiles whose page numbers a warp loads at once, and so the most that a prologue reaches.
    """

    blocks: int
    warps: int
    stages: int
    tile_bytes: int
    kv_bytes: int | None
    l2_bytes: int
    sm_count: int
    ready: str = "nothing"
    batch_size: int = 1
    fixed_split: bool = False
    stretch_tiles: int = 4

    @property
    def guesses(self) -> bool:
        """Whether the kernel reads the page table before the dependency wait: it can if that is final, or if every
        thread of a block can compare one request's entry afterwards."""
        return self.ready != "nothing" or self.batch_size <= 32 * self.warps


@dataclass(frozen=True)
class PrefetchPlan:
    """What was chosen for one launch, in tiles and bytes, and why.

    Attributes:
        run_ahead, prologue: tiles a warp; `early_load`, `streaming_hint`: on or off.
        ready: what the wrapper's user promises is final when the kernel starts.
        pdl: whether the launch is a programmatic dependent one.
        budget_bytes: what prefetches may hold of L2; `demand_bytes`: what this plan can hold at most.
        bytes_in_flight_per_sm: what the pipelines of an SM keep in flight without any prefetch.
        reason: a sentence a lever.
    """

    run_ahead: int
    prologue: int
    early_load: bool
    streaming_hint: bool
    ready: str
    pdl: bool
    facts: LaunchFacts
    budget_bytes: int
    demand_bytes: int
    bytes_in_flight_per_sm: int
    reason: str

    def codes(self) -> list[int]:
        """The kernel's `prefetch` argument."""
        return [
            self.run_ahead,
            self.prologue,
            int(self.early_load),
            READY_CODES[self.ready],
            int(self.streaming_hint),
        ]


def resolve(policy: PrefetchPolicy, facts: LaunchFacts, pdl: bool) -> PrefetchPlan:
    """The plan a policy becomes for one launch, with programmatic dependent launch or without.

    Asked-for distances shrink to what the budget and the work allow: no warp prefetches more tiles than it will read,
    and before the wait no more than it knows the pages of. Run-ahead gives way before the prologue does.
    """
    budget = budget_bytes(policy.l2_budget, facts.l2_bytes)
    tile_of_every_warp = facts.blocks * facts.warps * facts.tile_bytes
    affordable = budget // tile_of_every_warp if tile_of_every_warp else 0
    tiles_per_warp = affordable + facts.stages  # as good as any number
    if facts.kv_bytes is not None:
        tiles_per_warp = -(-facts.kv_bytes // tile_of_every_warp) if tile_of_every_warp else 0
    in_flight = facts.warps * -(-facts.blocks // facts.sm_count) * facts.stages * facts.tile_bytes
    limits = f"budget {budget / MIB:.2f} MiB is {affordable} tiles a warp"
    if facts.kv_bytes is not None:
        limits += f"; a warp reads at most {tiles_per_warp}"

    early_load, why_early_load = _resolve_early_load(policy, facts, pdl)
    asked, why = _asked_prologue(policy, facts, pdl)
    prologue = min(asked, affordable, tiles_per_warp, facts.stretch_tiles)
    within = limits
    if prologue < min(affordable, tiles_per_warp):
        within = f"before the wait a warp knows the pages of {facts.stretch_tiles} tiles"
    reasons = [f"prologue {prologue}: {why}" + (f", {within}" if prologue < asked else "")]

    asked, why = _asked_run_ahead(policy, facts, in_flight)
    run_ahead = max(0, min(asked, affordable - prologue, tiles_per_warp - facts.stages))
    reasons.append(f"run-ahead {run_ahead}: {why}" + (f", {limits}" if run_ahead < asked else ""))

    reasons.append(f"early load {'on' if early_load else 'off'}: {why_early_load}")

    streaming = bool(policy.streaming_hint)
    why = "a call reads its KV once" if policy.streaming_hint == "auto" else "the policy says so"
    reasons.append(f"streaming hint {'on' if streaming else 'off'}: {why}")

    return PrefetchPlan(
        run_ahead=run_ahead,
        prologue=prologue,
        early_load=early_load,
        streaming_hint=streaming,
        ready=facts.ready,
        pdl=pdl,
        facts=facts,
        budget_bytes=budget,
        demand_bytes=tile_of_every_warp * (run_ahead + prologue),
        bytes_in_flight_per_sm=in_flight,
        reason="; ".join(reasons),
    )


_STARTS_WITH_THE_WAIT = "the batch-invariant kernel starts with the dependency wait"
_BRINGS_NOTHING_AHEAD = "the batch-invariant kernel brings nothing into L2 ahead"


def _kv_text(facts: LaunchFacts) -> str:
    return "unknown KV" if facts.kv_bytes is None else f"{facts.kv_bytes / MIB:.1f} MiB of KV"


def _asked_prologue(policy: PrefetchPolicy, facts: LaunchFacts, pdl: bool) -> tuple[int, str]:
    if not pdl:
        return 0, "without programmatic dependent launch there is no wait to prefetch before"
    if facts.fixed_split:
        return 0, _STARTS_WITH_THE_WAIT
    if not facts.guesses:
        return 0, f"nothing is promised, and {facts.batch_size} requests are more than a block can check afterwards"
    if policy.prologue != "auto":
        return policy.prologue, "the policy says so"
    if facts.kv_bytes is None:
        return PROLOGUE_TILES, "a CUDA graph may be replayed on little KV, where the first tiles' latency shows"
    kv = _kv_text(facts)
    if facts.ready == "plan":
        of_warp = facts.kv_bytes / max(facts.blocks * facts.warps, 1)
        part = max(
            of_warp * PLANNED_PROLOGUE_SHARE, min(of_warp * PLANNED_PROLOGUE_SHARE_OF_LITTLE, LITTLE_PROLOGUE_BYTES)
        )
        return math.ceil(part / facts.tile_bytes), f"planned once, and a warp reads {of_warp / 1024:.0f} KiB of {kv}"
    if facts.kv_bytes > PROLOGUE_KV_BYTES:
        return 0, f"{kv} is over {PROLOGUE_KV_BYTES // MIB} MiB, the first tiles' latency is a small part"
    return PROLOGUE_TILES, f"{kv} is at most {PROLOGUE_KV_BYTES // MIB} MiB, the first tiles' latency shows"


def _asked_run_ahead(policy: PrefetchPolicy, facts: LaunchFacts, in_flight: int) -> tuple[int, str]:
    if facts.fixed_split:
        return 0, _BRINGS_NOTHING_AHEAD
    if policy.run_ahead != "auto":
        return policy.run_ahead, "the policy says so"
    # Measured from 24 to 192 KiB in flight an SM, on 132 and on 80 SMs of an H200 (map.json): it never pays.
    return 0, f"{in_flight >> 10} KiB in flight an SM; a pipeline gains nothing by asking twice"


def _resolve_early_load(policy: PrefetchPolicy, facts: LaunchFacts, pdl: bool) -> tuple[bool, str]:
    if policy.early_load == "auto":
        # Back to back it mostly saves up to 1.1 us more than the prologue (H200, prefetch.json). In layers it gets in
        # the way of the kernel before and of the queries that it has just written: up to 1.3 us slower (layer.json).
        return False, "in a model's layers the prologue is faster"
    if not policy.early_load:
        return False, "the policy says so"
    if not pdl:
        return False, "without programmatic dependent launch there is no wait to load before"
    if facts.fixed_split:
        return False, _STARTS_WITH_THE_WAIT
    if READY_CODES[facts.ready] < READY_CODES["all_but_last_token"]:
        return False, f'ready is "{facts.ready}"'
    return True, "the policy says so"
