"""Hardware counters of one call, with and without prefetch: the paper's columns, read by Nsight Compute.

A row of benchmarks/results/<gpu>/profile.json is a shape: `counters` has the columns by call, of which one is a kernel
under a policy ("fi_prefetch off", "paper on"), null where this GPU has no such counter; `missing` why there is none.
"""

from __future__ import annotations

import csv
import io
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .shapes import Shape

MARKER = "spin_kernel"  # the kernel of torch.cuda._sleep, before each call
TIMEOUT_SECONDS = 570

_STALLED = "smsp__average_warps_issue_stalled_long_scoreboard_per_issue_active.ratio"
_LATENCY = "smsp__average_warp_latency_per_inst_issued.ratio"


@dataclass(frozen=True)
class Column:
    """One column of the table: what it is called, the counter behind it, its unit.

    Of a call of several kernels a `summed` one is their sum, another their mean by duration.
    """

    name: str
    metric: str
    unit: str
    divisor: str | None = None
    scale: float = 1.0
    summed: bool = False

    @property
    def label(self) -> str:
        return f"{self.name}, {self.unit}"


COLUMNS = (
    Column("duration", "gpu__time_duration.sum", "us", scale=1e-3, summed=True),
    Column("L1 hit rate", "l1tex__t_sector_hit_rate.pct", "%"),
    Column("L2 hit rate", "lts__t_sector_hit_rate.pct", "%"),
    # The share of a warp's time between two instructions that it waits for a load from global memory or L2.
    Column("long-scoreboard stalls", _STALLED, "%", divisor=_LATENCY, scale=100.0),
    Column("compute throughput", "sm__throughput.avg.pct_of_peak_sustained_elapsed", "%"),
    Column("memory throughput", "gpu__compute_memory_throughput.avg.pct_of_peak_sustained_elapsed", "%"),
    Column("DRAM throughput", "dram__throughput.avg.pct_of_peak_sustained_elapsed", "%"),
    Column("DRAM bytes read", "dram__bytes_read.sum", "MB", scale=1e-6, summed=True),
    Column("L2 sectors read", "lts__t_sectors_op_read.sum", "million", scale=1e-6, summed=True),
)


class ProfileError(Exception):
    """The profiler is not there, or gave no counters."""


