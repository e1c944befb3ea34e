"""Runs a job in a worker process, keeps the result file, and goes on with a new worker when one ends early.

The file is written after every row, so that a run which is stopped leaves all that it measured. What could not be
measured stays in it as null, with the reason.
"""

from __future__ import annotations

import json
import os
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from . import report
from .worker import EVENTS_FD_VARIABLE

WORKER = (sys.executable, "-m", "fi_prefetch.bench.worker")
# Longer than any compilation: a kernel that says nothing for so long hangs.
STALL_SECONDS = 900.0
CEILING = "read_ceiling_gbs"


@dataclass
class Job:
    """What to measure. `specs` are the rows' descriptions, `options` what applies to all of them."""

    kind: str
    specs: list[dict[str, Any]]
    options: dict[str, Any] = field(default_factory=dict)
    stall_seconds: float = STALL_SECONDS
    budget_seconds: float | None = None
    worker: Sequence[str] = WORKER


Progress = Callable[[dict[str, Any]], None]


class JobError(RuntimeError):
    """A job cannot be run: its process does not start to measure, or there is nothing to go on with."""


class ResultFile:
    """A result file that is always whole: every write replaces it.

    With `resume` the rows of an earlier run are kept where all that its header says is the same, and the options are.
    Raises JobError where there is a file to go on with and it is no result file.

    `set_header` raises JobError where the file has such rows that are not of the job: it would lose them.
    """

    def __init__(self, path: Path, job: Job, resume: bool) -> None:
        self.path = path
        self._job = job
        self.header: dict[str, Any] = {}
        self.rows: dict[int, dict[str, Any]] = {}
        self.failed: dict[int, str] = {}
        self.complete = False
        try:
            self._earlier = report.load(path) if resume and path.exists() else None
        except ValueError as error:
            raise JobError(str(error)) from error

    def set_header(self, header: dict[str, Any]) -> None:
        """The GPU, versions and ceiling; the first header counts. Takes over the rows of an earlier run that match."""
        if self.header:
            return
        self.header = header
        earlier = self._earlier
        if earlier is None or earlier.get("options") != self._job.options:
            return
        # The ceiling alone is measured anew each time; the earlier one stays, as the floors of its rows are of it.
        if any(name not in earlier or earlier[name] != header[name] for name in header if name != CEILING):
            return
        self.header = {name: earlier[name] for name in header}
        numbers = {spec_key(spec): number for number, spec in enumerate(self._job.specs)}
        found = [(numbers.get(spec_key(row, like=self._job.specs[0])), row) for row in earlier["rows"]]
        strange = sum(number is None for number, _ in found)
        if strange:
            raise JobError(
                f"{self.path}: {strange} of its {len(found)} rows are not of those to measure, and would be lost; "
                "measure what it holds and more, or write to another file"
            )
        self.rows = {number: row for number, row in found if number is not None}

    @property
    def done(self) -> list[int]:
        """Rows that need no measuring any more."""
        return sorted({*self.rows, *self.failed})

    def content(self) -> dict[str, Any]:
        """What the file holds when it is written next."""
        return {
            **self.header,
            "options": self._job.options,
            "complete": self.complete,
            "rows": [self.rows[number] for number in sorted(self.rows)],
            "failed": [{**self._job.specs[number], "reason": self.failed[number]} for number in sorted(self.failed)],
        }

    def write(self) -> dict[str, Any]:
        """Writes the file and returns its content."""
        content = self.content()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        partial = self.path.with_suffix(".partial")
        partial.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n")
        partial.replace(self.path)
        return content


def spec_key(row: dict[str, Any], like: dict[str, Any] | None = None) -> str:
    """What tells one spec from another; of a row, only the columns that `like` has count."""
    return json.dumps({name: row.get(name) for name in sorted(like or row)})


def run(job: Job, output: Path, resume: bool = False, progress: Progress = lambda event: None) -> dict[str, Any]:
    """Measures `job` into `output` and returns the file's content.

    Args:
        job: what to measure.
        output: the result file; the workers' output goes to a .log beside it.
        resume: keep the rows that the file already has, where GPU, versions, commit and options are the same.
        progress: called with every event of the workers, and with {"event": "worker_lost", ...}.

    Raises JobError where no process gets to a row, or where the file to resume is no result file or has rows to keep
    that are not of the job.
    """
    result = ResultFile(output, job, resume)
    skip: list[tuple[int, str, str]] = []
    deadline = None if job.budget_seconds is None else time.monotonic() + job.budget_seconds
    while True:
        ended = _run_worker(job, result, skip, deadline, progress)
        if ended.finished or ended.out_of_time:
            result.complete = ended.finished
            # Before a header has come nothing is known to be measured, and what the file holds must stay.
            return result.write() if result.header else result.content()
        progress({"event": "worker_lost", "row": ended.row, "name": ended.kernel, "reason": ended.reason})
        if ended.row is None:
            last = _last_line(_log(output))  # the log may be in a folder that goes away, as the demo's does
            raise JobError(
                f"the measuring process ended before its first row: {ended.reason}: {last}; see {_log(output)}"
            )
        if ended.kernel and (ended.row, ended.kernel) not in {(row, name) for row, name, _ in skip}:
            skip.append((ended.row, ended.kernel, ended.reason))
        else:
            result.failed[ended.row] = ended.reason
        result.write()


