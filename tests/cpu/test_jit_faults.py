"""What can go wrong while a kernel is compiled and loaded: through FlashInfer's real JIT and ninja, with a script for
nvcc that compiles an empty module, fails or dies on request."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from flashinfer.jit import env as jit_env

from fi_prefetch import jit

ROOT = Path(__file__).resolve().parents[2]
# load() promises KernelUnavailableError, on which the wrapper goes to FlashInfer's kernel.
VARIANT = jit.Variant(torch.bfloat16, torch.bfloat16, torch.bfloat16, 128, False, False)
OTHER = VARIANT._replace(head_dim=64)

NVCC = """#!/bin/sh
top={top}
case " $* " in *" --dryrun "*) echo "#\\$ TOP=$top/cuda" >&2; exit 0;; esac
echo "$*" >> $top/compilations
sleep $(cat $top/seconds)
if [ -e $top/killed ]; then kill -9 $$; fi
if [ -e $top/message ]; then cat $top/message; exit 2; fi
while [ $# -gt 0 ]; do
  case $1 in -o) out=$2;; -MF) dependencies=$2;; esac
  shift
done
echo "int an_empty_module;" | c++ -x c++ -fPIC -c - -o $out && echo "$out:" > $dependencies
"""


class Toolchain:
    def __init__(self, top: Path) -> None:
        self.top, self.nvcc = top, top / "nvcc"
        self.nvcc.write_text(NVCC.format(top=top))
        self.nvcc.chmod(0o755)
        (top / "seconds").write_text("0")
        (top / "cuda" / "lib64").mkdir(parents=True)
        (top / "cuda" / "lib64" / "libcudart.so").write_text("/* nothing of the runtime is used */\n")

    def fails_with(self, message: str | None) -> None:
        if message is None:
            (self.top / "message").unlink(missing_ok=True)
        else:
            (self.top / "message").write_text(message)

    @property
    def compilations(self) -> int:
        log = self.top / "compilations"
        return len(log.read_text().splitlines()) if log.exists() else 0


@pytest.fixture
def toolchain(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The script as the compiler, and a JIT cache of the test's own."""
    made = Toolchain(tmp_path)
    monkeypatch.setenv("FLASHINFER_NVCC", str(made.nvcc))
    monkeypatch.setenv("FLASHINFER_CUDA_ARCH_LIST", "9.0a")
    monkeypatch.setattr(jit_env, "FLASHINFER_JIT_DIR", tmp_path / "cache")
    forget(monkeypatch)
    with jit.target_architectures(["9.0a"]):
        yield made


