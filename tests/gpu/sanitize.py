"""What compute-sanitizer watches: every variant of the kernels on small shapes, each answer held against the reference.

Run it through `fi-prefetch check`, or by itself: `compute-sanitizer --tool memcheck python tests/gpu/sanitize.py`.
Its last line says how many cases passed and how many failed.

With `--initcheck`, what the kernels read comes to the GPU by copies alone, and what they write is memory that nobody
wrote before: a partial result or an element that is read before it is written shows. For that PyTorch must not hand out
memory twice: PYTORCH_NO_CUDA_MEMORY_CACHING=1.
"""

from __future__ import annotations

import dataclasses
import sys
import traceback
from collections.abc import Callable

import torch
from harness import (
    DEVICE,
    WHOLE,
    Case,
    Inputs,
    build,
    new_wrapper,
    plan,
    poison_unused,
    relative_error,
    run,
    same_bits,
    truth,
)
from random_plans import COMPILED, FIXED_SPLIT_COMPILED

import fi_prefetch

TOLERANCE = 0.02
INITCHECK_WORKSPACE = 24 << 20


def cases() -> list[tuple[Case, dict[str, str]]]:
    """Cases, each with options of the wrapper."""
    dtypes = (("bf16", "bf16"), ("bf16", "e4m3"), ("bf16", "e5m2"), ("f16", "f16"), ("f16", "e4m3"), ("f16", "e5m2"))
    lens = (1, 0, 40, 300)
    plain = [Case(lens=lens, q=q, kv=kv, dim=dim, page=1) for q, kv in dtypes for dim in (64, 128, 256)]
    # More than 32 requests have a kernel of their own.
    plain += [Case(lens=lens + (20,) * 30, q=q, kv=kv) for q, kv in dtypes]
    plain += [Case(lens=lens, page=64, layout="HND", kv=kv) for kv in ("bf16", "e4m3")]
    plain += [Case(lens=lens, page=page) for page in (3, 16)]
    plain += [Case(lens=(200, 33), heads=(2 * group, 2), dim=dim) for group in (1, 8, 16) for dim in (64, 128, 256)]
    plain += [Case(lens=(20000,), heads=(8, 1)), Case(lens=(9000, 5, 700), page=1), Case(lens=(20,) * 150, page=1)]
    plain += [Case(lens=(0,)), Case(lens=(0, 0, 5)), Case(lens=(64,) * 40, heads=(32, 32))]
    plain += [Case(lens=lens, window=window) for window in (0, 17, 200)]
    plain += [Case(lens=lens, cap=30.0), Case(lens=lens, cap=30.0, window=17), Case(lens=lens, sinks=True)]
    plain += [Case(lens=(16, 300), q_len=q_len) for q_len in (2, 4)]
    plain += [Case(lens=lens, storage=storage) for storage in ("one", "strided", "different_strides")]
    plain += [Case(lens=(700, 3, 64), position=position, q_len=2) for position in ("ROPE_LLAMA", "ALIBI")]
    # Long pieces, whose warps read kv heads abreast and meet by themselves: eight, four and two heads of a warp's own.
    plain += [
        Case(lens=(300, 450, 0, 20, 500, 380), heads=(group * heads, heads), kv=kv, dim=dim, blocks=2)
        for heads, group, kv, dim in (
            (8, 4, "bf16", 128),
            (4, 12, "e4m3", 128),
            (16, 1, "bf16", 64),
            (8, 2, "bf16", 256),
        )
    ]
    # Small tiles, copied whole; and by warps that read eight heads abreast in step.
    plain += [
        Case(lens=lens, q=q, kv=kv, dim=dim, page=page, blocks=blocks, listed=64)
        for q, kv, dim in (("bf16", "e4m3", 128), ("f16", "e5m2", 64), ("bf16", "bf16", 64))
        for lens, page, blocks in (((1, 0, 40, 300), 16, 0), ((20,) * 40, 48, 0))
    ]
    plain += [
        Case(lens=(300, 450, 0, 20, 500, 380), heads=(16, 8), kv=kv, page=16, blocks=2, listed=64)
        for kv in ("bf16", "e4m3")
    ]
    # The batch-invariant kernel: one split, several, more than are merged in one go, and a table in shared memory.
    splits = (Case(lens=(700, 3, 0, 64)), Case(lens=(1700, 90), kv="e4m3"), Case(lens=(20,) * 40, heads=(24, 2)))
    plain += [dataclasses.replace(case, page=1, split=split) for case in splits for split in (WHOLE, 33, 256)]
    plain += [Case(lens=lens, o="f16"), Case(lens=lens, q="f16", kv="f16", o="bf16")]
    # Of every variant that the suite compiles the kernels for up to 8 query rows and for up to 16, the former on a few
    # requests, the latter on more.
    plain += [
        Case(
            lens=(90, 33) + (20,) * (32 if heads == (24, 2) else 0),
            heads=heads,
            q=q,
            kv=kv,
            o=o,
            dim=dim,
            window=20 if window else -1,
            cap=30.0 * cap,
        )
        for q, kv, o, dim, window, cap in COMPILED
        for heads in ((8, 2), (24, 2))
        if heads == (24, 2) or window or cap
    ]
    plain += [
        Case(lens=(700, 0, 33), heads=heads, q=q, kv=kv, o=o, dim=dim, window=90 if window else -1, split=3)
        for q, kv, o, dim, window, _ in FIXED_SPLIT_COMPILED
        for heads in ((8, 2), (24, 2))
    ]
    levers = [
        {"prefetch": policy, "ready": ready}
        for policy in (
            "off",
            "paper",
            "run_ahead=4,prologue=4,streaming_hint=1,early_load=1",
            "run_ahead=64,prologue=64,l2_budget=1.0,early_load=1",
        )
        for ready in ("nothing", "page_table", "all_but_last_token", "plan")
    ]
    watched = (
        Case(lens=(700, 3, 0, 64), page=1),
        Case(lens=(700, 64), page=64, layout="HND", kv="e4m3"),
        Case(lens=(700, 64), page=64, layout="HND", kv="e4m3", listed=64),
    )
    return [(case, {}) for case in plain] + [(case, options) for case in watched for options in levers]


