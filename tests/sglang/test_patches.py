"""The patches of integration/sglang: they fit each release's sources, which then have the choice without a plugin."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import make_env
import pytest
from releases import Release

INTEGRATION = Path(__file__).resolve().parents[2] / "integration" / "sglang"
TOOLS = {
    "patch": ["patch", "--strip=1", "--fuzz=0", "--no-backup-if-mismatch", "--input"],
    "git apply": ["git", "apply", "--verbose"],
}
LOOK = """
import json, sys
from sglang.srt import server_args
from sglang.srt.layers.attention.attention_registry import ATTENTION_BACKENDS
from sglang.srt.plugins import load_plugins
load_plugins()
args = server_args.prepare_server_args(
    ["--model-path", sys.argv[1], "--device", "cpu", "--skip-tokenizer-init", "--attention-backend", "fi_prefetch"]
)
class Latent: use_mla_backend = True
try:
    ATTENTION_BACKENDS["fi_prefetch"](Latent)
except ValueError as error:
    refusal = str(error)
print(json.dumps({
    "file": server_args.__file__,
    "attention_backend": args.attention_backend,
    "choices": server_args.ATTENTION_BACKEND_CHOICES.count("fi_prefetch"),
    "deterministic": server_args.DETERMINISTIC_ATTENTION_BACKEND_CHOICES.count("fi_prefetch"),
    "refusal": refusal,
}))
"""


def patched(release: Release, tool: str, folder: Path) -> Path:
    """A folder with the release's package, patched. Both tools replace files and leave what they are linked to."""
    shutil.copytree(release.sources / "sglang", folder / "sglang", copy_function=os.link)
    patch = INTEGRATION / f"sglang-{release.version}.patch"
    # Without a repository around it, git apply takes the current folder for the root.
    environment = os.environ | {"GIT_CEILING_DIRECTORIES": str(folder.parent)}
    done = subprocess.run([*TOOLS[tool], str(patch)], cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "offset" not in done.stdout + done.stderr, "made for other sources than these"
    return folder


def look(release: Release, sources: Path, plugins: str) -> dict[str, object]:
    """What a server sees on these sources with these plugins."""
    model = sources / "model"
    model.mkdir()
    (model / "config.json").write_text(json.dumps({"model_type": "llama", "architectures": ["LlamaForCausalLM"]}))
    output = release.run("-c", LOOK, model, path=(sources,), SGLANG_PLUGINS=plugins)
    return json.loads(output.strip().splitlines()[-1])


@pytest.mark.parametrize("plugins", ["none_of_them", "fi_prefetch"])
def test_patched_sources_have_the_choice_once(release: Release, tmp_path: Path, plugins: str) -> None:
    seen = look(release, patched(release, "patch", tmp_path), plugins)
    assert str(seen.pop("file")).startswith(str(tmp_path))
    assert "latent attention" in str(seen.pop("refusal"))
    assert seen == {"attention_backend": "fi_prefetch", "choices": 1, "deterministic": 1}


def test_both_tools_make_the_same_of_the_sources(release: Release, tmp_path: Path) -> None:
    folders = [tmp_path / name.replace(" ", "-") for name in TOOLS]
    for tool, folder in zip(TOOLS, folders, strict=True):
        folder.mkdir()
        patched(release, tool, folder)
    patch = (INTEGRATION / f"sglang-{release.version}.patch").read_text()
    for name in re.findall(r"^\+\+\+ b/(.*)$", patch, flags=re.MULTILINE):
        first, second = ((folder / name).read_text() for folder in folders)
        assert first == second != (release.sources / name).read_text()


def test_each_release_has_its_patch() -> None:
    names = {path.name for path in INTEGRATION.glob("*.patch")}
    assert names == {f"sglang-{version}.patch" for version in make_env.RELEASES}


def test_a_releases_tests_stay_in_one_process(release: Release, request: pytest.FixtureRequest) -> None:
    """Where tests are spread by groups: each process would else start all of the release's engines."""
    by_groups = getattr(request.config.option, "loadgroup", False)
    assert request.node.nodeid.endswith(f"@sglang-{release.version}") == by_groups
