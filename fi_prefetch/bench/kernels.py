"""The measurement's own kernels (kernels.cu), compiled at first use as FlashInfer compiles its own."""

from __future__ import annotations

import functools
import hashlib
from pathlib import Path
from typing import Any

from flashinfer.jit import gen_jit_spec

from fi_prefetch.jit import csrc_dir

SOURCE = Path(__file__).with_name("kernels.cu")


def jit_spec() -> Any:
    """The JitSpec of the kernels. Its name holds a hash of the sources: a compiled copy never outlives an edit."""
    digest = hashlib.sha256(SOURCE.read_bytes() + (csrc_dir() / "ptx.cuh").read_bytes()).hexdigest()[:8]
    return gen_jit_spec(f"fi_prefetch_bench_{digest}", [SOURCE], extra_include_paths=[csrc_dir()])


@functools.cache
def module() -> Any:
    """The loaded module: `read`, `read_rows`, `idle` and `rope_and_write`, as kernels.cu documents them."""
    return jit_spec().build_and_load()
