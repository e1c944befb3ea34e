"""The wrapper's `run` and `forward` as torch custom ops, so that `torch.compile(fullgraph=True)` sees one opaque call.

An op takes tensors and numbers only, so the wrapper itself travels as a number. Eager calls do not come this way: a
custom op costs more host time than the rest of `run`.
"""

from __future__ import annotations

import itertools
import weakref
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from .decode import BatchDecodeWithPagedKVCacheWrapper

_wrappers: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()
_numbers = itertools.count()


def register(wrapper: BatchDecodeWithPagedKVCacheWrapper) -> int:
    """The number under which the op finds a wrapper for as long as it lives."""
    number = next(_numbers)
    _wrappers[number] = wrapper
    return number


@torch.library.custom_op(
    "fi_prefetch::batch_decode",
    mutates_args=("out", "lse"),
    schema="(SymInt wrapper, Tensor q, Tensor k_cache, Tensor v_cache, Tensor(a!) out, Tensor(b!)? lse, "
    "float? q_scale, float? k_scale, float? v_scale, bool? enable_pdl, SymInt? window_left, Tensor? sinks) -> ()",
)
def batch_decode(
    wrapper: int,
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor | None,
    q_scale: float | None,
    k_scale: float | None,
    v_scale: float | None,
    enable_pdl: bool | None,
    window_left: int | None,
    sinks: torch.Tensor | None,
) -> None:
    """`BatchDecodeWithPagedKVCacheWrapper.run` of a registered wrapper, into `out` and, where given, `lse`."""
    _wrappers[wrapper].run(
        q,
        (k_cache, v_cache),
        q_scale=q_scale,
        k_scale=k_scale,
        v_scale=v_scale,
        out=out,
        lse=lse,
        return_lse=lse is not None,
        enable_pdl=enable_pdl,
        window_left=window_left,
        sinks=sinks,
    )


@torch.library.custom_op(
    "fi_prefetch::batch_decode_with",
    mutates_args=("out", "lse"),
    schema="(SymInt wrapper, Tensor q, Tensor k_cache, Tensor v_cache, Tensor(a!) out, Tensor(b!)? lse, "
    "float? q_scale, float? k_scale, float? v_scale, str pos_encoding_mode, SymInt window_left, "
    "float? logits_soft_cap, float? sm_scale, float? rope_scale, float? rope_theta) -> ()",
)
def batch_decode_with(
    wrapper: int,
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor | None,
    q_scale: float | None,
    k_scale: float | None,
    v_scale: float | None,
    pos_encoding_mode: str,
    window_left: int,
    logits_soft_cap: float | None,
    sm_scale: float | None,
    rope_scale: float | None,
    rope_theta: float | None,
) -> None:
    """`BatchDecodeWithPagedKVCacheWrapper.forward` of a registered wrapper, into `out` and, where given, `lse`."""
    planned = _wrappers[wrapper]
    planned._set_parameters(pos_encoding_mode, window_left, logits_soft_cap, sm_scale, rope_scale, rope_theta)
    planned.run(
        q,
        (k_cache, v_cache),
        q_scale=q_scale,
        k_scale=k_scale,
        v_scale=v_scale,
        out=out,
        lse=lse,
        return_lse=lse is not None,
    )


@batch_decode.register_fake
@batch_decode_with.register_fake
def _(*_arguments: Any) -> None:
    """Shapes are known without it: an op only fills `out` and `lse`."""
