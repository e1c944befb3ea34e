"""Attention where it is used: a CUDA graph of decoder layers; benchmarks/results/<gpu>/layer.json.

A layer is norm, QKV projection, rotary embedding with the KV write, attention, output projection, norm and MLP, as one
rank of a model runs it. The kernel before attention lets its dependents start at once where the row says so. What
attention costs is a layer less the same layer without it: see Steps.
"""

from __future__ import annotations

import functools
import statistics
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from fi_prefetch.prefetch import PrefetchPolicy

from . import kernels
from .baselines import BASELINES, Call, Prepare, prepare_ours
from .inputs import DecodeInputs
from .prefetch import POLICIES
from .shapes import MODELS, Model, parse_lens
from .timing import Timing, capture, time_graph
from .worker import Context, check_error

LAYERS = 4
ROUNDS = 4  # through the layers, in one graph
BATCHES = ("1x2K", "1x8K", "8x1K", "16x1K", "64x512", "16x4K")

# Name in the file -> policy, promise, whether attention is launched as a dependent of the kernel before it.
VARIANTS: dict[str, tuple[PrefetchPolicy, str, bool]] = {
    "no_dependent_launch": (*POLICIES["off"], False),
    "off": (*POLICIES["off"], True),
    "prologue": (*POLICIES["prologue"], True),
    "early_load": (*POLICIES["early_load"], True),
    "auto": (*POLICIES["auto"], True),
    "auto_ready": (*POLICIES["auto_ready"], True),
    "auto_plan": (*POLICIES["auto_plan"], True),
    "no_dependent_launch_again": (*POLICIES["off"], False),
}


def specs() -> list[dict[str, Any]]:
    """A Llama-8B, and one of eight ranks of a 70B, over batches with up to 256 MB of KV a layer."""
    return [
        {
            "model": model,
            "tensor_parallel": ranks,
            **MODELS[model].slice(ranks).shape(parse_lens(lens)).to_row(),
        }
        for model, ranks in (("llama-3-8b", 1), ("llama-3-70b", 8))
        for lens in BATCHES
    ]


