"""The decode kernel through FlashInfer's JIT: compiled, linked, loaded, and its machine code looked at.

Where there is no nvcc these tests fail: a kernel that nobody compiled is not known to compile.
"""

from __future__ import annotations

import functools
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from emulator import module as emulated_module
from machine_code import Kernel, kernels
from tvm_ffi import libinfo

from fi_prefetch import jit
from fi_prefetch.schedule import ring_tiles

ROOT = Path(__file__).resolve().parents[2]
BF16, F16, E4M3, E5M2 = torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.float8_e5m2


class Case(NamedTuple):
    architecture: str
    variant: jit.Variant

    @property
    def id(self) -> str:
        return f"sm{self.architecture.replace('.', '')}-{self.variant.name.removeprefix('fi_prefetch_batch_decode_')}"

    @property
    def compute(self) -> int:
        """Major compute capability times ten, and the minor."""
        return int(re.sub(r"\D", "", self.architecture))


def case(architecture: str, q: torch.dtype, kv: torch.dtype, o: torch.dtype, head_dim: int, *features: str) -> Any:
    position = next((mode for mode in ("ROPE_LLAMA", "ALIBI") if mode in features), "NONE")
    chosen = ("window" in features, "cap" in features, position, "fixed split" in features)
    found = Case(architecture, jit.Variant(q, kv, o, head_dim, *chosen))
    # Under xdist the tests of one library stay together, so that one process compiles it.
    return pytest.param(found, id=found.id, marks=pytest.mark.xdist_group(found.id))


# Every pair of element types with every head_dim; every architecture with every head_dim; sm_90a with every pair of
# element types; all four choices of features with every head_dim; those of MOST_INSTRUCTIONS; and copies of whole tiles
# on every architecture.
CASES = [
    case("9.0a", BF16, BF16, BF16, 64),
    case("8.9", F16, F16, F16, 64, "window"),
    case("8.0", BF16, E4M3, BF16, 64, "cap"),
    case("9.0a", BF16, E5M2, F16, 64, "window", "cap"),
    case("10.0a", F16, E4M3, F16, 64, "window"),
    case("12.0a", F16, E5M2, BF16, 64, "cap"),
    case("8.0", BF16, BF16, F16, 128, "window", "cap"),
    case("9.0a", F16, F16, F16, 128, "cap"),
    case("9.0a", BF16, BF16, BF16, 128),
    case("9.0a", BF16, E4M3, BF16, 128),
    case("10.0a", BF16, E5M2, BF16, 128),
    case("12.0a", F16, E4M3, F16, 128, "window"),
    case("8.9", F16, E5M2, F16, 128),
    case("8.9", F16, F16, BF16, 128, "window"),
    case("10.0a", BF16, BF16, BF16, 128, "window"),
    case("12.0a", F16, F16, F16, 128),
    case("10.0a", BF16, BF16, BF16, 256, "window"),
    case("12.0a", F16, F16, BF16, 256, "window", "cap"),
    case("8.9", BF16, E4M3, BF16, 256),
    case("8.9", BF16, E5M2, BF16, 256, "cap"),
    case("9.0a", F16, E4M3, F16, 256, "window", "cap"),
    case("9.0a", F16, E5M2, BF16, 256, "window"),
    # Rotary positions with every head_dim on Hopper, and on every architecture; ALiBi where registers are scarcest.
    case("9.0a", BF16, BF16, BF16, 64, "ROPE_LLAMA", "window", "cap"),
    case("9.0a", BF16, BF16, BF16, 128, "ROPE_LLAMA"),
    case("9.0a", BF16, E4M3, BF16, 128, "ROPE_LLAMA", "window"),
    case("9.0a", F16, E5M2, F16, 256, "ROPE_LLAMA"),
    case("8.0", BF16, BF16, BF16, 128, "ROPE_LLAMA", "window"),
    case("8.9", F16, F16, F16, 128, "ROPE_LLAMA", "cap"),
    case("10.0a", BF16, BF16, BF16, 256, "ROPE_LLAMA", "cap"),
    case("12.0a", BF16, E5M2, BF16, 128, "ROPE_LLAMA", "window", "cap"),
    case("8.0", BF16, BF16, BF16, 256, "ALIBI"),
    case("8.9", BF16, E4M3, BF16, 128, "ALIBI", "window"),
    case("9.0a", BF16, BF16, BF16, 128, "ALIBI", "window"),
    case("9.0a", F16, E4M3, F16, 256, "ALIBI"),
    case("10.0a", F16, F16, F16, 128, "ALIBI"),
    case("12.0a", BF16, BF16, BF16, 64, "ALIBI"),
    # The batch-invariant kernel with every head_dim, and on every architecture.
    case("8.0", BF16, BF16, BF16, 256, "fixed split", "window"),
    case("8.9", BF16, E4M3, BF16, 128, "fixed split"),
    case("9.0a", BF16, BF16, BF16, 128, "fixed split"),
    case("10.0a", BF16, BF16, BF16, 128, "fixed split", "ROPE_LLAMA"),
    case("12.0a", F16, F16, F16, 64, "fixed split", "window"),
]
every_case = pytest.mark.parametrize("case", CASES)

