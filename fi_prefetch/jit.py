"""Kernel variants, and how each is compiled and loaded through FlashInfer's JIT.

A variant is one compilation of csrc/decode.cu. Its library's name carries a hash of csrc/ and of this package's
version, so that an upgraded package never loads what an older one compiled.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import itertools
import logging
import os
import re
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import tvm_ffi
from flashinfer.jit import core as flashinfer_jit
from flashinfer.jit.cpp_ext import get_cuda_path

from . import __version__

logger = logging.getLogger("fi_prefetch")

SUPPORTED_MAJORS = [8, 9, 10, 12]
DTYPE_NAMES = {
    torch.bfloat16: "bf16",
    torch.float16: "f16",
    torch.float8_e4m3fn: "e4m3",
    torch.float8_e5m2: "e5m2",
}
_CUDA_TYPES = {
    torch.bfloat16: "nv_bfloat16",
    torch.float16: "half",
    torch.float8_e4m3fn: "__nv_fp8_e4m3",
    torch.float8_e5m2: "__nv_fp8_e5m2",
}
HEAD_DIMS = (64, 128, 256)
# FlashInfer's pos_encoding_mode, and csrc/traits.cuh's Position.
POSITIONS = {"NONE": 0, "ROPE_LLAMA": 1, "ALIBI": 2}
# A compiler's messages end with what stopped it; the log has all of them.
_ERROR_TAIL = 500


class KernelUnavailableError(RuntimeError):
    """A kernel could not be compiled or loaded; the message says why and what to do."""


class Variant(NamedTuple):
    """What one compiled module is for.

    Attributes:
        dtype_q, dtype_o: torch.bfloat16 or torch.float16.
        dtype_kv: as dtype_q, or torch.float8_e4m3fn or torch.float8_e5m2.
        head_dim: 64, 128 or 256.
        sliding_window, soft_cap: whether the kernel has that feature compiled in.
        position: "NONE", "ROPE_LLAMA" or "ALIBI": how the kernel encodes positions.
        fixed_split: whether it is the batch-invariant kernel, for `fixed_split_size` and `disable_split_kv`.
    """

    dtype_q: torch.dtype
    dtype_kv: torch.dtype
    dtype_o: torch.dtype
    head_dim: int
    sliding_window: bool
    soft_cap: bool
    position: str = "NONE"
    fixed_split: bool = False

    @property
    def name(self) -> str:
        position = "" if self.position == "NONE" else f"_{self.position.lower()}"
        return (
            f"fi_prefetch_batch_decode_q_{DTYPE_NAMES[self.dtype_q]}_kv_{DTYPE_NAMES[self.dtype_kv]}"
            f"_o_{DTYPE_NAMES[self.dtype_o]}_hd{self.head_dim}_swa{int(self.sliding_window)}_cap{int(self.soft_cap)}"
            f"{position}{'_fixed_split' if self.fixed_split else ''}"
        )

    def macros(self) -> list[str]:
        """What nvcc is told about the variant."""
        return [
            f"-DFI_PREFETCH_DTYPE_Q={_CUDA_TYPES[self.dtype_q]}",
            f"-DFI_PREFETCH_DTYPE_KV={_CUDA_TYPES[self.dtype_kv]}",
            f"-DFI_PREFETCH_DTYPE_O={_CUDA_TYPES[self.dtype_o]}",
            f"-DFI_PREFETCH_HEAD_DIM={self.head_dim}",
            f"-DFI_PREFETCH_SLIDING_WINDOW={int(self.sliding_window)}",
            f"-DFI_PREFETCH_SOFT_CAP={int(self.soft_cap)}",
            f"-DFI_PREFETCH_POSITION={POSITIONS[self.position]}",
            f"-DFI_PREFETCH_FIXED_SPLIT={int(self.fixed_split)}",
        ]


def all_variants(fixed_split: bool = False) -> list[Variant]:
    """Every variant the wrapper can ask for: without fixed splits, or with."""
    floats = (torch.bfloat16, torch.float16)
    float8s = (torch.float8_e4m3fn, torch.float8_e5m2)
    return [
        Variant(dtype_q, dtype_kv, dtype_o, head_dim, sliding_window, soft_cap, position, fixed_split)
        for dtype_q in floats
        for dtype_kv in (dtype_q, *float8s)
        for dtype_o, head_dim, sliding_window, soft_cap, position in itertools.product(
            floats, HEAD_DIMS, (False, True), (False, True), POSITIONS
        )
        if not (position == "ALIBI" and soft_cap)
    ]


@functools.cache
def csrc_dir() -> Path:
    """Where the kernels' sources are: inside the installed package, or beside it in a checkout."""
    package = Path(__file__).resolve().parent
    for candidate in (package / "csrc", package.parent / "csrc"):
        if (candidate / "decode.cu").is_file():
            return candidate
    raise KernelUnavailableError(
        f"no kernel sources: neither {package / 'csrc'} nor {package.parent / 'csrc'} has decode.cu; "
        "reinstall fi-prefetch"
    )


