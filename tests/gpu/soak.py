"""A million calls: two streams, graphs of hundreds of calls each, another plan before every replay.

A stream has two wrappers (bf16 in pages of one, fp8 in pages of 16) that take turns on one workspace. Before every
replay both are planned for another of a few batches, whose answers were held against the reference beforehand; after
it, every one of the graph's answers must be the same bits. Outputs are NaN before a replay, guard bytes surround the
workspaces, counters are zero at the end, and neither the GPU's nor the host's memory may grow.

Run it through `fi-prefetch check`, or by itself: `python tests/gpu/soak.py --calls 1000000`. Its last line says how
many calls gave the right bits, and how many did not.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

import harness
import torch
from harness import DTYPES, Guarded
from random_plans import Memory, Shape, Step, cache_pages, case_of, truth

import fi_prefetch

STREAMS = 2
CALLS_A_GRAPH = 400
TABLES = 24
BATCH = 8
LONGEST = 600
HOST_GROWTH = 32 << 20  # bytes: what an allocator on the host may keep
DRIVER_GROWTH = 4 << 20  # bytes of the GPU, beside PyTorch's, which may not grow at all
QUEUED = 16  # replays a stream, before the host waits

SHAPES = (
    Shape(page=1, heads_kv=2, group=4),
    Shape(("bf16", "e4m3", "bf16", 128, False, False), page=16, heads_kv=2, group=4),
)
KINDS = ("any", "one long", "many empty", "geometric", "tiles", "equal")


class Part:
    """One wrapper of a stream: its batches, their right answers, and its share of the graph's outputs."""

    def __init__(self, shape: Shape, workspace: torch.Tensor, calls: int, tables: int, seed: int) -> None:
        device = workspace.device
        steps = [Step(BATCH, KINDS[i % len(KINDS)], LONGEST, seed=seed + i) for i in range(tables)]
        cases = [case_of(step, shape, BATCH * LONGEST) for step in steps]
        assert all(len(case.lens) == BATCH for case in cases)
        pages = max(map(cache_pages, cases))

        def buffer(size: int) -> torch.Tensor:
            return torch.zeros(size, dtype=torch.int32, device=device)

        self.wrapper = fi_prefetch.BatchDecodeWithPagedKVCacheWrapper(
            workspace,
            use_cuda_graph=True,
            paged_kv_indptr_buffer=buffer(BATCH + 1),
            paged_kv_indices_buffer=buffer(pages),
            paged_kv_last_page_len_buffer=buffer(BATCH),
        )
        memory = Memory(cases[0], pages, device)
        # One cache for all batches, every slot of it a number: it must not change while graphs replay.
        for number, view in enumerate((memory.k, memory.v)):
            view.copy_(harness.random_values(tuple(view.shape), view.dtype, device, seed + number))
        self.q = harness.random_values((BATCH, cases[0].heads[0], cases[0].dim), DTYPES[cases[0].q], device, seed + 2)
        self.cache = memory.cache
        self.inputs = []
        for case in cases:
            kept = memory.k.clone(), memory.v.clone()
            inputs = memory.load(case)  # for its page table; its contents are not wanted
            memory.k.copy_(kept[0])
            memory.v.copy_(kept[1])
            inputs.q = self.q
            self.inputs.append(inputs)
        self.out = torch.empty(calls, *self.q.shape, dtype=self.q.dtype, device=device)
        self.expected = torch.stack([self._answer(inputs) for inputs in self.inputs])

    def _answer(self, inputs: harness.Inputs) -> torch.Tensor:
        """Our answer for one batch, once the reference has agreed."""
        harness.plan(self.wrapper, inputs)
        assert self.wrapper.kernel_choice.kernel == "fi_prefetch", self.wrapper.kernel_choice.reason
        out = self.wrapper.run(self.q, self.cache)
        expected = truth(inputs)
        assert bool(((out.float() - expected.out).abs() <= expected.out_error).all()), f"wrong: {inputs.case}"
        return out

    def call(self, number: int) -> None:
        self.wrapper.run(self.q, self.cache, out=self.out[number])

    def plan(self, table: int) -> None:
        harness.plan(self.wrapper, self.inputs[table])

    def poison(self) -> None:
        self.out.view(torch.int16).fill_(-1)

    def wrong(self, table: int) -> torch.Tensor:
        """How many of the graph's answers are not the right bits; waits for nothing."""
        off = self.out.view(torch.int16) != self.expected[table].view(torch.int16)
        return off.flatten(1).any(1).sum()


