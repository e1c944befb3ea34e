"""Which backend the flag becomes, and what it says where it cannot be served."""

from __future__ import annotations

import inspect
import json
import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny_models
import torch
from sglang.srt.layers.attention.attention_registry import ATTENTION_BACKENDS
from sglang.srt.layers.radix_attention import AttentionType, RadixAttention

from fi_prefetch.sglang import cuda_backend, layers, named_backends, promises, settings
from fi_prefetch.sglang.backend import create_backend
from fi_prefetch.sglang.cuda_backend import FiPrefetchAttnBackend


def runner(**changes: Any) -> Any:
    """As much of a ModelRunner as the choice of a backend looks at."""
    facts = {
        "use_mla_backend": False,
        "device": "cuda",
        "spec_algorithm": SimpleNamespace(is_none=lambda: True),
        "server_args": arguments(),
        "kv_cache_dtype": torch.bfloat16,
        "prefill_attention_backend_str": "fi_prefetch",
        "decode_attention_backend_str": "fi_prefetch",
        "is_draft_worker": False,
        "model": torch.nn.ModuleList([attention(0)]),
        "model_config": SimpleNamespace(has_attention_sinks=False, attention_chunk_size=None),
    }
    return SimpleNamespace(**facts | changes)


def arguments(**changes: Any) -> Any:
    """ServerArgs of `--attention-backend fi_prefetch`, as far as they are looked at."""
    facts = {"dcp_size": 1, "prefill_attention_backend": None, "decode_attention_backend": None}
    return SimpleNamespace(**facts | changes)


def attention(layer_id: int, heads: int = 6, kv_heads: int = 2, head_dim: int = 64, **more: Any) -> RadixAttention:
    return RadixAttention(heads, head_dim, head_dim**-0.5, kv_heads, layer_id, **more)


def with_temperature(layer: RadixAttention, length: int) -> RadixAttention:
    """As Grok's model sets it."""
    layer.xai_temperature_len = length
    return layer


def test_latent_attention_is_refused_with_what_to_use() -> None:
    with pytest.raises(ValueError, match="latent attention.*--attention-backend flashinfer, fa3 or flashmla"):
        create_backend(runner(use_mla_backend=True))


@pytest.mark.parametrize("device", ["xpu", "npu", "hpu"])
def test_other_devices_are_refused_with_what_to_use(device: str) -> None:
    with pytest.raises(ValueError, match=f"expected an NVIDIA GPU.*got device '{device}'.*backend triton"):
        create_backend(runner(device=device))


def test_amd_is_refused_with_what_to_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "hip", "6.4")
    with pytest.raises(ValueError, match="got an AMD GPU; start with --attention-backend triton"):
        create_backend(runner())


def test_missing_flashinfer_is_refused_with_what_to_do() -> None:
    # SGLang says so on a machine without a GPU.
    with pytest.raises(ValueError, match="SGLang finds no FlashInfer.*install flashinfer-python"):
        create_backend(runner())


def test_draft_model_gets_flashinfers_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sglang.srt.utils.is_flashinfer_available", lambda: True)
    monkeypatch.setattr(named_backends, "draft_with_flashinfer", lambda: None)
    monkeypatch.setitem(ATTENTION_BACKENDS, "flashinfer", lambda its_runner: ("flashinfer's", its_runner))
    draft = runner(is_draft_worker=True, spec_algorithm=SimpleNamespace(is_none=lambda: False))
    assert create_backend(draft) == ("flashinfer's", draft)


def test_draft_steps_under_our_name_are_flashinfers(monkeypatch: pytest.MonkeyPatch) -> None:
    from sglang.srt.speculative.draft_utils import DraftBackendFactory

    monkeypatch.setattr(
        DraftBackendFactory, "_create_backend", lambda self, name, table, template: table["fi_prefetch"]()
    )
    named_backends.draft_with_flashinfer()
    wrapped = DraftBackendFactory._create_backend
    named_backends.draft_with_flashinfer()
    assert DraftBackendFactory._create_backend is wrapped
    factory = object.__new__(DraftBackendFactory)
    assert factory._create_backend("decode_attention_backend", {"flashinfer": lambda: 5}, "{backend_type}") == 5


def test_draft_factory_looks_names_up_where_we_add_ours() -> None:
    """SGLang's own factory still takes the table of names that `draft_with_flashinfer` adds to."""
    from sglang.srt.speculative.draft_utils import DraftBackendFactory

    assert list(inspect.signature(DraftBackendFactory._create_backend).parameters)[1:3] == [
        "backend_name", "backend_map"
    ]  # fmt: skip


