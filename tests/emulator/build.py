"""Compiles CUDA source for the emulator with the host's C++ compiler and calls it from Python.

A library is one C++ source that includes kernel headers (`#include "decode.cuh"`) and exports `extern "C"` functions,
most of which return `emulator::launch(...)`. See emulator.h for what the emulator checks.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import re
import shutil
import subprocess
import sysconfig
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

EMULATOR = Path(__file__).resolve().parent
CSRC = EMULATOR.parent.parent / "csrc"
SANITIZE_VARIABLE = "FI_PREFETCH_EMULATOR_SANITIZE"

_PREFETCH_DTYPE = np.dtype(
    [
        ("address", np.uint64),
        ("bytes", np.uint32),
        ("block", np.int32),
        ("thread", np.int32),
        ("evict_last", np.int32),
        ("before_dependencies", np.int32),
    ],
    align=True,
)


class EmulationError(AssertionError):
    """The emulator found a fault in the kernel that it ran."""


def cuda_includes() -> list[Path]:
    """The folders of the CUDA headers: CUDA_HOME's, else those of nvcc on PATH, else those of NVIDIA's pip packages.

    Raises RuntimeError when there are none.
    """
    homes = [Path(os.environ[name]) for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    if nvcc := shutil.which("nvcc"):
        # nvcc on PATH may be a script or a link; a dry run tells where the toolkit is.
        dry_run = subprocess.run([nvcc, "-dryrun", "-E", "-x", "cu", os.devnull], capture_output=True, text=True)
        homes += [Path(top.strip()) for top in re.findall(r"^#\$ TOP=(.*)$", dry_run.stderr, re.M)]
    packages = sorted(Path(sysconfig.get_paths()["purelib"]).glob("nvidia/*/include"))
    needed = ("cuda_runtime.h", "crt/host_defines.h", "nv/target")  # three packages, for pip and CUDA 12
    for folders in [*([home / "include"] for home in homes), packages]:
        if all(any((folder / name).is_file() for folder in folders) for name in needed):
            return [folder.resolve() for folder in folders]
    raise RuntimeError("no CUDA headers: set CUDA_HOME, put nvcc on PATH, or install NVIDIA's runtime, nvcc and cccl")


def build(
    name: str, source: str | Path, defines: Mapping[str, object] | None = None, sanitize: bool | None = None
) -> ctypes.CDLL:
    """Compiles `source` and loads it: see compile()."""
    return ctypes.CDLL(str(compile(name, source, defines, sanitize)))


def compile(
    name: str,
    source: str | Path,
    defines: Mapping[str, object] | None = None,
    sanitize: bool | None = None,
    extra_flags: Sequence[str] = (),
) -> Path:
    """Compiles `source` (C++ text, or a file) to a library; the result is cached by the content of all inputs.

    defines: macros, name to value. extra_flags: of the compiler. sanitize: with AddressSanitizer and
    UndefinedBehaviorSanitizer; None takes it from the environment, as sanitizer_environment() sets it. Raises
    RuntimeError with the compiler's output on failure.
    """
    if sanitize is None:
        sanitize = os.environ.get(SANITIZE_VARIABLE) == "1"
    if sanitize and "libasan" not in os.environ.get("LD_PRELOAD", ""):
        raise RuntimeError("sanitize=True needs a process that was started with sanitizer_environment()")
    compiler = os.environ.get("CXX", "g++")
    root = EMULATOR.parent.parent
    text = source.read_text() if isinstance(source, Path) else source
    # To compile takes far longer than to run: a decode kernel 6 s at -O1, 12 at -O2 and no faster; sanitized 15 and 43.
    flags = ["-std=c++17", "-O0" if sanitize else "-O1", "-g1", "-shared", "-fPIC", "-pthread"]
    flags += ["-Wall", "-Wno-unknown-pragmas"]
    flags += [f"-ffile-prefix-map={root}/="]  # shorter names in messages
    # Hidden and not unique: libraries loaded side by side must not share the emulator's state.
    flags += ["-fvisibility=hidden", "-fno-gnu-unique", "-ffp-contract=off"]
    if sanitize:
        flags += ["-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer"]
    flags += [f"-D{key}={value}" for key, value in (defines or {}).items()]
    # Force-included: the emulator's ptx.cuh comes first and its guard makes that of csrc/ empty.
    flags += ["-include", str(EMULATOR / "ptx.cuh"), f"-I{EMULATOR}", f"-I{CSRC}"]
    flags += [f"-isystem{folder}" for folder in cuda_includes()]
    flags += extra_flags

    inputs = hashlib.sha256(repr((name, text, compiler, flags)).encode())
    inputs.update(subprocess.run([compiler, "--version"], capture_output=True, check=True).stdout)
    for path in sorted([*CSRC.glob("*.cu*"), *CSRC.glob("*.h"), *EMULATOR.glob("*.cuh"), *EMULATOR.glob("*.h")]):
        inputs.update(path.read_bytes())
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fi_prefetch" / "emulator"
    library = cache / f"{name}-{inputs.hexdigest()[:20]}.so"
    if not library.exists():
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as folder:
            output = Path(folder) / "library.so"
            file = source if isinstance(source, Path) else Path(folder) / f"{name}.cpp"
            if isinstance(source, str):
                file.write_text(f'#line 1 "{name}"\n{text}')
            libraries = [flag for flag in flags if flag.startswith("-l")]  # these come after what needs them
            command = [compiler, *flags, "-x", "c++", str(file), "-x", "none", *libraries, "-o", str(output)]
            result = subprocess.run(command, capture_output=True, text=True)
            if result.returncode:
                raise RuntimeError(f"{compiler} could not compile {name}:\n{result.stderr}")
            os.replace(output, library)  # whole or not at all, for processes that build at the same time
    return library


def call(library: ctypes.CDLL, function: str, *arguments: Any) -> None:
    """Calls `const char* function(...)` and raises EmulationError with the message when it returns one.

    Arguments: int as int64_t, float as double, arrays and None as pointers, callables as void (*)().
    """
    entry = getattr(library, function)
    entry.restype = ctypes.c_char_p
    converted: list[Any] = []
    for value in arguments:
        if value is None:
            converted.append(ctypes.c_void_p())
        elif isinstance(value, np.ndarray):
            converted.append(ctypes.c_void_p(value.ctypes.data))
        elif callable(value):
            converted.append(ctypes.CFUNCTYPE(None)(value))
        elif isinstance(value, float):
            converted.append(ctypes.c_double(value))
        else:
            converted.append(ctypes.c_int64(int(value)))
    error = entry(*converted)
    if error is not None:
        raise EmulationError(error.decode())


def register(library: ctypes.CDLL, *arrays: np.ndarray) -> None:
    """Makes the arrays' memory all the global memory there is: checked accesses elsewhere are then errors."""
    library.emulator_clear_ranges()
    for array in arrays:
        if not array.flags.c_contiguous:
            raise ValueError(f"arrays: expected contiguous memory, got strides {array.strides} of shape {array.shape}")
        library.emulator_add_range(ctypes.c_void_p(array.ctypes.data), ctypes.c_int64(array.nbytes))


