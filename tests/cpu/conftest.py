"""Which tests run in one process where pytest-xdist spreads them."""

from __future__ import annotations

import pytest


@pytest.hookimpl(tryfirst=True)  # before pytest-xdist reads the groups, in the same hook
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Keeps the cases of an emulated test together: they run the same few libraries, each compiled in 5 to 20 s when it
    is first asked for, and two processes that ask at a time both compile it."""
    if not config.pluginmanager.hasplugin("xdist"):
        return
    for item in items:
        if item.path.name.startswith("test_emulated"):
            item.add_marker(pytest.mark.xdist_group(f"{item.path.stem}::{item.originalname}"))
