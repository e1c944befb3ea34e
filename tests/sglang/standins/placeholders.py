"""What the stand-in packages share: any submodule of theirs can be imported, and has any attribute."""

from __future__ import annotations

import importlib.machinery
import sys
import types
from collections.abc import Callable, Sequence
from typing import Any


def stand_in(package: str, make: Callable[[str], Any]) -> Callable[[str], Any]:
    """A module's `__getattr__` for a package of which any name exists, submodules included.

    Args:
        package: its name.
        make: the value of a name, given in full ("sgl_kernel.flash_attn.fwd").
    """

    def attribute_of(module: str) -> Callable[[str], Any]:
        def attribute(name: str) -> Any:
            if name.startswith("__"):
                raise AttributeError(name)
            return make(f"{module}.{name}")

        return attribute

    class Submodules:
        @staticmethod
        def find_spec(name: str, path: Sequence[str] | None = None, target: types.ModuleType | None = None) -> Any:
            if name.startswith(f"{package}."):
                return importlib.machinery.ModuleSpec(name, Submodules, is_package=True)
            return None

        @staticmethod
        def create_module(spec: Any) -> types.ModuleType:
            module = types.ModuleType(spec.name)
            module.__getattr__ = attribute_of(spec.name)
            return module

        @staticmethod
        def exec_module(module: types.ModuleType) -> None:
            pass

    sys.meta_path.append(Submodules)
    return attribute_of(package)
