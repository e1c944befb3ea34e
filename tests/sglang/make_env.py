#!/usr/bin/env python3
"""Makes the environments in which tests/sglang runs SGLang's CPU engine: one for each tested release, no CUDA.

    python tests/sglang/make_env.py            make what is missing or out of date
    python tests/sglang/make_env.py --fresh    make all anew

Each is a virtual environment of the Python that runs this, which must have torch; that is linked to, not installed
again. fi_prefetch is installed from this tree, editable, so that SGLang finds its plugin as it would find an installed
wheel's, and a changed source needs no new environment.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.metadata
import os
import shutil
import subprocess
import sys
import sysconfig
import time
import venv
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
HOME = HERE / ".venv"
REQUIREMENTS = HERE / "requirements"
RELEASES = ("0.5.16", "0.5.23")
# The newest release has no packages for an older Python, and what both need has none either.
OLDEST_PYTHON = (3, 11)
COMMAND = "python tests/sglang/make_env.py"

CHECK = """
import importlib.metadata, fi_prefetch, torch
assert importlib.metadata.entry_points(group="sglang.srt.plugins")["fi_prefetch"]
"""


def python_of(release: str) -> Path:
    """The interpreter of a release's environment."""
    return HOME / release / "bin" / "python"


def is_ready(release: str) -> bool:
    """Whether a release's environment is there and is made from what is in the tree now."""
    return all(is_made(part, source) for part, source in parts(release).items())


def parts(release: str) -> dict[Path, str]:
    """What a release's environment consists of: a stamp for each part, and what it must say."""
    interpreter = f"{sys.version} {sys.executable} torch {importlib.metadata.version('torch')}"
    common, own = ((REQUIREMENTS / f"{name}.txt").read_text() for name in ("common", release))
    return {
        HOME / "torch" / "made-from": hash_of(interpreter),
        HOME / "common" / "made-from": hash_of(interpreter, common),
        HOME / release / "made-from": hash_of(interpreter, own),
        # Entry points are read at installation, sources are not.
        HOME / release / "package-made-from": hash_of(interpreter, own, (ROOT / "pyproject.toml").read_text()),
    }


def hash_of(*texts: str) -> str:
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()


def is_made(stamp: Path, source: str) -> bool:
    return stamp.is_file() and stamp.read_text() == source


def install(*arguments: str | Path, python: Path | None = None) -> None:
    """Installs exactly what is named. Byte code is left to the first import, which compiles what is used."""
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    interpreter = [] if python is None else ["--python", str(python)]
    install_command = ["install", "--quiet", "--no-deps", "--no-compile", *map(str, arguments)]
    subprocess.run(pip + interpreter + install_command, check=True)


def closure(name: str, seen: dict[str, importlib.metadata.Distribution]) -> None:
    """A distribution and all that it needs and that is installed, into `seen`."""
    from packaging.requirements import Requirement

    try:
        distribution = importlib.metadata.distribution(name)
    except importlib.metadata.PackageNotFoundError:
        return
    key = distribution.metadata["Name"].lower().replace("_", "-")
    if key in seen:
        return
    seen[key] = distribution
    for line in distribution.requires or ():
        requirement = Requirement(line)
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
            closure(requirement.name, seen)


def link_torch(folder: Path) -> None:
    """Links to torch and what it needs.

    Not to the whole environment: where nvidia-cutlass-dsl is installed, FlashInfer 0.6.14 needs a GPU at import.
    """
    folder.mkdir(parents=True)
    found: dict[str, importlib.metadata.Distribution] = {}
    closure("torch", found)
    for distribution in found.values():
        base = Path(str(distribution.locate_file("")))
        for top in {file.parts[0] for file in distribution.files or () if file.parts[0] not in ("..", "__pycache__")}:
            target = folder / top
            if not target.exists():
                target.symlink_to(base / top)


def make_release(release: str) -> None:
    """A virtual environment with SGLang in it, which also sees the shared folders."""
    folder = HOME / release
    venv.create(folder, symlinks=True, with_pip=False)
    site = Path(sysconfig.get_path("purelib", "venv", {"base": str(folder), "platbase": str(folder)}))
    (site / "shared.pth").write_text(f"{HOME / 'common'}\n{HOME / 'torch'}\n")
    install("-r", REQUIREMENTS / f"{release}.txt", python=python_of(release))


def make_package(release: str) -> None:
    """fi_prefetch in a release's environment."""
    install("--editable", ROOT, python=python_of(release))
    subprocess.run([python_of(release), "-c", CHECK], check=True, env=os.environ | {"PYTHONPATH": ""})


def make(release: str) -> None:
    """Makes those parts of a release's environment that are missing or out of date."""
    makers = (
        lambda: link_torch(HOME / "torch"),
        lambda: install("--target", HOME / "common", "-r", REQUIREMENTS / "common.txt"),
        lambda: make_release(release),
        lambda: make_package(release),
    )
    for (stamp, source), maker in zip(parts(release).items(), makers, strict=True):
        if is_made(stamp, source):
            continue
        if stamp.name == "made-from":
            shutil.rmtree(stamp.parent, ignore_errors=True)
        maker()
        stamp.write_text(source)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fresh", action="store_true", help="make all anew")
    if parser.parse_args().fresh:
        shutil.rmtree(HOME, ignore_errors=True)
    if sys.version_info < OLDEST_PYTHON:
        oldest, this = (".".join(map(str, version)) for version in (OLDEST_PYTHON, sys.version_info[:2]))
        sys.exit(f"SGLang {' and '.join(RELEASES)} are tested with Python {oldest} or newer, and this is {this}")
    try:
        importlib.metadata.version("torch")
    except importlib.metadata.PackageNotFoundError:
        sys.exit(f"torch is not installed in {sys.executable}; install its CPU build first")
    for release in RELEASES:
        began = time.monotonic()
        make(release)
        print(f"SGLang {release}: {python_of(release)} ({time.monotonic() - began:.0f} s)")


if __name__ == "__main__":
    main()
