"""How a call is timed: a CUDA graph of back-to-back calls over rotating caches, replayed, the median taken.

A graph takes the host out of the measurement. Rotating over caches that together are several times L2 makes every call
find its KV in HBM, as a decode step does, in which the other layers' KV and weights pass between two uses.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass

import torch

# The caches rotated over hold at least this many times L2, so that none of a cache is left when its turn comes again.
L2_MULTIPLE = 4
# A replay should last at least this long, so that the two events around it do not show.
REPLAY_US = 1500.0
REPLAYS = 21
MAX_CALLS = 2000


@dataclass(frozen=True)
class Timing:
    """Time of one call in microseconds: the median over replays, and how far the replays lie apart.

    `spread` is (90th - 10th percentile) / median.
    """

    us: float
    spread: float


def copies_needed(cache_bytes: int, l2_bytes: int, memory_bytes: int) -> int:
    """How many caches of `cache_bytes` to rotate over: at least two, at most what fits `memory_bytes`.

    Raises ValueError where not even two fit: with one, part of it could still be in L2.
    """
    wanted = max(2, -(-L2_MULTIPLE * l2_bytes // max(1, cache_bytes)))
    fit = memory_bytes // max(1, cache_bytes)
    if fit < 2:
        raise ValueError(f"two caches of {cache_bytes} bytes are needed and {memory_bytes} bytes are free")
    return min(wanted, fit)


def calls_per_replay(estimate_us: float, copies: int) -> int:
    """Calls in one graph: whole rounds over the caches that last REPLAY_US, at most MAX_CALLS but always one round."""
    rounds = max(1, -(-int(REPLAY_US) // max(1, int(estimate_us * copies))))
    return copies * max(1, min(rounds, MAX_CALLS // copies))


def summarise(samples_us: list[float]) -> Timing:
    """The Timing of per-call times, one of each replay."""
    if len(samples_us) < 2:
        return Timing(samples_us[0], 0.0)
    deciles = statistics.quantiles(samples_us, n=10, method="inclusive")
    median = statistics.median(samples_us)
    return Timing(median, (deciles[8] - deciles[0]) / median)


def capture(calls: Callable[[], None]) -> torch.cuda.CUDAGraph:
    """Runs `calls` once to warm up, then captures them into a graph, both on a side stream."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        calls()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        calls()
    return graph


def time_graph(graph: torch.cuda.CUDAGraph, calls: int, replays: int = REPLAYS) -> Timing:
    """Time of one of the `calls` in `graph`."""
    for _ in range(2):
        graph.replay()
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(replays + 1)]
    marks[0].record()
    for mark in marks[1:]:
        graph.replay()
        mark.record()
    torch.cuda.synchronize()
    return summarise([a.elapsed_time(b) * 1000.0 / calls for a, b in zip(marks[:-1], marks[1:], strict=True)])


def time_calls(call: Callable[[int], object], copies: int, replays: int = REPLAYS) -> Timing:
    """Time of `call(i)`, which works on cache i of `copies`. With one copy the KV stays in L2 where it fits: warm."""
    for _ in range(2):
        call(0)
    torch.cuda.synchronize()
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    for i in range(min(copies, 8)):
        call(i)
    end.record()
    torch.cuda.synchronize()
    calls = calls_per_replay(start.elapsed_time(end) * 1000.0 / min(copies, 8), copies)

    def all_calls() -> None:
        for i in range(calls):
            call(i % copies)

    return time_graph(capture(all_calls), calls, replays)
