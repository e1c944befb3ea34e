"""The random sessions of tests/gpu/random_plans.py without a GPU: their reference against attention written from its
definition, whole sessions on the emulated kernel, and that each kind of wrong answer is found."""

from __future__ import annotations

import functools
import itertools
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from emulator import module as emulated_module

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "gpu"))

import harness  # noqa: E402
import random_plans  # noqa: E402
import soak  # noqa: E402
from random_plans import Memory, Runner, Session, Shape, Step, Wrong, cache_pages, case_of, truth  # noqa: E402

from fi_prefetch import device, jit  # noqa: E402

CPU = torch.device("cpu")
GPU = device.GpuFacts("emulated", "emulated", (9, 0), 5, 50 << 20, None, False)
load = functools.cache(emulated_module.load)


@pytest.fixture
def emulated(monkeypatch):
    """The CPU passes for a GPU that has our kernel."""
    monkeypatch.setattr(device, "facts", lambda where: GPU)
    monkeypatch.setattr(jit, "load", load)
    monkeypatch.setattr("fi_prefetch.decode.device_support_pdl", lambda where: True)


def runner() -> Runner:
    return Runner(CPU, budget=200, compare=False, workspace_bytes=1 << 22)


def inputs_of(step: Step, shape: Shape, budget: int = 300) -> harness.Inputs:
    case = case_of(step, shape, budget)
    return Memory(case, cache_pages(case), CPU).load(case)


# Each kind of lengths with one order of pages, and each order.
KINDS_AND_ORDERS = list(zip(random_plans.KINDS, itertools.cycle(random_plans.ORDERS), strict=False))


@pytest.mark.parametrize(("kind", "order"), KINDS_AND_ORDERS)
@pytest.mark.parametrize(
    "shape",
    [
        Shape(page=1),
        Shape(page=5, layout="HND", storage="strided", q_len=4, group=2),
        Shape(("bf16", "e4m3", "bf16", 128, True, False), window=17, q_len=2, storage="swapped"),
        Shape(("bf16", "bf16", "bf16", 128, True, True), window=0, cap=1.0, storage="one"),
        Shape(("f16", "e5m2", "f16", 64, False, False), page=7, storage="different_strides", sm_scale=0.3),
    ],
    ids=str,
)
def test_the_reference_is_attention(kind: str, order: str, shape: Shape) -> None:
    inputs = inputs_of(Step(5, kind, 100, order, sinks=order == "shared", scales=(0.5, None, 1.7), seed=3), shape)
    got = truth(inputs)
    expected, expected_lse = harness.truth(inputs)
    # Far inside what it allows a kernel, or its verdict would be about itself.
    assert bool(((got.out - expected).abs() <= 0.02 * got.out_error).all())
    same = got.lse == expected_lse
    assert bool((same | ((got.lse - expected_lse).abs() <= 0.1 * got.lse_error)).all())


def test_what_no_request_holds_is_nan_and_nothing_else_is() -> None:
    for order in random_plans.ORDERS:
        inputs = inputs_of(Step(5, "any", 100, order, seed=1), Shape(page=5))
        assert bool((inputs.k.float().isnan().all(-1).all(-1) == inputs.unused).all())
        assert bool(inputs.unused.any()) and not bool(inputs.unused.all())


def test_sessions_say_everything_that_a_plan_can_say() -> None:
    """Over thousands of cases, each choice of a strategy and each compiled variant comes up. What one seed draws also
    depends on hypothesis's release and on the constants in modules that are loaded: so in turns, until all have."""
    seen: list[Session] = []

    class Watcher:
        passed = 0

        def run(self, session: Session) -> None:
            seen.append(session)
            self.passed += len(session.steps)

    everything = {
        "kind": set(random_plans.KINDS),
        "order": set(random_plans.ORDERS),
        "batch": set(random_plans.BATCHES),
        "how": {"plan", "run", "replay", "plan and replay"},
        "workspace": {"same", "large", "exact"},
        "compiled": set(random_plans.COMPILED),
        "fixed": set(random_plans.FIXED_SPLIT_COMPILED),
        "split": set(random_plans.FIXED_SPLITS),
        "blocks": {0, 1, 3},
        "storage": set(random_plans.STORAGES),
        "policy": set(random_plans.POLICIES),
    }

    def said() -> dict[str, set]:
        steps = [step for session in seen for step in session.steps]
        shapes = [shape for session in seen for shape in session.shapes]
        of_steps = ("kind", "order", "batch", "how", "workspace")
        return {
            **{name: {getattr(step, name) for step in steps} for name in of_steps},
            "compiled": {shape.compiled for shape in shapes if not shape.split},
            "fixed": {shape.compiled for shape in shapes if shape.split},
            "split": {shape.split for shape in shapes if shape.split},
            "blocks": {shape.blocks for shape in shapes},
            "storage": {shape.storage for shape in shapes},
            "policy": {session.policy for session in seen},
        }

    for seed in range(5, 25):
        random_plans.explore(Watcher(), 4000, seed, random_plans.sessions())
        if said() == everything:
            break
    assert said() == everything
    shapes = [shape for session in seen for shape in session.shapes]
    assert 0.05 < sum(shape.split != 0 for shape in shapes) / len(shapes) < 0.2


