"""What SGLang keeps still while a decode step runs: the `ready` promise that our wrappers get, and why it is true.

Under programmatic dependent launch our kernel may start while the kernel before it in the stream still runs, and that
kernel may itself have started before *its* predecessor ended. What the promise is about are therefore all kernels since
the last one that had waited for everything before it when it let the next one start.

**The page table is final before the first layer.** SGLang fills `kv_indptr` and `kv_indices` once a step, in
`init_forward_metadata` or `init_forward_metadata_out_graph`, on the stream that then runs the layers, and nothing
writes them again before the next step's. Between that and the first attention lies a full wait: a CUDA graph starts
only when everything before it in the stream has ended, and without a graph the first ordinary launch does, or the first
kernel that waits before it lets the next one start: the embedding lookup or, on a later pipeline rank, the first
layer's norm. The overlap scheduler prepares the next batch on the CPU and launches into the same stream; where SGLang
prepares metadata on a stream of its own, the layers' stream waits for an event, which is a full wait too.

**The page table stays as it was planned.** It is planned after it was filled, in the same function and on the same
stream: `begin_forward` of every wrapper, before a step without a graph and before every replay (there
`ServedDecodeWrapper._keep_plan`). So what `plan` works out once holds for all layers of the step.

**Nothing but each request's newest token is written in a decode step.** Every attention layer stores K and V of this
step's tokens (`set_kv_buffer`, our `kv_store`, or the rope kernel that does it on the way) right before its attention;
each request has one, at the end of its page table. That store may still be running when our kernel starts, or, being
`kv_store`, still be waiting for the kernel before it. Everything older was written by an earlier forward: an earlier
step, or a prefill chunk, in this stream. What else writes KV does so before the step starts: pages that hierarchical
caching or a prefill server brings in are waited for (by an event, or by the scheduler, also where a decode server
brings in a prefix that no forward of its own ever ran) before their requests are decoded; retraction gives slots back
and a later prefill fills them anew; the extra step that the overlap scheduler runs for a finished request writes at
that request's end, in this stream. Padded rows of a CUDA graph write to slot 0, which belongs to nobody, or nowhere.
Two-batch overlap runs the layers of two halves of a batch in turns, in this stream: each half writes its own requests'
newest tokens. A layer that reads another layer's KV, or an encoder's, writes nothing.

**Queries** are not in the promise: they are read after the wait. Where the kernel that wrote them is not the one before
ours, that one, the store of K and V, does not end before it has itself waited for it. The kernel reads them by volatile
loads past L1, for they are being written while it runs.

It is not true where the KV that attention reads is a workspace that the layer fills in the step (4-bit caches), and not
obviously true where prefill and decode run in different streams of one GPU (PD multiplexing).
"""

from __future__ import annotations

from typing import Any, NamedTuple

from ..prefetch import READY_CODES
from . import settings


class Promise(NamedTuple):
    """`ready` for our wrappers, and in words why not more."""

    ready: str
    reason: str


def keeps(server_args: Any) -> Promise:
    """The strongest promise that a server with these arguments keeps, and that the environment allows.

    Args:
        server_args: SGLang's `ServerArgs`.
    """
    if server_args.enable_pdmux:
        kept = Promise("page_table", "with --enable-pdmux prefill writes KV in another stream")
    else:
        kept = Promise("plan", "a decode step writes one token a request, and its page table before it is planned")
    most = settings.most_ready()
    if READY_CODES[most] < READY_CODES[kept.ready]:
        return Promise(most, f"{settings.READY_VARIABLE}={most}")
    return kept
