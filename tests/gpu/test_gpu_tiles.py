"""Tiles that are copied whole against tiles that are copied row by row: the same bits.

Which way a call goes hangs on how much KV its page table may name (csrc/decode.cu, copies_tensors).
"""

from __future__ import annotations

import dataclasses
import itertools

import pytest
from harness import Case, assert_close, build, flashinfer_answer, new_wrapper, plan, poison_unused, run, same_bits

SMALL_TILES = (("bf16", "e4m3", 128), ("f16", "e5m2", 128), ("f16", "e4m3", 64), ("bf16", "bf16", 64))
LARGE_TILES = (("bf16", "bf16", 128), ("f16", "f16", 128))
LENGTHS = ((1, 0, 40, 300, 2000), (77, 0, 16) * 20)
OPTIONS = ({}, {"layout": "HND", "storage": "one"}, {"heads": (16, 2)}, {"heads": (3, 1)}, {"page": 48})


# Large tiles are copied whole however much KV there may be, but for planned work.
WAYS = (
    *itertools.product(SMALL_TILES, ("nothing", "page_table", "plan")),
    *itertools.product(LARGE_TILES, ("plan",)),
)


@pytest.mark.parametrize(
    ("case", "ready"),
    [
        (Case(lens=lens, q=q, kv=kv, dim=dim, **options), ready)
        for ((q, kv, dim), ready), lens, options in itertools.product(WAYS, LENGTHS, OPTIONS)
    ],
    ids=str,
)
def test_both_ways_to_copy_give_the_same_bits(case: Case, ready: str) -> None:
    answers = []
    for listed in (0, 64):
        inputs = build(dataclasses.replace(case, listed=listed))
        theirs = flashinfer_answer(inputs) if listed else None
        poison_unused(inputs)
        wrapper = new_wrapper(case, ready=ready)
        plan(wrapper, inputs)
        # Twice: after its plan a planned call is no programmatic dependent yet.
        answers += [run(wrapper, inputs), run(wrapper, inputs)]
    for out, lse in answers[1:]:
        assert same_bits(out, answers[0][0]) and same_bits(lse, answers[0][1])
    assert_close(inputs, *answers[-1], theirs)
