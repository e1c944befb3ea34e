"""Places where SGLang knows its backends by name, and would not know what ours is.

Each is adapted in the scheduler process that serves with `fi_prefetch`, and only where the server's flags lead there.
"""

from __future__ import annotations

import functools
from typing import Any

from .plugin import NAME

# On what is adapted already: a server may make several backends.
_MARK = "_knows_fi_prefetch"


def chosen(runner: Any) -> tuple[str, str]:
    """The names of the backends for prefill and for decode, as SGLang resolved them from its flags.

    0.5.23 keeps what it resolved apart from `ServerArgs`, which has the flags as they were given.
    """
    if hasattr(runner, "prefill_attention_backend_str"):
        return runner.prefill_attention_backend_str, runner.decode_attention_backend_str
    prefill, decode = runner.server_args.get_attention_backends()
    return prefill, decode


def default(runner: Any) -> str:
    """The name of the backend that SGLang chooses for this model and GPU where no flag names one."""
    asked = (runner.use_mla_backend, runner.model_config)
    try:
        from sglang.srt.arg_groups.model_override_base import get_default_attn_backend
    except ImportError:  # 0.5.16 has it in `ServerArgs`
        return str(runner.server_args._get_default_attn_backend(*asked))
    return str(get_default_attn_backend(runner.server_args, *asked))


def requests_share_slots(runner: Any) -> bool:
    """Whether there is a radix cache, through which requests read the same KV, as SGLang resolved it from its flags.

    Under deterministic inference it turns the cache off for our name, but not where ours only decodes, beside fa3 or
    triton.
    """
    try:
        from sglang.srt.runtime_context import get_memory
    except ImportError:  # 0.5.16 writes what it resolved into `ServerArgs`
        return not runner.server_args.disable_radix_cache
    return not get_memory().disable_radix_cache


def draft_with_flashinfer() -> None:
    """A draft model's attention under our name is FlashInfer's: SGLang maps names to draft backends in a table."""
    from sglang.srt.speculative.draft_utils import DraftBackendFactory

    original = DraftBackendFactory._create_backend
    if hasattr(original, _MARK):
        return

    @functools.wraps(original)
    def with_our_name(self: Any, backend_name: str, backend_map: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        return original(self, backend_name, {**backend_map, NAME: backend_map["flashinfer"]}, *args, **kwargs)

    setattr(with_our_name, _MARK, True)
    DraftBackendFactory._create_backend = with_our_name


def align_prefill_chunks() -> None:
    """Deterministic inference cuts prefill chunks at multiples of FlashInfer's tile, which SGLang looks up by name."""
    from sglang.srt.managers.scheduler import Scheduler
    from sglang.srt.utils import get_int_env_var

    original = Scheduler.init_deterministic_inference_config
    if hasattr(original, _MARK):
        return

    @functools.wraps(original)
    def with_our_name(self: Any) -> None:
        original(self)
        if self.truncation_align_size is None:
            self.truncation_align_size = get_int_env_var("SGLANG_FLASHINFER_PREFILL_SPLIT_TILE_SIZE", 4096)

    setattr(with_our_name, _MARK, True)
    Scheduler.init_deterministic_inference_config = with_our_name


def do_without_triton() -> None:
    """The scheduler's own kernels are Triton's, which needs a GPU; SGLang goes by name to leave them out on the CPU."""
    from sglang.srt.mem_cache import allocation
    from sglang.srt.model_executor import forward_batch_info

    for module in (allocation, forward_batch_info):
        module.support_triton = lambda backend: False
    allocation.get_last_loc_triton = allocation.get_last_loc_torch
