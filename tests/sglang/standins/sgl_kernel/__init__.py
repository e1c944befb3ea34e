"""Stands in for SGLang's CUDA kernels, which need libcuda at import: any name is here, and raises when it is called."""

from __future__ import annotations

from typing import Any, NoReturn

from placeholders import stand_in


class MissingKernel:
    """A function, class or namespace of sgl_kernel that nothing may use."""

    def __init__(self, name: str) -> None:
        self.__name__ = self.__qualname__ = name

    def __getattr__(self, name: str) -> MissingKernel:
        if name.startswith("__"):
            raise AttributeError(name)
        return MissingKernel(f"{self.__name__}.{name}")

    def __call__(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise RuntimeError(f"{self.__name__} was called, and there are no CUDA kernels here")


__getattr__ = stand_in("sgl_kernel", MissingKernel)
