"""Runs the GPU suite, what needs several GPUs, random sessions, the soak and compute-sanitizer, and counts for the
record what they print."""

from __future__ import annotations

import functools
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from xml.etree import ElementTree

from .evidence import GPU_SUITE, SEVERAL_GPUS, Counts

SANITIZE_SCRIPT = "tests/gpu/sanitize.py"
RANDOM_SCRIPT = "tests/gpu/random_plans.py"
SOAK_SCRIPT = "tests/gpu/soak.py"
# Only kernels with this in their name are instrumented: PyTorch's are not in question, and slow under a tool.
KERNEL_SUBSTRING = "fi_prefetch"
_FILTER_OPTIONS = ("--kernel-regex", "--kernel-name", "--filter")
# Room for barriers in shared memory, for synccheck. With what it finds by itself, and with 64 (a block of ours makes
# 16), it runs out of room after some dozens of launches, and ends a kernel with a launch failure.
_BARRIER_OPTION = "--num-cuda-barriers"
_BARRIERS = 1 << 16

# What a tool prints at its end: memcheck, synccheck and initcheck the first, racecheck the second.
_ERRORS = re.compile(r"ERROR SUMMARY: (\d+) error")
_HAZARDS = re.compile(r"RACECHECK SUMMARY: (\d+) hazard")
# What the script prints last.
_CASES = re.compile(r"^sanitize: (\d+) passed, (\d+) failed$", re.MULTILINE)
_SCRIPT = re.compile(r"^(?:random|soak): (\d+) passed, (\d+) failed(?:, seed (\d+))?$", re.MULTILINE)

Echo = Callable[[str], None]


class CheckError(Exception):
    """A suite or a tool could not run, or did not say how it ended."""


def run_suite(root: Path, echo: Echo, arguments: Sequence[str] = ()) -> Counts:
    """Runs pytest over tests/gpu of the checkout at `root`, but for what needs several GPUs; every line of output goes
    to `echo` as it comes."""
    return _run_pytest(root, echo, [GPU_SUITE, f"--ignore={SEVERAL_GPUS}", *arguments])


def run_several_gpus(root: Path, echo: Echo, arguments: Sequence[str] = ()) -> Counts:
    """Runs pytest over the tests of the checkout at `root` that need several GPUs."""
    return _run_pytest(root, echo, [SEVERAL_GPUS, *arguments])


def _run_pytest(root: Path, echo: Echo, arguments: Sequence[str]) -> Counts:
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder, "report.xml")
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={report}"]
        _, status = _stream([*command, *arguments], root, echo)
        if not report.exists():
            raise CheckError(f"pytest wrote no report for {arguments[0]}")
        return _believed(parse_junit(report.read_text()), status)


def parse_junit(text: str) -> Counts:
    """The counts of a JUnit report; an error counts as a failure."""
    suites = list(ElementTree.fromstring(text).iter("testsuite"))
    if not suites:
        raise CheckError("the JUnit report has no testsuite")
    totals = {
        name: sum(int(suite.get(name, "0")) for suite in suites) for name in ("tests", "failures", "errors", "skipped")
    }
    failed = totals["failures"] + totals["errors"]
    return Counts(max(0, totals["tests"] - failed - totals["skipped"]), failed, totals["skipped"])


def run_random(root: Path, echo: Echo, cases: int, seed: int | None = None) -> Counts:
    """Runs `cases` random cases of the checkout at `root`; `seed`: a new one where None."""
    arguments = ["--cases", str(cases), *([] if seed is None else ["--seed", str(seed)])]
    return _counted(parse_script, [sys.executable, RANDOM_SCRIPT, *arguments], root, echo)


def run_soak(root: Path, echo: Echo, calls: int) -> Counts:
    """Makes `calls` calls with the soak of the checkout at `root`."""
    return _counted(parse_script, [sys.executable, SOAK_SCRIPT, "--calls", str(calls)], root, echo)


