"""What pyproject.toml ships is what there is."""

from __future__ import annotations

import fnmatch
from pathlib import Path

import pytest

try:
    import tomllib
except ImportError:  # Python 3.10, where pytest brings its ancestor
    import tomli as tomllib

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def project() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


def test_packages(project):
    found = {".".join(init.parent.relative_to(ROOT).parts) for init in (ROOT / "fi_prefetch").rglob("__init__.py")}
    assert set(project["tool"]["setuptools"]["packages"]) == found | {"fi_prefetch.csrc"}


def test_every_file_is_shipped(project):
    setuptools = project["tool"]["setuptools"]
    for package in setuptools["packages"]:
        folder = ROOT / setuptools["package-dir"].get(package, package.replace(".", "/"))
        patterns = ["*.py", *setuptools["package-data"].get(package, [])]
        for path in folder.iterdir():
            if path.is_file():
                assert any(fnmatch.fnmatch(path.name, pattern) for pattern in patterns), path


def test_entry_points(project):
    scripts = [*project["project"]["scripts"].values()]
    scripts += project["project"]["entry-points"]["sglang.srt.plugins"].values()
    for entry in scripts:
        module, _, function = entry.partition(":")
        source = ROOT / (module.replace(".", "/") + ".py")
        assert f"def {function}(" in source.read_text()
