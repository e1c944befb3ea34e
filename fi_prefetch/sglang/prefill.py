"""Which backend prefills beside our decode where no flag names one.

On Hopper SGLang prefills with FlashAttention-3 by default, and who adds `--attention-backend fi_prefetch` for its
decode must not lose that: FlashInfer's prefill takes longer there, the longer the prompt the more (docs/sglang.md). So
the two are put together as SGLang does for `--prefill-attention-backend fa3`.
"""

from __future__ import annotations

import logging
from typing import Any

import torch

from . import named_backends
from .plugin import NAME

logger = logging.getLogger("fi_prefetch")


def beside(runner: Any, decode: Any) -> Any:
    """A backend that decodes with `decode` and prefills as SGLang would without a flag; `decode` where it does both.

    Args:
        runner: SGLang's `ModelRunner`.
        decode: our backend, whose prefill is FlashInfer's.
    """
    if not _is_flash_attentions(runner, decode):
        return decode
    from sglang.srt.layers.attention.attention_registry import ATTENTION_BACKENDS
    from sglang.srt.layers.attention.hybrid_attn_backend import HybridAttnBackend

    logger.info(
        "fi_prefetch: prefill is FlashAttention-3's, SGLang's default for this model and GPU; "
        "--prefill-attention-backend flashinfer has FlashInfer's"
    )
    return HybridAttnBackend(runner, prefill_backend=ATTENTION_BACKENDS["fa3"](runner), decode_backend=decode)


def _is_flash_attentions(runner: Any, decode: Any) -> bool:
    """Whether FlashAttention-3 prefills: where our name is both backends' by `--attention-backend` alone, and SGLang
    would have chosen FlashAttention-3 without it.

    Deterministic inference and speculative decoding are set up for the prefill of the backend that the flag names, and
    FlashAttention-3 does not read e5m2.
    """
    named = runner.server_args.prefill_attention_backend or runner.server_args.decode_attention_backend
    return (
        named is None
        and named_backends.chosen(runner) == (NAME, NAME)
        and not decode.enable_deterministic
        and runner.spec_algorithm.is_none()
        and runner.kv_cache_dtype != torch.float8_e5m2
        and named_backends.default(runner) == "fa3"
    )