def test_the_same_seed_gives_the_same_sessions() -> None:
    class Watcher:
        def __init__(self) -> None:
            self.passed, self.seen = 0, []

        def run(self, session: Session) -> None:
            self.seen.append(session)
            self.passed += len(session.steps)

    first, second, other = Watcher(), Watcher(), Watcher()
    for watcher, seed in ((first, 1), (second, 1), (other, 2)):
        random_plans.explore(watcher, 100, seed, random_plans.sessions())
    assert first.seen == second.seen != other.seen


SMALL = (
    Step(3, "any", 60, "shuffled", "plan", seed=1),
    Step(3, "many empty", 40, "shared", "run", sinks=True, scales=(0.5, None, 1.7), seed=2),
    Step(1, "one long", 150, "repeated", "plan", with_lse=False, workspace="exact", seed=3),
    Step(40, "tiles", 40, "spread", "plan", seed=4),
    Step(2, "all empty", 40, "sequential", "plan", workspace="large", seed=5),
)
# On a grid of one block: pieces so long that its warps read kv heads abreast.
LONG = (
    Step(20, "any", 300, "shuffled", "plan", seed=1),
    Step(8, "equal", 300, "shuffled", "run", sinks=True, seed=2),
    Step(20, "many empty", 300, "shuffled", "plan", workspace="exact", seed=3),
    Step(17, "equal", 300, "shuffled", "plan", workspace="large", seed=4),
)


@pytest.mark.parametrize(
    "session",
    [
        Session((Shape(),), SMALL),
        Session((Shape(page=1, storage="one"), Shape(page=5, group=2, q_len=4)), SMALL, ready="page_table"),
        Session(
            (Shape(("bf16", "bf16", "bf16", 64, True, False), window=17, layout="HND", storage="strided"),),
            SMALL,
            out_given=False,
        ),
        Session((Shape(("bf16", "e4m3", "bf16", 128, False, False), group=12),), SMALL, policy="off"),
        Session(
            (Shape(),),
            tuple(replace(step, how=how) for step, how in zip(SMALL, random_plans.GRAPH_WAYS[1:], strict=True)),
            graph=True,
        ),
        Session((Shape(blocks=1), Shape(("bf16", "e4m3", "bf16", 128, False, False), heads_kv=4, blocks=1)), LONG),
        Session((Shape(split=1), Shape(), Shape(split=harness.WHOLE, page=1), Shape(split=3, page=5, group=12)), SMALL),
        Session(
            (Shape(split=2),),
            tuple(replace(step, how=how) for step, how in zip(SMALL, random_plans.GRAPH_WAYS[1:], strict=True)),
            graph=True,
        ),
    ],
    ids=["plain", "shapes in turn", "window", "fp8", "graph", "abreast", "splits in turn", "splits in a graph"],
)
def test_sessions_pass_on_the_emulated_kernel(emulated, session: Session) -> None:
    run = runner()
    for _ in range(2):
        run.run(session)
        assert run.passed == len(session.steps), "a case counts once"


@pytest.mark.parametrize("sm_count", [1, 7, 16, 132])
def test_gpus_of_other_sizes_down_to_a_slice_of_one(emulated, monkeypatch, sm_count: int) -> None:
    """What MIG leaves of a GPU is a GPU of fewer SMs; the grid follows, and the answers stay right."""
    blocks = []

    class Watching:
        def run(self, workspace, counters, info, *rest) -> None:
            blocks.append(int(info[0]))
            load(self.variant).run(workspace, counters, info, *rest)

        def __init__(self, variant) -> None:
            self.variant = variant

        def __getattr__(self, name: str):
            return getattr(load(self.variant), name)

    monkeypatch.setattr(device, "facts", lambda where: replace(GPU, sm_count=sm_count))
    monkeypatch.setattr(jit, "load", functools.cache(Watching))
    runner().run(Session((Shape(),), SMALL[:1]))
    assert blocks and all(count % sm_count == 0 for count in blocks)


