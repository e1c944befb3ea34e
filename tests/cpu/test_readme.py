"""README and docs say what is so: snippets run, commands and names exist, messages are those that are raised, and no
number is claimed that no committed result file has."""

from __future__ import annotations

import ast
import functools
import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

from fi_prefetch import cli
from fi_prefetch.evidence import EVIDENCE_FILE

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = [
    *(ROOT / name for name in ("README.md", "CHANGELOG.md", "benchmarks/README.md")),
    *sorted((ROOT / "docs").glob("*.md")),
]
NOT_MEASURED = "Not measured yet at this commit"

each_document = pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))


def blocks(document: Path, language: str) -> list[str]:
    """The fenced code blocks of a language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", document.read_text(), re.MULTILINE | re.DOTALL)


def spans(document: Path) -> list[str]:
    """Inline code, outside of blocks."""
    text = re.sub(r"^```.*?^```$", "", document.read_text(), flags=re.MULTILINE | re.DOTALL)
    return re.findall(r"`([^`\n]+)`", text)


# ---- snippets ------------------------------------------------------------------------------------------------------

RUN_EACH = """
import os, sys
environment = dict(os.environ)
for number, source in enumerate(sys.stdin.read().split(chr(0))):
    os.environ.clear()
    os.environ.update(environment)
    exec(compile(source, f"snippet {number}", "exec"), {"__name__": "__main__"})
