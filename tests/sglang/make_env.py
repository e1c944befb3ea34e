#!/usr/bin/env python3
"""Makes the environments in which tests/sglang runs SGLang's CPU engine: one for each tested release, no CUDA.

    python tests/sglang/make_env.py            make what is missing or out of date
    python tests/sglang/make_env.py --fresh    make all anew

Each is a virtual environment of the Python that runs this, which must have torch; that is linked to, not
installed again. fi_prefetch is installed from this tree, editable, so that SGLang finds its plugin as it would find an
installed wheel's, and a changed source needs no new environment.
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
RELEASES = ("0.5.16", "0.5.23")
COMMAND = "python tests/sglang/make_env.py"


def python_of(release: str) -> Path:
    """The interpreter of a release's environment."""
    return HOME / release / "bin" / "python"


def wanted(release: str) -> str:
    """What an environment is made from, as a hash; it is out of date when this changes."""
    digest = hashlib.sha256(f"{sys.version} {sys.executable} {importlib.metadata.version('torch')}".encode())
    for path in (Path(__file__), *(HERE / "requirements" / f"{name}.txt" for name in ("common", release))):
        digest.update(path.read_bytes())
    # The plugin's entry point and the package's version are read at installation.
    digest.update((ROOT / "pyproject.toml").read_bytes())
    return digest.hexdigest()


def is_ready(release: str) -> bool:
    stamp = HOME / release / "made-from"
    return stamp.is_file() and stamp.read_text() == wanted(release)


def pip(*arguments: str | Path) -> None:
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", *map(str, arguments)]
    subprocess.run(command, check=True)


def install(*arguments: str | Path, python: Path | None = None) -> None:
    """Installs exactly what is named. Byte code is left to the first import, which compiles what is used."""
    interpreter = () if python is None else ("--python", python)
    pip(*interpreter, "install", "--quiet", "--no-deps", "--no-compile", *arguments)


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
    if "torch" not in found:
        sys.exit(f"torch is not installed in {sys.executable}; install its CPU build first")
    for distribution in found.values():
        base = Path(str(distribution.locate_file("")))
        for top in {file.parts[0] for file in distribution.files or () if file.parts[0] not in ("..", "__pycache__")}:
            target = folder / top
            if not target.exists():
                target.symlink_to(base / top)


def make(release: str) -> None:
    folder = HOME / release
    shutil.rmtree(folder, ignore_errors=True)
    venv.create(folder, symlinks=True, with_pip=False)
    site = Path(sysconfig.get_path("purelib", "venv", {"base": str(folder), "platbase": str(folder)}))
    (site / "shared.pth").write_text(f"{HOME / 'common'}\n{HOME / 'torch'}\n")
    python = python_of(release)
    install("-r", HERE / "requirements" / f"{release}.txt", python=python)
    install("--editable", ROOT, python=python)
    check = "import fi_prefetch, importlib.metadata as m; assert m.entry_points(group='sglang.srt.plugins'); import torch"
    subprocess.run([python, "-c", check], check=True, env=os.environ | {"PYTHONPATH": ""})
    (folder / "made-from").write_text(wanted(release))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fresh", action="store_true", help="make all anew")
    if parser.parse_args().fresh:
        shutil.rmtree(HOME, ignore_errors=True)
    missing = [release for release in RELEASES if not is_ready(release)]
    if missing:
        began = time.monotonic()
        shutil.rmtree(HOME / "torch", ignore_errors=True)
        link_torch(HOME / "torch")
        shutil.rmtree(HOME / "common", ignore_errors=True)
        install("--target", HOME / "common", "-r", HERE / "requirements" / "common.txt")
        for release in RELEASES:
            make(release)
            print(f"SGLang {release}: {python_of(release)}")
        print(f"made in {time.monotonic() - began:.0f} s")
    else:
        print("the environments are up to date")


if __name__ == "__main__":
    main()
