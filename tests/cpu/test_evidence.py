"""The evidence that a GPU has run this tree: its hash, its three honest states, and the record in the repository."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest

from fi_prefetch import evidence
from fi_prefetch.evidence import Counts, Evidence

ROOT = Path(__file__).resolve().parents[2]
ALL_TOOLS = {tool: Counts(60, 0, 0) for tool in evidence.SANITIZER_TOOLS}
ALL_SUITES = {
    evidence.GPU_SUITE: Counts(2400, 0, 0),
    evidence.RANDOM_CASES: Counts(20_000, 0, 0, seed=7),
    evidence.SOAK_CALLS: Counts(1_000_000, 0, 0),
}


def but(name: str, counts: Counts) -> dict[str, Counts]:
    return {**ALL_SUITES, name: counts}


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A small tree with everything that the hash covers, and something that it does not."""
    (tmp_path / "csrc").mkdir()
    (tmp_path / "csrc" / "decode.cu").write_text("__global__ void decode() {}\n")
    (tmp_path / "csrc" / "ptx.cuh").write_text("#pragma once\n")
    (tmp_path / "fi_prefetch").mkdir()
    for name in evidence.LAUNCH_FILES:
        (tmp_path / name).write_text(f"# {name}\n")
    (tmp_path / "fi_prefetch" / "cli.py").write_text("print()\n")
    return tmp_path


def passing(current_hash: str) -> Evidence:
    return Evidence(
        status=evidence.PASSED,
        hash=current_hash,
        commit="abc",
        gpu="NVIDIA H200",
        driver="580",
        versions={"torch": "2.11.0"},
        suites=ALL_SUITES,
        sanitizers=ALL_TOOLS,
    )


def test_the_record_in_the_repository_is_of_this_tree() -> None:
    record = evidence.load(ROOT / evidence.EVIDENCE_FILE)
    verdict = evidence.judge(record, evidence.tree_hash(ROOT))
    if verdict.state == evidence.NOT_RUN:
        pytest.xfail(verdict.reason)
    assert verdict.state == evidence.PASSED, verdict.reason


# ---- the hash ------------------------------------------------------------------------------------------------------


def test_the_hash_changes_with_one_byte_of_a_kernel(tree: Path) -> None:
    before = evidence.tree_hash(tree)
    (tree / "csrc" / "decode.cu").write_text("__global__ void decode() {;}\n")
    assert evidence.tree_hash(tree) != before


@pytest.mark.parametrize("name", evidence.LAUNCH_FILES)
def test_the_hash_changes_with_every_file_that_decides_what_is_launched(tree: Path, name: str) -> None:
    before = evidence.tree_hash(tree)
    (tree / name).write_text("# another\n")
    assert evidence.tree_hash(tree) != before


def test_the_hash_changes_when_a_kernel_file_is_added_renamed_or_moved_bytes_between_files(tree: Path) -> None:
    hashes = {evidence.tree_hash(tree)}
    (tree / "csrc" / "merge.cuh").write_text("")
    hashes.add(evidence.tree_hash(tree))
    (tree / "csrc" / "merge.cuh").rename(tree / "csrc" / "merged.cuh")
    hashes.add(evidence.tree_hash(tree))
    (tree / "csrc" / "decode.cu").write_text("__global__ void decode() {")
    (tree / "csrc" / "merged.cuh").write_text("}")
    hashes.add(evidence.tree_hash(tree))
    assert len(hashes) == 4


def test_the_hash_does_not_depend_on_times_modes_caches_or_other_files(tree: Path) -> None:
    before = evidence.tree_hash(tree)
    os.utime(tree / "csrc" / "decode.cu", (1, 1))
    (tree / "csrc" / "ptx.cuh").chmod(0o600)
    (tree / "fi_prefetch" / "cli.py").write_text("print(1)\n")
    (tree / "csrc" / "__pycache__").mkdir()
    (tree / "csrc" / "__pycache__" / "x.pyc").write_bytes(b"x")
    (tree / "csrc" / ".decode.cu.swp").write_bytes(b"x")
    (tree / "csrc" / "decode.cu.orig").write_bytes(b"x")
    assert evidence.tree_hash(tree) == before


PROGRAM = """
#include <cmath>
#define TWO 2
/// Two of them.
int f(int a, int* b) {
  return a - -*b + TWO;  // one
}
"""


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("/// Two of them.", "/* two\n of\n them */"),
        ("  // one", ""),
        ("return a - -*b", "return a -\n      -*b"),
        ("int f(int a, int* b)", "int\nf( int a,\n  int* b )"),
        ("#define TWO 2", "#define TWO \\\n  2  // two"),
    ],
)
def test_comments_and_layout_are_no_code(old: str, new: str) -> None:
    assert old in PROGRAM
    assert evidence.code(PROGRAM.replace(old, new)) == evidence.code(PROGRAM)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("a - -*b", "a --*b"),
        ("a - -*b", "a + -*b"),
        ("int a", "inta"),
        ("#define TWO 2\n/// Two of them.\n", "#define TWO 2 "),
        ("#define TWO 2", "// #define TWO 2"),
        ("  return", "  // return"),
        ("a - -*b", 'a - -*b + *" "'),
    ],
)
def test_what_is_code(old: str, new: str) -> None:
    assert old in PROGRAM
    assert evidence.code(PROGRAM.replace(old, new)) != evidence.code(PROGRAM)


