"""Wheel and sdist, built from a copy of this checkout: what is in them, and that they work away from it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import scripts

from fi_prefetch import jit

ROOT = Path(__file__).resolve().parents[2]
SHIPPED = ("csrc", "fi_prefetch", "pyproject.toml", "README.md", "LICENSE")
VERSION = "1.2.3"
# What `git archive` makes of .git_archival.txt at a tag; an installation from git asks git the same.
ARCHIVE_OF_A_TAG = f"node: {'0' * 40}\nnode-date: 2026-01-01T00:00:00+00:00\ndescribe-name: v{VERSION}\n"


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What is built from: a build writes into its source folder, which must not be the checkout."""
    folder = tmp_path_factory.mktemp("sources")
    for name in SHIPPED:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, folder)
    assert "describe-name: $Format:" in (ROOT / ".git_archival.txt").read_text()
    (folder / ".git_archival.txt").write_text(ARCHIVE_OF_A_TAG)
    return folder


def build(hook: str, sources: Path, out: Path) -> Path:
    """Runs setuptools' build_wheel or build_sdist in `sources`, as pip does; the file that it made in `out`."""
    code = f"import sys; from setuptools import build_meta; print(build_meta.{hook}(sys.argv[1]), file=sys.stderr)"
    done = subprocess.run(
        [sys.executable, "-c", code, str(out)], cwd=sources, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return out / done.stderr.split()[-1]


@pytest.fixture(scope="module")
def sdist(sources: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build("build_sdist", sources, tmp_path_factory.mktemp("sdist"))


@pytest.fixture(scope="module")
def wheel(sdist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from the sdist, so that it shows as well that nothing is missing there."""
    folder = tmp_path_factory.mktemp("wheel")
    with tarfile.open(sdist) as archive:
        archive.extractall(folder, **({"filter": "data"} if hasattr(tarfile, "data_filter") else {}))
    for archival in folder.glob("*/.git_archival.txt"):
        archival.unlink()  # the sdist's own metadata must do
    return build("build_wheel", next(folder.iterdir()), folder)


def every_file() -> set[str]:
    """The wheel's names for every file of the package and of csrc/."""
    files = [path for name in ("fi_prefetch", "csrc") for path in (ROOT / name).rglob("*") if path.is_file()]
    names = {path.relative_to(ROOT).as_posix() for path in files if "__pycache__" not in path.parts}
    return {f"fi_prefetch/{name}" if name.startswith("csrc/") else name for name in names}


def test_wheel_has_every_file_and_no_other(wheel: Path) -> None:
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    # csrc/ needs no __init__.py: nobody imports it.
    assert names == every_file() | {"fi_prefetch/_version.py"}
    assert {"fi_prefetch/csrc/decode.cu", "fi_prefetch/csrc/decode.cuh", "fi_prefetch/py.typed"} <= names


def test_wheel_is_pure_and_says_what_it_is(wheel: Path) -> None:
    assert wheel.name == f"fi_prefetch-{VERSION}-py3-none-any.whl", "the tag's version"
    archive = zipfile.ZipFile(wheel)
    info = f"fi_prefetch-{VERSION}.dist-info"
    metadata = archive.read(f"{info}/METADATA").decode()
    assert "Requires-Python: <3.14,>=3.10" in metadata
    assert "# fi_prefetch" in metadata, "the README is the description"
    assert any(name.endswith("LICENSE") for name in archive.namelist())
    entry_points = archive.read(f"{info}/entry_points.txt").decode()
    assert "[sglang.srt.plugins]" in entry_points and "fi-prefetch = fi_prefetch.cli:main" in entry_points


def test_sdist_has_the_sources_of_the_kernels(sdist: Path) -> None:
    names = {name.partition("/")[2] for name in tarfile.open(sdist).getnames()}
    here = {path.relative_to(ROOT).as_posix() for path in (ROOT / "csrc").iterdir()}
    assert here | {"pyproject.toml", "README.md", "LICENSE", "fi_prefetch/py.typed"} <= names


def test_installed_wheel_works_away_from_the_checkout(
    wheel: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    site = tmp_path / "site"
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", str(site)]
    subprocess.run([*pip, str(wheel)], check=True)
    code = """
import importlib.metadata, pathlib, sys, torch
import fi_prefetch
from fi_prefetch import jit
site = pathlib.Path(sys.argv[1])
assert pathlib.Path(fi_prefetch.__file__).is_relative_to(site), fi_prefetch.__file__
assert jit.csrc_dir() == site / "fi_prefetch" / "csrc", jit.csrc_dir()
assert importlib.metadata.version("fi-prefetch") == fi_prefetch.__version__
print(jit.sources_hash())
wrapper = fi_prefetch.BatchDecodeWithPagedKVCacheWrapper(torch.empty(0, dtype=torch.uint8))
table = [torch.tensor(x, dtype=torch.int32) for x in ([0, 2], [1, 0], [3])]
wrapper.plan(*table, 4, 2, 64, 16, q_data_type=torch.float32)
cache = torch.ones(2, 2, 16, 2, 64)
out = wrapper.run(torch.ones(1, 4, 64), cache)
torch.testing.assert_close(out, torch.ones_like(out))
"""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    # Before the checkout's own, editable installation: -P or the like would not be enough, PYTHONPATH comes first.
    environment["PYTHONPATH"] = str(site)
    command = [sys.executable, "-c", code, str(site)]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    # The same sources and another version, so other compiled libraries.
    assert done.stdout.strip() != jit.sources_hash()
    monkeypatch.setattr(jit, "__version__", VERSION)
    assert done.stdout.strip() == jit.sources_hash.__wrapped__()
    for arguments, expected in (
        (["--version"], VERSION),
        (["info", "--json"], f'"fi_prefetch": "{VERSION}"'),
        (["demo", "--no-compile"], "relative error"),
    ):
        command = [sys.executable, "-m", "fi_prefetch.cli", *arguments]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0 and expected in done.stdout, done.stdout + done.stderr


# ---- the first hour ------------------------------------------------------------------------------------------------


def test_the_first_hour_is_timed_on_the_wheel_and_where_it_says_so_without_a_compiler(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    nvcc = tmp_path / "bin" / "nvcc"
    nvcc.parent.mkdir()
    nvcc.write_text("#!/bin/sh\n")
    nvcc.chmod(0o755)
    monkeypatch.setenv("PATH", f"{nvcc.parent}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}{os.pathsep}/opt/others")
    tool, site = scripts.load("benchmarks/first_hour.py"), tmp_path / "site"
    machines = [
        tool.Machine(site, tmp_path / "with"),
        tool.without_nvcc(site, tmp_path / "without", tmp_path / "kernels"),
    ]
    for machine in machines:
        assert machine.environment["PYTHONPATH"].split(os.pathsep) == [str(site), "/opt/others"], "and no checkout"
        assert machine.python("-c", "import os; print(os.getcwd())").strip() == str(machine.folder)
        with pytest.raises(subprocess.CalledProcessError):
            machine.python("-c", "raise SystemExit(1)")
    assert [shutil.which("nvcc", path=m.environment["PATH"]) for m in machines] == [str(nvcc), None]
    assert machines[0].environment["CUDA_HOME"] == str(tmp_path) and "CUDA_HOME" not in machines[1].environment
    assert machines[0].cache != machines[1].cache and not list(machines[1].cache.iterdir())


def test_a_first_hour_that_fails_keeps_what_it_timed_before(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    tool = scripts.load("benchmarks/first_hour.py")
    monkeypatch.setattr(tool.subprocess, "run", lambda *_, **__: None)

    def python(self: object, *arguments: str) -> str:
        if "build" in arguments:
            raise subprocess.CalledProcessError(1, "fi-prefetch build")
        return json.dumps({"gpu": None} if arguments == ("-c", tool.HEADER) else 0.5)

    monkeypatch.setattr(tool.Machine, "python", python)
    with pytest.raises(subprocess.CalledProcessError):
        tool.main(tmp_path / "wheel", tmp_path / "first_hour.json")
    content = json.loads((tmp_path / "first_hour.json").read_text())
    assert not content["complete"]
    seconds = {row["step"]: row["seconds"] for row in content["rows"]}
    assert seconds["the first decode: compiling and loading the kernel"] == {"nvcc": 0.5, "aot": None}
    assert "fi-prefetch demo" in seconds and not any("build" in step for step in seconds)
