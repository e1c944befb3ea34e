"""The machine code of a compiled library, read with NVIDIA's cuobjdump: what ptxas made of every kernel."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

_INSTRUCTION = re.compile(r"\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?\s*([A-Z][\w.]*)\s*([^;]*)")


@dataclass
class Kernel:
    """One kernel on one architecture.

    Attributes:
        usage: registers ("REG"), bytes of stack ("STACK"), of static shared memory ("SHARED"), ... as ptxas reports.
        instructions: mnemonics with their modifiers, in the order of their addresses.
        operands: of each of them.
    """

    usage: dict[str, int] = field(default_factory=dict)
    instructions: list[str] = field(default_factory=list)
    operands: list[str] = field(default_factory=list)

    def count(self, start: str, *parts: str) -> int:
        """Instructions that start with `start` and have all of `parts` among their modifiers."""
        found = Counter(self.instructions)
        return sum(
            number
            for name, number in found.items()
            if name.split(".")[0] == start and all(part in name.split(".") for part in parts)
        )


def cuobjdump() -> Path:
    """NVIDIA's cuobjdump as the test extra installs it; raises FileNotFoundError where it is not there."""
    spec = importlib.util.find_spec("nvidia.cu13")
    for folder in (spec.submodule_search_locations if spec else None) or ():
        if (tool := Path(folder) / "bin" / "cuobjdump").is_file():
            return tool
    raise FileNotFoundError("no cuobjdump: install the test extra, which has nvidia-cuda-cuobjdump")


def kernels(library: Path) -> dict[tuple[str, str], Kernel]:
    """Every kernel in a library or object file, by architecture ("sm_90a") and mangled name."""
    found: dict[tuple[str, str], Kernel] = {}
    architecture = ""
    kernel = Kernel()
    for line in _dump(library, "-res-usage"):
        if line.startswith("arch = "):
            architecture = line.split(" = ")[1].strip()
        elif name := re.match(r"\s*Function (\S+):$", line):
            kernel = found[architecture, name[1]] = Kernel()
        elif "REG:" in line:
            kernel.usage = {name: int(value) for name, value in re.findall(r"(\w+):(\d+)", line)}
    for line in _dump(library, "-sass"):
        if line.startswith("arch = "):
            architecture = line.split(" = ")[1].strip()
        elif name := re.match(r"\s*Function : (\S+)$", line):
            kernel = found[architecture, name[1]]
        elif instruction := _INSTRUCTION.match(line):
            kernel.instructions.append(instruction[1])
            kernel.operands.append(instruction[2])
    return found


def _dump(library: Path, what: str) -> list[str]:
    tool = cuobjdump()
    # cuobjdump calls nvdisasm, which lies beside it.
    environment = os.environ | {"PATH": f"{tool.parent}{os.pathsep}{os.environ.get('PATH', '')}"}
    command = [tool, what, library]
    return subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout.splitlines()
