"""The measurement's own kernels (kernels.cu), compiled at first use as FlashInfer compiles its own."""

from __future__ import annotations

import functools
import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from flashinfer.jit import gen_jit_spec

from fi_prefetch import jit

SOURCE = Path(__file__).with_name("kernels.cu")


@functools.cache
def name() -> str:
    """The library's name. It holds a hash of the sources: a compiled copy never outlives an edit."""
    sources = SOURCE.read_bytes() + (jit.csrc_dir() / "ptx.cuh").read_bytes()
    return f"fi_prefetch_bench_{hashlib.sha256(sources).hexdigest()[:8]}"


def jit_spec(architectures: Sequence[str] = ()) -> Any:
    """The JitSpec of the kernels, whose name says the architectures ("9.0a") where they are named.

    To be built within `jit.target_architectures` of the same.
    """
    suffix = "".join("_sm" + a.replace(".", "") for a in architectures)
    folder = jit.csrc_dir()
    return gen_jit_spec(name() + suffix, [SOURCE], extra_include_paths=[folder], extra_ldflags=jit.ldflags())


@functools.cache
def module() -> Any:
    """The loaded module: `read`, `read_rows`, `idle` and `rope_and_write`, as kernels.cu documents them.

    What FI_PREFETCH_AOT_DIR names is looked through first, and needs no compiler.
    """
    folder = os.environ.get("FI_PREFETCH_AOT_DIR")
    ahead = jit.compiled_ahead(Path(folder), name()) if folder else None
    return jit_spec().build_and_load() if ahead is None else jit.load_ahead(ahead)
