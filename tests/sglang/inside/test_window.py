"""When the all-reduce window prefetches, and what: the order of events in a decode step, without a GPU."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sglang.srt.layers.radix_attention import RadixAttention

from fi_prefetch.sglang import window

LAYERS = [RadixAttention(6, 64, 0.125, 2, number) for number in range(3)]


def server_args(**changes: bool) -> Any:
    modes = {"enable_two_batch_overlap": False, "enable_pdmux": False, "enable_torch_compile": False}
    return SimpleNamespace(**modes | changes)


@pytest.fixture
def events(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What happened, in order: prefetches of a layer's cache, and joins of the side stream."""
    happened: list[Any] = []

    def prefetch(wrapper: Any, cache: Any, stream: Any) -> bool:
        happened.append(("prefetch", wrapper, cache))
        return True

    monkeypatch.setattr(window, "prefetch_kv", prefetch)
    main = SimpleNamespace(wait_stream=lambda stream: happened.append("join"))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: main)
    return happened


@pytest.fixture
def opened() -> window.AllReduceWindow:
    backend = SimpleNamespace(
        forward_metadata=SimpleNamespace(decode_wrappers=["wrapper 0", "wrapper 1"]),
        token_to_kv_pool=SimpleNamespace(get_kv_buffer=lambda number: f"cache {number}"),
        _get_wrapper_idx=lambda layer: layer.layer_id % 2,
    )
    return window.AllReduceWindow(backend, LAYERS, stream=None)


def step(opened: window.AllReduceWindow, all_reduces_a_layer: int = 2) -> None:
    opened.before_all_reduce()  # the embedding's
    for layer in LAYERS:
        opened.after_attention(layer)
        for _ in range(all_reduces_a_layer):
            opened.before_all_reduce()


def test_each_layers_mlp_prefetches_for_the_next(opened: window.AllReduceWindow, events: list[Any]) -> None:
    step(opened)
    assert events == [
        ("prefetch", "wrapper 1", "cache 1"), "join", ("prefetch", "wrapper 0", "cache 2"), "join"
    ]  # fmt: skip


def test_nothing_is_left_unjoined_after_a_step(opened: window.AllReduceWindow, events: list[Any]) -> None:
    step(opened)
    step(opened)
    assert not opened._unjoined
    assert events.count("join") == sum(event != "join" for event in events)


def test_prefill_prefetches_nothing(opened: window.AllReduceWindow, events: list[Any]) -> None:
    for _ in range(7):
        opened.before_all_reduce()
    assert events == []


def test_models_that_reduce_once_a_layer_prefetch_nothing(opened: window.AllReduceWindow, events: list[Any]) -> None:
    step(opened, all_reduces_a_layer=1)
    assert events == []


def test_group_of_one_gets_no_window(monkeypatch: pytest.MonkeyPatch) -> None:
    import sglang.srt.distributed

    monkeypatch.setattr(sglang.srt.distributed, "get_tp_group", lambda: SimpleNamespace(world_size=1))
    assert window.AllReduceWindow.open(SimpleNamespace(), LAYERS, server_args()) is None


@pytest.mark.parametrize("mode", ["two_batch_overlap", "pdmux", "torch_compile"])
def test_window_stays_closed_where_all_reduces_cannot_be_counted(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, mode: str
) -> None:
    import sglang.srt.distributed

    group = SimpleNamespace(world_size=2, all_reduce=None)
    monkeypatch.setattr(sglang.srt.distributed, "get_tp_group", lambda: group)
    its_arguments = server_args(**{f"enable_{mode}": True})
    assert window.AllReduceWindow.open(SimpleNamespace(), LAYERS, its_arguments) is None
    assert group.all_reduce is None
    assert f"the all-reduce window stays closed with --enable-{mode.replace('_', '-')}" in caplog.text


def test_window_watches_the_groups_all_reduce(monkeypatch: pytest.MonkeyPatch, events: list[Any]) -> None:
    import sglang.srt.distributed

    group = SimpleNamespace(world_size=2, all_reduce=lambda tensor: tensor + 1)
    monkeypatch.setattr(sglang.srt.distributed, "get_tp_group", lambda: group)
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: "stream")
    opened = window.AllReduceWindow.open(SimpleNamespace(workspace_buffer=torch.empty(1)), LAYERS, server_args())
    calls: list[int] = []
    monkeypatch.setattr(opened, "before_all_reduce", lambda: calls.append(1))
    assert group.all_reduce(torch.tensor(1)) == 2
    assert calls == [1]
