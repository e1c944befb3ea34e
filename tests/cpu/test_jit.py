"""How variants are named, and what FlashInfer's JIT is told to compile. Nothing is compiled here."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from fi_prefetch import jit

VARIANT = jit.Variant(torch.bfloat16, torch.float8_e4m3fn, torch.float16, 128, True, False)


@pytest.fixture
def toolchain(tmp_path, monkeypatch) -> Path:
    """A script that passes for nvcc, and leads into the toolkit at tmp_path / "cuda"."""
    nvcc = tmp_path / "nvcc"
    nvcc.write_text(f"#!/bin/sh\necho '#$ TOP={tmp_path}/cuda/bin/..' >&2\n")
    nvcc.chmod(0o755)
    monkeypatch.setenv("FLASHINFER_NVCC", str(nvcc))
    return nvcc


@pytest.fixture
def nothing_loaded(monkeypatch):
    for name in ("_loaded", "_failed", "_locks"):
        monkeypatch.setattr(jit, name, {})


def test_names():
    assert VARIANT.name == "fi_prefetch_batch_decode_q_bf16_kv_e4m3_o_f16_hd128_swa1_cap0"
    assert VARIANT.macros() == [
        "-DFI_PREFETCH_DTYPE_Q=nv_bfloat16",
        "-DFI_PREFETCH_DTYPE_KV=__nv_fp8_e4m3",
        "-DFI_PREFETCH_DTYPE_O=half",
        "-DFI_PREFETCH_HEAD_DIM=128",
        "-DFI_PREFETCH_SLIDING_WINDOW=1",
        "-DFI_PREFETCH_SOFT_CAP=0",
        "-DFI_PREFETCH_POSITION=0",
        "-DFI_PREFETCH_FIXED_SPLIT=0",
    ]
    rotary = VARIANT._replace(position="ROPE_LLAMA")
    assert rotary.name == f"{VARIANT.name}_rope_llama"
    assert rotary.macros()[-2] == "-DFI_PREFETCH_POSITION=1"
    fixed = rotary._replace(fixed_split=True)
    assert fixed.name == f"{VARIANT.name}_rope_llama_fixed_split"
    assert fixed.macros() == [*rotary.macros()[:-1], "-DFI_PREFETCH_FIXED_SPLIT=1"]
    variants = jit.all_variants()
    assert len({variant.name for variant in variants}) == len(variants) == 144 + 144 + 72
    assert not any(variant.fixed_split for variant in variants)
    assert jit.all_variants(fixed_split=True) == [variant._replace(fixed_split=True) for variant in variants]


def test_spec(toolchain):
    spec = jit.jit_spec(VARIANT, ["9.0a", "10.0a"])
    flags = " ".join(spec.extra_cuda_cflags)
    assert spec.name == f"{VARIANT.name}_{jit.sources_hash()}_sm90a_sm100a"
    assert "code=sm_90a" in flags and "code=sm_100a" in flags
    assert "use_fast_math" not in flags and "-O3" in flags
    assert set(VARIANT.macros()) <= set(spec.extra_cuda_cflags)
    assert spec.sources == [jit.csrc_dir() / "decode.cu"]
    assert jit.csrc_dir() in spec.extra_include_dirs
    assert f"-L{toolchain.parent / 'cuda' / 'lib64'}" in spec.extra_ldflags


def test_target_architectures_are_put_back():
    targets = jit.flashinfer_jit.current_compilation_context.TARGET_CUDA_ARCHS
    before = set(targets)
    with pytest.raises(KeyError), jit.target_architectures(["12.0f"]):
        assert targets == {(12, "0f")}
        raise KeyError
    assert targets == before


def test_hash_follows_the_sources(tmp_path, monkeypatch):
    (tmp_path / "decode.cu").write_text("one")
    monkeypatch.setattr(jit, "csrc_dir", lambda: tmp_path)
    digest = jit.sources_hash.__wrapped__
    first = digest()
    assert len(first) == 8
    (tmp_path / "notes.txt").write_text("not a source")
    assert digest() == first
    (tmp_path / "tile.cuh").write_text("two")
    assert (second := digest()) != first
    (tmp_path / "decode.cu").write_text("three")
    assert digest() not in (first, second)
    monkeypatch.setattr(jit, "__version__", "0.0.0")
    (tmp_path / "decode.cu").write_text("one")
    assert digest() != second


def test_no_compiler(monkeypatch, tmp_path, nothing_loaded):
    monkeypatch.setenv("FLASHINFER_NVCC", str(tmp_path / "missing" / "nvcc"))
    with pytest.raises(jit.KernelUnavailableError, match="install the CUDA toolkit"):
        jit.load(VARIANT)


def test_no_architecture(toolchain, nothing_loaded, monkeypatch):
    monkeypatch.delenv("FLASHINFER_CUDA_ARCH_LIST", raising=False)
    with jit.target_architectures([]), pytest.raises(jit.KernelUnavailableError, match="FLASHINFER_CUDA_ARCH_LIST"):
        jit.load(VARIANT)


class FakeSpec:
    name = "a spec"

    def __init__(self, library: Path, result: object) -> None:
        self.library, self.result, self.builds = library, result, 0

    def get_library_path(self) -> Path:
        return self.library

    def build_and_load(self) -> object:
        self.builds += 1
        if isinstance(self.result, Exception):
            raise self.result
        return self.result


def test_compiles_once_and_says_so(monkeypatch, nothing_loaded, tmp_path, capsys):
    spec = FakeSpec(tmp_path / "missing.so", object())
    monkeypatch.setattr(jit, "jit_spec", lambda variant: spec)
    assert jit.load(VARIANT) is jit.load(VARIANT) is spec.result
    assert spec.builds == 1
    assert capsys.readouterr().err.count("compiling") == 1


def test_threads_compile_once(monkeypatch, nothing_loaded, tmp_path):
    spec = FakeSpec(tmp_path / "missing.so", object())
    monkeypatch.setattr(jit, "jit_spec", lambda variant: time.sleep(0.05) or spec)
    with ThreadPoolExecutor(4) as pool:
        assert set(pool.map(jit.load, [VARIANT] * 8)) == {spec.result}
    assert spec.builds == 1


def test_a_library_that_is_there_is_not_announced(monkeypatch, nothing_loaded, tmp_path, capsys):
    spec = FakeSpec(tmp_path, object())
    monkeypatch.setattr(jit, "jit_spec", lambda variant: spec)
    jit.load(VARIANT)
    assert capsys.readouterr().err == ""


def test_a_failure_is_remembered(monkeypatch, nothing_loaded, tmp_path):
    spec = FakeSpec(tmp_path / "missing.so", OSError("Read-only file system"))
    monkeypatch.setattr(jit, "jit_spec", lambda variant: spec)
    for _ in range(2):
        with pytest.raises(jit.KernelUnavailableError, match="Read-only file system"):
            jit.load(VARIANT)
    assert spec.builds == 1


# ---- compiled ahead ------------------------------------------------------------------------------------------------


@pytest.fixture
def ahead(tmp_path, monkeypatch, nothing_loaded):
    """Puts a library into a folder that FI_PREFETCH_AOT_DIR names, beside the GPUs given; there is no compiler."""
    folder = tmp_path / "ahead"
    folder.mkdir()
    monkeypatch.setenv("FI_PREFETCH_AOT_DIR", str(folder))
    monkeypatch.setenv("FLASHINFER_NVCC", str(tmp_path / "missing"))
    monkeypatch.setattr(jit.tvm_ffi, "load_module", Path)

    def make(architectures: str, *devices: tuple[int, int], digest: str | None = None) -> Path:
        monkeypatch.setattr(torch.cuda, "device_count", lambda: len(devices))
        monkeypatch.setattr(torch.cuda, "get_device_capability", devices.__getitem__)
        path = folder / f"{VARIANT.name}_{digest or jit.sources_hash()}_{architectures}.so"
        path.write_text("machine code")
        return path

    return make


@pytest.mark.parametrize(
    ("architectures", "devices"),
    [
        ("sm90a", [(9, 0)]),
        ("sm90a", []),
        ("sm80_sm90a", [(9, 0), (8, 0), (8, 9)]),
        ("sm120f", [(12, 1)]),
        ("sm100a_sm103a", [(10, 3)]),
    ],
)
def test_a_library_with_code_for_every_gpu_is_loaded_without_a_compiler(ahead, architectures, devices, capsys):
    path = ahead(architectures, *devices)
    assert jit.load(VARIANT) == path
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("architectures", "device"),
    [("sm90a", (8, 0)), ("sm90a", (9, 1)), ("sm89", (8, 0)), ("sm100a", (10, 3)), ("sm80", (9, 0))],
)
def test_a_library_without_code_for_a_gpu_is_not_loaded(ahead, architectures, device):
    ahead(architectures, (9, 0), device)
    with pytest.raises(jit.KernelUnavailableError, match="no CUDA compiler") as raised:
        jit.load(VARIANT)
    assert "FI_PREFETCH_AOT_DIR" in str(raised.value) and VARIANT.name in str(raised.value)


def test_a_library_of_another_version_is_not_loaded(ahead):
    ahead("sm90a", (9, 0), digest="01234567")
    with pytest.raises(jit.KernelUnavailableError, match="this version's"):
        jit.load(VARIANT)


@pytest.mark.parametrize("whose", ["folder", "library"])
def test_a_library_that_every_user_may_write_is_not_run(ahead, whose):
    path = ahead("sm90a", (9, 0))
    place = path.parent if whose == "folder" else path
    place.chmod(0o777)
    with pytest.raises(jit.KernelUnavailableError, match=f"{place} .*may be written by every user.*chmod o-w {place}"):
        jit.load(VARIANT)


def test_what_is_not_compiled_ahead_is_compiled(ahead, monkeypatch, tmp_path):
    ahead("sm80", (9, 0))
    spec = FakeSpec(tmp_path / "missing.so", object())
    monkeypatch.setattr(jit, "jit_spec", lambda variant: spec)
    assert jit.load(VARIANT) is spec.result


def test_a_damaged_library_is_named(ahead, monkeypatch):
    path = ahead("sm90a", (9, 0))

    def refuse(path: str) -> None:
        raise RuntimeError("file too short")

    monkeypatch.setattr(jit.tvm_ffi, "load_module", refuse)
    with pytest.raises(jit.KernelUnavailableError, match=f"could not load {path}: file too short"):
        jit.load(VARIANT)


def test_architectures_are_said_to_the_build_too(monkeypatch):
    """FlashInfer reads them from the environment when it builds; what was there before comes back."""
    monkeypatch.setenv("FLASHINFER_CUDA_ARCH_LIST", "8.0")
    with jit.target_architectures(["9.0a", "10.0a"]):
        assert os.environ["FLASHINFER_CUDA_ARCH_LIST"] == "9.0a 10.0a"
        assert jit.architectures_here() == ["10.0a", "9.0a"]
    assert os.environ["FLASHINFER_CUDA_ARCH_LIST"] == "8.0"
    with jit.target_architectures([]), pytest.raises(jit.KernelUnavailableError, match="--arch"):
        jit.architectures_here()


def test_importing_is_light():
    code = (
        "import sys, fi_prefetch; assert 'torch' not in sys.modules\n"
        "fi_prefetch.BatchDecodeWithPagedKVCacheWrapper\n"
        "import torch; assert not torch.cuda.is_initialized()"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
