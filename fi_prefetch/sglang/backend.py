"""Which backend `--attention-backend fi_prefetch` becomes on this machine, for this model."""

from __future__ import annotations

import logging
from typing import Any

import torch

from .plugin import NAME

logger = logging.getLogger("fi_prefetch")


def create_backend(runner: Any) -> Any:
    """The attention backend for one of SGLang's model runners.

    Args:
        runner: SGLang's `ModelRunner`, its model loaded and its KV pool made.

    Raises ValueError where neither our kernel nor FlashInfer's can serve, with what to use instead.
    """
    if runner.use_mla_backend:
        raise ValueError(
            "--attention-backend fi_prefetch: this model has multi-head latent attention, which fi_prefetch does not "
            "serve; start with --attention-backend flashinfer, fa3 or flashmla"
        )
    from . import layers, named_backends, prefill

    if unserved := layers.unserved_feature(runner):
        feature, instead = unserved
        raise ValueError(
            f"--attention-backend fi_prefetch: this model or server has {feature}, which SGLang's FlashInfer backend, "
            f"and so this one, does not serve; start with --attention-backend {instead}"
        )
    if runner.device == "cpu":
        from .cpu_backend import CpuAttnBackend

        named_backends.do_without_triton()
        return CpuAttnBackend(runner)
    if runner.device != "cuda" or torch.version.hip:
        device = "an AMD GPU" if torch.version.hip else f"device {runner.device!r}"
        raise ValueError(
            f"--attention-backend fi_prefetch: expected an NVIDIA GPU, or --device cpu for the reference, got {device};"
            " start with --attention-backend triton"
        )
    from sglang.srt.utils import is_flashinfer_available

    if not is_flashinfer_available():
        raise ValueError(
            "--attention-backend fi_prefetch: SGLang finds no FlashInfer (or SGLANG_IS_FLASHINFER_AVAILABLE turns it "
            "off), on whose backend this one is built; install flashinfer-python or start with "
            "--attention-backend triton"
        )
    if not runner.spec_algorithm.is_none():
        named_backends.draft_with_flashinfer()
        logger.info("fi_prefetch: with speculative decoding, draft and verify steps are served by FlashInfer's kernels")
    if runner.is_draft_worker:
        from sglang.srt.layers.attention.attention_registry import ATTENTION_BACKENDS

        return ATTENTION_BACKENDS["flashinfer"](runner)
    from .cuda_backend import FiPrefetchAttnBackend

    backend = FiPrefetchAttnBackend(runner)
    chosen_prefill, _ = named_backends.chosen(runner)
    if backend.enable_deterministic and chosen_prefill == NAME:
        named_backends.align_prefill_chunks()
    return prefill.beside(runner, backend)
