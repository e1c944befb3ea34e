"""Argument checks: every error names the argument, what was expected and what came, before anything is launched."""

from __future__ import annotations

import numbers
from typing import Any

import torch

KV_LAYOUTS = ("NHD", "HND")
POS_ENCODING_MODES = ("NONE", "ROPE_LLAMA", "ALIBI")
INDEX_DTYPES = (torch.int32, torch.int64)


def one_of(name: str, value: Any, allowed: tuple[Any, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name}: expected one of {', '.join(map(repr, allowed))}, got {value!r}")


def is_tensor(name: str, value: Any) -> None:
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor, got {type(value).__name__}")


def integer(name: str, value: Any, minimum: int) -> None:
    if type(value) is not int and (isinstance(value, bool) or not isinstance(value, numbers.Integral)):
        raise TypeError(f"{name}: expected an int, got {value!r} ({type(value).__name__})")
    if value < minimum:
        raise ValueError(f"{name}: expected at least {minimum}, got {value}")


def boolean(name: str, value: Any) -> None:
    if not isinstance(value, bool):
        raise TypeError(f"{name}: expected a bool, got {value!r} ({type(value).__name__})")


def made_contiguous(value: Any) -> Any:
    """A tensor without gaps: kernels read page tables by their address alone. What is no tensor, as it is."""
    return value.contiguous() if isinstance(value, torch.Tensor) else value


def torch_dtype(name: str, value: torch.dtype | str) -> torch.dtype:
    """A dtype, or a dtype's name such as "float16"."""
    if isinstance(value, torch.dtype):
        return value
    dtype = getattr(torch, value, None) if isinstance(value, str) else None
    if not isinstance(dtype, torch.dtype):
        raise TypeError(f"{name}: expected a torch.dtype or its name, got {value!r}")
    return dtype


def workspace(name: str, value: Any) -> None:
    is_tensor(name, value)
    if not value.is_contiguous():
        raise ValueError(f"{name}: expected a contiguous tensor, got strides {value.stride()}")
    if value.numel() and value.data_ptr() % 16:
        raise ValueError(f"{name}: expected a 16-byte aligned tensor, got data_ptr % 16 = {value.data_ptr() % 16}")


def index_vector(name: str, value: Any, dtype: torch.dtype | None, device: torch.device) -> None:
    """A contiguous vector of page-table entries that can be copied to `device`; of `dtype`, or any index dtype."""
    is_tensor(name, value)
    expected = INDEX_DTYPES if dtype is None else (dtype,)
    if value.dtype not in expected:
        raise ValueError(f"{name}: expected dtype {' or '.join(map(str, expected))}, got {value.dtype}")
    if value.dim() != 1:
        raise ValueError(f"{name}: expected one dimension, got shape {tuple(value.shape)}")
    if not value.is_contiguous():
        raise ValueError(f"{name}: expected a contiguous vector, got stride {value.stride(0)}")
    if value.device != device and value.device.type not in ("cpu", device.type):  # asking for a type is slow
        raise ValueError(f"{name}: expected device {device} or cpu, got {value.device}")


def graph_buffers(device: torch.device, buffers: dict[str, Any]) -> None:
    """The three page-table buffers of a CUDA-graph wrapper: indptr, indices, last_page_len, in this order."""
    dtype = None
    for name, buffer in buffers.items():
        if not isinstance(buffer, torch.Tensor):
            raise ValueError(f"{name}: expected a torch.Tensor with use_cuda_graph=True, got {type(buffer).__name__}")
        index_vector(name, buffer, dtype, device)
        if buffer.device != device:
            raise ValueError(f"{name}: expected device {device}, got {buffer.device}")
        dtype = buffer.dtype
    (indptr_name, indptr), _, (last_name, last) = buffers.items()
    if len(indptr) != len(last) + 1:
        raise ValueError(
            f"{indptr_name}: expected batch_size + 1 = {len(last) + 1} entries (from {last_name}), got {len(indptr)}"
        )


def plan_table(indptr: Any, indices: Any, last_page_len: Any, device: torch.device) -> None:
    """The page table of a plan, as far as can be seen without reading it."""
    index_vector("indptr", indptr, None, device)
    index_vector("indices", indices, indptr.dtype, device)
    index_vector("last_page_len", last_page_len, indptr.dtype, device)
    if indptr.shape[0] != last_page_len.shape[0] + 1:
        raise ValueError(
            f"indptr: expected batch_size + 1 = {last_page_len.shape[0] + 1} entries (last_page_len has "
            f"{last_page_len.shape[0]}), got {indptr.shape[0]}"
        )


def plan_shape(num_qo_heads: Any, num_kv_heads: Any, head_dim: Any, page_size: Any) -> None:
    """What a plan says of heads and pages."""
    integer("num_kv_heads", num_kv_heads, 1)
    integer("num_qo_heads", num_qo_heads, 1)
    integer("head_dim", head_dim, 1)
    integer("page_size", page_size, 1)
    if num_qo_heads % num_kv_heads:
        raise ValueError(f"num_qo_heads: expected a multiple of num_kv_heads = {num_kv_heads}, got {num_qo_heads}")


def paged_kv_cache(cache: Any, kv_layout: str) -> tuple[torch.Tensor, torch.Tensor]:
    """K and V, each [num_pages, page_size, num_kv_heads, head_dim] ("NHD") or [num_pages, num_kv_heads, page_size,
    head_dim] ("HND"), out of a pair of them or one tensor with K and V in its second dimension. The dimension of the
    page size may be left out where it is 1."""
    page_dim = -3 if kv_layout == "NHD" else -2
    if isinstance(cache, (tuple, list)):
        if len(cache) != 2:
            raise ValueError(f"paged_kv_cache: expected a pair (k_cache, v_cache), got {len(cache)} entries")
        k, v = cache
        for name, tensor in (("k_cache", k), ("v_cache", v)):
            is_tensor(f"paged_kv_cache ({name})", tensor)
            if tensor.dim() not in (3, 4):
                raise ValueError(f"paged_kv_cache ({name}): expected 4 dimensions, got shape {tuple(tensor.shape)}")
        return (k if k.dim() == 4 else k.unsqueeze(page_dim)), (v if v.dim() == 4 else v.unsqueeze(page_dim))
    if not isinstance(cache, torch.Tensor):
        raise TypeError(f"paged_kv_cache: expected a tensor or a pair of tensors, got {type(cache).__name__}")
    if cache.dim() not in (4, 5) or cache.shape[1] != 2:
        raise ValueError(
            f"paged_kv_cache: expected 5 dimensions, the second of size 2 (K and V), got shape {tuple(cache.shape)}"
        )
    both = cache if cache.dim() == 5 else cache.unsqueeze(page_dim)
    k, v = both.unbind(1)
    return k, v


def tensor(name: str, value: Any, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
    is_tensor(name, value)
    if value.shape != shape:
        raise ValueError(f"{name}: expected shape {tuple(shape)}, got {tuple(value.shape)}")
    if value.dtype != dtype:
        raise ValueError(f"{name}: expected dtype {dtype}, got {value.dtype}")
    if value.device != device:
        raise ValueError(f"{name}: expected device {device}, got {value.device}")


def output(
    name: str, value: Any, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, alignment: int = 1
) -> None:
    tensor(name, value, shape, dtype, device)
    if not value.is_contiguous():
        raise ValueError(f"{name}: expected a contiguous tensor, got strides {value.stride()}")
    if value.data_ptr() % alignment:
        raise ValueError(f"{name}: expected a {alignment}-byte aligned tensor, got address {value.data_ptr():#x}")


def factor(name: str, value: torch.Tensor, shape: tuple[int, ...], device: torch.device) -> None:
    """A tensor by which an output of this shape can be multiplied where it lies."""
    if value.device != device:
        raise ValueError(f"{name}: expected a number, or a tensor on {device}, got one on {value.device}")
    wide = (1,) * (len(shape) - value.dim()) + tuple(value.shape)
    if len(wide) != len(shape) or any(size not in (1, of) for size, of in zip(wide, shape, strict=True)):
        raise ValueError(f"{name}: expected a shape that extends to {tuple(shape)}, got {tuple(value.shape)}")


def page_table(
    indptr: torch.Tensor, indices: torch.Tensor, last_page_len: torch.Tensor, page_size: int, num_pages: int | None
) -> None:
    """Everything in a page table that a kernel trusts; reads the tensors, so on a GPU it waits for it.

    Args:
        num_pages: of the cache; None where it is not known yet, and page numbers are not looked at.

    Raises ValueError for the first entry that is wrong: the request, the position, the value and its limit.
    """
    indptr, indices, last_page_len = (t.detach().cpu().long() for t in (indptr, indices, last_page_len))
    if len(indptr) and indptr[0] < 0:
        raise ValueError(f"indptr: expected at least 0 at position 0, got {int(indptr[0])}")
    pages = indptr[1:] - indptr[:-1]
    request = _first(pages < 0)
    if request is not None:
        raise ValueError(
            f"indptr: expected no descent, got {int(indptr[request + 1])} after {int(indptr[request])} at position "
            f"{request + 1} (request {request})"
        )
    request = _first(indptr[1:] > len(indices))
    if request is not None:
        raise ValueError(
            f"indptr: expected at most {len(indices)}, the length of indices, got {int(indptr[request + 1])} at "
            f"position {request + 1} (request {request})"
        )
    request = _first((last_page_len > page_size) | (last_page_len < (pages > 0).long()))
    if request is not None:
        low = 1 if pages[request] > 0 else 0
        raise ValueError(
            f"last_page_len: expected {low} to page_size = {page_size} for request {request} with "
            f"{int(pages[request])} pages, got {int(last_page_len[request])}"
        )
    if num_pages is None or not len(pages):
        return
    used = indices[int(indptr[0]) : int(indptr[-1])]
    position = _first((used < 0) | (used >= num_pages))
    if position is not None:
        position += int(indptr[0])
        request = int(torch.searchsorted(indptr, torch.tensor(position), right=True)) - 1
        raise ValueError(
            f"indices: expected page numbers from 0 to {num_pages - 1} (the cache has {num_pages} pages), got "
            f"{int(indices[position])} at position {position} (request {request}, its page "
            f"{position - int(indptr[request])})"
        )


def _first(wrong: torch.Tensor) -> int | None:
    """Position of the first True."""
    return int(wrong.to(torch.uint8).argmax()) if bool(wrong.any()) else None
