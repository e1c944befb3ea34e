"""The module of csrc/decode.cu on the CPU: the same exported functions and checks, the kernel emulated."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import tvm_ffi
from tvm_ffi import libinfo

from fi_prefetch.jit import Variant

from . import build as emulator

_SOURCE = '#include "cuda_runtime_on_cpu.h"\n#include "decode.cu"\n'


def compiled(variant: Variant) -> Path:
    """The module's library."""
    defines = dict(macro.removeprefix("-D").split("=", 1) for macro in variant.macros())
    flags = ["-O0"]  # 9 s, 14 at -O1, for calls that take little
    flags += [f"-isystem{libinfo.find_include_path()}", f"-isystem{libinfo.find_dlpack_include_path()}"]
    return emulator.compile(variant.name, _SOURCE, defines, extra_flags=flags)


def load(variant: Variant) -> Any:
    """A tvm-ffi module with `plan`, `workspace_size`, `run` and `prefetch_kv`, which take CPU tensors as the GPU's."""
    return tvm_ffi.load_module(str(compiled(variant)))
