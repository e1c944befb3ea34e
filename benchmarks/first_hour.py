"""Times a first hour with a wheel: `python benchmarks/first_hour.py WHEEL OUTPUT`, on a machine with a GPU and nvcc.

The wheel goes into an empty folder, with what else it needs found where this interpreter finds it. Then everything
runs twice, each step in a process of its own: with nvcc and an empty cache of compiled kernels; and without nvcc and
with another empty cache, on the libraries that `fi-prefetch build --aot` has left. A row of the result file is a step
and its `seconds` by "nvcc" and "aot", null where it is not one.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

BF16 = "fi_prefetch_batch_decode_q_bf16_kv_bf16_o_bf16_hd128_swa0_cap0"
E4M3 = BF16.replace("kv_bf16", "kv_e4m3")
MAIN = ["-c", "from fi_prefetch.cli import main; main()"]
# The package itself imports nothing before it is used.
IMPORT = "from fi_prefetch import BatchDecodeWithPagedKVCacheWrapper"
# Says how long it took until the kernel was loaded, and that the answer is attention's. The context and the first
# touch of PyTorch's are there before, as they are in a program that has a model.
DECODE = """
import json, time, torch
from fi_prefetch import BatchDecodeWithPagedKVCacheWrapper, reference
device = "cuda" if torch.cuda.is_available() else "cpu"
table = [torch.tensor(x, dtype=torch.int32, device=device) for x in ([0, 7], [6, 5, 4, 3, 2, 1, 0], [4])]
kv_cache = torch.randn(7, 2, 16, 8, 128, dtype=torch.bfloat16, device=device)
q = torch.randn(1, 32, 128, dtype=torch.bfloat16, device=device)
wrapper = BatchDecodeWithPagedKVCacheWrapper(torch.zeros(128 << 20, dtype=torch.uint8, device=device), "NHD")
start = time.monotonic()
wrapper.plan(*table, 32, 8, 128, 16, q_data_type=torch.bfloat16)
seconds = time.monotonic() - start
out = wrapper.run(q, kv_cache)
truth, _ = reference.batch_decode(q, kv_cache[:, 0], kv_cache[:, 1], *table)
error = float((out.float() - truth.float()).norm() / truth.float().norm())
expected = "reference" if device == "cpu" else "fi_prefetch"
assert wrapper.kernel_choice.kernel == expected, wrapper.kernel_choice
assert error < 0.01, error
print(json.dumps(seconds))
"""
HEADER = """
import json, torch
from fi_prefetch.bench import environment
from fi_prefetch.jit import sources_hash
gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
versions = environment.versions()
about = {"gpu": gpu, "driver": environment.driver_version(), "commit": environment.commit(), "sources": sources_hash()}
print(json.dumps({**about, **{name: versions[name] for name in ("torch", "flashinfer", "fi_prefetch", "nvcc")}}))
"""


class Machine:
    """Where the steps run: the wheel's folder, and an environment without this checkout."""

    def __init__(self, site: Path, scratch: Path, **changes: str) -> None:
        checkout = Path(__file__).resolve().parents[1]
        paths = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
        others = [path for path in paths if Path(path).resolve() != checkout]
        self.folder = scratch
        self.cache = scratch / "cache"
        self.cache.mkdir(parents=True)
        self.environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join([str(site), *others]),
            "FLASHINFER_WORKSPACE_BASE": str(self.cache),
            "XDG_CACHE_HOME": str(self.cache),
            **changes,
        }

    def python(self, *arguments: str) -> str:
        """What a new interpreter prints; its own words go where ours go. Raises CalledProcessError where it fails."""
        command = [sys.executable, "-W", "ignore", *arguments]
        done = subprocess.run(command, cwd=self.folder, env=self.environment, stdout=subprocess.PIPE, text=True)
        if done.returncode:
            print(done.stdout[-2000:], file=sys.stderr)
        done.check_returncode()
        return done.stdout


def without_nvcc(site: Path, scratch: Path, kernels: Path) -> Machine:
    """As on an image that has no toolkit: nothing on PATH, no CUDA_HOME, and none of the default places looked at."""
    folders = [f for f in os.environ["PATH"].split(os.pathsep) if not Path(f, "nvcc").exists()]
    places = {"PATH": os.pathsep.join(folders), "FLASHINFER_NVCC": "/no/nvcc", "FI_PREFETCH_AOT_DIR": str(kernels)}
    machine = Machine(site, scratch, **places)
    for name in ("CUDA_HOME", "CUDA_PATH"):
        machine.environment.pop(name, None)
    return machine


def main(wheel: Path, output: Path) -> None:
    """Runs every step, and writes the result file. A step that fails ends it, and what went before is in the file."""
    rows: dict[str, dict[str, float | None]] = {}

    def note(name: str, column: str, seconds: float) -> None:
        rows.setdefault(name, {"nvcc": None, "aot": None})[column] = round(seconds, 2)
        print(f"{column:>4} {name}: {seconds:.2f} s", flush=True)

    def step(name: str, column: str, action: Callable[[], Any]) -> Any:
        start = time.monotonic()
        value = action()
        note(name, column, time.monotonic() - start)
        return value

    header: dict[str, Any] = {}

    def write(complete: bool) -> None:
        steps = [{"step": name, "seconds": seconds} for name, seconds in rows.items()]
        content = {**header, "cores": os.cpu_count(), "complete": complete, "rows": steps}
        output.write_text(json.dumps(content, indent=1) + "\n")

    with tempfile.TemporaryDirectory() as folder:
        scratch, site, kernels = Path(folder), Path(folder, "site"), Path(folder, "kernels")
        start = time.monotonic()
        install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--target", str(site)]
        step("install the wheel", "nvcc", lambda: subprocess.run([*install, str(wheel.resolve())], check=True))
        machine = Machine(site, scratch / "nvcc")
        header.update(json.loads(machine.python("-c", HEADER)))

        def everything(machine: Machine, column: str, start: float) -> None:
            step("import the wrapper", column, lambda: machine.python("-c", IMPORT))
            step("fi-prefetch info", column, lambda: machine.python(*MAIN, "info"))
            for name, plan in (("the first decode", "compiling and loading the kernel"), ("the second", "loading it")):
                loading = step(f"{name}, whole process", column, lambda: machine.python("-c", DECODE))
                note(f"{name}: {plan}", column, json.loads(loading))
            step("fi-prefetch demo", column, lambda: machine.python(*MAIN, "demo"))
            note("all of it", column, time.monotonic() - start)
            write(complete=False)

        def build() -> None:
            arch = [] if header["gpu"] else ["--arch", "9.0a"]
            for name in (BF16, E4M3):
                machine.python(*MAIN, "build", *arch, "--only", name, "--aot", str(kernels))

        everything(machine, "nvcc", start)
        step("fi-prefetch build --aot, two kernels and what measures", "nvcc", build)
        bare = without_nvcc(site, scratch / "aot", kernels)
        everything(bare, "aot", time.monotonic())
        compiled = sorted(path.name for path in bare.cache.rglob("*.so"))
    if compiled:
        raise SystemExit(f"without nvcc these were compiled all the same: {', '.join(compiled)}")
    write(complete=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