@pytest.mark.parametrize(("prefill", "cut"), [("fi_prefetch", True), ("fa3", False)])
@pytest.mark.parametrize("deterministic", [True, False])
def test_prefill_is_cut_where_it_is_deterministic_and_flashinfers(
    monkeypatch: pytest.MonkeyPatch, prefill: str, cut: bool, deterministic: bool
) -> None:
    """By what SGLang resolved: --rl-on-policy-target, too, makes inference deterministic."""
    monkeypatch.setattr("sglang.srt.utils.is_flashinfer_available", lambda: True)
    monkeypatch.setattr(named_backends, "default", lambda its_runner: "flashinfer")
    made = SimpleNamespace(enable_deterministic=deterministic)
    monkeypatch.setattr(cuda_backend, "FiPrefetchAttnBackend", lambda its_runner: made)
    calls: list[int] = []
    monkeypatch.setattr(named_backends, "align_prefill_chunks", lambda: calls.append(1))
    assert create_backend(runner(prefill_attention_backend_str=prefill)) is made
    assert bool(calls) == (cut and deterministic)


def test_names_of_the_backends_are_those_that_sglang_resolved() -> None:
    """Before its backends are made, 0.5.23's runner has them; 0.5.16's has not, and its arguments say."""
    assert named_backends.chosen(runner(prefill_attention_backend_str="fa3")) == ("fa3", "fi_prefetch")
    its_arguments = SimpleNamespace(get_attention_backends=lambda: ("fa3", "fi_prefetch"))
    assert named_backends.chosen(SimpleNamespace(server_args=its_arguments)) == ("fa3", "fi_prefetch")
    from sglang.srt.model_executor import model_runner
    from sglang.srt.server_args import ServerArgs

    source = inspect.getsource(model_runner)
    if "self.prefill_attention_backend_str = resolved.prefill" in source:
        assert source.index("self.prefill_attention_backend_str = ") < source.index("build_attention_backends(model_")
    else:
        assert hasattr(ServerArgs, "get_attention_backends")


@pytest.mark.parametrize(
    ("changes", "deterministic", "default", "prefill"),
    [
        ({}, False, "fa3", "fa3"),
        ({"kv_cache_dtype": torch.float8_e4m3fn}, False, "fa3", "fa3"),
        ({}, False, "flashinfer", "flashinfer"),
        ({}, False, "trtllm_mha", "flashinfer"),
        ({"kv_cache_dtype": torch.float8_e5m2}, False, "fa3", "flashinfer"),
        ({"spec_algorithm": SimpleNamespace(is_none=lambda: False)}, False, "fa3", "flashinfer"),
        ({}, True, "fa3", "flashinfer"),
        # SGLang makes two backends of two names itself, of each name its own.
        ({"server_args": arguments(prefill_attention_backend="fi_prefetch")}, False, "fa3", "flashinfer"),
        ({"server_args": arguments(decode_attention_backend="fi_prefetch")}, False, "fa3", "flashinfer"),
        ({"prefill_attention_backend_str": "flashinfer"}, False, "fa3", "flashinfer"),
        ({"decode_attention_backend_str": "triton"}, False, "fa3", "flashinfer"),
    ],
)
def test_prefill_is_sglangs_default_where_that_is_flash_attention(
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    changes: dict[str, Any],
    deterministic: bool,
    default: str,
    prefill: str,
) -> None:
    from sglang.srt.layers.attention import hybrid_attn_backend

    monkeypatch.setattr("sglang.srt.utils.is_flashinfer_available", lambda: True)
    ours = SimpleNamespace(enable_deterministic=deterministic)
    monkeypatch.setattr(cuda_backend, "FiPrefetchAttnBackend", lambda its_runner: ours)
    for name in ("align_prefill_chunks", "draft_with_flashinfer"):
        monkeypatch.setattr(named_backends, name, lambda: None)
    monkeypatch.setattr(named_backends, "default", lambda its_runner: default)
    monkeypatch.setitem(ATTENTION_BACKENDS, "fa3", lambda its_runner: ("fa3's", its_runner))
    monkeypatch.setattr(hybrid_attn_backend, "HybridAttnBackend", lambda *args, **kwargs: (args, kwargs))
    given = runner(**changes)
    with caplog.at_level(logging.INFO, "fi_prefetch"):
        made = create_backend(given)
    if prefill == "fa3":
        assert made == ((given,), {"prefill_backend": ("fa3's", given), "decode_backend": ours})
        assert "--prefill-attention-backend flashinfer" in caplog.text
    else:
        assert made is ours
        assert "FlashAttention-3" not in caplog.text


def test_two_backends_are_put_together_as_sglang_does() -> None:
    from sglang.srt.layers.attention.hybrid_attn_backend import HybridAttnBackend

    expected = ["self", "model_runner", "prefill_backend", "decode_backend"]
    assert list(inspect.signature(HybridAttnBackend.__init__).parameters) == expected


