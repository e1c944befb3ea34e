"""The tested releases of SGLang, each with the environment that make_env.py made for it."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import make_env
import pytest

HERE = Path(__file__).resolve().parent
# Far more than a quiet machine needs; a hanging engine must end some time.
TIMEOUT_S = 1800


class Release:
    """One tested release of SGLang.

    Attributes:
        version: "0.5.16".
        python: the interpreter of its environment.
    """

    def __init__(self, version: str) -> None:
        self.version = version
        self.python = make_env.python_of(version)
        if not make_env.is_ready(version):
            pytest.fail(
                f"the environment for SGLang {version} is missing or out of date; make it with: {make_env.COMMAND}",
                pytrace=False,
            )

    @property
    def sources(self) -> Path:
        """The folder that has SGLang's package in it."""
        return next((make_env.HOME / self.version / "lib").glob("python*/site-packages"))

    def environment(self, path: tuple[Path, ...] = (), **more: str) -> dict[str, str]:
        """The variables for a process that serves on the CPU.

        Args:
            path: folders for the front of PYTHONPATH; the stand-ins are always there.
        """
        files = {file.stem for file in (self.sources / "sglang" / "srt" / "models").glob("*.py")}
        chosen = {
            "PYTHONPATH": os.pathsep.join(map(str, (*path, HERE / "standins"))),
            "PYTHONUNBUFFERED": "1",
            "SGLANG_USE_CPU_ENGINE": "1",
            "HF_HUB_OFFLINE": "1",
            # Spares every scheduler the import of some two hundred model files.
            "SGLANG_DISABLED_MODEL_ARCHS": ",".join(sorted(files - {"llama", "gemma2", "registry"})),
        }
        return os.environ | chosen | more

    def run(self, *arguments: str | Path, path: tuple[Path, ...] = (), **environment: str) -> str:
        """Runs the environment's Python; its output. Fails with the end of it where the exit status is not 0."""
        done = subprocess.run(
            [self.python, *map(str, arguments)],
            env=self.environment(path, **environment),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=TIMEOUT_S,
        )
        if done.returncode:
            pytest.fail(f"{' '.join(map(str, arguments))} exited with {done.returncode}:\n{done.stdout[-6000:]}")
        return done.stdout