# The traits in a mangled name: head_dim, row tiles (of 8 query rows), stages, window, soft cap, position, few requests,
# copies of whole tiles, planned work.
_TRAITS = re.compile(
    r"(decode|fixed_split|prefetch_kv|schedule)_kernelINS_12DecodeTraitsI.+?"
    r"Li(\d+)ELi(\d+)ELi(\d+)ELb([01])ELb([01])ELNS_8PositionE(\d)ELb([01])ELb([01])ELb([01])EE"
)
ROW_TILES = (1, 2)
# Bytes that a decode kernel may spill, by head_dim and row tiles. 256 dimensions of 16 rows are 128 registers of sums a
# lane; rotary positions keep a token's turns in registers besides, ALiBi its slopes, and a second tile that is taken
# with the first its scores. The few bytes at 128 dimensions are read back once or a few times in all of the code.
MAX_SPILLED_BYTES = {
    "NONE": {(128, 2): 56, (256, 1): 8, (256, 2): 536},
    "ALIBI": {(128, 2): 64, (256, 1): 8, (256, 2): 504},
    "ROPE_LLAMA": {(128, 2): 80, (256, 1): 64, (256, 2): 704},
}
# What Ada's kernels (8.9) of two row tiles spill beyond that.
MORE_SPILLED_BYTES_ON_ADA = 32
# The same of the batch-invariant kernel, whose loop over splits keeps its own beside the 32 rows that a merge has on
# their way; and before Hopper, for which it is not tuned.
MAX_SPILLED_BYTES_OF_FIXED_SPLITS = {
    "NONE": {(128, 2): 160},
    "ROPE_LLAMA": {(128, 2): 88},
}
MAX_SPILLED_BYTES_OF_FIXED_SPLITS_BEFORE_HOPPER = {
    "NONE": {(128, 1): 32, (128, 2): 288, (256, 1): 256, (256, 2): 696},
}


class Size(NamedTuple):
    """What a decode or batch-invariant kernel is compiled for."""

    row_tiles: int
    few_requests: bool = False
    tensor_copies: bool = False
    planned: bool = False


# Instructions of the decode kernels on sm_90a at head_dim 128 with one row tile, by the cache's element type: for few
# requests, for more and for planned work, that copy rows and that copy whole tiles. A bound, because between two layers
# of a model the weights push the kernel's instructions out of L2: they come from HBM then, about 1 us for every 1,000
# (H200), and back-to-back timings do not show it.
MOST_INSTRUCTIONS = {
    BF16: {
        Size(1, few_requests=True): 4_500,
        Size(1): 5_050,
        Size(1, planned=True): 3_900,
        Size(1, few_requests=True, tensor_copies=True): 4_400,
        Size(1, tensor_copies=True): 4_900,
        Size(1, tensor_copies=True, planned=True): 3_750,
    },
    E4M3: {
        Size(1, few_requests=True): 5_100,
        Size(1): 5_600,
        Size(1, planned=True): 4_450,
        Size(1, few_requests=True, tensor_copies=True): 5_000,
        Size(1, tensor_copies=True): 5_500,
        Size(1, tensor_copies=True, planned=True): 4_350,
    },
}


