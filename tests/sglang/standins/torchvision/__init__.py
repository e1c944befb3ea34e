"""Stands in for torchvision, whose builds go with one torch each: any name is here and does nothing.

SGLang and transformers name it in the image processors of models that no test here serves.
"""

from __future__ import annotations

from typing import Any

from placeholders import stand_in

__version__ = "0.0"


class _AnyAttribute(type):
    def __getattr__(cls, name: str) -> str:
        if name.startswith("__"):
            raise AttributeError(name)
        return name


class Inert(metaclass=_AnyAttribute):
    """Any class or function of torchvision; its attributes are their own names."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass


__getattr__ = stand_in("torchvision", lambda name: Inert)