class LayerStack:
    """The layers' weights, activations and caches, and the work of a step up to and after attention."""

    def __init__(self, model: Model, inputs: DecodeInputs, layers: int) -> None:
        device, batch = inputs.q.device, inputs.shape.batch
        self._model, self._inputs = model, inputs
        heads = model.heads_q + 2 * model.heads_kv
        self._weights = [
            [
                torch.randn(rows, columns, device=device, dtype=torch.bfloat16) * rows**-0.5
                for rows, columns in (
                    (model.hidden, heads * model.head_dim),
                    (model.heads_q * model.head_dim, model.hidden),
                    (model.hidden, 2 * model.intermediate),
                    (model.intermediate, model.hidden),
                )
            ]
            for _ in range(layers)
        ]
        self._gain = torch.ones(model.hidden, device=device, dtype=torch.bfloat16)
        self._x = torch.randn(batch, model.hidden, device=device, dtype=torch.bfloat16)
        self._qkv = torch.empty(batch, heads, model.head_dim, device=device, dtype=torch.bfloat16)
        # Attention reads the queries where the projection and the rotation left them.
        inputs.q = self._qkv[:, : model.heads_q]
        self._positions = inputs.seq_lens - 1
        last_pages = inputs.indices[(inputs.indptr[1:] - 1).long()]
        self._slots = last_pages * inputs.shape.page_size + inputs.last_page_len - 1
        angles = torch.rand(max(inputs.shape.lengths), model.head_dim // 2, device=device) * 6.0
        self._cos_sin = torch.cat([angles.cos(), angles.sin()], dim=-1).contiguous()

    def before_attention(self, layer: int, trigger_early: bool) -> torch.Tensor:
        """Norm, QKV projection, rotation, KV write. Returns what the residual adds to."""
        x = self._x
        torch.mm(F.rms_norm(x, (self._model.hidden,), self._gain), self._weights[layer][0], out=self._qkv.flatten(1))
        k, v = self._inputs.cache(layer)
        kernels.module().rope_and_write(
            self._qkv,
            self._cos_sin,
            self._positions,
            self._slots,
            k,
            v,
            self._model.heads_q,
            self._model.heads_kv,
            trigger_early,
        )
        return x

    def after_attention(self, layer: int, x: torch.Tensor) -> None:
        """Output projection, norm, MLP. The sum is left out of the next layer's input: it would grow without end."""
        _, output, gate_up, down = self._weights[layer]
        x = x + self._inputs.out.flatten(1) @ output
        gate, up = (F.rms_norm(x, (self._model.hidden,), self._gain) @ gate_up).chunk(2, dim=-1)
        torch.add(x, (F.silu(gate) * up) @ down)

    def step(self, layers: int, attention: Call | None, trigger_early: bool) -> None:
        """ROUNDS times through the layers."""
        for _ in range(ROUNDS):
            for layer in range(layers):
                x = self.before_attention(layer, trigger_early)
                if attention is not None:
                    attention(layer)
                self.after_attention(layer, x)


class Steps:
    """CUDA graphs of a variant's steps, timed in turns with the others'.

    What attention costs is the small difference of two large times, so both are of the same minutes: a GPU that gets
    warmer, or another clock, would else pass for a variant (2 % of a layer of 140 us is more than most of them save).
    And both are means over several graphs, of which the same variant's were up to 0.9 us apart (H200).
    """

    GRAPHS = 2
    TURNS = 3
    REPLAYS = 9  # a turn

    def __init__(self, step: Callable[[], None]) -> None:
        self._step = step  # a graph reads what its wrapper planned, and does not keep it
        self._graphs = [capture(step) for _ in range(self.GRAPHS)]
        self._turns: list[list[float]] = [[] for _ in self._graphs]

    def take_turn(self) -> None:
        for graph, turns in zip(self._graphs, self._turns, strict=True):
            turns.append(time_graph(graph, ROUNDS * LAYERS, self.REPLAYS).us)

    def timing(self) -> Timing:
        """Of a layer: the mean over graphs of their turns' median; spread: how far the turns of a graph lie apart."""
        medians = [statistics.median(turns) for turns in self._turns]
        spread = max((max(turns) - min(turns)) / median for turns, median in zip(self._turns, medians, strict=True))
        return Timing(statistics.mean(medians), spread)


def measure(spec: dict[str, Any], context: Context) -> dict[str, Any]:
    """One row: a layer's time without attention, with each variant of ours, and with the baselines; and the errors of
    what attention gave in the first layer."""
    model = MODELS[spec["model"]].slice(spec["tensor_parallel"])
    lens = tuple((length, count) for length, count in spec["kv_lens"])
    inputs = DecodeInputs(model.shape(lens), context.pool("bfloat16"), context.facts.l2_bytes, copies=LAYERS)
    inputs.out.normal_()
    stack = LayerStack(model, inputs, LAYERS)

    def steps(attention: Call | None, trigger_early: bool) -> Steps:
        return Steps(lambda: stack.step(LAYERS, attention, trigger_early))

    def checked(attention: Call, trigger_early: bool) -> tuple[Steps, float]:
        # The projection gives the same queries and KV every time, so one truth is that of all variants.
        inputs.out.fill_(float("nan"))
        stack.before_attention(0, trigger_early)
        attention(0)
        error = check_error(inputs.error(inputs.out))
        return steps(attention, trigger_early), error

    def ours(policy: PrefetchPolicy, ready: str, dependent: bool) -> tuple[Steps, float]:
        _, call = prepare_ours(inputs, policy, ready, enable_pdl=dependent)
        return checked(call, dependent)

    def theirs(prepare: Prepare) -> tuple[Steps, float]:
        return checked(prepare(inputs), True)

    candidates: dict[str, tuple[Callable[[], tuple[Steps, float]], bool]] = {
        name: (functools.partial(ours, *variant), variant[2]) for name, variant in VARIANTS.items()
    }
    for name in context.options["baselines"]:
        candidates[name] = (functools.partial(theirs, BASELINES[name]), True)

    without = {trigger: steps(None, trigger) for trigger in (False, True)}
    row: dict[str, Any] = {
        **spec,
        "without_attention_us": {},
        "us": {},
        "attention_us": {},
        "spread": {},
        "errors": {},
        "missing": {},
    }
    found: dict[str, Steps] = {}
    for name, (action, _) in candidates.items():
        result, reason = context.attempt(name, action)
        if result is None:
            row["us"][name] = row["attention_us"][name] = None
            row["missing"][name] = reason
        else:
            found[name], row["errors"][name] = result
    for _ in range(Steps.TURNS):
        for each in (*without.values(), *found.values()):
            each.take_turn()
    base = {trigger: each.timing().us for trigger, each in without.items()}
    row["without_attention_us"] = {"plain": round(base[False], 3), "early_trigger": round(base[True], 3)}
    for name, each in found.items():
        timing = each.timing()
        row["us"][name], row["spread"][name] = round(timing.us, 3), round(timing.spread, 4)
        row["attention_us"][name] = round(timing.us - base[candidates[name][1]], 3)
    return row