@functools.cache
def sources_hash() -> str:
    """Eight hexadecimal digits that change with any file of csrc/ and with the package's version."""
    digest = hashlib.sha256(__version__.encode())
    for path in sorted(csrc_dir().iterdir()):
        if path.suffix in (".cu", ".cuh", ".h"):
            digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:8]


_ARCHITECTURES_VARIABLE = "FLASHINFER_CUDA_ARCH_LIST"
_architectures_lock = threading.RLock()


@contextlib.contextmanager
def target_architectures(architectures: Sequence[str]) -> Iterator[None]:
    """Within the block FlashInfer's JIT compiles for these ("9.0a", "10.0a") and not for the GPUs it sees."""
    targets: set[Any] = flashinfer_jit.current_compilation_context.TARGET_CUDA_ARCHS
    with _architectures_lock:
        before, listed = set(targets), os.environ.get(_ARCHITECTURES_VARIABLE)
        targets.clear()
        targets.update((int(major), minor) for major, _, minor in (a.partition(".") for a in architectures))
        # Building, it looks for them anew, and without a GPU finds them nowhere else.
        os.environ.pop(_ARCHITECTURES_VARIABLE, None)
        if architectures:
            os.environ[_ARCHITECTURES_VARIABLE] = " ".join(architectures)
        try:
            yield
        finally:
            targets.clear()
            targets.update(before)
            os.environ.pop(_ARCHITECTURES_VARIABLE, None)
            if listed is not None:
                os.environ[_ARCHITECTURES_VARIABLE] = listed


def architectures_here() -> list[str]:
    """What FlashInfer's JIT compiles for here, as "9.0a": FLASHINFER_CUDA_ARCH_LIST, else the GPUs there are.

    Raises KernelUnavailableError where that is nothing.
    """
    targets = flashinfer_jit.current_compilation_context.TARGET_CUDA_ARCHS
    if not targets:
        raise KernelUnavailableError(
            "no GPU architecture to compile for; without a GPU, say which with --arch, for example 9.0a"
        )
    return sorted(f"{major}.{minor}" for major, minor in targets)


def jit_spec(variant: Variant, architectures: Sequence[str] | None = None) -> Any:
    """FlashInfer's JitSpec of a variant.

    Args:
        variant: what to compile.
        architectures: compile for these ("9.0a") whatever GPUs there are; where None, for FLASHINFER_CUDA_ARCH_LIST or
            else the GPUs there are. The library's name says which, since FlashInfer's cache folder does not know.

    Raises KernelUnavailableError where there is nothing to compile with, or nothing to compile for.
    """
    nvcc_path()
    if architectures is not None:
        suffix = "".join("_sm" + a.replace(".", "") for a in architectures)
        with target_architectures(architectures):
            return _spec(variant, suffix)
    return _spec(variant, "")


def _spec(variant: Variant, suffix: str) -> Any:
    context = flashinfer_jit.current_compilation_context
    try:
        flashinfer_jit.check_cuda_arch()
        arch_flags = context.get_nvcc_flags_list(supported_major_versions=SUPPORTED_MAJORS)
    except RuntimeError as error:
        raise KernelUnavailableError(
            f"no GPU architecture to compile {variant.name} for ({error}); without a GPU of compute capability 8.0 or "
            'later, set FLASHINFER_CUDA_ARCH_LIST, for example to "9.0a"'
        ) from error
    spec: Any = flashinfer_jit.gen_jit_spec(
        f"{variant.name}_{sources_hash()}{suffix}",
        [csrc_dir() / "decode.cu"],
        extra_cuda_cflags=[*arch_flags, *variant.macros()],
        extra_include_paths=[csrc_dir()],
        extra_ldflags=ldflags(),
    )
    # FlashInfer adds fast math by default (and 0.6 unconditionally); our kernels say themselves where they approximate.
    spec.extra_cuda_cflags = [flag for flag in spec.extra_cuda_cflags if flag.lstrip("-") != "use_fast_math"]
    return spec


def ldflags() -> list[str]:
    """What FlashInfer's own flags leave open.

    Every module is linked with -lcuda, of which ours use nothing, and a machine that only compiles has no driver: an
    empty linker script stands in for it. And where nvcc is only a link or a script that leads into a toolkit, as a
    system's /usr/bin/nvcc, the runtime is in that toolkit.
    """
    no_driver = Path(flashinfer_jit.jit_env.FLASHINFER_JIT_DIR) / "fi_prefetch_no_driver"
    no_driver.mkdir(parents=True, exist_ok=True)
    flashinfer_jit.write_if_different(no_driver / "libcuda.so", "/* nothing of the driver is used */\n")
    libraries = _toolkit(nvcc_path()) / "lib64"
    return [f"-L{no_driver}", f"-L{libraries}", f"-Wl,-rpath,{libraries}"]


@functools.cache
def _toolkit(nvcc: Path) -> Path:
    """The toolkit that a compiler says it belongs to, or else that its place suggests."""
    dry_run = subprocess.run([nvcc, "--dryrun", "-x", "cu", os.devnull], capture_output=True, text=True, check=False)
    top = re.search(r"^#\$ (?:_\w+_ )?TOP=(.+)$", dry_run.stderr, re.MULTILINE)
    return Path(top[1].strip()).resolve() if top else nvcc.resolve().parents[1]


