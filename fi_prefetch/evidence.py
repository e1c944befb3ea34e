"""Evidence that a GPU has run the kernels of this tree, and what it found.

`tests/gpu_evidence.json` holds one record, written by `fi-prefetch check --record`: the counts of the GPU suite, of the
random sessions (with their seed), of the soak and of each compute-sanitizer tool, the GPU and the versions, and a hash
of the sources that decide what is launched. A record whose hash is not the tree's says nothing about the tree: kernels
that changed since a GPU last ran them are not right.

What needs several GPUs has its own place in the record, with its own machine: one GPU is enough for the rest, and for a
record that passes. Where it has not run, the record says so by having nothing there.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

EVIDENCE_FILE = "tests/gpu_evidence.json"
KERNEL_FOLDER = "csrc"
# What a compiler reads; a copy that an editor or a merge left there is not launched.
KERNEL_SUFFIXES = (".cu", ".cuh", ".h")
# Beside csrc/: the files of the package that decide which kernel is launched, with which arguments, after which plan.
LAUNCH_FILES = tuple(
    f"fi_prefetch/{name}.py"
    for name in (
        "decision",
        "decode",
        "device",
        "dispatch",
        "jit",
        "launch",
        "planned_module",
        "prefetch",
        "torch_op",
        "tune",
        "window",
    )
)

GPU_SUITE = "tests/gpu"
SEVERAL_GPUS = "tests/gpu/test_gpu_several.py"
RANDOM_CASES = "random cases"
SOAK_CALLS = "soak calls"
SANITIZER_TOOLS = ("memcheck", "racecheck", "synccheck", "initcheck")
# What a record must hold, and of each how much at least.
MINIMUM = {GPU_SUITE: 2000, RANDOM_CASES: 20_000, SOAK_CALLS: 1_000_000}
MINIMUM_SEVERAL_GPUS = 25
NOT_RUN_REASON = "no GPU has run this tree yet"

PASSED, FAILED, NOT_RUN = "passed", "failed", "not run"


@dataclass(frozen=True)
class Counts:
    """How many cases of one suite, or of one sanitizer tool, ended which way. An error counts as a failure.

    `seed`: what the cases were drawn with, where they were drawn; the same seed draws the same cases.
    """

    passed: int
    failed: int
    skipped: int
    seed: int | None = None

    @property
    def clean(self) -> bool:
        """Whether something ran, all of it passed and nothing was left out."""
        return self.passed > 0 and self.failed == 0 and self.skipped == 0


@dataclass(frozen=True)
class SeveralGpus:
    """A run of the tests that need several GPUs. `gpus`: how many of each name the process saw."""

    gpus: Mapping[str, int]
    commit: str | None
    driver: str | None
    versions: Mapping[str, str | None]
    counts: Counts


@dataclass(frozen=True)
class Evidence:
    """One record. `gpu`, `driver` and `versions` are None or empty where nothing has run; `several_gpus` is None where
    that has not."""

    status: str
    hash: str
    commit: str | None
    reason: str | None = None
    gpu: str | None = None
    driver: str | None = None
    versions: Mapping[str, str | None] = field(default_factory=dict)
    suites: Mapping[str, Counts] = field(default_factory=dict)
    sanitizers: Mapping[str, Counts] = field(default_factory=dict)
    several_gpus: SeveralGpus | None = None

    def to_json(self) -> str:
        """The record as it is written to the file."""
        return json.dumps(asdict(self), indent=2) + "\n"


@dataclass(frozen=True)
class Verdict:
    """What a record says about a tree: `state` is PASSED, FAILED or NOT_RUN, `reason` says why in words."""

    state: str
    reason: str


def launch_sources(root: Path) -> list[Path]:
    """The files that `tree_hash` covers, relative to the repository's root, sorted.

    Raises FileNotFoundError where csrc/ is empty or one of LAUNCH_FILES is missing: a hash over less than everything
    that is launched would vouch for too much.
    """
    kernels = [
        path.relative_to(root)
        for path in (root / KERNEL_FOLDER).rglob("*")
        if path.suffix in KERNEL_SUFFIXES
        and not any(part.startswith((".", "__")) for part in path.relative_to(root).parts)
    ]
    if not kernels:
        raise FileNotFoundError(f"no sources under {root / KERNEL_FOLDER}")
    missing = [name for name in LAUNCH_FILES if not (root / name).is_file()]
    if missing:
        raise FileNotFoundError(f"missing under {root}: {', '.join(missing)}")
    return sorted([*kernels, *map(Path, LAUNCH_FILES)])


_CODE = re.compile(
    r"""
    (?P<directive> ^[ \t]*\#(?:\\\n|[^\n])* )
  | (?P<comment>   //[^\n]* | /\*.*?\*/ )
  | (?P<token>     "(?:\\.|[^"\\])*" | '(?:\\.|[^'\\])*' | \w+ | [-+*/%&|^<>=!~?:.]+ | \S )
    """,
    re.DOTALL | re.MULTILINE | re.VERBOSE,
)


def code(text: str) -> str:
    """What is left of C++ source without comments and layout: its tokens, and its directives on lines of their own.

    Two texts with the same are the same program, if they are programs. The other way round it is not always so:
    operators that touch count as one token, though a compiler may take them as several.
    """
    if 'R"' in text:
        return text  # a raw string has rules of its own
    found = []
    for match in _CODE.finditer(text):
        if match["directive"]:
            line = re.sub(r"//[^\n]*|/\*.*?\*/", " ", match["directive"].replace("\\\n", " "))
            found.append("\n" + " ".join(line.split()) + "\n")
        elif match["token"]:
            found.append(match["token"])
    return " ".join(found)


def tree_hash(root: Path) -> str:
    """SHA-256 (hex) over the names and contents of `launch_sources(root)`: of C++ the `code`, so that a better comment
    needs no GPU; of Python all bytes. Times, modes and other files do not count."""
    digest = hashlib.sha256()
    for path in launch_sources(root):
        content = (root / path).read_bytes()
        if path.suffix in KERNEL_SUFFIXES:
            content = code(content.decode()).encode()
        # Lengths in front, so that no byte can move from a name to a content or to the next file unnoticed.
        digest.update(f"{len(path.as_posix())}:{path.as_posix()}:{len(content)}:".encode())
        digest.update(content)
    return digest.hexdigest()


def not_run(root: Path, commit: str | None, ran: Evidence | None = None) -> Evidence:
    """The record that says honestly that no GPU has run this tree, or not all of it: `ran` is a record of what one did.

    Raises ValueError where that is no such record: of other sources, whole, or with a part that did not pass.
    """
    current = tree_hash(root)
    if ran is None:
        return Evidence(status=NOT_RUN, hash=current, commit=commit, reason=NOT_RUN_REASON)
    missing, unclean = _missing(ran), _unclean(ran)
    if ran.hash != current or not missing or unclean is not None:
        raise ValueError(unclean or "expected a record of this tree in which parts are missing")
    return replace(ran, status=NOT_RUN, reason=f"no GPU has run all of this tree yet: without {', '.join(missing)}")


def from_run(
    root: Path,
    commit: str | None,
    gpu: str | None,
    driver: str | None,
    versions: Mapping[str, str | None],
    suites: Mapping[str, Counts],
    sanitizers: Mapping[str, Counts],
    several_gpus: SeveralGpus | None = None,
) -> Evidence:
    """The record of a run that has just ended; its status follows from the counts."""
    record = Evidence(
        PASSED, tree_hash(root), commit, None, gpu, driver, dict(versions), dict(suites), dict(sanitizers), several_gpus
    )
    complaint = _complaint(record)
    return record if complaint is None else replace(record, status=FAILED, reason=complaint)


def load(path: Path) -> Evidence:
    """Reads a record. Raises ValueError where the file is not one, FileNotFoundError where it is absent."""
    try:
        data: dict[str, Any] = json.loads(path.read_text())
        for kind in ("suites", "sanitizers"):
            data[kind] = {name: Counts(**counts) for name, counts in data[kind].items()}
        several = data.get("several_gpus")
        if several is not None:
            data["several_gpus"] = SeveralGpus(**{**several, "counts": Counts(**several["counts"])})
        record = Evidence(**data)
    except (json.JSONDecodeError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{path} is not an evidence record: {error!r}") from error
    if record.status not in (PASSED, FAILED, NOT_RUN):
        raise ValueError(f"{path}: status is {record.status!r}, expected {PASSED!r}, {FAILED!r} or {NOT_RUN!r}")
    return record


def judge(record: Evidence, current_hash: str) -> Verdict:
    """What `record` says about the tree whose hash is `current_hash`."""
    if record.hash != current_hash:
        return Verdict(
            FAILED,
            f"the evidence is of other sources (hash {record.hash[:12]}, the tree's is {current_hash[:12]}): "
            "run `fi-prefetch check --record` on a GPU, or `fi-prefetch check --declare-not-run` where there is none",
        )
    if record.status == NOT_RUN:
        unclean = _unclean(record)
        return Verdict(NOT_RUN, record.reason or NOT_RUN_REASON) if unclean is None else Verdict(FAILED, unclean)
    complaint = _complaint(record)
    if record.status == FAILED or complaint is not None:
        return Verdict(FAILED, complaint or record.reason or "the recorded run failed")
    return Verdict(PASSED, f"{record.suites[GPU_SUITE].passed} cases passed on {record.gpu}")


def _missing(record: Evidence) -> list[str]:
    """The parts that a record must hold, and that this one does not: suites, then tools."""
    missing = [f"suite {name}" for name in MINIMUM if name not in record.suites]
    return missing + [f"compute-sanitizer tool {tool}" for tool in SANITIZER_TOOLS if tool not in record.sanitizers]


def _unclean(record: Evidence) -> str | None:
    """The first part of a record that ran and did not pass, in words; None where there is none."""
    for name, counts in {**record.suites, **record.sanitizers}.items():
        if not counts.clean:
            return f"{name}: {counts.passed} passed, {counts.failed} failed, {counts.skipped} skipped"
    return None if record.several_gpus is None else _several_complaint(record.several_gpus)


def _complaint(record: Evidence) -> str | None:
    """Why the counts of a record are not a pass, or None."""
    missing, unclean = _missing(record), _unclean(record)
    if missing or unclean is not None:
        return unclean or f"{missing[0]} has not run"
    for name, least in MINIMUM.items():
        if record.suites[name].passed < least:
            return f"{name}: {record.suites[name].passed} passed, at least {least} are wanted"
    if record.suites[RANDOM_CASES].seed is None:
        return f"{RANDOM_CASES}: no seed was recorded, so nobody can draw them again"
    return None


def _several_complaint(run: SeveralGpus) -> str | None:
    counts, gpus = run.counts, sum(run.gpus.values())
    if not counts.clean:
        return f"{SEVERAL_GPUS}: {counts.passed} passed, {counts.failed} failed, {counts.skipped} skipped"
    if counts.passed < MINIMUM_SEVERAL_GPUS:
        return f"{SEVERAL_GPUS}: {counts.passed} passed, at least {MINIMUM_SEVERAL_GPUS} are wanted"
    return f"{SEVERAL_GPUS}: ran with {gpus} GPU" if gpus < 2 else None