class Tampering:
    """Our module, with something wrong after every call."""

    def __init__(self, module, tamper) -> None:
        self._module, self._tamper = module, tamper

    def run(self, workspace, counters, info, q, k, v, indptr, indices, last, out, lse, *rest) -> None:
        self._module.run(workspace, counters, info, q, k, v, indptr, indices, last, out, lse, *rest)
        self._tamper(workspace, counters, out, lse)

    def __getattr__(self, name: str):
        return getattr(self._module, name)


def beyond(tensor: torch.Tensor, offset: int) -> torch.Tensor:
    """A byte `offset` bytes after the tensor's first."""
    raw = torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage())
    return raw[tensor.storage_offset() * tensor.element_size() + offset :][:1]


def unsteady():
    """One bit of one element, every second time."""
    turn = itertools.cycle([0, 1])

    def tamper(workspace, counters, out, lse) -> None:
        smallest = out[0, 0].abs().argmin()
        out.view(torch.int16)[0, 0, smallest] ^= next(turn)

    return tamper


TAMPERING = {
    "a counter is not zero": lambda workspace, counters, out, lse: counters[3:4].fill_(1),
    "written outside the workspace": lambda workspace, counters, out, lse: beyond(workspace, workspace.numel()).zero_(),
    "written outside out": lambda workspace, counters, out, lse: beyond(out, -1).zero_(),
    "written outside lse": lambda workspace, counters, out, lse: beyond(lse, 4 * lse.numel()).zero_(),
    "of what rounding allows": lambda workspace, counters, out, lse: out[-1, -1, -1:].add_(0.02),
    "LSE is off by": lambda workspace, counters, out, lse: lse[0, :1].add_(1e-2),
    r"out\[0, 0, 0\] is nan": lambda workspace, counters, out, lse: out[0, 0, :1].fill_(torch.nan),
    "gave another output": unsteady(),
}


@pytest.mark.parametrize("message", TAMPERING)
def test_each_kind_of_wrong_answer_is_found(emulated, monkeypatch, message: str) -> None:
    tampered = functools.cache(lambda variant: Tampering(load(variant), TAMPERING[message]))
    monkeypatch.setattr(jit, "load", tampered)
    with pytest.raises(Wrong, match=message):
        runner().run(Session((Shape(),), (Step(3, "equal", 60, seed=1),)))


# ---- the soak ------------------------------------------------------------------------------------------------------


@pytest.fixture
def small_soak(emulated, monkeypatch):
    for name, value in (("BATCH", 3), ("LONGEST", 40)):
        monkeypatch.setattr(soak, name, value)
    return lambda: soak.soak(20, CPU, calls_a_graph=4, tables=3)


def test_the_soak_passes_on_the_emulated_kernel(small_soak) -> None:
    result = small_soak()
    assert result["calls"] >= 20 and not result["wrong"] and not result["problems"]


def test_the_soak_counts_every_wrong_answer(small_soak, monkeypatch) -> None:
    """After the answers that were checked beforehand, one call in the middle of a graph goes wrong."""
    numbers = itertools.count()

    def tamper(workspace, counters, out, lse) -> None:
        if next(numbers) == 2 * 2 * 3 + 6:
            out.view(torch.int16)[-1, -1, -1] ^= 1

    monkeypatch.setattr(jit, "load", functools.cache(lambda variant: Tampering(load(variant), tamper)))
    result = small_soak()
    assert result["wrong"] == 1 and "1 answers have other bits" in result["problems"]


def test_a_failing_session_is_printed_ready_to_be_run_again(capsys) -> None:
    class Failing:
        passed = 0

        def __init__(self) -> None:
            self.seen: list[Session] = []

        def run(self, session: Session) -> None:
            self.seen.append(session)
            self.passed += len(session.steps)
            if len(self.seen) == 7:
                raise Wrong("step 3")

    failing = Failing()
    with pytest.raises(Wrong, match="step 3"):
        random_plans.explore(failing, 1000, 1, random_plans.sessions())
    said = [line for line in capsys.readouterr().out.splitlines() if "this session fails: " in line]
    assert len(said) == 1
    names = {"Session": Session, "Shape": Shape, "Step": Step}
    assert eval(said[0].partition("fails: ")[2], names) == failing.seen[6]
    assert len(failing.seen) == 7, "and nothing more is run on a GPU that may be gone"
