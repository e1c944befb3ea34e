"""What the scripts of integration/sglang ask of SGLang, against what this release takes and gives."""

from __future__ import annotations

import inspect
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny_models
from sglang.srt import server_args
from sglang.srt.entrypoints.engine import Engine
from sglang.srt.managers import io_struct

sys.path.insert(0, str(Path(__file__).resolve().parents[3] / "integration" / "sglang"))

import correctness  # noqa: E402
import engines  # noqa: E402


@pytest.mark.parametrize("backend", engines.BACKENDS)
def test_engine_takes_the_arguments(backend: str) -> None:
    chosen = engines.arguments(
        backend,
        Path("model"),
        graph_batches=[1],
        context_length=64,
        tp=2,
        **correctness.ENGINE | correctness.ports_of(0),
    )
    assert not set(chosen) - set(inspect.signature(server_args.ServerArgs).parameters)


def test_server_takes_the_flags(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(tiny_models.CONFIGS["llama"]))
    flags = [*correctness.http_flags(tmp_path), "--device", "cpu", "--skip-tokenizer-init"]
    parsed = server_args.prepare_server_args(flags)
    assert (parsed.attention_backend, parsed.port) == ("fi_prefetch", correctness.PORT)


def test_engine_has_the_calls() -> None:
    asked: dict[str, tuple[str, ...]] = {
        "generate": ("input_ids", "sampling_params", "return_logprob", "top_logprobs_num", "logprob_start_len"),
        "flush_cache": (),
        "get_server_info": (),
        "start_profile": (),
        "stop_profile": (),
        "shutdown": (),
    }
    for name, parameters in asked.items():
        assert set(parameters) <= set(inspect.signature(getattr(Engine, name)).parameters)
    assert "success" in fields(io_struct.FlushCacheReqOutput)
    assert {"output_dir", "activities", "with_stack", "record_shapes"} <= fields(io_struct.ProfileReq)


def fields(kind: Any) -> set[str]:
    return set(inspect.signature(kind).parameters)