def test_a_text_is_code_with_its_blanks() -> None:
    assert evidence.code('f("a  b // c");') != evidence.code('f("a b // c");')
    assert evidence.code("f('/', \"*\"); // '") == evidence.code("f('/',\n  \"*\");")
    assert evidence.code('R"(a  b)"') != evidence.code('R"(a b)"')


def test_the_hash_is_refused_where_a_source_is_missing(tree: Path) -> None:
    (tree / "fi_prefetch" / "dispatch.py").unlink()
    with pytest.raises(FileNotFoundError, match="fi_prefetch/dispatch.py"):
        evidence.tree_hash(tree)


def test_the_hash_is_refused_where_there_is_no_kernel(tree: Path) -> None:
    for path in (tree / "csrc").iterdir():
        path.unlink()
    with pytest.raises(FileNotFoundError, match="csrc"):
        evidence.tree_hash(tree)


# ---- the three states ----------------------------------------------------------------------------------------------


def test_a_clean_run_of_this_tree_passes(tree: Path) -> None:
    current = evidence.tree_hash(tree)
    assert evidence.judge(passing(current), current).state == evidence.PASSED


def test_a_clean_run_of_another_tree_fails(tree: Path) -> None:
    current = evidence.tree_hash(tree)
    verdict = evidence.judge(passing("0" * 64), current)
    assert verdict.state == evidence.FAILED
    assert current[:12] in verdict.reason and "check --record" in verdict.reason


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"suites": but(evidence.GPU_SUITE, Counts(2400, 1, 0))}, "1 failed"),
        ({"suites": but(evidence.GPU_SUITE, Counts(2400, 0, 2))}, "2 skipped"),
        ({"suites": but(evidence.GPU_SUITE, Counts(0, 0, 0))}, "0 passed"),
        ({"suites": but(evidence.GPU_SUITE, Counts(1999, 0, 0))}, "1999 passed, at least 2000"),
        ({"suites": but(evidence.RANDOM_CASES, Counts(19_999, 0, 0, seed=7))}, "19999 passed, at least 20000"),
        ({"suites": but(evidence.RANDOM_CASES, Counts(20_000, 0, 0))}, "no seed"),
        ({"suites": but(evidence.RANDOM_CASES, Counts(20_000, 1, 0, seed=7))}, "random cases: 20000 passed, 1 failed"),
        ({"suites": but(evidence.SOAK_CALLS, Counts(999_999, 0, 0))}, "999999 passed, at least 1000000"),
        ({"suites": but(evidence.SOAK_CALLS, Counts(1_000_000, 2, 0))}, "soak calls: 1000000 passed, 2 failed"),
        ({"suites": {}}, "suite tests/gpu has not run"),
        ({"suites": {evidence.GPU_SUITE: Counts(2400, 0, 0)}}, "random cases has not run"),
        ({"sanitizers": {}}, "memcheck has not run"),
        ({"sanitizers": {**ALL_TOOLS, "racecheck": Counts(60, 3, 0)}}, "racecheck: 60 passed, 3 failed"),
        ({"sanitizers": {tool: Counts(60, 0, 0) for tool in ("memcheck", "synccheck")}}, "racecheck has not run"),
        (
            {"sanitizers": {tool: Counts(60, 0, 0) for tool in ("memcheck", "racecheck", "synccheck")}},
            "initcheck has not run",
        ),
    ],
)
def test_anything_but_a_clean_run_fails_whatever_the_record_claims(change: dict, reason: str) -> None:
    verdict = evidence.judge(replace(passing("h"), **change), "h")
    assert verdict.state == evidence.FAILED
    assert reason in verdict.reason


def several(**changes: object) -> evidence.SeveralGpus:
    run = evidence.SeveralGpus({"NVIDIA H100": 2}, "abc", "580", {"torch": "2.11.0"}, Counts(37, 0, 0))
    return replace(run, **changes)