@dataclass
class Compiled:
    """A loaded module; its decode or batch-invariant kernels by size; beside the former a window kernel and one that
    plans.

    Attributes:
        empty: decode kernels that are not for this architecture.
    """

    module: Any
    decode: dict[Size, Kernel]
    empty: dict[Size, Kernel]
    prefetch_kv: Kernel | None


@functools.cache
def compiled(case: Case) -> Compiled:
    """Compiled, linked and loaded; from FlashInfer's cache where nothing changed since."""
    spec = jit.jit_spec(case.variant, architectures=(case.architecture,))
    with pytest.MonkeyPatch.context() as environment, jit.target_architectures([case.architecture]):
        environment.setenv("NVCC_APPEND_FLAGS", "-Werror=all-warnings")
        module = spec.build_and_load()
    decode, empty = {}, {}
    beside: dict[str, list[Kernel]] = {"prefetch_kv": [], "schedule": []}
    for (architecture, name), kernel in kernels(spec.get_library_path()).items():
        traits = _TRAITS.search(name)
        assert traits, name
        head_dim, row_tiles, _, sliding_window, soft_cap, position, *choices = map(int, traits.groups()[1:])
        assert architecture == f"sm_{case.architecture.replace('.', '')}"
        assert (head_dim, sliding_window, soft_cap) == case.variant[3:6], name
        assert position == jit.POSITIONS[case.variant.position], name
        size = Size(row_tiles, *map(bool, choices))
        if traits[1] in beside:
            assert size == Size(1), name
            beside[traits[1]].append(kernel)
        else:
            assert traits[1] == ("fixed_split" if case.variant.fixed_split else "decode")
            kernels_of = empty if size.tensor_copies and case.compute < 90 else decode
            assert size not in kernels_of, name
            kernels_of[size] = kernel
    assert all(len(found) == (not case.variant.fixed_split) for found in beside.values())
    return Compiled(module, decode, empty, beside["prefetch_kv"][0] if beside["prefetch_kv"] else None)


def test_the_cases_are_representative():
    cases = [parameter.values[0] for parameter in CASES]
    head_dims = set(jit.HEAD_DIMS)
    types = {(variant.dtype_q, variant.dtype_kv) for variant in jit.all_variants()}

    def pairs(*values):
        return {tuple(value(c) for value in values) for c in cases}

    def product(first, second):
        return {(a, b) for a in first for b in second}

    assert pairs(lambda c: (c.variant.dtype_q, c.variant.dtype_kv), lambda c: c.variant.head_dim) == product(
        types, head_dims
    )
    architectures = {"8.0", "8.9", "9.0a", "10.0a", "12.0a"}
    assert pairs(lambda c: c.architecture, lambda c: c.variant.head_dim) == product(architectures, head_dims)
    assert {(c.variant.dtype_q, c.variant.dtype_kv) for c in cases if c.architecture == "9.0a"} == types
    features = product((False, True), (False, True))
    assert {(c.variant.sliding_window, c.variant.soft_cap) for c in cases if c.architecture == "9.0a"} == features
    for head_dim in head_dims:
        of_head_dim = [c.variant for c in cases if c.variant.head_dim == head_dim]
        assert {(variant.sliding_window, variant.soft_cap) for variant in of_head_dim} == features
    for mode in jit.POSITIONS:
        of_mode = [c for c in cases if c.variant.position == mode]
        assert {c.architecture for c in of_mode} == architectures
        assert {c.variant.head_dim for c in of_mode} == head_dims
    fixed = [c for c in cases if c.variant.fixed_split]
    assert {c.architecture for c in fixed} == architectures
    assert {c.variant.head_dim for c in fixed} == head_dims
    assert {c.architecture for c in cases if copies_whole_tiles(c.variant)} == architectures
    assert all(measured_for_its_size(dtype) in cases for dtype in MOST_INSTRUCTIONS)