def test_sglangs_default_on_hopper_is_flash_attention(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """By SGLang's own function, of which only the answer to what GPU this is is made up."""
    from sglang.srt import server_args
    from sglang.srt.configs.model_config import ModelConfig

    (tmp_path / "config.json").write_text(json.dumps(tiny_models.CONFIGS["llama"]))
    model = str(tmp_path)
    flags = ["--model-path", model, "--device", "cpu", "--attention-backend", "triton"]
    parsed = server_args.prepare_server_args(flags)
    facts = SimpleNamespace(use_mla_backend=False, model_config=ModelConfig(model), server_args=parsed)
    assert named_backends.default(facts) != "fa3"
    try:
        from sglang.srt.arg_groups import model_override_base
    except ImportError:
        monkeypatch.setattr(server_args, "is_hopper_with_cuda_12_3", lambda: True)
    else:
        platform = SimpleNamespace(is_hopper_with_cuda_12_3=True)
        monkeypatch.setattr(model_override_base, "get_platform", lambda: platform)
    assert named_backends.default(facts) == "fa3"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"model_config": SimpleNamespace(has_attention_sinks=True, attention_chunk_size=None)},
            "has attention sinks, .*--attention-backend fa3 or triton",
        ),
        (
            {
                "model_config": SimpleNamespace(has_attention_sinks=False, attention_chunk_size=8192),
                "model": torch.nn.ModuleList([attention(0), attention(1, use_irope=True)]),
            },
            "has layers that attend within chunks, .*--attention-backend fa3",
        ),
        (
            {"model": torch.nn.ModuleList([with_temperature(attention(0), 1024)])},
            "has attention temperatures that depend on the position, .*--attention-backend triton",
        ),
        (
            {"server_args": arguments(dcp_size=2)},
            r"has decode context parallelism \(--dcp-size\), .*--attention-backend triton",
        ),
    ],
)
@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_what_flashinfers_backend_would_leave_out_is_refused(
    monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], message: str, device: str
) -> None:
    monkeypatch.setattr(named_backends, "do_without_triton", lambda: None)
    with pytest.raises(ValueError, match=message):
        create_backend(runner(device=device, **changes))


def test_chunked_attention_without_chunks_and_temperatures_that_are_off_are_served() -> None:
    plain = torch.nn.ModuleList([with_temperature(attention(0, use_irope=True), -1), attention(1)])
    assert layers.unserved_feature(runner(model=plain)) is None


def test_models_say_what_the_refusals_ask_for(tmp_path: Path) -> None:
    from sglang.srt.configs.model_config import ModelConfig

    (tmp_path / "config.json").write_text(json.dumps(tiny_models.CONFIGS["llama"]))
    said = ModelConfig(str(tmp_path))
    assert (said.has_attention_sinks, said.attention_chunk_size) == (False, None)
    layer = attention(0)
    assert (layer.use_irope, layer.xai_temperature_len) == (False, -1)


def test_deterministic_prefill_is_cut_as_flashinfers(monkeypatch: pytest.MonkeyPatch) -> None:
    from sglang.srt.managers.scheduler import Scheduler

    def names_no_size(self: Any) -> None:
        self.truncation_align_size = None

    monkeypatch.setattr(Scheduler, "init_deterministic_inference_config", names_no_size)
    named_backends.align_prefill_chunks()
    scheduler = object.__new__(Scheduler)
    scheduler.init_deterministic_inference_config()
    assert scheduler.truncation_align_size == 4096


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"decode_uses_dequant_workspace": True}, "unpacked into a workspace"),
        ({"_layers": []}, "no attention layers"),
        ({"_layers": [attention(0), attention(1, heads=4)]}, "layer 1 has 4 query heads"),
        ({"_layers": [attention(0), attention(1, head_dim=128)]}, "layer 1 .* head dimensions 128 and 128"),
        ({"_layers": [attention(0, v_head_dim=32)]}, "layer 0 .* head dimensions 64 and 32"),
        ({"enable_deterministic": True}, None),
        ({}, None),
    ],
)
def test_models_that_flashinfer_decodes(changes: dict[str, Any], reason: str | None) -> None:
    backend = object.__new__(FiPrefetchAttnBackend)
    facts = {
        "enable_deterministic": False,
        "decode_uses_dequant_workspace": False,
        "_layers": [attention(0), attention(1)],
        "indices_updater_decode": SimpleNamespace(num_qo_heads=6, num_kv_heads=2, head_dim=64),
    }
    for name, value in (facts | changes).items():
        setattr(backend, name, value)
    obstacle = backend._obstacle()
    if reason is None:
        assert obstacle is None
    else:
        with pytest.raises(ValueError, match=reason):
            raise ValueError(obstacle)


def test_layers_come_in_the_order_of_their_numbers() -> None:
    model = torch.nn.ModuleList([attention(2), torch.nn.Linear(2, 2), attention(0)])
    assert [layer.layer_id for layer in layers.attention_layers(model)] == [0, 2]