@pytest.mark.parametrize(
    ("run", "reason"),
    [
        (several(counts=Counts(36, 1, 0)), "36 passed, 1 failed"),
        (several(counts=Counts(36, 0, 1)), "1 skipped"),
        (several(counts=Counts(0, 0, 0)), "0 passed"),
        (several(counts=Counts(24, 0, 0)), "24 passed, at least 25"),
        (several(gpus={"NVIDIA H100": 1}), "ran with 1 GPU"),
    ],
)
def test_several_gpus_count_where_they_have_run(run: evidence.SeveralGpus, reason: str) -> None:
    verdict = evidence.judge(replace(passing("h"), several_gpus=run), "h")
    assert verdict.state == evidence.FAILED
    assert evidence.SEVERAL_GPUS in verdict.reason and reason in verdict.reason


def test_a_record_passes_without_several_gpus_and_with_them() -> None:
    for run in (None, several(), several(gpus={"NVIDIA H100": 1, "NVIDIA H200": 1})):
        assert evidence.judge(replace(passing("h"), several_gpus=run), "h").state == evidence.PASSED


def test_not_run_holds_only_for_exactly_this_tree(tree: Path) -> None:
    record = evidence.not_run(tree, commit=None)
    assert evidence.judge(record, evidence.tree_hash(tree)) == evidence.Verdict(
        evidence.NOT_RUN, evidence.NOT_RUN_REASON
    )
    (tree / "csrc" / "decode.cu").write_text("changed")
    assert evidence.judge(record, evidence.tree_hash(tree)).state == evidence.FAILED


def test_what_ran_is_kept_beside_what_did_not(tree: Path) -> None:
    current = evidence.tree_hash(tree)
    without_soak = {name: counts for name, counts in ALL_SUITES.items() if name != evidence.SOAK_CALLS}
    ran = replace(passing(current), status=evidence.FAILED, suites=without_soak, reason="no soak")
    record = evidence.not_run(tree, "another", ran)
    assert evidence.judge(record, current) == evidence.Verdict(
        evidence.NOT_RUN, "no GPU has run all of this tree yet: without suite soak calls"
    )
    assert (record.suites, record.sanitizers, record.commit) == (ran.suites, ran.sanitizers, ran.commit)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"sanitizers": {"memcheck": Counts(60, 1, 0)}}, "memcheck: 60 passed, 1 failed"),
        ({"suites": {evidence.GPU_SUITE: Counts(2400, 0, 3)}}, "3 skipped"),
        (
            {
                "suites": {},
                "several_gpus": evidence.SeveralGpus({"NVIDIA H200": 2}, "abc", "580", {}, Counts(36, 1, 0)),
            },
            "36 passed, 1 failed",
        ),
        ({}, "parts are missing"),
        ({"hash": "0" * 64, "suites": {}}, "of this tree"),
    ],
    ids=["failed", "skipped", "failed on several GPUs", "whole", "of another tree"],
)
def test_what_failed_is_not_what_has_not_run(tree: Path, change: dict, reason: str) -> None:
    current = evidence.tree_hash(tree)
    ran = replace(passing(current), **change)
    with pytest.raises(ValueError, match=reason):
        evidence.not_run(tree, "abc", ran)
    if "failed" in reason or "skipped" in reason:  # nor by a record that claims it
        verdict = evidence.judge(replace(ran, status=evidence.NOT_RUN), current)
        assert verdict.state == evidence.FAILED and reason in verdict.reason


# ---- the record ----------------------------------------------------------------------------------------------------


def test_a_run_is_recorded_as_failed_when_a_count_says_so(tree: Path) -> None:
    arguments = {"root": tree, "commit": "abc", "gpu": "NVIDIA H200", "driver": "580", "versions": {}}
    good = evidence.from_run(**arguments, suites=ALL_SUITES, sanitizers=ALL_TOOLS)
    assert (good.status, good.reason) == (evidence.PASSED, None)
    bad = evidence.from_run(**arguments, suites=but(evidence.GPU_SUITE, Counts(2400, 7, 0)), sanitizers=ALL_TOOLS)
    assert bad.status == evidence.FAILED
    assert "7 failed" in (bad.reason or "")


def test_a_record_survives_the_file(tree: Path, tmp_path: Path) -> None:
    path = tmp_path / "evidence.json"
    passed = passing(evidence.tree_hash(tree))
    for record in (passed, replace(passed, several_gpus=several()), evidence.not_run(tree, commit="abc")):
        path.write_text(record.to_json())
        assert evidence.load(path) == record


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{}",
        json.dumps({"status": "passed", "hash": "h", "commit": None, "suites": {"a": 1}, "sanitizers": {}}),
        json.dumps(
            {"status": "passed", "hash": "h", "commit": None, "suites": {}, "sanitizers": {}, "several_gpus": 2}
        ),
    ],
)
def test_a_file_that_is_no_record_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "evidence.json"
    path.write_text(text)
    with pytest.raises(ValueError, match="is not an evidence record"):
        evidence.load(path)


def test_an_unknown_status_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "evidence.json"
    path.write_text(replace(passing("h"), status="fine").to_json())
    with pytest.raises(ValueError, match="'fine'"):
        evidence.load(path)