def measured_for_its_size(dtype_kv: torch.dtype) -> Case:
    return Case("9.0a", jit.Variant(BF16, dtype_kv, BF16, 128, False, False))


def copies_whole_tiles(variant: jit.Variant) -> bool:
    """Whether a module has kernels for pages of whole tiles, for up to 8 query rows: csrc/decode.cu."""
    plain = variant.position == "NONE" and not variant.fixed_split
    return plain and variant.head_dim <= 128


@every_case
def test_the_library_loads_and_has_the_module_functions(case):
    module = compiled(case).module
    for name in ("plan", "adjust_plan", "fix_splits", "workspace_size", "run", "prefetch_kv"):
        assert module.get_function(name) is not None, name
    empty = torch.empty(0)
    # What FlashInfer's wrapper passes, but another head_dim: refused by the compiled code, before it asks a GPU.
    wrong = case.variant.head_dim + 1
    window_left, soft_cap = (5 if case.variant.sliding_window else -1), (30.0 if case.variant.soft_cap else 0.0)
    numbers = (1, 4, 2, 16, False, window_left, soft_cap, wrong, wrong)
    with pytest.raises(
        ValueError, match=f"head_dim: this module was compiled for {case.variant.head_dim}, got {wrong}"
    ):
        module.plan(empty, empty, empty, empty, *numbers, empty, empty)
    with pytest.raises(ValueError, match="num_qo_heads: expected at most 16 query rows per kv head, got 17"):
        module.workspace_size(empty, empty, 1, 17, 1, 16, False, -1, 0.0, *2 * [case.variant.head_dim], empty, empty)


@every_case
def test_every_size_has_its_kernel(case):
    """A batch-invariant kernel is for any number of requests; of the decode kernels that for few is shorter than that
    for more, and that for planned work the shortest. Whole tiles are copied where that was measured to be faster, by
    GPUs that can."""
    found = compiled(case)
    by_rows = {Size(row_tiles) for row_tiles in ROW_TILES}
    if not case.variant.fixed_split:
        by_rows |= {size._replace(**{kind: True}) for size in by_rows for kind in ("few_requests", "planned")}
    whole = {
        size._replace(tensor_copies=True)
        for size in by_rows
        if size.row_tiles == 1 and copies_whole_tiles(case.variant)
    }
    assert {*found.decode, *found.empty} == by_rows | whole
    assert set(found.empty) == (whole if case.compute < 90 else set())
    for size in found.decode:
        if size.few_requests:
            shorter = size._replace(few_requests=False, planned=True)
            lengths = [len(found.decode[s].instructions) for s in (shorter, size, size._replace(few_requests=False))]
            assert lengths == sorted(set(lengths)), (size, lengths)
    for size, kernel in found.empty.items():
        # An end, what ptxas puts before and behind every kernel's, and what fills the last lines.
        assert len([name for name in kernel.instructions if name != "NOP"]) <= 4, (size, kernel.instructions)


@pytest.mark.parametrize("case", [c for c in CASES if c.values[0] in map(measured_for_its_size, MOST_INSTRUCTIONS)])
def test_number_of_instructions(case):
    bounds = MOST_INSTRUCTIONS[case.variant.dtype_kv]
    found = {size: kernel for size, kernel in compiled(case).decode.items() if size.row_tiles == 1}
    assert set(found) == set(bounds)
    for size, kernel in found.items():
        assert len(kernel.instructions) <= bounds[size], size