def nvcc_path() -> Path:
    """The CUDA compiler that FlashInfer's JIT uses.

    Raises KernelUnavailableError, saying what to install, where there is none.
    """
    nvcc = os.environ.get("FLASHINFER_NVCC")
    if nvcc is None:
        try:
            nvcc = str(Path(get_cuda_path()) / "bin" / "nvcc")
        except RuntimeError:
            nvcc = "nvcc"
    if not Path(nvcc).is_file():
        raise KernelUnavailableError(
            f"no CUDA compiler: {nvcc} does not exist; install the CUDA toolkit (12.4 or later) and set CUDA_HOME, "
            "or FLASHINFER_NVCC to the compiler itself"
        )
    return Path(nvcc)


def compiled_ahead(folder: Path, name: str) -> Path | None:
    """The library that `fi-prefetch build --aot` left in a folder under a name, if it has code for every GPU here."""
    devices = [torch.cuda.get_device_capability(index) for index in range(torch.cuda.device_count())]
    for path in sorted(folder.glob(f"{name}_sm*.so")):
        architectures = path.stem.removeprefix(f"{name}_sm").split("_sm")
        if all(any(_runs_on(architecture, device) for architecture in architectures) for device in devices):
            return path
    return None


def load_ahead(path: Path) -> Any:
    """Loads a library that was compiled ahead.

    Raises KernelUnavailableError where the loader does, or where every user of the machine could have put it there.
    """
    for place in (path.parent, path):
        if place.stat().st_mode & stat.S_IWOTH:
            raise KernelUnavailableError(
                f"{place} (FI_PREFETCH_AOT_DIR) may be written by every user, so what is in it is not run: "
                f"chmod o-w {place}"
            )
    try:
        return tvm_ffi.load_module(str(path))
    except Exception as error:  # the loader's own kinds
        raise KernelUnavailableError(f"could not load {path}: {error}") from error


def _runs_on(architecture: str, capability: tuple[int, int]) -> bool:
    """Whether machine code for "90a", "80" or "120f" runs on a GPU: "a" is one GPU's, else later minors run it too."""
    major, minor = divmod(int(architecture.rstrip("af")), 10)
    return capability[0] == major and (capability[1] == minor if architecture.endswith("a") else capability[1] >= minor)


_load_lock = threading.Lock()
_locks: dict[Variant, threading.Lock] = {}
_loaded: dict[Variant, Any] = {}
_failed: dict[Variant, KernelUnavailableError] = {}


def load(variant: Variant) -> Any:
    """The compiled module of a variant: compiled when needed (about 20 s), then kept for the process.

    What FI_PREFETCH_AOT_DIR names is looked through first, and needs no compiler.

    Raises KernelUnavailableError where that fails. A failure is remembered: a server that plans every few
    milliseconds must not try to compile every few milliseconds.
    """
    module = _loaded.get(variant)
    if module is not None:
        return module
    with _load_lock:
        lock = _locks.setdefault(variant, threading.Lock())
    with lock:
        if variant in _loaded:
            return _loaded[variant]
        if variant in _failed:
            raise _failed[variant]
        try:
            _loaded[variant] = _build_and_load(variant)
        except KernelUnavailableError as error:
            _failed[variant] = error
            raise
        return _loaded[variant]


def _build_and_load(variant: Variant) -> Any:
    folder = os.environ.get("FI_PREFETCH_AOT_DIR")
    if folder:
        path = compiled_ahead(Path(folder), f"{variant.name}_{sources_hash()}")
        if path is not None:
            return load_ahead(path)
        logger.warning("%s (FI_PREFETCH_AOT_DIR) has no %s for the GPUs here: compiling", folder, variant.name)
    try:
        spec = jit_spec(variant)
    except (KernelUnavailableError, OSError) as error:  # no toolkit; a cache that may not be written
        reason = str(error)
        if folder:
            reason = (
                f"{folder} (FI_PREFETCH_AOT_DIR) has no {variant.name}_{sources_hash()} for the GPUs here, make it "
                f"with this version's `fi-prefetch build --aot`; and to compile: {reason}"
            )
        raise KernelUnavailableError(reason) from error
    compiled = Path(spec.get_library_path()).exists()
    if not compiled:
        message = f"fi_prefetch: compiling {variant.name}, once for this machine (about 20 s)"
        logger.info(message)
        print(message, file=sys.stderr, flush=True)
    start = time.monotonic()
    try:
        module = spec.build_and_load()
    except Exception as error:  # ninja, nvcc, the loader and the file system each raise their own
        logger.warning("could not build %s: %s", spec.name, error)
        raise KernelUnavailableError(f"could not build {spec.name}: ... {str(error)[-_ERROR_TAIL:].strip()}") from error
    if not compiled:
        logger.info("fi_prefetch: compiled %s in %.0f s", variant.name, time.monotonic() - start)
    return module
