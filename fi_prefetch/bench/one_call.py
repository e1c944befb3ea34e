"""Calls for a profiler to look at, one by one: `python -m fi_prefetch.bench.one_call REQUEST ANSWER`."""

from __future__ import annotations

import functools
import gc
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from . import paper
from .baselines import BASELINES, Call, prepare_ours
from .environment import require_gpu
from .inputs import DecodeInputs, KvPool
from .shapes import Shape


def prepared(kernel: str, policy: str, inputs: DecodeInputs) -> Call:
    """A kernel's call by the names in a request; raises `baselines.Unsupported` where it does not serve the shape."""
    prepare: dict[str, Callable[[DecodeInputs], Call]] = {
        "fi_prefetch": lambda inputs: prepare_ours(inputs, policy, "plan")[1],
        "paper": functools.partial(paper.prepare, prefetch="off" if policy == "off" else "bulk"),
        "fa3": BASELINES["fa3"],
    }
    return prepare[kernel](inputs)


def main() -> None:
    """Makes every call of a request on every shape of it, as far as its time goes, each in a profiled range of its own.

    A range begins with a kernel that spins, by which the profiler's list of kernels is told apart; the profiler clears
    the caches before each kernel. The answer, which is written after every call, says which were made.
    """
    request, answer = json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2])
    start = time.monotonic()
    facts, shapes = require_gpu(), [Shape.from_row(row) for row in request["shapes"]]
    made: list[tuple[int, str]] = []
    missing: list[tuple[int, str, str]] = []
    pool: KvPool | None = None
    for number, shape in enumerate(shapes):
        if request["budget_seconds"] and time.monotonic() - start > request["budget_seconds"]:
            break
        dtype = getattr(torch, shape.kv_dtype)
        if pool is None or pool.values.dtype != dtype:
            pool = None
            gc.collect()
            largest = max(other.allocated_bytes for other in shapes if other.kv_dtype == shape.kv_dtype)
            pool = KvPool(largest, dtype, torch.device("cuda"))
        inputs = DecodeInputs(shape, pool, facts.l2_bytes, copies=1)
        for name, kernel, policy in request["calls"]:
            try:
                call = prepared(kernel, policy, inputs)
                call(0)  # what a first call does besides is not looked at
                torch.cuda.synchronize()
            except Exception as error:
                missing.append((number, name, f"{type(error).__name__}: {error}".split("\n")[0][:300]))
            else:
                torch.cuda.profiler.start()
                torch.cuda._sleep(1)
                call(0)
                torch.cuda.synchronize()
                torch.cuda.profiler.stop()
                made.append((number, name))
            answer.write_text(json.dumps({"made": made, "missing": missing}))


if __name__ == "__main__":
    main()