def test_an_encoders_layers_have_no_part_in_decoding() -> None:
    """Whisper's, with numbers that its decoder's layers have too."""
    encoder = attention(0, heads=4, attn_type=AttentionType.ENCODER_ONLY)
    decoder = [attention(0), attention(1, is_cross_attention=True)]
    assert layers.attention_layers(torch.nn.ModuleList([encoder, *decoder])) == decoder


@pytest.mark.parametrize("error", [KeyError(7), IndexError("list index out of range"), AssertionError()])
def test_layer_without_kv_is_left_to_flashinfer(error: Exception) -> None:
    def get_kv_buffer(number: int) -> Any:
        raise error

    backend = object.__new__(FiPrefetchAttnBackend)
    backend._layers = [attention(7)]
    backend.workspace_buffer = torch.empty(1, dtype=torch.uint8)
    backend.indices_updater_decode = SimpleNamespace(num_qo_heads=6, num_kv_heads=2, head_dim=64)
    backend.token_to_kv_pool = SimpleNamespace(get_kv_buffer=get_kv_buffer)
    assert backend._try_each_layer() == f"layer 7: SGLang's pool has no KV for it: {error!r}"


@pytest.mark.parametrize(
    ("pdmux", "variable", "ready", "reason"),
    [
        (False, None, "plan", "one token a request"),
        (False, "plan", "plan", "one token a request"),
        (False, "all_but_last_token", "all_but_last_token", settings.READY_VARIABLE),
        (True, "plan", "page_table", "another stream"),
        (True, None, "page_table", "another stream"),
        (False, "page_table", "page_table", settings.READY_VARIABLE),
        (False, "nothing", "nothing", settings.READY_VARIABLE),
        (True, "all_but_last_token", "page_table", "another stream"),
    ],
)
def test_promise(monkeypatch: pytest.MonkeyPatch, pdmux: bool, variable: str | None, ready: str, reason: str) -> None:
    monkeypatch.delenv(settings.READY_VARIABLE, raising=False)
    if variable is not None:
        monkeypatch.setenv(settings.READY_VARIABLE, variable)
    promise = promises.keeps(SimpleNamespace(enable_pdmux=pdmux))
    assert promise.ready == ready
    assert reason in promise.reason


@pytest.mark.parametrize(
    ("variable", "read"), [(settings.READY_VARIABLE, settings.most_ready), (settings.WINDOW_VARIABLE, settings.window)]
)
def test_environment_with_a_wrong_word(monkeypatch: pytest.MonkeyPatch, variable: str, read: Any) -> None:
    monkeypatch.setenv(variable, "everything")
    with pytest.raises(ValueError, match=f"{variable}: expected one of .*, got 'everything'"):
        read()


@pytest.mark.parametrize("off", [False, True])
@pytest.mark.parametrize("resolved_apart", [False, True], ids=["in ServerArgs", "apart from them"])
def test_requests_share_slots_where_there_is_a_radix_cache(
    monkeypatch: pytest.MonkeyPatch, off: bool, resolved_apart: bool
) -> None:
    """By what SGLang resolved, which 0.5.23 keeps apart from the flags as they were given."""
    runner = SimpleNamespace(server_args=SimpleNamespace(disable_radix_cache=off and not resolved_apart))
    if resolved_apart:
        memory = SimpleNamespace(disable_radix_cache=off)
        monkeypatch.setattr("sglang.srt.runtime_context.get_memory", lambda: memory, raising=False)
    else:
        monkeypatch.delattr("sglang.srt.runtime_context.get_memory", raising=False)
    assert named_backends.requests_share_slots(runner) is not off


def test_cpu_backend_refuses_what_the_reference_does_not_serve(caplog: pytest.LogCaptureFixture) -> None:
    from fi_prefetch.sglang.cpu_backend import CpuAttnBackend

    model = torch.nn.ModuleList([attention(0, v_head_dim=32)])
    pools = {"req_to_token_pool": None, "token_to_kv_pool": None}
    facts = SimpleNamespace(device="cpu", dtype=torch.float32, kv_cache_dtype=torch.float32, model=model, **pools)
    with pytest.raises(ValueError, match="keys have 64 elements and its values 32.*torch_native"):
        CpuAttnBackend(facts)
    facts.model = torch.nn.ModuleList([attention(0)])
    facts.model_config = SimpleNamespace(is_encoder_decoder=True)
    with pytest.raises(ValueError, match="encoder-decoder.*torch_native"):
        CpuAttnBackend(facts)
    facts.model_config = SimpleNamespace(is_encoder_decoder=False)
    with caplog.at_level(logging.INFO, "fi_prefetch"):
        CpuAttnBackend(facts)
    assert "kernel reference" in caplog.text
