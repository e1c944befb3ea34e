"""The A/B suite needs a CUDA GPU: without one it stops with an error, and with one nothing in it may be skipped."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent
_skipped: list[str] = []


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    ours = [item for item in items if HERE in item.path.parents]
    for item in ours:
        item.add_marker(pytest.mark.gpu)
    if ours and not torch.cuda.is_available() and not config.option.collectonly:
        raise pytest.UsageError(
            "tests/gpu compares kernels on a CUDA GPU and PyTorch sees none (torch.cuda.is_available() is False); "
            "without a GPU run tests/cpu and tests/sglang"
        )


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.skipped and not hasattr(report, "wasxfail") and "tests/gpu/" in report.nodeid.replace("\\", "/"):
        _skipped.append(report.nodeid)


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    if _skipped and session.exitstatus == pytest.ExitCode.OK:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if _skipped:
        terminalreporter.write_line(f"{len(_skipped)} tests of tests/gpu were skipped, and none may be", red=True)