@dataclass
class _End:
    """How a worker ended, and what it was at."""

    finished: bool = False
    out_of_time: bool = False
    row: int | None = None
    kernel: str = ""
    reason: str = ""


def _log(output: Path) -> Path:
    return output.with_suffix(".log")


def _last_line(log: Path) -> str:
    """What a process that failed said last: an error with its reason."""
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1] if lines else "it printed nothing"


def _run_worker(
    job: Job, result: ResultFile, skip: list[tuple[int, str, str]], deadline: float | None, progress: Progress
) -> _End:
    read_end, write_end = os.pipe()
    _log(result.path).parent.mkdir(parents=True, exist_ok=True)
    environment = {**os.environ, EVENTS_FD_VARIABLE: str(write_end)}
    with (
        open(_log(result.path), "a") as log,
        subprocess.Popen(
            job.worker, stdin=subprocess.PIPE, stdout=log, stderr=log, pass_fds=(write_end,), env=environment, text=True
        ) as process,
    ):
        os.close(write_end)
        events: queue.Queue[dict[str, Any] | None] = queue.Queue()
        reader = threading.Thread(target=_read_events, args=(read_end, events), daemon=True)
        reader.start()

        job_pipe = process.stdin
        assert job_pipe is not None

        def tell(message: Any) -> None:
            try:
                job_pipe.write(json.dumps(message) + "\n")
                job_pipe.flush()
            except BrokenPipeError:
                pass  # it has ended; its exit code says how

        ceiling = result.header.get(CEILING)
        tell({"kind": job.kind, "specs": job.specs, "options": job.options, "skip": skip, CEILING: ceiling})
        try:
            end = _follow(job, result, events, deadline, progress, tell)
        except BaseException:  # interrupted, or the file cannot be written: leaving would wait for the whole job
            process.kill()
            raise
        finally:
            with suppress(BrokenPipeError):  # closing writes what a process that has ended left in the buffer
                job_pipe.close()
        if end.out_of_time or end.reason:  # it stalls, or its device is dead: it may never end by itself
            process.kill()
        code = process.wait()
        reader.join()
    end.reason = end.reason or f"the process ended with exit code {code}"
    return end


def _read_events(descriptor: int, events: queue.Queue[dict[str, Any] | None]) -> None:
    with os.fdopen(descriptor) as lines:
        for line in lines:
            if line.endswith("\n"):  # else the worker was killed while it wrote it
                events.put(json.loads(line))
    events.put(None)


def _follow(
    job: Job,
    result: ResultFile,
    events: queue.Queue[dict[str, Any] | None],
    deadline: float | None,
    progress: Progress,
    tell: Callable[[Any], None],
) -> _End:
    """Takes in a worker's events until it finishes, ends, stalls, or time is up; `tell` answers it."""
    end = _End()
    while True:
        patience = job.stall_seconds
        if deadline is not None:
            patience = min(patience, max(0.0, deadline - time.monotonic()))
        try:
            event = events.get(timeout=patience)
        except queue.Empty:
            end.out_of_time = deadline is not None and time.monotonic() >= deadline
            end.reason = "time is up" if end.out_of_time else f"no answer for {job.stall_seconds:.0f} s"
            return end
        if event is None:
            return end
        progress(event)
        kind = event["event"]
        if kind == "header":
            result.set_header(event["header"])
            tell({"done": result.done, CEILING: result.header[CEILING]})
        elif kind == "row_started":
            end.row, end.kernel = event["row"], ""
        elif kind == "kernel_started":
            end.kernel = event["name"] or end.kernel
        elif kind == "kernel_failed":
            end.kernel, end.reason = event["name"] or end.kernel, event["reason"]
        elif kind == "row":
            result.rows[event["row"]] = event["content"]
            result.write()
        elif kind == "row_failed":
            result.failed[event["row"]] = event["reason"]
            result.write()
        elif kind == "finished":
            end.finished = True
            return end