def profiler_path() -> str:
    """ncu's path; raises ProfileError, saying where it comes from, where there is none."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH") or "/usr/local/cuda"
    found = shutil.which("ncu") or shutil.which("ncu", path=str(Path(home, "bin")))
    if found is None:
        raise ProfileError(
            "no ncu on PATH or in CUDA_HOME/bin: install Nsight Compute (it comes with the CUDA toolkit)"
        )
    return found


def command(ncu: str, request: Path, answer: Path) -> list[str]:
    """The profiler's command line: the calls' kernels, caches flushed before each, clocks left as they are."""
    metrics = sorted({metric for column in COLUMNS for metric in (column.metric, column.divisor) if metric})
    return [
        ncu,
        "--csv",
        "--page",
        "raw",
        "--print-units",
        "base",
        "--metrics",
        ",".join(metrics),
        "--profile-from-start",
        "off",
        "--cache-control",
        "all",
        "--clock-control",
        "none",
        sys.executable,
        "-m",
        "fi_prefetch.bench.one_call",
        str(request),
        str(answer),
    ]


def calls_of(kernels: Sequence[str], policies: Sequence[str]) -> list[tuple[str, str, str]]:
    """Name, kernel and policy of the calls to make on a shape: each kernel without prefetch and with, ours with each of
    `policies`."""
    calls = []
    for kernel in kernels:
        if kernel == "fa3":  # has none
            calls.append((kernel, kernel, "off"))
        else:
            settings = dict.fromkeys(("off", *(policies if kernel == "fi_prefetch" else ("on",))))
            calls += [(f"{kernel} {setting}", kernel, setting) for setting in settings]
    return calls


def profile(
    shapes: Sequence[Shape], kernels: Sequence[str], policies: Sequence[str], budget_seconds: float | None
) -> tuple[list[dict[str, Any]], bool]:
    """The rows of some shapes, and whether they are all.

    Raises ProfileError where there is no profiler, or it gave no counters.
    """
    request = {
        "shapes": [shape.to_row() for shape in shapes],
        "calls": calls_of(kernels, policies),
        "budget_seconds": budget_seconds,
    }
    with tempfile.TemporaryDirectory() as folder:
        asked, answered = Path(folder, "request.json"), Path(folder, "answer.json")
        asked.write_text(json.dumps(request))
        try:
            process = subprocess.run(
                command(profiler_path(), asked, answered),
                capture_output=True,
                text=True,
                timeout=TIMEOUT_SECONDS,
                check=False,
            )
        except subprocess.TimeoutExpired as error:
            raise ProfileError(f"ncu did not end within {TIMEOUT_SECONDS} s") from error
        said = f"it printed: {(process.stdout + process.stderr)[-800:].strip()}"
        if not answered.exists():
            raise ProfileError(f"no call was made; {said}")
        answer = json.loads(answered.read_text())
    try:
        groups = parse(process.stdout)
    except ProfileError as error:
        if answer["made"]:
            raise ProfileError(f"{error}; {said}") from error
        groups = []
    if len(groups) != len(answer["made"]):
        raise ProfileError(f"ncu saw {len(groups)} of {len(answer['made'])} calls; {said}")
    rows: list[dict[str, Any]] = [{**shape.to_row(), "counters": {}, "missing": {}} for shape in shapes]
    for (number, name), kernels_seen in zip(answer["made"], groups, strict=True):
        rows[number]["counters"][name] = of_call(kernels_seen)
    for number, name, reason in answer["missing"]:
        rows[number]["missing"][name] = reason
    rows = [row for row in rows if row["counters"] or row["missing"]]
    return rows, len(rows) == len(shapes)


def parse(output: str) -> list[list[dict[str, float]]]:
    """The counters in ncu's CSV: a line of names, a line of units, a line a kernel. One list of kernels a call.

    Raises ProfileError where there are none.
    """
    lines = output.splitlines()
    start = next((number for number, line in enumerate(lines) if line.startswith('"ID"')), None)
    if start is None:
        raise ProfileError("ncu gave no counters")
    names, _, *table = csv.reader(io.StringIO("\n".join(lines[start:])))
    calls: list[list[dict[str, float]]] = []
    for cells in table:
        kernel = dict(zip(names, cells, strict=False))
        if MARKER in kernel.get("Kernel Name", ""):
            calls.append([])
        elif calls:
            calls[-1].append({name: number for name, cell in kernel.items() if (number := _number(cell)) is not None})
    if not any(calls):
        raise ProfileError("ncu saw no kernel")
    return calls


def _number(cell: str) -> float | None:
    try:
        return float(cell.replace(",", ""))
    except ValueError:
        return None  # text, or "n/a"


def of_call(kernels: Sequence[dict[str, float]]) -> dict[str, float | None]:
    """The table's columns of one call, out of its kernels' counters."""
    each = [columns(values) for values in kernels]
    durations = [found["duration"] or 0.0 for found in each]
    result: dict[str, float | None] = {}
    for column in COLUMNS:
        values = [found[column.name] for found in each]
        known = [(value, time) for value, time in zip(values, durations, strict=True) if value is not None]
        if not known or len(known) < len(values):
            result[column.name] = None
        elif column.summed:
            result[column.name] = sum(value for value, _ in known)
        else:
            total = sum(time for _, time in known)
            result[column.name] = sum(value * time for value, time in known) / total if total else None
    return result


def columns(values: dict[str, float]) -> dict[str, float | None]:
    """The table's columns of one kernel, out of its counters."""
    result: dict[str, float | None] = {}
    for column in COLUMNS:
        value = values.get(column.metric)
        if value is not None and column.divisor is not None:
            divisor = values.get(column.divisor)
            value = value / divisor if divisor else None
        result[column.name] = None if value is None else value * column.scale
    return result
