"""The measuring process: takes a job, measures its rows one by one, and reports what it does as it does it.

It runs apart from the process that keeps the result file (runner.py), because a kernel under test may end the process
that runs it: with a device error that nothing in it survives, with a crash, or by never coming back. All kernels of a
row are measured in one process.
"""

from __future__ import annotations

import functools
import gc
import importlib
import json
import os
import re
import sys
import traceback
from collections.abc import Callable
from typing import Any, TextIO, TypeVar

import torch

from fi_prefetch.jit import sources_hash

from . import environment
from .ceiling import read_ceiling_gbs
from .inputs import KvPool, pool_bytes
from .shapes import Shape

T = TypeVar("T")

EVENTS_FD_VARIABLE = "FI_PREFETCH_BENCH_EVENTS"
# Kinds of result file, and the modules whose `measure(spec, context)` gives a row of one.
KINDS = {
    "grid": "fi_prefetch.bench.grid",
    "prefetch": "fi_prefetch.bench.prefetch",
    "layer": "fi_prefetch.bench.layer",
    "window": "fi_prefetch.bench.window",
    "map": "fi_prefetch.bench.paper",
    "plan_time": "fi_prefetch.bench.plan_time",
    "tuning": "fi_prefetch.bench.tuning",
}
MEMORY_SHARE = 0.7
# An output further from the truth than this is wrong, and its time says nothing: far above what rounding does.
LARGEST_ERROR = 0.05
DEAD_DEVICE_EXIT = 3


class WrongAnswer(Exception):
    """A kernel ran and its output is not the attention that was asked for."""


def reason_of(error: Exception) -> str:
    """An error's first line, for a result file: without the folder that FlashInfer's sources were compiled in."""
    line = f"{type(error).__name__}: {error}".strip().split("\n")[0]
    return re.sub(r"/\S*/\.cache(?=/flashinfer/)", "<cache>", line)[:300]


class Context:
    """What measuring a row needs: the GPU's facts, the read ceiling, KV pools, and who to tell.

    Attributes:
        facts: of the GPU.
        read_ceiling_gbs: that of the file's header: measured in this process, or by one that was before it.
        options: the job's.
    """

    def __init__(self, job: dict[str, Any], events: TextIO) -> None:
        self.options: dict[str, Any] = job["options"]
        self._specs: list[dict[str, Any]] = job["specs"]
        self._skip = {(number, name): reason for number, name, reason in job["skip"]}
        self._events = events
        self._row = -1
        self._pool: KvPool | None = None
        self.facts = environment.require_gpu()
        self.emit("stage", name="reading the ceiling")
        self.read_ceiling_gbs: float = job["read_ceiling_gbs"] or read_ceiling_gbs(self.facts.sm_count)
        # The sources' hash tells kernels apart where no commit does: in an installed package, or beside changes.
        about: dict[str, Any] = {**environment.header(), "sources": sources_hash()}
        self.emit("header", header={**about, "read_ceiling_gbs": round(self.read_ceiling_gbs, 1)})

    def emit(self, kind: str, **fields: Any) -> None:
        """Tells the runner."""
        print(json.dumps({"event": kind, **fields}), file=self._events, flush=True)

    def start_row(self, number: int) -> None:
        """Everything from here on belongs to the job's row `number`."""
        self._row = number
        self.emit("row_started", row=number)

    def attempt(self, name: str, action: Callable[[], T]) -> tuple[T | None, str | None]:
        """What `action` returns, or None and why not. A device error ends the process, and the runner goes on."""
        if (self._row, name) in self._skip:
            return None, self._skip[self._row, name]
        self.emit("kernel_started", row=self._row, name=name)
        try:
            value = action()
            torch.cuda.synchronize()
            return value, None
        except Exception as error:
            traceback.print_exc()
            reason = reason_of(error)
            self._stop_if_the_device_is_dead(name, reason)
            return None, reason

    def _stop_if_the_device_is_dead(self, name: str, reason: str) -> None:
        try:
            torch.cuda.synchronize()
            torch.zeros(1, device="cuda").add_(1).item()
        except Exception:
            self.emit("kernel_failed", row=self._row, name=name, reason=reason)
            sys.stderr.flush()
            os._exit(DEAD_DEVICE_EXIT)

    def pool(self, kv_dtype: str) -> KvPool:
        """Random KV values of a dtype, enough for every row of the job; one dtype at a time."""
        dtype = getattr(torch, kv_dtype)
        if self._pool is None or self._pool.values.dtype != dtype:
            self._pool = None
            gc.collect()
            torch.cuda.empty_cache()
            shapes = [Shape.from_row(spec) for spec in self._specs if spec.get("kv_dtype") == kv_dtype]
            free, _ = torch.cuda.mem_get_info()
            fewest = self.options.get("fewest_copies", 2)
            capacity = pool_bytes(shapes, self.facts.l2_bytes, int(free * MEMORY_SHARE), fewest)
            self._pool = KvPool(capacity, dtype, torch.device("cuda"))
        return self._pool

    def floor_us(self, kv_bytes: int) -> float:
        """The time in which HBM can be read at the ceiling."""
        return kv_bytes / self.read_ceiling_gbs / 1e3


def check_error(error: float) -> float:
    """`error`, where it can be rounding; raises WrongAnswer where it cannot."""
    if not error <= LARGEST_ERROR:
        raise WrongAnswer(f"relative error {error:.3g}")
    return error


def main() -> None:
    """Reads a job from standard input and measures it; events go to the file descriptor that the environment names.

    The job is one line. A second one, after the header has gone out, says which rows need no measuring, and which read
    ceiling the file's floors are of: an earlier run's, where one goes on.
    """
    job = json.loads(sys.stdin.readline())
    descriptor = int(os.environ[EVENTS_FD_VARIABLE])
    os.set_inheritable(descriptor, False)  # a compiler left running must not keep the runner waiting for more events
    with os.fdopen(descriptor, "w") as events:
        context = Context(job, events)
        measure = importlib.import_module(KINDS[job["kind"]]).measure
        answer = json.loads(sys.stdin.readline())
        done, context.read_ceiling_gbs = set(answer["done"]), answer["read_ceiling_gbs"]
        for number, spec in enumerate(job["specs"]):
            if number in done:
                continue
            context.start_row(number)
            row, reason = context.attempt("", functools.partial(measure, spec, context))
            if row is None:
                context.emit("row_failed", row=number, reason=reason)
            else:
                context.emit("row", row=number, content=row)
            gc.collect()
        context.emit("finished")


if __name__ == "__main__":
    main()
