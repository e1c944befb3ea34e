"""The wrapper: FlashInfer's batch decode by our kernel where it serves, FlashInfer's elsewhere, the reference on CPUs.

`plan()` only decides: the kernel makes its own schedule from the page table when it runs, so planning copies nothing to
the host, waits for nothing, and a captured CUDA graph stays right when the lengths in its buffers change.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import logging
import operator
import os
import warnings
from collections.abc import Iterator
from typing import Any

import flashinfer
import flashinfer.decode
import torch
from flashinfer.utils import device_support_pdl

from . import checks, device, dispatch, torch_op
from .decision import Decision, decide, kernel_for, on_device, workspace_size
from .dispatch import DecodeSpec, KernelChoice
from .launch import Call, host_number, run_kernel, run_reference, schedule
from .planned_module import PlannedModule
from .prefetch import READY_CODES, LaunchFacts, PrefetchPlan, PrefetchPolicy, resolve, stretch_tiles

logger = logging.getLogger("fi_prefetch")

_FlashInferWrapper = flashinfer.decode.BatchDecodeWithPagedKVCacheWrapper
_FlashInferGraphWrapper = flashinfer.decode.CUDAGraphBatchDecodeWithPagedKVCacheWrapper

# 0.7 has the planner apart from `plan`, which would call ours again.
_PLANNER = "_plan_impl" if hasattr(_FlashInferWrapper, "_plan_impl") else "plan"
# What came after the oldest supported release.
_HAS_JIT_KWARGS = "jit_kwargs" in inspect.signature(_FlashInferWrapper.__init__).parameters
_HAS_TOKEN_HEAD_SF = "use_token_head_sf" in inspect.signature(getattr(_FlashInferWrapper, _PLANNER)).parameters
# In which FlashInfer's XQA kernel counts, at the start of the float workspace.
_XQA_COUNTER_BYTES = 8 << 20

_MAX_DECISIONS = 1024
# What `forward` takes: pos_encoding_mode, window_left, logits_soft_cap, sm_scale, rope_scale, rope_theta.
_Parameters = tuple[str, int, float | None, float | None, float | None, float | None]
_NOT_PLANNED = Decision(None, KernelChoice("none", "plan() has not run yet"))  # type: ignore[arg-type]


class BatchDecodeWithPagedKVCacheWrapper(_FlashInferWrapper):
    """FlashInfer's `BatchDecodeWithPagedKVCacheWrapper`, with our kernel for the plans it serves.

    Every argument, method and attribute of FlashInfer's is here and means the same. On CPU tensors (a float workspace
    on the CPU) the same calls run `reference.batch_decode`; only FlashInfer 0.6's `fast_decode_plan` does not work
    there, since it makes the wrapper's device the current CUDA device.

    Calls of one wrapper that overlap on two streams share its float workspace, and so must not: give each stream a
    wrapper with a workspace of its own. Calls one after the other may change streams as FlashInfer's may.

    With FI_PREFETCH_CHECK=1 in the environment when the wrapper is made, plan() and run() read the page table and
    report its first bad entry. On a GPU that waits for it, so it is off by default, and run() leaves it out while a
    CUDA graph is captured. On the CPU it is always on.
    """

    def __init__(
        self,
        float_workspace_buffer: torch.Tensor,
        kv_layout: str = "NHD",
        use_cuda_graph: bool = False,
        use_tensor_cores: bool = False,
        paged_kv_indptr_buffer: torch.Tensor | None = None,
        paged_kv_indices_buffer: torch.Tensor | None = None,
        paged_kv_last_page_len_buffer: torch.Tensor | None = None,
        backend: str = "auto",
        jit_args: list[Any] | None = None,
        jit_kwargs: dict[str, Any] | None = None,
        *,
        prefetch: PrefetchPolicy | str | None = None,
        ready: str = "nothing",
    ) -> None:
        """FlashInfer's arguments, and:

        Args:
            backend: "auto" and "fi_prefetch" let our kernel serve what it can; any other name is FlashInfer's.
            prefetch: the prefetch levers to use: a `PrefetchPolicy`, its text, or None for the environment's
                FI_PREFETCH_POLICY, else "auto".
            ready: what is final in memory while kernels before this one in the stream may still run, under
                programmatic dependent launch: "nothing"; "page_table" (indptr, indices, last_page_len); or
                "all_but_last_token" (these, and all KV but each request's last token). Or "plan": all that, and that
                the page table stays as the last `plan` found it, which FlashInfer asks of everybody. Then `plan` works
                out once, on its stream, who reads what, and every `run` after it starts sooner; a captured graph needs
                a new `plan` before it is replayed on another page table.

        Raises ValueError or TypeError for a bad argument, by name; TypeError also for `jit_kwargs` where the installed
        FlashInfer does not know it.
        """
        if jit_kwargs is not None and not _HAS_JIT_KWARGS:
            raise TypeError(f"jit_kwargs: FlashInfer {flashinfer.__version__} has no such argument")
        checks.workspace("float_workspace_buffer", float_workspace_buffer)
        checks.one_of("kv_layout", kv_layout, checks.KV_LAYOUTS)
        checks.one_of("ready", ready, tuple(READY_CODES))
        if use_cuda_graph:
            checks.graph_buffers(
                float_workspace_buffer.device,
                {
                    "paged_kv_indptr_buffer": paged_kv_indptr_buffer,
                    "paged_kv_indices_buffer": paged_kv_indices_buffer,
                    "paged_kv_last_page_len_buffer": paged_kv_last_page_len_buffer,
                },
            )
        self._policy = PrefetchPolicy.of(prefetch)
        self._ready = ready
        self._asked_backend = backend
        arguments = (
            float_workspace_buffer,
            kv_layout,
            use_cuda_graph,
            use_tensor_cores,
            paged_kv_indptr_buffer,
            paged_kv_indices_buffer,
            paged_kv_last_page_len_buffer,
            "auto" if backend == "fi_prefetch" else backend,
            jit_args,
        )
        if float_workspace_buffer.device.type == "cpu":
            self._init_on_cpu(*arguments)
        else:
            newer = {} if jit_kwargs is None else {"jit_kwargs": jit_kwargs}
            _FlashInferWrapper.__init__(self, *arguments, **newer)

        self._check_contents = self.device.type == "cpu" or os.environ.get("FI_PREFETCH_CHECK") == "1"
        self._decision = _NOT_PLANNED
        # What the last plan was asked for, and the spec of it.
        self._asked: tuple[tuple[Any, ...], DecodeSpec | None] = ((), None)
        # A server comes back to the same few hundred shapes.
        self._decisions: dict[tuple[DecodeSpec, int | None], Decision] = {}
        self._choice = _NOT_PLANNED.choice
        self._module = PlannedModule(self)
        # The wrapper's own, zero between launches; one buffer for every stream it ran on, and one (None) for captured
        # graphs, so that calls that overlap cannot miscount. Kept when outgrown: captured graphs go on using theirs.
        self._counters: list[torch.Tensor] = []
        self._counters_of: dict[int | None, torch.Tensor] = {}
        # With ready="plan": what each warp of the current plan's launches does, and whether no run has used it yet. The
        # memory is the wrapper's own: a spec's in a CUDA-graph wrapper, where captured graphs go on reading it and
        # plans write it anew; else one for all plans (None). Kept when outgrown, as a run on another stream may be at
        # it, and when a graph was captured, which is that plan's for good.
        self._planned: torch.Tensor | None = None
        self._planned_just_now = False
        self._planned_of: dict[DecodeSpec | None, torch.Tensor] = {}
        self._planned_before: list[torch.Tensor] = []
        self._prefetch_codes: dict[bool, list[int]] = {}
        # Blocks of a run that read KV now: `prefetch_kv` gives way to them, and once it was called, runs count them.
        # Made here, since its first call may be captured, and would zero this only when that graph is replayed.
        self._running_blocks = torch.zeros(1, dtype=torch.int32, device=self.device)
        self._running: torch.Tensor | None = None
        # What FlashInfer itself is planned for, and what when a graph was captured of it under our plan; whether it is
        # its code that asks; whether its backend was our pick.
        self._flashinfer_spec: DecodeSpec | None = None
        self._captured_flashinfer_spec: DecodeSpec | None = None
        self._flashinfer_asks = False
        self._claimed_backend = False
        self._only_for_flashinfer: dict[str, Any] = {}
        self._number = torch_op.register(self)

    def _init_on_cpu(
        self,
        float_workspace_buffer: torch.Tensor,
        kv_layout: str,
        use_cuda_graph: bool,
        use_tensor_cores: bool,
        paged_kv_indptr_buffer: torch.Tensor | None,
        paged_kv_indices_buffer: torch.Tensor | None,
        paged_kv_last_page_len_buffer: torch.Tensor | None,
        backend: str,
        jit_args: list[Any] | None,
    ) -> None:
        """What FlashInfer's constructor sets, which pins memory and so needs a GPU."""
        if jit_args is not None:
            raise NotImplementedError("jit_args: a custom attention variant needs a CUDA device, got a CPU workspace")
        self._jit_module = None
        self._jit_additional_tensor_names: list[str] = []
        self._kv_layout = kv_layout
        self._float_workspace_buffer = float_workspace_buffer
        self.device = float_workspace_buffer.device
        self._int_workspace_buffer = torch.empty(0, dtype=torch.uint8)
        self._pin_memory_int_workspace_buffer = torch.empty(0, dtype=torch.uint8)
        self._use_cuda_graph = use_cuda_graph
        self._use_tensor_cores = use_tensor_cores
        self._fixed_batch_size = len(paged_kv_last_page_len_buffer) if use_cuda_graph else 0
        self._paged_kv_indptr_buf = paged_kv_indptr_buffer
        self._paged_kv_indices_buf = paged_kv_indices_buffer
        self._paged_kv_last_page_len_buf = paged_kv_last_page_len_buffer
        self._qo_indptr_buf = torch.arange(self._fixed_batch_size + 1, dtype=torch.int32)
        self._backend = backend
        # fast_decode_plan asks a wrapper with this backend where to plan, and so comes to _plan_impl.
        self._requested_backend = "auto"
        self._cudnn_auto = False

    # --- what was decided -------------------------------------------------------------------------------------------

    @property
    def kernel_choice(self) -> KernelChoice:
        """The kernel of the last plan or run, and the reason."""
        return self._choice

    @property
    def prefetch_plan(self) -> PrefetchPlan | None:
        """The prefetch levers of the current plan, in tiles and bytes, and why; None where another serves."""
        if self._decision.module is None:
            return None
        return self._resolve_prefetch(device_support_pdl(self.device))

    @property
    def resolved_backend(self) -> str:
        """Who serves: "fi_prefetch" (our kernel), "reference" (on the CPU), or the backend FlashInfer resolved to."""
        if self._choice.kernel in ("fi_prefetch", "reference"):
            return self._choice.kernel
        if isinstance(getattr(_FlashInferWrapper, "resolved_backend", None), property):
            return super().resolved_backend
        return "fa2" if self._backend == "auto" and not self._use_tensor_cores else self._backend

    def _resolve_prefetch(self, pdl: bool) -> PrefetchPlan:
        decision, facts = self._decision, device.facts(self.device)
        spec = decision.spec
        launch = LaunchFacts(
            blocks=decision.blocks,
            warps=decision.warps,
            stages=decision.stages,
            tile_bytes=decision.tile_bytes,
            kv_bytes=decision.kv_bytes,
            l2_bytes=facts.l2_bytes,
            sm_count=facts.sm_count,
            ready=self._ready,
            batch_size=spec.batch_size,
            fixed_split=spec.split_tokens is not None,
            stretch_tiles=stretch_tiles(spec.query_rows, spec.pos_encoding_mode == "ROPE_LLAMA"),
        )
        return resolve(self._policy, launch, pdl)

    # --- planning ---------------------------------------------------------------------------------------------------

    def plan(
        self,
        indptr: torch.Tensor,
        indices: torch.Tensor,
        last_page_len: torch.Tensor,
        num_qo_heads: int,
        num_kv_heads: int,
        head_dim: int,
        page_size: int,
        pos_encoding_mode: str = "NONE",
        window_left: int = -1,
        logits_soft_cap: float | None = None,
        q_data_type: str | torch.dtype | None = "float16",
        kv_data_type: str | torch.dtype | None = None,
        o_data_type: str | torch.dtype | None = None,
        data_type: str | torch.dtype | None = None,
        sm_scale: float | None = None,
        rope_scale: float | None = None,
        rope_theta: float | None = None,
        non_blocking: bool = True,
        block_tables: torch.Tensor | None = None,
        seq_lens: torch.Tensor | None = None,
        fixed_split_size: int | None = None,
        disable_split_kv: bool = False,
        q_len_per_req: int = 1,
        *,
        window_right: int = 0,
        is_causal: bool | None = None,
        use_token_head_sf: bool = False,
    ) -> None:
        """Plans the decode of a batch, as FlashInfer's `plan`.

        Where our kernel serves, this looks at shapes only: no copy to the host, no wait, the same work for any batch.
        The page table is read when `run` runs, and may change until then in the buffers of a CUDA-graph wrapper; unless
        the wrapper was made with `ready="plan"`: then a kernel reads it now.

        Args:
            indptr: int32 [batch_size + 1], on the wrapper's device or the CPU; like the next two, copied first if it
                has gaps.
            indices: int32 [at least indptr[-1]], page numbers.
            last_page_len: int32 [batch_size], 1 to page_size; 0 only for a request without pages.
            q_len_per_req: query tokens a request, its newest ones; our kernel needs no tensor-core wrapper for it.
            fixed_split_size: pages; cut every request at multiples of so many (of 16 tokens, rounded up).
            disable_split_kv: do not cut requests. With either of the two a request's output is the same, bit for bit,
                whatever else is in the batch, as long as GPU, wrapper arguments and release are the same.

        The other arguments are FlashInfer's.

        Raises ValueError or TypeError for a bad argument, by name; TypeError also for `use_token_head_sf` where the
        installed FlashInfer does not know it.
        """
        indptr, indices, last_page_len = map(checks.made_contiguous, (indptr, indices, last_page_len))
        checks.plan_table(indptr, indices, last_page_len, self.device)
        spec = self._spec_of(
            last_page_len.shape[0], indptr.dtype, num_qo_heads, num_kv_heads, head_dim, page_size, pos_encoding_mode,
            window_left, logits_soft_cap, q_data_type, kv_data_type, o_data_type, data_type, fixed_split_size,
            disable_split_kv, q_len_per_req, window_right, is_causal, use_token_head_sf,
        )  # fmt: skip
        if self._use_cuda_graph:
            self._check_graph_shape(spec, indices)
        if self._check_contents:
            checks.page_table(indptr, indices, last_page_len, page_size, None)
        scales = {"sm_scale": sm_scale, "rope_scale": rope_scale, "rope_theta": rope_theta}
        decision = self._decision_for(spec, self._kv_bytes(spec, indices.shape[0]))
        self._only_for_flashinfer = {"block_tables": block_tables, "seq_lens": seq_lens}
        if decision.choice.kernel == "flashinfer":
            self._adopt_flashinfers(decision, indptr, indices, last_page_len, non_blocking=non_blocking, **scales)
            return
        # What can fail comes first, so that a plan that fails leaves the one before it whole.
        self._set_page_table(indptr, indices, last_page_len, non_blocking)
        self._adopt_ours(decision, block_tables, **scales)

    begin_forward = plan
    # FlashInfer 0.7's fast_decode_plan comes here for what its fast path has no kernel for.
    _plan_impl = plan

    def _spec_of(self, batch_size: int, *asked: Any) -> DecodeSpec:
        """`plan`'s arguments as a spec. A server plans from step to step with the same objects, which were checked."""
        before, spec = self._asked
        if spec is not None and spec.batch_size == batch_size and all(map(operator.is_, asked, before)):
            return spec
        spec = self._spec(batch_size, *asked)
        self._asked = asked, spec
        return spec

    def _spec(
        self, batch_size: int, dtype_index: torch.dtype, num_qo_heads: int, num_kv_heads: int, head_dim: int,
        page_size: int, pos_encoding_mode: str, window_left: int, logits_soft_cap: float | None, q_data_type: Any,
        kv_data_type: Any, o_data_type: Any, data_type: Any, fixed_split_size: int | None, disable_split_kv: bool,
        q_len_per_req: int, window_right: int, is_causal: bool | None, use_token_head_sf: bool = False,
    ) -> DecodeSpec:  # fmt: skip
        """`plan`'s arguments with FlashInfer's defaults filled in, checked."""
        checks.plan_shape(num_qo_heads, num_kv_heads, head_dim, page_size)
        if q_data_type is None:
            q_data_type = data_type
        if kv_data_type is None:
            kv_data_type = data_type if data_type is not None else q_data_type
        dtype_q = checks.torch_dtype("q_data_type", q_data_type)
        checks.one_of("pos_encoding_mode", pos_encoding_mode, checks.POS_ENCODING_MODES)
        checks.integer("window_left", window_left, -1)
        checks.integer("q_len_per_req", q_len_per_req, 1)
        if fixed_split_size is not None:
            checks.integer("fixed_split_size", fixed_split_size, -1)
            fixed_split_size = int(fixed_split_size)
        checks.boolean("use_token_head_sf", use_token_head_sf)
        if use_token_head_sf and not _HAS_TOKEN_HEAD_SF:
            raise TypeError(f"use_token_head_sf: FlashInfer {flashinfer.__version__} has no such argument")
        if self._use_cuda_graph:
            dtype_index = self._paged_kv_indptr_buf.dtype
        return DecodeSpec(
            dtype_q,
            checks.torch_dtype("kv_data_type", kv_data_type),
            dtype_q if o_data_type is None else checks.torch_dtype("o_data_type", o_data_type),
            batch_size,
            int(num_qo_heads),
            int(num_kv_heads),
            int(head_dim),
            int(page_size),
            int(q_len_per_req),
            pos_encoding_mode,
            int(window_left),
            0.0 if logits_soft_cap is None else logits_soft_cap,
            dtype_index,
            self._asked_backend,
            self._jit_module is not None,
            fixed_split_size,
            disable_split_kv,
            window_right,
            is_causal,
            self._use_cuda_graph,
            use_token_head_sf,
        )

    def _check_graph_shape(self, spec: DecodeSpec, indices: torch.Tensor) -> None:
        """A captured graph fixes the batch size, the query tokens a request and the room for page numbers."""
        if spec.batch_size != self._fixed_batch_size:
            raise ValueError(
                f"last_page_len: expected the CUDA-graph wrapper's batch size {self._fixed_batch_size}, "
                f"got {spec.batch_size}"
            )
        planned = getattr(self, "_q_len_per_req", None)
        if planned is not None and planned != spec.q_len_per_req:
            raise ValueError(
                f"q_len_per_req: expected {planned}, with which this CUDA-graph wrapper was planned first, "
                f"got {spec.q_len_per_req}"
            )
        if indices.shape[0] > self._paged_kv_indices_buf.shape[0]:
            raise ValueError(
                f"indices: expected at most {self._paged_kv_indices_buf.shape[0]} entries, the size of "
                f"paged_kv_indices_buffer, got {indices.shape[0]}"
            )

    def _decision_for(self, spec: DecodeSpec, kv_bytes: int | None) -> Decision:
        """Who serves a spec, with everything ready that a launch needs; changes nothing of the current plan.

        Raises NotImplementedError where nobody does.
        """
        decision: Decision | None = self._decision  # the same as before, where a server plans from step to step
        if decision.spec is not spec or decision.kv_bytes != kv_bytes:
            decision = self._decisions.get((spec, kv_bytes))
        if decision is None:
            workspaces = (
                self._float_workspace_buffer, self._int_workspace_buffer, self._pin_memory_int_workspace_buffer
            )  # fmt: skip
            decision = decide(spec, kv_bytes, self._most_pages(spec, kv_bytes), *workspaces)
            if decision.choice.kernel == "none":
                raise NotImplementedError(f"plan: {decision.choice.reason}")
            if len(self._decisions) >= _MAX_DECISIONS:
                self._decisions.clear()
            self._decisions[spec, kv_bytes] = decision
        # Also for a decision that is known: it may have been made while a graph was captured.
        self._reserve_counters(decision.counter_bytes)
        return decision

    def _adopt(self, decision: Decision) -> None:
        """Makes a decision the current plan."""
        self._planned = None
        if decision is not self._decision:
            self._decision = decision
            self._prefetch_codes = {}
        self._choice = decision.choice
        self._flashinfer_spec = None
        self._q_len_per_req = decision.spec.q_len_per_req
        if decision.choice.kernel == "flashinfer":
            _log_fallback(decision.choice.reason)

    def _adopt_ours(self, decision: Decision, block_tables: torch.Tensor | None, **scales: float | None) -> None:
        """The rest of a plan that our kernel serves, of the table in the buffers."""
        self._adopt(decision)
        self._set_plan_attributes(block_tables, **scales)
        self._schedule()
        if self._captured_flashinfer_spec is not None:
            self._plan_flashinfer_beside(self._captured_flashinfer_spec)

    def _adopt_flashinfers(self, decision: Decision, *table: torch.Tensor, **arguments: Any) -> None:
        """Makes a plan of FlashInfer's the current one. If it fails there is none: FlashInfer writes into the buffers
        of the one before as it goes."""
        self._adopt(decision)
        try:
            self._plan_with_flashinfer(decision.spec, *table, **arguments)
        except BaseException:
            self._choice = KernelChoice("none", "FlashInfer's plan failed")
            self._decision = Decision(decision.spec, self._choice)
            raise

    def _kv_bytes(self, spec: DecodeSpec, num_pages: int) -> int | None:
        """An upper bound of the KV that the batch reads, from one of its pages; None in a graph, which is replayed on
        other batches than the one it was planned for."""
        if self._use_cuda_graph:
            return None
        kv_bytes = 2 * num_pages * spec.page_size * spec.num_kv_heads * spec.head_dim * spec.dtype_kv.itemsize
        # A power of two, so that a growing batch changes the launch once in a while and not every step.
        return 1 << (kv_bytes - 1).bit_length() if kv_bytes else 0

    def _most_pages(self, spec: DecodeSpec, kv_bytes: int | None) -> int:
        """Pages that a table of this plan may list: what its KV bytes bound, or a graph's buffer holds."""
        if kv_bytes is None:
            return self._paged_kv_indices_buf.shape[0]
        return kv_bytes // (2 * spec.page_size * spec.num_kv_heads * spec.head_dim * spec.dtype_kv.itemsize)

    def _reserve_counters(self, num_bytes: int, stream: int | None = None) -> torch.Tensor | None:
        """Zeroed counters for launches on a stream; the kernel leaves them zero. None where none are needed.

        Those made while a graph is captured are that graph's alone: it zeroes them when it is replayed, which may never
        happen, and not before another graph runs.
        """
        entries = -(-num_bytes // 4)
        counters = self._counters_of.get(stream)
        if entries and (counters is None or counters.numel() < entries):
            size = max(1024, 1 << (entries - 1).bit_length())
            counters = torch.zeros(size, dtype=torch.int32, device=self.device)
            if not self._is_capturing():
                self._counters_of[stream] = counters
                self._counters.append(counters)
        return counters

    def _schedule(self) -> None:
        """Works out what each warp of the current plan's launches does, where the page table stays as it is.

        Not while a graph is captured: what is captured has not been done, and eager runs would use it.
        """
        decision = self._decision
        served = decision.module is not None and decision.spec.split_tokens is None and decision.spec.batch_size > 0
        if self._ready != "plan" or not served or self._is_capturing():
            self._planned = None
            return
        key = decision.spec if self._use_cuda_graph else None
        entries = -(-decision.planned_bytes // 4)
        planned = self._planned_of.get(key)
        if planned is None or planned.numel() < entries:
            if planned is not None:
                self._planned_before.append(planned)
            size = 1 << (entries - 1).bit_length()
            # Zero: no work, should anybody read it before it is written.
            planned = self._planned_of[key] = torch.zeros(size, dtype=torch.int32, device=self.device)
        table = (self._paged_kv_indptr_buf, self._paged_kv_indices_buf, self._paged_kv_last_page_len_buf)
        schedule(decision, *table, planned)
        self._planned, self._planned_just_now = planned, True

    def _planned_for_run(self) -> torch.Tensor | None:
        """What it left for the current plan.

        A plain wrapper's graph reads the page table of its own plan, so no later one is written over what it goes by.
        """
        if self._planned is not None and not self._use_cuda_graph and self._is_capturing():
            kept = self._planned_of.pop(None, None)
            if kept is not None:
                self._planned_before.append(kept)
        return self._planned

    def _current_stream(self) -> int | None:
        """The current stream's handle; None on the CPU and while a graph is captured."""
        if self.device.type != "cuda" or self._is_capturing():
            return None
        return torch.cuda.current_stream(self.device).cuda_stream

    def _set_page_table(
        self, indptr: torch.Tensor, indices: torch.Tensor, last_page_len: torch.Tensor, non_blocking: bool
    ) -> None:
        """Copies the page table to where `run` reads it, as FlashInfer does; a buffer that is its own source stays."""
        if not self._use_cuda_graph:
            # All or none: memory may run out at any of them. Asking first is three times faster than a `to` in vain.
            tables = [
                x if x.device == self.device else x.to(self.device, non_blocking=non_blocking)
                for x in (indptr, indices, last_page_len)
            ]
            self._paged_kv_indptr_buf, self._paged_kv_indices_buf, self._paged_kv_last_page_len_buf = tables
            return
        for buffer, source, wait in (
            (self._paged_kv_indptr_buf, indptr, False),
            (self._paged_kv_last_page_len_buf, last_page_len, False),
            (self._paged_kv_indices_buf, indices, indices.device != self.device),
        ):
            if source.data_ptr() != buffer.data_ptr():
                buffer[: source.shape[0]].copy_(source, non_blocking=non_blocking and not wait)

    def _set_plan_attributes(self, block_tables: torch.Tensor | None, **scales: float | None) -> None:
        """What FlashInfer's plan leaves behind and its `forward`, `run` and `fast_decode_plan` read."""
        decision = self._decision
        spec = decision.spec
        self._plan_info = decision.plan_info if decision.plan_info is not None else []
        self._cached_module = self._module
        self._module.flashinfers = None
        self._cached_q_data_type = spec.dtype_q
        self._cached_kv_data_type = spec.dtype_kv
        self._cached_o_data_type = spec.dtype_o
        self._batch_size = spec.batch_size
        self._num_qo_heads = spec.num_qo_heads
        self._num_kv_heads = spec.num_kv_heads
        self._block_tables = block_tables
        self._user_block_tables = block_tables is not None
        self._max_kv_len = None
        self._pos_encoding_mode = spec.pos_encoding_mode
        self._window_left = spec.window_left
        self._window_right = spec.window_right
        self._logits_soft_cap = spec.logits_soft_cap
        self._is_causal = spec.q_len_per_req > 1
        self._cudnn_auto = False
        for name, value in scales.items():
            setattr(self, f"_{name}", value)
        if self._use_tensor_cores and self._backend == "auto":
            # FlashInfer's plan resolves the backend here, and fast_decode_plan refuses some shapes until it has.
            self._backend = "fa2"
            self._claimed_backend = True

    def _plan_again(self, indptr_host: torch.Tensor, **changes: Any) -> Any:
        """`plan` as fast_decode_plan does it: for buffers that are in place already, from a page table on the host."""
        spec = self._decision.spec._replace(q_len_per_req=self._q_len_per_req, is_causal=None, **changes)
        table = (self._paged_kv_indptr_buf, self._paged_kv_indices_buf, self._paged_kv_last_page_len_buf)
        shape = (spec.num_qo_heads, spec.num_kv_heads, spec.head_dim, spec.page_size)
        checks.plan_table(*table, self.device)
        checks.plan_shape(*shape)
        for name, tensor in zip(("indptr", "indices", "last_page_len"), table, strict=True):
            if tensor.device != self.device:
                raise ValueError(f"{name}: expected device {self.device}, got {tensor.device}")
        num_pages = table[1].shape[0]
        # With fixed splits there must be room for all that the table could list.
        if spec.split_tokens is None and indptr_host.device.type == "cpu":
            num_pages = int(indptr_host[-1])
        decision = self._decision_for(spec, self._kv_bytes(spec, num_pages))
        self._only_for_flashinfer = {}
        if decision.choice.kernel == "flashinfer":
            self._adopt_flashinfers(decision, indptr_host, *table[1:], **self._scales())
        else:
            self._adopt_ours(decision, None, **self._scales())
        return self._plan_info

    def _scales(self) -> dict[str, float | None]:
        return {"sm_scale": self._sm_scale, "rope_scale": self._rope_scale, "rope_theta": self._rope_theta}

    # --- FlashInfer's side ------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _flashinfer(self) -> Iterator[None]:
        """Within the block the wrapper is FlashInfer's, with its backend and its choices, and its GPU the current one:
        not all of FlashInfer's backends look where the tensors are."""
        if self._claimed_backend:
            self._backend, self._claimed_backend = "auto", False
        self._flashinfer_asks = True
        try:
            with on_device(self.device):
                yield
        finally:
            self._flashinfer_asks = False

    def _auto_prefers_cudnn(self, *args: Any, **kwargs: Any) -> bool:
        """FlashInfer 0.7 asks where to plan; True leads its fast_decode_plan to `_plan_impl`, which is ours."""
        # Whose the plan is, whoever served the last run of it.
        if self._flashinfer_asks or self._decision.choice.kernel not in ("fi_prefetch", "reference"):
            return super()._auto_prefers_cudnn(*args, **kwargs)
        # The fast path needs a GPU, and without tensor cores it has no place for several query tokens and fixed splits.
        beyond_cuda_cores = (
            args[11] > 1 or kwargs.get("fixed_split_size") is not None or bool(kwargs.get("disable_split_kv"))
        )
        return self.device.type == "cpu" or (beyond_cuda_cores and not self._use_tensor_cores)

    def _plan_with_flashinfer(
        self, spec: DecodeSpec, indptr: torch.Tensor, indices: torch.Tensor, last_page_len: torch.Tensor,
        **arguments: Any,
    ) -> None:  # fmt: skip
        """FlashInfer's own plan."""
        arguments |= self._only_for_flashinfer
        if spec.window_right != 0:
            arguments["window_right"] = spec.window_right
        if spec.is_causal is not None:
            arguments["is_causal"] = spec.is_causal
        if spec.use_token_head_sf:
            arguments["use_token_head_sf"] = True
        with self._flashinfer():
            getattr(_FlashInferWrapper, _PLANNER)(
                self,
                indptr,
                indices,
                last_page_len,
                spec.num_qo_heads,
                spec.num_kv_heads,
                spec.head_dim,
                spec.page_size,
                pos_encoding_mode=spec.pos_encoding_mode,
                window_left=spec.window_left,
                logits_soft_cap=spec.logits_soft_cap,
                q_data_type=spec.dtype_q,
                kv_data_type=spec.dtype_kv,
                o_data_type=spec.dtype_o,
                fixed_split_size=spec.fixed_split_size,
                disable_split_kv=spec.disable_split_kv,
                q_len_per_req=spec.q_len_per_req,
                **arguments,
            )
        self._flashinfer_spec = spec

    def _run_with_flashinfer(
        self, reason: str, spec: DecodeSpec, q: torch.Tensor, cache: Any, *args: Any, **kwargs: Any
    ) -> Any:
        """FlashInfer's run for a call that our kernel cannot serve although it has the plan; plans first when needed.

        Raises RuntimeError while a CUDA graph is captured, where FlashInfer's plan cannot run.
        """
        if device.facts(self.device) is None:
            raise NotImplementedError(f"run: not supported on the CPU: {reason}")
        if self._flashinfer_spec != spec:
            if self._is_capturing():
                raise RuntimeError(
                    f"run: our kernel cannot serve this call ({reason}), and FlashInfer's plan cannot run while a CUDA "
                    "graph is captured; make the same call once before the capture"
                )
            _log_fallback(reason)
            self._plan_flashinfer_beside(spec)
        elif self._use_cuda_graph and self._is_capturing():
            # Its kernels read a schedule that its plan made: of later tables only if it plans for them as well.
            self._captured_flashinfer_spec = spec
        self._choice = KernelChoice("flashinfer", reason)
        return self._flashinfers_run(q, cache, *args, **kwargs)

    def _plan_flashinfer_beside(self, spec: DecodeSpec) -> None:
        """FlashInfer's plan of the current table, for calls that our kernel cannot serve although it has the plan."""
        table = (self._paged_kv_indptr_buf, self._paged_kv_indices_buf, self._paged_kv_last_page_len_buf)
        self._plan_with_flashinfer(spec, *table, **self._scales())
        # fast_decode_plan still has to come to us first.
        self._module.flashinfers = self._cached_module
        self._cached_module = self._module

    def _flashinfers_run(self, q: torch.Tensor, cache: Any, *args: Any, **kwargs: Any) -> Any:
        """FlashInfer's run of its own plan."""
        if getattr(self, "_use_xqa_mtp_decode", False) and self._counters:
            # Its XQA kernel must find zeros where it counts, and our kernel may have left partial results there.
            self._float_workspace_buffer.view(torch.uint8).flatten()[:_XQA_COUNTER_BYTES].zero_()
        with on_device(self.device):
            return _FlashInferWrapper.run(self, q, cache, *args, **kwargs)

    def _is_capturing(self) -> bool:
        """Whether the stream that a run would go to is being captured: the current one of the wrapper's GPU."""
        if self.device.type != "cuda":
            return False
        with on_device(self.device):
            return torch.cuda.is_current_stream_capturing()

    # --- running ----------------------------------------------------------------------------------------------------

    def run(
        self,
        q: torch.Tensor,
        paged_kv_cache: torch.Tensor | tuple[torch.Tensor, torch.Tensor],
        *args: Any,
        q_scale: float | torch.Tensor | None = None,
        k_scale: float | torch.Tensor | None = None,
        v_scale: float | torch.Tensor | None = None,
        out: torch.Tensor | None = None,
        lse: torch.Tensor | None = None,
        return_lse: bool = False,
        enable_pdl: bool | None = None,
        window_left: int | None = None,
        sinks: torch.Tensor | None = None,
        q_len_per_req: int | None = None,
        skip_softmax_threshold_scale_factor: float | None = None,
        kv_cache_sf: torch.Tensor | tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """Decodes the planned batch, as FlashInfer's `run`.

        Args:
            q: [batch_size * q_len_per_req, num_qo_heads, head_dim] of the planned dtype, last stride 1.
            paged_kv_cache: [num_pages, 2, page_size, num_kv_heads, head_dim] ("NHD"; "HND" has the heads before the
                page), or a pair of tensors without the second dimension, whose strides may differ.
            q_scale, k_scale: multiply the logits; v_scale: multiplies the output.
            out: the planned output dtype, q's shape, contiguous. lse: float32 [rows, num_qo_heads], contiguous.
            sinks: [num_qo_heads], logits of a virtual token without a value.
            The others are FlashInfer's.

        Returns the output and, with `return_lse`, the base-2 logarithm of the sum of the exponentials of the logits. A
        request without KV gets zeros and -inf.

        Raises RuntimeError before the first plan; ValueError or TypeError for a bad argument, by name.
        """
        unserved_arguments = bool(args) or skip_softmax_threshold_scale_factor is not None or kv_cache_sf is not None
        if torch.compiler.is_compiling() and not unserved_arguments:
            return self._run_traced(
                q, paged_kv_cache, q_scale, k_scale, v_scale, out, lse, return_lse, enable_pdl, window_left, sinks
            )
        decision = self._decision
        if decision.choice.kernel == "none":
            raise RuntimeError(f"run: expected plan() before run(): {decision.choice.reason}")
        passed = {
            "q_scale": q_scale, "k_scale": k_scale, "v_scale": v_scale, "out": out, "lse": lse,
            "return_lse": return_lse, "enable_pdl": enable_pdl, "window_left": window_left, "sinks": sinks,
            "q_len_per_req": q_len_per_req, "kv_cache_sf": kv_cache_sf,
            "skip_softmax_threshold_scale_factor": skip_softmax_threshold_scale_factor,
        }  # fmt: skip
        if decision.choice.kernel == "flashinfer":
            return self._flashinfers_run(q, paged_kv_cache, *args, **passed)
        if unserved_arguments:
            return self._run_with_flashinfer(
                "positional arguments, skip_softmax_threshold_scale_factor or kv_cache_sf were given",
                decision.spec, q, paged_kv_cache, *args, **passed,
            )  # fmt: skip
        decision = self._current_decision()
        if decision.choice.kernel == "flashinfer":
            return self._run_with_flashinfer(decision.choice.reason, decision.spec, q, paged_kv_cache, **passed)

        k, v = self._check_run(decision.spec, q, paged_kv_cache, window_left, q_len_per_req, sinks)
        logit_scale, reason = self._logit_scale(q_scale, k_scale)
        rope_scale = 1.0 if self._rope_scale is None else self._rope_scale
        rope_theta = 1e4 if self._rope_theta is None else self._rope_theta
        if reason is None and decision.module is not None:
            if not dispatch.query_is_aligned(q):
                # Both kernels read 16 bytes at a time; FlashInfer's ends in a sticky error on other addresses.
                q = q.clone(memory_format=torch.contiguous_format)
            reason = dispatch.cache_obstacle(k, v)
            if decision.spec.pos_encoding_mode == "ROPE_LLAMA":
                reason = reason or dispatch.rope_obstacle(rope_scale, rope_theta)
        if reason is not None:
            return self._run_with_flashinfer(reason, decision.spec, q, paged_kv_cache, **passed)

        v_number = host_number(v_scale)
        if v_number is None:
            checks.factor("v_scale", v_scale, q.shape, q.device)
        if out is None:
            out = torch.empty(q.shape, dtype=decision.spec.dtype_o, device=q.device)
        else:
            checks.output("out", out, q.shape, decision.spec.dtype_o, q.device, alignment=16)
        if not return_lse:
            lse = None
        elif lse is None:
            lse = torch.empty(q.shape[:2], dtype=torch.float32, device=q.device)
        else:
            checks.output("lse", lse, q.shape[:2], torch.float32, q.device)

        table = (self._paged_kv_indptr_buf, self._paged_kv_indices_buf, self._paged_kv_last_page_len_buf)
        if decision.spec.batch_size:
            v_factor = 1.0 if v_number is None else v_number
            scales = (logit_scale, v_factor, sinks, rope_scale, rope_theta)
            call = Call(q, k, v, *table, out, lse, self._kv_layout, *scales)
            if decision.module is None:
                run_reference(decision, call)
            else:
                pdl = device_support_pdl(self.device) and (enable_pdl is None or bool(enable_pdl))
                # In a stream the kernel before may be the one that works out the schedule, which ours reads at once.
                after_schedule = self._planned_just_now and not self._is_capturing()
                pdl = pdl and not after_schedule
                codes = self._prefetch_codes.get(pdl)
                if codes is None:
                    codes = self._prefetch_codes[pdl] = self._resolve_prefetch(pdl).codes()
                counters = self._reserve_counters(decision.counter_bytes, self._current_stream())
                planned = self._planned_for_run()
                run_kernel(decision, call, self._float_workspace_buffer, counters, pdl, codes, self._running, planned)
                if after_schedule:
                    self._planned_just_now = False
        self._choice = decision.choice
        if v_number is None:
            # A scale on the GPU, or one a head: FlashInfer, too, multiplies afterwards.
            out *= v_scale
        return (out, lse) if return_lse else out

    run_return_lse = functools.partialmethod(run, return_lse=True)

    def forward(
        self,
        q: torch.Tensor,
        paged_kv_cache: torch.Tensor | tuple[torch.Tensor, torch.Tensor],
        pos_encoding_mode: str = "NONE",
        q_scale: float | torch.Tensor | None = None,
        k_scale: float | torch.Tensor | None = None,
        v_scale: float | torch.Tensor | None = None,
        window_left: int = -1,
        logits_soft_cap: float | None = None,
        sm_scale: float | None = None,
        rope_scale: float | None = None,
        rope_theta: float | None = None,
    ) -> torch.Tensor:
        """FlashInfer's deprecated `run`: its position mode, window, cap and scales replace the plan's, for good."""
        parameters = (pos_encoding_mode, window_left, logits_soft_cap, sm_scale, rope_scale, rope_theta)
        return self._run_with(parameters, q, paged_kv_cache, q_scale, k_scale, v_scale, return_lse=False)

    def forward_return_lse(
        self,
        q: torch.Tensor,
        paged_kv_cache: torch.Tensor | tuple[torch.Tensor, torch.Tensor],
        pos_encoding_mode: str = "NONE",
        q_scale: float | torch.Tensor | None = None,
        k_scale: float | torch.Tensor | None = None,
        v_scale: float | torch.Tensor | None = None,
        window_left: int = -1,
        logits_soft_cap: float | None = None,
        sm_scale: float | None = None,
        rope_scale: float | None = None,
        rope_theta: float | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As `forward`, with the LSE."""
        parameters = (pos_encoding_mode, window_left, logits_soft_cap, sm_scale, rope_scale, rope_theta)
        return self._run_with(parameters, q, paged_kv_cache, q_scale, k_scale, v_scale, return_lse=True)

    def _run_with(
        self, parameters: _Parameters, q: torch.Tensor, paged_kv_cache: Any, q_scale: Any, k_scale: Any, v_scale: Any,
        return_lse: bool,
    ) -> Any:  # fmt: skip
        """`run` after its parameters are set.

        FlashInfer sets them as attributes for `run` to read. Under torch.compile such a write takes effect when the
        compiled code is done, while `run` reads when that code runs: every layer would get what the call before left.
        So there they travel as arguments of the custom op.
        """
        if torch.compiler.is_compiling():
            scales = (q_scale, k_scale, v_scale)
            return self._run_traced(q, paged_kv_cache, *scales, None, None, return_lse, None, None, None, parameters)
        self._set_parameters(*parameters)
        return self.run(q, paged_kv_cache, q_scale=q_scale, k_scale=k_scale, v_scale=v_scale, return_lse=return_lse)

    def _set_parameters(
        self, pos_encoding_mode: str, window_left: int, logits_soft_cap: float | None, sm_scale: float | None,
        rope_scale: float | None, rope_theta: float | None,
    ) -> None:  # fmt: skip
        self._pos_encoding_mode, self._window_left = pos_encoding_mode, window_left
        self._logits_soft_cap = 0.0 if logits_soft_cap is None else logits_soft_cap
        self._sm_scale, self._rope_scale, self._rope_theta = sm_scale, rope_scale, rope_theta

    def end_forward(self) -> None:
        """FlashInfer's deprecated counterpart of `begin_forward`; does nothing."""

    def _run_traced(
        self, q: torch.Tensor, paged_kv_cache: Any, q_scale: Any, k_scale: Any, v_scale: Any, out: torch.Tensor | None,
        lse: torch.Tensor | None, return_lse: bool, enable_pdl: bool | None, window_left: int | None,
        sinks: torch.Tensor | None, parameters: _Parameters | None = None,
    ) -> Any:  # fmt: skip
        """`run` under torch.compile: one custom op. Reading the planned dtype here makes a new one trace again.

        With `parameters` they are set first, without them those count that are set when the compiled code runs.
        """
        k, v = checks.paged_kv_cache(paged_kv_cache, self._kv_layout)
        if out is None:
            out = torch.empty(q.shape, dtype=self._cached_o_data_type, device=q.device)
        if return_lse and lse is None:
            lse = torch.empty(q.shape[:2], dtype=torch.float32, device=q.device)
        v_number = None if isinstance(v_scale, torch.Tensor) else v_scale
        call = (self._number, q, k, v, out, lse if return_lse else None, q_scale, k_scale, v_number)
        if parameters is None:
            torch_op.batch_decode(*call, enable_pdl, window_left, sinks)
        else:
            torch_op.batch_decode_with(*call, *parameters)
        if isinstance(v_scale, torch.Tensor):
            out *= v_scale
        return (out, lse) if return_lse else out

    def _current_decision(self) -> Decision:
        """The decision for what the attributes say now, which `forward` and fast_decode_plan set after planning."""
        spec = self._decision.spec
        now = (self._window_left, self._logits_soft_cap or 0.0, self._pos_encoding_mode)
        if now == (spec.window_left, spec.logits_soft_cap, spec.pos_encoding_mode):
            return self._decision
        checks.integer("window_left", now[0], -1)
        checks.one_of("pos_encoding_mode", now[2], checks.POS_ENCODING_MODES)
        decision = self._decision_for(
            spec._replace(window_left=now[0], logits_soft_cap=now[1], pos_encoding_mode=now[2]), self._decision.kv_bytes
        )
        # FlashInfer may have to serve this one call, but the plan remains ours.
        if decision.choice.kernel != "flashinfer":
            self._adopt(decision)
        return decision

    def _check_run(
        self, spec: DecodeSpec, q: torch.Tensor, paged_kv_cache: Any, window_left: int | None,
        q_len_per_req: int | None, sinks: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
        """K and V, after every check of `run` that needs no GPU."""
        if q_len_per_req is not None:
            warnings.warn(
                "Passing `q_len_per_req` to run() is deprecated; pass it to plan() instead.",
                DeprecationWarning,
                stacklevel=3,
            )
            if q_len_per_req != spec.q_len_per_req:
                raise ValueError(f"q_len_per_req: expected {spec.q_len_per_req} as planned, got {q_len_per_req}")
        if window_left is not None and window_left != self._window_left:
            raise ValueError(f"window_left: expected None or {self._window_left} as planned, got {window_left}")
        rows = spec.batch_size * spec.q_len_per_req
        checks.tensor("q", q, (rows, spec.num_qo_heads, spec.head_dim), spec.dtype_q, self.device)
        if q.stride(-1) != 1:
            raise ValueError(f"q: expected a last stride of 1, got strides {q.stride()}")
        k, v = self._check_cache(spec, paged_kv_cache)
        if sinks is not None:
            checks.is_tensor("sinks", sinks)
            if sinks.shape != (spec.num_qo_heads,) or sinks.device != self.device:
                raise ValueError(
                    f"sinks: expected shape ({spec.num_qo_heads},) on {self.device}, got {tuple(sinks.shape)} on "
                    f"{sinks.device}"
                )
        if self._check_contents and not self._is_capturing():
            table = (self._paged_kv_indptr_buf, self._paged_kv_indices_buf, self._paged_kv_last_page_len_buf)
            checks.page_table(*table, spec.page_size, k.shape[0])
        return k, v

    def _check_cache(self, spec: DecodeSpec, paged_kv_cache: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """K and V of a cache that is as planned."""
        k, v = checks.paged_kv_cache(paged_kv_cache, self._kv_layout)
        page = (spec.page_size, spec.num_kv_heads) if self._kv_layout == "NHD" else (spec.num_kv_heads, spec.page_size)
        shape = (k.shape[0], *page, spec.head_dim)
        for name, cache in (("k_cache", k), ("v_cache", v)):
            checks.tensor(f"paged_kv_cache ({name}, {self._kv_layout})", cache, shape, spec.dtype_kv, self.device)
            if cache.stride(-1) != 1:
                raise ValueError(f"paged_kv_cache ({name}): expected a last stride of 1, got strides {cache.stride()}")
        return k, v

    def _logit_scale(self, q_scale: Any, k_scale: Any) -> tuple[float, str | None]:
        """What Q K^T is multiplied with, or why our kernel cannot be told: reading it would wait for the GPU."""
        scale = self._decision.spec.head_dim**-0.5 if self._sm_scale is None else self._sm_scale
        numbers = [host_number(value) for value in (scale, q_scale, k_scale)]
        if None in numbers:
            return 0.0, "sm_scale, q_scale or k_scale is a tensor on the GPU"
        return numbers[0] * numbers[1] * numbers[2], None

    # --- workspaces -------------------------------------------------------------------------------------------------

    def reset_workspace_buffer(self, float_workspace_buffer: torch.Tensor, int_workspace_buffer: torch.Tensor) -> None:
        """Replaces the workspaces; a plan of ours stays valid where its partial results fit the new one."""
        checks.workspace("float_workspace_buffer", float_workspace_buffer)
        checks.workspace("int_workspace_buffer", int_workspace_buffer)
        for name, buffer in (
            ("float_workspace_buffer", float_workspace_buffer), ("int_workspace_buffer", int_workspace_buffer)
        ):  # fmt: skip
            if buffer.device != self.device:
                raise ValueError(f"{name}: expected device {self.device}, got {buffer.device}")
        if self.device.type == "cpu":
            self._float_workspace_buffer = float_workspace_buffer
            self._int_workspace_buffer = int_workspace_buffer
        else:
            _FlashInferWrapper.reset_workspace_buffer(self, float_workspace_buffer, int_workspace_buffer)
        size = float_workspace_buffer.numel() * float_workspace_buffer.element_size()
        self._decisions, self._asked = {}, ((), None)
        if self._decision.module is None or self._decision.partial_bytes > size:
            # Who serves may depend on the size, and FlashInfer's plan lay in the old buffer.
            self._choice = KernelChoice("none", "the workspaces are new, and the plan needs them")
            self._decision = Decision(self._decision.spec, self._choice)
        self._flashinfer_spec = None

    def workspace_size(
        self,
        indptr: torch.Tensor,
        indices: torch.Tensor,
        last_page_len: torch.Tensor,
        num_qo_heads: int,
        num_kv_heads: int,
        head_dim: int,
        page_size: int,
        pos_encoding_mode: str = "NONE",
        window_left: int = -1,
        logits_soft_cap: float | None = None,
        q_data_type: str | torch.dtype | None = "float16",
        kv_data_type: str | torch.dtype | None = None,
        o_data_type: str | torch.dtype | None = None,
        data_type: str | torch.dtype | None = None,
        sm_scale: float | None = None,
        rope_scale: float | None = None,
        rope_theta: float | None = None,
        block_tables: torch.Tensor | None = None,
        seq_lens: torch.Tensor | None = None,
        fixed_split_size: int | None = None,
        disable_split_kv: bool = False,
        q_len_per_req: int = 1,
    ) -> tuple[int, int]:
        """Bytes of float and int workspace that `plan` with these arguments needs; changes no plan.

        Raises NotImplementedError where FlashInfer serves and its release cannot say.
        """
        indptr, indices, last_page_len = map(checks.made_contiguous, (indptr, indices, last_page_len))
        checks.plan_table(indptr, indices, last_page_len, self.device)
        spec = self._spec(
            last_page_len.shape[0], indptr.dtype, num_qo_heads, num_kv_heads, head_dim, page_size, pos_encoding_mode,
            window_left, logits_soft_cap, q_data_type, kv_data_type, o_data_type, data_type, fixed_split_size,
            disable_split_kv, q_len_per_req, 0, None,
        )  # fmt: skip
        choice, module = kernel_for(spec, self.device)
        if choice.kernel == "reference":
            return 0, 0
        if module is not None:
            most_pages = self._most_pages(spec, self._kv_bytes(spec, indices.shape[0]))
            return workspace_size(spec, most_pages, module, self._float_workspace_buffer)
        if choice.kernel == "none" or not hasattr(_FlashInferWrapper, "workspace_size"):
            raise NotImplementedError(f"workspace_size: not available, {choice.reason}")
        with self._flashinfer():
            return _FlashInferWrapper.workspace_size(
                self, indptr, indices, last_page_len, num_qo_heads, num_kv_heads, head_dim, page_size,
                pos_encoding_mode=pos_encoding_mode, window_left=window_left, logits_soft_cap=logits_soft_cap,
                q_data_type=q_data_type, kv_data_type=kv_data_type, o_data_type=o_data_type, data_type=data_type,
                sm_scale=sm_scale, rope_scale=rope_scale, rope_theta=rope_theta, block_tables=block_tables,
                seq_lens=seq_lens, fixed_split_size=fixed_split_size, disable_split_kv=disable_split_kv,
                q_len_per_req=q_len_per_req,
            )  # fmt: skip

    def prewarm_paged_kv_stride_variant(self, variant: str = "independent") -> None:
        """FlashInfer 0.7's preparation for K and V with different strides; our kernel takes them as they are."""
        if self._choice.kernel not in ("fi_prefetch", "reference"):
            super().prewarm_paged_kv_stride_variant(variant)

    def __reduce__(self) -> Any:
        raise TypeError(
            f"{type(self).__name__} cannot be pickled or copied: it holds device buffers and a loaded kernel; "
            "make a new one and plan() it"
        )


class CUDAGraphBatchDecodeWithPagedKVCacheWrapper(BatchDecodeWithPagedKVCacheWrapper, _FlashInferGraphWrapper):
    """FlashInfer's `CUDAGraphBatchDecodeWithPagedKVCacheWrapper`: for captured graphs, its buffers fixed."""

    def __init__(
        self,
        workspace_buffer: torch.Tensor,
        indptr_buffer: torch.Tensor,
        indices_buffer: torch.Tensor,
        last_page_len_buffer: torch.Tensor,
        kv_layout: str = "NHD",
        use_tensor_cores: bool = False,
        *,
        prefetch: PrefetchPolicy | str | None = None,
        ready: str = "nothing",
    ) -> None:
        BatchDecodeWithPagedKVCacheWrapper.__init__(
            self,
            workspace_buffer,
            kv_layout,
            use_cuda_graph=True,
            use_tensor_cores=use_tensor_cores,
            paged_kv_indptr_buffer=indptr_buffer,
            paged_kv_indices_buffer=indices_buffer,
            paged_kv_last_page_len_buffer=last_page_len_buffer,
            prefetch=prefetch,
            ready=ready,
        )


@functools.cache
def _log_fallback(reason: str) -> None:
    """Once a reason, or a server would log it every step."""
    logger.info("decoding with FlashInfer's kernel: %s", reason)