class Lane:
    """A stream with its workspace, its two wrappers and its graph, in which they take turns."""

    def __init__(self, number: int, calls: int, tables: int, device: torch.device) -> None:
        self.workspace = Guarded((24 << 20,), torch.uint8, device)
        self.parts = [
            Part(shape, self.workspace.tensor, calls // len(SHAPES), tables, 1000 * number + 100 * i)
            for i, shape in enumerate(SHAPES)
        ]
        self.wrong = torch.zeros((), dtype=torch.int64, device=device)
        self.calls = sum(len(part.out) for part in self.parts)
        self.stream = self.graph = None
        if device.type == "cuda":
            self.stream = torch.cuda.Stream()
            self.stream.wait_stream(torch.cuda.current_stream())
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.stream(self.stream):
                self._all_calls()
                self.graph.capture_begin()
                self._all_calls()
                self.graph.capture_end()

    def _all_calls(self) -> None:
        for number in range(len(self.parts[0].out)):
            for part in self.parts:
                part.call(number)

    def turn(self, number: int) -> None:
        """New plans, one replay, and a look at every answer."""
        if self.stream is None:
            self._turn(number)
            return
        with torch.cuda.stream(self.stream):
            self._turn(number)

    def _turn(self, number: int) -> None:
        tables = [(number * (3 + 2 * i) + i) % len(part.inputs) for i, part in enumerate(self.parts)]
        for part, table in zip(self.parts, tables, strict=True):
            part.plan(table)
            part.poison()
        if self.graph is None:
            self._all_calls()
        else:
            self.graph.replay()
        for part, table in zip(self.parts, tables, strict=True):
            self.wrong += part.wrong(table)


def host_bytes() -> int:
    """Resident memory of this process."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def gpu_bytes(device: torch.device) -> dict[str, int]:
    if device.type != "cuda":
        return {}
    free, total = torch.cuda.mem_get_info()
    return {"reserved": torch.cuda.memory_reserved(), "allocated": torch.cuda.memory_allocated(), "taken": total - free}


def soak(
    calls: int, device: torch.device = harness.DEVICE, calls_a_graph: int = CALLS_A_GRAPH, tables: int = TABLES
) -> dict[str, Any]:
    """What happened in `calls` calls or a few more."""
    lanes = [Lane(number, calls_a_graph, tables, device) for number in range(STREAMS)]
    turns = -(-calls // sum(lane.calls for lane in lanes))

    def synchronize() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize()

    def go(first: int, count: int) -> None:
        for number in range(first, first + count):
            for lane in lanes:
                lane.turn(number)
            if number % QUEUED == 0:
                synchronize()
        synchronize()

    warm = max(1, min(turns // 10, 2 * tables))
    go(0, warm)  # every allocator has what it wants
    before, host_before, start = gpu_bytes(device), host_bytes(), time.monotonic()
    go(warm, max(turns - warm, 1))
    seconds = time.monotonic() - start
    grown = {name: value - before[name] for name, value in gpu_bytes(device).items()}
    host_grown = host_bytes() - host_before
    wrong = sum(int(lane.wrong) for lane in lanes)
    problems = []
    if wrong:
        problems.append(f"{wrong} answers have other bits")
    if any(value > (DRIVER_GROWTH if name == "taken" else 0) for name, value in grown.items()):
        problems.append(f"the GPU's memory grew: {grown}")
    if host_grown > HOST_GROWTH:
        problems.append(f"the host's memory grew by {host_grown} bytes")
    for number, lane in enumerate(lanes):
        if bool(lane.workspace.damaged()):
            problems.append(f"written outside the workspace of stream {number}")
        if any(bool(counters.any()) for part in lane.parts for counters in part.wrapper._counters):
            problems.append(f"a counter of stream {number} is not zero")
    made = (warm + max(turns - warm, 1)) * sum(lane.calls for lane in lanes)
    return {"calls": made, "wrong": wrong, "problems": problems, "seconds": seconds, "host_grown": host_grown}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--calls", type=int, default=1_000_000)
    options = parser.parse_args(arguments)
    result = soak(options.calls)
    for problem in result["problems"]:
        print(f"soak: {problem}", flush=True)
    failed = max(result["wrong"], len(result["problems"]))
    print(f"soak: {result['seconds']:.1f} s, the host's memory changed by {result['host_grown']} bytes", flush=True)
    print(f"soak: {result['calls'] - result['wrong']} passed, {failed} failed", flush=True)
    return min(failed, 1)


if __name__ == "__main__":
    sys.exit(main())