@every_case
def test_registers_and_spills(case):
    found = compiled(case)
    by_position = MAX_SPILLED_BYTES
    if case.variant.fixed_split:
        tuned = case.compute >= 90
        by_position = MAX_SPILLED_BYTES_OF_FIXED_SPLITS if tuned else MAX_SPILLED_BYTES_OF_FIXED_SPLITS_BEFORE_HOPPER
    allowed = by_position[case.variant.position]
    limits = {size: allowed.get((case.variant.head_dim, size.row_tiles), 0) for size in found.decode}
    if case.compute == 89 and not case.variant.fixed_split:
        limits = {size: n + MORE_SPILLED_BYTES_ON_ADA if size.row_tiles == 2 and n else n for size, n in limits.items()}
    for size, kernel in [*found.decode.items(), (None, found.prefetch_kv)]:
        if kernel is None:
            continue
        limit = 0 if size is None else limits[size]
        assert kernel.usage["LOCAL"] == 0
        assert kernel.usage["STACK"] <= limit, (size, kernel.usage)
        if limit == 0:
            assert kernel.count("LDL") == kernel.count("STL") == 0, size
    # A block of 256 threads must fit a register file of 65,536, and the window kernel beside whatever else runs.
    assert max(kernel.usage["REG"] for kernel in found.decode.values()) <= 255
    assert found.prefetch_kv is None or found.prefetch_kv.usage["REG"] <= 64


@pytest.mark.parametrize(
    "case", [c for c in CASES if c.values[0].compute >= 90 and not c.values[0].variant.fixed_split]
)
def test_all_lanes_of_a_warp_go_one_way(case):
    """No path for lanes that went another way, of which a loop has many once the compiler cannot follow one branch."""
    for size, kernel in compiled(case).decode.items():
        assert kernel.count("BRA", "DIV") == kernel.count("WARPSYNC", "COLLECTIVE") == 0, size


@every_case
def test_no_copy_has_a_descriptor_that_the_gpu_refuses(case):
    """A copy's L2 policy lies in an even pair of uniform registers. ptxas 13.0 also names an odd one where it knows
    that the address in shared memory has a part that is the warp's: an illegal instruction when it runs (H200)."""
    for size, kernel in compiled(case).decode.items():
        code = zip(kernel.instructions, kernel.operands, strict=True)
        copies = [operands for name, operands in code if name.startswith(("LDGSTS", "UTMALDG"))]
        descriptors = [int(register) for copy in copies for register in re.findall(r"desc\[UR(\d+)\]", copy)]
        assert copies and not [register for register in descriptors if register % 2], size


