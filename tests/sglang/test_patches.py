"""The patches of integration/sglang: they fit each release's sources, which then have the choice without a plugin."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path

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


@pytest.fixture(params=TOOLS)
def patched(request: pytest.FixtureRequest, release: Release, tmp_path: Path) -> Path:
    """A folder with the release's package, patched. Both tools replace files and leave what they are linked to."""
    shutil.copytree(release.sources / "sglang", tmp_path / "sglang", copy_function=os.link)
    patch = INTEGRATION / f"sglang-{release.version}.patch"
    # Without a repository around it, git apply takes the current folder for the root.
    environment = os.environ | {"GIT_CEILING_DIRECTORIES": str(tmp_path.parent)}
    done = subprocess.run(
        [*TOOLS[request.param], str(patch)], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "offset" not in done.stdout + done.stderr, "made for other sources than these"
    return tmp_path


def look(release: Release, sources: Path, model: Path, plugins: str) -> dict[str, object]:
    model.mkdir()
    (model / "config.json").write_text(json.dumps({"model_type": "llama", "architectures": ["LlamaForCausalLM"]}))
    output = release.run("-c", LOOK, model, path=(sources,), SGLANG_USE_CPU_ENGINE="1", SGLANG_PLUGINS=plugins)
    return json.loads(output.strip().splitlines()[-1])


def test_patched_sources_have_the_choice_without_the_plugin(release: Release, patched: Path, tmp_path: Path) -> None:
    seen = look(release, patched, tmp_path / "model", plugins="none_of_them")
    assert str(seen.pop("file")).startswith(str(patched))
    assert "latent attention" in str(seen.pop("refusal"))
    assert seen == {"attention_backend": "fi_prefetch", "choices": 1, "deterministic": 1}


def test_patch_leaves_the_installed_sources_alone(release: Release, patched: Path) -> None:
    registry = Path("sglang/srt/layers/attention/attention_registry.py")
    assert "fi_prefetch" in (patched / registry).read_text()
    assert "fi_prefetch" not in (release.sources / registry).read_text()


def test_plugin_on_patched_sources_adds_nothing(release: Release, tmp_path: Path) -> None:
    shutil.copytree(release.sources / "sglang", tmp_path / "sglang", copy_function=os.link)
    patch = INTEGRATION / f"sglang-{release.version}.patch"
    subprocess.run([*TOOLS["patch"], str(patch)], cwd=tmp_path, check=True, capture_output=True)
    seen = look(release, tmp_path, tmp_path / "model", plugins="fi_prefetch")
    assert (seen["choices"], seen["deterministic"]) == (1, 1)


def test_each_release_has_its_patch(release: Release) -> None:
    names = {path.name for path in INTEGRATION.glob("*.patch")}
    assert f"sglang-{release.version}.patch" in names
    from make_env import RELEASES

    assert names == {f"sglang-{version}.patch" for version in RELEASES}
