"""Tests that import SGLang: run by ../test_inside.py in each release's environment, not by the suite itself."""

from __future__ import annotations

import os

os.environ.setdefault("SGLANG_USE_CPU_ENGINE", "1")
# SGLang's page-table kernels are Triton's; without a GPU they run in its interpreter.
os.environ["TRITON_INTERPRET"] = "1"

import gpu_path_plugin  # noqa: E402
import pytest  # noqa: E402
from sglang.srt.plugins import load_plugins  # noqa: E402


@pytest.fixture(scope="session", autouse=True)
def plugins() -> None:
    """As a server process has them: found by their entry points."""
    load_plugins()


# Before any test imports it.
gpu_path_plugin.import_flashinfer_backend()