@every_case
def test_instructions(case):
    found = compiled(case)
    hopper = case.compute >= 90
    # Both products run in the query's type; in half for an fp8 cache, whatever the queries are. That of rotated keys
    # runs in tf32.
    product_type = case.variant.dtype_q if case.variant.dtype_kv.itemsize == 2 else F16
    rotary = case.variant.position == "ROPE_LLAMA"
    for size, kernel in found.decode.items():
        in_bf16, in_tf32 = kernel.count("HMMA", "BF16"), kernel.count("HMMA", "TF32")
        in_half = kernel.count("HMMA") - in_bf16 - in_tf32
        assert (in_tf32 > 0) == rotary
        assert (kernel.count("MUFU", "SIN") > 0, kernel.count("MUFU", "COS") > 0) == (rotary, rotary)
        assert (in_bf16 > 0, in_half > 0) == (product_type == BF16, product_type == F16), "tensor cores"
        # For a tile, head_dim / 16 products of K and as many of V, for every 8 rows of queries; twice in the code for
        # a window's or a length's edge is more than that.
        assert kernel.count("HMMA") >= 2 * size.row_tiles * case.variant.head_dim // 16
        if size.tensor_copies:
            assert kernel.count("LDGSTS") == kernel.count("LDGDEPBAR") == 0, "no copy row by row"
            assert kernel.count("UTMALDG", "5D") == 4, "K's copy and V's, of a piece's first tile and of the others"
            assert kernel.count("UTMAPF", "L2", "5D") == 2, "the prologue"
            assert kernel.count("UTMACCTL", "PF") == 2, "prefetch of the tensors' descriptions"
            assert kernel.count("ELECT") > 0, "one lane of a warp that the compiler knows to be converged"
            assert kernel.count("SYNCS", "ARRIVE") > 0 and kernel.count("SYNCS", "PHASECHK") > 0, "barriers of copies"
            # Behind the barriers' making, the zeros after a request's last token (once for each of the tiles that are
            # taken together), and the scan that lay in the ring.
            together = 2 if case.variant.head_dim * case.variant.dtype_kv.itemsize < 256 else 1
            scans_in_ring = not (size.few_requests or size.planned)
            assert kernel.count("FENCE", "VIEW", "ASYNC") == 1 + together + scans_in_ring
        else:
            assert kernel.count("LDGSTS", "BYPASS") > 0, "16-byte copies to shared memory that leave L1 out"
            assert kernel.count("LDGDEPBAR") > 0 and kernel.count("DEPBAR") > 0, "groups of copies"
            assert kernel.count("UTMALDG") == kernel.count("UTMAPF") == kernel.count("SYNCS") == 0, "no tensors"
        assert kernel.count("LDSM") > kernel.count("LDSM", "MT88") > 0, "ldmatrix, plain for K, transposed for V"
        assert kernel.count("MOVM") > 0, "movmatrix: P from the one product's layout to the other's"
        prefetches = not case.variant.fixed_split  # the batch-invariant kernel brings nothing into L2
        assert (kernel.count("CCTL", "PF2") > 0) == prefetches, "prefetch of lines into L2"
        assert (kernel.count("UBLKPF", "L2") > 0) == (hopper and prefetches), "prefetch of whole tiles into L2"
        assert (kernel.count("ACQBULK") > 0) == hopper, "the wait for the kernels before"
        assert (kernel.count("PREEXIT") > 0) == hopper, "the start of the kernels after"
        doubles = sum(kernel.count(name) for name in ("DADD", "DMUL", "DFMA"))
        assert kernel.count("FRND") == 0 and (doubles > 0) == rotary, "no doubles but for rotary frequencies"
    window = found.prefetch_kv
    if window is None:
        return
    assert window.count("CCTL", "PML2") > 0, "prefetch of lines that are to stay in L2"
    assert (window.count("ACQBULK") > 0) == hopper
    assert window.count("HMMA") == window.count("LDGSTS") == 0, "it computes nothing and copies nothing"


@every_case
def test_fp8_is_widened_by_the_hardware_that_can(case):
    """From sm_89 on one instruction widens two numbers; sm_80 has integer arithmetic for it."""
    widening = [kernel.count("F2FP", "UNPACK_B") for kernel in compiled(case).decode.values()]
    fp8 = case.variant.dtype_kv.itemsize == 1
    assert {number > 0 for number in widening} == {fp8 and case.compute >= 89}


WITHOUT_NVCC = """
import shutil, sys, torch
from fi_prefetch import jit
assert shutil.which("nvcc") is None
try:
    jit.nvcc_path()
except jit.KernelUnavailableError:
    pass
else:
    raise AssertionError("there is a compiler")
variant = next(variant for variant in jit.all_variants() if variant.name == sys.argv[1])
print([jit.load(variant).get_function(name) is not None for name in ("plan", "run")])
other = variant._replace(sliding_window=True)
try:
    jit.load(other)
except jit.KernelUnavailableError as error:
    print(error)
"""


