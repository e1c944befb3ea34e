"""A server started as users start it: the flag on the command line, answers over HTTP."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import pytest
from releases import HERE, TIMEOUT_S, Release

WRITE_MODEL = "import sys, pathlib, tiny_models; tiny_models.write('llama', pathlib.Path(sys.argv[1]))"
FLAGS = [
    "--device", "cpu", "--dtype", "float32", "--skip-tokenizer-init", "--skip-server-warmup", "--sampling-backend",
    "pytorch", "--grammar-backend", "none", "--mem-fraction-static", "0.1", "--max-total-tokens", "1024",
    "--disable-cuda-graph", "--disable-overlap-schedule",
]  # fmt: skip


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def ask(port: int, tokens: list[int], new_tokens: int) -> dict[str, Any]:
    sampling = {"temperature": 0.0, "max_new_tokens": new_tokens, "ignore_eos": True}
    body = json.dumps({"input_ids": tokens, "sampling_params": sampling}).encode()
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(f"http://127.0.0.1:{port}/generate", body, headers)
    with urllib.request.urlopen(request, timeout=300) as reply:
        return json.loads(reply.read())


def ask_when_up(server: subprocess.Popen[bytes], log: Path, port: int, tokens: list[int]) -> dict[str, Any]:
    deadline = time.monotonic() + TIMEOUT_S
    while time.monotonic() < deadline:
        if server.poll() is not None:
            pytest.fail(f"the server ended with {server.returncode}:\n{log.read_text()[-4000:]}")
        try:
            return ask(port, tokens, 8)
        except urllib.error.HTTPError as error:
            assert error.code == 503, error.read()
        except (urllib.error.URLError, ConnectionError):
            pass
        time.sleep(0.5)
    pytest.fail(f"the server was not up after {TIMEOUT_S} s:\n{log.read_text()[-4000:]}")


def test_server_with_the_flag_answers(release: Release, tmp_path: Path) -> None:
    model, log, port = tmp_path / "model", tmp_path / "log", free_port()
    release.run("-c", WRITE_MODEL, model, path=(HERE,))
    command = [release.python, "-m", "sglang.launch_server", "--model-path", model, "--port", str(port), *FLAGS]
    with log.open("wb") as output:
        # A session of its own, so that all its processes end with it.
        server = subprocess.Popen(
            [*map(str, command), "--attention-backend", "fi_prefetch"],
            env=release.environment(),
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            answer = ask_when_up(server, log, port, [5, 6, 7])
            again = ask(port, [5, 6, 7], 8)
        finally:
            os.killpg(server.pid, signal.SIGKILL)
            server.wait(60)
    assert len(answer["output_ids"]) == answer["meta_info"]["completion_tokens"] == 8
    assert again["output_ids"] == answer["output_ids"]
    assert "fi_prefetch: kernel reference" in log.read_text()


def test_server_refuses_a_flag_that_is_misspelt(release: Release, tmp_path: Path) -> None:
    command = ["-m", "sglang.launch_server", "--model-path", str(tmp_path), "--attention-backend", "fi_prefetcher"]
    with pytest.raises(pytest.fail.Exception, match=r"exited with 2(?s:.*)'fi_prefetch'"):
        release.run(*command)
