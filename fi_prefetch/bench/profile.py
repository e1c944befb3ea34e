"""Hardware counters of one call, with and without prefetch: the paper's columns, read by Nsight Compute."""

from __future__ import annotations

import csv
import io
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from .one_call import WARM_UP
from .shapes import Shape

KERNEL = "decode_kernel"
TIMEOUT_SECONDS = 300

_STALLED = "smsp__average_warps_issue_stalled_long_scoreboard_per_issue_active.ratio"
_LATENCY = "smsp__average_warp_latency_per_inst_issued.ratio"


@dataclass(frozen=True)
class Column:
    """One line of the table: what it is called, the counter behind it, its unit."""

    name: str
    metric: str
    unit: str
    divisor: str | None = None
    scale: float = 1.0


COLUMNS = (
    Column("duration", "gpu__time_duration.sum", "us", scale=1e-3),
    Column("L1 hit rate", "l1tex__t_sector_hit_rate.pct", "%"),
    Column("L2 hit rate", "lts__t_sector_hit_rate.pct", "%"),
    # The share of a warp's time between two instructions that it waits for a load from global memory or L2.
    Column("long-scoreboard stalls", _STALLED, "%", divisor=_LATENCY, scale=100.0),
    Column("compute throughput", "sm__throughput.avg.pct_of_peak_sustained_elapsed", "%"),
    Column("memory throughput", "gpu__compute_memory_throughput.avg.pct_of_peak_sustained_elapsed", "%"),
    Column("DRAM throughput", "dram__throughput.avg.pct_of_peak_sustained_elapsed", "%"),
    Column("DRAM bytes read", "dram__bytes_read.sum", "MB", scale=1e-6),
    Column("L2 sectors read", "lts__t_sectors_op_read.sum", "", scale=1.0),
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


def command(ncu: str) -> list[str]:
    """The profiler's command line: the last call's kernel, caches flushed before it, clocks left as they are."""
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
        "--kernel-name",
        f"regex:{KERNEL}",
        "--launch-skip",
        str(WARM_UP),
        "--launch-count",
        "1",
        "--cache-control",
        "all",
        "--clock-control",
        "none",
        sys.executable,
        "-m",
        "fi_prefetch.bench.one_call",
    ]


def profile(shape: Shape, policy: str) -> dict[str, float | None]:
    """The columns of one call, by name; None where this GPU has no such counter."""
    request = json.dumps({"shape": shape.to_row(), "policy": policy})
    try:
        answer = subprocess.run(
            command(profiler_path()),
            input=request,
            capture_output=True,
            text=True,
            timeout=TIMEOUT_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise ProfileError(f"ncu did not end within {TIMEOUT_SECONDS} s") from error
    try:
        return columns(parse(answer.stdout))
    except ProfileError as error:
        raise ProfileError(f"{error}; it printed: {(answer.stdout + answer.stderr)[-800:].strip()}") from error


def parse(output: str) -> dict[str, float]:
    """The counters in ncu's CSV: a line of names, a line of units, a line a kernel. Raises ProfileError without one."""
    lines = output.splitlines()
    start = next((number for number, line in enumerate(lines) if line.startswith('"ID"')), None)
    if start is None:
        raise ProfileError("ncu gave no counters")
    table = list(csv.reader(io.StringIO("\n".join(lines[start:]))))
    if len(table) < 3:
        raise ProfileError("ncu saw no kernel of ours")
    values = {}
    for name, value in zip(table[0], table[2], strict=False):
        try:
            values[name] = float(value.replace(",", ""))
        except ValueError:
            continue  # text, or "n/a"
    return values


def columns(values: dict[str, float]) -> dict[str, float | None]:
    """The table's columns out of the counters."""
    result: dict[str, float | None] = {}
    for column in COLUMNS:
        value = values.get(column.metric)
        if value is not None and column.divisor is not None:
            divisor = values.get(column.divisor)
            value = value / divisor if divisor else None
        result[column.name] = None if value is None else value * column.scale
    return result


def side_by_side(profiles: Sequence[dict[str, float | None]]) -> list[list[str]]:
    """A line a column: its name with the unit, then the value of each profile."""
    lines = []
    for column in COLUMNS:
        label = f"{column.name}, {column.unit}" if column.unit else column.name
        values = [found[column.name] for found in profiles]
        lines.append([label, *("n/a" if value is None else f"{value:,.1f}" for value in values)])
    return lines
