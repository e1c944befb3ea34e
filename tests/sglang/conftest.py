"""Every test of a release runs for each of them."""

from __future__ import annotations

import make_env
import pytest
from releases import Release

# Run by test_inside.py in a release's environment, where SGLang can be imported.
collect_ignore = ["inside", "gpu_path", "standins"]


@pytest.hookimpl(tryfirst=True)  # before pytest-xdist reads the groups, in the same hook
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Keeps a release's tests in one process where pytest-xdist spreads them: they share the engines that answered."""
    if not config.pluginmanager.hasplugin("xdist"):
        return
    for item in items:
        tested = getattr(item, "callspec", None)
        if tested is not None and tested.params.get("release") in make_env.RELEASES:
            item.add_marker(pytest.mark.xdist_group(f"sglang-{tested.params['release']}"))


@pytest.fixture(scope="session", params=make_env.RELEASES)
def release(request: pytest.FixtureRequest) -> Release:
    return Release(request.param)