def expect_close(inputs: Inputs, out: torch.Tensor) -> None:
    """On the CPU: no other kernel runs under the tool than those in question."""
    on_cpu = dataclasses.replace(
        inputs,
        **{
            field.name: value.cpu()
            for field in dataclasses.fields(inputs)
            if isinstance(value := getattr(inputs, field.name), torch.Tensor) and field.name != "cache"
        },
    )
    expected, _ = truth(on_cpu)
    error = relative_error(out.cpu(), expected) if bool(expected.any()) else float(out.float().abs().max())
    assert error <= TOLERANCE, f"relative error {error:.3g}"


def check_run(case: Case, options: dict[str, str]) -> None:
    """Runs twice, with and without dependent launch, and once after a window prefetch."""
    inputs = build(case)
    poison_unused(inputs)
    wrapper = new_wrapper(case, **options)
    plan(wrapper, inputs)
    out, _ = run(wrapper, inputs, enable_pdl=True)
    fi_prefetch.prefetch_kv(wrapper, inputs.cache)
    again, _ = run(wrapper, inputs, enable_pdl=False)
    assert same_bits(out, again), "two runs differ"
    expect_close(inputs, out)


def copied(inputs: Inputs) -> Inputs:
    """Inputs on the CPU, brought to the GPU by copies of whole allocations; views keep their strides."""
    memory: dict[int, torch.Tensor] = {}

    def move(x: torch.Tensor) -> torch.Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in memory:
            memory[storage.data_ptr()] = torch.empty(0, dtype=torch.uint8).set_(storage).to(DEVICE)
        raw = memory[storage.data_ptr()].view(x.dtype)
        return raw.as_strided(x.shape, x.stride(), x.storage_offset())

    tensors = {
        field.name: move(value)
        for field in dataclasses.fields(inputs)
        if isinstance(value := getattr(inputs, field.name), torch.Tensor) and field.name != "cache"
    }
    return dataclasses.replace(inputs, **tensors, cache=(tensors["k"], tensors["v"]))


def check_initialised(case: Case, options: dict[str, str]) -> None:
    """One run into memory that nobody has written."""
    on_cpu = build(case, torch.device("cpu"))
    poison_unused(on_cpu)
    inputs = copied(on_cpu)
    workspace = torch.empty(INITCHECK_WORKSPACE, dtype=torch.uint8, device=DEVICE)
    wrapper = fi_prefetch.BatchDecodeWithPagedKVCacheWrapper(
        workspace, case.layout, use_tensor_cores=case.q_len > 1, **options
    )
    plan(wrapper, inputs)
    q_scale, k_scale, v_scale = case.scales
    scales = {"q_scale": q_scale, "k_scale": k_scale, "v_scale": v_scale}
    fi_prefetch.prefetch_kv(wrapper, inputs.cache)
    out, lse = wrapper.run(inputs.q, inputs.cache, sinks=inputs.sinks, return_lse=True, **scales)
    assert wrapper.kernel_choice.kernel == "fi_prefetch", wrapper.kernel_choice.reason
    expect_close(on_cpu, out.cpu())
    assert not bool(lse.cpu().isnan().any())


def check_graph() -> None:
    """A replayed graph of calls that share a workspace and its counters."""
    inputs = build(Case(lens=(700, 33, 1), page=1))
    wrapper = new_wrapper(inputs.case)
    plan(wrapper, inputs)
    expected, _ = run(wrapper, inputs)
    outs = [torch.empty_like(expected) for _ in range(3)]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for out in outs:
            wrapper.run(inputs.q, inputs.cache, out=out)
    for _ in range(2):
        graph.replay()
    torch.cuda.synchronize()
    assert all(same_bits(out, expected) for out in outs)


def main(arguments: list[str]) -> int:
    passed = failed = 0
    check = check_initialised if "--initcheck" in arguments else check_run
    checks: list[tuple[str, Callable[[], None]]] = [
        (f"{case} {options}", lambda case=case, options=options: check(case, options)) for case, options in cases()
    ]
    if check is check_run:  # a capture is not made to allocate with no cache of memory
        checks.append(("graph", check_graph))
    for name, action in checks:
        try:
            action()
            torch.cuda.synchronize()
            passed += 1
        except Exception:
            failed += 1
            print(f"FAILED {name}", flush=True)
            traceback.print_exc()
    print(f"sanitize: {passed} passed, {failed} failed", flush=True)
    return min(failed, 1)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
