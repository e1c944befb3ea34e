"""A drop-in for FlashInfer's batch-decode wrapper whose CUDA kernels prefetch the KV cache.

    import fi_prefetch
    wrapper = fi_prefetch.BatchDecodeWithPagedKVCacheWrapper(workspace, "NHD")

Names are resolved on first use, so importing the package costs nothing and never initialises CUDA.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    __version__: str

    from .decode import BatchDecodeWithPagedKVCacheWrapper, CUDAGraphBatchDecodeWithPagedKVCacheWrapper
    from .dispatch import KernelChoice
    from .patch import patch_flashinfer
    from .prefetch import PrefetchPlan, PrefetchPolicy
    from .window import prefetch_kv

_HOME = {
    "BatchDecodeWithPagedKVCacheWrapper": "decode",
    "CUDAGraphBatchDecodeWithPagedKVCacheWrapper": "decode",
    "KernelChoice": "dispatch",
    "PrefetchPlan": "prefetch",
    "PrefetchPolicy": "prefetch",
    "patch_flashinfer": "patch",
    "prefetch_kv": "window",
}

__all__ = [
    "BatchDecodeWithPagedKVCacheWrapper",
    "CUDAGraphBatchDecodeWithPagedKVCacheWrapper",
    "KernelChoice",
    "PrefetchPlan",
    "PrefetchPolicy",
    "__version__",
    "patch_flashinfer",
    "prefetch_kv",
]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        value: Any = _version()
    elif name in _HOME:
        value = getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value
    return value


def _version() -> str:
    """What the installation wrote beside this file, from the repository's tag.

    Not what the installed metadata says: in a checkout that depends on the folder one starts in, and the names of
    compiled kernels must not.
    """
    try:
        from ._version import __version__
    except ImportError:  # bare sources
        return "0+unknown"
    return __version__


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME, "__version__"})
