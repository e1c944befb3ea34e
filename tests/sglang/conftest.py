"""Every test of a release runs for each of them."""

from __future__ import annotations

import make_env
import pytest
from releases import Release

# Run by test_inside.py in a release's environment, where SGLang can be imported.
collect_ignore = ["inside", "gpu_path", "standins"]


@pytest.fixture(scope="session", params=make_env.RELEASES)
def release(request: pytest.FixtureRequest) -> Release:
    return Release(request.param)
