"""One decode of one shape under one policy, for a profiler to look at: `python -m fi_prefetch.bench.one_call`."""

from __future__ import annotations

import json
import sys

import torch

from .baselines import prepare_ours
from .environment import require_gpu
from .inputs import DecodeInputs, KvPool
from .shapes import Shape

WARM_UP = 2


def main() -> None:
    """Reads {"shape", "policy"} from standard input and decodes WARM_UP + 1 times, the last time on a cold cache."""
    request = json.load(sys.stdin)
    shape, facts = Shape.from_row(request["shape"]), require_gpu()
    pool = KvPool((WARM_UP + 1) * shape.allocated_bytes, getattr(torch, shape.kv_dtype), torch.device("cuda"))
    inputs = DecodeInputs(shape, pool, facts.l2_bytes, copies=WARM_UP + 1)
    _, call = prepare_ours(inputs, request["policy"])
    for i in range(inputs.copies):
        call(i)
    torch.cuda.synchronize()


if __name__ == "__main__":
    main()
