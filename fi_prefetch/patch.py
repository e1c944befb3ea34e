"""`patch_flashinfer()`: code that takes the wrappers from FlashInfer gets ours."""

from __future__ import annotations

import contextlib
from types import ModuleType, TracebackType

import flashinfer
import flashinfer.decode

from . import decode

_NAMES = ("BatchDecodeWithPagedKVCacheWrapper", "CUDAGraphBatchDecodeWithPagedKVCacheWrapper")
_MODULES: tuple[ModuleType, ...] = (flashinfer, flashinfer.decode)


class patch_flashinfer(contextlib.AbstractContextManager):  # noqa: N801 (called like a function)
    """Puts our wrappers in the place of FlashInfer's, at once.

    Calling it is enough to patch for good; as a context manager it puts back what it found when the block ends. Blocks
    may be nested. Objects made before, and names that other modules imported before, stay as they are.
    """

    def __init__(self) -> None:
        self._found = [(module, name, getattr(module, name)) for module in _MODULES for name in _NAMES]
        for module, name, _ in self._found:
            setattr(module, name, getattr(decode, name))

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for module, name, found in self._found:
            setattr(module, name, found)