def forget(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a new process."""
    for name in ("_loaded", "_failed", "_locks"):
        monkeypatch.setattr(jit, name, {})


def test_a_kernel_that_does_not_compile(toolchain: Toolchain, monkeypatch: pytest.MonkeyPatch) -> None:
    toolchain.fails_with("decode.cu(7): error: expected a ';'")
    for _ in range(2):
        with pytest.raises(jit.KernelUnavailableError, match=r"decode.cu\(7\): error: expected a ';'"):
            jit.load(VARIANT)
    assert toolchain.compilations == 1, "a server would compile at every step"
    toolchain.fails_with(None)
    assert jit.load(OTHER) is not None, "one variant's failure is not another's"
    with pytest.raises(jit.KernelUnavailableError):
        jit.load(VARIANT)
    forget(monkeypatch)
    assert jit.load(VARIANT) is not None, "the next process tries again"
    assert toolchain.compilations == 3


def test_a_compiler_that_is_killed(toolchain: Toolchain, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a kernel does to the largest process when memory runs out."""
    (toolchain.top / "killed").touch()
    with pytest.raises(jit.KernelUnavailableError, match=f"could not build {VARIANT.name}"):
        jit.load(VARIANT)
    (toolchain.top / "killed").unlink()
    forget(monkeypatch)
    assert jit.load(VARIANT) is not None, "what it left is not taken for a library"


def test_no_memory_to_start_a_compiler(toolchain: Toolchain, monkeypatch: pytest.MonkeyPatch) -> None:
    def fork(*_: object, **__: object) -> None:
        raise OSError(12, "Cannot allocate memory")

    with monkeypatch.context() as patch:
        patch.setattr(subprocess, "run", fork)
        jit._toolkit.cache_clear()
        with pytest.raises(jit.KernelUnavailableError, match="Cannot allocate memory"):
            jit.load(VARIANT)
    forget(monkeypatch)
    assert jit.load(VARIANT) is not None


def test_a_full_disk(toolchain: Toolchain, monkeypatch: pytest.MonkeyPatch) -> None:
    toolchain.fails_with("fatal error: error writing to decode.o: No space left on device")
    with pytest.raises(jit.KernelUnavailableError, match="No space left on device"):
        jit.load(VARIANT)
    toolchain.fails_with(None)
    forget(monkeypatch)
    assert jit.load(VARIANT) is not None


def test_a_library_is_compiled_once(toolchain: Toolchain, monkeypatch: pytest.MonkeyPatch) -> None:
    assert jit.load(VARIANT) is not None
    forget(monkeypatch)
    assert jit.load(VARIANT) is not None
    assert toolchain.compilations == 1


@pytest.mark.parametrize("contents", [b"", b"\x7fELF cut short"])
def test_a_corrupt_library(toolchain: Toolchain, monkeypatch: pytest.MonkeyPatch, contents: bytes) -> None:
    """It is named, and deleting it cures."""
    spec = jit.jit_spec(VARIANT)
    spec.build(verbose=False)  # and not loaded: the process would have it already
    library = spec.get_library_path()
    library.write_bytes(contents)
    with pytest.raises(jit.KernelUnavailableError, match=library.stem):
        jit.load(VARIANT)
    forget(monkeypatch)
    library.unlink()
    assert jit.load(VARIANT) is not None


def a_file_in_its_place(top: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (top / "cache").write_text("")


def read_only(top: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the kernel would say it: to root nothing is read-only by its mode."""
    mkdir = Path.mkdir

    def refuse(self: Path, *args, **kwargs) -> None:
        if top / "cache" in (self, *self.parents):
            raise OSError(30, "Read-only file system", str(self))
        mkdir(self, *args, **kwargs)

    monkeypatch.setattr(Path, "mkdir", refuse)


@pytest.mark.parametrize("spoil", [a_file_in_its_place, read_only])
def test_a_cache_that_cannot_be_written(toolchain: Toolchain, monkeypatch: pytest.MonkeyPatch, spoil) -> None:
    with monkeypatch.context() as patch:
        spoil(toolchain.top, patch)
        with pytest.raises(jit.KernelUnavailableError, match="Read-only|File exists|Not a directory"):
            jit.load(VARIANT)


def test_a_compiler_that_may_not_be_run(toolchain: Toolchain) -> None:
    toolchain.nvcc.chmod(0o644)
    jit._toolkit.cache_clear()
    with pytest.raises(jit.KernelUnavailableError, match="Permission denied"):
        jit.load(VARIANT)


BUILD = """
import sys, torch
from fi_prefetch import jit
variant = jit.Variant(torch.bfloat16, torch.bfloat16, torch.bfloat16, 128, False, False)
print("ready", flush=True)
sys.stdin.readline()
jit.load(variant)
print("loaded", flush=True)
"""


def test_two_processes_that_build_the_same_kernel(tmp_path: Path) -> None:
    toolchain = Toolchain(tmp_path)
    (tmp_path / "seconds").write_text("1")
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "FLASHINFER_NVCC": str(toolchain.nvcc),
        "FLASHINFER_WORKSPACE_BASE": str(tmp_path),
        "FLASHINFER_CUDA_ARCH_LIST": "9.0a",
    }
    with contextlib.ExitStack() as stack:
        processes = [
            stack.enter_context(
                subprocess.Popen(
                    [sys.executable, "-c", BUILD],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.DEVNULL,
                    text=True,
                    env=environment,
                )
            )
            for _ in range(2)
        ]
        for process in processes:
            assert process.stdout.readline() == "ready\n"
        for process in processes:
            process.stdin.write("\n")
            process.stdin.flush()
        for process in processes:
            said, _ = process.communicate(timeout=120)
            assert said == "loaded\n" and process.returncode == 0
    assert toolchain.compilations == 1, "one waits for the other"
