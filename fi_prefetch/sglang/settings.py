"""What a server's environment says about this backend. The prefetch policy is the package's own FI_PREFETCH_POLICY."""

from __future__ import annotations

import os

from ..prefetch import READY_CODES

# What may be promised to the kernel at most; promises.py says what SGLang keeps.
READY_VARIABLE = "FI_PREFETCH_SGLANG_READY"
# In which idle windows of a decode step the next layer's KV is prefetched.
WINDOW_VARIABLE = "FI_PREFETCH_SGLANG_WINDOW"
WINDOWS = ("off", "all_reduce")


def most_ready() -> str:
    """The strongest `ready` to promise; ValueError for a name that is none."""
    return _one_of(READY_VARIABLE, tuple(READY_CODES), "plan")


def window() -> str:
    """ "off" or "all_reduce"; ValueError for any other."""
    return _one_of(WINDOW_VARIABLE, WINDOWS, "off")


def _one_of(variable: str, names: tuple[str, ...], default: str) -> str:
    value = os.environ.get(variable) or default
    if value not in names:
        raise ValueError(f"{variable}: expected one of {', '.join(names)}, got {value!r}")
    return value
