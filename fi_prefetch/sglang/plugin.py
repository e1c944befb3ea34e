"""What SGLang's entry point group `sglang.srt.plugins` calls, in every process that may choose a backend.

SGLang loads plugins in the process that parses the flags (`sglang serve`, `sglang.launch_server`, `sglang.Engine`),
before it does so, and again first thing in every scheduler process, which it spawns and which therefore remembers
nothing. So this only makes names known; a backend is built, and anything heavy imported, in the scheduler alone, and
only where the flag was given.
"""

from __future__ import annotations

from typing import Any

NAME = "fi_prefetch"


def register() -> None:
    """Adds `fi_prefetch` to SGLang's attention backends. Calling it again changes nothing."""
    from sglang.srt import server_args
    from sglang.srt.layers.attention.attention_registry import register_attention_backend

    # These lists are the choices of --attention-backend, --prefill-attention-backend and --decode-attention-backend,
    # and of --enable-deterministic-inference. A source checkout with our patch has the name in them already.
    if NAME not in server_args.ATTENTION_BACKEND_CHOICES:
        server_args.add_attention_backend_choices([NAME])
    if NAME not in server_args.DETERMINISTIC_ATTENTION_BACKEND_CHOICES:
        server_args.add_deterministic_attention_backend_choices([NAME])
    register_attention_backend(NAME)(_create)


def _create(runner: Any) -> Any:
    from .backend import create_backend

    return create_backend(runner)