def parse_script(output: str) -> Counts:
    """The counts of the random sessions' or the soak's last line; raises CheckError where it is missing."""
    found = _SCRIPT.search(output)
    if found is None:
        raise CheckError(f"the script's last line is missing from the output: {output[-500:].strip()!r}")
    return Counts(int(found[1]), int(found[2]), 0, None if found[3] is None else int(found[3]))


def sanitizer_path() -> str:
    """compute-sanitizer's path; raises CheckError, saying where it comes from, where there is none."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH") or "/usr/local/cuda"
    found = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path=str(Path(home, "bin")))
    if found is None:
        raise CheckError("no compute-sanitizer on PATH or in CUDA_HOME/bin: it is part of the CUDA toolkit")
    return found


@functools.cache
def _help(sanitizer: str) -> str:
    answer = subprocess.run([sanitizer, "--help"], capture_output=True, text=True, check=False)
    return answer.stdout + answer.stderr


def kernel_filter(sanitizer: str) -> tuple[str, ...]:
    """The option that limits instrumentation to our kernels, by the name this release of the tool has for it."""
    for option in _FILTER_OPTIONS:
        if option in _help(sanitizer):
            return (option, f"kns={KERNEL_SUBSTRING}")
    return ()


def barrier_room(sanitizer: str, tool: str) -> tuple[str, ...]:
    """The option for as many barriers in shared memory as our kernels make, where the tool has one."""
    return (_BARRIER_OPTION, str(_BARRIERS)) if tool == "synccheck" and _BARRIER_OPTION in _help(sanitizer) else ()


def run_sanitizer(root: Path, tool: str, echo: Echo) -> Counts:
    """Runs one compute-sanitizer tool over the sanitizer script of the checkout at `root`."""
    sanitizer = sanitizer_path()
    parse = functools.partial(parse_sanitizer, tool)
    if tool == "initcheck":
        # It must see who writes, so all kernels are instrumented, and PyTorch must not hand out memory again that was
        # written before.
        command = [sanitizer, "--tool", tool, sys.executable, SANITIZE_SCRIPT, "--initcheck"]
        return _counted(parse, command, root, echo, {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"})
    options = (*kernel_filter(sanitizer), *barrier_room(sanitizer, tool))
    return _counted(parse, [sanitizer, "--tool", tool, *options, sys.executable, SANITIZE_SCRIPT], root, echo)


def parse_sanitizer(tool: str, output: str) -> Counts:
    """The counts of a run: cases of the script, and as failed also every error that the tool reports.

    Raises CheckError where the tool's or the script's last line is missing: it did not get to its end.
    """
    summary = (_HAZARDS if tool == "racecheck" else _ERRORS).search(output)
    cases = _CASES.search(output)
    if summary is None or cases is None:
        missing = "the tool's summary" if summary is None else "the script's last line"
        raise CheckError(f"{tool}: {missing} is missing from the output: {output[-500:].strip()!r}")
    return Counts(int(cases[1]), int(cases[2]) + int(summary[1]), 0)


def _counted(
    parse: Callable[[str], Counts], command: Sequence[str], root: Path, echo: Echo,
    variables: Mapping[str, str] | None = None,
) -> Counts:  # fmt: skip
    """Runs a command at `root`; the counts that `parse` finds in what it printed."""
    output, status = _stream(command, root, echo, variables)
    return _believed(parse(output), status)


def _believed(counts: Counts, status: int) -> Counts:
    """The counts of a process that ended with this status; raises CheckError where it says otherwise than they do."""
    if counts.clean and status:
        raise CheckError(f"all {counts.passed} cases passed, and the process ended with status {status}")
    return counts


def _stream(
    command: Sequence[str], root: Path, echo: Echo, variables: Mapping[str, str] | None = None
) -> tuple[str, int]:
    """Runs a command at `root`, passing its output on line by line; all that it printed, and its exit status."""
    environment = {
        **os.environ,
        **(variables or {}),
        "PYTHONPATH": os.pathsep.join([str(root), os.environ.get("PYTHONPATH", "")]).strip(":"),
    }
    lines = []
    with subprocess.Popen(
        command,
        cwd=root,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            lines.append(line)
            echo(line.rstrip("\n"))
    return "".join(lines), process.returncode