"""


@pytest.mark.parametrize("document", [d for d in DOCUMENTS if blocks(d, "python")], ids=lambda path: path.name)
def test_snippets_run(document: Path, tmp_path: Path) -> None:
    """One after the other in one process, each with nothing of the others' names, where no GPU is seen."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", RUN_EACH],
        input="\0".join(blocks(document, "python")),
        cwd=tmp_path,
        env={**_environment(), "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def _environment() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if not name.startswith("FI_PREFETCH_")}


def test_the_readme_shows_how_to_use_it() -> None:
    assert len(blocks(ROOT / "README.md", "python")) >= 2


# ---- commands ------------------------------------------------------------------------------------------------------


def commands(document: Path) -> Iterator[list[str]]:
    """Every command line in a shell block, and every inline one that names a program of ours."""
    for line in "\n".join(blocks(document, "sh")).splitlines():
        if words := shlex.split(line, comments=True):
            yield words
    for span in spans(document):
        if span.startswith(("fi-prefetch ", "make ", ".venv/bin/fi-prefetch ")):
            yield shlex.split(span)


@functools.cache
def make_targets() -> set[str]:
    phony = re.search(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert phony
    return set(phony[1].split())


def check_our_command(arguments: list[str], folder: Path) -> None:
    """Parses the arguments as the command would; a file that it is to read is there."""
    command = cli.main.commands.get(arguments[0])
    assert command is not None, f"fi-prefetch has no command {arguments[0]!r}"
    values = [argument for argument in arguments[1:] if not argument.startswith("-")]
    if values or command.name not in ("explain", "compare", "report"):  # `fi-prefetch explain` alone names the command
        context = command.make_context(arguments[0], [_file(argument, folder) for argument in arguments[1:]])
        context.close()


def _file(argument: str, folder: Path) -> str:
    if not argument.endswith(".json") and argument != "FILE":
        return argument
    if (ROOT / argument).is_file():
        return str(ROOT / argument)
    path = folder / argument
    path.write_text("{}")
    return str(path)


@each_document
def test_commands_exist(document: Path, tmp_path: Path) -> None:
    for words in commands(document):
        program, arguments = words[0], words[1:]
        if program in ("fi-prefetch", ".venv/bin/fi-prefetch"):
            try:
                check_our_command(arguments, tmp_path)
            except click.UsageError as error:
                pytest.fail(f"{shlex.join(words)}: {error.format_message()}")
        elif program == "make":
            targets = [argument for argument in arguments if "=" not in argument]
            assert targets and set(targets) <= make_targets(), words
            variables = {argument.partition("=")[0] for argument in arguments if "=" in argument}
            assert all(f"\n{name} ?= " in (ROOT / "Makefile").read_text() for name in variables), words
        elif program == ".ci/run":
            assert (ROOT / program).stat().st_mode & 0o100
        elif program == "pip":
            assert arguments == ["install", "."], words
        else:
            assert words[:3] == ["python", "-m", "sglang.launch_server"], words


def test_two_commands_come_first() -> None:
    first = [block.strip() for block in blocks(ROOT / "README.md", "sh")[:2]]
    assert first == ["make demo", "make test"]


# ---- names ---------------------------------------------------------------------------------------------------------


@each_document
def test_links_lead_somewhere(document: Path) -> None:
    for target in re.findall(r"\]\(([^)]+)\)", document.read_text()):
        path, _, anchor = target.partition("#")
        linked = (document.parent / path).resolve() if path else document
        assert linked.is_file(), target
        if anchor:
            headings = re.findall(r"^#+ (.*)$", linked.read_text(), re.MULTILINE)
            assert anchor in {re.sub(r"[^a-z0-9 -]", "", h.lower()).replace(" ", "-") for h in headings}, target


@each_document
def test_files_and_tests_exist(document: Path) -> None:
    for span in spans(document):
        if not re.fullmatch(r"(fi_prefetch|csrc|tests|docs)/[\w./]*(::\w+)?", span):
            continue
        name, _, test = span.partition("::")
        assert (ROOT / name).exists(), span
        if test:
            assert f"\ndef {test}(" in (ROOT / name).read_text(), span


def test_the_layout_is_what_there_is() -> None:
    """Every source file of the package's first level and of csrc/ has a place in the description of the layout."""
    layout = (ROOT / "docs" / "developing.md").read_text().split("## Layout")[1].split("\n## ")[0]
    for path in [*(ROOT / "fi_prefetch").glob("*.py"), *(ROOT / "csrc").iterdir()]:
        if path.name not in ("__init__.py", "_version.py", "xformers_decode.cuh"):
            assert re.search(rf"(?<![\w.]){re.escape(path.name)}", layout), path.name


def test_environment_variables_are_those_that_are_read() -> None:
    code = "".join(path.read_text() for path in (ROOT / "fi_prefetch").rglob("*.py"))
    read = set(re.findall(r'"(FI_PREFETCH_[A-Z_]+)"', code))
    named = {name for document in DOCUMENTS for name in re.findall(r"\bFI_PREFETCH_[A-Z_]+\b", document.read_text())}
    assert named <= read
    # Of the measurements' own: a copy's commit where there is no git folder, and a worker's pipe.
    assert read - named <= {"FI_PREFETCH_COMMIT", "FI_PREFETCH_BENCH_EVENTS"}


# ---- messages ------------------------------------------------------------------------------------------------------

GAP = "…"
# Raised to developers of this repository by its own tools, in words that need no cure.
OWN_TOOLS = ("cli.py", "evidence.py", "gpu_check.py", "bench")
# What they return is a reason why another kernel serves.
REASON_FUNCTIONS = (
    "_obstacle",
    "_unusual_mask",
    "rope_obstacle",
    "cache_obstacle",
    "_stride_obstacle",
    "_logit_scale",
)


def text_of(node: ast.expr) -> str | None:
    """A message as it is written in the code, with GAP for what is filled in; None where it is no text."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        parts = (part.value if isinstance(part, ast.Constant) else GAP for part in node.values)
        return re.sub(f"{GAP}+", GAP, "".join(map(str, parts)))
    return None


def raised_by_name(tree: ast.AST) -> Iterator[ast.expr]:
    """What a function assigns to a name that it raises an error with."""
    for function in ast.walk(tree):
        if isinstance(function, ast.FunctionDef):
            inside = list(ast.walk(function))
            errors = [node.exc for node in inside if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call)]
            names = {error.args[0].id for error in errors if error.args and isinstance(error.args[0], ast.Name)}
            for node in inside:
                if isinstance(node, ast.Assign) and any(getattr(t, "id", None) in names for t in node.targets):
                    yield node.value


def messages() -> dict[str, str]:
    """Every message that the package raises, warns of or gives as a reason, with where it stands."""
    found = {}
    for path in sorted((ROOT / "fi_prefetch").rglob("*.py")):
        relative = path.relative_to(ROOT / "fi_prefetch")
        if relative.parts[0] in OWN_TOOLS:
            continue
        tree = ast.parse(path.read_text())
        for candidate in raised_by_name(tree):
            if text := text_of(candidate):
                found[text] = f"{relative}:{candidate.lineno}"
        for node in ast.walk(tree):
            candidates: list[ast.expr] = []
            if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
                candidates = node.exc.args[:1]
            elif isinstance(node, ast.Call) and ast.unparse(node.func) == "warnings.warn":
                candidates = node.args[:1]
            elif isinstance(node, ast.Call) and ast.unparse(node.func) == "KernelChoice" and len(node.args) > 1:
                if ast.unparse(node.args[0]) == "'flashinfer'":
                    candidates = node.args[1:2]
            elif isinstance(node, ast.Call) and ast.unparse(node.func) == "self._run_with_flashinfer":
                candidates = node.args[:1]
            elif isinstance(node, ast.FunctionDef) and node.name in REASON_FUNCTIONS:
                returned = [n.value for n in ast.walk(node) if isinstance(n, ast.Return) and n.value is not None]
                candidates = [
                    x for value in returned for x in (value.elts if isinstance(value, ast.Tuple) else [value])
                ]
            for candidate in candidates:
                if text := text_of(candidate):
                    found[text] = f"{relative}:{candidate.lineno}"
    return found


def documented() -> list[str]:
    """The messages that the troubleshooting tables have a cure for: inline code in a row's first cell."""
    text = (ROOT / "docs" / "troubleshooting.md").read_text()
    cells = re.findall(r"^\| (`.*?) \|", text, re.MULTILINE)
    return [span for cell in cells for span in re.findall(r"`([^`]+)`", cell)]


def pattern(message: str) -> re.Pattern[str]:
    return re.compile(".*".join(re.escape(part) for part in message.split(GAP)), re.DOTALL)


def test_every_message_has_a_cure() -> None:
    patterns = [pattern(message) for message in documented()]
    found = messages()
    assert len(found) > 60
    missing = {text: where for text, where in found.items() if not any(p.fullmatch(text) for p in patterns)}
    assert not missing, "\n".join(f"{where}: {text}" for text, where in missing.items())


def test_every_cure_has_its_message() -> None:
    """A message that is no longer raised must go; SGLang's own, and those of other tools, are not ours to find."""
    raised = list(messages())
    other = ("tests/gpu_evidence.json", "argument --attention-backend")
    for message in documented():
        if not message.startswith(other):
            assert any(pattern(message).fullmatch(text) for text in raised), message


# ---- numbers -------------------------------------------------------------------------------------------------------


def result_files() -> list[Path]:
    return sorted((ROOT / "benchmarks" / "results").glob("*/*.json"))


def section(document: Path, heading: str) -> str:
    return document.read_text().split(f"\n## {heading}\n")[1].split("\n## ")[0]


def measured_tables(text: str) -> Iterator[tuple[str, list[str]]]:
    """Tables that are marked as measured: the result file, and the cells below the header that are numbers alone."""
    for path, table in re.findall(r"^<!-- measured: (\S+) \S+ -->\n\n?((?:\|.*\n?)+)", text, re.MULTILINE):
        cells = [cell.strip() for row in table.splitlines()[2:] for cell in row.strip("|").split("|")]
        yield path, [cell for cell in cells if re.fullmatch(r"\d+(\.\d+)?", cell)]


def leaves(value: object) -> Iterator[float]:
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        for item in value:
            yield from leaves(item)
    elif isinstance(value, (int, float)) and not isinstance(value, bool):
        yield float(value)


def numbers_of(result: dict) -> list[float]:
    """All numbers of a result file, and what is computed from them: speed-ups and their summaries."""
    from fi_prefetch.bench import report, tables

    found = list(leaves(result))
    found += [row["bytes_in_flight"] >> 10 for row in result.get("rows", []) if row.get("bytes_in_flight")]
    for row in (row for row in result.get("rows", []) if "ms_per_step" in row):
        steps, tokens, other = row["ms_per_step"], row["tokens_per_s"], tables.fastest_other(row)
        if other is not None and "fi_prefetch" in steps:
            most = max(value for name, value in tokens.items() if not report.serves_with_ours(name))
            found += [steps[other] / steps["fi_prefetch"], tokens["fi_prefetch"] / most]
        if (share := tables.arrived(row)) is not None:
            found.append(share)
    rows = [row for row in result.get("rows", []) if "baselines_us" in row]
    for only_flashinfer in (False, True):
        speedups = report.speedups(rows, only_flashinfer)
        found += [speedup.factor for speedup in speedups]
        for summary in report.summaries(speedups) if speedups else []:
            found += [summary.geometric_mean, summary.minimum, float(summary.rows)]
    return found


def unfounded(cells: list[str], numbers: list[float]) -> list[str]:
    """Cells that no number gives when it is rounded to as many places."""
    return [
        cell
        for cell in cells
        if not any(
            f"{number:.0%}" == cell if cell.endswith("%") else f"{number:.{len(cell.partition('.')[2])}f}" == cell
            for number in numbers
        )
    ]


@each_document
def test_measured_numbers_are_in_a_committed_result_file(document: Path) -> None:
    for path, cells in measured_tables(document.read_text()):
        assert ROOT / path in [*result_files(), ROOT / EVIDENCE_FILE], path
        assert cells
        assert not unfounded(cells, numbers_of(json.loads((ROOT / path).read_text()))), path


def test_the_readme_says_what_was_measured() -> None:
    text = section(ROOT / "README.md", "What was measured")
    if result_files():
        assert NOT_MEASURED not in text
        assert list(measured_tables(text))
        return
    assert text.strip().startswith(NOT_MEASURED)
    assert (ROOT / "docs" / "when-prefetching-pays.md").read_text().split("\n\n")[1].startswith(NOT_MEASURED)
    assert "|" not in text, "a table of what was not measured"
    assert not re.findall(r"\d[\d.]*\s*(?:x\b|times\b|%|us\b|µs|ms\b|[GT]B/s|tokens/s)", text)


def test_a_number_that_was_not_measured_is_found() -> None:
    text = (
        "Before.\n\n<!-- measured: benchmarks/results/h200/grid.json classes-bf16 -->\n\n"
        "| shape | us | speed-up |\n|---|---|---|\n| 8 x 1K | 12.3 | 1.25 |\n| 1 x 2K | 7.0 | 1.50 |\n\nAfter 99.\n"
    )
    [(path, cells)] = measured_tables(text)
    assert (path, cells) == ("benchmarks/results/h200/grid.json", ["12.3", "1.25", "7.0", "1.50"])
    assert unfounded(cells, [12.34, 1.249, 7.04]) == ["1.50"]
