"""The grid of a launch: how many warps a block, how many blocks an SM, and how little work is worth a warp.

A grid only decides speed. The best one depends on the GPU and on how many bytes of KV a call reads; the built-in table
serves the GPUs it was measured on and is a good guess on others, and `fi-prefetch tune` measures one for this GPU:

    <cache folder>/fi_prefetch/tuned/<gpu>.json
    {"version": "0.1.0", "gpu": "NVIDIA H200", "rules": [
        {"kv_bytes": 67108864, "warps": 8, "blocks_per_sm": 1, "min_tiles_per_warp": 0}, ...]}

A rule holds for calls of at most its `kv_bytes` of KV; the last one has none and holds for the rest.
"""

from __future__ import annotations

import functools
import json
import logging
import math
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

logger = logging.getLogger("fi_prefetch")

MIB = 1 << 20


@dataclass(frozen=True)
class Grid:
    """Attributes:
    warps: a block, 1 to 8; fewer where shared memory does not hold them.
    blocks_per_sm: blocks of the launch for every SM.
    min_tiles_per_warp: with less work than this for every warp, fewer blocks take part, whose partials merge faster; 0:
        the kernel chooses, from the lengths it finds.
    """

    warps: int
    blocks_per_sm: int
    min_tiles_per_warp: int

    def __post_init__(self) -> None:
        for name, least, most in (("warps", 1, 8), ("blocks_per_sm", 1, 4), ("min_tiles_per_warp", 0, 1 << 16)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
                raise ValueError(f"{name}: expected {least} to {most}, got {value!r}")


@dataclass(frozen=True)
class Rule:
    """A grid for calls of at most `kv_bytes` of KV; None: of any size."""

    kv_bytes: int | None
    grid: Grid


# Eight warps on every SM were best, or within 1 % of it, at every size (H100).
BUILT_IN = (Rule(None, Grid(8, 1, 0)),)


def grid_for(rules: Sequence[Rule], kv_bytes: int | None) -> Grid:
    """The first rule's grid that holds for a call of `kv_bytes`; of the smallest calls where that is not known.

    A call whose size nobody knows is one in a CUDA graph. On more KV than was thought the small calls' grid costs
    little; on less, the large ones' costs a visible part of the call.
    """
    return next(r.grid for r in rules if r.kv_bytes is None or (0 if kv_bytes is None else kv_bytes) <= r.kv_bytes)


def tuned_file(gpu_key: str) -> Path:
    """Where `fi-prefetch tune` leaves what it found for a GPU."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / "fi_prefetch" / "tuned" / f"{gpu_key}.json"


def read_rules(path: Path) -> tuple[Rule, ...]:
    """The rules of a file.

    Raises ValueError, with the file's name, where it is not one that `write_rules` made.
    """
    try:
        rules = tuple(
            Rule(entry["kv_bytes"], Grid(entry["warps"], entry["blocks_per_sm"], entry["min_tiles_per_warp"]))
            for entry in json.loads(path.read_text())["rules"]
        )
        sizes = [rule.kv_bytes for rule in rules]
        if not sizes or sizes[-1] is not None or None in sizes[:-1] or sizes[:-1] != sorted(sizes[:-1]):
            raise ValueError("expected rules by growing kv_bytes, the last one's null")
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: not a file of tuned grids: {error}; delete it or run `fi-prefetch tune`") from error
    return rules


def write_rules(path: Path, rules: Iterable[Rule], **about: str) -> None:
    """Writes rules, and what they are about (gpu=, version=), whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps({**about, "rules": [{"kv_bytes": r.kv_bytes, **asdict(r.grid)} for r in rules]}, indent=1)
    temporary = path.with_suffix(f".{os.getpid()}")
    temporary.write_text(text + "\n")
    temporary.replace(path)


@functools.cache
def rules_for(gpu_key: str) -> tuple[Rule, ...]:
    """What was tuned for a GPU, else the built-in table. Read once a process.

    Nothing was tuned for a user without a home, or with one that may not be read, as in some containers.
    """
    try:
        path = tuned_file(gpu_key)
        return read_rules(path) if path.is_file() else BUILT_IN
    except (OSError, RuntimeError) as error:
        logger.warning("no tuned grids: %s", error)
        return BUILT_IN


CANDIDATES = tuple(
    Grid(warps, blocks_per_sm, min_tiles)
    for warps, blocks_per_sm in ((8, 1), (6, 1), (4, 1), (4, 2), (2, 4))
    for min_tiles in (0, 1, 4)
)


def best_rules(times_us: dict[int, dict[Grid, list[float]]]) -> tuple[Rule, ...]:
    """Rules from measurements: for every size the grid with the smallest geometric mean over its shapes.

    Args:
        times_us: by bytes of KV, by grid, the times of the shapes of that size in one order.

    Neighbouring sizes with the same grid share a rule, and a grid within 1 % of the best keeps the neighbour's, so that
    noise makes no rules.
    """
    rules: list[Rule] = []
    for kv_bytes in sorted(times_us):
        mean = {
            grid: math.exp(sum(map(math.log, times)) / len(times))
            for grid, times in times_us[kv_bytes].items()
            if times
        }
        if not mean:
            continue
        grid = min(mean, key=mean.__getitem__)
        if rules and mean.get(rules[-1].grid, math.inf) <= 1.01 * mean[grid]:
            grid = rules.pop().grid
        rules.append(Rule(kv_bytes, grid))
    if not rules:
        raise ValueError("times_us: expected at least one measurement")
    return (*rules[:-1], Rule(None, rules[-1].grid))


def tune(
    shapes: dict[int, Sequence[object]],
    measure: Callable[[object, Grid], float | None],
    candidates: Sequence[Grid] = CANDIDATES,
    on_progress: Callable[[int, object, Grid, float | None], None] = lambda *_: None,
) -> tuple[Rule, ...]:
    """Measures every candidate on every shape.

    Args:
        shapes: by bytes of KV, what `measure` takes.
        measure: microseconds of a call; None where the grid does not fit the GPU.
        on_progress: called after each measurement.
    """
    times: dict[int, dict[Grid, list[float]]] = {}
    for kv_bytes, group in shapes.items():
        for grid in candidates:
            measured = []
            for shape in group:
                us = measure(shape, grid)
                on_progress(kv_bytes, shape, grid, us)
                measured.append(us)
            if None not in measured:
                times.setdefault(kv_bytes, {})[grid] = measured
    return best_rules(times)
