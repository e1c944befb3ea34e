"""The choice `fi_prefetch` on SGLang's command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tiny_models
from sglang.srt import server_args as arguments
from sglang.srt.layers.attention.attention_registry import ATTENTION_BACKENDS

from fi_prefetch.sglang import plugin

LISTS = ("ATTENTION_BACKEND_CHOICES", "DETERMINISTIC_ATTENTION_BACKEND_CHOICES")


@pytest.fixture
def model(tmp_path: Path) -> str:
    (tmp_path / "config.json").write_text(json.dumps(tiny_models.CONFIGS["llama"]))
    return str(tmp_path)


def parse(model: str, *flags: str) -> arguments.ServerArgs:
    always = ["--model-path", model, "--device", "cpu", "--skip-tokenizer-init", "--disable-cuda-graph"]
    return arguments.prepare_server_args([*always, *flags])


def test_plugin_was_found_by_its_entry_point() -> None:
    assert "fi_prefetch" in ATTENTION_BACKENDS


@pytest.mark.parametrize("name", LISTS)
def test_registering_again_adds_nothing(name: str) -> None:
    plugin.register()
    assert getattr(arguments, name).count("fi_prefetch") == 1


@pytest.mark.parametrize("flag", ["attention-backend", "decode-attention-backend", "prefill-attention-backend"])
def test_flag_takes_the_choice(model: str, flag: str) -> None:
    parsed = parse(model, f"--{flag}", "fi_prefetch")
    assert getattr(parsed, flag.replace("-", "_")) == "fi_prefetch"


def test_flag_refuses_what_is_no_choice(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse(model, "--attention-backend", "fi_prefetchx")
    assert "'fi_prefetch'" in capsys.readouterr().err


def test_deterministic_inference_takes_the_choice(model: str) -> None:
    parsed = parse(model, "--attention-backend", "fi_prefetch", "--enable-deterministic-inference")
    assert parsed.attention_backend == "fi_prefetch"
