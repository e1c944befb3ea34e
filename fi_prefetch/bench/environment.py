"""Where a measurement was made: GPU, driver, versions, commit. Every result file names them."""

from __future__ import annotations

import functools
import importlib.metadata
import os
import platform
import shutil
import subprocess
from collections import Counter
from pathlib import Path

import torch

from fi_prefetch import __version__
from fi_prefetch.device import GpuFacts, facts

REPOSITORY = Path(__file__).resolve().parents[2]


def require_gpu() -> GpuFacts:
    """The facts of the current GPU; raises RuntimeError where PyTorch sees none."""
    if not torch.cuda.is_available():
        raise RuntimeError("this needs a CUDA GPU, and PyTorch sees none (torch.cuda.is_available() is False)")
    found = facts(torch.device("cuda"))
    assert found is not None
    return found


def gpus() -> dict[str, int]:
    """How many GPUs of each name PyTorch sees."""
    return dict(Counter(torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())))


@functools.cache
def driver_version() -> str | None:
    """The NVIDIA driver's version, or None where nvidia-smi is not there or does not answer."""
    nvidia_smi = shutil.which("nvidia-smi")
    if nvidia_smi is None:
        return None
    query = [nvidia_smi, "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return answer.stdout.split("\n")[0].strip() or None


@functools.cache
def commit() -> str | None:
    """The commit of the checkout, with `-dirty` where files differ from it; None outside a git checkout.

    The environment's FI_PREFETCH_COMMIT says it where the sources were copied without their git folder.
    """
    stated = os.environ.get("FI_PREFETCH_COMMIT")
    if stated:
        return stated
    git = shutil.which("git")
    if git is None or not (REPOSITORY / ".git").exists():
        return None
    command = [git, "-C", str(REPOSITORY), "describe", "--always", "--abbrev=40", "--exclude=*", "--dirty"]
    answer = subprocess.run(command, capture_output=True, text=True, check=False)
    return answer.stdout.strip() or None if answer.returncode == 0 else None


def installed_version(distribution: str) -> str | None:
    """The version of an installed distribution, or None."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


@functools.cache
def nvcc_version() -> str | None:
    """The release of the nvcc that would compile the kernels, or None where there is none."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    nvcc = shutil.which("nvcc", path=str(Path(home, "bin")) if home else None) or shutil.which("nvcc")
    if nvcc is None:
        return None
    answer = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=False)
    release = [line for line in answer.stdout.splitlines() if "release" in line]
    return release[0].split("release")[1].split(",")[0].strip() if release else None


def versions() -> dict[str, str | None]:
    """What the kernels were built and run with, by name."""
    return {
        "fi_prefetch": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "flashinfer": installed_version("flashinfer-python"),
        "tvm_ffi": installed_version("apache-tvm-ffi"),
        "nvcc": nvcc_version(),
    }


def header() -> dict[str, str | None]:
    """The fields at the top of a result file."""
    return {
        "gpu": require_gpu().name,
        "driver": driver_version(),
        "torch": torch.__version__,
        "flashinfer": installed_version("flashinfer-python"),
        "commit": commit(),
    }