def statistics(library: ctypes.CDLL) -> dict[str, int]:
    """Counts over the library's last launch, by name (`Statistics` in emulator.h)."""
    library.emulator_statistics_names.restype = ctypes.c_char_p
    library.emulator_statistics.restype = ctypes.POINTER(ctypes.c_int64)
    names = library.emulator_statistics_names().decode().split()
    return dict(zip(names, library.emulator_statistics()[: len(names)], strict=True))


def prefetches(library: ctypes.CDLL) -> np.ndarray:
    """The prefetches of the library's last launch in the order in which they ran, as a structured array."""
    count = ctypes.c_int64()
    library.emulator_prefetches.restype = ctypes.c_void_p
    first = library.emulator_prefetches(ctypes.byref(count))
    return np.frombuffer(ctypes.string_at(first, count.value * _PREFETCH_DTYPE.itemsize), dtype=_PREFETCH_DTYPE)


def sanitizer_environment() -> dict[str, str]:
    """The environment for a Python process in which build() makes sanitized libraries.

    AddressSanitizer must be the first library of a process, so it cannot be added to one that runs.
    """
    runtime = subprocess.run(
        [os.environ.get("CXX", "g++"), "-print-file-name=libasan.so"], capture_output=True, text=True, check=True
    ).stdout.strip()
    # Python itself leaks by design; the rest of the process is not ours to check.
    options = {"ASAN_OPTIONS": "detect_leaks=0", "UBSAN_OPTIONS": "print_stacktrace=1"}
    return {**os.environ, "LD_PRELOAD": runtime, SANITIZE_VARIABLE: "1", **options}
