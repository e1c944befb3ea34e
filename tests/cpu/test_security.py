"""What the package loads and runs: its own sources, from its own folder, into the user's own cache, and no text that
a shell, an unpickler or an interpreter would run."""

from __future__ import annotations

import ast
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fi_prefetch import jit

ROOT = Path(__file__).resolve().parents[2]
SOURCES = sorted((ROOT / "fi_prefetch").rglob("*.py"))

UNPICKLERS = {"pickle", "cPickle", "dill", "cloudpickle", "shelve", "marshal", "joblib"}
NETWORK = {"urllib", "http", "requests", "httpx", "socket", "ftplib", "aiohttp", "huggingface_hub"}
INTERPRETERS = {"eval", "exec", "compile", "__import__"}
SHELLS = {"system", "popen", "getoutput", "getstatusoutput", "create_subprocess_shell", "execl", "spawnl"}
PROCESSES = {"run", "Popen", "call", "check_call", "check_output"}


def name_of(function: ast.expr) -> str:
    """`a.b.c` of a call's function."""
    return ast.unparse(function) if isinstance(function, (ast.Name, ast.Attribute)) else ""


def complaints(code: str) -> list[str]:
    """What in a module's code would run, unpickle or fetch something that is not the package's."""
    tree = ast.parse(code)
    found = []
    texts = {}  # names that are text wherever they are assigned in this module
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign) and isinstance(node.value, (ast.Constant, ast.JoinedStr)):
            texts.update({target.id: node.value for target in node.targets if isinstance(target, ast.Name)})
    for node in ast.walk(tree):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]
            for top in {module.partition(".")[0] for module in modules}:
                if top in UNPICKLERS | NETWORK and not (isinstance(node, ast.ImportFrom) and node.level):
                    found.append(f"imports {top}")
        if not isinstance(node, ast.Call):
            continue
        name, keywords = name_of(node.func), {keyword.arg: keyword.value for keyword in node.keywords}
        last = name.rpartition(".")[2]
        if name in INTERPRETERS:
            found.append(f"calls {name}")
        if last in SHELLS:
            found.append(f"calls {name}")
        if name == "tempfile.mktemp":
            found.append("calls tempfile.mktemp")
        if name == "torch.load" and not getattr(keywords.get("weights_only"), "value", False):
            found.append("torch.load without weights_only")
        if name in ("numpy.load", "np.load") and getattr(keywords.get("allow_pickle"), "value", False):
            found.append("numpy.load with allow_pickle")
        if name.endswith("yaml.load"):
            found.append("yaml.load")
        if "shell" in keywords and getattr(keywords["shell"], "value", True):
            found.append(f"{name} with a shell")
        if name.startswith("subprocess.") and last in PROCESSES:
            command = node.args[0] if node.args else keywords.get("args")
            if isinstance(command, ast.Name):
                command = texts.get(command.id, command)
            if isinstance(command, (ast.Constant, ast.JoinedStr, ast.BinOp)):
                found.append(f"{name} of a text")
    return found


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_the_package_runs_no_text(path: Path) -> None:
    assert not complaints(path.read_text())


@pytest.mark.parametrize(
    ("code", "complaint"),
    [
        ("import pickle", "imports pickle"),
        ("from urllib.request import urlopen", "imports urllib"),
        ("import subprocess\nsubprocess.run(f'nvcc {x}', shell=True)", "subprocess.run with a shell"),
        ("import subprocess\nsubprocess.run(['a'], shell=flag)", "subprocess.run with a shell"),
        ("import subprocess\nc = f'nvcc {x}'\nsubprocess.Popen(c)", "subprocess.Popen of a text"),
        ("import os\nos.system('ls')", "calls os.system"),
        ("eval(x)", "calls eval"),
        ("torch.load(path)", "torch.load without weights_only"),
        ("np.load(path, allow_pickle=True)", "numpy.load with allow_pickle"),
    ],
)
def test_what_would_be_found(code: str, complaint: str) -> None:
    assert complaint in complaints(code)


def test_what_is_compiled_is_the_packages_own(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Neither the working folder nor an environment variable leads to other sources."""
    (tmp_path / "csrc").mkdir()
    (tmp_path / "csrc" / "decode.cu").write_text("#error not ours")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    nvcc = tmp_path / "nvcc"
    nvcc.write_text("#!/bin/sh\n")
    nvcc.chmod(0o755)
    monkeypatch.setenv("FLASHINFER_NVCC", str(nvcc))
    jit.csrc_dir.cache_clear()
    package = Path(jit.__file__).resolve().parent
    for variant in jit.all_variants():
        spec = jit.jit_spec(variant, ["9.0a"])
        for path in (*spec.sources, *spec.extra_include_dirs):
            assert package.parent in path.resolve().parents, path
            assert tmp_path not in path.parents
        assert [path.name for path in spec.sources] == ["decode.cu"]


CACHE = """
import os, torch
os.umask(0o022)
from pathlib import Path
from fi_prefetch import jit
variant = jit.Variant(torch.bfloat16, torch.bfloat16, torch.bfloat16, 128, False, False)
spec = jit.jit_spec(variant, ["9.0a"])
spec.write_ninja()
print(spec.get_library_path())
print(spec.lock_path)
"""


def test_the_cache_is_the_users_own(tmp_path: Path) -> None:
    """Under the home folder, nothing in it writable by others, and nothing of it in a folder that all users share."""
    nvcc = tmp_path / "nvcc"
    nvcc.write_text("#!/bin/sh\n")
    nvcc.chmod(0o755)
    home = tmp_path / "home"
    home.mkdir()
    environment = {name: value for name, value in os.environ.items() if not name.startswith("FLASHINFER")}
    environment |= {"HOME": str(home), "PYTHONPATH": str(ROOT), "FLASHINFER_NVCC": str(nvcc)}
    environment["FLASHINFER_CUDA_ARCH_LIST"] = "9.0a"
    ended = subprocess.run(
        [sys.executable, "-c", CACHE], capture_output=True, text=True, env=environment, timeout=120, check=True
    )
    library, lock = map(Path, ended.stdout.split()[-2:])
    assert home in library.parents and home in lock.parents
    made = [path for path in home.rglob("*") if not path.is_symlink()]
    assert library.parent in made
    open_to_all = [path for path in made if path.stat().st_mode & (stat.S_IWOTH | stat.S_IWGRP)]
    assert not open_to_all


def test_a_wrapper_is_no_pickle() -> None:
    """A pickle that claims to be a wrapper would run what it says: there is none to be made."""
    import pickle

    import fi_prefetch

    wrapper = fi_prefetch.BatchDecodeWithPagedKVCacheWrapper(torch.zeros(64, dtype=torch.uint8))
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        with pytest.raises(TypeError, match="cannot be pickled"):
            pickle.dumps(wrapper, protocol)
