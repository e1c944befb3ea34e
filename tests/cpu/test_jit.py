"""How variants are named, and what FlashInfer's JIT is told to compile. Nothing is compiled here."""

from __future__ import annotations

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
    ]
    rotary = VARIANT._replace(position="ROPE_LLAMA")
    assert rotary.name == f"{VARIANT.name}_rope_llama"
    assert rotary.macros()[-1] == "-DFI_PREFETCH_POSITION=1"
    variants = jit.all_variants()
    assert len({variant.name for variant in variants}) == len(variants) == 144 + 144 + 72


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


def test_importing_is_light():
    code = (
        "import sys, fi_prefetch; assert 'torch' not in sys.modules\n"
        "fi_prefetch.BatchDecodeWithPagedKVCacheWrapper\n"
        "import torch; assert not torch.cuda.is_initialized()"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