@pytest.mark.parametrize("case", CASES[:1])
def test_what_was_compiled_ahead_is_loaded_where_there_is_no_nvcc(case, tmp_path, monkeypatch):
    """Up to the loaded module: `fi-prefetch build --aot`, then a process that finds no compiler and an empty cache."""
    # The older FlashInfers' environments, in which some of this file runs, have not all that the command line needs.
    from click.testing import CliRunner

    from fi_prefetch import cli
    from fi_prefetch.bench import kernels as measurement

    compiled(case)  # so that the command finds it compiled
    kernels_folder, nothing = tmp_path / "kernels", tmp_path / "nothing"
    command = ["build", "--arch", case.architecture, "--only", case.variant.name, "--aot", str(kernels_folder)]
    built = CliRunner().invoke(cli.main, command)
    assert built.exit_code == 0, built.output
    suffix = f"_sm{case.architecture.replace('.', '')}.so"
    names = {f"{case.variant.name}_{jit.sources_hash()}{suffix}", f"{measurement.name()}{suffix}"}
    assert {library.name for library in kernels_folder.iterdir()} == names

    kept = {name: value for name, value in os.environ.items() if name not in ("FLASHINFER_NVCC", "CUDA_PATH")}
    places = dict.fromkeys(("PATH", "CUDA_HOME", "FLASHINFER_WORKSPACE_BASE"), str(nothing))
    command = [sys.executable, "-c", WITHOUT_NVCC, case.variant.name]
    environment = {**kept, **places, "FI_PREFETCH_AOT_DIR": str(kernels_folder)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    loaded, missing = done.stdout.splitlines()
    assert loaded == "[True, True]"
    assert "fi-prefetch build --aot" in missing and "no CUDA compiler" in missing

    # `demo`, `bench` and `tune` have kernels of their own, which need a GPU of the right kind to be asked for.
    monkeypatch.setenv("FLASHINFER_NVCC", str(nothing))
    monkeypatch.setenv("FI_PREFETCH_AOT_DIR", str(kernels_folder))
    major, minor = (int(digit) for digit in case.architecture.rstrip("af").split("."))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    for capability, found in (((major, minor), True), ((major + 1, minor), False)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index, capability=capability: capability)
        assert (jit.compiled_ahead(kernels_folder, measurement.name()) is not None) == found
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (major, minor))
    assert callable(measurement.module().read_rows)


@pytest.mark.parametrize("source", ["fi_prefetch/bench/kernels.cu", "tests/gpu/late_writes.cu", "tests/gpu/few_sms.cu"])
def test_the_kernels_of_measurements_and_gpu_tests_compile(source, tmp_path):
    """FlashInfer's JIT builds them where they are used, on a GPU; that they compile is known before."""
    folders = {libinfo.find_include_path(), libinfo.find_dlpack_include_path(), jit.csrc_dir()}
    flags = ["-std=c++17", "-arch=sm_90a", "-cubin", "-Werror=all-warnings", *(f"-I{folder}" for folder in folders)]
    command = [jit.nvcc_path(), *flags, "-o", tmp_path / "kernels.cubin", ROOT / source]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("rows", [1, 4, 8, 16])
@pytest.mark.parametrize(
    "variant",
    [
        # Under xdist the tests of one module stay together, so that one process compiles it.
        pytest.param(variant, id=variant.name, marks=pytest.mark.xdist_group(f"emulated {variant.name}"))
        for variant in (
            jit.Variant(BF16, BF16, BF16, 64, False, False),
            jit.Variant(F16, E5M2, F16, 64, False, False),
            jit.Variant(F16, F16, F16, 128, False, False),
            jit.Variant(BF16, E4M3, BF16, 128, False, False),
            jit.Variant(BF16, BF16, BF16, 256, False, False),
        )
    ],
)
def test_the_default_launch_fits_and_keeps_hbm_busy(variant, rows):
    """On Hopper's 227 KB of shared memory a block, with the module's own arithmetic, run on the CPU."""
    empty, workspace = torch.empty(0), torch.empty(1 << 20, dtype=torch.uint8)
    head_dim = variant.head_dim
    numbers = (1, rows, 1, 16, False, -1, 0.0, head_dim, head_dim)
    plan = list(emulated_module.load(variant).plan(workspace, empty, empty, empty, *numbers, empty, empty))
    warps, shared_bytes, stages = plan[1], plan[2], plan[7]
    assert shared_bytes <= 227 * 1024
    assert warps == (8 if head_dim < 256 else 4)
    tile_bytes = 2 * 16 * head_dim * variant.dtype_kv.itemsize
    assert stages == ring_tiles(tile_bytes)
    # On its way while one tile a warp is computed on; twice an H200's share of HBM at 1 us.
    assert warps * (stages - 1) * tile_bytes >= 64 << 10
